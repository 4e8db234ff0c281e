"""Reads tables row by row: CSV, TSV and Parquet. Each row is a document, the text in one of its columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .corpus import File, lines, opened
from .document import Chat, Document, content_at, label_at
from .tar import MAX_DOCUMENT, BadSample

PARQUET_ROWS = 256  # rows that are read at a time


def has_column(file: File, field: str) -> bool:
    """Whether the first line of a CSV or TSV file names a column ``field``; not if it cannot be read."""
    try:
        return field in next(_csv_rows(file), (1, list[str](), 0))[1]
    except BadSample:
        return False


def csv_documents(file: File, field: str, mark: str, label: str = "") -> Iterator[Document]:
    """The rows of a CSV or TSV file whose first line has the names of columns.

    Args:
        file: quoted as Excel does, also over several lines.
        field: name of the column of texts.
        mark: stands between the file's key and the number of a row's first line in the row's key.

    Raises:
        BadSample: there is no such column; from here on, the file is not CSV or cannot be read.
    """
    rows = _csv_rows(file)
    _, header, before = next(rows, (1, list[str](), 0))
    if field not in header:
        raise _without_column(file, field, header)
    column = header.index(field)
    for number, row, num_bytes in rows:
        if row:
            place = f"{file.path}:{number}"
            read = partial(_cell, row, column, len(header), place)
            read_label = partial(label_at, dict(zip(header, row)), label, place) if label else None
            yield Document(f"{file.key}{mark}{number}", num_bytes + before, read, read_label)
            before = 0


def parquet_documents(file: File, field: str, mark: str, chat: Chat | None, label: str = "") -> Iterator[Document]:
    """The rows of a Parquet file, numbered from 0.

    Args:
        file: of any compression that pyarrow reads.
        field, chat: see `content_at`.
        mark, label: as for `csv_documents`.

    Raises:
        BadSample: the file cannot be read, or has no such column.
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        fix = "pip install 'longreach[parquet]'"
        raise InputError("data.source", str(file.path), "is Parquet, which pyarrow reads", fix) from None
    try:
        with opened(file), parquet.ParquetFile(file.path) as table:
            names, number = table.schema_arrow.names, 0
            column = _root(field, names)
            if column is None:
                raise _without_column(file, field, names)
            other = _root(label, names) if label else None
            columns = [name for name in names if name in (column, other)]
            for batch in table.iter_batches(PARQUET_ROWS, columns=columns):
                values = batch.column(batch.schema.names.index(column)).to_pylist()
                classes = batch.column(batch.schema.names.index(other)).to_pylist() if other else [None] * len(values)
                weights = [len(value) if isinstance(value, (str, list)) else 1 for value in values]
                share = file.num_bytes * len(values) / table.metadata.num_rows / max(1, sum(weights))
                for value, weight, one in zip(values, weights, classes, strict=True):
                    place = f"{file.path}:{number}"
                    read = partial(content_at, {column: value}, field, place, chat)
                    row = dict.fromkeys(names) | ({other: one} if other else {})
                    read_label = partial(label_at, row, label, place) if label else None
                    yield Document(f"{file.key}{mark}{number}", int(share * weight), read, read_label)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadSample("file", str(file.path), f"cannot be read as Parquet: {why}", reason="unreadable") from None


def _root(field: str, names: list[str]) -> str | None:
    """The column that holds a field, itself or in a column of mappings."""
    roots = [field, *(field[:at] for at, letter in enumerate(field) if letter == ".")]
    return next((root for root in roots if root in names), None)


def _without_column(file: File, field: str, names: list[str]) -> BadSample:
    allowed = f"has no column {field!r}, but {', '.join(map(repr, names)) or 'none'}"
    fix = "name that of the texts: data.field=NAME, or pack --field NAME"
    return BadSample("file", str(file.path), allowed, fix, reason=f"without the column {field!r}")


def _csv_rows(file: File) -> Iterator[tuple[int, list[str], int]]:
    """Yield the number of each row's first line, its cells, and the number of bytes of the file read for it.

    Bytes that are not UTF-8 are surrogates in the cells.
    """
    num_bytes = 0

    def texts() -> Iterator[str]:
        nonlocal num_bytes
        for _, line, taken in lines(file):
            num_bytes += taken
            yield line.decode("utf-8", "surrogateescape")

    csv.field_size_limit(MAX_DOCUMENT)
    rows = csv.reader(texts(), "excel-tab" if file.kind == "tsv" else "excel", strict=True)
    number = 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            kind = file.kind.upper()
            raise BadSample("line", f"{file.path}:{number}", f"is not {kind}: {error}", reason=f"not {kind}") from None
        yield number, row, num_bytes
        number, num_bytes = rows.line_num + 1, 0


def _cell(row: list[str], column: int, num_columns: int, place: str) -> NDArray[np.uint8]:
    if len(row) != num_columns:
        allowed = f"must have the {num_columns} cells of the first line, not {len(row)}"
        raise BadSample("line", place, allowed, reason="with another number of cells than the first line")
    return np.frombuffer(row[column].encode("utf-8", "surrogateescape"), np.uint8)
