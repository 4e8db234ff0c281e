"""Generated long-range tasks: an example is a function of the seed, its split and its number.

Those in this module follow published benchmarks but not exactly: results are not comparable with published ones.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ..data import IGNORE, DataConfig, Sequences
from ..model import ModelConfig
from .task import Examples, Rows, Task, TaskConfig, check_fits, digest_of, padded_sequence, set_model_fields


class Synthetic(Task):
    """Base of the generated tasks.

    Attributes:
        min_len: least ``data.seq_len``.
    """

    min_len = 2

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        check_fits(self.min_len, data, f"for task.name={task.name}")

    @property
    def fingerprint(self) -> str:
        return digest_of(self.task, self.data.seq_len)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        count = self.task.examples if split == "train" else self.task.test_examples
        return Examples(partial(self.example, split), count, seed)

    def example(self, split: str, number: int) -> Rows:
        """Example ``number`` of a split."""
        # RandomState, because NumPy guarantees that its streams never change.
        return self.make(np.random.RandomState([self.task.seed, self.splits.index(split), number]))

    def make(self, random: np.random.RandomState) -> Rows:
        """Generate one example."""
        raise NotImplementedError


class Lookup(Synthetic):
    """Base of the tasks that ask for earlier values: a value follows the first occurrence of the token that asks."""

    has_distances = True

    def distances(self, tokens: Tensor, labels: Tensor) -> Tensor:
        found = torch.zeros_like(labels)
        for row, position in (labels != IGNORE).nonzero().tolist():
            first = (tokens[row] == tokens[row, position]).to(torch.uint8).argmax()
            found[row, position] = position - (first + 1)
        return found


class Recall(Lookup):
    """Multi-query associative recall, after Zoology (arXiv 2312.04927).

    A sequence has ``task.pairs`` pairs of a key and its value, then token 0 as filler, in which each key occurs once
    more at a random position; the label there is its value. Other positions have no label.
    """

    KEYS, VALUES = 256, 256

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        self.min_len = 3 * task.pairs
        super().__init__(task, data)
        if not 1 <= task.pairs <= self.KEYS:
            raise InputError("task.pairs", task.pairs, f"from 1 to {self.KEYS}")
        self.title = f"recall of {task.pairs} keys"
        self.baseline_metrics = {"accuracy": 1 / self.VALUES}

    def configure_model(self, model: ModelConfig) -> None:
        set_model_fields(
            model, "recall", channels=0, vocab=1 + self.KEYS + self.VALUES, head="token", outputs=0, documents=1
        )

    def make(self, random: np.random.RandomState) -> Rows:
        length, pairs = self.data.seq_len, self.task.pairs
        keys = 1 + random.choice(self.KEYS, pairs, replace=False)
        values = 1 + self.KEYS + random.randint(self.VALUES, size=pairs)
        tokens, labels = np.zeros(length, np.int64), np.full(length, IGNORE, np.int64)
        tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        queries = 2 * pairs + random.choice(length - 2 * pairs, pairs, replace=False)
        tokens[queries], labels[queries] = keys, values
        return torch.from_numpy(tokens), torch.from_numpy(labels), None


class Needle(Lookup):
    """Needle in a haystack: retrieve a value from random tokens.

    Token 0, the marker, is at a random position among random tokens, followed by a value. The last token is the
    marker again; its label is the value. Other positions have no label.
    """

    HAY, VALUES = 64, 64  # numbers of tokens that are no values, and that are
    min_len = 4

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = f"a needle in {data.seq_len:,} tokens"
        self.baseline_metrics = {"accuracy": 1 / self.VALUES}

    def configure_model(self, model: ModelConfig) -> None:
        set_model_fields(
            model, "needle", channels=0, vocab=1 + self.HAY + self.VALUES, head="token", outputs=0, documents=1
        )

    def make(self, random: np.random.RandomState) -> Rows:
        length = self.data.seq_len
        # The random tokens include values too: only the marker distinguishes the one to retrieve.
        tokens = 1 + random.randint(self.HAY + self.VALUES, size=length)
        place, value = random.randint(length - 2), 1 + self.HAY + random.randint(self.VALUES)
        tokens[place], tokens[place + 1], tokens[-1] = 0, value, 0
        labels = torch.full((length,), IGNORE)
        labels[-1] = value
        return torch.from_numpy(tokens), labels, None


class Adding(Synthetic):
    """The adding problem (Hochreiter and Schmidhuber 1997).

    Channel 0 holds random numbers in [0, 1); channel 1 is 1 at two positions, one in each half, and 0 elsewhere. The
    label of the sequence is the sum of the two numbers at these positions.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = "the adding problem"
        self.baseline_metrics = {"rmse": (1 / 6) ** 0.5, "mae": 1 / 3}  # of the constant prediction 1

    def configure_model(self, model: ModelConfig) -> None:
        set_model_fields(model, "adding", channels=2, vocab=0, head="numbers", outputs=1, documents=1)

    def make(self, random: np.random.RandomState) -> Rows:
        length = self.data.seq_len
        numbers = np.zeros((length, 2), np.float32)
        numbers[:, 0] = random.random_sample(length)
        first, second = random.randint(length // 2), random.randint(length // 2, length)
        numbers[[first, second], 1] = 1
        return padded_sequence([numbers], numbers[[first, second], 0].sum(keepdims=True), length)
