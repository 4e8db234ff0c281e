"""The kernels of the table's shapes, compiled without a GPU: a launch finds them in Triton's cache on disk.

Triton's key of a compiled kernel is made of its source, the types and alignments of its arguments, the options and the
target; nothing of it comes from a device. Every tiling is compiled, as a launch on a GPU tries each of them.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from findings import Findings
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from longreach.kernels import gpu
from longreach.launch.bench.static.capture import GPUS, Gpu, Launch
from longreach.launch.bench.static.cases import STANDARD, Case, Shape, cases, passes

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@dataclass
class Compiled:
    """What a process has compiled: kernels, those of them that take more than a GPU has, and what went wrong."""

    kernels: int
    too_large: int = 0
    failures: list[str] = field(default_factory=list)


def run(findings: Findings) -> None:
    """Compile every launch of `cases` for this machine's GPU, or, small, those of dropout for an H200."""
    workers = 1 if findings.small else len(os.sched_getaffinity(0))
    started = time.monotonic()
    if findings.small:
        done = [_compile(0, 1, 90, ("dropout",))]
    else:
        major, minor = torch.cuda.get_device_capability()
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(_compile, number, workers, 10 * major + minor, ()) for number in range(workers)]
            done = [job.result() for job in jobs]
    kernels, too_large = sum(one.kernels for one in done), sum(one.too_large for one in done)
    findings.data = {"kernels": kernels, "too_large": too_large, "processes": workers}
    findings.data["seconds"] = time.monotonic() - started
    for one in done:
        findings.failures += one.failures
    findings.check(kernels > 0, "no kernel was compiled")


def launches(case: Case, shape: Shape, target: Gpu) -> list[Launch]:
    """The launches of a case, forward and backward, each with every tiling."""
    with every_tiling():
        return [launch for one in passes(case, shape, target) for launch in one.recording.launches]


def key(launch: Launch) -> str:
    """Tells launches apart that are compiled separately."""
    parts = (launch.signature, launch.constants, launch.attributes, launch.options)
    return f"{launch.name} {[sorted((str(name), str(value)) for name, value in part.items()) for part in parts]}"


def _compile(number: int, count: int, capability: int, operators: tuple[str, ...]) -> Compiled:
    """Compile each ``count``-th launch, from ``number`` on; of all operators, where none is named."""
    target = GPUS["sm_90"]._replace(target=GPUTarget("cuda", capability, 32))
    found: dict[str, Launch] = {}
    for case in cases():
        if not operators or case.operator in operators:
            found.update((key(launch), launch) for launch in launches(case, STANDARD, target))
    mine = sorted(found)[number::count]
    done = Compiled(len(mine))
    if torch.cuda.is_available():
        torch.empty(1, device="cuda")  # makes the context into which kernels are loaded
    for name in mine:
        try:
            kernel = found[name].compiled(target.target)
            if torch.cuda.is_available():
                assert kernel.run is not None  # builds the function that launches it, in C, which is kept too
        except OutOfResources:  # a tiling that a launch passes over
            done.too_large += 1
        except Exception as error:
            done.failures.append(f"{found[name].name}: {type(error).__name__}: {error}"[:500])
    return done


@contextmanager
def every_tiling() -> Iterator[None]:
    """Within it, a launch that would take the fastest tiling is made with each."""

    def launch_each(kernel: Any, tilings: Any, programs: Any, *arguments: Any, **settings: Any) -> None:
        for constants, num_warps, num_stages in tilings:
            how = {"num_warps": num_warps, "num_stages": num_stages, **constants}
            gpu.launch(kernel, programs(constants), *arguments, **settings, **how)

    modules = [import_module(f"longreach.kernels.{path.parent.name}.triton") for path in KERNELS.glob("*/triton.py")]
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "launch_fastest"):
                stack.enter_context(mock.patch.object(module, "launch_fastest", launch_each))
        yield
