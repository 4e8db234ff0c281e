"""The implementations of the short convolution, and which of them serves an input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import gpu
from ..backends import Backends, Option
from ..state import Carry
from . import chunked, cpu
from .autograd import ConvBackend
from .reference import reference_short_conv


def _triton() -> ConvBackend:
    from . import triton

    return ConvBackend(triton.forward, triton.backward)


def _triton_unsupported(device: str, x: torch.dtype, weight: torch.dtype, taps: int) -> str:
    return gpu.unsupported_reason(device, x, weight) or ("" if 2 <= taps <= 8 else f"2 to 8 taps, not {taps}")


BACKENDS: Backends[Callable[..., tuple[Tensor, Carry]]] = Backends(
    "short_conv",
    {
        "cpu": Option(lambda: ConvBackend(cpu.forward, cpu.backward), cpu.unsupported_reason),
        "triton": Option(_triton, _triton_unsupported),
        "chunked": Option(lambda: ConvBackend(chunked.forward, chunked.backward)),
        "reference": Option(lambda: reference_short_conv),
    },
)
