"""Which files a source has: a file, a folder, tar shards, or the sources of this Python's own library.

A file is one on the disk, or one member of a tar file: a key (its path below the source, with ``/``) and its bytes;
`records` says which documents are in it. Files come in the byte order of their keys, so the same files give the same
order on every machine and in every locale.
"""

from __future__ import annotations

import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from .tar import Member, check_suffix, members, read_member

CPYTHON = "cpython"  # ./cpython is a folder of that name
TAR, COMPRESSED = ".tar", (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class File:
    """One file of a corpus.

    Args:
        key: its path below the source.
        path: the file that holds it.
        num_bytes: its size there.
        mtime_ns: when that file was last changed.
        member: its place in that file, if that is a tar file.
    """

    key: str
    path: Path
    num_bytes: int
    mtime_ns: int
    member: Member | None = None


def check_source(source: str) -> None:
    """Raise InputError where ``source`` is a command or an address, as other readers of shards take them."""
    if URL.match(source):
        fix = "fetch it first, then give the path of the file or folder"
        raise InputError("data.source", source, "must be a path: no command is run and nothing is fetched", fix)


def list_files(source: str) -> list[File]:
    """List the files of ``source`` in the byte order of their keys; no content is read.

    A folder is searched recursively for regular files. Names that begin with a dot are left out (``.git``),
    and so are links: inside the folder they would repeat a file, outside they would leave it.
    Empty files hold no token and are left out too. A ``.tar`` file, or a folder of nothing else, is read as
    WebDataset shards: each member is a file, by the same rules.

    Args:
        source: the path of a file or of a folder, or ``cpython``: every ``.py`` file of this Python's
            standard library, its tests included, installed packages not.

    Raises:
        InputError: ``source`` is missing, unreadable, an address, or holds nothing but empty files; a tar file is
            damaged, empty, or holds what is not read from one, see `tar.members` and `tar.check_suffix`.
    """
    check_source(source)
    root = Path(sysconfig.get_path("stdlib") if source == CPYTHON else source).expanduser()
    try:
        mode = root.stat().st_mode
        if stat.S_ISDIR(mode):
            found = [_file(path.relative_to(root).as_posix(), path) for path in _walk(root, source)]
        elif stat.S_ISREG(mode):
            found = [_file(root.name, root)]
        else:
            raise InputError("data.source", source, "must be a regular file or a folder")
        if _are_shards(found, source):
            found = [member for file in found for member in _members(file)]
    except OSError as error:
        raise unreadable(source, error) from None
    files = [file for file in found if file.num_bytes > 0]
    if not files:
        raise InputError(
            "data.source",
            source,
            f"holds no document: {len(found)} files, all empty" if found else "holds no regular file",
            "links and names that begin with a dot are not read",
        )
    return sorted(files, key=lambda file: os.fsencode(file.key))


def read_file(file: File) -> bytes:
    """Read one file.

    Raises:
        BadSample: it is a member of a tar file and cannot be decoded.
        InputError: it cannot be read, or its size is no longer the listed one.
    """
    try:
        if file.member is not None:
            if file.path.stat().st_mtime_ns != file.mtime_ns:
                allowed = "was changed after its members were listed"
                raise InputError("shard", str(file.path), allowed, "pack it while nothing writes to it")
            return read_member(file.path, file.member)
        content = file.path.read_bytes()
    except OSError as error:
        raise unreadable(str(file.path), error) from None
    if len(content) != file.num_bytes:
        allowed = f"had {file.num_bytes} bytes when it was listed and {len(content)} when it was read"
        raise InputError("data.source", str(file.path), allowed, "pack it while nothing writes to it")
    return content


def unreadable(path: str, error: OSError) -> InputError:
    """What is told of a file that the system does not let us read."""
    where = f" ({error.filename})" if error.filename and str(error.filename) != path else ""
    fix = "give the path of a file or folder, or cpython" if isinstance(error, FileNotFoundError) else ""
    return InputError("data.source", path, f"cannot be read: {error.strerror}{where}", fix)


def _walk(root: Path, source: str) -> Iterator[Path]:
    """Yield the regular files below ``root``; an unreadable folder raises OSError, or it would go missing."""

    def fail(error: OSError) -> None:
        raise error

    left_out = {"site-packages", "dist-packages", "__pycache__"} if source == CPYTHON else set()
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            wanted = name.endswith(".py") if source == CPYTHON else not name.startswith(".")
            if wanted and stat.S_ISREG(path.lstat().st_mode):
                yield path


def _are_shards(found: list[File], source: str) -> bool:
    """Tell whether the files of a source are tar shards; InputError where that is in doubt."""
    names = [file.key for file in found if "/" not in file.key]
    if compressed := [name for name in names if name.lower().endswith(COMPRESSED)]:
        allowed = f"holds {compressed[0]!r}: compressed tar files are not read"
        raise InputError("data.source", source, allowed, "decompress it first")
    shards = sum(file.key.endswith(TAR) for file in found)
    if shards < len(found) and any(name.endswith(TAR) for name in names):
        allowed = f"holds {shards} tar files beside {len(found) - shards} others"
        raise InputError("data.source", source, allowed, "give a folder of nothing but tar files, or of none")
    return 0 < shards == len(found)


def _members(tar: File) -> list[File]:
    """The files in a tar file."""
    found = []
    for member in members(tar.path):
        if not any(part.startswith(".") for part in member.name.split("/")):
            check_suffix(tar.path, member.name)
            found.append(File(f"{tar.key}/{member.name}", tar.path, member.num_bytes, tar.mtime_ns, member))
    if not any(file.num_bytes for file in found):
        raise InputError("shard", str(tar.path), "holds no document, or only empty ones", "remove it, or make it anew")
    return found


def _file(key: str, path: Path) -> File:
    status = path.stat()
    return File(key, path, status.st_size, status.st_mtime_ns)
