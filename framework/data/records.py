"""Splits files into documents, by the suffix of the file's name.

- ``.jsonl``, ``.ndjson``: each line is a document, the text in one of its fields; its key is ``file:line``.
- ``.csv``, ``.tsv``: each row is a document, the text in one of its columns; ``file:line``, that of its first line.
  Where the first line names no column ``text``, and no other is asked for, the file is one document.
- ``.parquet``: each row is a document, the text in one of its columns; ``file:row``.
- ``.fa``, ``.fasta``, ``.fna``: each record is a document: its sequence (in capitals, if not asked otherwise) without
  the header; ``file/id``.
- ``.npy``: each row of token ids ``[rows, n]`` is a document, ``file:row``; an array ``[n]`` is one, ``file``.
- Any other file, and each member of a tar file, is one document; its key is that of the file.

Files of text are also read compressed, as ``.gz``, ``.bz2`` or ``.xz``, and in UTF-16 or UTF-32 with a byte order mark.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from tokenize import TokenError
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .corpus import File, lines, opened, read_file
from .document import Chat, Document, content_at, label_at, without_label
from .tables import csv_documents, has_column, parquet_documents
from .tally import Tally
from .tar import BadSample

FIELD = "text"  # that holds the text, if no other is named
MAX_IDS = 1 << 31  # of a vocabulary
MAX_RECORD = 1 << 30  # bytes of a FASTA record
SEQUENCE = re.compile(rb"[A-Za-z*.-]+")
SCAN_IDS = 1 << 22  # ids of an array that are read at a time to find the largest


def documents(
    files: Sequence[File],
    field: str = FIELD,
    chat: Chat | None = None,
    tally: Tally | None = None,
    upper: bool = True,
    label: str = "",
) -> Iterator[Document]:
    """Yield the documents of files, in order.

    A file that cannot be read from some point on gives a last document, whose ``read`` raises the `BadSample`.

    Args:
        files: see `corpus.list_files`.
        field: that holds the text; see `content_at`.
        chat: see `content_at`.
        tally: counts files of rows that are read whole, and records without content.
        upper: make the letters of FASTA capitals.
        label: the field of a record that holds its class; see `document.label_at`. The header of a FASTA record has it
            as ``label=CLASS``, or else as the word after the id. Empty where no classes are wanted.

    Raises:
        InputError: a file's content does not match its suffix; names the file and the line.
    """
    marks = _marks(files)
    tally = Tally() if tally is None else tally
    for file in files:
        has_documents = False
        try:
            for document in _documents_of(file, field, marks[file.key], chat, tally, upper, label):
                has_documents = True
                yield document
            if not has_documents:
                tally.add("skipped", f"{file.kind} without a record")
        except BadSample as error:
            yield Document(file.key, file.num_bytes, partial(_raise, error))


def _documents_of(
    file: File, field: str, mark: str, chat: Chat | None, tally: Tally, upper: bool, label: str
) -> Iterator[Document]:
    """The documents of one file; see `documents`. ``mark``: see `_marks`."""
    if file.kind == "jsonl":
        return _lines_of_json(file, field, mark, chat, label)
    if file.kind == "fasta":
        return _sequences(file, tally, upper, label)
    if file.kind == "npy":
        return _rows(file, mark)
    if file.kind == "parquet":
        return parquet_documents(file, field, mark, chat, label)
    if file.kind in ("csv", "tsv") and (field != FIELD or has_column(file, field)):
        return csv_documents(file, field, mark, label)
    if file.kind != "text":
        tally.add("whole", f"{file.kind} without the column {field!r}")
    return iter([Document(file.key, file.num_bytes, partial(_content, file))])


def _marks(files: Sequence[File]) -> dict[str, str]:
    """What stands between a file's key and the number of a record, so that no other file has the record's key."""
    keys, marks = sorted(file.key for file in files), {}
    for file in files:
        mark = ":"
        while True:
            after = bisect_left(keys, file.key + mark)
            if after == len(keys) or not keys[after].startswith(file.key + mark):
                break
            mark += ":"
        marks[file.key] = mark
    return marks


def _raise(error: BadSample) -> NoReturn:
    raise error


def array_vocab_size(files: list[File]) -> int:
    """The largest token id in ``.npy`` files plus one; 0 if there is none. Arrays that cannot be read do not count.

    Raises:
        InputError: an array does not hold token ids, or there are other files beside the arrays.
    """
    arrays, largest = [file for file in files if file.kind == "npy"], -1
    if arrays and len(arrays) < len(files):
        allowed = f"holds {len(arrays)} .npy files beside {len(files) - len(arrays)} others"
        raise InputError("data.source", str(arrays[0].path), allowed, "give a folder of nothing but arrays, or of none")
    for file in arrays:
        with suppress(BadSample):
            largest = max(largest, _max_id(file))
    return largest + 1


def _content(file: File) -> NDArray[np.uint8]:
    return np.frombuffer(read_file(file), np.uint8)


def _lines_of_json(file: File, field: str, mark: str, chat: Chat | None, label: str) -> Iterator[Document]:
    for number, line, num_bytes in lines(file):
        if line.strip():
            place = f"{file.path}:{number}"
            read, read_label = partial(_of_json, line, field, place, chat), partial(_label_of_json, line, label, place)
            yield Document(f"{file.key}{mark}{number}", num_bytes, read, read_label if label else None)


def _of_json(line: bytes, field: str, place: str, chat: Chat | None) -> NDArray[Any]:
    """The content of a JSON line; see `content_at`."""
    return content_at(_json(line, place), field, place, chat)


def _label_of_json(line: bytes, field: str, place: str) -> str:
    return label_at(_json(line, place), field, place)


def _json(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error) or "nested too deeply"
        raise BadSample("line", place, f"is not JSON: {why}", reason="not JSON") from None


def _sequences(file: File, tally: Tally, upper: bool, label: str) -> Iterator[Document]:
    """The records of a FASTA file; records without a sequence are skipped."""
    seen, key, parts, length, num_bytes = set[str](), "", list[bytes](), 0, 0
    read_label = None
    for number, line, taken in lines(file):
        line, place = line.strip(), f"{file.path}:{number}"
        if line.startswith(b">"):
            if parts:
                yield Document(key, num_bytes, partial(_sequence, parts, upper), read_label)
            elif key:
                tally.add("skipped", "FASTA record without a sequence")
            # An id has no space, so that no other record has the name of one without an id.
            name = (line[1:].split() or [b"record %d" % (len(seen) + 1)])[0].decode("utf-8", "surrogateescape")
            if name in seen:
                raise InputError("record", place, f"is the second with the id {name!r}", "give it another id")
            seen.add(name)
            key, parts, length, num_bytes = f"{file.key}/{name}", [], 0, 0
            read_label = partial(_label_of_header, line, label, place) if label else None
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
        yield Document(key, num_bytes, partial(_sequence, parts, upper), read_label)
    elif key:
        tally.add("skipped", "FASTA record without a sequence")


def _label_of_header(line: bytes, field: str, place: str) -> str:
    """The class in the header of a FASTA record."""
    _, *words = line[1:].decode("utf-8", "replace").split() or [""]
    named = [word.removeprefix(f"{field}=") for word in words if word.startswith(f"{field}=")]
    if not (found := [word for word in named or words[:1] if word]):
        raise without_label(place, f"has no class: neither {field}=CLASS nor a word after the id in its header")
    return found[0]


def _sequence(parts: list[bytes], upper: bool) -> NDArray[np.uint8]:
    content = b"".join(parts)
    return np.frombuffer(content.upper() if upper else content, np.uint8)


def _rows(file: File, mark: str) -> Iterator[Document]:
    array = _array(file)
    if array.ndim == 1:
        yield Document(file.key, array.nbytes, partial(array.astype, np.uint32))
        return
    for number in range(len(array)):
        yield Document(f"{file.key}{mark}{number}", array[number].nbytes, partial(array[number].astype, np.uint32))


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
    with opened(file):
        pass
    try:
        array = np.lib.format.open_memmap(file.path, mode="r")
    except OSError as error:
        allowed = f"cannot be read: {error.strerror}"
        raise BadSample("file", str(file.path), allowed, reason="unreadable") from None
    except (ValueError, EOFError, SyntaxError, TokenError, OverflowError, TypeError, MemoryError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        allowed = f"is not a complete .npy array: {why}"
        raise BadSample("file", str(file.path), allowed, reason="damaged") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        found = f"{array.dtype} of {array.ndim} axes"
        allowed = f"must be an array of integers, of one axis or two (each row a document), not {found}"
        raise InputError("data.source", str(file.path), allowed)
    return array
