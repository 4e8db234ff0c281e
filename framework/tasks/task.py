"""What all tasks have in common: examples by number, the model that they need, metrics."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ..data import FILLER, IGNORE, DataConfig, Sequences
from ..model import ModelConfig

Rows = tuple[Tensor, Tensor, Tensor | None]
"""Tokens, labels and segments of one sequence."""


@dataclass
class TaskConfig:
    """What is learned.

    Args:
        name: ``language`` (the next token of a corpus), ``series`` (the class of a time series), ``forecast`` (its next
            values), ``images`` (the class of an image, pixel by pixel), ``retrieval`` (are two excerpts of one
            document?), or generated: ``listops``, ``recall``, ``needle``, ``adding``.
        seed: of the examples that are generated or drawn.
        examples: how many of them there are to train on.
        test_examples: how many to be scored by; as many others are for validation.
        horizon: forecast: values ahead, of each channel.
        pairs: recall: keys with their values in a sequence.
        size: images: pixels of a side.
    """

    name: str = "language"
    seed: int = 0
    examples: int = 10_000
    test_examples: int = 1_000
    horizon: int = 16
    pairs: int = 32
    size: int = 28


@dataclass
class Score:
    """How well a model does on a split.

    Attributes:
        loss: mean over labelled tokens.
        num_labels: how many there were.
        metrics: by name.
        by_position: (position, mean loss) of each stretch of positions.
    """

    loss: float
    num_labels: int
    metrics: dict[str, float] = field(default_factory=dict)
    by_position: list[tuple[int, float]] = field(default_factory=list)


class Task:
    """A task with its examples.

    Args:
        task: its options.
        data: where its data are, and the length of a sequence.

    Attributes:
        title: what its data are called.
        measured: whether `heads.Head.measure` is asked for.
        splits: names of those there are: ``train``, ``valid`` if any is held out, ``test`` if it is scored at the end.
        chance: metrics of the simplest answer, to see what was learned.
    """

    measured = True
    splits: tuple[str, ...] = ("train", "valid", "test")

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        self.task, self.data = task, data
        self.title = task.name
        self.baseline_metrics: dict[str, float] = {}

    @classmethod
    def prepare(cls, data: DataConfig) -> None:
        """Make ready what lies on the disk; called by one rank, while the others wait."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the examples."""
        raise NotImplementedError

    def fit(self, model: ModelConfig) -> None:
        """Fill in what a configuration leaves to the task.

        Raises:
            InputError: it says something else.
        """
        raise NotImplementedError

    def sequences(self, split: str, seed: int | None) -> Sequences:
        """The examples of a split, in the order of ``seed``; see `Sequences`."""
        raise NotImplementedError

    def keep(self, run_dir: Path) -> None:
        """Write into a run's directory what its model is used with; OSError where that is not possible."""

    def introduction(self) -> str:
        """What there is to learn from, in a few words."""
        return f"{len(self.sequences('train', None)):,} training examples of {self.title}"

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """What is reported, of the means over a split: the root of squared errors."""
        if "mse" in means:
            return {"rmse": math.sqrt(means["mse"]), **{k: v for k, v in means.items() if k != "mse"}}
        return means


class Examples(Sequences):
    """Sequences that are made when they are read.

    Args:
        make: gives the sequence of a number, always the same.
        count: how many there are.
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


def whole(documents: Sequence[NDArray[Any]], answer: int | NDArray[np.float32], length: int) -> Rows:
    """A sequence of whole documents with one answer, which stands at its last token.

    Args:
        documents: each ``[n]`` int64 ids or ``[n, C]`` numbers; what follows them up to ``length`` is padding, a
            document of its own.
        answer: a class, or numbers ``[outputs]``.
        length: L; not less than all documents together.
    """
    tokens = np.concatenate(documents)
    lengths = [len(document) for document in documents]
    padded = np.zeros((length, *tokens.shape[1:]), tokens.dtype)
    padded[: len(tokens)] = tokens
    if isinstance(answer, int):
        labels = torch.full((length,), IGNORE)
        labels[-1] = answer
    else:
        labels = torch.full((length, len(answer)), math.nan)
        labels[-1] = torch.from_numpy(answer)
    if lengths == [length]:
        return torch.from_numpy(padded), labels, None
    segments = np.repeat(np.arange(len(lengths) + 1), [*lengths, length - len(tokens)])
    return torch.from_numpy(padded), labels, torch.from_numpy(segments)


def settle(model: ModelConfig, task: str, **wanted: Any) -> None:
    """Give fields of a model's configuration that were left as they are by default.

    Raises:
        InputError: one says something else.
    """
    plain = ModelConfig()
    for name, value in wanted.items():
        if getattr(model, name) not in (value, getattr(plain, name)):
            allowed = f"must be {value} for task.name={task}"
            raise InputError(f"model.{name}", getattr(model, name), allowed, f"leave model.{name} out")
        setattr(model, name, value)


def check_causal(model: ModelConfig, task: str) -> None:
    """Raise InputError where tokens would see their own answers."""
    if not model.causal:
        allowed = f"true for task.name={task}: the answers are among the tokens that follow"
        raise InputError("model.causal", False, allowed, "leave model.causal out")


def check_fits(length: int, data: DataConfig, what: str) -> None:
    """Raise InputError where something is longer than a sequence."""
    if length > data.seq_len:
        raise InputError("data.seq_len", data.seq_len, f"at least {length}, {what}", f"set data.seq_len={length}")


def held_out(count: int, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers of ``count`` training examples without those held out, and these: about every ``1 / fraction``-th."""
    numbers = np.arange(count)
    chosen = np.floor((numbers + 1) * fraction) > np.floor(numbers * fraction)
    return numbers[~chosen], numbers[chosen]


def digest_of(task: TaskConfig, *contents: Any) -> str:
    """SHA-256 of a task's options and what it was given: arrays, or what JSON can write."""
    found = hashlib.sha256(json.dumps(asdict(task), sort_keys=True).encode())
    for content in contents:
        if isinstance(content, np.ndarray):
            found.update(str((content.dtype, content.shape)).encode() + np.ascontiguousarray(content).tobytes())
        else:
            found.update(json.dumps(content).encode())
    return found.hexdigest()
