"""Lists the files of a source: a file, a folder, tar shards, or the modules of Python's standard library.

A file is one on disk or a member of a tar file; its key is its path below the source, with ``/``. `records` splits
files into documents. Files are sorted by the bytes of their keys: the order does not depend on machine or locale.
"""

from __future__ import annotations

import io
import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ...errors import InputError
from .content import (
    COMPRESSIONS,
    DAMAGED,
    Binary,
    binary_format,
    compression_of,
    encoding_of,
    inflated_head,
    inflating,
    utf8,
)
from .tally import Tally, told
from .tar import INFLATE_BYTES, MAX_DOCUMENT, BadSample, Member, check_suffix, members, read_member

CPYTHON = "cpython"  # a folder of this name is given as ./cpython
TAR, COMPRESSED = ".tar", (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".fa": "fasta",
    ".fasta": "fasta",
    ".fna": "fasta",
    ".csv": "csv",
    ".tsv": "tsv",
}
PLAIN_KINDS = {".npy": "npy", ".parquet": "parquet"}  # never compressed
MAX_INFLATED = 1 << 30  # bytes of a text that is compressed
SPECIAL = {stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


@dataclass(frozen=True)
class File:
    """One file of a corpus.

    Args:
        key: its path below the source.
        path: of the file on disk: itself, or the tar file that contains it.
        num_bytes: its size.
        mtime_ns: time of the last change of ``path``, in nanoseconds.
        member: its place in the tar file; None for a file on disk.
        compression, encoding: of its text; see `content.compression_of` and `content.encoding_of`. Empty where its
            bytes are read as they are.
    """

    key: str
    path: Path
    num_bytes: int
    mtime_ns: int
    member: Member | None = None
    compression: str = ""
    encoding: str = ""

    @property
    def kind(self) -> str:
        """How it is split into documents: one of `KINDS` or `PLAIN_KINDS`, or ``text`` if the whole file is one."""
        name = self.key.lower()
        if self.member is not None:
            return "text"
        if kind := PLAIN_KINDS.get(PurePosixPath(name).suffix):
            return kind
        stem = next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)
        return KINDS.get(PurePosixPath(stem).suffix, "text")


def check_source(source: str) -> None:
    """Raise InputError if ``source`` is a URL or a ``pipe:`` command, which WebDataset itself would fetch or run."""
    if URL.match(source):
        fix = "fetch it first, then give the path of the file or folder"
        raise InputError("data.source", source, "must be a path: no command is run and nothing is fetched", fix)


def list_files(source: str, binary: Binary = "skip", tally: Tally | None = None) -> list[File]:
    """List the files of ``source``, sorted by the bytes of their keys; of each, the beginning is read.

    A folder is searched recursively for regular files. Skipped are names that begin with a dot (``.git``), symbolic
    links (their targets would be read twice, or lie outside the folder), FIFOs, sockets, devices, empty files, and
    files of another kind than `KINDS` whose content is no text. A ``.tar`` file, or a folder of ``.tar`` files only,
    is read as WebDataset shards: each member is a file, by the same rules.

    Args:
        source: the path of a file or folder, or ``cpython``: every ``.py`` file of the running Python's standard
            library, its tests included, without installed packages.
        binary: of files whose content is no text: ``skip`` them, read their ``bytes``, or raise an ``error``.
        tally: counts what is read, converted and skipped.

    Raises:
        InputError: ``source`` is missing, unreadable, a URL, or has nothing to read; it is a single file without a
            text, or ``binary`` forbids one; a tar file is damaged, empty, or has a member that is refused, see
            `tar.members` and `tar.check_suffix`.
    """
    check_source(source)
    tally = Tally() if tally is None else tally
    root = Path(sysconfig.get_path("stdlib") if source == CPYTHON else source).expanduser()
    try:
        mode = root.stat().st_mode
        if stat.S_ISDIR(mode):
            found = [_file(path.relative_to(root).as_posix(), path) for path in _walk(root, source, tally)]
        elif stat.S_ISREG(mode):
            found = [_file(root.name, root)]
        else:
            raise InputError("data.source", source, "must be a regular file or a folder")
        if shards := _are_shards(found, source):
            found = [member for file in found for member in _members(file, tally)]
    except OSError as error:
        raise unreadable(source, error) from None
    if stat.S_ISREG(mode) and not shards and binary == "skip":
        binary = "error"
    found.sort(key=lambda file: os.fsencode(file.key))
    judged = [_judged(file, binary, tally) for file in found]
    if not (files := [file for file in judged if file is not None]):
        skipped = [line for line in told(tally.as_json()) if line.startswith("skipped")]
        fix = "--binary=bytes (data.binary=bytes) packs the bytes of binary files" * ("binary" in str(skipped))
        raise InputError("data.source", source, "; ".join(["holds no document", *skipped]), fix)
    return files


def read_file(file: File) -> bytes:
    """Read one file, its text inflated and as UTF-8.

    Raises:
        BadSample: it cannot be read or decoded, or is too large.
        InputError: it has changed since it was listed.
    """
    with opened(file) as (_, stream):
        if not file.compression:
            return stream.read()
        content = bytearray()
        while part := stream.read(INFLATE_BYTES):
            content += part
            if len(content) > MAX_INFLATED:
                allowed = f"inflates to more than {MAX_INFLATED >> 20} MiB"
                fix = "inflate it: plain files may be larger"
                raise BadSample("file", str(file.path), allowed, fix, reason="too large")
        return bytes(content)


