"""Triton's interpreter, as a GPU computes in bf16: imported where there is none, before the kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_call, _dot, _cast = InterpretedFunction.__call__, InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def _call_in_kernel(self: Any, *args: Any, **options: Any) -> Any:
    """A kernel's own helper finds ``tl`` patched by the kernel; the interpreter would patch it at every call."""
    if self.fn.__module__.startswith("triton."):
        return _call(self, *args, **options)
    return self.rewrite()(*args, **options)


def _widened_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    """The interpreter holds bf16 as bits, and would multiply those."""
    a, b = (_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


def _rounded_cast(self: Any, x: TensorHandle, dtype: Any) -> TensorHandle:
    """It cuts off what a GPU rounds."""
    if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        return TensorHandle(torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, x, dtype)


InterpretedFunction.__call__ = _call_in_kernel
InterpreterBuilder.create_dot = _widened_dot
InterpreterBuilder.cast_impl = _rounded_cast
