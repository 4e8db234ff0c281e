"""The list of faults has 66 numbers, and a test begins with each."""

from __future__ import annotations

import re
from pathlib import Path

FAULTS = 66


def test_every_fault_of_the_list_has_a_test() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested = {int(number) for number in re.findall(r"^def test_(\d\d)_", text, re.MULTILINE)}
    assert tested == set(range(1, FAULTS + 1))
