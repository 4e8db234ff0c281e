"""Reads untrusted tar files without extracting them: lists regular members with their offsets, reads their bytes.

Formats: v7, ustar, GNU (long names) and pax. Links, devices and names that lead out of the archive are refused. A tar
file has a checksum for each header but none for the contents: changed bytes of a member cannot be detected.
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
MAX_TAIL = 16 << 20  # zeros after the end mark; padding to a tape's record is never longer
MAX_DOCUMENT = 256 << 20  # bytes of a member, decompressed
INFLATE_BYTES = 1 << 20  # decompressed at a time

# Suffixes of members that are read, as plain bytes, each also as .gz; and suffixes of formats that can hold pickles.
PLAIN = (
    "txt text md rst tex bib html htm xml css csv tsv json jsonl ndjson yaml yml toml ini cfg log diff patch srt vtt "
    "py pyi ipynb c h cc cpp hpp cu cuh m swift java kt scala cs go rs js mjs ts jsx tsx rb php pl lua r jl hs ml lisp "
    "clj el ex erl f90 asm s sh ps1 sql proto cmake mk fa fasta fastq seq bin dat"
)
PICKLES = "pkl pickle pyd pyc pt pth ckpt joblib dill npy npz"
RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=]+)=")
KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}


class BadSample(InputError):
    """A document or file that cannot be read or decoded, while others can; counted by `reading.BadSamples`.

    Args:
        field, value, allowed, fix: see `InputError`.
        reason: in few words, under which it is counted.
    """

    def __init__(self, field: str, value: object, allowed: str, fix: str = "", reason: str = "not decodable") -> None:
        super().__init__(field, value, allowed, fix)
        self.reason = reason


@dataclass(frozen=True)
class Member:
    """A regular member: its name, the offset of its content in the tar file and the content's size, in bytes."""

    name: str
    offset: int
    num_bytes: int


def members(path: Path) -> Iterator[Member]:
    """Yield the regular members of a tar file in order; no content is read, directories are skipped.

    Raises:
        InputError: the file is truncated, damaged or has data after its end mark; a member is not a regular file,
            has the name of an earlier one, or a name that is not a relative path below the archive.
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at, extended, seen = 0, dict[str, bytes](), set[str]()
        while any(header := _read_at(file.fileno(), path, at, BLOCK, size)):
            _check_checksum(path, at, header)
            kind, num_bytes = header[156:157], _number(path, at, header[124:136])
            begin, name = at + BLOCK, _text(extended.get("path", _name(header)))
            if kind in (b"L", b"K", b"x", b"g"):
                if num_bytes > MAX_EXTENDED:
                    _damaged(path, at, f"has {num_bytes} bytes of names; {MAX_EXTENDED} are allowed")
                content = _read_at(file.fileno(), path, begin, num_bytes, size)
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
                at = begin  # a directory has no content, even if its header gives a size
                continue
            at = begin + _padded(num_bytes)
            if kind not in (b"0", b"\0", b"7"):
                what = KINDS.get(kind, f"of the type {kind.decode('latin-1')!r}")
                fix = "create the archive again from plain files"
                _refuse(path, name, f"is {what}; only regular files are read", fix)
            if begin + num_bytes > size:
                allowed = f"ends at byte {size}, inside of its member {_short(name)!r}, which needs {at - size} more"
                raise InputError("shard", str(path), allowed, "it was cut: fetch it again")
            if name in seen:
                _refuse(path, name, "is there twice", "create the archive again")
            seen.add(name)
            yield Member(name, begin, num_bytes)
        _check_end(file.fileno(), path, at, size)
        if extended:
            _damaged(path, at, "ends where a member was announced")


def check_suffix(path: Path, name: str) -> None:
    """Raise InputError unless the member's suffix, without ``.gz``, is one of `PLAIN`."""
    suffix = PurePosixPath(name.lower().removesuffix(".gz")).suffix
    if suffix[1:] in PICKLES.split():
        fix = "write its text into the archive instead"
        _refuse(path, name, f"{suffix} can be code in disguise, which runs when it is loaded: it is never read", fix)
    if suffix[1:] not in PLAIN.split():
        fix = "unpack the archive into a folder and pack that, whatever the names, or leave the member out"
        _refuse(path, name, f"{suffix or 'a name without a suffix'} is not read from tar files", fix)


