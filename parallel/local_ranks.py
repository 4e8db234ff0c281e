"""Runs a function on N ranks of this machine: gloo worker processes that live as long as this process, with a time-out.

For checks and tests. Training starts its ranks through torchrun (`launch.local`).
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:  # a worker sets the number of threads before it imports torch
    from torch import Tensor

    from .mesh import Axis

MIN_WORKERS = 4  # that are started together
TIMEOUT_SECONDS = 120.0
_NAME = "longreach rank"


class RankFailed(RuntimeError):
    """A rank raised, or its process died.

    Args:
        rank: which one.
        ranks: of how many.
        reason: the traceback.
    """

    def __init__(self, rank: int, ranks: int, reason: str) -> None:
        super().__init__(f"rank {rank} of {ranks}: {reason}")
        self.rank = rank
        self.summary = reason.strip().splitlines()[-1]


def run_on_ranks(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """``[fn(axis, *args) for each rank]``, run by ``ranks`` processes that form a gloo group.

    A worker imports the modules of ``fn`` and of ``args``, by their files where it cannot by their names. It computes
    on the processor, with one thread. The workers remain for later calls.

    Args:
        fn: a top-level function; its first argument is the `Axis` of the ranks.
        ranks: how many.
        args: picklable; tensors come back detached.
        timeout: seconds in which at least one more rank must return.

    Raises:
        RankFailed: a rank raised or died; the workers are replaced.
        TimeoutError: no rank returned in time, as in a deadlock; the workers are replaced.
        InputError: a function or class of ``fn`` or ``args`` is not at the top level of a file.
    """
    global _pool
    if _pool is not None and _pool.size < ranks:
        _pool.stop()
    if _pool is None:
        _pool = _Workers(max(ranks, MIN_WORKERS))
        atexit.register(_pool.stop)
    return _pool.run(fn, ranks, args, timeout)


def in_worker() -> bool:
    """Whether this process is a worker, which also runs the top level of the program's main file."""
    return multiprocessing.current_process().name.startswith(_NAME)


def sum_over_ranks(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's ``x``, in place; a collective over the axis."""
    import torch.distributed as dist

    if axis.group is not None:
        dist.all_reduce(x, group=axis.group)
    return x


class _Workers:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        handle, self._store = tempfile.mkstemp(prefix="longreach-store-")
        os.close(handle)
        os.unlink(self._store)
        self.size = size
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, self._store, theirs)
            process = context.Process(target=_work, args=arguments, daemon=True, name=f"{_NAME} {rank}")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], ranks: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
        work = _pickled((fn, args))
        for pipe in self._pipes[:ranks]:
            with suppress(BrokenPipeError):  # a worker that died is told below
                pipe.send((ranks, *work))
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes[:ranks])}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                silent = sorted(waiting.values())
                self.stop()
                raise TimeoutError(f"{fn.__qualname__}: ranks {silent} of {ranks} did not return within {timeout:g} s")
            for answered in ready:
                assert isinstance(answered, Connection)
                rank = waiting.pop(answered)
                try:
                    good, value = answered.recv()
                except (EOFError, ConnectionResetError):
                    good, value = False, "its process died"
                if not good:
                    self.stop()  # the others may wait for it for ever
                    raise RankFailed(rank, ranks, value)
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


class _Pickler(pickle.Pickler):
    """Notes the files of the modules whose functions and classes it pickles.

    Attributes:
        files: by module.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.files: dict[str, str] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, types.FunctionType)):
            path = getattr(sys.modules.get(obj.__module__), "__file__", None)
            if "<locals>" in obj.__qualname__ or (path is None and obj.__module__ == "__main__"):
                allowed = "must be defined at the top level of a file, from which the ranks' processes import it"
                raise InputError(obj.__qualname__, obj.__module__, allowed)
            if path is not None:
                self.files[obj.__module__] = str(Path(path).resolve())
        return NotImplemented


def _pickled(value: Any) -> tuple[dict[str, str], bytes]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return pickler.files, file.getvalue()


def _import(name: str, path: str) -> None:
    """Import a module by its name, if that leads to the file ``path``, else from this file."""
    known = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or (known is not None and str(Path(known).resolve()) == path):
        return
    with suppress(ImportError, ValueError):
        found = find_spec(name)
        if found is not None and found.origin is not None and str(Path(found.origin).resolve()) == path:
            import_module(name)
            return
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from .mesh import Axis

    torch.set_num_threads(1)
    # The process that waits for the ranks has the time-out.
    timeout = timedelta(days=1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    axes = {}
    for ranks in range(1, size + 1):
        members = tuple(range(ranks))
        group = dist.new_group(list(members)) if ranks > 1 else None
        if rank < ranks:
            axes[ranks] = Axis(rank, ranks, members, group)
    while True:
        try:
            ranks, files, work = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            for name, path in files.items():
                _import(name, path)
            fn, args = pickle.loads(work)
            torch.manual_seed(0)
            pipe.send((True, fn(axes[ranks], *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
