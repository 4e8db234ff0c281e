"""`longreach bench parallel`: a small one of real ranks, what it exchanges, and what it makes of figures."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from longreach.framework.config import load
from longreach.launch.bench import exchange
from longreach.launch.bench import parallel as bench
from longreach.launch.cli import main
from longreach.parallel.cost import Link

JOB = exchange.Job(tokens=512, width=32, heads=4, checked=64, budget=0.0, timeout=60.0)
BY_PIPELINE = [name + exchange.BY_PIPELINE for name in bench.STATES]
NAMES = [*bench.STATES, *BY_PIPELINE, "modal convolution", "free convolution", *bench.PEERS]
LINK = Link(1e-4, 2e9)
HEAD_BYTES = 512 * 32 * 4  # of a tensor [1, L, D]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Done(NamedTuple):
    code: int
    said: str
    report: dict[str, Any]


def run(out: Path) -> Done:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["bench", "parallel", "--out", str(out)])
    return Done(code, said.getvalue(), json.loads((out / "parallel-cpu.json").read_text()))


def given_metrics(run_dir: Path, speeds: list[float]) -> None:
    run_dir.mkdir()
    rows = [json.dumps({"step": step, "tokens_per_second": speed}) for step, speed in enumerate(speeds, 1)]
    (run_dir / "metrics.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two ranks train and exchange; the run of one rank is given, because processes start slowly."""
    directory = tmp_path_factory.mktemp("bench")
    (directory / "text.txt").write_bytes(bytes(range(32, 96)) * 64)
    real = bench._run

    def some(words: list[str], where: Path) -> None:
        if "parallel.ranks=1" in words:
            given_metrics(Path(words[2].removeprefix("run.dir=")), [9e9, 1e-3, 1e-3])
        else:
            real(words, where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_run", some)
        patch.setattr(bench, "SOURCE", str(directory / "text.txt"))
        patch.setattr(bench, "TRAIN", ["data.seq_len=256", "model.width=16", "optim.warmup_steps=0"])
        for name, value in {"RANKS": (2,), "JOB": JOB, "TURNS": 1, "STEPS": 3, "WARM_UP": 1}.items():
            patch.setattr(bench, name, value)
        # Few tokens: the states are not small beside them.
        patch.setattr(bench, "BYTES_LIMIT", 1.0)
        return run(directory / "out")


def test_two_ranks_train_and_the_first_steps_do_not_count(done: Done) -> None:
    assert done.code == 0, done.said
    speeds = done.report["training"]["tokens_per_second"]
    (two,), (one,) = speeds["2 ranks of 1 thread"], speeds["1 rank of 2 threads"]
    assert one == 1e-3 and two > 1
    assert done.report["training"]["ratio"] == pytest.approx(two / one)
    training, name = done.report["training"], "2 ranks of 1 thread"
    assert training["flops"][name] == pytest.approx(6 * training["num_parameters"] * two)
    assert 1e9 < training["matrix_flops"] < 1e13 and training["num_parameters"] > 1000


@pytest.mark.parametrize("layout, ranks, of_one, threads", [(0, 2, 2, 1), (1, 1, 1, 2)])
def test_the_layouts_are_what_they_are_called(layout: int, ranks: int, of_one: int, threads: int) -> None:
    name = list(bench.LAYOUTS)[layout]
    config = load("quickstart", bench.LAYOUTS[name])
    assert (config.parallel.ranks, config.parallel.sequence, config.train.threads) == (ranks, of_one, threads)
    assert name.split()[0] == str(ranks) and name.split()[3] == str(threads)


def test_every_layer_is_checked_and_measured(done: Done) -> None:
    rows = done.report["rows"]
    assert [(row["layer"], row["ranks"]) for row in rows] == [(name, 2) for name in NAMES]
    for row in rows:
        assert row["seconds"] > 0 and row["exchange_seconds"] > 0 and row["predicted_seconds"] > 0
        assert 0 <= row["error"] <= 1e-5
        assert row["emulated"] == (len(os.sched_getaffinity(0)) < 2)
        assert f"| {row['layer']} | {'2 (emulated)' if row['emulated'] else 2} |" in done.said


def test_bytes_are_those_of_the_formulas(done: Done) -> None:
    """README.md, "Bytes exchanged"; between two ranks, states go to the neighbour alone, and their gradients back."""
    half, states = HEAD_BYTES // 2, 32 * 7 * 2 * 4
    backward = {row["layer"]: row["backward_bytes"] for row in done.report["rows"]}
    forward = {row["layer"]: row["forward_bytes"] for row in done.report["rows"]}
    received = {row["layer"]: row["received_bytes"] for row in done.report["rows"]}
    assert (forward["elementwise"], backward["elementwise"]) == (states, states)
    assert backward["linear_attention, chela"] == 4 * 4 * 4 * 16
    assert backward["linear_attention, feedforward_kernel"] == 4 * 4 * 8 * (8 + 1)
    assert backward["linear_attention, mamba2"] == 4 * 2 * 32 * 128
    assert backward["delta_rule, gated_deltanet"] == 4 * 4 * 6 * 12
    # q, k, v and the outcome, half of this rank's half; the convolution's input and outcome.
    assert forward["Ulysses"] == backward["Ulysses"] == 4 * half // 2
    assert forward["free convolution"] == 2 * half // 2
    # k and v once; backward, again, and their gradients twice.
    assert (forward["ring attention"], backward["ring attention"]) == (2 * half, 2 * half + 2 * 2 * half)
    for name in NAMES:  # of two ranks, each gets what the other hands over
        one_way = forward[name] if name in (*bench.STATES, *BY_PIPELINE, "modal convolution") else 0
        assert received[name] == (one_way or forward[name] + backward[name])
    over = {row["layer"]: row["bytes_over"] for row in done.report["rows"]}
    assert over["Ulysses"] == {"Ulysses": 1.0, "ring attention": 0.5}
    assert over["elementwise"]["ring attention"] == pytest.approx(2 * states / (8 * half))


def test_says_what_the_figures_belong_to(done: Done, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert {"device", "threads", "python", "torch", "deepspeed", "commit", "date"} <= done.report["environment"].keys()
    assert done.report["sizes"]["tokens"] == 512
    assert len(done.report["bounds"]) == 1 + 1 + 5 and all(bound["holds"] for bound in done.report["bounds"])
    (written,) = [line for line in done.said.splitlines() if line.startswith("written: ")]
    assert Path(written.split(", ")[1]).read_bytes().startswith(b"\x89PNG")


def found(layer: str, ranks: int, num_bytes: int, error: float = 1e-7) -> exchange.Found:
    return exchange.Found(layer, ranks, 0.1, 0.01, 0.02, num_bytes // 2, num_bytes // 2, num_bytes, error)


def some_layers(ranks: int, states: int = 1000, error: float = 1e-7) -> list[exchange.Found]:
    ours = [found(name, ranks, 9 * states) for name in bench.STATES]  # which are not held to anything
    ours += [found(name, ranks, states) for name in BY_PIPELINE]
    return [*ours, found("Ulysses", ranks, 100_000, error), found("ring attention", ranks, 200_000)]


@pytest.mark.parametrize(
    "speed, states, error, told",
    [
        (0.95, 1000, 1e-7, []),
        (0.94, 1000, 1e-7, ["tokens/s on 2 ranks", "0.94, wanted >= 0.95"]),
        (
            1.2,
            1002,
            1e-7,
            ["bytes of elementwise, by pipeline on 8 ranks", "of linear_attention, chela, by pipeline on 2 ranks"],
        ),
        (1.2, 1000, math.nan, ["error of any layer on 4 ranks", "nan"]),
    ],
)
def test_a_broken_bound_is_told_in_one_line(
    speed: float, states: int, error: float, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {"two": [9.0, speed, 0.1], "one": [1.0]}
    monkeypatch.setattr(bench, "training_speeds", lambda turns, steps: bench.Speeds(runs, 1000, 1e9))
    monkeypatch.setattr(bench, "exchanges", lambda ranks, job: (LINK, some_layers(ranks, states, error)))
    done = run(tmp_path)
    assert done.code == bool(told), done.said
    lines = [line for line in done.said.splitlines() if line.startswith("longreach: ")]
    assert len(lines) == bool(told) and all(word in lines[0] for word in told)
    assert {row["ranks"] for row in done.report["rows"]} == {2, 4, 8}


def test_runs_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def note(words: list[str], _: Path) -> None:
        if words[0] == "train":
            ran.append(next(word[-1] for word in words if word.startswith("parallel.ranks=")))
            given_metrics(Path(words[2].removeprefix("run.dir=")), [1.0] * bench.WARM_UP + [5.0, 7.0, 90.0])

    monkeypatch.setattr(bench, "_run", note)
    monkeypatch.setattr(bench, "_num_parameters", lambda run_dir: 1000)
    speeds = bench.training_speeds(3, 13)
    assert ran == ["2", "1", "1", "2", "2", "1"]
    assert speeds.tokens == {name: [7.0] * 3 for name in bench.LAYOUTS}


def test_a_rank_that_fails_says_why() -> None:
    with pytest.raises(bench.InputError, match=r"rank \d of 2 = 1: .* it said: .*ZeroDivisionError"):
        bench.exchanges(2, replace(JOB, heads=0))


def test_a_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        failing, waiting = (
            stack.enter_context(subprocess.Popen([sys.executable, "-c", code]))
            for code in ("raise SystemExit(3)", "import time; time.sleep(60)")
        )
        assert bench._first_failure([waiting, failing]) == (1, 3)
        bench._end([waiting, failing])
        assert waiting.returncode == -signal.SIGTERM and time.monotonic() - started < 30


def test_ranks_that_do_not_end_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RANKS_SECONDS", 0.5)
    with pytest.raises(bench.InputError, match=r"rank 0 of 2 = 'none after 0.5 s'"):
        bench.exchanges(2, JOB)


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(bench.InputError, match=r"longreach pack = 2: .* it said: longreach: .*missing"):
        bench._run(["pack", str(tmp_path / "missing"), str(tmp_path / "packed")], tmp_path)


def test_an_unwritable_folder_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["bench", "parallel", "--out", str(tmp_path / "file")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("longreach: --out = ") and "directory" in line
