"""Progress of a long pass over bytes or tokens: to a callback, as a bar on a terminal, or as lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Callback = Callable[[str, int, int], None]
"""Called with (the name of the work, amount done, total amount)."""

LOG_SECONDS = 10.0


@contextmanager
def progress(
    what: str, total: int, callback: Callback | None = None, unit: str = "bytes"
) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(amount)``, to be called after each part of the work.

    With a callback, every call is passed on to it. Without one, a terminal shows a progress bar, removed at the end;
    otherwise a line goes to standard error every `LOG_SECONDS`, so that short work prints nothing.

    Args:
        what: the name of the work.
        total: the total amount, in ``unit``.
        callback: called instead of printing.
        unit: of the amounts; ``bytes`` are shown in MiB.
    """
    if callback is None and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        amount = DownloadColumn() if unit == "bytes" else TextColumn("{task.completed:,} of {task.total:,} " + unit)
        columns = (TextColumn(what), BarColumn(), amount, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda step: bar.advance(task, step)
        return
    done, start = 0, time.monotonic()
    last_line = start

    def advance(step: int) -> None:
        nonlocal done, last_line
        done += step
        if callback is not None:
            callback(what, done, total)
        elif time.monotonic() - last_line >= LOG_SECONDS:
            last_line = time.monotonic()
            left = (last_line - start) * max(0, total - done) / max(1, done)
            mib = f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB"
            amount = mib if unit == "bytes" else f"{done:,} of {total:,} {unit}"
            print(f"{what}: {amount}, about {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
