"""A rank without tokens. Layers of transformers cannot take none: they run on one that nothing reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...kernels.state import StatefulOp
from ...parallel.span import ChannelShard, LocalFunction, Span


class WithoutTokens(Span):
    """The span of an empty shard, whose layers run on one token ``[B, 1, ...]``. The verbs leave it out, so that other
    ranks get what an empty shard gives, and answer it with zeros.
    """

    @classmethod
    def from_span(cls, span: Span) -> WithoutTokens:
        """Shares the outgoing carry and the exchanges of ``span``."""
        return cls(**{field.name: getattr(span, field.name) for field in fields(span)})

    def scan(self, op: StatefulOp, *inputs: Tensor, name: str = "scan") -> Tensor:
        return _with_one(super().scan(op, *(x[:, :0] for x in inputs), name=name))

    def halo(
        self, x: Tensor, left: int, right: int = 0, fn: LocalFunction | None = None, *, name: str = "halo"
    ) -> Tensor:
        return _with_one(super().halo(x[:, :0], left, right, fn, name=name))

    def halo_segments(self, left: int, right: int = 0) -> Tensor | None:
        ids = super().halo_segments(left, right)
        return None if ids is None else _with_one(ids)

    def by_channel(
        self, fn: Callable[[ChannelShard], Tensor], x: Tensor, reach: int | None = None, **options: Any
    ) -> Tensor:
        return _with_one(super().by_channel(fn, x[:, :0], reach, **options))


def without_tokens(value: Any) -> Any:
    """What a model gave for its one token ``[B, 1, ...]``, or a collection of such, as of none ``[B, 0, ...]``.

    The tensors keep their graphs, so that this rank takes part in the exchanges of the backward pass.
    """
    if isinstance(value, Tensor):
        return value[:, :0]
    if isinstance(value, (tuple, list)):
        return type(value)(without_tokens(part) for part in value)
    if isinstance(value, dict):  # an output of transformers
        for key in list(value):
            value[key] = without_tokens(value[key])
    return value


def _with_one(y: Tensor) -> Tensor:
    return torch.cat([y, y.new_zeros(y.shape[0], 1, *y.shape[2:])], dim=1)
