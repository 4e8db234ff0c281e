"""The cases of `longreach bench static` on real tensors: seconds of each pass and of each of its kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from findings import Findings
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from longreach.launch.bench import median
from longreach.launch.bench.static import cases as static
from longreach.launch.bench.static import peers
from longreach.launch.bench.static.capture import footprint

WARM_UP, REPEATS = 2, 7
BUSY_CYCLES = 5_000_000  # about 3 ms, in which the host queues the launches of a pass: what is timed is the GPU alone
SMALL = static.Shape(1, 16, 64)
SMALL_CASES = ("elementwise plain", "linear_attention documents", "short_conv SiLU", "rms_norm plain", "dropout plain")


def run(findings: Findings) -> None:
    """Time every case of the table."""
    some = [case for case in static.cases() if not findings.small or case.name in SMALL_CASES]
    _time(findings, some)


def run_peers(findings: Findings) -> None:
    """Time the operators of flash-linear-attention at the same shapes, where it is installed."""
    if find_spec("fla") is None:
        findings.skipped = f"{peers.NAME} is not installed"
        return
    _time(findings, peers.CASES)


def _time(findings: Findings, some: Sequence[static.Case]) -> None:
    shape = SMALL if findings.small else static.STANDARD
    stopwatch = Stopwatch(findings.device, *((0, 1) if findings.small else (WARM_UP, REPEATS)))
    findings.data = {"shape": asdict(shape), "dtype": "bf16", "repeats": stopwatch.repeats}
    static.DEVICE.set(findings.device)
    for case in some:
        torch.manual_seed(0)
        try:
            for row in rows(case, shape, stopwatch):
                findings.add(row)
        except Exception as error:
            findings.check(False, f"{case.name}: {type(error).__name__}: {error}"[:2000])
        if findings.device == "cuda":
            torch.cuda.empty_cache()


class Stopwatch:
    """Times of what runs on a device.

    Args:
        device: "cpu" or "cuda".
        warm_up, repeats: how often something is run before it is timed, and then.
    """

    def __init__(self, device: str, warm_up: int = WARM_UP, repeats: int = REPEATS) -> None:
        self.device, self.warm_up, self.repeats = device, warm_up, repeats
        self._copies: dict[int, float] = {}

    def laps(self, *runs: Callable[[Any], Any]) -> list[float]:
        """Seconds of each of ``runs``, which are given what the one before returned."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(BUSY_CYCLES)
        marks, value = [self._mark()], None
        for run in runs:
            value = run(value)
            marks.append(self._mark())
        if self.device == "cuda":
            marks[-1].synchronize()
            return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
        return [after - before for before, after in pairwise(marks)]

    def repeated(self, *runs: Callable[[Any], Any]) -> list[list[float]]:
        """`laps`, as often as wanted."""
        return [self.laps(*runs) for _ in range(self.warm_up + self.repeats)][self.warm_up :]

    def copy(self, num_bytes: int) -> float:
        """Seconds of a copy that reads and writes so many bytes in all."""
        if num_bytes not in self._copies:
            source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._copies[num_bytes] = median([lap for (lap,) in self.repeated(lambda _: target.copy_(source))])
        return self._copies[num_bytes]

    def kernels(self, run: Callable[[], Any]) -> tuple[Any, list[dict[str, Any]]]:
        """What ``run`` returns, and the kernels that it launches (on a CPU, the operations of PyTorch) with seconds."""
        cuda = self.device == "cuda"
        kind = DeviceType.CUDA if cuda else DeviceType.CPU
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
            value = run()
            if cuda:
                torch.cuda.synchronize()
        found = []
        for event in trace.key_averages():
            if event.device_type == kind:
                micro = event.self_device_time_total if cuda else event.self_cpu_time_total
                found.append({"kernel": event.key[:120], "launches": event.count, "seconds": micro / 1e6})
        return value, sorted(found, key=lambda row: -row["seconds"])[:30]

    def _mark(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def rows(case: static.Case, shape: static.Shape, stopwatch: Stopwatch) -> list[dict[str, Any]]:
    """The forward and the backward pass: median seconds, bytes a second, ratio to a copy, and kernels.

    Bytes are the least that a pass must read and write, as in `static.Pass`.
    """
    inputs, function = case.make(shape)
    y = function(*inputs)
    grad = torch.randn_like(y, memory_format=torch.contiguous_format)
    given, returned = sum(map(footprint, inputs)), footprint(y)
    del y

    def forward(_: Any) -> Tensor:
        return function(*inputs)

    def backward(y: Tensor) -> Any:
        return torch.autograd.grad(y, inputs, grad)

    times = stopwatch.repeated(forward, backward)
    y, kernels = stopwatch.kernels(lambda: forward(None))
    _, backward_kernels = stopwatch.kernels(lambda: backward(y))
    found = []
    for name, number, num_bytes, launched in (
        ("forward", 0, given + returned, kernels),
        ("backward", 1, 2 * given + returned, backward_kernels),
    ):
        seconds, copy = median([lap[number] for lap in times]), stopwatch.copy(num_bytes)
        found.append(
            {
                "operator": case.operator,
                "variant": case.variant,
                "pass": name,
                "seconds": seconds,
                "fastest_seconds": min(lap[number] for lap in times),
                "least_bytes": num_bytes,
                "bytes_per_second": num_bytes / seconds,
                "copy_seconds": copy,
                "ratio_to_copy": seconds / copy,
                "kernels": launched,
            }
        )
    return found
