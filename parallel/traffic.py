"""What crosses between ranks: counted where it is sent, read by the monitor, the recorder and the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

Note = Callable[[int], AbstractContextManager[None]]
"""Called with the bytes that this rank hands to one exchange; the exchange begins within what it returns."""

Once = Callable[[Callable[[], Any]], Any]
"""Makes an exchange and returns what it brought; where a layer is computed again, what it brought the first time."""


class Traffic:
    """Bytes that this rank handed to exchanges, by (layer, verb).

    A verb's bytes are what leaves this rank once: the payload of a gather (whatever the number of ranks), the tokens
    sent to neighbours by a halo, the slices sent to others by an all-to-all. Forward and backward both count.

    Attributes:
        bytes: the sums.
        label: (layer, verb) of the exchange that is beginning; of empty strings where it is none of a verb's.
    """

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.label = ("", "")

    def note(self, layer: str, verb: str) -> Note:
        """The function with which an exchange of ``verb`` in ``layer`` reports its bytes."""

        @contextmanager
        def add(num_bytes: int) -> Iterator[None]:
            self.bytes[layer, verb] += num_bytes
            self.label = (layer, verb)
            try:
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
