"""Time series classification, any length and number of channels; data in the format of the UEA and UCR archives."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..data import DataConfig, Sequences
from ..model import ModelConfig
from .archive import aeon_datasets, find_file
from .task import (
    Examples,
    Rows,
    Task,
    TaskConfig,
    check_fits,
    digest_of,
    holdout_split,
    padded_sequence,
    set_model_fields,
)

Cases = list[NDArray[np.float32]]


class Series(Task):
    """Classifies the series of the data set ``data.name``.

    Its files are ``NAME_TRAIN.ts`` and ``NAME_TEST.ts`` in the folder ``data.source`` or its subfolder ``NAME``, or in
    the package aeon (``data.source=aeon``). Channels are standardized by the training cases; missing values become the
    channel's mean. ``data.valid_fraction`` of the training cases is held out for validation.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = data.name
        if not data.name:
            raise InputError("data.name", data.name, "the name of a data set", "for example data.name=JapaneseVowels")
        self.cases, labels = {}, {}
        for split in ("train", "test"):
            file = find_file(data.source, data.name, f"{data.name}_{split.upper()}.ts")
            self.cases[split], labels[split] = _read(file)
            check_fits(max(map(len, self.cases[split])), data, f"the longest series of {file.name}")
        self._standardize()
        self.classes = sorted(set(labels["train"]))
        if unknown := set(labels["test"]) - set(self.classes):
            raise InputError("data.name", data.name, f"has classes in its test cases alone: {sorted(unknown)}")
        self.labels = {s: np.array([self.classes.index(label) for label in found]) for s, found in labels.items()}
        self.baseline_metrics = {
            "accuracy": float((self.labels["test"] == np.bincount(self.labels["train"]).argmax()).mean())
        }

    @cached_property
    def fingerprint(self) -> str:
        arrays = [array for s in ("train", "test") for array in (self.labels[s], *self.cases[s])]
        return digest_of(self.task, self.data.seq_len, self.data.valid_fraction, *arrays)

    def configure_model(self, model: ModelConfig) -> None:
        channels = self.cases["train"][0].shape[1]
        set_model_fields(
            model, "series", channels=channels, vocab=0, head="class", outputs=len(self.classes), documents=1
        )

    def sequences(self, split: str, seed: int | None) -> Sequences:
        source = "test" if split == "test" else "train"
        train, valid = holdout_split(len(self.cases["train"]), self.data.valid_fraction)
        numbers = {"train": train, "valid": valid, "test": np.arange(len(self.cases["test"]))}[split]

        def make(number: int) -> Rows:
            case = int(numbers[number])
            return padded_sequence([self.cases[source][case]], int(self.labels[source][case]), self.data.seq_len)

        return Examples(make, len(numbers), seed)

    def _standardize(self) -> None:
        values = np.concatenate(self.cases["train"])
        mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        # A constant channel's deviation need not be 0, because of rounding.
        deviation[np.nanmax(values, axis=0) == np.nanmin(values, axis=0)] = 1
        for split, cases in self.cases.items():
            self.cases[split] = [np.nan_to_num((case - mean) / deviation).astype(np.float32) for case in cases]


def _read(file: Path) -> tuple[Cases, list[str]]:
    """Read the cases of a ``.ts`` file, each float32 ``[n, C]``, and their classes."""
    load = aeon_datasets().load_from_ts_file
    try:
        cases, labels = load(str(file))
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise InputError("data.source", str(file), f"cannot be read: {error}") from None
    found: list[Any] = [np.asarray(case, np.float32).T for case in cases]
    if not found or len({case.shape[1] for case in found}) != 1:
        raise InputError("data.source", str(file), "must hold series that have the same channels")
    return found, [str(label) for label in labels]
