"""RMS normalization in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference_rms_norm(x: Tensor, weight: Tensor, group: int, eps: float = 1e-6) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``, means over each group of channels; arguments as of `rms_norm`."""
    groups = F.rms_norm(x.unflatten(-1, (-1, group)), (group,), eps=eps)
    return (groups * weight.view(-1, group)).flatten(-2).to(x.dtype)


def normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``weight * x / rms(x)`` over the last dimension, and ``1 / rms(x)``, in few passes over a CPU's memory."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rate = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rate).mul_(weight).to(x.dtype), rate


class Normed(torch.autograd.Function):
    """`normed`; of tensors as large as x it saves x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rate = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, rate)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rate = ctx.saved_tensors
        unit, wide = x * rate, grad.to(rate.dtype)
        dweight = (wide * unit).sum_to_size(weight.shape)
        wide = wide * weight
        along = torch.linalg.vecdot(wide, unit).unsqueeze(-1).div_(x.shape[-1])
        return wide.addcmul_(unit, along, value=-1).mul_(rate).to(x.dtype), dweight.to(weight.dtype), None
