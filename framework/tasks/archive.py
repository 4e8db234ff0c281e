"""Finds the files of a data set: in a folder, or in the optional package aeon, which contains some data sets."""

from __future__ import annotations

from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from ...errors import InputError

HIDDEN = ("__macosx", "thumbs.db", "desktop.ini")
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
    """Find a file of a data set. Case does not matter, and names that begin with a dot are not seen.

    Args:
        source: `AEON`, a folder, the file itself, or another file of the data set in the same folder.
        name: of the data set; may be empty if the folder holds one only.
        pattern: glob of the file's name, such as ``*.csv``, or ``NAME_TEST.ts`` for one of several files. It is looked
            for in the subfolder ``name`` of the source, then in the source itself, where ``*`` stands for ``name``.

    Raises:
        InputError: no file matches, or several do.
    """
    root = Path(aeon_datasets().__file__).parent / "data" if source == AEON else Path(source).expanduser()
    if Path(name).name != name:
        raise InputError("data.name", name, "must be a name, not a path", "give the path as data.source")
    try:
        if root.is_file():
            if "*" in pattern or _matches(root, pattern):
                return root
            root = root.parent
        elif not root.exists():
            raise InputError("data.source", source, "there is no such file or folder")
        places = [(root / name, pattern)] if name else []
        for folder, glob in (*places, (root, pattern.replace("*", escape(name) if name else "*"))):
            found = [path for path in _visible(folder) if _matches(path, glob)] if name or source != AEON else []
            if len(found) == 1:
                return found[0]
            if found:
                raise InputError("data.name", name, f"one of {', '.join(path.stem for path in found)}", "set data.name")
        glob = pattern.replace(escape(name), "*") if name else pattern
        known = [folder.name for folder in _visible(root) if any(_matches(path, glob) for path in _visible(folder))]
    except OSError as error:
        raise InputError("data.source", source, f"cannot be read: {error.strerror}") from None
    allowed = f"a data set of {source}: {', '.join(known) or 'there is none'}"
    raise InputError("data.name", name, allowed, "or the folder that holds it as data.source")


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is one of the system or of a tool, and no data: ``.DS_Store``, ``Thumbs.db``."""
    return path.name.startswith(".") or path.name.lower() in HIDDEN


def _visible(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, sorted; none if there is no such folder."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path)) if folder.is_dir() else []


def _matches(path: Path, pattern: str) -> bool:
    return fnmatchcase(path.name.lower(), pattern.lower())
