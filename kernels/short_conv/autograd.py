"""The autograd Function of the short convolution, around any implementation of its two passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..conv_carry import reach, read_carry, write_carry
from ..state import Carry


class ConvInputs(NamedTuple):
    """The arguments of a short convolution of one shard.

    Attributes:
        x: ``[B, L, D]``, the shard's tokens.
        weight: ``[D, W]``.
        bias: ``[D]`` or None.
        past: ``[B, T, D]``, the T tokens before x.
        past_ids: ``[B, T]`` int64, their document ids, -1 where there is no token, or None.
        segments: ``[B, L]`` int64, the document ids of x, or None.
        left: the number of taps before the current token's.
        silu: whether the activation is SiLU; otherwise there is none.
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
class ConvBackend:
    """An implementation of the short convolution of one shard.

    Attributes:
        forward: ``inputs -> y``, ``[B, L, D]`` in the dtype of x.
        backward: ``(grad, inputs)``, grad that of y, to the gradients of x, weight, bias (or None) and past.
    """

    forward: Callable[[ConvInputs], Tensor]
    backward: Callable[[Tensor, ConvInputs], tuple[Tensor, Tensor, Tensor | None, Tensor]]

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Tensor, Carry]:
        """Arguments and results as of `reference_short_conv`, computed in fp32 or better. Saves only its inputs."""
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
    """Arguments and results as of `reference_short_conv`; ``convolve`` takes the fields of `ConvInputs`."""
    num_taps = weight.shape[1]
    past = read_carry(x, carry, segments, num_taps - 1)
    left, _ = reach(num_taps, causal)
    y = convolve(x, weight, bias, past.tokens, past.ids, segments, left, activation == "silu")
    return y, write_carry(x, segments, past, num_taps - 1)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: ConvBackend, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:6])
        ctx.backend, ctx.rest = backend, arguments[6:]
        return backend.forward(ConvInputs(*arguments))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx, dweight, dbias, dpast = ctx.backend.backward(grad, ConvInputs(*ctx.saved_tensors, *ctx.rest))
        return None, dx, dweight, dbias, dpast, None, None, None, None
