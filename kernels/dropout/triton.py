"""Position-keyed dropout as one Triton kernel."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import TYPES, Variant, launch
from . import reference

BLOCK = 2048  # elements of a program
INCREMENT, FIRST, SECOND = (tl.constexpr(x) for x in (reference.INCREMENT, reference.FIRST, reference.SECOND))


@triton.jit
def _mix(bits):
    """As `reference._mix`."""
    bits = bits + INCREMENT
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * FIRST
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * SECOND
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)


@triton.jit
def _dropout_kernel(x, seeds, y, row_size, first_cell, salt, threshold, kept, num_blocks, BLOCK: tl.constexpr):
    """``BLOCK`` elements of one row of ``x [B, row_size]``, whose first one has the number ``first_cell``."""
    program = tl.program_id(0).to(tl.int64)
    row = program // num_blocks
    place = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = place < row_size
    bits = _mix(_mix(tl.load(seeds + row) + salt) + first_cell + place)
    keep = ((bits & 0x7FFFFFFF) >= threshold).to(tl.float32)
    value = tl.load(x + row * row_size + place, mask=mask, other=0).to(tl.float32)
    # A product, not a choice: what is not finite stays visible.
    tl.store(y + row * row_size + place, (value * keep / kept).to(y.dtype.element_ty), mask=mask)


def run(x: Tensor, rate: float, seeds: Tensor, start: int, salt: int) -> Tensor:
    """See `dropout`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    row_size, channels = x[0].numel(), x[0, 0].numel()
    num_blocks = triton.cdiv(row_size, BLOCK)
    cells = start * channels, salt, int(rate * 0x80000000), 1.0 - rate, num_blocks
    launch(_dropout_kernel, len(x) * num_blocks, x, seeds, y, row_size, *cells, BLOCK=BLOCK)
    return y


def variants() -> Iterator[Variant]:
    """The kernel for each dtype."""
    for dtype, pointer in TYPES.items():
        types = {"x": pointer, "y": pointer, "seeds": "*i64", "kept": "fp32", "BLOCK": "constexpr"}
        signature = {name: types.get(name, "i64") for name in _dropout_kernel.arg_names}
        yield Variant(str(dtype).removeprefix("torch."), _dropout_kernel, signature, {"BLOCK": BLOCK}, 4, 1)
