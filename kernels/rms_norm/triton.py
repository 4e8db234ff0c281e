"""RMS normalization of groups of channels as one Triton kernel each way.

A program walks over some of the tokens, of one group of channels, a tile at a time. So the gradient of the scale is
summed within a program, and the programs' sums are added in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import DTYPES, TYPES, Variant, launch

TILE = 2048  # elements
PROGRAMS = 2048  # about: enough for every GPU


@triton.jit
def _place(first, num_tokens, width, channel, in_group, TOKENS: tl.constexpr):
    """Offsets and mask of a tile ``[TOKENS, GROUP]`` in ``[num_tokens, width]``, and of its tokens."""
    token = first + tl.arange(0, TOKENS)
    inside = token < num_tokens
    return token[:, None] * width + channel[None, :], inside[:, None] & in_group[None, :], token, inside


@triton.jit
def _forward_kernel(
    x, weight, y, rate, num_tokens, tokens_each, num_groups, size, eps, GROUP: tl.constexpr, TOKENS: tl.constexpr
):
    """``y [num_tokens, num_groups * size]`` and ``rate [num_tokens, num_groups]``, the reciprocal of the RMS."""
    program = tl.program_id(0).to(tl.int64)
    group = program % num_groups
    start = program // num_groups * tokens_each
    column = tl.arange(0, GROUP)
    in_group = column < size
    channel = group * size + column
    scale = tl.load(weight + channel, mask=in_group, other=0).to(tl.float32)
    for first in range(start, tl.minimum(start + tokens_each, num_tokens), TOKENS):
        place, mask, token, inside = _place(first, num_tokens, num_groups * size, channel, in_group, TOKENS)
        value = tl.load(x + place, mask=mask, other=0).to(tl.float32)
        reciprocal = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / size + eps)
        tl.store(rate + token * num_groups + group, reciprocal, mask=inside)
        tl.store(y + place, (value * reciprocal[:, None] * scale[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad, x, weight, rate, dx, sums, num_tokens, tokens_each, num_groups, size,
    GROUP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """``dx`` as x, and each program's sum over its tokens of the gradient of ``weight``, one row of ``sums`` for all
    groups."""
    program = tl.program_id(0).to(tl.int64)
    group = program % num_groups
    start = program // num_groups * tokens_each
    column = tl.arange(0, GROUP)
    in_group = column < size
    channel = group * size + column
    scale = tl.load(weight + channel, mask=in_group, other=0).to(tl.float32)
    total = tl.zeros([TOKENS, GROUP], tl.float32)
    for first in range(start, tl.minimum(start + tokens_each, num_tokens), TOKENS):
        place, mask, token, inside = _place(first, num_tokens, num_groups * size, channel, in_group, TOKENS)
        reciprocal = tl.load(rate + token * num_groups + group, mask=inside, other=0)[:, None]
        unit = tl.load(x + place, mask=mask, other=0).to(tl.float32) * reciprocal
        upstream = tl.load(grad + place, mask=mask, other=0).to(tl.float32)
        total += upstream * unit
        scaled = upstream * scale[None, :]
        along = tl.sum(scaled * unit, 1)[:, None] / size
        tl.store(dx + place, ((scaled - unit * along) * reciprocal).to(dx.dtype.element_ty), mask=mask)
    tl.store(sums + program // num_groups * (num_groups * size) + channel, tl.sum(total, 0), mask=in_group)


def forward(x: Tensor, weight: Tensor, group: int, eps: float) -> tuple[Tensor, Tensor]:
    """The output as x, and the reciprocal of the RMS ``[tokens, groups]`` fp32."""
    x = x.contiguous()
    shape = _Shape(x, group)
    y, rate = torch.empty_like(x), x.new_empty(shape.num_tokens, shape.num_groups, dtype=torch.float32)
    launch(_forward_kernel, shape.programs, x, weight.contiguous(), y, rate, *shape.sizes, eps, **shape.constants)
    return y, rate


def backward(grad: Tensor, x: Tensor, weight: Tensor, rate: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    grad, x = grad.contiguous(), x.contiguous()
    shape = _Shape(x, group)
    dx, sums = torch.empty_like(x), x.new_empty(shape.programs // shape.num_groups, len(weight), dtype=torch.float32)
    tensors = grad, x, weight.contiguous(), rate, dx, sums
    launch(_backward_kernel, shape.programs, *tensors, *shape.sizes, **shape.constants)
    return dx, sums.sum(0).to(weight.dtype)


class _Shape:
    """The grid and the tile for ``x [..., D]``."""

    def __init__(self, x: Tensor, group: int) -> None:
        self.num_groups = x.shape[-1] // group
        self.num_tokens = x.numel() // x.shape[-1]
        size, tokens = _tile(group)
        stripes = max(1, min(triton.cdiv(self.num_tokens, tokens), PROGRAMS // self.num_groups))
        each = triton.cdiv(triton.cdiv(self.num_tokens, stripes), tokens) * tokens
        self.programs = triton.cdiv(self.num_tokens, each) * self.num_groups if each else 0
        self.sizes = self.num_tokens, each, self.num_groups, group
        self.constants = {"GROUP": size, "TOKENS": tokens, "num_warps": _num_warps(size * tokens)}


def _tile(group: int) -> tuple[int, int]:
    """Channels, a power of two, and tokens of a tile."""
    size = max(16, triton.next_power_of_2(group))
    return size, max(1, TILE // size)


def _num_warps(elements: int) -> int:
    return min(16, max(4, elements // 512))


def variants() -> Iterator[Variant]:
    """Both kernels with the smallest and the largest groups."""
    for dtype in DTYPES:
        for group in (64, 2048, 8192):
            size, tokens = _tile(group)
            types = dict.fromkeys(("grad", "x", "y", "dx", "weight"), TYPES[dtype])
            types |= {"rate": "*fp32", "sums": "*fp32", "eps": "fp32", "GROUP": "constexpr", "TOKENS": "constexpr"}
            for kernel in (_forward_kernel, _backward_kernel):
                signature = {name: types.get(name, "i32") for name in kernel.arg_names}
                name = f"{kernel.__name__[1:-7]}-{dtype}-{group}".replace("torch.", "")
                constants = {"GROUP": size, "TOKENS": tokens}
                yield Variant(name, kernel, signature, constants, _num_warps(size * tokens), 1)
