"""Ending a run before its last step, when a signal asks for it or its time is over; all ranks agree on the step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from ...parallel.mesh import Axis, gather_values

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of a cluster's scheduler: the end is near, and a warning before it


class Preemption:
    """Notices that this run should end; a context in which `SIGNALS` end it at the next step instead of at once.

    A second signal ends the process at once, as if this context were not there.

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
                self._before[number] = signal.signal(number, self._notice)
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
        """Why to end now, the same on all ranks, or nothing; a collective."""
        late = time.monotonic() > self._deadline
        rows = gather_values([float(self._signal), float(late)], axis)
        asked, late = int(max(row[0] for row in rows)), any(row[1] for row in rows)
        if asked:
            return f"as {signal.Signals(asked).name} asked"
        return "as train.time_limit is over" if late else ""

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = number
