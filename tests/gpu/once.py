"""One run on a GPU that finds out all that cannot be known without one; `once.sh` starts it.

Each section runs in a process of its own, with a time budget. What it finds is in the JSON file as soon as it ends,
also where it fails, dies or takes too long; then comes the next one. Where there is no GPU, or with ``--small``, the
same code runs on the CPU, by Triton's interpreter and at small shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOTAL = 460.0  # seconds of all sections on a GPU
SMALL_BUDGET = 150.0  # of a section on a CPU
GRACE = 3.0


@dataclass(frozen=True)
class Section:
    """A part of the run.

    Attributes:
        module, function: called with `findings.Findings`.
        budget: seconds on an H200 with 16 cores after which it is ended.
        interpreted: whether kernels are interpreted where there is no GPU.
    """

    module: str
    function: str
    budget: float
    interpreted: bool = False


SECTIONS = {
    "machine": Section("machine", "run", 40),
    "compile": Section("ahead", "run", 60),
    "correctness": Section("correctness", "run", 120, interpreted=True),
    "timing": Section("timing", "run", 90, interpreted=True),
    "peers": Section("timing", "run_peers", 50, interpreted=True),
    "training": Section("training", "run_steps", 75),
    "variants": Section("training", "run_variants", 110),
    "ranks": Section("training", "run_ranks", 60),
    "tests": Section("kernel_tests", "run", 240),
}


def main(words: list[str] | None = None) -> int:
    """Run the sections; returns 1 if one failed or ran out of time, else 0."""
    parser = argparse.ArgumentParser(prog="tests/gpu/once.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-once.json"), help="the results, as JSON")
    parser.add_argument("--small", action="store_true", help="on the CPU, at small shapes; so it is without a GPU")
    names = ", ".join(SECTIONS)
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"some of the sections {names}")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.section:
        return _run_here(arguments.section, arguments.out, arguments.small)
    chosen = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--only {unknown[0]}: not one of {names}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    return _run_all(arguments.out.resolve(), arguments.small or not _has_gpu(), chosen)


def _has_gpu() -> bool:
    """Asked in another process: this one keeps no memory on the GPU."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def _run_all(out: Path, small: bool, chosen: list[str]) -> int:
    started = time.monotonic()
    report: dict[str, Any] = {"command": f"tests/gpu/once.sh{' --small' * small}", "small": small, "sections": {}}
    with tempfile.TemporaryDirectory() as directory:
        for name in chosen:
            left = TOTAL - (time.monotonic() - started)
            budget = SMALL_BUDGET if small else min(SECTIONS[name].budget, left)
            section = _run_apart(name, Path(directory), small, budget)
            report["sections"][name] = section
            report["seconds"] = time.monotonic() - started
            _write(report, out)
            reason = section["skipped"] or section["error"] or "; ".join(section["failures"])
            told = f": {reason.strip().splitlines()[-1][:300]}" if reason else ""
            print(f"{name}: {section['status']}, {section['seconds']:.1f} s{told}", flush=True)
        trace = Path(directory) / "trace.json.gz"
        if trace.exists():
            out.with_suffix(".trace.json.gz").write_bytes(trace.read_bytes())
    print(f"written: {out}")
    return int(any(section["status"] in ("failed", "timed out") for section in report["sections"].values()))


def _run_apart(name: str, directory: Path, small: bool, budget: float) -> dict[str, Any]:
    """Run a section in a process of its own, and in a session of its own, which ends with it."""
    result, log = directory / f"{name}.json", directory / f"{name}.stderr"
    words = [sys.executable, __file__, "--section", name, "--out", str(result), *(["--small"] if small else [])]
    environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONWARNINGS="ignore")
    if small:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment["TRITON_INTERPRET"] = str(int(SECTIONS[name].interpreted))
    started, status, error = time.monotonic(), "passed", ""
    if budget < GRACE:
        return {"status": "timed out", "error": "no time was left", "seconds": 0.0, "budget": budget, **_EMPTY}
    with log.open("w") as file:
        child = subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            child.wait(budget)
        except subprocess.TimeoutExpired:
            status, error = "timed out", f"it took more than {budget:.0f} s"
        except BaseException:
            _end(child)
            raise
        _end(child)
    found = json.loads(result.read_text()) if result.exists() else _EMPTY
    if status == "passed" and child.returncode:
        status, error = "failed", found.get("error") or f"exit code {child.returncode}: {_tail(log)}"
    elif status == "timed out":
        error += f": {_tail(log)}"
    elif found["failures"]:
        status = "failed"
    elif found["skipped"]:
        status = "skipped"
    seconds = time.monotonic() - started
    return {"status": status, "error": error, "seconds": seconds, "budget": budget, **found}


_EMPTY: dict[str, Any] = {"data": {}, "failures": [], "skipped": ""}


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what is left of a section's session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-1500:]


def _write(report: dict[str, Any], out: Path) -> None:
    """Replace the file at once: it is whole whenever the run is ended."""
    made = out.with_name(f".{out.name}")
    made.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(made, out)


def _run_here(name: str, path: Path, small: bool) -> int:
    """Run a section in this process."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]  # of this folder, and of the tests' own helpers
    if os.environ.get("TRITON_INTERPRET") == "1":
        import_module("interpreter")
    findings = import_module("findings").Findings(path, small)
    section = SECTIONS[name]
    try:
        getattr(import_module(section.module), section.function)(findings)
    except Exception:
        traceback.print_exc()
        findings.write()
        return 1
    findings.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
