"""Shared by the Triton kernels: where they run, how they are launched and tiled, and what is compiled ahead of time.

Every operator's `triton.py` has ``variants()``, each kernel in each configuration in which it is launched;
`tests/kernels/test_ahead_of_time.py` compiles them for GPUs that the machine need not have.

A kernel may come with a few `Tiling`s. `launch_fastest` finds the fastest on the GPU that it runs on, once per class of
launches. (Triton's own autotuner measures at every new length, also while a CUDA graph is captured, and takes 256 MB.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .backends import is_traced
from .native import cache_dir

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

log = logging.getLogger("longreach.kernels")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OPTIONS = {"enable_fp_fusion": True}  # for every launch: fused multiply-adds, whatever Triton's default is
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


ROUNDS = 3  # in each of which every tiling is timed, so that a changing clock favours none; the best time counts
LAUNCHES = 3  # timed together, after one that is not
SHORT = 0.03  # milliseconds, about the launch overhead: below it no other tiling is tried
GAIN = 0.95  # share of the first tiling's time below which another one is preferred: more than noise


class Tiling(NamedTuple):
    """The tile sizes of a kernel.

    Attributes:
        constants: values of "constexpr" arguments, such as the rows and columns of a tile.
        num_warps: warps of 32 threads (64 on AMD) per program.
        num_stages: how many iterations of a loop load ahead.
    """

    constants: dict[str, int]
    num_warps: int
    num_stages: int = 1


class Variant(NamedTuple):
    """One kernel in one configuration.

    Attributes:
        name: unique among the operator's variants.
        kernel: the function decorated with ``@triton.jit``.
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


def unsupported_reason(device: str, *dtypes: torch.dtype) -> str:
    """Why Triton's kernels do not run on tensors of such a device and dtypes; "" if they do.

    CPU tensors are for tests: Triton's interpreter serves them where ``TRITON_INTERPRET=1`` is set.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"fp16, bf16 or fp32, not {dtype}"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"tensors on a GPU, not on {device}"
    return "" if _installed() else "Triton (pip install triton)"


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of its first argument, a tensor.

    Nothing is launched for 0 programs, or where `torch.compile` traces for shapes.
    """
    if programs and not is_traced(arguments[0]):
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **settings, **OPTIONS)


def launch_fastest(
    kernel: Any,
    tilings: Sequence[Tiling],
    programs: Callable[[Mapping[str, int]], int],
    *arguments: Any,
    **settings: Any,
) -> None:
    """`launch` with the fastest of ``tilings``, measured on first use.

    The first one is used in the interpreter, for launches first seen while a CUDA graph is captured or a model traced,
    and under `torch.use_deterministic_algorithms`: the order of a sum may depend on the tiling.

    Args:
        kernel: must not write what it reads, as it may be run several times.
        tilings: the usual one first.
        programs: their number, given a tiling's constants.
        arguments: as of `launch`, but for the constants.
        settings: the same.
    """

    def run(tiling: Tiling) -> None:
        constants, num_warps, num_stages = tiling
        how = {"num_warps": num_warps, "num_stages": num_stages, **constants}
        launch(kernel, programs(constants), *arguments, **settings, **how)

    x = arguments[0]
    nothing = is_traced(x) or not programs(tilings[0].constants)
    if nothing or len(tilings) == 1 or not _is_compiled(kernel) or torch.are_deterministic_algorithms_enabled():
        run(tilings[0])
        return
    case = (*_where(x.device), kernel.__name__, kernel.cache_key, *map(_class, (*arguments, *settings.values())))
    with torch.cuda.device_of(x):
        idle = not torch.cuda.is_current_stream_capturing() and not torch.compiler.is_compiling()
        run(CHOICES.fastest(case, tilings, run, measure=idle))


class Choices:
    """The fastest tiling of each class of launches.

    Cached in this process and in files; measured where neither has it. Ranks that measure concurrently each replace the
    whole file.

    Args:
        directory: returns the directory of the files.
        milliseconds: the time of a launch; infinity if it does not fit the GPU.
    """

    def __init__(self, directory: Callable[[], Path], milliseconds: Callable[[Callable[[], None]], float]) -> None:
        self._directory, self._milliseconds = directory, milliseconds
        self._known: dict[Hashable, int] = {}

    def fastest(
        self,
        case: tuple[Hashable, ...],
        tilings: Sequence[Tiling],
        run: Callable[[Tiling], None],
        *,
        measure: bool = True,
    ) -> Tiling:
        """The fastest of ``tilings``.

        Args:
            case: the class of launches, equal in every process.
            tilings: the usual one first.
            run: launches the kernel.
            measure: whether measuring is possible now; if not, the first tiling is used, and is not cached.
        """
        key = case, len(tilings)
        if key not in self._known:
            texts = [str(x) for x in (*case, *tilings)]
            path = self._directory() / f"{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:20]}.json"
            number = _read(path, len(tilings))
            if number is None and not measure:
                return tilings[0]
            self._known[key] = self._measured(path, texts, tilings, run) if number is None else number
        return tilings[self._known[key]]

    def _measured(self, path: Path, texts: list[str], tilings: Sequence[Tiling], run: Callable[[Tiling], None]) -> int:
        times = [math.inf] * len(tilings)
        for _ in range(ROUNDS):
            for number, tiling in enumerate(tilings):
                times[number] = min(times[number], self._milliseconds(partial(run, tiling)))
                if times[0] < SHORT:
                    return 0
        number = min(range(len(tilings)), key=times.__getitem__)
        if times[number] > GAIN * times[0]:
            number = 0
        _write(path, {"number": number, "milliseconds": [str(time) for time in times], "case": texts})
        return number


def _read(path: Path, count: int) -> int | None:
    """The number in a file; None if it is missing or damaged."""
    try:
        number = json.loads(path.read_text(encoding="utf-8"))["number"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return number if isinstance(number, int) and 0 <= number < count else None


def _write(path: Path, content: Mapping[str, object]) -> None:
    """Write a file atomically; a failure is logged."""
    try:
        handle, made = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(made, path)
        finally:
            Path(made).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be written; the next run measures again: %s", path, error)


@cache
def _tilings_dir() -> Path:
    directory = cache_dir() / "tilings"
    directory.mkdir(exist_ok=True)
    return directory


def _milliseconds(run: Callable[[], None]) -> float:
    """The time of one launch on the current device; infinity if it exceeds the GPU's resources."""
    from triton.runtime.errors import OutOfResources

    try:
        run()
    except OutOfResources:
        return math.inf
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(LAUNCHES):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / LAUNCHES


CHOICES = Choices(_tilings_dir, _milliseconds)


def _class(x: Any) -> Hashable:
    """The part of an argument that a kernel's speed depends on: dtypes, flags, the bit lengths of integers."""
    if isinstance(x, Tensor):
        return x.dtype
    if isinstance(x, float):
        return None
    return x.bit_length() if isinstance(x, int) and not isinstance(x, bool) else x


@cache
def _where(device: torch.device) -> tuple[str, str]:
    import triton

    return torch.cuda.get_device_name(device), triton.__version__


def _is_compiled(kernel: Any) -> bool:
    from triton.runtime.jit import JITFunction

    return isinstance(kernel, JITFunction)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
