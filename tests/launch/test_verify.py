"""`longreach verify`: right models are within the limits, and a mixer that sees only its shard is found."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from longreach.framework.config import load
from longreach.launch import cli
from longreach.launch.verify import Row, as_line, groups, limit_lines, verify

CONFIG = """
model:
  width: 16
  depth: 6
  mixers: [elementwise, chela, feedforward_kernel, mamba2, gated_deltanet, softmax]
  dropout: 0.1
  mamba2: {head_width: 4, state_size: 5}
data: {source: nothing, seq_len: 61, batch_size: 8}
train: {steps: 3, recompute: true}
"""
BROKEN = """
from dataclasses import dataclass
import torch.nn.functional as F
from torch import nn
from longreach import register

@dataclass
class BrokenConfig:
    pass

@register("broken", BrokenConfig)
class Broken(nn.Module):
    def __init__(self, width, config, *, causal=True):
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x, span):
        return self.out(F.pad(x, (0, 0, 1, 0))[:, :-1])
"""


COMPLEX = (
    BROKEN.replace("broken", "complex")
    .replace("self.out(F.pad(x, (0, 0, 1, 0))[:, :-1])", "self.out((x * self.mode * self.mode).real.to(x.dtype))")
    .replace(
        "        self.out =",
        "        self.mode = nn.Parameter(torch.randn(width, dtype=torch.complex64))\n        self.out =",
    )
    .replace("import torch.nn.functional as F", "import torch")
)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return str(path)


def test_the_mixers_train_the_same_on_two_ranks_and_streamed(config: str) -> None:
    rows = verify(load(config), 2)
    expected = [
        f"{precision}, {data}, {way}"
        for ranks in (["1 rank, streamed"], ["2 ranks", "2 ranks, streamed"])
        for data in ("dense", "documents")
        for precision in ("fp64", "fp32")
        for way in ranks
    ]
    assert [str(row) for row in rows] == expected
    mixers = ["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"]
    names = ["loss", "embedding", *mixers, "norms", "feed-forward"]
    for row in rows:
        assert list(row.errors) == names and row.good, row
        assert all(limit == 1e-10 for limit in row.limits.values()) == (row.precision == "fp64")
        assert all(0 <= error < 1e-12 for error in row.errors.values()) == (
            row.precision == "fp64"
        )  # not compared with itself


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_limits_of_16_bits_follow_from_their_rounding(config: str, precision: str) -> None:
    rows = verify(load(config, [f"train.precision={precision}", "model.depth=1", "model.dropout=0"]), 2)
    narrow = [row for row in rows if row.precision == precision]
    assert len(narrow) == 6
    for row in narrow:
        assert row.good, row
        assert 1e-3 < row.limits["elementwise"] < 0.5 and row.errors["elementwise"] > 1e-6


@pytest.mark.parametrize("name, columns", [("adding", ["head"]), ("listops", ["head"])])
def test_a_task_gives_its_examples(name: str, columns: list[str]) -> None:
    small = ["model.width=16", "model.depth=1", "data.seq_len=64", "task.examples=20", "task.test_examples=4"]
    config = load(name, small)
    rows = verify(config, 2)
    assert {row.data for row in rows} == {name} and all(row.good for row in rows)
    assert list(rows[0].errors)[-len(columns) :] == columns


def test_a_model_that_is_not_causal_is_not_streamed(config: str) -> None:
    rows = verify(load("adding", ["model.causal=false", "model.width=16", "model.depth=1", "data.seq_len=64"]), 2)
    assert [str(row) for row in rows] == ["fp64, adding, 2 ranks", "fp32, adding, 2 ranks"]
    assert all(row.good for row in rows)


def test_complex_parameters_keep_their_imaginary_parts(tmp_path: Path, config: str) -> None:
    (tmp_path / "complex_mixer.py").write_text(COMPLEX, encoding="utf-8")
    words = [f"model.code=[{tmp_path / 'complex_mixer.py'}]", "model.mixers=[complex]", "model.depth=1"]
    for precision in ("fp32", "bf16"):
        rows = verify(load(config, [*words, f"train.precision={precision}"]), 2)
        assert len(rows) == 12 and all(row.good for row in rows)


def test_a_broken_mixer_is_found(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken_mixer.py").write_text(BROKEN, encoding="utf-8")
    code = f"model.code=[{tmp_path / 'broken_mixer.py'}]"
    words = ["verify", config, code, "model.mixers=[elementwise, broken]", "--ranks", "2", "--depth", "2"]
    assert cli.main([*words, "--width", "8", "--tokens", "31"]) == 1
    out, err = capsys.readouterr()
    assert "6 of 6 rows" not in err and "12 of 12 rows are beyond the limit; fp64, dense, 1 rank, streamed" in err
    assert "longreach.testing.check_mixer" in err and len(err.splitlines()) == 1
    head, *rows = out.splitlines()
    assert head.split()[-5:] == ["embedding", "elementwise", "broken", "norms", "feed-forward"]
    assert len(rows) == 14 and all("!" in row for row in rows[:12]) and rows[12].startswith("limit, fp64 ")


def test_a_right_model_ends_with_0(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", config, "model.mixers=[softmax]", "--depth", "1", "--ranks", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all are within their limits"


@pytest.mark.parametrize("words", [["--ranks", "0"], ["--tokens", "0"], ["--depth", "0"]], ids=str)
def test_wrong_numbers_are_told(config: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", config, *words]) == 2
    assert f"{words[0][2:]} = 0" in capsys.readouterr().err


def test_what_is_beyond_a_limit_is_marked(config: str) -> None:
    settings = load(config)
    errors, limits = dict.fromkeys(groups(settings), 0.0), dict.fromkeys(groups(settings), 1e-10)
    assert Row("fp64", "dense", 2, False, errors, limits).good
    row = Row("fp64", "dense", 2, True, errors | {"chela": 2e-10, "softmax": 1e-9}, limits)
    assert not row.good and row.worst == "softmax" and str(row) == "fp64, dense, 2 ranks, streamed"
    assert [word for word in as_line(row, settings).split() if "!" in word] == ["2.0e-10!", "1.0e-09!"]
    assert limit_lines([row], settings)[0].split()[:3] == ["limit,", "fp64", "1.0e-10"]
    broken = Row("fp64", "dense", 2, False, errors | {"norms": math.nan}, limits)
    assert not broken.good and broken.worst == "norms"
