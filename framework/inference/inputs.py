"""Reads new data for predictions, in the forms of training data: pictures, time series, texts, pairs of texts.

Labels are not needed. An input that cannot be read is an error of its own: the others are read.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ..data import IdVocabulary, SubwordVocabulary, Vocabulary, records
from ..data.corpus import list_files
from ..model import ModelConfig
from ..tasks import TaskDescription
from ..tasks.cases import read_cases
from ..tasks.pictures import list_pictures, read_picture
from ..tasks.table import NO_TIME, Table, read_table

LISTOPS = {"[MAX": 10, "[MIN": 11, "[MED": 12, "[SM": 13, "]": 14} | {str(digit): digit for digit in range(10)}
PAIRS = (".csv", ".jsonl", ".ndjson")


class Input(NamedTuple):
    """One example, as the model reads it.

    Attributes:
        name: the path of its file, with the line or case in it; of a row in memory its number, from 1.
        documents: each ``[n]`` token ids, or ``[n, C]`` numbers, standardized.
        times: forecast: of the future values; empty where they are not known.
    """

    name: str
    documents: list[NDArray[Any]]
    times: Sequence[str] = ()


class Row(NamedTuple):
    """An example in a file: its name, and a function that reads it in a form that `encode` takes, or raises."""

    name: str
    read: Callable[[], Any]


def rows_of(sources: Sequence[str], task: TaskDescription, model: ModelConfig) -> Iterator[Row]:
    """The examples in files and folders, in the order of their names.

    A picture, a CSV file of a time series, a text and a record of JSONL or FASTA are one example each, and so is a case
    of a ``.ts`` file. Pairs of texts are the lines of a CSV file with two columns, or of JSONL with two strings each.

    Raises:
        InputError: there is no such file or folder.
    """
    for source in sources:
        if not Path(source).expanduser().exists():
            raise InputError("--source", source, "there is no such file or folder")
    are_texts = not (task.size or model.channels or model.documents == 2)
    for source in sources:
        for file in [Path(source)] if are_texts else _files(source):
            try:
                yield from _texts(source, task) if are_texts else _rows(file, task, model)
            except InputError as error:
                yield Row(str(file), partial(_fail, error))


def encode(row: Any, name: str, task: TaskDescription, model: ModelConfig, vocabulary: Vocabulary) -> Input:
    """An example in memory as the model reads it.

    Args:
        row: a picture (the path or the content of a file, an image of Pillow, or pixels ``[height, width]`` or
            ``[height, width, colors]`` from 0 to 255); a time series ``[n, C]`` in its own units, the path of a CSV
            file or a `Table`; a text (``str`` or bytes), the `Path` of a file or token ids ``[n]``; two texts, where
            they are compared.
        name: of the example, for the answer and for messages.
        task, model, vocabulary: of the model.

    Raises:
        InputError: it does not fit the model.
    """
    if task.size:
        return Input(name, [_pixels(row, name, task)])
    if model.channels:
        row = _table(Path(row), task) if isinstance(row, (str, PathLike)) else row
        if not isinstance(row, Table):
            return Input(name, [_numbers(np.asarray(row, np.float64), name, task, model)])
        values = row.values[row.runs[-1][0] :]  # what comes after a gap in the times
        return Input(name, [_numbers(values, name, task, model)], _future_times(row, task))
    if model.documents == 2:
        if isinstance(row, (str, bytes)) or len(row) != 2:
            raise InputError("input", name, "must be two texts")
        return Input(name, [_tokens(text, name, task, model, vocabulary) for text in row])
    return Input(name, [_tokens(row, name, task, model, vocabulary)])


def document_tokens(name: str, content: NDArray[Any], vocabulary: Vocabulary) -> Tensor:
    """The tokens ``[n]`` of a document's content: of a text (uint8), or token ids already.

    Raises:
        InputError: ids that are none of the vocabulary; ``name`` is the document's.
    """
    if content.dtype == np.uint8:
        return torch.from_numpy(vocabulary.encode_text(content.tobytes()).copy())
    if not isinstance(vocabulary, (IdVocabulary, SubwordVocabulary)):
        raise InputError("source", name, f"holds token ids, and the model reads {vocabulary.kind}", "leave it out")
    if content.size and int(content.max()) >= vocabulary.size:
        raise InputError("source", name, f"must hold token ids from 0 to {vocabulary.size - 1}")
    return torch.from_numpy(content.astype("int64"))


def _files(source: str) -> list[Path]:
    """A file, or the files in a folder and its subfolders, sorted; hidden ones are left out."""
    place = Path(source).expanduser()
    return list_pictures(place)[0] if place.is_dir() else [place]


def _texts(source: str, task: TaskDescription) -> Iterator[Row]:
    """The documents of a source, as packing finds them."""
    for file in list_files(source):
        for document in records.documents([file], task.field or records.FIELD, upper=not task.keep_case):
            yield Row(f"{file.path}{document.key.removeprefix(file.key)}", document.read)


def _rows(file: Path, task: TaskDescription, model: ModelConfig) -> Iterator[Row]:
    """The examples of a file; InputError if it cannot be read further."""
    suffix = file.suffix.lower()
    if task.size:
        yield Row(str(file), partial(str, file))
    elif model.channels and suffix == ".ts":
        yield from _cases(file)
    elif model.channels:
        yield Row(str(file), partial(_table, file, task))
    else:
        yield from _pairs(file, suffix)


def _fail(error: InputError) -> None:
    raise error


def _pixels(row: Any, name: str, task: TaskDescription) -> NDArray[np.float32]:
    """The standardized pixels ``[size * size, colors]`` of a picture."""
    from PIL import Image

    try:
        if not isinstance(row, (str, PathLike, bytes, Image.Image)):
            row = Image.fromarray(np.asarray(row).astype(np.uint8))
        return _standardized(read_picture(row, task.size, task.colors).pixels, task)
    except (ValueError, TypeError) as error:
        why = error.allowed if isinstance(error, InputError) else f"is no picture: {error}"
        raise InputError("input", name, why) from None


def _numbers(values: NDArray[Any], name: str, task: TaskDescription, model: ModelConfig) -> NDArray[np.float32]:
    """A time series, standardized; missing values are the channel's mean. Forecasts read the last lines only."""
    values = values[:, None] if values.ndim == 1 and model.channels == 1 else values
    if values.ndim != 2 or values.shape[1] != model.channels or not len(values):
        allowed = f"must be a time series [n, {model.channels}] of at least one value, not {[*values.shape]}"
        raise InputError("input", name, allowed)
    return _standardized(values[-task.seq_len :] if task.horizon else values, task)


