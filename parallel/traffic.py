"""Bytes exchanged between ranks and the time spent in exchanges, by layer and verb of `Span`."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch

ByteCounter = Callable[[int], AbstractContextManager[None]]
"""``with count(num_bytes): ...`` around the start of an exchange to which this rank hands so many bytes; ``count(0)``
around waiting for an exchange that was started before.
"""

CollectiveCache = Callable[[Callable[[], Any]], Any]
"""Runs a collective and returns its result; where a layer is recomputed, the result of the first time."""


class Stopwatch:
    """Seconds that this rank's computation is blocked in what runs within it, waiting for slower ranks included.

        with stopwatch:
            dist.all_reduce(x)
        stopwatch.read()

    On a GPU the stream waits and not Python: the time is that between two events on it, read when it is asked for.
    Nested uses count once.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._depth, self._started = 0, 0.0
        self._first: torch.cuda.Event | None = None
        self._laps = [_Lap()]

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
            self._laps[-1].seconds += perf_counter() - self._started
        else:
            self._laps[-1].add(self._first, _event())

    def lap(self) -> None:
        """Begin a new lap; waits for nothing."""
        self._laps.append(_Lap())

    def read_laps(self) -> list[float]:
        """Seconds of each lap since the last reading. On a GPU, waits until they are over."""
        laps, self._laps = self._laps, [_Lap()]
        return [lap.read() for lap in laps]

    def read(self) -> float:
        """Seconds since the last reading, over all laps. On a GPU, waits until they are over."""
        return sum(self.read_laps())


class _Lap:
    """Seconds, and pairs of events whose times are still to be added, in the order of the stream."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def add(self, first: torch.cuda.Event, last: torch.cuda.Event) -> None:
        self._events.append((first, last))
        while self._events and self._events[0][1].query():  # over already: few are kept
            self._add_first()

    def read(self) -> float:
        while self._events:
            self._events[0][1].synchronize()
            self._add_first()
        return self.seconds

    def _add_first(self) -> None:
        first, last = self._events.popleft()
        self.seconds += first.elapsed_time(last) / 1000


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def timed(collective: Callable[..., Any], waiting: Stopwatch) -> Callable[..., Any]:
    """The collective, timed by ``waiting``, and so is the ``wait`` of the work that it returns."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with waiting:
            work = collective(*args, **kwargs)
        return _Timed(work, waiting) if hasattr(work, "wait") else work

    return run


class _Timed:
    """A collective's work handle whose ``wait`` is timed."""

    def __init__(self, work: Any, waiting: Stopwatch) -> None:
        self._work, self._waiting = work, waiting

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._waiting:
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Traffic:
    """Bytes that this rank hands to exchanges, by (layer, verb), and the time that they take.

    A payload counts once: that of an all-gather whatever the number of ranks, the tokens sent to neighbours by a halo
    exchange, the slices sent to other ranks by an all-to-all. Forward and backward both count.

    Args:
        device: where this rank computes; None for a CPU.

    Attributes:
        bytes: the sums.
        waiting: times the starts of exchanges and the waits for them, not what overlaps with computation.
        label: (layer, verb) of the exchange that is being started; empty strings outside of a verb.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.waiting = Stopwatch(device)
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.label = ("", "")

    def counter(self, layer: str, verb: str) -> ByteCounter:
        """The counter for exchanges of ``verb`` in ``layer``."""

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
        """Reset the sums."""
        self.bytes.clear()


def uncounted(num_bytes: int) -> AbstractContextManager[None]:
    """A `ByteCounter` that counts nothing."""
    return nullcontext()


def uncached(collective: Callable[[], Any]) -> Any:
    """A `CollectiveCache` for layers that are not recomputed."""
    return collective()
