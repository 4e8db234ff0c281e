"""Finds the files of a data set: in a folder, or in the optional package aeon, which contains some data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError

AEON = "aeon"  # as data.source: the data sets within the installed package; nothing is downloaded


def aeon_datasets() -> Any:
    """Import ``aeon.datasets``.

    Raises:
        InputError: aeon is not installed.
    """
    try:
        import aeon.datasets
    except ImportError:
        fix = "pip install 'longreach[tasks]'"
        raise InputError("data.source", AEON, "needs the package aeon, which is not installed", fix) from None
    return aeon.datasets


def find_file(source: str, name: str, pattern: str) -> Path:
    """Find a file of a data set.

    Args:
        source: `AEON`, a folder, the file itself, or another file of the data set in the same folder.
        name: of the data set; may be empty if the folder holds one only.
        pattern: glob of the file's name. It is looked for in the subfolder ``name`` of the source, then in the source
            itself, where ``*`` is replaced by ``name``.

    Raises:
        InputError: no file matches, or several do.
    """
    root = Path(aeon_datasets().__file__).parent / "data" if source == AEON else Path(source).expanduser()
    if not root.exists():
        raise InputError("data.source", source, "there is no such file or folder")
    if root.is_file():
        if root.match(pattern):
            return root
        root = root.parent
    for glob in (str(Path(name, pattern)), pattern.replace("*", name or "*")):
        found = sorted(root.glob(glob)) if name or source != AEON else []
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError("data.name", name, f"one of {', '.join(file.stem for file in found)}", "set data.name")
    known = sorted(path.parent.name for path in root.glob(f"*/{pattern.replace(name, '*') if name else pattern}"))
    allowed = f"a data set of {source}: {', '.join(dict.fromkeys(known)) or 'there is none'}"
    raise InputError("data.name", name, allowed, "or the folder that holds it as data.source")
