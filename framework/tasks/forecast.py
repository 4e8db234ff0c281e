"""Forecasting: the next values of a time series with several channels, read from a CSV file."""

from __future__ import annotations

import logging
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
from .description import TaskDescription
from .table import Table, read_table
from .task import Examples, Rows, Task, TaskConfig, check_causal, digest_of, set_model_fields

FRACTIONS = {"train": 0.7, "valid": 0.1, "test": 0.2}  # of the time series, in this order
log = logging.getLogger("longreach.data")


class Forecast(Task):
    """Forecasts the next ``task.horizon`` values of each channel from the last ``data.seq_len`` values.

    See `read_table` for how a file is read. Channels that are constant in the training split are left out. The first
    70% of the lines are for training, the next 10% for validation, the last 20% for the test; no value is a label in
    two splits, and no window crosses a gap in the times. Values, and hence errors, are in standard deviations of the
    training split. In training every token has labels; in the other splits only the last token of each window has.

    Attributes:
        table: what was read.
        columns: names of the channels.
        mean, deviation: float64 ``[channels]``, of the training split.
        values: float32 ``[lines, channels]``, standardized.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        file = find_file(data.source, data.name, "*.csv")
        self.title = data.name or file.stem
        self.table = self.read(file, data.columns)
        num_lines = len(self.table.values)
        ends = np.round(np.cumsum([0, *FRACTIONS.values()]) * num_lines).astype(int)
        self.bounds = dict(zip(FRACTIONS, zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True), strict=True))
        self._check_changing(file)
        training = self.table.values[: ends[1]]
        self.columns = self.table.columns
        self.mean, self.deviation = training.mean(axis=0), training.std(axis=0)
        self.values = self.standardized(self.table)
        for split in FRACTIONS:
            if not len(self._starts(split)):
                raise self._too_long(file)
        self.baseline_metrics = self._persistence()
        log.info("%s", self.table.summary)

    def read(self, file: Path, columns: list[str], key: str = "data.source") -> Table:
        """Read a file as this task's data are read; ``columns`` and ``key`` as for `read_table`."""
        return read_table(file, columns, time_column=self.data.time_column, missing=self.data.missing, key=key)

    def standardized(self, table: Table) -> NDArray[np.float32]:
        """The values of a table with this task's columns, float32 ``[lines, channels]``."""
        found: NDArray[np.float32] = ((table.values - self.mean) / self.deviation).astype(np.float32)
        return found

    def describe(self) -> TaskDescription:
        dated = self.table.times is not None and self.table.times.dtype.kind == "M"
        return TaskDescription(
            "forecast",
            self.data.seq_len,
            columns=self.columns,
            mean=self.mean.tolist(),
            deviation=self.deviation.tolist(),
            horizon=self.task.horizon,
            time_column=self.table.time_column,
            time_step=self.table.time_step if dated else 0.0,
            missing=self.data.missing,
        )

    @cached_property
    def fingerprint(self) -> str:
        gaps = [self.table.runs] if len(self.table.runs) > 1 else []
        return digest_of(self.task, self.data.seq_len, self.values, *gaps)

    def configure_model(self, model: ModelConfig) -> None:
        check_causal(model, "forecast")
        channels = self.values.shape[1]
        outputs = self.task.horizon * channels
        set_model_fields(model, "forecast", channels=channels, vocab=0, head="series", outputs=outputs, documents=1)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        starts = self._starts(split)

        def make(number: int) -> Rows:
            return self._window(int(starts[number]), label_all=split == "train")

        return Examples(make, len(starts), seed)

    def _starts(self, split: str) -> NDArray[np.int64]:
        """The first lines of the windows of a split: all that have room between two gaps.

        The labels of a window are in the split; its input values may be from the split before.
        """
        begin, end = self.bounds[split]
        length, horizon = self.data.seq_len, self.task.horizon
        first = max(0, begin - length)
        runs = [np.arange(max(first, run), min(end, stop) - horizon - length + 1) for run, stop in self.table.runs]
        return np.concatenate(runs)

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
        last = self._starts("test") + self.data.seq_len - 1
        means = []
        for ahead in range(1, self.task.horizon + 1):
            error = (self.values[last + ahead] - self.values[last]).astype(np.float64)
            means.append(((error**2).mean(), np.abs(error).mean()))
        mse, mae = np.mean(means, axis=0)
        return {"rmse": math.sqrt(mse), "mae": float(mae)}

    def _check_changing(self, file: Path) -> None:
        """Leave out the channels that are constant in the training split."""
        training = self.table.values[: self.bounds["train"][1]]
        channels = training.shape[1]
        changing = training.max(axis=0) > training.min(axis=0) if len(training) else np.zeros(channels, bool)
        if self.data.columns and changing.any() and not changing.all():
            name = self.data.columns[int((~changing).argmax())]
            raise InputError("data.columns", name, f"is constant in the training lines of {file.name}", "leave it out")
        self.table.keep(changing, "constant in training")
        if not changing.any():
            raise InputError("data.source", str(file), "has no column of numbers that change in its training lines")

    def _too_long(self, file: Path) -> InputError:
        """The error for windows that do not fit into each split."""
        runs, total = self.table.runs, len(self.values)
        least = math.ceil((self.data.seq_len + self.task.horizon) / FRACTIONS["train"])
        allowed = f"makes longer windows than {file.name} has room for in its {total} lines (about {least} are needed)"
        if len(runs) == 1:
            return InputError("data.seq_len", self.data.seq_len, allowed)
        longest = max(stop - start for start, stop in runs)
        gaps = f"; no window crosses its {len(runs) - 1} gaps, and the longest part without one has {longest} lines"
        fix = "shorter sequences, or data.time_column=none to take the lines as evenly spaced"
        return InputError("data.seq_len", self.data.seq_len, allowed + gaps, fix)
