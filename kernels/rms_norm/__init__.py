"""RMS normalization of groups of channels, with a scale per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import gpu
from .reference import Normed, normed, reference_rms_norm

__all__ = ["reference_rms_norm", "rms_norm"]

MAX_GROUP = 8192  # channels that one program of the GPU's kernels holds


def rms_norm(x: Tensor, weight: Tensor, group: int, eps: float = 1e-6) -> Tensor:
    """``weight * x / rms(x)`` within each group; see `reference_rms_norm`. Saves of tensors as large as x only x.

    Source: "Root Mean Square Layer Normalization", arXiv 1910.07467.

    Args:
        x: ``[..., D]``, floating.
        weight: ``[D]``.
        group: channels of a group; divides D.
        eps: added to the mean square.

    Returns:
        As x, in its dtype, also under autocast; means are in fp32 or better.
    """
    fits = not torch.compiler.is_compiling() and group <= MAX_GROUP
    if fits and not gpu.unsupported_reason(x.device.type, x.dtype, weight.dtype):
        return _Fused.apply(x, weight, group, eps)
    if x.device.type != "cpu":
        return reference_rms_norm(x, weight, group, eps)
    groups, scale = x.unflatten(-1, (-1, group)), weight.view(-1, group)
    y = Normed.apply(groups, scale, eps) if torch.is_grad_enabled() else normed(groups, scale, eps)[0]
    return y.flatten(-2)


class _Fused(torch.autograd.Function):
    """By one kernel each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: int, eps: float) -> Tensor:
        from . import triton

        y, rate = triton.forward(x, weight, group, eps)
        ctx.save_for_backward(x, weight, rate)
        ctx.group = group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from . import triton

        x, weight, rate = ctx.saved_tensors
        return *triton.backward(grad, x, weight, rate, ctx.group), None, None
