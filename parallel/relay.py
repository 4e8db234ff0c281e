"""States across ranks: gather every rank's summary; `kernels.scan` folds what lies before (or after) this rank.

A gather moves one payload a rank, whatever the length of the sequence, and needs no rank to wait for its neighbour's
result: exclusive prefix forward, exclusive suffix backward, each after a single exchange.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .mesh import Axis, all_gather, as_bytes
from .traffic import Note, Once, every_time, unnoted


class GatherRelay:
    """The relay of one sequence split over the ranks of an axis (see `kernels.scan.Relay`)."""

    def __init__(self, axis: Axis, note: Note = unnoted, once: Once = every_time) -> None:
        self.rank, self.size = axis.rank, axis.size
        self._axis, self._note, self.once = axis, note, once

    def gather(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return gather(tensors, self._axis, self._note)


def gather(tensors: Sequence[Tensor], axis: Axis, note: Note = unnoted) -> list[tuple[Tensor, ...]]:
    """Every rank's ``tensors``, in rank order, in one exchange of bytes; shapes and dtypes agree between ranks."""
    if axis.size == 1:
        return [tuple(tensors)]
    payload = torch.cat([as_bytes(t) for t in tensors])
    with note(payload.numel()):
        rows = all_gather(payload, axis)
    sizes = [t.numel() * t.element_size() for t in tensors]
    return [
        # A clone, because a slice of bytes need not lie where its dtype may start.
        tuple(part.clone().view(t.dtype).view(t.shape) for part, t in zip(row.split(sizes), tensors, strict=True))
        for row in rows
    ]
