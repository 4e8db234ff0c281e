"""Dropout whose mask is a hash of positions: it does not depend on how a sequence is split, and can be recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import gpu
from .reference import reference_dropout

__all__ = ["dropout", "reference_dropout"]


def dropout(x: Tensor, rate: float, seeds: Tensor, start: int = 0, salt: int = 0) -> Tensor:
    """``x * keep / (1 - rate)``; see `reference_dropout`, which also runs where Triton does not, and under compile.

    Args:
        x: ``[B, L, ...]``, floating.
        rate: probability of zero, in [0, 1).
        seeds: ``[B]`` int64, on x's device.
        start: position of the first token in its sequence.
        salt: distinguishes layers, and dropouts of one layer.
    """
    if torch.compiler.is_compiling() or gpu.unsupported_reason(x.device.type, x.dtype):
        return reference_dropout(x, rate, seeds, start, salt)
    return _Dropout.apply(x, rate, seeds, start, salt)


class _Dropout(torch.autograd.Function):
    """By one kernel, which is its own adjoint; saves nothing of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seeds: Tensor, start: int, salt: int) -> Tensor:
        ctx.save_for_backward(seeds)
        ctx.rest = rate, start, salt
        return _run(x, rate, seeds, start, salt)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (seeds,), (rate, start, salt) = ctx.saved_tensors, ctx.rest
        return _run(grad, rate, seeds, start, salt), None, None, None, None


def _run(x: Tensor, rate: float, seeds: Tensor, start: int, salt: int) -> Tensor:
    from . import triton

    return triton.run(x, rate, seeds, start, salt)
