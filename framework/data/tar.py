"""Reads tar files that others wrote, without extracting them: whole regular members, each by its place in the file.

Formats: v7, ustar, GNU (long names) and pax. Whatever a member could do beyond holding bytes is refused: links,
devices, names that lead elsewhere. A tar file has a checksum of each header but none of its contents, so a member
whose bytes were changed cannot be known from the file alone.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from ...errors import InputError

BLOCK = 512
MAX_NAME = 4096
MAX_EXTENDED = 1 << 20  # bytes of a long name or of pax records
MAX_TAIL = 16 << 20  # zeros behind the end mark: no tape has longer records
MAX_DOCUMENT = 256 << 20  # bytes of a member, inflated
PIECE = 1 << 20

# Suffixes that are read, as the bytes that they are, each also as .gz; and those of formats that can hold pickles.
PLAIN = (
    "txt text md rst tex bib html htm xml css csv tsv json jsonl ndjson yaml yml toml ini cfg log diff patch srt vtt "
    "py pyi ipynb c h cc cpp hpp cu cuh m swift java kt scala cs go rs js mjs ts jsx tsx rb php pl lua r jl hs ml lisp "
    "clj el ex erl f90 asm s sh ps1 sql proto cmake mk fa fasta fastq seq bin dat"
)
PICKLES = "pkl pickle pyd pyc pt pth ckpt joblib dill npy npz"
RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=]+)=")
KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}


class BadSample(InputError):
    """A member that cannot be decoded; the rest of its archive can."""


@dataclass(frozen=True)
class Member:
    """A regular member: its name, the byte at which its content begins, and the size of that in bytes."""

    name: str
    offset: int
    num_bytes: int


def members(path: Path) -> Iterator[Member]:
    """Yield the regular members of a tar file in their order; no content is read, directories are left out.

    Raises:
        InputError: the file is cut, damaged or has something behind its end; a member is no regular file, is there
            twice, or has a name that is not one of a file below the archive.
        OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at, extended, seen = 0, dict[str, bytes](), set[str]()
        while any(header := _read(file.fileno(), path, at, BLOCK, size)):
            _check_sum(path, at, header)
            kind, num_bytes = header[156:157], _number(path, at, header[124:136])
            begin, name = at + BLOCK, _text(extended.get("path", _name(header)))
            if kind in (b"L", b"K", b"x", b"g"):
                if num_bytes > MAX_EXTENDED:
                    _damaged(path, at, f"has {num_bytes} bytes of names; {MAX_EXTENDED} are allowed")
                content = _read(file.fileno(), path, begin, num_bytes, size)
                if kind == b"L":
                    extended["path"] = content.split(b"\0")[0]
                elif kind in (b"x", b"g"):
                    records = _records(path, begin, content)
                    if kind == b"g" and records.keys() & {"path", "size"}:
                        _damaged(path, at, "gives one name or size to all members")
                    extended |= records if kind == b"x" else {}
                at = begin + _padded(num_bytes)
                continue
            if "size" in extended:
                num_bytes = _number(path, at, extended["size"], 10)
            if any(key.startswith("GNU.sparse") for key in extended):
                kind = b"S"
            extended = {}
            directory = kind == b"5" or (kind in (b"0", b"\0") and name.endswith("/"))
            name = _check_name(path, name)
            if directory:
                at = begin  # it has no content, whatever its size says
                continue
            at = begin + _padded(num_bytes)
            if kind not in (b"0", b"\0", b"7"):
                what = KINDS.get(kind, f"of the type {kind.decode('latin-1')!r}")
                _refuse(path, name, f"is {what}; only regular files are read", "make the archive anew from plain files")
            if begin + num_bytes > size:
                allowed = f"ends at byte {size}, inside of its member {_short(name)!r}, which needs {at - size} more"
                raise InputError("shard", str(path), allowed, "it was cut: fetch it again")
            if name in seen:
                _refuse(path, name, "is there twice", "make the archive anew")
            seen.add(name)
            yield Member(name, begin, num_bytes)
        _check_end(file.fileno(), path, at, size)
        if extended:
            _damaged(path, at, "ends where a member was announced")


def check_suffix(path: Path, name: str) -> None:
    """Raise InputError unless the member's suffix says that it is text or plain bytes."""
    suffix = PurePosixPath(name.lower().removesuffix(".gz")).suffix
    if suffix[1:] in PICKLES.split():
        fix = "write its text into the archive instead"
        _refuse(path, name, f"{suffix} can be code in disguise, which runs when it is loaded: it is never read", fix)
    if suffix[1:] not in PLAIN.split():
        fix = "unpack the archive into a folder and pack that, whatever the names, or leave the member out"
        _refuse(path, name, f"{suffix or 'a name without a suffix'} is not read from tar files", fix)


