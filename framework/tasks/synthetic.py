"""Long-range tasks that are generated: every example follows from the seed, its split and its number alone.

They are made in the manner of published ones ("-style"); figures reached on them are not comparable with those.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from statistics import median

import numpy as np
import torch

from ...errors import InputError
from ..data import IGNORE, DataConfig, Sequences
from ..model import ModelConfig
from .task import Examples, Rows, Task, TaskConfig, check_fits, digest_of, settle, whole


class Synthetic(Task):
    """Examples out of random numbers."""

    least = 2  # tokens of a sequence

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        check_fits(self.least, data, f"for task.name={task.name}")

    @property
    def fingerprint(self) -> str:
        return digest_of(self.task, self.data.seq_len)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        count = self.task.examples if split == "train" else self.task.test_examples
        return Examples(partial(self.numbered, split), count, seed)

    def numbered(self, split: str, number: int) -> Rows:
        # RandomState, because NumPy promises that its streams never change.
        return self.make(np.random.RandomState([self.task.seed, self.splits.index(split), number]))

    def make(self, random: np.random.RandomState) -> Rows:
        """One example."""
        raise NotImplementedError


class ListOps(Synthetic):
    """Nested minima, maxima, medians and sums modulo 10 of digits (after Nangia and Bowman 2018, arXiv 1804.06028).

    A token is a digit, an opening bracket with its operation, or a closing bracket; the class is the value.
    """

    OPENING, CLOSING, VOCAB = 10, 14, 16
    MAX_DEPTH, MAX_ARGUMENTS = 10, 10
    least = 16

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = "ListOps-style expressions"
        values = [int(self.numbered("test", number)[1][-1]) for number in range(min(200, task.test_examples))]
        self.baseline_metrics = {"accuracy": max(map(values.count, values)) / len(values)}

    def fit(self, model: ModelConfig) -> None:
        settle(model, "listops", channels=0, vocab=self.VOCAB, head="class", outputs=10, documents=1)

    def make(self, random: np.random.RandomState) -> Rows:
        budget = random.randint(max(4, self.data.seq_len // 4), self.data.seq_len + 1)
        # One call for all numbers: an expression of two thousand tokens takes thousands of them.
        tokens, value = self._expression(iter(random.random_sample(4 * budget).tolist()), budget, 0)
        return whole([np.array(tokens)], value, self.data.seq_len)

    def _expression(self, uniform: Iterator[float], budget: int, depth: int) -> tuple[list[int], int]:
        """Tokens, at most ``budget`` of them, and their value; takes fewer than 4 numbers a token."""
        if budget < 4 or depth == self.MAX_DEPTH:
            digit = int(10 * next(uniform))
            return [digit], digit
        count = 2 + int((min(self.MAX_ARGUMENTS, budget - 2) - 1) * next(uniform))
        operation = int(4 * next(uniform))
        spare = budget - 2 - count  # what is left when each argument has a token
        cuts = [0, *sorted(int((spare + 1) * next(uniform)) for _ in range(count - 1)), spare]
        parts = [self._expression(uniform, 1 + end - start, depth + 1) for start, end in pairwise(cuts)]
        values = [value for _, value in parts]
        results = max(values), min(values), int(median(values)), sum(values) % 10
        tokens = [token for part, _ in parts for token in part]
        return [self.OPENING + operation, *tokens, self.CLOSING], results[operation]


class Recall(Synthetic):
    """Associative recall of several keys (after "Zoology", arXiv 2312.04927): pairs of a key and its value, then filler
    in which each key comes once more, in another order; there its value is to be told.
    """

    KEYS, VALUES = 256, 256

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        self.least = 3 * task.pairs
        super().__init__(task, data)
        if not 1 <= task.pairs <= self.KEYS:
            raise InputError("task.pairs", task.pairs, f"from 1 to {self.KEYS}")
        self.title = f"recall of {task.pairs} keys"
        self.baseline_metrics = {"accuracy": 1 / self.VALUES}

    def fit(self, model: ModelConfig) -> None:
        settle(model, "recall", channels=0, vocab=1 + self.KEYS + self.VALUES, head="token", outputs=0, documents=1)

    def make(self, random: np.random.RandomState) -> Rows:
        length, pairs = self.data.seq_len, self.task.pairs
        keys = 1 + random.choice(self.KEYS, pairs, replace=False)
        values = 1 + self.KEYS + random.randint(self.VALUES, size=pairs)
        tokens, labels = np.zeros(length, np.int64), np.full(length, IGNORE, np.int64)
        tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + random.choice(length - 2 * pairs, pairs, replace=False)
        tokens[places], labels[places] = keys, values
        return torch.from_numpy(tokens), torch.from_numpy(labels), None


class Needle(Synthetic):
    """A needle in a haystack: somewhere in random tokens a mark with a value behind it; at the end the mark again, and
    the value is to be told.
    """

    HAY, VALUES = 64, 64
    least = 4

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = f"a needle in {data.seq_len:,} tokens"
        self.baseline_metrics = {"accuracy": 1 / self.VALUES}

    def fit(self, model: ModelConfig) -> None:
        settle(model, "needle", channels=0, vocab=1 + self.HAY + self.VALUES, head="token", outputs=0, documents=1)

    def make(self, random: np.random.RandomState) -> Rows:
        length = self.data.seq_len
        # Hay has the values' tokens in it too: only the mark tells which one counts.
        tokens = 1 + random.randint(self.HAY + self.VALUES, size=length)
        place, value = random.randint(length - 2), 1 + self.HAY + random.randint(self.VALUES)
        tokens[place], tokens[place + 1], tokens[-1] = 0, value, 0
        labels = torch.full((length,), IGNORE)
        labels[-1] = value
        return torch.from_numpy(tokens), labels, None


class Adding(Synthetic):
    """The adding problem (Hochreiter and Schmidhuber 1997): numbers in [0, 1), two of them marked, one in each half;
    their sum is to be told.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = "the adding problem"
        self.baseline_metrics = {"rmse": (1 / 6) ** 0.5, "mae": 1 / 3}  # of always answering 1

    def fit(self, model: ModelConfig) -> None:
        settle(model, "adding", channels=2, vocab=0, head="numbers", outputs=1, documents=1)

    def make(self, random: np.random.RandomState) -> Rows:
        length = self.data.seq_len
        numbers = np.zeros((length, 2), np.float32)
        numbers[:, 0] = random.random_sample(length)
        first, second = random.randint(length // 2), random.randint(length // 2, length)
        numbers[[first, second], 1] = 1
        return whole([numbers], numbers[[first, second], 0].sum(keepdims=True), length)
