"""What a section of the run finds, kept on disk as it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longreach.launch.bench import write_report


class Findings:
    """The results of a section: `once` reads them from a file, also where the section's process has died.

    Args:
        path: of the file.
        small: small shapes, on a CPU.

    Attributes:
        data: what was found.
        failures: what should not be so, a line each.
        skipped: why there is nothing to be found here; "" if there is.
    """

    def __init__(self, path: Path, small: bool) -> None:
        self.path, self.small = path, small
        self.device = "cuda" if torch.cuda.is_available() and not small else "cpu"
        self.data: dict[str, Any] = {}
        self.failures: list[str] = []
        self.skipped = ""

    def add(self, row: dict[str, Any], to: str = "rows") -> None:
        """Append a row to a table, and write what there is."""
        self.data.setdefault(to, []).append(row)
        self.write()

    def check(self, holds: bool, what: str) -> None:
        """Note a failure unless something holds."""
        if not holds:
            self.failures.append(what)

    def write(self) -> None:
        write_report({"data": self.data, "failures": self.failures, "skipped": self.skipped}, self.path)
