"""`longreach bench models`: a small one with real models and processes, and what it makes of rows that are given."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longreach.errors import InputError
from longreach.launch.bench import models as bench
from longreach.launch.cli import main

pytest.importorskip("transformers")

DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 12}
HYBRID = {**bench.HYBRIDS["olmo_hybrid"], **DELTA, "vocab_size": 256, "hidden_size": 32, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything the same, but small; times and memory of so few tokens are not what is wanted of many."""
    sizes = {"LENGTH": 70, "TURNS": 1, "SHORTEST": 128, "BLOCK_LEN": 64, "SPEED_LIMIT": 0.0, "LEAST_GAIN": 0.0}
    for name, value in {**sizes, "HYBRIDS": {"olmo_hybrid": HYBRID}}.items():
        monkeypatch.setattr(bench, name, value)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(900)
def test_speed_and_memory_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "models", "--out", str(tmp_path / "new"), "--threads", "2", "--longest", "256"]
    code = main(words)
    said = capsys.readouterr()
    assert code == 0, said.err
    report = json.loads((tmp_path / "new" / "models-cpu.json").read_text())
    speeds = report["speed"]["rows"]
    assert [row["family"] for row in speeds] == [name for name in bench.FAMILIES for _ in range(2)]
    assert [row["part"] == "whole model" for row in speeds] == [False, True] * len(bench.FAMILIES)
    for row in speeds:
        assert row["ratio"] == row["alone"] / row["adapted"] > 0 and 0 < row["difference"] <= bench.ERROR_LIMIT
    steps = report["steps"]["rows"]
    expected = [("1 rank, streamed", 256), ("2 ranks, streamed", 256), (bench.ALONE, 128), (bench.ALONE, 256)]
    assert [(row["how"], row["tokens"]) for row in steps] == expected
    for row in steps:
        assert 2**26 < row["memory_bytes"] < 2**33 and row["seconds"] > 0
        assert row["loss"] == pytest.approx(math.log(256), rel=0.1)
    assert report["steps"]["needed_alone"]["olmo_hybrid"] == steps[-1]["memory_bytes"]
    assert "transformers" in report["environment"] and all(bound["holds"] for bound in report["bounds"])
    assert "olmo_hybrid: transformers alone would need" in said.out


def test_transformers_alone_ends_at_the_limit(tmp_path: Path) -> None:
    bench.build("olmo_hybrid", HYBRID).save_pretrained(tmp_path / "model")
    assert bench.alone("olmo_hybrid", tmp_path / "model", 128, 1, 2.0**27) == "memory"
    with pytest.raises(InputError, match="olmo_hybrid, transformers alone, 128 tokens"):
        bench.alone("olmo_hybrid", tmp_path / "missing", 128, 1, 2.0**33)


def test_a_family_that_is_not_known_is_told() -> None:
    with pytest.raises(InputError, match="bench models = 'no_such_family': a family that the installed"):
        bench.build("no_such_family", {})


def rows(memory: float = 1e9, loss: float = 2.0) -> list[bench.Step]:
    return [
        bench.Step("a", "1 rank, streamed", 1024, memory, 1.0, 2.0),
        bench.Step("a", "2 ranks, streamed", 1024, 1e9, 1.0, loss),
        bench.Step("a", bench.ALONE, 128, 1e9, 1.0, 2.0),
        bench.Step("a", bench.ALONE, 256, 3e9, 1.0, 2.0),
    ]


@pytest.mark.parametrize(
    "speed, difference, steps, broken",
    [
        (2.0, 1e-5, rows(), []),
        (1.9, 1e-5, rows(), ["b, Mixer, transformers alone over adapted, time"]),
        (2.0, 1e-3, rows(), ["b, Mixer, difference"]),
        (2.0, math.nan, rows(), ["b, Mixer, difference"]),
        (2.0, 1e-5, rows(memory=2.0**32), ["a, 1 rank, streamed, bytes of a rank at 1,024 tokens", "a, memory of"]),
        (2.0, 1e-5, rows(loss=2.0001), ["a, loss on 2 ranks and on 1, relative"]),
        (2.0, 1e-5, rows()[:3], ["a, memory of transformers alone over that of a rank at 1,024 tokens"]),
    ],
)
def test_what_is_out_of_bounds(
    speed: float, difference: float, steps: list[bench.Step], broken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers alone takes 1.5e10 bytes at 1,024 tokens: 3e9, and six times 2e9 for 128 tokens more."""
    monkeypatch.setattr(bench, "SPEED_LIMIT", 2.0)
    monkeypatch.setattr(bench, "LEAST_GAIN", 8.0)
    timed = [bench.Speed("b", "Mixer", speed, 1.0, difference), bench.Speed("b", "whole model", 1.0, 1.0, 0.0)]
    found = [bound.what for bound in bench._bounds(timed, steps, 1024) if not bound.holds]
    assert len(found) == len(broken) and all(what.startswith(start) for what, start in zip(found, broken, strict=True))


def test_memory_is_told_from_the_two_longest() -> None:
    assert bench.needed_alone(rows(), 1024) == 3e9 + (1024 - 256) * 2e9 / 128
    assert bench.needed_alone(rows(), 256) == 3e9
    assert math.isnan(bench.needed_alone(rows()[:2], 1024))
