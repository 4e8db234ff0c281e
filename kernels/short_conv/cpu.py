"""Short convolution in C++ for CPUs (`cpu.cpp`): every tensor is read and written once, in each direction."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .. import native

CHUNK = 1024  # tokens whose part of the taps' gradients is summed on its own


def lacks(device: str, dtype: torch.dtype, weight_dtype: torch.dtype, num_taps: int) -> str:
    """Why the C++ kernels do not serve such inputs; "" if they do."""
    return native.lacks(device, dtype) or native.lacks(device, weight_dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor,
    past_ids: Tensor | None,
    segments: Tensor | None,
    left: int,
    silu: bool,
) -> Tensor:
    """``y [B, L, D]`` of ``x [B, L, D]`` in fp32 or bf16; the arguments are those of `function.Local.forward`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _call(x, None, weight, bias, past, past_ids, segments, left, silu, [y, None, None, None])
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor,
    past_ids: Tensor | None,
    segments: Tensor | None,
    left: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The gradients of x, weight, bias and past. Chunks of tokens add up in fp64."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dpast = torch.zeros_like(past, memory_format=torch.contiguous_format, dtype=x.dtype)
    chunks = -(-x.shape[1] // CHUNK)
    partial = torch.zeros(x.shape[0] * chunks, weight.shape[1] + 1, x.shape[2], dtype=torch.float64)
    _call(x, grad, weight, bias, past, past_ids, segments, left, silu, [None, dx, dpast, partial])
    sums = partial.sum(0)
    dweight = sums[:-1].t().to(weight.dtype)
    return dx, dweight, None if bias is None else sums[-1].to(bias.dtype), dpast.to(past.dtype)


def _call(
    x: Tensor,
    grad: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor,
    past_ids: Tensor | None,
    segments: Tensor | None,
    left: int,
    silu: bool,
    outputs: list[Tensor | None],
) -> None:
    """Run `cpu.cpp`; see there for the arguments."""
    batch, length, width = x.shape
    tokens = [t if t is None or t.stride(2) == 1 else t.contiguous() for t in (x, grad)]
    taps = weight.t().to(torch.float32).contiguous()
    shift = None if bias is None else bias.to(torch.float32).contiguous()
    ids = [t if t is None else t.contiguous() for t in (segments, past_ids)]
    strides = [step for t in tokens for step in ((0, 0) if t is None else t.stride()[:2])]
    sizes = [batch, length, width, past.shape[1], weight.shape[1], left, silu, *strides, CHUNK, -(-length // CHUNK)]
    tensors = [tokens[0], past.to(x.dtype).contiguous(), tokens[1], taps, shift, *ids, *outputs]
    native.load(Path(__file__).parent / "cpu.cpp").short_conv(
        x.dtype == torch.bfloat16,
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors)),
    )
