"""What crosses between ranks, and how long that takes: measured where it is, read by the monitor and the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch

Note = Callable[[int], AbstractContextManager[None]]
"""Called with the bytes that this rank hands to one exchange, which begins within what it returns; or with none, for an
exchange that began before and is waited for.
"""

Once = Callable[[Callable[[], Any]], Any]
"""Makes an exchange and returns what it brought; where a layer is computed again, what it brought the first time."""


EVENTS_AT_ONCE = 1024  # stretches of a GPU's time that are kept before they are added up


class Stopwatch:
    """Seconds that this rank's computation stands still in what runs within it, slower ranks waited for included.

        with stopwatch:
            dist.all_reduce(x)
        stopwatch.read()

    On a GPU it is the stream that waits and not Python: what counts is the time between two events on it. Stretches
    within another one count once.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._depth, self._seconds, self._started = 0, 0.0, 0.0
        self._first: torch.cuda.Event | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._started = perf_counter()
            self._first = _event() if self._on_gpu else None

    def __exit__(self, *failure: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._first is None:
            self._seconds += perf_counter() - self._started
        else:
            self._events.append((self._first, _event()))
            if len(self._events) == EVENTS_AT_ONCE:
                self._add_up()

    def read(self) -> float:
        """Seconds since the last reading. On a GPU, waits until they are over."""
        self._add_up()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_up(self) -> None:
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        self._events.clear()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def timed(collective: Callable[..., Any], waiting: Stopwatch) -> Callable[..., Any]:
    """A collective, and the ``wait`` of what it returns, during which a stopwatch runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with waiting:
            work = collective(*args, **kwargs)
        return _Timed(work, waiting) if hasattr(work, "wait") else work

    return run


class _Timed:
    """A collective under way."""

    def __init__(self, work: Any, waiting: Stopwatch) -> None:
        self._work, self._waiting = work, waiting

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._waiting:
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Traffic:
    """Bytes that this rank handed to exchanges, by (layer, verb), and the time they took.

    A verb's bytes are what leaves this rank once: the payload of a gather (whatever the number of ranks), the tokens
    sent to neighbours by a halo, the slices sent to others by an all-to-all. Forward and backward both count.

    Args:
        device: where this rank computes; None for a CPU.

    Attributes:
        bytes: the sums.
        waiting: runs while exchanges begin and are waited for, not while they travel beside other work.
        label: (layer, verb) of the exchange that is beginning; of empty strings where it is none of a verb's.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.waiting = Stopwatch(device)
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.label = ("", "")

    def note(self, layer: str, verb: str) -> Note:
        """The function with which an exchange of ``verb`` in ``layer`` reports its bytes."""

        @contextmanager
        def add(num_bytes: int) -> Iterator[None]:
            self.bytes[layer, verb] += num_bytes
            self.label = (layer, verb)
            try:
                with self.waiting:
                    yield
            finally:
                self.label = ("", "")

        return add

    def by_verb(self) -> dict[str, int]:
        """Bytes by verb, all layers together."""
        total: Counter[str] = Counter()
        for (_, verb), num_bytes in self.bytes.items():
            total[verb] += num_bytes
        return dict(total)

    def clear(self) -> None:
        """Count from zero again."""
        self.bytes.clear()


def unnoted(num_bytes: int) -> AbstractContextManager[None]:
    """For exchanges that nobody counts."""
    return nullcontext()


def every_time(exchange: Callable[[], Any]) -> Any:
    """`Once` for layers that are computed once."""
    return exchange()
