"""How far a long pass over bytes or tokens has come: to a callback, to a terminal, or as a line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Callback = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, and how much there is)."""

LOG_SECONDS = 10.0


@contextmanager
def progress(
    what: str, total: int, callback: Callback | None = None, unit: str = "bytes"
) -> Iterator[Callable[[int], None]]:
    """Give a function that is told of every further piece of work, in ``unit``.

    Without a callback a terminal shows a bar, which vanishes at the end; anything else gets a line on
    standard error every ten seconds, so that a short pass leaves no trace in a log.
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
    done, begun = 0, time.monotonic()
    told = begun

    def advance(step: int) -> None:
        nonlocal done, told
        done += step
        if callback is not None:
            callback(what, done, total)
        elif time.monotonic() - told >= LOG_SECONDS:
            told = time.monotonic()
            left = (told - begun) * max(0, total - done) / max(1, done)
            mib = f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB"
            amount = mib if unit == "bytes" else f"{done:,} of {total:,} {unit}"
            print(f"{what}: {amount}, about {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
