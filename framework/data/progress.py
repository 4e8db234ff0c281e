"""How far a long pass over bytes has come: to a callback, to a terminal, or as a line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Callback = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""

LOG_SECONDS = 10.0


@contextmanager
def progress(what: str, num_bytes: int, callback: Callback | None = None) -> Iterator[Callable[[int], None]]:
    """Give a function that is told of every further piece of work, in bytes.

    Without a callback a terminal shows a bar, which vanishes at the end; anything else gets a line on
    standard error every ten seconds, so that a short pass leaves no trace in a log.
    """
    if callback is None and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=num_bytes)
            yield lambda step: bar.advance(task, step)
        return
    done, begun = 0, time.monotonic()
    told = begun

    def advance(step: int) -> None:
        nonlocal done, told
        done += step
        if callback is not None:
            callback(what, done, num_bytes)
        elif time.monotonic() - told >= LOG_SECONDS:
            told = time.monotonic()
            left = (told - begun) * max(0, num_bytes - done) / max(1, done)
            words = f"{what}: {done / 2**20:.0f} of {num_bytes / 2**20:.0f} MiB, about {left:.0f} s left"
            print(words, file=sys.stderr, flush=True)

    yield advance
