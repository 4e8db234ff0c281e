"""What crossed between ranks: counted where it is sent, read by the monitor and the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

Note = Callable[[int], None]
"""Called with the bytes that this rank hands to one exchange."""


class Traffic:
    """Bytes that this rank handed to exchanges, by (layer, verb).

    A verb's bytes are what leaves this rank once: the payload of a gather (whatever the number of ranks), the tokens
    sent to neighbours by a halo, the slices sent to others by an all-to-all. Forward and backward both count.
    """

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()

    def note(self, layer: str, verb: str) -> Note:
        """The function with which an exchange of ``verb`` in ``layer`` reports its bytes."""

        def add(num_bytes: int) -> None:
            self.bytes[layer, verb] += num_bytes

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


def unnoted(num_bytes: int) -> None:
    """For exchanges that nobody counts."""
