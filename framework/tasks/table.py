"""Reads the numbers of a CSV file. What was taken and what was left out is in `Table.summary`."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..data import Missing
from .task import listed

SEPARATORS = {";": "semicolon", "\t": "tab", ",": "comma"}  # the first that fits is taken: decimals may have commas
EMPTY = {"", "-", "?", "na", "n/a", "#n/a", "<na>", "nan", "null", "none"}  # cells without a value, in lower case
GAP = 1.5  # medians of the time step from which on lines are missing
MAX_EXACT = 1 << 53  # whole numbers below it are exact in fp64
NO_TIME = "none"  # as data.time_column
SAMPLE = 50  # lines by which the separator is chosen
DATE = re.compile(
    r"(\d{4}-\d\d(?:-\d\d)?)(?:[Tt ](\d\d(?::\d\d){0,2}(?:[.,]\d{1,9})?))? ?(?:([Zz])|([+-]\d\d):?(\d\d))?"
)
TIME_NAME = re.compile(r"((unix|epoch)[ _-]?)?(time[ _-]?stamp|time|date[ _-]?time|date|epoch|unix|ts|year)s?")
INDEX_NAMES = ("", "index", "unnamed: 0")  # of the column with which pandas numbers the lines


@dataclass
class Table:
    """Columns of numbers, one line of the file after the other.

    Attributes:
        file: where they are from.
        columns: names of the channels.
        values: float64 ``[lines, channels]``, finite.
        runs: ``[begin, end)`` of the lines between gaps in the times, in order; one for all without times.
        time_column: name of the column of times; empty if there is none.
        times: datetime64[us] or numbers ``[lines]``, increasing; None if there is no such column.
        time_step: median of their differences: seconds, or for numbers in their own unit; 0 if there are none.
        left_out: why columns were left out, by name.
        notes: what else to say of the file: lines, names, separator, filled cells.
    """

    file: Path
    columns: list[str]
    values: NDArray[np.float64]
    runs: list[tuple[int, int]]
    time_column: str = ""
    times: NDArray[Any] | None = None
    time_step: float = 0.0
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keep(self, is_kept: NDArray[np.bool_], why: str) -> None:
        """Leave out the channels where ``is_kept [channels]`` is false, for the reason ``why``."""
        self.left_out |= {name: why for name, kept in zip(self.columns, is_kept, strict=True) if not kept}
        self.columns = [name for name, kept in zip(self.columns, is_kept, strict=True) if kept]
        self.values = self.values[:, is_kept]

    @property
    def summary(self) -> str:
        """One line: what was taken of the file, and what was not."""
        channels = f"{len(self.columns)} channel{'s' * (len(self.columns) != 1)}: {listed(self.columns)}"
        time = "no column of times: lines count as evenly spaced"
        if self.time_column:
            unit = " s" if self.times is not None and self.times.dtype.kind == "M" else ""
            gaps = len(self.runs) - 1
            broken = f", {gaps} gap{'s' * (gaps != 1)} that no window crosses" if gaps else ", no gap"
            time = f"time step {self.time_step:g}{unit} by {self.time_column!r}{broken}"
        left_out = [f"{name!r} ({why})" for name, why in self.left_out.items()]
        missing = [f"left out: {listed(left_out)}"] if left_out else []
        return f"{self.file.name}: " + "; ".join([*self.notes, channels, time, *missing])


def read_table(
    file: Path,
    columns: Sequence[str] = (),
    *,
    time_column: str = "",
    missing: Missing = "error",
    key: str = "data.source",
) -> Table:
    """Read the channels of a CSV file.

    The first line has the names, unless it has values like those below: then columns are ``column-1``, ... The
    separator is a comma, a semicolon or a tab; with the latter two, decimals may have a comma. Text is UTF-8, UTF-16
    with a byte order mark, or else Latin-1.

    Args:
        file: its path.
        columns: the channels to take, in this order; empty for every column at least half of whose cells are numbers.
        time_column: the column of times, ``none`` if there is none; empty for the first column of ISO dates, or of
            increasing numbers that is named like times.
        missing: what to do where a channel has no number: ``error``, ``interpolate`` (linearly between the values
            before and after) or ``ffill`` (the value before). At the ends, the nearest value.
        key: the field of an InputError about the file.

    Raises:
        InputError: the file cannot be read, or is no such table; a column is missing; a channel has no number in a
            line, or times do not increase.
    """
    return _Reader(file, key).table(columns, time_column, missing)


@dataclass(eq=False)
class _Column:
    """A column: its name, also as the file has it, its cells, and these as numbers and dates (NaN, NaT for others)."""

    name: str
    given: str | None  # None if the file has no line of names
    cells: tuple[str, ...]
    numbers: NDArray[np.float64]
    dates: NDArray[np.datetime64] | None  # None if it is no column of dates

    @cached_property
    def num_filled(self) -> int:
        return sum(not _is_empty(cell) for cell in self.cells)

    @cached_property
    def is_numeric(self) -> bool:
        found = int(np.isfinite(self.numbers).sum())
        return found == len(self.cells) or 0 < self.num_filled <= 2 * found

    @property
    def first_text(self) -> int:
        """The first line, from 0, that has something other than a number."""
        bad = np.flatnonzero(~np.isfinite(self.numbers))
        return next((int(line) for line in bad if not _is_empty(self.cells[line])), 0)


class _Reader:
    """Reads one file: cells, names, times, values."""

    def __init__(self, file: Path, key: str) -> None:
        self.file, self.key = file, key
        text, self.notes = self._text()
        first = text.partition("\n")[0].strip()
        given = first[4:] if first.startswith("sep=") and len(first) == 5 else ""
        self.separator = given or _separator(text)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=self.separator, skipinitialspace=True)
        self.rows: list[list[str]] = []
        self.lines: list[int] = []  # their numbers in the file
        try:
            for row in itertools.islice(lines, bool(given), None):
                if row:
                    self.rows.append([cell.strip() for cell in row])
                    self.lines.append(lines.line_num)
        except csv.Error as error:
            raise self._error(f"cannot be read as CSV: {error} in line {lines.line_num}") from None
        if self.rows and any("\n" in cell for cell in self.rows[-1]):
            self._check_quotes(text)
        while self.rows and not any(self.rows[-1]):
            self.rows.pop(), self.lines.pop()
        if not self.rows:
            raise self._error("must have a line of names and lines of values; it is empty")
        self._make_rectangular()

    def table(self, names: Sequence[str], time_column: str, missing: Missing) -> Table:
        columns = self._columns(names)
        lines = self.lines
        time = self._time_column(columns, names, time_column)
        left_out: dict[str, str] = {}
        if names:
            by_name = {column.name: column for column in columns}
            if unknown := [name for name in names if name not in by_name]:
                raise self._error(f"has no column {unknown[0]!r}, but {listed([*map(repr, by_name)])}")
            taken = [by_name[name] for name in names]
            others = [column for column in columns if column.name not in names and column is not time]
            left_out = {column.name: "not in data.columns" for column in others}
        else:
            taken = [column for column in columns if column is not time and column.is_numeric and column.dates is None]
            for column in columns:
                if column is not time and column not in taken:
                    left_out[column.name] = self._why_not(column)
        if not taken:
            why = "; ".join(f"{name!r}: {text}" for name, text in left_out.items())
            raise self._error(f"has no column of finite numbers ({why or 'only times'})")
        times = None if time is None else self._times(time)
        values = self._values(taken, times, missing)
        table = Table(self.file, [column.name for column in taken], values, [(0, len(lines))], left_out=left_out)
        if time is not None and times is not None and len(times) > 1:
            steps = np.diff(times.astype(np.int64) if times.dtype.kind == "M" else times).astype(np.float64)
            median = float(np.median(steps))
            ends = [0, *(np.flatnonzero(steps > GAP * median) + 1).tolist(), len(times)]
            table.runs = list(itertools.pairwise(ends))
            table.time_step = median / 1e6 if times.dtype.kind == "M" else median
        if time is not None:
            table.time_column, table.times = time.name, times
        table.notes = [f"values in lines {lines[0]:,} to {lines[-1]:,} ({len(lines):,})", *self.notes]
        return table

    def _text(self) -> tuple[str, list[str]]:
        """The text of the file; its encoding, if that is worth a note."""
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise self._error(f"cannot be read as CSV: {error.strerror}") from None
        try:
            if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return content.decode("utf-16"), ["UTF-16"]
            if b"\0" in content:
                raise self._error("cannot be read as CSV: it is no text", "save it as CSV in UTF-8")
            return content.decode("utf-8-sig"), []
        except UnicodeDecodeError:
            return content.decode("latin-1"), ["read as Latin-1, as it is not UTF-8"]

    def _check_quotes(self, text: str) -> None:
        """Raise InputError if the last line has a quote that is not closed: it would contain the rest of the file."""
        try:
            for _ in csv.reader(io.StringIO(text, newline=""), delimiter=self.separator, strict=True):
                pass
        except csv.Error as error:
            if "unexpected end" in str(error):
                last = self.lines[-2] + 1 if len(self.lines) > 1 else 1
                raise self._error(f"has a quote that is not closed, from line {last} on") from None

    def _make_rectangular(self) -> None:
        """Drop the empty cells behind trailing separators; raise InputError if a line has too many or too few cells."""
        widths = [len(row) for row in self.rows]
        filled = [max((i for i, cell in enumerate(row, 1) if cell), default=0) for row in self.rows]
        width = max(filled[0], min(widths[0], max(filled)), 1)
        for line, row, most, least in zip(self.lines, self.rows, widths, filled, strict=True):
            if most < width or least > width:
                count = f"{most} value{'s' * (most != 1)}"
                raise self._error(f"has {count} in line {line}, and {width} in line {self.lines[0]}")
            del row[width:]

    def _columns(self, names: Sequence[str]) -> list[_Column]:
        """The columns with their names; the line of names is removed from ``rows`` and ``lines``."""
        first, below = self.rows[0], list(zip(*self.rows[1:], strict=True)) or [()] * len(self.rows[0])
        decimals = self.separator != ","
        parsed = [(cells, _numbers(cells, decimals), _dates(cells)) for cells in below]
        has_names = (bool(names) and set(names) <= set(first)) or self._has_names(first, parsed)
        self.notes.append(f"names in line {self.lines[0]}" if has_names else "no line of names: column-1, ...")
        self.notes.append(f"separated by {SEPARATORS.get(self.separator, self.separator)}s")
        found = []
        for name, top, (cells, numbers, dates) in zip(_names(first, has_names), first, parsed, strict=True):
            if has_names:
                found.append(_Column(name, top, cells, numbers, dates))
            else:
                numbers = np.concatenate([_numbers([top], decimals), numbers])
                found.append(_Column(name, None, (top, *cells), numbers, _dates((top, *cells))))
        if has_names:
            del self.rows[0], self.lines[0]
        if not self.lines:
            raise self._error("must have a line of names and lines of values; it has only names")
        if any("," in cell for c in found if c.is_numeric for cell in c.cells[:SAMPLE]) and decimals:
            self.notes.append("decimal commas")
        return found

    def _has_names(self, first: list[str], below: list[Any]) -> bool:
        """Whether the first line differs in kind from those below it: it has no number above numbers."""
        if first[0] == "" and first[1:] == [str(number) for number in range(len(first) - 1)]:
            return True  # as pandas writes an array
        if not below[0][0]:
            return not any(math.isfinite(_numbers([cell], True)[0]) for cell in first)
        alike = 0
        for top, (cells, numbers, dates) in zip(first, below, strict=True):
            if _is_empty(top):
                continue
            if dates is not None:
                is_alike = _date(DATE.fullmatch(top)) is not None
            elif _Column("", None, cells, numbers, None).is_numeric:
                is_alike = bool(np.isfinite(_numbers([top], self.separator != ",")[0]))
            else:
                continue
            if not is_alike:
                return True
            alike += 1
        return not alike

    def _time_column(self, columns: list[_Column], names: Sequence[str], given: str) -> _Column | None:
        if given == NO_TIME:
            return None
        for column in columns:
            if given == column.name:
                return column
        if given:
            known = listed([repr(column.name) for column in columns])
            raise InputError("data.time_column", given, f"is no column of {self.file.name}: {known}")
        others = [column for column in columns if column.name not in names]
        for column in others:
            if column.dates is not None:
                return column
        for column in others:
            if _counts_time(column, is_first=column is columns[0]):
                return column
        return None

    def _times(self, column: _Column) -> NDArray[Any]:
        """The times of the lines, which must increase."""
        fix = f"sort or mend the lines, or data.time_column={NO_TIME} if they are evenly spaced"
        times: NDArray[Any] = column.numbers if column.dates is None else column.dates
        bad = np.isnan(times) if column.dates is None else np.isnat(times)
        if bad.any():
            line = int(bad.argmax())
            what = f"{column.cells[line]!r} in line {self.lines[line]}, column {column.name!r}"
            raise self._error(f"has {what}, which is no time ({int(bad.sum())} such cells)", fix)
        back = np.flatnonzero(times[1:] <= times[:-1])
        if len(back):
            line = int(back[0]) + 1
            how = "the time of the line before once more" if times[line] == times[line - 1] else "an earlier time"
            what = f"{column.cells[line]!r} in line {self.lines[line]}, column {column.name!r}"
            raise self._error(f"has {what}: {how} ({len(back)} such lines)", fix)
        whole = column.dates is None and bool((times == np.round(times)).all() and np.abs(times).max() < MAX_EXACT)
        return times.astype(np.int64) if whole else times

    def _values(self, taken: list[_Column], times: NDArray[Any] | None, missing: Missing) -> NDArray[np.float64]:
        """The numbers ``[lines, channels]``, filled as ``missing`` says."""
        values = np.stack([column.numbers for column in taken], axis=1)
        is_missing = ~np.isfinite(values)
        if not is_missing.any():
            return values
        places = np.argwhere(is_missing)
        line, channel = places[0]
        cell, name = taken[channel].cells[line], taken[channel].name
        if missing == "error":
            what = "no value" if _is_empty(cell) else f"{cell!r}, which is no number,"
            count = f" (the first of {len(places)} such cells)" if len(places) > 1 else ""
            fix = "data.missing=interpolate or ffill, or data.columns=[...] without this column"
            raise self._error(f"has {what} in line {self.lines[line]}, column {name!r}{count}", fix)
        positions = np.arange(len(values)) if times is None else (times - times[0]).astype(np.float64)
        for number, column in enumerate(taken):
            known = np.flatnonzero(~is_missing[:, number])
            if not len(known):
                raise self._error(f"has no number in column {column.name!r}")
            if missing == "interpolate":
                values[:, number] = np.interp(positions, positions[known], values[known, number])
            else:
                before = np.maximum(np.searchsorted(known, np.arange(len(values)), "right") - 1, 0)
                values[:, number] = values[known[before], number]
        cells = f"{len(places):,} cell{'s' * (len(places) > 1)}"
        self.notes.append(f"{cells} without a number filled (data.missing={missing})")
        return values

    def _why_not(self, column: _Column) -> str:
        if column.dates is not None:
            return "times"
        if not column.num_filled:
            return "empty"
        line = column.first_text
        return f"no numbers: {column.cells[line][:20]!r} in line {self.lines[line]}"

    def _error(self, allowed: str, fix: str = "") -> InputError:
        return InputError(self.key, str(self.file), allowed, fix)


def _separator(text: str) -> str:
    """The first of `SEPARATORS` that splits the first lines into equally many cells; else the most frequent."""
    lines = list(itertools.islice((line for line in text.splitlines() if line.strip()), SAMPLE))
    if not lines:
        return ","
    for separator in SEPARATORS:
        rows = list(_split(lines, separator))
        widths = {len(row) for row in rows}
        without_end = {len(row) - (row[-1] == "") for row in rows if row}  # a separator at the end of some lines
        if min(widths) > 1 and 1 in (len(widths), len(without_end)):
            return separator
    return max(reversed(SEPARATORS), key=lines[0].count)


def _split(lines: list[str], separator: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines, delimiter=separator, skipinitialspace=True)
    except csv.Error:
        yield []


def _names(first: list[str], has_names: bool) -> list[str]:
    """Names of the columns; those that are empty, or there before, get names that the file does not have."""
    found: list[str] = []
    for number, given in enumerate(first, 1):
        name = given if has_names else ""
        if not name or name in found:
            stem = f"{name}-{number}" if name else f"column-{number}"
            tries = (stem + f"-{count}" * (count > 1) for count in itertools.count(1))
            name = next(one for one in tries if one not in found and not (has_names and one in first))
        found.append(name)
    return found


def _counts_time(column: _Column, is_first: bool) -> bool:
    """Whether a column of numbers is one of times, by its name, or of the numbers of the lines."""
    numbers = column.numbers
    if len(numbers) < 2 or not column.is_numeric:
        return False
    steps = np.diff(numbers)
    increasing = bool((steps > 0).all() and (numbers == np.round(numbers)).all())
    if column.given is None:
        return is_first and increasing and bool(numbers[0] >= 1e8 or (numbers[0] in (0, 1) and (steps == 1).all()))
    name = re.sub(r"[(\[].*|[ _-](s|ms|us|ns|utc)$", "", column.given.lower()).strip(" _-")
    if TIME_NAME.fullmatch(name):
        return bool((steps > 0).mean() >= 0.9)
    return is_first and increasing and name in INDEX_NAMES


def _numbers(cells: Sequence[str], decimals: bool) -> NDArray[np.float64]:
    """The cells as finite numbers, else NaN; with ``decimals``, also such as ``1,5`` where most are so."""
    try:
        found = np.array(cells, np.float64)
    except ValueError:
        found = np.array([_number(cell) for cell in cells])
        if decimals and any("," in cell for cell in cells):
            commas = np.array([math.nan if "." in cell else _number(cell.replace(",", ".")) for cell in cells])
            found = max(found, commas, key=lambda one: int(np.isfinite(one).sum()))
    return np.where(np.isfinite(found), found, math.nan)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _dates(cells: Sequence[str]) -> NDArray[np.datetime64] | None:
    """The cells as dates in UTC, NaT where they are none; None if they are not dates."""
    if not any(DATE.fullmatch(cell) for cell in cells[:SAMPLE]):
        return None
    matches = [DATE.fullmatch(cell) for cell in cells]
    if all(match and not match[4] for match in matches):  # the fast way, without offsets
        with contextlib.suppress(ValueError):
            return np.array([cell.rstrip("Zz ").replace(",", ".") for cell in cells], "datetime64[us]")
    found = np.array([_date(match) or np.datetime64("NaT") for match in matches], "datetime64[us]")
    num_filled = sum(not _is_empty(cell) for cell in cells)
    return found if (~np.isnat(found)).sum() >= 0.9 * num_filled else None


def _date(match: re.Match[str] | None) -> np.datetime64 | None:
    """The time in UTC of a match of `DATE`; None if there is no such day or hour."""
    if match is None:
        return None
    date, clock, _, hours, minutes = match.groups()
    try:
        found = np.datetime64(f"{date}T{clock.replace(',', '.')}" if clock else date, "us")
    except ValueError:
        return None
    offset = int(hours) * 60 + int(hours[0] + minutes) if hours else 0
    return found - np.timedelta64(offset, "m")


def _is_empty(cell: str) -> bool:
    return cell.lower() in EMPTY
