"""A time-out for storage that does not answer: a file system of a network can leave a read waiting for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet  # the built-in one only from Python 3.11 on
from pathlib import Path
from typing import TypeVar

from ...errors import InputError

TIMEOUT = 300.0  # seconds; less than parallel.timeout, so that the file is named and not the ranks that wait for it
T = TypeVar("T")


def aside(work: Callable[[], T]) -> Future[T]:
    """Start ``work`` in a thread of its own, which nobody waits for when the program ends; returns what it will give.

    Who waits for that still answers Ctrl-C, whatever library the work is in.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised by result()
            future.set_exception(error)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return future


def within(seconds: float, path: Path, read: Callable[[], T]) -> T:
    """Return what ``read`` returns, or raise what it raises.

    It runs `aside`, and is left behind where it does not end: nothing can end it.

    Raises:
        InputError: it has not returned after so many seconds; the file is named.
    """
    future = aside(read)
    try:
        return future.result(seconds)
    except NotYet:
        if future.done():  # just now, or with a time-out of the system's own
            return future.result()
        allowed = f"has not answered a read for {seconds:g} s"
        fix = "is its file system still there? data.timeout sets the seconds"
        raise InputError("file", str(path), allowed, fix) from None