def read_member(path: Path, member: Member) -> bytes:
    """Read the content of a member, inflated if it is a ``.gz``.

    Raises:
        BadSample: it is too large, or no whole gzip file.
        InputError: the archive has become shorter.
        OSError: it cannot be read.
    """
    if member.num_bytes > MAX_DOCUMENT:
        raise _too_large(path, member.name)
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        content = _read(file.fileno(), path, member.offset, member.num_bytes, size)
    return _inflate(path, member.name, content) if member.name.lower().endswith(".gz") else content


def _inflate(path: Path, name: str, content: bytes) -> bytes:
    """Inflate a gzip file, never to more than `MAX_DOCUMENT` bytes."""
    found, room = [], MAX_DOCUMENT
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while piece := file.read(PIECE):
                room -= len(piece)
                if room < 0:
                    raise _too_large(path, name)
                found.append(piece)
    except (OSError, EOFError, zlib.error) as error:
        raise BadSample(f"member of {path}", _short(name), f"cannot be inflated: {error}") from None
    return b"".join(found)


def _read(file: int, path: Path, at: int, num_bytes: int, size: int) -> bytes:
    """Read so many bytes from ``at``; InputError where the file ends before them."""
    pieces, end = [], at + num_bytes
    while at < end and (piece := os.pread(file, min(end - at, 1 << 30), at)):
        pieces.append(piece)
        at += len(piece)
    if at < end:
        allowed = "is empty: 0 bytes" if not size else f"ends at byte {at} without the two empty blocks of a tar's end"
        raise InputError(
            "shard", str(path), allowed, "it was cut: fetch it again" if size else "fetch it, or remove it"
        )
    return b"".join(pieces)


def _check_end(file: int, path: Path, at: int, size: int) -> None:
    """Raise InputError unless the first of two empty blocks is at ``at``, and nothing but zeros behind them."""
    if any(_read(file, path, at + BLOCK, BLOCK, size)):
        _damaged(path, at, "is empty where a header belongs")
    if size - at > MAX_TAIL:
        _damaged(path, at, f"ends the archive, and {size - at} bytes follow")
    if _read(file, path, at, size - at, size).strip(b"\0"):
        _damaged(path, at, "ends the archive, and more follows: two archives in one, or one that was overwritten")


def _check_sum(path: Path, at: int, header: bytes) -> None:
    rest, found = header[:148] + b" " * 8 + header[156:], _number(path, at, header[148:156])
    # Some old programs added signed bytes.
    if found != sum(rest) and found != sum(rest) - 256 * sum(byte > 127 for byte in rest):
        _damaged(path, at, "is no tar header: its checksum is wrong")


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _number(path: Path, at: int, digits: bytes, base: int = 8) -> int:
    if base == 8 and digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    digits = digits.split(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*" if base == 8 else rb"[0-9]{1,19}", digits):
        _damaged(path, at, "has a number that is none")
    return int(digits or b"0", base)


def _records(path: Path, at: int, content: bytes) -> dict[str, bytes]:
    """Read pax records: ``length key=value`` lines, the length in decimal and of the whole line."""
    records, start = {}, 0
    while start < len(content):
        head = RECORD.match(content, start)
        end = start + int(head[1]) if head else 0
        if head is None or not head.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            _damaged(path, at, "has pax records that are none")
        records[_text(head[2])] = content[head.end() : end - 1]
        start = end
    return records


def _check_name(path: Path, name: str) -> str:
    """Return the name as a path below the archive; InputError unless it is one."""
    fix = "do not use this archive"
    if name.startswith("/") or "\\" in name or re.match("[A-Za-z]:", name) or ".." in name.split("/"):
        _refuse(path, name, "leads out of the archive", fix)
    if len(name) > MAX_NAME or re.search("[\0-\x1f\x7f]", name):
        _refuse(path, name, f"must be a name of at most {MAX_NAME} characters, none of them a control character", fix)
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK) * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}..."


def _too_large(path: Path, name: str) -> BadSample:
    allowed = f"is larger than {MAX_DOCUMENT >> 20} MiB, or inflates to more"
    fix = "unpack the archive into a folder and pack that, if it is to be trusted"
    return BadSample(f"member of {path}", _short(name), allowed, fix)


def _refuse(path: Path, name: str, allowed: str, fix: str) -> NoReturn:
    raise InputError(f"member of {path}", _short(name), allowed, fix)


def _damaged(path: Path, at: int, why: str) -> NoReturn:
    allowed = f"is damaged: the block at byte {at} {why}"
    raise InputError("shard", str(path), allowed, "fetch it again, or make it anew")
