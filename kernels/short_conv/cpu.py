"""Short convolution in C++ for CPUs (`cpu.cpp`): each pass reads and writes every tensor once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native
from .autograd import ConvInputs

SOURCE = Path(__file__).with_name("cpu.cpp")
SUM_LEN = 1024  # tokens whose contribution to the gradient of the taps is summed separately


def unsupported_reason(device: str, dtype: torch.dtype, weight_dtype: torch.dtype, num_taps: int) -> str:
    """Why the C++ kernels do not serve such inputs; "" if they do."""
    return native.unsupported_reason(SOURCE, device, dtype, weight_dtype)


def forward(inputs: ConvInputs) -> Tensor:
    """See `autograd.ConvBackend`; x is fp32 or bf16."""
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    native.load(SOURCE).short_conv(*_arguments(inputs, None, y, None, None, None))
    return y


def backward(grad: Tensor, inputs: ConvInputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """See `autograd.ConvBackend`. Sums over `SUM_LEN` tokens are added in fp64."""
    x, weight, bias, past, *_ = inputs
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dpast = torch.zeros_like(past, memory_format=torch.contiguous_format, dtype=x.dtype)
    num_sums = x.shape[0] * -(-x.shape[1] // SUM_LEN)
    partial = torch.zeros(num_sums, weight.shape[1] + 1, x.shape[2], dtype=torch.float64)
    native.load(SOURCE).short_conv(*_arguments(inputs, grad, None, dx, dpast, partial))
    sums = partial.sum(0)
    dweight = sums[:-1].t().to(weight.dtype)
    return dx, dweight, None if bias is None else sums[-1].to(bias.dtype), dpast.to(past.dtype)


def _arguments(
    inputs: ConvInputs,
    grad: Tensor | None,
    y: Tensor | None,
    dx: Tensor | None,
    dpast: Tensor | None,
    partial: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of `short_conv` in `cpu.cpp`: forward into ``y``, or backward into ``dx, dpast, partial``."""
    x, weight, bias, past, past_ids, segments, left, silu = inputs
    batch, length, width = x.shape
    tokens, upstream = native.last_dim_contiguous(x, grad)
    taps, offset = (None if t is None else t.to(torch.float32).contiguous() for t in (weight.t(), bias))
    ids = [None if t is None else t.to(torch.int64).contiguous() for t in (segments, past_ids)]
    sizes = batch, length, width, past.shape[1], weight.shape[1], left, silu
    before = past.to(x.dtype).contiguous()
    return (
        x.dtype == torch.bfloat16,
        native.integers(*sizes, *native.strides(tokens, upstream), SUM_LEN, -(-length // SUM_LEN)),
        native.Pointers(tokens, before, upstream, taps, offset, *ids, y, dx, dpast, partial),
    )
