"""The base of all tasks: numbered examples, the model configuration that they require, and metrics."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...bounds import bounded
from ...errors import InputError
from ..data import FILLER, IGNORE, DataConfig, Sequences
from ..model import ModelConfig
from .description import TaskDescription

Rows = tuple[Tensor, Tensor, Tensor | None]
"""Tokens, labels and segments (or None) of one sequence, as in `Batch` without the batch dimension."""

TaskName = Literal[
    "language",
    "documents",
    "series",
    "forecast",
    "images",
    "retrieval",
    "listops",
    "pathfinder",
    "recall",
    "needle",
    "adding",
]
TEST_FRACTION = 0.2  # of the examples of each class, where the data bring no test
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}  # folders that are no classes


@dataclass
class TaskConfig:
    """The task and its options.

    Args:
        name: ``language`` (the next token of a corpus), ``documents`` (the class of a text), ``series`` (the class of a
            time series), ``forecast`` (its next values), ``images`` (the class of an image, pixel by pixel),
            ``retrieval`` (whether two excerpts are from the same document), or generated: ``listops``, ``pathfinder``,
            ``recall``, ``needle``, ``adding``.
        seed: seed of the examples that are generated or sampled.
        examples: number of training examples that are generated or sampled.
        test_examples: number of test examples; validation has as many others.
        horizon: forecast: number of future values of each channel.
        pairs: recall: number of key-value pairs in a sequence.
        size: images: height and width in pixels.
        channels: images: 1 (grey) or 3 (colors); 0 for what the pictures have.
        label: documents: the field of a JSON line, the column of a table or the ``NAME=`` in a header of FASTA that
            holds the class; empty for ``label``.
    """

    name: TaskName = "language"
    seed: int = bounded(0, minimum=0)
    examples: int = bounded(10_000, minimum=1)
    test_examples: int = bounded(1_000, minimum=1)
    horizon: int = bounded(16, minimum=1)
    pairs: int = bounded(32, minimum=1)
    size: int = bounded(28, minimum=1)
    channels: int = bounded(0, minimum=0, maximum=3)
    label: str = ""


@dataclass
class DistanceBin:
    """The score of the labels of a bin of distances; see `Task.distances`.

    Attributes:
        first: first distance of the bin, a power of two; the next bin begins at twice as much.
        num_labels: number of labelled tokens.
        loss: mean over them.
        metrics: by name; see `Task.metrics`.
    """

    first: int
    num_labels: int
    loss: float
    metrics: dict[str, float]


@dataclass
class Score:
    """The score of a model on a split.

    Attributes:
        loss: mean over labelled tokens.
        num_labels: number of labelled tokens.
        metrics: by name; see `Task.metrics`.
        by_position: (center, mean loss) of each bin of positions.
        by_source: mean loss of each of several sources.
        by_distance: of a task with distances, the score of each bin of them.
    """

    loss: float
    num_labels: int
    metrics: dict[str, float] = field(default_factory=dict)
    by_position: list[tuple[int, float]] = field(default_factory=list)
    by_source: dict[str, float] = field(default_factory=dict)
    by_distance: list[DistanceBin] = field(default_factory=list)


class Task:
    """A task with its data.

    Args:
        task: its options.
        data: the source of its data, and the length of a sequence.

    Attributes:
        title: name of the data, for messages.
        has_metrics: whether the metrics of `heads.Head.metrics` are computed besides the loss.
        has_distances: whether `distances` says how far back the answer to a label is.
        splits: names of the splits: ``train``, ``valid`` if anything is held out, ``test`` if the task has a test.
        baseline_metrics: metrics of a constant or otherwise trivial prediction, for comparison.
    """

    has_metrics = True
    has_distances = False
    splits: tuple[str, ...] = ("train", "valid", "test")

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        self.task, self.data = task, data
        self.title: str = task.name
        self.baseline_metrics: dict[str, float] = {}
        self._shorter: dict[int, Task] = {}

    @classmethod
    def prepare(cls, data: DataConfig) -> None:
        """Prepare files on disk; called by one rank while the others wait."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the examples."""
        raise NotImplementedError

    def configure_model(self, model: ModelConfig) -> None:
        """Set the fields of the model's configuration that the task determines: vocabulary or channels, head, outputs.

        Raises:
            InputError: one of them has been set to another value.
        """
        raise NotImplementedError

    def sequences(self, split: str, seed: int | None) -> Sequences:
        """The examples of a split as a dataset in the order of ``seed``; see `Sequences`."""
        raise NotImplementedError

    def shorter(self, seq_len: int, seed: int) -> Sequences:
        """The training examples at ``seq_len`` tokens, which divides ``data.seq_len``, in the order of ``seed``.

        Raises:
            InputError: the task has none of this length.
        """
        if seq_len not in self._shorter:
            try:
                self._shorter[seq_len] = type(self)(self.task, replace(self.data, seq_len=seq_len))
            except InputError as error:
                why = f"{error.field}: {error.allowed}"
                allowed = f"{seq_len} tokens are no length for task.name={self.task.name} ({why})"
                raise InputError("data.curriculum", self.data.curriculum, allowed) from None
        return self._shorter[seq_len].sequences("train", seed)

    def describe(self) -> TaskDescription:
        """What predictions for new data need, when the training data are gone."""
        return TaskDescription(self.task.name, self.data.seq_len)

    def write_run_files(self, run_dir: Path) -> None:
        """Write the files that inference with the model needs, such as a vocabulary, into a run's directory.

        Raises:
            OSError: they cannot be written.
        """
        self.describe().save(run_dir)

    def introduction(self) -> str:
        """A short description of the training data, with its size."""
        return f"{len(self.sequences('train', None)):,} training examples of {self.title}"

    def distances(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """How many tokens before each label its answer is, of tasks that have `has_distances`.

        Args:
            tokens, labels: ``[B, L]`` of whole sequences.

        Returns:
            ``[B, L]`` int64, at least 1; 0 without a label.
        """
        raise NotImplementedError

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Convert the means over a split to the metrics that are reported: ``mse`` becomes ``rmse``."""
        if "mse" in means:
            return {"rmse": math.sqrt(means["mse"]), **{k: v for k, v in means.items() if k != "mse"}}
        return means


class Examples(Sequences):
    """A dataset whose sequences are generated when they are read.

    Args:
        make: returns the sequence of a number, deterministically.
        count: number of sequences.
        seed: as of `Sequences`.
    """

    def __init__(self, make: Callable[[int], Rows], count: int, seed: int | None) -> None:
        super().__init__(seed)
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def sequence(self, window: int) -> Rows:
        tokens, labels, segments = self.make(max(window, 0))
        if window == FILLER:
            labels = torch.full_like(labels, math.nan if labels.is_floating_point() else IGNORE)
        return tokens, labels, segments


def padded_sequence(documents: Sequence[NDArray[Any]], label: int | NDArray[np.float32], length: int) -> Rows:
    """Concatenate documents, pad them with 0 to a sequence of L tokens, and put one label at its last position.

    Args:
        documents: each ``[n]`` int64 ids or ``[n, C]`` numbers; their segments are 0, 1, ..., that of the padding is
            the next number.
        label: a class, or numbers ``[outputs]``.
        length: L; at least the total length of the documents.

    Returns:
        Tokens, labels and segments; the segments are None for one document of length L.
    """
    tokens = np.concatenate(documents)
    lengths = [len(document) for document in documents]
    padded = np.zeros((length, *tokens.shape[1:]), tokens.dtype)
    padded[: len(tokens)] = tokens
    if isinstance(label, int):
        labels = torch.full((length,), IGNORE)
        labels[-1] = label
    else:
        labels = torch.full((length, len(label)), math.nan)
        labels[-1] = torch.from_numpy(label)
    if lengths == [length]:
        return torch.from_numpy(padded), labels, None
    segments = np.repeat(np.arange(len(lengths) + 1), [*lengths, length - len(tokens)])
    return torch.from_numpy(padded), labels, torch.from_numpy(segments)


def set_model_fields(model: ModelConfig, task: str, **required: Any) -> None:
    """Set fields of a model's configuration to the values that a task requires.

    Raises:
        InputError: a field has neither its default nor the required value.
    """
    defaults = ModelConfig()
    for name, value in required.items():
        if getattr(model, name) not in (value, getattr(defaults, name)):
            allowed = f"must be {value} for task.name={task}"
            raise InputError(f"model.{name}", getattr(model, name), allowed, f"leave model.{name} out")
        setattr(model, name, value)


def check_causal(model: ModelConfig, task: str) -> None:
    """Raise InputError if the model is not causal: its tokens would see their labels."""
    if not model.causal:
        allowed = f"true for task.name={task}: the labels are among the later tokens"
        raise InputError("model.causal", False, allowed, "leave model.causal out")


def check_fits(length: int, data: DataConfig, what: str) -> None:
    """Raise InputError if ``length`` tokens, described by ``what``, are more than a sequence has."""
    if length > data.seq_len:
        raise InputError("data.seq_len", data.seq_len, f"at least {length}, {what}", f"set data.seq_len={length}")


def holdout_split(count: int, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the numbers 0 to ``count - 1`` of examples into kept and held-out ones, every ``1 / fraction``-th."""
    numbers = np.arange(count)
    is_held_out = np.floor((numbers + 1) * fraction) > np.floor(numbers * fraction)
    return numbers[~is_held_out], numbers[is_held_out]


def stratified_split(labels: NDArray[np.int64], fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the numbers of all examples into those kept and those held out, the same fraction of each class."""
    parts = []
    for label in range(int(labels.max()) + 1):
        of_class = np.flatnonzero(labels == label)
        parts.append([of_class[numbers] for numbers in holdout_split(len(of_class), fraction)])
    kept, held_out = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    return kept, held_out


def listed(names: Sequence[str], most: int = 12) -> str:
    """The first ``most`` of some names, and how many there are more."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted_classes(classes: Sequence[str], labels: NDArray[np.int64]) -> str:
    """The names of classes, each with the number of its ``labels``."""
    counts = np.bincount(labels, minlength=len(classes))
    return listed([f"{name}: {count:,}" for name, count in zip(classes, counts, strict=True)])


def digest_of(task: TaskConfig, *contents: Any) -> str:
    """SHA-256 of a task's options and of ``contents``: arrays, or values that JSON can represent."""
    later = {"channels", "label"}  # options that count where they are set, so that older checkpoints fit
    options = {name: value for name, value in asdict(task).items() if name not in later or value}
    found = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for content in contents:
        if isinstance(content, np.ndarray):
            found.update(str((content.dtype, content.shape)).encode() + np.ascontiguousarray(content).tobytes())
        else:
            found.update(json.dumps(content).encode())
    return found.hexdigest()
