"""Launches of Triton kernels on tensors without data: what a GPU would be asked to run, recorded where there is none.

Operators run on meta tensors, through the launch functions that they always use. In place of Triton's driver there is a
stand-in that names a target; Triton specialises each launch as ever (alignment by 16 bytes, sizes of 1, 32 or 64 bits),
and what it would compile and run is recorded instead.
"""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ....kernels import gpu


class Gpu(NamedTuple):
    """A GPU that stands for a target.

    Attributes:
        name: of the product.
        target: what Triton compiles for.
        multiprocessors: how many.
        clock: cycles per second under load.
        bandwidth: bytes per second that a copy reaches: 90% of the memory's.
        shared_per_sm: bytes of shared memory of a multiprocessor.
    """

    name: str
    target: GPUTarget
    multiprocessors: int
    clock: float
    bandwidth: float
    shared_per_sm: int


GPUS = {
    "sm_80": Gpu("A100 80 GB", GPUTarget("cuda", 80, 32), 108, 1.41e9, 1.8e12, 164 << 10),
    "sm_90": Gpu("H200", GPUTarget("cuda", 90, 32), 132, 1.75e9, 4.3e12, 228 << 10),
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the function decorated with ``@triton.jit``.
        grid: how many programs run, along up to three axes.
        arguments: the values by name, "constexpr" ones included.
        signature: Triton's type of each argument by name, such as "*bf16", "i64", or "constexpr".
        constants: the values of "constexpr" arguments, and of integers equal to 1, by position.
        attributes: what is known of arguments (such as their alignment), by position.
        options: of the compiler: warps, stages, ...
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        name: str = self.kernel.__name__
        return name

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def source(self) -> ASTSource:
        """What Triton compiles."""
        return ASTSource(self.kernel, dict(self.signature), dict(self.constants), dict(self.attributes))

    def compiled(self, target: GPUTarget) -> Any:
        """The compiled kernel; Triton keeps it in its cache on disk."""
        return triton.compile(self.source, target=target, options=dict(self.options))

    def ttir(self, target: GPUTarget) -> str:
        """Triton's own representation after its first passes, as text: much sooner than `compiled`."""
        from triton._C.libtriton import ir
        from triton.backends.compiler import Language
        from triton.compiler.compiler import make_backend

        backend = make_backend(target)
        options = backend.parse_options(dict(self.options))
        stages: dict[str, Callable[..., Any]] = {}
        backend.add_stages(stages, options, Language.TRITON)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        module = self.source.make_ir(target, options, implementation, modules, context)
        text: str = stages["ttir"](module, {}).str_nodebug()
        return text


class TorchOperation(NamedTuple):
    """An operation of PyTorch that would launch a kernel.

    Attributes:
        name: such as "sum.dim_IntList".
        num_bytes: of the tensors that it reads and writes; expanded dimensions count once.
    """

    name: str
    num_bytes: int


class Recording(NamedTuple):
    """What ran in a `recorded` context."""

    launches: list[Launch]
    operations: list[TorchOperation]

    @property
    def operation_counts(self) -> Counter[str]:
        return Counter(operation.name for operation in self.operations)


class _StandInDriver:
    """The part of a driver that is asked before a kernel is compiled.

    The device's name keys Triton's caches: kernels of a real device 0 are not mixed with these.
    """

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> str:
        return f"without a GPU: {self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """For `triton.autotune`, which then takes the first of its configurations."""
        return lambda run, quantiles=(), **options: [1.0] * max(1, len(quantiles))


# Operations that launch nothing, besides views.
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view", "alias")

# Operations that read their first argument's shape alone, or only write it.
_NOT_READ = ("copy_", "fill_", "zero_", "new_full", "new_zeros", "new_ones", "zeros_like", "ones_like", "full_like")


class _TorchOperations(TorchDispatchMode):
    """Records the operations of PyTorch on meta tensors that would launch kernels on a GPU."""

    def __init__(self, operations: list[TorchOperation]) -> None:
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        short = name.split(".")[0]
        if not function.is_view and short not in _FREE:
            leaves = tree_leaves((args[short in _NOT_READ :], kwargs, out))
            tensors = [x for x in leaves if isinstance(x, Tensor) and x.device.type == "meta"]
            if tensors:
                self._operations.append(TorchOperation(name, sum(map(footprint, tensors))))
        return out


def footprint(x: Tensor) -> int:
    """Bytes of memory that a tensor's elements take; expanded dimensions count once."""
    num = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        num *= size if stride or not size else 1
    return num


@contextmanager
def recorded(target: GPUTarget) -> Iterator[Recording]:
    """Record what runs on meta tensors in this context; Triton's driver is restored behind it.

    Of several tilings the first, usual one is taken, as no time can be measured.
    """
    recording = Recording([], [])
    found: list[dict[str, Any]] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.clear()
        run(self, *args, grid=grid, warmup=warmup, **kwargs)
        (compile_arguments,) = found
        arguments = _by_name(self, args, kwargs)
        recording.launches.append(_launch(self, grid, arguments, compile_arguments))

    def hook(*, compile: dict[str, Any], **rest: Any) -> bool:
        found.append(compile)
        return True  # so that nothing is compiled

    with ExitStack() as stack:
        replace = partial(_replaced, stack)
        replace(gpu, "unsupported_reason", lambda device, *dtypes: "")
        replace(gpu, "_is_compiled", lambda kernel: False)  # the first tiling
        replace(torch, "autocast", lambda device, **options: nullcontext())  # which knows no meta tensors
        replace(JITFunction, "run", record)
        replace(driver, "_active", _StandInDriver(target))
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.jit_cache_hook = hook
        stack.enter_context(_TorchOperations(recording.operations))
        yield recording


def _replaced(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _by_name(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(kernel.fn)
    given = {name: value for name, value in kwargs.items() if name in parameters.parameters}
    bound = parameters.bind(*args, **given)
    bound.apply_defaults()
    return dict(bound.arguments)


def _launch(kernel: Any, grid: Any, arguments: dict[str, Any], compile_arguments: dict[str, Any]) -> Launch:
    options = json.loads(compile_arguments["specialization_data"])["options"]
    return Launch(
        kernel,
        tuple(grid(arguments) if callable(grid) else grid),
        arguments,
        compile_arguments["signature"],
        compile_arguments["constants"],
        compile_arguments["configs"][0],
        {name: tuple(map(_frozen, x)) if isinstance(x, list) else x for name, x in options.items()},
    )


def _frozen(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x
