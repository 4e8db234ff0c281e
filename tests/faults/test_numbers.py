"""The list of faults has 66 numbers, and a test begins with each."""

from __future__ import annotations

import re
from pathlib import Path

FAULTS = 66


def test_every_fault_of_the_list_has_a_test() -> None:
    """``test_17_and_18_...`` is of two, ``test_01_to_14_...`` of all between, which its cases name."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested: set[int] = set()
    for first, word, last in re.findall(r"^def test_(\d\d)_(?:(to|and)_(\d\d)_)?", text, re.MULTILINE):
        tested |= set(range(int(first), int(last) + 1)) if word == "to" else {int(first), int(last or first)}
    assert tested == set(range(1, FAULTS + 1))
