"""A test begins with each number of the list of faults."""

from __future__ import annotations

import re
from pathlib import Path

FAULTS = {*range(1, 79)}  # those of numbers, 79 to 84, are in tests/kernels


def test_every_fault_of_the_list_has_a_test() -> None:
    """``test_17_and_18_...`` is of two, ``test_01_to_14_...`` of all between, which its cases name."""
    tests = Path(__file__).parents[1]
    text = "".join(path.read_text() for name in ("faults", "cluster") for path in (tests / name).glob("test_*.py"))
    tested: set[int] = set()
    for first, word, last in re.findall(r"^def test_(\d\d)_(?:(to|and)_(\d\d)_)?", text, re.MULTILINE):
        tested |= set(range(int(first), int(last) + 1)) if word == "to" else {int(first), int(last or first)}
    assert tested == FAULTS
