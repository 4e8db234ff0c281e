"""The next values of a time series with several channels, out of a CSV file."""

from __future__ import annotations

import csv
import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import InputError
from ..data import DataConfig, Sequences
from ..model import ModelConfig
from .archive import find
from .task import Examples, Rows, Task, TaskConfig, check_causal, digest_of, settle

SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}  # in the order of time


class Forecast(Task):
    """Forecasts of ``task.horizon`` values of each channel from ``data.seq_len`` values before them.

    The file's first line names its columns; those that are not numbers in every line (dates), or do not change while
    there is to train on, are left out. The first 70% of time are to train on, 20% at the end are scored, and what is
    forecast in one is in no other. Values are standardized by the training part, and so are the errors. While training
    every token's future is learned; a score counts the last token of each window, which has seen all of it.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        file = find(data.source, data.name, "*.csv")
        self.title = data.name or file.stem
        values = _read(file)
        ends = np.round(np.cumsum([0, *SHARES.values()]) * len(values)).astype(int)
        known = values[: ends[1]]
        changing = known.max(axis=0) > known.min(axis=0) if len(known) else np.zeros(values.shape[1], bool)
        if not changing.any():
            raise InputError("data.source", str(file), "has no column of numbers that change")
        mean, deviation = known[:, changing].mean(axis=0), known[:, changing].std(axis=0)
        self.values = ((values[:, changing] - mean) / deviation).astype(np.float32)
        self.bounds = dict(zip(SHARES, zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True), strict=True))
        for split in SHARES:
            if self._starts(split)[1] < 1:
                least = math.ceil((data.seq_len + task.horizon) / SHARES["train"])
                allowed = f"longer windows than {file.name} has room for in its {len(values)} lines"
                raise InputError("data.seq_len", data.seq_len, f"makes {allowed} (about {least} are needed)")
        self.baseline_metrics = self._persistence()

    @cached_property
    def fingerprint(self) -> str:
        return digest_of(self.task, self.data.seq_len, self.values)

    def fit(self, model: ModelConfig) -> None:
        check_causal(model, "forecast")
        channels = self.values.shape[1]
        outputs = self.task.horizon * channels
        settle(model, "forecast", channels=channels, vocab=0, head="series", outputs=outputs, documents=1)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        first, count = self._starts(split)

        def make(number: int) -> Rows:
            return self._window(first + number, every=split == "train")

        return Examples(make, count, seed)

    def _starts(self, split: str) -> tuple[int, int]:
        """The first window of a split, and how many there are; their futures lie in the split."""
        begin, end = self.bounds[split]
        first = max(0, begin - self.data.seq_len)
        return first, end - self.task.horizon - self.data.seq_len - first + 1

    def _window(self, start: int, every: bool) -> Rows:
        length, horizon = self.data.seq_len, self.task.horizon
        part = torch.from_numpy(self.values[start : start + length + horizon])
        future = part[1:].unfold(0, horizon, 1).transpose(1, 2).flatten(1)  # [L, horizon * C]
        labels = torch.full_like(future, math.nan)
        kept = slice(None) if every else slice(-1, None)
        labels[kept] = future[kept]
        return part[:length].clone(), labels, None

    def _persistence(self) -> dict[str, float]:
        """The errors of forecasting the last value seen."""
        first, count = self._starts("test")
        last = first + self.data.seq_len - 1 + np.arange(count)
        means = []
        for ahead in range(1, self.task.horizon + 1):
            error = (self.values[last + ahead] - self.values[last]).astype(np.float64)
            means.append(((error**2).mean(), np.abs(error).mean()))
        mse, mae = np.mean(means, axis=0)
        return {"rmse": math.sqrt(mse), "mae": float(mae)}


def _read(file: Path) -> NDArray[np.float64]:
    """The columns of a CSV file that hold numbers, ``[lines, channels]``."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            lines = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("data.source", str(file), f"cannot be read as CSV: {error}") from None
    if len(lines) < 2 or not lines[0]:
        raise InputError("data.source", str(file), "must have a line of names and lines of values")
    for number, line in enumerate(lines, start=1):
        if len(line) != len(lines[0]):
            allowed = f"has {len(line)} values in line {number}, and {len(lines[0])} names"
            raise InputError("data.source", str(file), allowed)
    columns = [column for column in map(_numbers, zip(*lines[1:], strict=True)) if column is not None]
    if not columns:
        raise InputError("data.source", str(file), "has no column of finite numbers")
    return np.stack(columns, axis=1)


def _numbers(column: tuple[str, ...]) -> NDArray[np.float64] | None:
    try:
        found = np.array(column, np.float64)
    except ValueError:
        return None
    return found if np.isfinite(found).all() else None
