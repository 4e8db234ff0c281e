"""How a process of this package begins and ends."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import psutil

from .exit_codes import BROKEN_PIPE, FAILED, INTERRUPTED, report_error

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how OpenMP's threads wait for work


def prepare_libraries() -> None:
    """Set what torch and OpenMP read from the environment when they are loaded; what is set there already is kept.

    torch asks for huge pages: on a CPU, the page faults of a large new tensor cost more than filling it. OpenMP's
    threads sleep while they wait: one that spins on a busy machine takes the core from the thread that it waits for.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def forward_signal(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the ranks, which save a checkpoint and end; before there are ranks, end this process."""
    ranks = psutil.Process().children()
    for rank in ranks:
        rank.send_signal(number)
    if not ranks:
        os._exit(report_error("interrupted", INTERRUPTED) if number == signal.SIGINT else 128 + number)


def interrupt_once(number: int, frame: object) -> NoReturn:
    """A handler of SIGINT that acts on the first of several: the terminal sends one to every process of the
    foreground, and the launcher sends its ranks another.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def exit_process(exit_code: int) -> NoReturn:
    """End this process without finalizing the Python interpreter.

    Background threads do not survive its finalization: a thread of gloo that drops the tensors of the last exchange
    asks for the GIL, and torch aborts (https://github.com/pytorch/pytorch/pull/179291); a thread in a failed exchange
    waits for ever; a thread of another library may still be at work after Ctrl-C.

    Args:
        exit_code: of this process; where it is 0 and the output cannot be written, another one is taken.
    """
    if not exit_code or "RANK" not in os.environ:
        atexit._run_exitfuncs()  # those of a rank that failed could wait for ever
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        exit_code = exit_code or BROKEN_PIPE
    except OSError as error:
        exit_code = exit_code or report_error(f"standard output cannot be written: {error.strerror}", FAILED)
    with suppress(OSError):
        print(end="", file=sys.stderr, flush=True)
    os._exit(exit_code)
