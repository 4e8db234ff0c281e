"""What the Triton kernels share: where they run, how they are compiled, and what is compiled ahead of time.

Every operator's `triton.py` has ``variants()``, each kernel in each configuration that it may launch;
`tests/kernels/test_ahead_of_time.py` compiles them for GPUs that need not be there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .backends import is_traced

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OPTIONS = {"enable_fp_fusion": True}  # for every launch: fused multiply-adds, whatever Triton's default is
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


class Variant(NamedTuple):
    """One kernel in one configuration.

    Attributes:
        name: tells it from the operator's other variants.
        kernel: what ``@triton.jit`` made.
        signature: every argument's type: "*bf16", "i64", "fp32", or "constexpr".
        constants: the values of the "constexpr" arguments.
        num_warps: warps of 32 threads (64 on AMD) per program.
        num_stages: how many iterations of a loop load ahead.
    """

    name: str
    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int


def lacks(device: str, dtype: torch.dtype) -> str:
    """Why Triton's kernels do not run on tensors of such a device and dtype; "" if they do.

    CPU tensors are for tests: Triton's interpreter serves them where ``TRITON_INTERPRET=1`` is set.
    """
    if dtype not in DTYPES:
        return f"fp16, bf16 or fp32, not {dtype}"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"tensors on a GPU, not on {device}"
    return "" if _installed() else "Triton (pip install triton)"


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of its first argument, a tensor.

    None where there is nothing to do, or where `torch.compile` only asks for shapes.
    """
    if programs and not is_traced(arguments[0]):
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **settings, **OPTIONS)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
