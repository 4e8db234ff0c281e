"""`longreach bench NAME`: measurements on this machine, a module with a function ``run`` each. This one has what they
share.

Every report names the machine, the commit and the date. benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import json
import math
import operator
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ...errors import InputError

SIGNS = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}
PACKAGES = ("torch", "triton", "deepspeed", "flash-linear-attention", "transformers")


@dataclass(frozen=True)
class Bound:
    """A figure and the limit that it should keep; NaN breaks every limit.

    Attributes:
        what: what was measured, and its unit.
        found: the figure.
        sign: "<", "<=" or ">=".
        limit: the number to the right of the sign.
    """

    what: str
    found: float
    sign: str
    limit: float

    @property
    def holds(self) -> bool:
        return bool(SIGNS[self.sign](self.found, self.limit))

    def __str__(self) -> str:
        return f"{self.what}: {self.found:.3g}, wanted {self.sign} {self.limit:.3g}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def environment(device: str, threads: int) -> dict[str, str]:
    """The machine, the versions and the commit that figures were measured with.

    Args:
        device: "cpu" or "cuda".
        threads: processor threads of all processes together.
    """
    versions = {package: metadata.version(package) for package in PACKAGES if _installed(package)}
    return {
        "device": _device_name(device),
        "threads": str(threads),
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def cpu_only(**more: str) -> dict[str, str]:
    """The environment of a process that computes on CPUs, with and without a GPU in the machine."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", **more}


def last_line(path: Path) -> str:
    """The last line of the output of a process, from the file that it was written to."""
    return ([line for line in path.read_text(errors="replace").splitlines() if line.strip()] or ["nothing"])[-1]


def check_out(out: Path) -> None:
    """Create the directory of the results.

    Raises:
        InputError: it cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError("--out", str(out), f"a writable directory ({error.strerror})") from None


def table_line(cells: Sequence[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table_header(names: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return f"{table_line(names)}\n|{'---|' * len(names)}"


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, in which NaN and infinities are null."""
    path.write_text(json.dumps(_without_nan(report), indent=2, allow_nan=False) + "\n")


def report_bounds(bounds: Sequence[Bound]) -> int:
    """Print all bounds, and those that do not hold in one line on standard error; returns the exit code, 1 if there are
    any.
    """
    for bound in bounds:
        print(f"  {bound}{'' if bound.holds else ' (out of bounds)'}")
    broken = [str(bound) for bound in bounds if not bound.holds]
    if broken:
        print(f"longreach: out of bounds: {'; '.join(broken)}", file=sys.stderr, flush=True)
    return int(bool(broken))


def median(values: Sequence[float]) -> float:
    """The median; of an even number of values, the upper one of the middle two."""
    return sorted(values)[len(values) // 2]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:  # git is not installed
        return "unknown"


def _device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
