"""Ends a run early, on a signal or a time limit, at a step on which all ranks agree."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from ...parallel.mesh import Axis, gather_values

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of a cluster's scheduler: the end, and the warning before it


class Preemption:
    """Records requests to end the run; a context in which `SIGNALS` end it after the step instead of at once.

    A second signal ends the process at once, as without this context.

    Args:
        time_limit: seconds from now after which the run should end; 0 for none.
    """

    def __init__(self, time_limit: float = 0.0) -> None:
        self._deadline = time.monotonic() + time_limit if time_limit else float("inf")
        self._signal = 0
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
            return f"on {signal.Signals(received).name}"
        return "at train.time_limit" if late else ""

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = number
