"""`longreach bench memory`: a small one of real trainings, and what it makes of trials that are given."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from programs import longreach

from longreach.framework.config import load
from longreach.launch.bench import memory as bench
from longreach.launch.cli import main

FREE = bench.Limits(60.0, math.inf)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Everything the same, but small: sequences of 128 and 256 tokens in blocks of 64."""
    for name, value in {
        "SHORTEST": 128,
        "LONGEST": 256,
        "BLOCK_LEN": 64,
        "FITTED_FROM": 2,
        "REPEATS": 1,
        "COMPARED": (160, 48),
        "GROWTH_LIMIT": math.inf,  # a sequence of few tokens is not what memory depends on
    }.items():
        patch.setattr(bench, name, value)


def given(way: str, tokens: int, *_: object, per_token: float = 100.0, loss: float = 2.0, norm: float = 3.0) -> Any:
    """What a trial may have found."""
    return bench.Trial(way, tokens, 1e9 + per_token * tokens, 1.0, loss, norm)


class Done(NamedTuple):
    code: int
    said: str
    out: Path
    report: dict[str, Any]


def run(out: Path, *words: str) -> Done:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["bench", "memory", "--out", str(out), "--threads", "1", "--longest", "256", *words])
    assert (out / "memory-cpu.json").is_file(), said.getvalue()
    return Done(code, said.getvalue(), out, json.loads((out / "memory-cpu.json").read_text()))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Both ways of the quickstart's model train 256 tokens; other trials are given, because processes start slowly."""
    real = bench.trial

    def some(way: str, tokens: int, *rest: Any) -> Any:
        return given(way, tokens) if way == "softmax" or tokens < 256 else real(way, tokens, *rest)

    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(bench, "trial", some)
        return run(tmp_path_factory.mktemp("bench") / "not" / "there")


def test_every_way_trains_every_length(done: Done) -> None:
    assert done.code == 0, done.said
    rows = [bench.Trial(**row) for row in done.report["rows"]]
    assert [(row.way, row.tokens) for row in rows] == [(way, n) for way in bench.METHODS for n in (128, 256)]
    for row in (rows[3], rows[5]):
        assert 2**26 < row.memory_bytes < 2**34 and row.seconds > 0
        assert row.loss == pytest.approx(math.log(256), rel=0.1) and row.grad_norm > 0
        assert bench.as_line(row) in done.said.splitlines()
    assert done.report["ran_out_of"] == {}


@pytest.mark.parametrize(
    "way, mixers, block_len", [("softmax", ["softmax"], 0), ("whole", None, 0), ("streamed", None, bench.BLOCK_LEN)]
)
def test_the_ways_differ_in_nothing_else(way: str, mixers: list[str] | None, block_len: int) -> None:
    config, plain = load("quickstart", bench.overrides(way, 4096, Path("packed"), 3)), load("quickstart")
    assert config.parallel.block_len == block_len and config.train.threads == 3
    assert config.data.seq_len == 4096 and config.data.source == "packed"
    config.model.mixers = plain.model.mixers if config.model.mixers == mixers else config.model.mixers
    assert config.model == plain.model and config.deepspeed == plain.deepspeed


def test_whole_and_streamed_are_compared(done: Done) -> None:
    loss = {(row["way"], row["tokens"]): row["loss"] for row in done.report["rows"]}
    assert loss["streamed", 256] == pytest.approx(loss["whole", 256], rel=1e-6)
    agreed = done.report["whole_against_streamed"]
    assert agreed["tokens"] == 256 and agreed["loss"] <= 1e-5 and agreed["grad_norm"] <= 1e-5
    for dtype, limit in (("float64", 1e-10), ("float32", 1e-5)):
        errors = done.report["gradient_errors"][dtype]
        assert len(errors) > 20 and 0 < max(errors.values()) <= limit


def test_a_long_file_and_a_long_prompt_are_read(done: Done) -> None:
    evaluated, generated = (bench.Reading(**row) for row in done.report["readings"])
    assert (evaluated.command, generated.command) == ("evaluate", "generate")
    for one in (evaluated, generated):
        assert one.tokens == 256 and 2**26 < one.memory_bytes < 2**34 and one.seconds > 0


def test_says_what_the_figures_belong_to(done: Done) -> None:
    assert {"device", "threads", "python", "torch", "commit", "date"} <= done.report["environment"].keys()
    assert done.report["block_len"] == 64
    assert len(done.report["bounds"]) == 8 and all(bound["holds"] for bound in done.report["bounds"])
    assert sorted(path.name for path in done.out.iterdir()) == ["memory-cpu.json", "memory-cpu.png"]
    assert (done.out / "memory-cpu.png").read_bytes().startswith(b"\x89PNG")


def falling(way: str, tokens: int, *_: object) -> Any:
    return given(way, tokens) if way == "streamed" or tokens < 256 else "memory"


def alone(way: str, tokens: int, *_: object) -> Any:
    return given(way, tokens) if way == "streamed" else "time"


def growing(way: str, tokens: int, *_: object) -> Any:
    return given(way, tokens, per_token=16.0 + 2 * 65.0)


def huge(way: str, tokens: int, *_: object) -> Any:
    return bench.Trial(way, tokens, 3.0 * 2**30, 1.0, 2.0, 3.0)


def other_loss(way: str, tokens: int, *_: object) -> Any:
    return given(way, tokens, loss=2.0 + 4e-5 * (way == "streamed"))


