"""Several sources as one data set: the source of each sequence is a function of its position alone.

The sources take turns in a cycle of `CYCLE` positions, in which each has its share of them, spread evenly. So after any
number of sequences, each source has given its share to within one or two sequences, and its own position, hence its own
epochs and their orders, follow from the position by arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ...errors import InputError
from .loader import FILLER, Sequences

CYCLE = 10_000


class Mixture(Sequences):
    """The sequences of several data sets, each read in its own order as often as its weight says.

    Their numbers follow each other. Without a seed all are read once, one data set after the other.

    Args:
        parts: the data sets by name, all with the same seed.
        weights: of each, above 0; only their ratios count.
        seed: as of `Sequences`.

    Raises:
        InputError: a weight is less than 1 in `CYCLE` of them all.
    """

    def __init__(self, parts: Mapping[str, Sequences], weights: Mapping[str, float], seed: int | None) -> None:
        super().__init__(seed)
        self.parts, total = dict(parts), sum(weights[name] for name in parts)
        self.shares = {name: weights[name] / total for name in parts}
        for name, share in self.shares.items():
            if share * CYCLE < 1:
                allowed = f"must be at least 1/{CYCLE:,} of the sum of all weights, {total:g}"
                raise InputError(f"data.sources.{name}.weight", weights[name], allowed)
        self.counts = _apportion(list(self.shares.values()), CYCLE)  # positions of each in a cycle
        turns = [np.arange(count) for count in self.counts]
        times = np.concatenate([(turn + 0.5) / len(turn) for turn in turns])
        order = np.argsort(times, kind="stable")
        self.part_of = np.repeat(np.arange(len(turns)), self.counts)[order]  # int64 [CYCLE]
        self.turn_of = np.concatenate(turns)[order]  # int64 [CYCLE]: how often the part came before in the cycle
        self.firsts = np.cumsum([0, *(part.num_numbers for part in self.parts.values())])

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    @property
    def num_numbers(self) -> int:
        return int(self.firsts[-1])

    def sequence(self, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = list(self.parts.values())
        if window == FILLER:
            return parts[0].sequence(FILLER)
        number = int(np.searchsorted(self.firsts, window, "right")) - 1
        return parts[number].sequence(window - int(self.firsts[number]))

    def window(self, position: int) -> int:
        parts = list(self.parts.values())
        if self.seed is None:
            for part, first in zip(parts, self.firsts, strict=False):
                if position < len(part):
                    return int(first) + part.window(position)
                position -= len(part)
            return FILLER
        cycle, at = divmod(position, CYCLE)
        number = int(self.part_of[at])
        own = cycle * self.counts[number] + int(self.turn_of[at])
        return int(self.firsts[number]) + parts[number].window(own)

    def epochs(self, count: int) -> dict[str, float]:
        cycles, rest = divmod(count, CYCLE)
        last = np.bincount(self.part_of[:rest], minlength=len(self.parts)).tolist()
        read = [cycles * whole + part for whole, part in zip(self.counts, last, strict=True)]
        return {name: number / len(part) for (name, part), number in zip(self.parts.items(), read, strict=True)}


def _apportion(shares: list[float], total: int) -> list[int]:
    """Whole numbers with the sum ``total`` in the ratio of ``shares``, whose sum is 1, by the largest remainder."""
    counts = [math.floor(share * total) for share in shares]
    remainders = [share * total - count for share, count in zip(shares, counts, strict=True)]
    for number in sorted(range(len(shares)), key=lambda n: -remainders[n])[: total - sum(counts)]:
        counts[number] += 1
    return counts
