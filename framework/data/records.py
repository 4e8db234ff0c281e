"""Splits files into documents, by the suffix of the file's name.

- ``.jsonl``, ``.ndjson``: each line is a document, the text in one of its fields; its key is ``file:line``.
- ``.fa``, ``.fasta``, ``.fna``: each record is a document: its sequence in capitals, without the header; ``file/id``.
- ``.npy``: each row of token ids ``[rows, n]`` is a document, ``file:row``; an array ``[n]`` is one, ``file``.
- Any other file, and each member of a tar file, is one document; its key is that of the file.

JSON lines and FASTA are read line by line, also compressed as ``.gz``.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .corpus import File, read_file, unreadable
from .tar import MAX_DOCUMENT, BadSample

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".fa": "fasta", ".fasta": "fasta", ".fna": "fasta"}
ARRAY = ".npy"
MAX_IDS = 1 << 31  # of a vocabulary
MAX_RECORD = 1 << 30  # bytes of a FASTA record
SEQUENCE = re.compile(rb"[A-Za-z*.-]+")
SCAN_IDS = 1 << 22  # ids of an array that are read at a time to find the largest


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Args:
        key: unique in the corpus.
        num_bytes: its size in its file, compressed if the file is.
        read: returns its content ``[n]``: bytes as uint8, or token ids in their array's dtype. Raises `BadSample` if
            this document cannot be decoded; other documents of the file may still be.
    """

    key: str
    num_bytes: int
    read: Callable[[], NDArray[Any]]


def kind_of(file: File) -> str:
    """How a file is split: ``jsonl``, ``fasta``, ``npy``, or ``file`` if the whole file is one document."""
    if file.member is not None:
        return "file"
    name = file.key.lower()
    if name.endswith(ARRAY):
        return "npy"
    return KINDS.get(PurePosixPath(name.removesuffix(".gz")).suffix, "file")


def documents(files: Iterable[File], field: str = "text") -> Iterator[Document]:
    """Yield the documents of files, in order.

    Args:
        files: see `corpus.list_files`.
        field: of a JSON line that holds the text.

    Raises:
        InputError: a file cannot be read, or its content does not match its suffix; names the file and the line.
    """
    for file in files:
        kind = kind_of(file)
        if kind == "jsonl":
            yield from _lines_of_json(file, field)
        elif kind == "fasta":
            yield from _sequences(file)
        elif kind == "npy":
            yield from _rows(file)
        else:
            yield Document(file.key, file.num_bytes, partial(_content, file))


def array_vocab_size(files: list[File]) -> int:
    """The largest token id in ``.npy`` files plus one; 0 if there is no such file.

    Raises:
        InputError: an array does not hold token ids, or there are other files beside the arrays.
    """
    arrays = [file for file in files if kind_of(file) == "npy"]
    if arrays and len(arrays) < len(files):
        allowed = f"holds {len(arrays)} .npy files beside {len(files) - len(arrays)} others"
        raise InputError("data.source", str(arrays[0].path), allowed, "give a folder of nothing but arrays, or of none")
    return max((_max_id(file) for file in arrays), default=-1) + 1


def _content(file: File) -> NDArray[np.uint8]:
    return np.frombuffer(read_file(file), np.uint8)


def _lines(file: File) -> Iterator[tuple[int, bytes, int]]:
    """Yield each line's number (from 1), its content, and the number of bytes of the file read for it."""
    try:
        with open(file.path, "rb") as raw:
            if os.fstat(raw.fileno()).st_mtime_ns != file.mtime_ns:
                allowed = "was changed after it was listed"
                raise InputError("data.source", str(file.path), allowed, "pack it while nothing writes to it")
            stream = gzip.GzipFile(fileobj=raw) if file.key.lower().endswith(".gz") else raw
            number = before = 0
            while line := stream.readline(MAX_DOCUMENT + 1):
                number, at = number + 1, raw.tell()
                if len(line) > MAX_DOCUMENT:
                    allowed = f"is longer than {MAX_DOCUMENT >> 20} MiB"
                    raise InputError("line", f"{file.path}:{number}", allowed, "is it what the file's name says?")
                yield number, line, at - before
                before = at
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fix = "it was cut or changed: fetch it again"
        raise InputError("data.source", str(file.path), f"cannot be inflated: {error}", fix) from None
    except OSError as error:
        raise unreadable(str(file.path), error) from None