def other_norm(way: str, tokens: int, *_: object) -> Any:
    return given(way, tokens, norm=math.nan if way == "streamed" else 3.0)


def stopped(way: str, tokens: int, *_: object) -> Any:
    return given(way, tokens) if tokens < 256 else "time"


@pytest.mark.parametrize(
    "trial, memory, code, told",
    [
        (given, 1e9, 0, []),
        (falling, 1e9, 0, []),
        (growing, 1e9, 1, ["bytes a token and layer", "65, wanted < 64"]),
        (huge, 1e9, 1, ["bytes at 256 tokens"]),
        (other_loss, 1e9, 1, ["loss, whole and streamed at 256 tokens"]),
        (other_norm, 1e9, 1, ["gradient norm", "nan"]),
        (stopped, 1e9, 1, ["bytes at 256 tokens", "bytes a token and layer"]),
        (alone, 1e9, 1, ["none of more than 64 tokens"]),
        (given, 2.0**32, 1, ["evaluate, bytes at 256 tokens"]),
    ],
)
def test_a_broken_bound_is_told_in_one_line(
    trial: Any, memory: float, code: int, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(bench, "GROWTH_LIMIT", 64.0)
    monkeypatch.setattr(bench, "trial", trial)
    monkeypatch.setattr(bench, "pack_corpus", lambda *_: None)
    monkeypatch.setattr(bench, "readings", lambda *_: [bench.Reading("evaluate", 256, memory, 1.0, 0)])
    done = run(tmp_path)
    assert done.code == code, done.said
    lines = [line for line in done.said.splitlines() if line.startswith("longreach: ")]
    assert len(lines) == code and all(word in lines[0] for word in told)
    assert any(not bound["holds"] for bound in done.report["bounds"]) == bool(code)
    assert (tmp_path / "memory-cpu.png").exists()


def test_a_wrong_gradient_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(bench, "trial", given)
    monkeypatch.setattr(bench, "pack_corpus", lambda *_: None)
    monkeypatch.setattr(bench, "readings", lambda *_: [])
    monkeypatch.setattr(bench, "gradient_errors", lambda tokens, block_len, dtype: {"a": 0.0, "b": math.nan})
    done = run(tmp_path)
    assert done.code == 1 and done.report["gradient_errors"]["float64"] == {"a": 0.0, "b": None}


def test_a_way_ends_with_the_trial_that_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(bench, "trial", falling)
    found = list(bench.trials("softmax", [128, 256, 512], Path(), 1, FREE))
    assert found == [given("softmax", 128), "memory"]


def test_growth_is_that_of_the_median_of_the_long_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(bench, "REPEATS", 3)
    noise = iter([0.0, 5e6, 0.0, -7e6, 0.0, 9e6, 0.0])

    def noisy(way: str, tokens: int, *_: object) -> Any:
        found = given(way, tokens)
        return bench.Trial(way, tokens, found.memory_bytes + next(noise), 1.0, 2.0, 3.0)

    monkeypatch.setattr(bench, "trial", noisy)
    found = list(bench.trials("streamed", [64, 128, 256], Path(), 1, FREE))
    assert found == [given("streamed", n) for n in (64, 128, 256)]
    # 16 of the 100 bytes are the data, whatever the depth; the first block is not counted.
    odd = bench.Trial("streamed", 64, 5e9, 1.0, 2.0, 3.0)
    assert bench.growth([odd, *found[1:]], depth=2) == pytest.approx(42.0)
    assert math.isnan(bench.growth(found[:2], depth=2))


@pytest.mark.parametrize(
    "code, limits, lacks",
    [
        ("pass", bench.Limits(60.0, math.inf), ""),
        ("import time; time.sleep(60)", bench.Limits(0.5, math.inf), "time"),
        ("import time; x = b'1' * 2**28; time.sleep(60)", bench.Limits(60.0, 2**27), "memory"),
    ],
)
def test_a_process_is_ended_at_its_limits(
    code: str, limits: bench.Limits, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "START_SECONDS", 1.0)
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert bench.watch(process, limits) == lacks
        assert (process.returncode == 0) == (lacks == "")


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "too short": (["--longest", "262143"], ["--longest = 262143", "at least 262144"]),
    "no time": (["--seconds", "nan"], ["--seconds = nan", "at least 1"]),
    "less than no memory": (["--memory-gib", "-1"], ["--memory-gib = -1.0", "at least 0"]),
    "out is a file": (["--out", "file"], ["--out = 'file'", "directory"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = MISTAKES[name]
    (tmp_path / "file").touch()
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        assert main(["bench", "memory", *words]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("longreach: ")
    for word in expected:
        assert word in line, f"{word!r} is missing in {line!r}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_trial_says_why(tmp_path: Path) -> None:
    with pytest.raises(bench.InputError, match=r"whole, 64 tokens = 2: .* it said: .*data\.source"):
        bench.trial("whole", 64, tmp_path / "missing", 1, FREE)


@pytest.mark.parametrize(
    "name, option", [("kernels", "--seconds"), ("parallel", "--longest"), ("parallel", "--threads")]
)
def test_an_option_of_another_bench_is_refused(
    name: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", name, "--out", str(tmp_path), option, "20000"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"longreach: {option} = 20000") and f"bench {name}" in line


def test_help_says_what_each_bench_does(tmp_path: Path) -> None:
    said = longreach("bench", "--help", cwd=tmp_path).stdout
    for name in ("kernels", "memory", "parallel"):
        assert f"\n  {name} " in said
