"""The tests that need a GPU; on a CPU, a few of the interpreted ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from findings import Findings

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("tests/kernels/test_triton_fused.py", "-k", "shards or fp32_weights")


def run(findings: Findings) -> None:
    """Run what ``make test-gpu`` runs, one process per core."""
    if find_spec("pytest") is None:
        findings.skipped = "pytest is not installed"
        return
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if findings.small:
        words += SMALL
    else:
        words += ["-m", "skipif", *(str(path.relative_to(ROOT)) for path in files())]
    if not findings.small and find_spec("xdist") is not None:
        words += ["-n", str(len(os.sched_getaffinity(0))), "--dist", "worksteal"]
    log = findings.path.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=_environment())
    said = log.read_text(errors="replace").strip()
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", said[-300:])}
    findings.data = {"command": " ".join(words[1:]), "counts": counts, "failed": re.findall(r"^FAILED .*", said, re.M)}
    findings.check(done.returncode == 0, f"pytest ended with {done.returncode}: {said[-1500:]}")


def files() -> list[Path]:
    """The test files of the Triton kernels."""
    kernels = ROOT / "tests" / "kernels"
    return [*sorted(kernels.glob("test_triton_*.py")), kernels / "test_tilings.py"]


def _environment() -> dict[str, str]:
    """Of the tests, which choose the interpreter themselves."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
