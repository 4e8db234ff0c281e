"""Reads ``.ts`` files, the format of the UEA and UCR archives: one time series a line, and its class."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

MISSING = ("?", "nan", "")
TIMED = re.compile(r"\(([^()]*)\)")  # a value with its time: (time,value)


@dataclass
class Cases:
    """The series of a file.

    Attributes:
        values: each float32 ``[n, channels]``; NaN where a value is missing.
        labels: the class of each, or the number to predict; empty if the file has none.
        are_classes: false if the labels are numbers.
    """

    values: list[NDArray[np.float32]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    are_classes: bool = True


def read_cases(file: Path, key: str = "data.source") -> Cases:
    """Read a ``.ts`` file; the times of values are not used.

    Args:
        file: its path.
        key: the field of an InputError about it.

    Raises:
        InputError: it cannot be read; a line is no series, or has other channels than the first one.
    """

    def error(line: int, allowed: str) -> InputError:
        return InputError(key, str(file), f"has {allowed} in line {line}" if line else allowed)

    try:
        content = file.read_bytes()
    except OSError as failure:
        raise error(0, f"cannot be read: {failure.strerror}") from None
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        lines = content.decode("latin-1").split("\n")
    header, found = dict[str, str](), Cases()
    rows = ((number, text.strip()) for number, text in enumerate(lines, 1))
    rows = ((number, text) for number, text in rows if text and text[0] not in "#%")
    for number, text in rows:
        words = text.lower().split()
        if words[0] == "@data":
            break
        if not text.startswith("@"):
            raise error(number, "no @ before @data")
        header[words[0]] = " ".join(words[1:2])
    else:
        raise error(0, "has no line @data: it is no .ts file")
    found.are_classes = header.get("@targetlabel") != "true"
    has_labels = not found.are_classes or header.get("@classlabel", "true") == "true"
    num_channels = 0
    for number, text in rows:
        parts = _parts(text, header.get("@timestamps") == "true")
        if has_labels:
            found.labels.append(parts.pop().strip())
        num_channels = num_channels or len(parts)
        if len(parts) != num_channels or not parts:
            allowed = f"{len(parts)} channels, where {num_channels or 'some'} are expected,"
            raise error(number, allowed)
        try:
            channels = [_numbers(part) for part in parts]
        except ValueError as failure:
            raise error(number, f"a value that is no number ({failure})") from None
        if len({len(channel) for channel in channels}) > 1:
            raise error(number, f"channels of different lengths ({', '.join(str(len(c)) for c in channels)})")
        found.values.append(np.stack(channels).T)
    if not found.values:
        raise error(0, "has no series after @data")
    return found


def _parts(text: str, is_timed: bool) -> list[str]:
    """The channels of a line as ``value,value,...``, and its class, if it has one."""
    if not is_timed:
        return text.split(":")
    parts = re.split(r"\)\s*:", text)
    return [
        ",".join(pair.rpartition(",")[2] for pair in TIMED.findall(part + ")")) if "(" in part else part
        for part in parts
    ]


def _numbers(text: str) -> NDArray[np.float32]:
    cells = [cell.strip() for cell in text.split(",")]
    try:
        found = np.array(cells, np.float64)
    except ValueError:
        found = np.array([float("nan" if cell.lower() in MISSING else cell) for cell in cells])
    return np.where(np.isfinite(found), found, np.nan).astype(np.float32)