def _lines_of_json(file: File, field: str) -> Iterator[Document]:
    for number, line, num_bytes in _lines(file):
        if line.strip():
            place = f"{file.path}:{number}"
            yield Document(f"{file.key}:{number}", num_bytes, partial(_text, line, field, place))


def _text(line: bytes, field: str, place: str) -> NDArray[np.uint8]:
    """The UTF-8 ``[n]`` of the text in a field of a JSON line; `BadSample` if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error) or "nested too deeply"
        raise BadSample("line", place, f"is not JSON: {why}") from None
    if not isinstance(row, dict):
        raise BadSample("line", place, f'must be an object such as {{"{field}": "..."}}')
    if field not in row:
        fix = "name its field of text: data.field=NAME, or pack --field NAME"
        raise BadSample("line", place, f"has no field {field!r}, but {', '.join(map(repr, row)) or 'none'}", fix)
    if not isinstance(text := row[field], str):
        raise BadSample("line", place, f"must have a text in its field {field!r}, not {json.dumps(text)[:40]}")
    try:
        return np.frombuffer(text.encode(), np.uint8)
    except UnicodeEncodeError:
        raise BadSample("line", place, f"has half a character (a lone surrogate) in its field {field!r}") from None


def _sequences(file: File) -> Iterator[Document]:
    """The records of a FASTA file; records without a sequence are skipped."""
    seen, key, parts, length, num_bytes = set[str](), "", list[bytes](), 0, 0
    for number, line, taken in _lines(file):
        line, place = line.strip(), f"{file.path}:{number}"
        if line.startswith(b">"):
            if parts:
                yield Document(key, num_bytes, partial(_sequence, parts))
            name = (line[1:].split() or [b"%d" % (len(seen) + 1)])[0].decode("utf-8", "surrogateescape")
            if name in seen:
                raise InputError("record", place, f"is the second with the id {name!r}", "give it another id")
            seen.add(name)
            key, parts, length, num_bytes = f"{file.key}/{name}", [], 0, 0
        elif line and not line.startswith(b";"):  # a comment in old FASTA files
            if not seen or not SEQUENCE.fullmatch(line):
                allowed = "is no line of FASTA: a header with > comes first, then letters, '*', '-' and '.'"
                raise InputError("line", place, allowed)
            parts.append(line)
            length += len(line)
            if length > MAX_RECORD:
                raise InputError("record", place, f"is longer than {MAX_RECORD >> 20} MiB", "cut it into several")
        num_bytes += taken
    if parts:
        yield Document(key, num_bytes, partial(_sequence, parts))


def _sequence(parts: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(parts).upper(), np.uint8)


def _rows(file: File) -> Iterator[Document]:
    array = _array(file)
    if array.ndim == 1:
        yield Document(file.key, array.nbytes, partial(np.array, array))
        return
    for number in range(len(array)):
        yield Document(f"{file.key}:{number}", array[number].nbytes, partial(np.array, array[number]))


def _max_id(file: File) -> int:
    """The largest id of an array, read in parts of `SCAN_IDS`; -1 if it is empty."""
    array = _array(file)
    step, max_id = max(1, SCAN_IDS // max(1, array[:1].size)), -1
    for first in range(0, len(array), step):
        part = array[first : first + step]
        if part.size:
            max_id = max(max_id, int(part.max()))
            for wrong in (int(part.min()), max_id):
                if not 0 <= wrong < MAX_IDS:
                    row, *column = np.unravel_index(int(np.argmax(part == wrong)), part.shape)
                    place = ", ".join(str(int(i)) for i in (first + row, *column))
                    allowed = f"holds {wrong} at [{place}]: token ids are from 0 to 2^31 - 1"
                    raise InputError("data.source", str(file.path), allowed, "are these token ids, of this dtype?")
    return max_id


def _array(file: File) -> NDArray[Any]:
    """Memory-map an array of ids, ``[n]`` or ``[rows, n]``; arrays of objects and pickles are never loaded."""
    try:
        array = np.lib.format.open_memmap(file.path, mode="r")
    except OSError as error:
        raise unreadable(str(file.path), error) from None
    except (ValueError, EOFError, SyntaxError, OverflowError, TypeError, MemoryError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError("data.source", str(file.path), f"is not a complete .npy array: {why}") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        found = f"{array.dtype} of {array.ndim} axes"
        allowed = f"must be an array of integers, of one axis or two (each row a document), not {found}"
        raise InputError("data.source", str(file.path), allowed)
    return array
