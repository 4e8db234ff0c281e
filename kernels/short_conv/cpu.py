"""Short convolution in C++ for CPUs (`cpu.cpp`): every tensor is read and written once, in each direction."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import native
from .autograd import Piece

SOURCE = Path(__file__).with_name("cpu.cpp")
CHUNK = 1024  # tokens whose part of the taps' gradients is summed on its own


def unsupported_reason(device: str, dtype: torch.dtype, weight_dtype: torch.dtype, num_taps: int) -> str:
    """Why the C++ kernels do not serve such inputs; "" if they do."""
    return native.unsupported_reason(SOURCE, device, dtype, weight_dtype)


def forward(piece: Piece) -> Tensor:
    """See `function.Local`; x is fp32 or bf16."""
    y = torch.empty_like(piece.x, memory_format=torch.contiguous_format)
    _call(piece, None, [y, None, None, None])
    return y


def backward(grad: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """See `function.Local`. Chunks of tokens add up in fp64."""
    x, weight, bias, past, *_ = piece
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dpast = torch.zeros_like(past, memory_format=torch.contiguous_format, dtype=x.dtype)
    chunks = -(-x.shape[1] // CHUNK)
    partial = torch.zeros(x.shape[0] * chunks, weight.shape[1] + 1, x.shape[2], dtype=torch.float64)
    _call(piece, grad, [None, dx, dpast, partial])
    sums = partial.sum(0)
    dweight = sums[:-1].t().to(weight.dtype)
    return dx, dweight, None if bias is None else sums[-1].to(bias.dtype), dpast.to(past.dtype)


def _call(piece: Piece, grad: Tensor | None, outputs: list[Tensor | None]) -> None:
    """Run `cpu.cpp`; see there for the arguments."""
    x, weight, bias, past, past_ids, segments, left, silu = piece
    batch, length, width = x.shape
    tokens, grads = native.rows(x, grad)
    taps, shift = (None if t is None else t.to(torch.float32).contiguous() for t in (weight.t(), bias))
    ids = [t if t is None else t.to(torch.int64).contiguous() for t in (segments, past_ids)]
    before, chunks = past.to(x.dtype).contiguous(), -(-length // CHUNK)
    sizes = batch, length, width, past.shape[1], weight.shape[1], left, silu
    native.load(SOURCE).short_conv(
        x.dtype == torch.bfloat16,
        native.integers(*sizes, *native.strides(tokens, grads), CHUNK, chunks),
        native.pointers(tokens, before, grads, taps, shift, *ids, *outputs),
    )
