"""Kernels on the CPU through Triton's interpreter, in a process that may also compile them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


def load(operator: str) -> ModuleType:
    """A second copy of ``kernels/<operator>/triton.py``, whose kernels are interpreted.

    ``@triton.jit`` decides between compiler and interpreter when it decorates.
    """
    name = f"longreach.kernels.{operator}.interpreted_triton"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, KERNELS / operator / "triton.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            sys.modules[name] = module  # where `dataclass` looks for it
            spec.loader.exec_module(module)
    return sys.modules[name]


def _interpret(self: JITFunction, *args: Any, **options: Any) -> Any:
    """Triton's own library (``tl.zeros``, ``tl.cdiv``) was decorated for the compiler; the interpreter calls it."""
    scope = interpreter._patch_lang(self.fn)
    try:
        return interpreter.InterpretedFunction(self.fn).rewrite()(*args, **options)
    finally:
        scope.restore()


def _call(self: interpreter.InterpretedFunction, *args: Any, **options: Any) -> Any:
    """A kernel's own helper finds ``tl`` patched by the kernel; the interpreter would patch it at every call."""
    return self.rewrite()(*args, **options)


JITFunction.__call__ = _interpret
interpreter.InterpretedFunction.__call__ = _call
