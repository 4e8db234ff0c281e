"""Time series classification, any length and number of channels; data in the format of the UEA and UCR archives."""

from __future__ import annotations

import logging
import warnings
from functools import cached_property
from glob import escape

import numpy as np

from ...errors import InputError
from ..data import DataConfig, Sequences
from ..model import ModelConfig
from .archive import find_file
from .cases import Cases, read_cases
from .description import TaskDescription
from .task import (
    Examples,
    Rows,
    Task,
    TaskConfig,
    check_fits,
    counted_classes,
    digest_of,
    holdout_split,
    padded_sequence,
    set_model_fields,
)

log = logging.getLogger("longreach.data")


class Series(Task):
    """Classifies the series of the data set ``data.name``.

    Its files are ``NAME_TRAIN.ts`` and ``NAME_TEST.ts`` in the folder ``data.source`` or its subfolder ``NAME``, or in
    the package aeon (``data.source=aeon``). Channels are standardized by the training cases; missing values become the
    channel's mean. ``data.valid_fraction`` of the training cases is held out for validation.

    Attributes:
        classes: their names, by number.
        mean, deviation: float32 ``[channels]``, of the training cases.
        summary: one line: what was taken.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = data.name
        if not data.name:
            raise InputError("data.name", data.name, "the name of a data set", "for example data.name=JapaneseVowels")
        found = {split: self._read(split) for split in ("train", "test")}
        self.cases = {split: cases.values for split, cases in found.items()}
        labels = {split: cases.labels for split, cases in found.items()}
        if (train := self.cases["train"][0].shape[1]) != (test := self.cases["test"][0].shape[1]):
            raise InputError(
                "data.name", data.name, f"has {train} channels in its training cases and {test} in its test"
            )
        num_missing = sum(int(np.isnan(case).sum()) for cases in self.cases.values() for case in cases)
        self._standardize()
        names = {label.lower(): label for label in reversed(labels["train"])}  # case does not matter in this format
        self.classes = [names[name] for name in sorted(names)]
        if unknown := {label for label in labels["test"] if label.lower() not in names}:
            raise InputError("data.name", data.name, f"has classes in its test cases alone: {sorted(unknown)}")
        number = {name: index for index, name in enumerate(sorted(names))}
        self.labels = {s: np.array([number[label.lower()] for label in found]) for s, found in labels.items()}
        self.baseline_metrics = {
            "accuracy": float((self.labels["test"] == np.bincount(self.labels["train"]).argmax()).mean())
        }
        self.summary = self._summary(num_missing)
        log.info("%s", self.summary)

    def describe(self) -> TaskDescription:
        mean, deviation = ([float(value) for value in each] for each in (self.mean, self.deviation))
        return TaskDescription("series", self.data.seq_len, classes=self.classes, mean=mean, deviation=deviation)

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

    def _read(self, split: str) -> Cases:
        file = find_file(self.data.source, self.data.name, f"{escape(self.data.name)}_{split.upper()}.ts")
        found = read_cases(file)
        if not found.are_classes:
            raise InputError(
                "data.source", str(file), "has numbers to predict (@targetLabel), where classes are needed"
            )
        if not found.labels:
            raise InputError("data.source", str(file), "has no classes (@classLabel false)")
        check_fits(max(map(len, found.values)), self.data, f"the longest series of {file.name}")
        return found

    def _standardize(self) -> None:
        values = np.concatenate(self.cases["train"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a channel without a value, which then is 0
            self.mean, self.deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
            # A constant channel's deviation need not be 0, because of rounding.
            self.deviation[np.nanmax(values, axis=0) == np.nanmin(values, axis=0)] = 1
        for split, cases in self.cases.items():
            scaled = [np.nan_to_num((case - self.mean) / self.deviation) for case in cases]
            self.cases[split] = [case.astype(np.float32) for case in scaled]
        empty = np.isnan(self.mean)
        self.mean[empty], self.deviation[empty] = 0, 1

    def _summary(self, num_missing: int) -> str:
        lengths = [len(case) for cases in self.cases.values() for case in cases]
        classes = counted_classes(self.classes, self.labels["train"])
        channels = f"{len(self.mean):,} channel{'s' * (len(self.mean) > 1)}"
        filled = f"; {num_missing:,} missing value{'s' * (num_missing > 1)}, set to the channel's mean"
        return (
            f"{self.title}: {len(self.cases['train']):,} training and {len(self.cases['test']):,} test cases of "
            f"{len(self.classes):,} classes (in training: {classes}); {channels}; lengths {min(lengths):,} to "
            f"{max(lengths):,}{filled if num_missing else ''}"
        )
