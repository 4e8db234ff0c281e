"""The data that the package aeon brings along, and its readers; an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError

AEON = "aeon"  # as data.source: what the package has with it; nothing is fetched


def aeon_datasets() -> Any:
    """The module ``aeon.datasets``.

    Raises:
        InputError: aeon is not installed.
    """
    try:
        import aeon.datasets as found
    except ImportError:
        fix = "pip install 'longreach[tasks]'"
        raise InputError("data.source", AEON, "needs the package aeon, which is not installed", fix) from None
    return found


def find(source: str, name: str, pattern: str) -> Path:
    """The file of a data set.

    Args:
        source: `AEON`, or a folder, or the file itself or another one of the data set beside it.
        name: of the data set.
        pattern: of the file in the data set's folder; ``*`` stands for the name where files of several lie in one.

    Raises:
        InputError: there is none, or several.
    """
    root = Path(aeon_datasets().__file__).parent / "data" if source == AEON else Path(source).expanduser()
    if not root.exists():
        raise InputError("data.source", source, "there is no such file or folder")
    if root.is_file():
        if root.match(pattern):
            return root
        root = root.parent
    for place in (str(Path(name, pattern)), pattern.replace("*", name or "*")):
        found = sorted(root.glob(place)) if name or source != AEON else []
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError("data.name", name, f"one of {', '.join(file.stem for file in found)}", "set data.name")
    known = sorted(path.parent.name for path in root.glob(f"*/{pattern.replace(name, '*') if name else pattern}"))
    allowed = f"a data set of {source}: {', '.join(dict.fromkeys(known)) or 'there is none'}"
    raise InputError("data.name", name, allowed, "or the folder that holds it as data.source")