def lines(file: File) -> Iterator[tuple[int, bytes, int]]:
    """Yield each line's number (from 1), its content as UTF-8, and the number of bytes of the file read for it.

    Raises:
        BadSample: the file cannot be read or decoded from here on.
        InputError: a line is longer than `MAX_DOCUMENT`, or the file has changed since it was listed.
    """
    number = before = 0
    with opened(file) as (raw, stream):
        while line := stream.readline(MAX_DOCUMENT + 1):
            number, at = number + 1, raw.tell()
            if len(line) > MAX_DOCUMENT:
                allowed = f"is longer than {MAX_DOCUMENT >> 20} MiB"
                raise InputError("line", f"{file.path}:{number}", allowed, "is it what the file's name says?")
            yield number, line, at - before
            before = at


@contextmanager
def opened(file: File) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file: its bytes, of which a position can be told, and the stream of its text; see `read_file`."""
    field, path = ("file", str(file.path)) if file.member is None else (f"member of {file.path}", file.member.name)
    try:
        with open(file.path, "rb", opener=_open) as raw:
            status = os.fstat(raw.fileno())
            if status.st_mtime_ns != file.mtime_ns or (file.member is None and status.st_size != file.num_bytes):
                allowed = "was changed after it was listed"
                raise InputError("data.source", str(file.path), allowed, "pack it while nothing writes to it")
            if file.member is not None:
                stream: BinaryIO = io.BytesIO(read_member(file.path, file.member))
            else:
                stream = inflating(raw, file.compression)
            yield raw, utf8(stream, file.encoding)
    except UnicodeDecodeError as error:
        raise BadSample(field, path, f"is not {file.encoding}: {error.reason}", reason="damaged") from None
    except (OSError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise BadSample(field, path, f"cannot be read: {error.strerror}", reason="unreadable") from None
        fix = "it was cut or changed: fetch it again"
        raise BadSample(field, path, f"cannot be inflated: {error}", fix, reason="damaged") from None


def unreadable(path: str, error: OSError) -> InputError:
    """The InputError for a source whose file or folder ``path`` raised ``error``."""
    where = f" ({error.filename})" if error.filename and str(error.filename) != path else ""
    fix = "give the path of a file or folder, or cpython" if isinstance(error, FileNotFoundError) else ""
    return InputError("data.source", path, f"cannot be read: {error.strerror}{where}", fix)


def _walk(root: Path, source: str, tally: Tally) -> Iterator[Path]:
    """Yield the regular files below ``root``; an unreadable folder raises OSError instead of being skipped."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        if source == CPYTHON:
            folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")]
            names = [name for name in names if name.endswith(".py")]
        for name in (*folders, *names):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if name.startswith("."):
                tally.add("skipped", "hidden")
            elif stat.S_ISREG(mode):
                yield path
            elif not stat.S_ISDIR(mode):
                tally.add("skipped", SPECIAL.get(stat.S_IFMT(mode), "device"))
        folders[:] = [name for name in folders if not name.startswith(".")]  # links to folders are not followed


def _judged(file: File, binary: Binary, tally: Tally) -> File | None:
    """The file as its content says that it is read, or None if it is skipped."""
    if not file.num_bytes:
        tally.add("skipped", "empty")
        return None
    kind, compression = file.kind, compression_of(file.key)
    if kind in PLAIN_KINDS.values():
        tally.add("read", kind)
        return file
    try:
        with open(file.path, "rb", opener=_open) as raw:
            stream: BinaryIO = raw
            if file.member is not None:
                raw.seek(file.member.offset)
                stream = io.BytesIO(raw.read(min(file.num_bytes, INFLATE_BYTES)))
            head = inflated_head(stream, compression)
    except OSError:
        head = b""  # it cannot be read now: reading its documents will say so
    if kind == "text" and (name := binary_format(head)):
        if binary == "error":
            fix = "leave it out, or pack its bytes: --binary=bytes (data.binary=bytes)"
            raise InputError("data.source", file.key, f"is no text, but binary data ({name})", fix)
        tally.add(*("skipped", f"binary ({name})") if binary == "skip" else ("read", "binary as bytes"))
        return None if binary == "skip" else file
    encoding = encoding_of(head)
    for conversion in filter(None, (compression, encoding)):
        tally.add("converted", conversion)
    tally.add("read", kind)
    return replace(file, compression=compression, encoding=encoding)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # of a file that has become a FIFO, too


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


def _members(tar: File, tally: Tally) -> list[File]:
    """The files in a tar file; InputError if none has content."""
    found = []
    for member in members(tar.path):
        if any(part.startswith(".") for part in member.name.split("/")):
            tally.add("skipped", "hidden")
        else:
            check_suffix(tar.path, member.name)
            found.append(File(f"{tar.key}/{member.name}", tar.path, member.num_bytes, tar.mtime_ns, member))
    if not any(file.num_bytes for file in found):
        allowed = "holds no document, or only empty ones"
        raise InputError("shard", str(tar.path), allowed, "remove it, or create it again")
    return found


def _file(key: str, path: Path) -> File:
    status = path.stat()
    return File(key, path, status.st_size, status.st_mtime_ns)
