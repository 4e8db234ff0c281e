"""Counts what became of the files and documents of a source, so that nothing is left out silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

OUTCOMES = {  # key in an index -> how it is told
    "read": "read",
    "converted": "converted",
    "whole": "read as one text each",
    "skipped": "skipped",
    "bad": "left out as bad samples",
}


class Tally:
    """Numbers of files or documents, by an outcome, one of `OUTCOMES`, and its kind or reason."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {outcome: Counter() for outcome in OUTCOMES}

    def add(self, outcome: str, reason: str) -> None:
        """Count one."""
        self.counts[outcome][reason] += 1

    def as_json(self) -> dict[str, dict[str, int]]:
        """Outcome -> reason -> number, without outcomes that nothing had."""
        return {outcome: dict(sorted(found.items())) for outcome, found in self.counts.items() if found}


def told(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The counts of `Tally.as_json` as lines such as ``skipped: 2 empty, 1 link``."""
    lines = []
    for outcome, found in counts.items():
        numbers = ", ".join(f"{number:,} {reason}" for reason, number in found.items())
        lines.append(f"{OUTCOMES.get(outcome, outcome)}: {numbers}")
    return lines
