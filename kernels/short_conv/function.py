"""The autograd Function that every implementation of the short convolution runs behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..scan import Carry
from .past import reach, read_carry, write_carry


@dataclass(frozen=True)
class Local:
    """An implementation: the maths of one piece.

    Attributes:
        forward: ``(x, weight, bias, past, past_ids, segments, left, silu) -> y``, with ``x [B, L, D]``,
            ``weight [D, W]``, ``bias [D]`` or None, the tokens before x ``past [B, T, D]``, ids ``[B, T]`` and
            ``[B, L]`` or None, ``left`` taps before a token's own.
        backward: ``(grad, *the same)`` to the gradients of x, weight, bias (or None) and past.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor]]

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
    """`reference_short_conv` by ``convolve``, which has the arguments of `Local.forward`."""
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
        return local.forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx, dweight, dbias, dpast = ctx.local.backward(grad, *ctx.saved_tensors, *ctx.rest)
        return None, dx, dweight, dbias, dpast, None, None, None, None