def read_member(path: Path, member: Member) -> bytes:
    """Read the content of a member, decompressed if its name ends in ``.gz``.

    Raises:
        BadSample: it is larger than `MAX_DOCUMENT`, or not a complete gzip file.
        InputError: the archive has become shorter since it was listed.
        OSError: it cannot be read.
    """
    if member.num_bytes > MAX_DOCUMENT:
        raise _too_large(path, member.name)
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        content = _read_at(file.fileno(), path, member.offset, member.num_bytes, size)
    return _inflate(path, member.name, content) if member.name.lower().endswith(".gz") else content


def _inflate(path: Path, name: str, content: bytes) -> bytes:
    """Decompress a gzip file; `BadSample` as soon as it exceeds `MAX_DOCUMENT` bytes."""
    parts, room = [], MAX_DOCUMENT
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while part := file.read(INFLATE_BYTES):
                room -= len(part)
                if room < 0:
                    raise _too_large(path, name)
                parts.append(part)
    except (OSError, EOFError, zlib.error) as error:
        allowed = f"cannot be inflated: {error}"
        raise BadSample(f"member of {path}", _short(name), allowed, reason="damaged") from None
    return b"".join(parts)


def _read_at(file: int, path: Path, at: int, num_bytes: int, size: int) -> bytes:
    """Read ``num_bytes`` from offset ``at`` of a file of ``size`` bytes; InputError if it ends before."""
    parts, end = [], at + num_bytes
    while at < end and (part := os.pread(file, min(end - at, 1 << 30), at)):
        parts.append(part)
        at += len(part)
    if at < end:
        allowed = "is empty: 0 bytes" if not size else f"ends at byte {at} without the two empty blocks of a tar's end"
        raise InputError(
            "shard", str(path), allowed, "it was cut: fetch it again" if size else "fetch it, or remove it"
        )
    return b"".join(parts)


def _check_end(file: int, path: Path, at: int, size: int) -> None:
    """Raise InputError unless the end mark, two empty blocks, is at ``at``, and only zeros follow it."""
    if any(_read_at(file, path, at + BLOCK, BLOCK, size)):
        _damaged(path, at, "is empty where a header belongs")
    if size - at > MAX_TAIL:
        _damaged(path, at, f"ends the archive, and {size - at} bytes follow")
    if _read_at(file, path, at, size - at, size).strip(b"\0"):
        _damaged(path, at, "ends the archive, and more follows: two archives in one, or one that was overwritten")


def _check_checksum(path: Path, at: int, header: bytes) -> None:
    rest, stored = header[:148] + b" " * 8 + header[156:], _number(path, at, header[148:156])
    # Some old programs summed signed bytes.
    if stored != sum(rest) and stored != sum(rest) - 256 * sum(byte > 127 for byte in rest):
        _damaged(path, at, "is not a tar header: its checksum is wrong")


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _number(path: Path, at: int, digits: bytes, base: int = 8) -> int:
    """The value of a number field: octal digits, GNU's binary form, or (base 10) the digits of a pax record."""
    if base == 8 and digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    digits = digits.split(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*" if base == 8 else rb"[0-9]{1,19}", digits):
        _damaged(path, at, "has a field that is not a number")
    return int(digits or b"0", base)


def _records(path: Path, at: int, content: bytes) -> dict[str, bytes]:
    """Parse pax records: lines ``length key=value``, where the decimal length is that of the whole line."""
    records, start = {}, 0
    while start < len(content):
        head = RECORD.match(content, start)
        end = start + int(head[1]) if head else 0
        if head is None or not head.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            _damaged(path, at, "has invalid pax records")
        records[_text(head[2])] = content[head.end() : end - 1]
        start = end
    return records


def _check_name(path: Path, name: str) -> str:
    """Return a member's name as a normalized relative path; InputError if it would lead out of the archive."""
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
    return BadSample(f"member of {path}", _short(name), allowed, fix, reason="too large")


def _refuse(path: Path, name: str, allowed: str, fix: str) -> NoReturn:
    raise InputError(f"member of {path}", _short(name), allowed, fix)


def _damaged(path: Path, at: int, why: str) -> NoReturn:
    allowed = f"is damaged: the block at byte {at} {why}"
    raise InputError("shard", str(path), allowed, "fetch it again, or create it again")
