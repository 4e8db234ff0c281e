"""A time-out for reads: a network file system that is gone can block a read forever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in TimeoutError only from Python 3.11 on
from pathlib import Path
from typing import TypeVar

from ...errors import InputError

TIMEOUT = 300.0  # seconds; below parallel.timeout, so that the error names the file and not the ranks that wait for it
T = TypeVar("T")


def run_in_thread(work: Callable[[], T]) -> Future[T]:
    """Run ``work`` in a daemon thread, which does not delay the end of the program; return the future of its result.

    A main thread that waits for the future still answers Ctrl-C, also while ``work`` is inside a C library.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised by result()
            future.set_exception(error)

    threading.Thread(target=run, name="read", daemon=True).start()
    return future


def run_with_timeout(seconds: float, path: Path, read: Callable[[], T]) -> T:
    """Return what ``read`` returns, or raise what it raises.

    ``read`` runs in a thread (`run_in_thread`). After the time-out the thread is abandoned: a blocked read cannot be
    interrupted.

    Raises:
        InputError: ``read`` did not return within ``seconds``; names ``path``.
    """
    future = run_in_thread(read)
    try:
        return future.result(seconds)
    except FutureTimeoutError:
        if future.done():  # it finished just now, or ``read`` itself raised a TimeoutError
            return future.result()
        allowed = f"has not answered a read for {seconds:g} s"
        fix = "is its file system still there? data.timeout sets the seconds"
        raise InputError("file", str(path), allowed, fix) from None
