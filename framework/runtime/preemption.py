"""Ends a run early, on a signal or a time limit, at a step on which all ranks agree."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from ...parallel.mesh import Axis, gather_values
from ..monitoring.terminal import line_start

# Of a cluster's scheduler, the end and the warning before it; Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SECONDS = 1.0  # within which SIGINT comes again: from the terminal to every process, and from the launcher
STOPPING = "longreach: saving after this step; Ctrl-C again ends at once, without saving\n"


class Preemption:
    """Records requests to end the run; a context in which `SIGNALS` end it after the step instead of at once.

    A second signal ends the process at once, as without this context; of SIGINT, one that comes a moment later.

    Args:
        time_limit: seconds from now after which the run should end; 0 for none.
    """

    def __init__(self, time_limit: float = 0.0) -> None:
        self._deadline = time.monotonic() + time_limit if time_limit else float("inf")
        self._signal, self._received = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._record_signal)
            except ValueError:  # not the main thread, which alone gets signals
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def reason(self, axis: Axis) -> str:
        """Why the run must end now, the same on all ranks, or nothing; a collective."""
        late = time.monotonic() > self._deadline
        rows = gather_values([float(self._signal), float(late)], axis)
        received, late = int(max(row[0] for row in rows)), any(row[1] for row in rows)
        if received:
            return "on Ctrl-C" if received == signal.SIGINT else f"on {signal.Signals(received).name}"
        return "at train.time_limit" if late else ""

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            if number == signal.SIGINT and time.monotonic() - self._received < SAME_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal, self._received = number, time.monotonic()
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            os.write(2, f"{line_start()}{STOPPING}".encode())  # `print` may be at work
