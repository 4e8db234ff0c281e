"""Ends a run early, on a signal or a time limit, at a step on which all ranks agree."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from ...parallel.mesh import Axis, gather_values
from ..monitoring.terminal import line_start

# Of a cluster's scheduler, the end and the warning before it; Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SPARED = (signal.SIGTERM, signal.SIGUSR1)  # a terminal sends none of these
SAME_SECONDS = 1.0  # within which SIGINT comes again: from the terminal to every process, and from the launcher
REPEAT_SECONDS = 10.0  # within which a scheduler and the launchers repeat a signal, to every process or to some
STOPPING = "longreach: saving after this step; Ctrl-C again ends at once, without saving\n"


class Preemption:
    """Records requests to end the run; a context in which `SIGNALS` end it after the step instead of at once.

    All of them are one request, however often they come. The process ends at once, as without this context, at a second
    Ctrl-C, and at SIGTERM or Ctrl-C `REPEAT_SECONDS` after the first, where the ranks have not agreed to end by then.
    What this process starts meanwhile (compilers, their workers) is spared SIGTERM and SIGUSR1, which a scheduler sends
    to it too: the main thread blocks them, which its children inherit, and a thread of their own takes them.

    Args:
        time_limit: seconds from now after which the run should end; 0 for none.
    """

    def __init__(self, time_limit: float = 0.0) -> None:
        self._deadline = time.monotonic() + time_limit if time_limit else float("inf")
        self._received: dict[int, float] = {}  # when each signal came first
        self._agreed = False
        self._before: dict[int, Any] = {}
        self._wakeup_fd, self._mask, self._ended = -1, set[int](), threading.Event()

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # which alone gets signals
            self._before = {number: signal.signal(number, self._record_signal) for number in SIGNALS}
            self._wakeup_fd = signal.set_wakeup_fd(-1)
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SPARED)
            threading.Thread(target=self._let_in, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            self._ended.set()
            if self._agreed:  # nothing more is asked for than what this process is about to do
                self._before = {signal.SIGINT: self._before[signal.SIGINT]}
            else:
                signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def reason(self, axis: Axis) -> str:
        """Why the run must end now, the same on all ranks, or nothing; a collective, after each step."""
        late = time.monotonic() > self._deadline
        rows = gather_values([float(next(iter(self._received), 0)), float(late)], axis)
        received, late = int(max(row[0] for row in rows)), any(row[1] for row in rows)
        self._agreed = bool(received) or late
        if received:
            return "on Ctrl-C" if received == signal.SIGINT else f"on {signal.Signals(received).name}"
        return "at train.time_limit" if late else ""

    def _let_in(self) -> None:
        """In a thread of its own: take the signals, of which Python calls the handlers in the main thread."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SPARED)
        self._ended.wait()

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        since = now - self._received.get(number, now)
        asked = (when for other, when in self._received.items() if other != signal.SIGUSR1)  # minutes before
        ends = number != signal.SIGUSR1 and not self._agreed and now - min(asked, default=now) >= REPEAT_SECONDS
        ends |= number == signal.SIGINT and since >= SAME_SECONDS
        if ends:
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
            signal.raise_signal(number)
            os._exit(128 + number)  # the first process of a container has outlived it
        if number not in self._received and number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            os.write(2, f"{line_start()}{STOPPING}".encode())  # `print` may be at work
        self._received.setdefault(number, now)
