"""Runs a function on N gloo ranks, in worker processes that live as long as the test session; compares tensors."""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a worker sets the number of threads before it imports torch
    from torch import Tensor

MAX_RANKS = 4
TIMEOUT_SECONDS = 120.0


def run_distributed(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """``[fn(axis, *args) for each rank]``, run by ``ranks`` processes that form a gloo group.

    Args:
        fn: a top-level function of a test module; its first argument is the `Axis` of the ranks.
        ranks: 1 to 4.
        args: picklable; tensors come back detached.
        timeout: seconds after which a deadlock fails the test (and the workers are replaced).
    """
    return _workers().run(fn, ranks, args, timeout)


def assert_close(
    name: str,
    actual: Tensor | None,
    expected: Tensor | None,
    *,
    max_abs: float | Tensor | None = None,
    rel_rms: float | None = None,
    rms_floor: float = 0.0,
) -> None:
    """Raise `AssertionError`, with the tensor's name, its errors and their limits, unless two tensors are close.

    Args:
        name: of the tensor.
        actual, expected: of one shape, compared in fp64 (complex128). None is equal to None only. ``actual`` must be
            finite.
        max_abs: limit of the largest absolute error; None for no limit.
        rel_rms: limit of the RMS error as a share of the RMS of ``expected``; None for no limit.
        rms_floor: the RMS of ``expected`` counts as this where it is smaller.
    """
    import torch

    if actual is None or expected is None:
        assert actual is expected, f"{name}: {actual} instead of {expected}"
        return
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    if not expected.numel():
        return
    wide = torch.complex128 if actual.is_complex() or expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    number = int((~actual.isfinite()).sum())
    assert not number, f"{name}: {number} of {actual.numel()} elements are not finite"
    error = (actual - expected).abs()
    if isinstance(max_abs, torch.Tensor):
        max_abs = max_abs.item()
    size = max(expected.abs().square().mean().sqrt().item(), rms_floor)
    limits = (
        ("largest error", error.max().item(), max_abs),
        ("RMS error", error.square().mean().sqrt().item(), None if rel_rms is None else rel_rms * size),
    )
    lines = [f"{what} {value:.3e}, limit {limit:.3e}" for what, value, limit in limits if limit is not None]
    place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    told = f"{name}: {'; '.join(lines)} (largest at {place}; RMS of what is expected {size:.3e})"
    assert all(limit is None or value <= limit for _, value, limit in limits), told


class _Workers:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        handle, self._store = tempfile.mkstemp(prefix="longreach-store-")
        os.close(handle)
        os.unlink(self._store)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(MAX_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self._store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], ranks: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
        path = sys.modules[fn.__module__].__file__
        for pipe in self._pipes[:ranks]:
            pipe.send((path, fn.__qualname__, ranks, args))
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes[:ranks])}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                silent = sorted(waiting.values())
                self.stop()
                raise TimeoutError(f"{fn.__qualname__}: ranks {silent} gave no answer in {timeout} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    good, value = pipe.recv()
                except EOFError:
                    good, value = False, "the worker died"
                if not good:
                    self.stop()  # its peers may wait for it for ever
                    raise RuntimeError(f"rank {rank} of {ranks}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(ranks)]

    def stop(self) -> None:
        global _pool
        _pool = None
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        Path(self._store).unlink(missing_ok=True)


_pool: _Workers | None = None


def _workers() -> _Workers:
    global _pool
    if _pool is None:
        _pool = _Workers()
        atexit.register(_pool.stop)
    return _pool


def _work(rank: int, store: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from longreach.parallel.mesh import Axis

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=MAX_RANKS,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    axes = {}
    for size in range(1, MAX_RANKS + 1):
        members = tuple(range(size))
        group = dist.new_group(list(members)) if size > 1 else None
        if rank < size:
            axes[size] = Axis(rank, size, members, group)
    modules: dict[str, Any] = {}
    while True:
        try:
            path, name, size, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if path not in modules:
                spec = importlib.util.spec_from_file_location(f"worker_{Path(path).stem}", path)
                assert spec is not None and spec.loader is not None
                modules[path] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[path])
            torch.manual_seed(0)
            pipe.send((True, getattr(modules[path], name)(axes[size], *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
