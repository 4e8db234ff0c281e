"""Between tokens ``[B, L, D]`` and the rows ``[B, D, L]`` that FFTs take: `rows.cpp` on a CPU, else PyTorch.

A transposition is all the arithmetic of a long convolution that PyTorch's FFTs do not do, and as slow as one of them.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .. import native

SOURCE = Path(__file__).with_name("rows.cpp")


def transpose(x: Tensor, out: Tensor) -> None:
    """``out [B, J, I] = x [B, I, J]``, in out's dtype."""
    rows = x.stride(-1) == 1 and out.stride(-1) == 1
    if not rows or native.lacks(SOURCE, x.device.type, x.dtype, out.dtype):
        out.copy_(x.transpose(1, 2))
        return
    assert out.shape == (x.shape[0], x.shape[2], x.shape[1])
    bf16 = [t.element_size() == 2 for t in (x, out)]
    sizes = native.integers(*x.shape, *native.strides(x, out))
    native.load(SOURCE).transpose(*bf16, sizes, native.pointers(x, out))
