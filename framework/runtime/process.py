"""This process: its threads, its memory, and its end where the run is lost."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from ...errors import InputError

MAX_GRAPHS = 1024  # of one function: ranks trace each layer for itself, between its exchanges


def set_num_threads(threads: int) -> None:
    """Set torch's intra-op threads; 0 shares the machine's cores among its ranks."""
    # torchrun gives the number of ranks on this machine in one variable, deepspeed in the other.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local))


def check_compile(enabled: bool) -> None:
    """Raise `InputError` for ``train.compile`` where torch's C++ compilation would fail in the linker."""
    home = Path(torch.__file__).parent
    if enabled and not torch.cuda.is_available() and " " in str(home):
        allowed = f"false where torch lies in a path with a space, to which its compiler cannot link: {home}"
        raise InputError("train.compile", True, allowed, "set it to false, or make .venv in another place")


def compile_model(model: nn.Module, **options: Any) -> None:
    """`torch.compile` the model in place: a graph for each shape of its inputs, whatever the blocks and steps.

    A number that changes, such as a block's position, becomes an input of the second graph. Without ``dynamic`` and
    within torch's limit of 8, every block would be a graph of its own, and from the ninth on run without one.
    """
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
    model.compile(**options)


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def abort(reason: str) -> NoReturn:
    """End this process, whose main thread waits in an exchange with a lost rank; the launcher ends the others."""
    print(f"longreach: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
