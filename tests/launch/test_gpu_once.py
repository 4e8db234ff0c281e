"""The one run on a GPU, whole, on this CPU: the same code at small shapes, with interpreted kernels."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import BaseBackend
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from longreach.launch.bench.static.capture import GPUS, recorded
from longreach.launch.bench.static.cases import STANDARD, cases

ROOT = Path(__file__).resolve().parents[2]
ONCE = ROOT / "tests" / "gpu" / "once.sh"
SECTIONS = ["machine", "compile", "correctness", "timing", "peers", "training", "variants", "ranks", "tests"]
VARIANTS = {
    "elementwise_attention": {"plain", "documents"},
    "linear_attention": {"plain", "decay", "log_decay", "documents", "mean"},
    "short_conv": {"plain", "SiLU", "documents"},
    "long_conv": {"plain", "documents"},
    "modal_conv": {"plain", "documents"},
    "dropout": {"plain"},
    "rms_norm": {"plain"},
}


class Done(NamedTuple):
    code: int
    said: str
    path: Path

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found


def run(path: Path, *words: str, **more: str) -> Done:
    """``tests/gpu/once.sh --small`` with the Python of these tests."""
    environment = dict(os.environ, PYTHON=sys.executable, **more)
    command = [str(ONCE), "--small", "--out", str(path), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path.parent)
    return Done(done.returncode, done.stdout + done.stderr, path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return run(tmp_path_factory.mktemp("once") / "found.json")


@pytest.mark.timeout(600)  # about a minute of an idle core
def test_every_section_runs(done: Done) -> None:
    sections = done.report["sections"]
    assert list(sections) == SECTIONS, done.said
    found = {name: (section["status"], section["error"], section["failures"]) for name, section in sections.items()}
    assert all(status in ("passed", "skipped") for status, _, _ in found.values()), found
    assert done.code == 0, done.said


@pytest.mark.timeout(600)
def test_every_operator_is_right_twice_in_every_dtype(done: Done) -> None:
    rows = done.report["sections"]["correctness"]["data"]["rows"]
    found = {(row["operator"], row["variant"], row["dtype"]) for row in rows}
    dtypes = ("bf16", "fp16", "fp32")
    assert found == {(name, variant, x) for name, some in VARIANTS.items() for variant in some for x in dtypes}
    for row in rows:
        name = f"{row['operator']} {row['variant']} {row['dtype']}"
        assert row["equal_bits"] and len(row["errors"]) >= 2 and row["reason"], name
        assert all(0 <= error <= row["limit"] for error in row["errors"].values()), name


@pytest.mark.timeout(600)
def test_what_readme_shows_is_found(done: Done) -> None:
    data = {name: section["data"] for name, section in done.report["sections"].items()}
    assert {"device", "torch", "triton", "commit", "date"} <= data["machine"]["environment"].keys()
    assert data["machine"]["copy_bytes_per_second"] > 0
    assert data["compile"]["kernels"] > 0
    for row in data["timing"]["rows"]:
        assert row["seconds"] > 0 and row["kernels"]
        assert row["ratio_to_copy"] == pytest.approx(row["seconds"] / row["copy_seconds"])
    training = data["training"]
    assert len(training["waits"]) == 5 and max(training["waits"]) <= 2 and training["tokens_per_second"] > 0
    assert done.path.with_suffix(".trace.json.gz").stat().st_size == training["trace"]["bytes"]
    compared = {row["comparison"] for row in data["variants"]["comparisons"]}
    assert compared == {"saved and resumed", "zero2", "zero3", "compiled"}
    assert len(data["ranks"]["losses"]) == 2 and data["tests"]["counts"]["passed"] > 0
    tables = subprocess.run(
        [sys.executable, str(ROOT / "tests/gpu/tables.py"), str(done.path)], capture_output=True, text=True, check=True
    )
    assert "| linear_attention | mean |" in tables.stdout and "| zero3 |" in tables.stdout


@pytest.mark.timeout(120)
def test_a_section_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    done = run(tmp_path / "found.json", "--only", "compile,machine", TRITON_CACHE_DIR="/dev/null/none")
    failed, passed = done.report["sections"].values()
    assert failed["status"] == "failed" and "/dev/null/none" in str(failed)
    assert passed["status"] == "passed" and passed["data"]
    assert done.code == 1 and "compile: failed" in done.said


@pytest.mark.timeout(120)
def test_a_section_that_takes_too_long_is_ended_and_what_it_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("once", ONCE.with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    once = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "once", once)  # where `dataclass` looks for it
    spec.loader.exec_module(once)
    monkeypatch.setattr(once, "SMALL_BUDGET", 12.0)
    assert once._run_all(tmp_path / "found.json", True, ["correctness", "machine"]) == 1
    slow, passed = json.loads((tmp_path / "found.json").read_text())["sections"].values()
    assert slow["status"] == "timed out" and slow["seconds"] < 20 and slow["data"]["rows"]
    assert passed["status"] == "passed"


class Asked(Exception):
    """A launch would have a kernel compiled."""


@pytest.mark.parametrize(
    "name", ["elementwise documents", "linear_attention decay", "linear_attention log_decay", "short_conv SiLU"]
)
def test_a_launch_asks_triton_for_what_was_compiled_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an option or an alignment that differs: the cache on disk would be of no use."""
    monkeypatch.syspath_prepend(str(ONCE.parent))
    ahead = importlib.import_module("ahead")
    (case,), gpu = [case for case in cases() if case.name == name], GPUS["sm_90"]
    backend: BaseBackend = make_backend(gpu.target)

    def key(source: Any, options: Any) -> tuple[str, str]:
        return source.hash(), backend.parse_options(dict(options)).hash()

    launches = ahead.launches(case, STANDARD, gpu)
    asked, run = set(), JITFunction.run

    def ask(source: Any, target: Any, options: Any, **rest: Any) -> None:
        assert target == gpu.target
        asked.add(key(source, options))
        raise Asked

    def run_until_compiled(*args: Any, **options: Any) -> None:
        with contextlib.suppress(Asked):
            run(*args, **options)

    for launch in launches:
        monkeypatch.setattr(launch.kernel, "compile", ask)
    inputs, function = case.make(STANDARD)
    with recorded(gpu.target), ahead.every_tiling(), monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run_until_compiled)
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
        y = function(*inputs)
        torch.autograd.grad(y, inputs, torch.empty_like(y))
    assert asked == {key(launch.source, launch.options) for launch in launches}
