"""This process: its threads, its memory, and its end where the run is lost."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from ...errors import InputError
from ..monitoring.terminal import line_start
from .machine import Machine

LOCAL_RUN_ID = "longreach"  # torchrun's name of a job whose ranks `longreach train` started
ELEMENTS_PER_THREAD = 1 << 16  # fewer are computed sooner than another thread wakes up
SHARED_PARAMETERS = 1 << 28  # of a model from which on several threads decode a token
MAX_GRAPHS = 1024  # of one function: ranks trace each layer for itself, between its exchanges


def num_local_ranks() -> int:
    """Ranks on this machine: torchrun gives their number in one variable, deepspeed in the other."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def set_num_threads(threads: int, work: float = math.inf) -> None:
    """Set torch's intra-op threads.

    Args:
        threads: how many; 0: those of ``OMP_NUM_THREADS``, else the machine's cores shared among its ranks, but no more
            than the work is worth.
        work: elements (tokens x channels) that the model processes at a time.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if given == "1" and num_local_ranks() > 1 and os.environ.get("TORCHELASTIC_RUN_ID", LOCAL_RUN_ID) != LOCAL_RUN_ID:
        given = ""  # torchrun sets it if it is not set
    share = Machine().num_cores() // num_local_ranks()
    chosen = threads or (int(given) if given.isdecimal() else int(min(share, work // ELEMENTS_PER_THREAD)))
    torch.set_num_threads(max(1, chosen))


def set_decoding_threads(threads: int, model: nn.Module) -> None:
    """Set torch's intra-op threads for decoding token by token; 0 as of `set_num_threads`, but one for most models.

    A token's operations are too short to be shared: on two cores a second thread made no model of up to 250 M
    parameters faster.
    """
    is_small = sum(p.numel() for p in model.parameters()) < SHARED_PARAMETERS
    set_num_threads(threads, 0 if is_small else math.inf)


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
    resident = Machine().resident_memory(peak=True)
    return float(resident or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def abort(reason: str) -> NoReturn:
    """End this process, whose main thread waits in an exchange with a lost rank; the launcher ends the others."""
    print(f"{line_start()}longreach: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