def _standardized(values: NDArray[Any], task: TaskDescription) -> NDArray[np.float32]:
    if task.mean:
        values = (values - np.array(task.mean)) / np.array(task.deviation)
    return np.where(np.isfinite(values), values, 0).astype(np.float32)


def _tokens(
    text: Any, name: str, task: TaskDescription, model: ModelConfig, vocabulary: Vocabulary
) -> NDArray[np.int64]:
    """The tokens of a text, of its bytes or of a file; token ids are returned as they are."""
    if isinstance(text, PathLike):
        try:
            text = Path(text).read_bytes()
        except OSError as error:
            raise InputError("input", name, f"cannot be read: {error.strerror}") from None
    if isinstance(text, np.ndarray) and text.dtype != np.uint8:
        ids = text.astype(np.int64)
    elif task.name == "listops":
        ids = _expression(text, name)
    else:
        content = text.encode() if isinstance(text, str) else bytes(text)
        if why := vocabulary.check(np.frombuffer(content, np.uint8)):
            raise InputError("input", name, why)
        ids = vocabulary.encode_text(content).astype(np.int64)
    if not len(ids):
        raise InputError("input", name, "must have at least one token")
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.vocab:
        raise InputError("input", name, f"must be token ids from 0 to {model.vocab - 1}")
    return ids[: task.seq_len] if task.name == "documents" else ids  # as in training


def _expression(text: Any, name: str) -> NDArray[np.int64]:
    """The tokens of an expression such as ``[MAX 2 [MIN 4 7] 0]``."""
    plain = text if isinstance(text, str) else bytes(text).decode("utf-8", "replace")
    words = re.findall(r"\[\w*|\]|\w+|\S", plain)
    if unknown := [word for word in words if word not in LISTOPS]:
        raise InputError("input", name, f"must be digits and [MAX [MIN [MED [SM ], no {unknown[0]}")
    return np.array([LISTOPS[word] for word in words], np.int64)


def _cases(file: Path) -> Iterator[Row]:
    """The series of a ``.ts`` file, with labels or without."""
    for number, case in enumerate(read_cases(file, "input").values, 1):
        yield Row(f"{file}:{number}", partial(np.copy, case))


def _table(file: Path, task: TaskDescription) -> Table:
    """The time series of a CSV file, with the columns of the training data."""
    missing: Any = task.missing
    try:
        return read_table(file, task.columns, time_column=task.time_column or NO_TIME, missing=missing, key="input")
    except InputError as error:
        if error.field != "data.time_column":
            raise
        return read_table(file, task.columns, time_column=NO_TIME, missing=missing, key="input")


def _future_times(table: Table, task: TaskDescription) -> Sequence[str]:
    """The times of the next ``task.horizon`` lines, ISO dates (UTC) or numbers; empty where the step is not known."""
    if table.times is None or not task.horizon:
        return ()
    last, steps = table.times[-1], np.arange(1, task.horizon + 1)
    if table.times.dtype.kind == "M":
        times = last + (steps * round(task.time_step * 1e6)).astype("timedelta64[us]")
        units: Any = ("D", "m", "s", "us")
        unit = next(unit for unit in units if (times == times.astype(f"datetime64[{unit}]")).all())
        return np.datetime_as_string(times, unit=unit).tolist() if task.time_step else ()
    return [f"{time:.15g}" for time in (last + steps * table.time_step).tolist()] if table.time_step else ()


def _pairs(file: Path, suffix: str) -> Iterator[Row]:
    """The pairs of texts in a file."""
    if suffix not in PAIRS:
        allowed = f"must be one of {', '.join(PAIRS)}: each line has two texts to be compared"
        raise InputError("input", str(file), allowed)
    with _opened(file) as stream:
        lines: Iterable[Any] = csv.reader(stream) if suffix == ".csv" else stream
        for number, line in enumerate(lines, 1):
            if line and line != "\n" and not (suffix == ".csv" and number == 1):
                yield Row(f"{file}:{number}", partial(_pair, line, f"{file}:{number}"))


def _pair(line: list[str] | str, place: str) -> list[str]:
    """The two texts of a line of CSV, or of JSON: an array, or an object with two fields."""
    try:
        found = json.loads(line) if isinstance(line, str) else line
    except (ValueError, RecursionError):
        raise InputError("input", place, "is not JSON") from None
    texts = [*found.values()] if isinstance(found, dict) else found
    if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise InputError("input", place, "must have two texts to be compared")
    return texts


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A text file to read line by line; errors in reading it are `InputError`."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            yield stream
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("input", str(file), f"cannot be read as CSV or JSON lines: {error}") from None
