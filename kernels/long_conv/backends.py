"""The implementations of the long convolution, and which of them serves an input."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import gpu
from ..backends import Backends, Option
from ..state import Carry
from . import chunked, cpu
from .chunked import LongConv
from .reference import reference_long_conv


def _triton() -> LongConv:
    from . import triton

    return LongConv(triton.forward, triton.backward)


BACKENDS: Backends[Callable[..., tuple[Tensor, Carry]]] = Backends(
    "long_conv",
    {
        "cpu": Option(lambda: LongConv(cpu.forward, cpu.backward), cpu.unsupported_reason),
        "triton": Option(_triton, gpu.unsupported_reason),
        "chunked": Option(lambda: LongConv(chunked.forward, chunked.backward)),
        "reference": Option(lambda: reference_long_conv),
    },
)
