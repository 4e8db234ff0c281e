"""The autograd Function that every implementation of the short convolution runs behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..conv_carry import reach, read_carry, write_carry
from ..scan import Carry


class Piece(NamedTuple):
    """Tokens, the taps that are to run over them, and the tokens before them.

    Attributes:
        x: ``[B, L, D]``.
        weight: ``[D, W]``.
        bias: ``[D]`` or None.
        past: ``[B, T, D]``, the T tokens before x.
        past_ids: ``[B, T]`` int64, their documents, -1 where there was no token, or None.
        segments: ``[B, L]`` int64, the documents of x, or None.
        left: taps before the token itself.
        silu: whether the activation is SiLU rather than none.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    past: Tensor
    past_ids: Tensor | None
    segments: Tensor | None
    left: int
    silu: bool


@dataclass(frozen=True)
class Local:
    """An implementation: the maths of one piece.

    Attributes:
        forward: the output ``[B, L, D]``, in x's dtype.
        backward: given the output's gradient too, the gradients of x, weight, bias (or None) and past.
    """

    forward: Callable[[Piece], Tensor]
    backward: Callable[[Tensor, Piece], tuple[Tensor, Tensor, Tensor | None, Tensor]]

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Tensor, Carry]:
        """The arguments and results of `reference_short_conv`, in fp32 or better; saves nothing but its inputs."""
        return run(partial(_ShortConv.apply, self), *arguments, **options)


def run(
    convolve: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    causal: bool = True,
    carry: Carry | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Carry]:
    """`reference_short_conv` by ``convolve``, whose arguments are those of `Piece`."""
    num_taps = weight.shape[1]
    past = read_carry(x, carry, segments, num_taps - 1)
    left, _ = reach(num_taps, causal)
    y = convolve(x, weight, bias, past.tokens, past.ids, segments, left, activation == "silu")
    return y, write_carry(x, segments, past, num_taps - 1)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Local, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:6])
        ctx.local, ctx.rest = local, arguments[6:]
        return local.forward(Piece(*arguments))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx, dweight, dbias, dpast = ctx.local.backward(grad, Piece(*ctx.saved_tensors, *ctx.rest))
        return None, dx, dweight, dbias, dpast, None, None, None, None
