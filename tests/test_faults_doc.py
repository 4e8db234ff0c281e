"""docs/faults.md lists the numbers that the tests of faults carry, and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS_OF_FAULTS = [Path(__file__).parent / name for name in ("faults", "cluster")]
PAGE = Path(__file__).parent.parent / "docs" / "faults.md"


def carried(files: dict[str, str]) -> dict[int, set[str]]:
    """The tests of each number, as ``file: function``, of the texts of test files by name.

    ``test_17_and_18_...`` carries two numbers; ``test_01_to_14_...`` those between for which a case of its file is
    named, as ``"5-duplicate"``.
    """
    found: dict[int, set[str]] = {}
    for file, text in files.items():
        cases = {int(number) for number in re.findall(r"\"(\d+)-[a-z]", text)}
        tests = re.findall(r"^def (test_(\d+)_(?:(to|and)_(\d+)_)?\w+)\(", text, re.MULTILINE)
        for name, first, word, last in tests:
            numbers = {int(first), int(last or first)}
            if word == "to":
                numbers = cases & set(range(int(first), int(last) + 1))
            for number in numbers:
                found.setdefault(number, set()).add(f"{file}: {name}")
    return found


def listed(page: str) -> list[tuple[int, set[str]]]:
    """Number and tests of each line of the page's tables."""
    rows = []
    for number, cell in re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", page, re.MULTILINE):
        words, file, tests = re.findall(r"`([\w.]+)`", cell), "", set()
        for word in words:
            if word.endswith(".py"):
                file = word
            else:
                tests.add(f"{file}: {word}")
        rows.append((int(number), tests))
    return rows


def differences(page: str, files: dict[str, str]) -> list[str]:
    """What the page and the tests do not agree on, a line each."""
    tests, rows = carried(files), listed(page)
    numbers = [number for number, _ in rows]
    found = [f"fault {number} has a test and is not listed" for number in sorted(tests.keys() - set(numbers))]
    found += [f"fault {number} is listed and has no test" for number in sorted(set(numbers) - tests.keys())]
    if numbers != sorted(set(numbers)):
        found.append("the faults are not in the order of their numbers, each once")
    for number, named in rows:
        found += [f"fault {number} names no test"] if not named else []
        found += [f"fault {number} has no test {test}" for test in sorted(named - tests.get(number, set()))]
    return found


def test_the_page_lists_what_is_tested() -> None:
    paths = [path for folder in TESTS_OF_FAULTS for path in folder.glob("test_*.py")]
    files = {path.name: path.read_text(encoding="utf-8") for path in paths}
    assert len(carried(files)) >= 68
    assert differences(PAGE.read_text(encoding="utf-8"), files) == []


TESTS = {
    "test_a.py": 'CASES = {"1-typo": 1, "3-flag": 2, "9-other": 3}\ndef test_01_to_04_cases(x: int) -> None:\n',
    "test_b.py": "def test_05_and_06_both() -> None:\n    pass\n\n\ndef test_06_again() -> None:\n",
}
ROWS = {
    1: "| 1 | a fault | refused | `test_a.py`: `test_01_to_04_cases` |",
    3: "| 3 | a fault of `this` | refused | `test_a.py`: `test_01_to_04_cases` |",
    5: "| 5 | a fault | refused | `test_b.py`: `test_05_and_06_both` |",
    6: "| 6 | a fault | refused | `test_b.py`: `test_05_and_06_both`, `test_06_again` |",
}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ROWS, []),
        ({1: ROWS[1], 5: ROWS[5], 6: ROWS[6]}, ["fault 3 has a test and is not listed"]),
        (
            {**ROWS, 7: ROWS[5].replace("5", "7", 1)},
            ["fault 7 is listed and has no test", "fault 7 has no test test_b.py: test_05_and_06_both"],
        ),
        ({**ROWS, 7: ROWS[6]}, ["the faults are not in the order of their numbers, each once"]),
        ({**ROWS, 6: ROWS[6].replace("again", "gone")}, ["fault 6 has no test test_b.py: test_06_gone"]),
        (
            {**ROWS, 5: ROWS[5].replace("test_b.py", "test_a.py")},
            ["fault 5 has no test test_a.py: test_05_and_06_both"],
        ),
        ({**ROWS, 5: "| 5 | a fault | refused | none |"}, ["fault 5 names no test"]),
    ],
)
def test_what_does_not_agree_is_found(rows: dict[int, str], expected: list[str]) -> None:
    page = "# Faults\n\n| number | fault | what happens | tests |\n|---|---|---|---|\n" + "\n".join(rows.values())
    assert differences(page, TESTS) == expected
