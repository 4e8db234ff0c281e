"""Forecasting: the next values of a time series with several channels, read from a CSV file."""

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
from .archive import find_file
from .task import Examples, Rows, Task, TaskConfig, check_causal, digest_of, set_model_fields

FRACTIONS = {"train": 0.7, "valid": 0.1, "test": 0.2}  # of the time series, in this order


class Forecast(Task):
    """Forecasts the next ``task.horizon`` values of each channel from the last ``data.seq_len`` values.

    The first line of the file names the columns. Columns that are not numbers in every line (dates), or are constant in
    the training split, are skipped. The first 70% of the lines are for training, the next 10% for validation, the last
    20% for the test; no value is a label in two splits. Values, and hence errors, are in standard deviations of the
    training split. In training every token has labels; in the other splits only the last token of each window has.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        file = find_file(data.source, data.name, "*.csv")
        self.title = data.name or file.stem
        values = _read(file)
        ends = np.round(np.cumsum([0, *FRACTIONS.values()]) * len(values)).astype(int)
        training = values[: ends[1]]
        changing = training.max(axis=0) > training.min(axis=0) if len(training) else np.zeros(values.shape[1], bool)
        if not changing.any():
            raise InputError("data.source", str(file), "has no column of numbers that change")
        mean, deviation = training[:, changing].mean(axis=0), training[:, changing].std(axis=0)
        self.values = ((values[:, changing] - mean) / deviation).astype(np.float32)
        self.bounds = dict(zip(FRACTIONS, zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True), strict=True))
        for split in FRACTIONS:
            if self._windows(split)[1] < 1:
                least = math.ceil((data.seq_len + task.horizon) / FRACTIONS["train"])
                allowed = f"longer windows than {file.name} has room for in its {len(values)} lines"
                raise InputError("data.seq_len", data.seq_len, f"makes {allowed} (about {least} are needed)")
        self.baseline_metrics = self._persistence()

    @cached_property
    def fingerprint(self) -> str:
        return digest_of(self.task, self.data.seq_len, self.values)

    def configure_model(self, model: ModelConfig) -> None:
        check_causal(model, "forecast")
        channels = self.values.shape[1]
        outputs = self.task.horizon * channels
        set_model_fields(model, "forecast", channels=channels, vocab=0, head="series", outputs=outputs, documents=1)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        first, count = self._windows(split)

        def make(number: int) -> Rows:
            return self._window(first + number, label_all=split == "train")

        return Examples(make, count, seed)

    def _windows(self, split: str) -> tuple[int, int]:
        """The first line of the first window of a split, and the number of windows, one for each line from there on.

        The labels of a window are in the split; its input values may be from the split before.
        """
        begin, end = self.bounds[split]
        first = max(0, begin - self.data.seq_len)
        return first, end - self.task.horizon - self.data.seq_len - first + 1

    def _window(self, start: int, label_all: bool) -> Rows:
        """The window that begins at line ``start``; labels for all tokens or only for the last one."""
        length, horizon = self.data.seq_len, self.task.horizon
        part = torch.from_numpy(self.values[start : start + length + horizon])
        future = part[1:].unfold(0, horizon, 1).transpose(1, 2).flatten(1)  # [L, horizon * C]
        labels = torch.full_like(future, math.nan)
        labelled = slice(None) if label_all else slice(-1, None)
        labels[labelled] = future[labelled]
        return part[:length].clone(), labels, None

    def _persistence(self) -> dict[str, float]:
        """RMSE and MAE on the test split of predicting that the last value persists."""
        first, count = self._windows("test")
        last = first + self.data.seq_len - 1 + np.arange(count)
        means = []
        for ahead in range(1, self.task.horizon + 1):
            error = (self.values[last + ahead] - self.values[last]).astype(np.float64)
            means.append(((error**2).mean(), np.abs(error).mean()))
        mse, mae = np.mean(means, axis=0)
        return {"rmse": math.sqrt(mse), "mae": float(mae)}


def _read(file: Path) -> NDArray[np.float64]:
    """Read the numeric columns of a CSV file, ``[lines, channels]``."""
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
    """A column as finite numbers; None if it has another value."""
    try:
        found = np.array(column, np.float64)
    except ValueError:
        return None
    return found if np.isfinite(found).all() else None
