"""How a process of this package begins and ends."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import psutil

from .exit_codes import BROKEN_PIPE, FAILED, INTERRUPTED, STOPPED, report_error

MALLOC = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)  # what else decides on memory
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # parameters of glibc's mallopt
KEPT = 32 << 20  # bytes: the most that mallopt takes; smaller blocks are kept, larger ones would leave holes
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how OpenMP's threads wait for work
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # that ask a run to save and end

forwarded: set[int] = set()  # the signals that `forward_signals` passed on


def prepare_libraries() -> None:
    """Set what torch, OpenMP and malloc do on a CPU; what the environment says about it already is kept.

    The page faults of a large new tensor cost more than filling it. So torch asks for huge pages, and malloc keeps what
    is freed for the next tensor instead of giving it back to the system, if it is not too large. OpenMP's threads sleep
    while they wait: one that spins on a busy machine takes the core from the thread that it waits for.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and not any(name in os.environ for name in MALLOC):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(MMAP_THRESHOLD, KEPT)
            libc.mallopt(TRIM_THRESHOLD, -1)  # never
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


@contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """Inside, glibc's malloc keeps blocks of any size that are freed for the next tensor; elsewhere, nothing changes.

    For measurements: how long the system takes for a new page depends on what else it does.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, 65_536)  # the default
        libc.malloc_trim(0)


def forward_signals() -> None:
    """From here on, pass `SIGNALS` on to the ranks, which save a checkpoint and end, also while this thread waits in C.

    Before there are ranks, they end this process. Called in the main thread, which then blocks them: ranks begin with
    them blocked, so that none is lost before `stop_while_starting` or `unblock_signals`.
    """
    _watch(SIGNALS, _forward)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _forward(number: int) -> None:
    ranks = psutil.Process().children()
    for rank in ranks:
        forwarded.add(number)
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks and not forwarded:  # else they have ended, and this process is about to
        _stop(number)


def stop_while_starting() -> None:
    """From here on, SIGTERM and SIGUSR1 end this process with `STOPPED`, also while the main thread waits in C.

    A process that has not begun to train has nothing to save. While it trains, `Preemption` takes them.
    """
    _watch((signal.SIGTERM, signal.SIGUSR1), _stop)
    unblock_signals()


def unblock_signals() -> None:
    """Let in what `forward_signals` of the process that started this one kept out."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _stop(number: int) -> NoReturn:
    if number == signal.SIGINT:
        os._exit(report_error("interrupted", INTERRUPTED))
    if os.environ.get("RANK", "0") == "0":  # which the launcher ends the same way, where another rank is the first
        name = signal.Signals(number).name
        report_error(f"stopped on {name}, with no step under way: run the same command again to go on", STOPPED)
    os._exit(STOPPED)


def _watch(numbers: Sequence[signal.Signals], act: Callable[[int], None]) -> None:
    """Call ``act`` with the number of each of these signals that comes, in a thread of its own.

    Python's own handlers run in the main thread, and not before it comes back from C: a rendezvous can take minutes.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, _let_pass)

    def watch() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        while True:
            for number in os.read(reading, 64):
                if number in numbers:
                    act(number)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _let_pass(number: int, frame: FrameType | None) -> None:
    pass


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
