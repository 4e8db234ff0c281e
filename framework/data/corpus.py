"""Lists the files of a source: a file, a folder, tar shards, or the modules of Python's standard library.

A file is one on disk or a member of a tar file; its key is its path below the source, with ``/``. `records` splits
files into documents. Files are sorted by the bytes of their keys: the order does not depend on machine or locale.
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

CPYTHON = "cpython"  # a folder of this name is given as ./cpython
TAR, COMPRESSED = ".tar", (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class File:
    """One file of a corpus.

    Args:
        key: its path below the source.
        path: of the file on disk: itself, or the tar file that contains it.
        num_bytes: its size.
        mtime_ns: time of the last change of ``path``, in nanoseconds.
        member: its place in the tar file; None for a file on disk.
    """

    key: str
    path: Path
    num_bytes: int
    mtime_ns: int
    member: Member | None = None


def check_source(source: str) -> None:
    """Raise InputError if ``source`` is a URL or a ``pipe:`` command, which WebDataset itself would fetch or run."""
    if URL.match(source):
        fix = "fetch it first, then give the path of the file or folder"
        raise InputError("data.source", source, "must be a path: no command is run and nothing is fetched", fix)


def list_files(source: str) -> list[File]:
    """List the files of ``source``, sorted by the bytes of their keys; no content is read.

    A folder is searched recursively for regular files. Skipped are names that begin with a dot (``.git``), symbolic
    links (their targets would be read twice, or lie outside the folder) and empty files. A ``.tar`` file, or a folder
    of ``.tar`` files only, is read as WebDataset shards: each member is a file, by the same rules.

    Args:
        source: the path of a file or folder, or ``cpython``: every ``.py`` file of the running Python's standard
            library, its tests included, without installed packages.

    Raises:
        InputError: ``source`` is missing, unreadable, a URL, or has only empty files; a tar file is damaged, empty, or
            has a member that is refused, see `tar.members` and `tar.check_suffix`.
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
        BadSample: it is a member of a tar file that cannot be decompressed, or too large.
        InputError: it cannot be read, or has changed since it was listed.
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
    """The InputError for a source whose file or folder ``path`` raised ``error``."""
    where = f" ({error.filename})" if error.filename and str(error.filename) != path else ""
    fix = "give the path of a file or folder, or cpython" if isinstance(error, FileNotFoundError) else ""
    return InputError("data.source", path, f"cannot be read: {error.strerror}{where}", fix)


def _walk(root: Path, source: str) -> Iterator[Path]:
    """Yield the regular files below ``root``; an unreadable folder raises OSError instead of being skipped."""

    def fail(error: OSError) -> None:
        raise error

    skipped = {"site-packages", "dist-packages", "__pycache__"} if source == CPYTHON else set()
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            is_read = name.endswith(".py") if source == CPYTHON else not name.startswith(".")
            if is_read and stat.S_ISREG(path.lstat().st_mode):
                yield path


def _are_shards(found: list[File], source: str) -> bool:
    """Whether all files of a source are tar shards; InputError if some are, or if they are compressed."""
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
    """The files in a tar file; InputError if none has content."""
    found = []
    for member in members(tar.path):
        if not any(part.startswith(".") for part in member.name.split("/")):
            check_suffix(tar.path, member.name)
            found.append(File(f"{tar.key}/{member.name}", tar.path, member.num_bytes, tar.mtime_ns, member))
    if not any(file.num_bytes for file in found):
        allowed = "holds no document, or only empty ones"
        raise InputError("shard", str(tar.path), allowed, "remove it, or create it again")
    return found


def _file(key: str, path: Path) -> File:
    status = path.stat()
    return File(key, path, status.st_size, status.st_mtime_ns)
