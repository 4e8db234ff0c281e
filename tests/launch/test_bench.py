"""`longreach bench kernels`: what it writes, that it refuses wrong operators, and one line for each mistake."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from programs import longreach
from torch import Tensor

from longreach.launch.bench import kernels as bench
from longreach.launch.cli import main

TINY = bench.Sizes(256, 16, 1, 16, torch.float32)
LENGTHS = [8192, 16384]  # as few as a slope can be told from
OPERATORS = ["elementwise", "linear_attention", "delta_rule", "short_conv", "long_conv"]


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Everything the same, but small, and on a CPU."""
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setitem(bench.SIZES, "cpu", TINY)
    patch.setattr(bench, "LENGTHS", LENGTHS)
    patch.setattr(bench.accuracy, "__defaults__", (4096,))
    patch.setattr(bench, "BUDGET", 1.0)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Done(NamedTuple):
    code: int
    said: str
    out: Path
    report: dict[str, Any]


def read(out: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads((out / "kernels-cpu.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out, said = tmp_path_factory.mktemp("bench") / "not" / "there", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        shrink(patch)
        code = main(["bench", "kernels", "--out", str(out), "--threads", "1", "--longest", str(LENGTHS[-1])])
    return Done(code, said.getvalue(), out, read(out))


def test_says_what_the_figures_belong_to(done: Done) -> None:
    assert done.code == 0
    where = done.report["environment"]
    assert {"device", "threads", "python", "torch", "commit", "date"} <= where.keys()
    assert all(isinstance(value, str) and value for value in where.values())
    assert where["threads"] == "1"
    assert done.report["sizes"] == {"length": 256, "width": 16, "heads": 1, "head": 16, "dtype": "torch.float32"}


def test_every_operator_is_checked_and_timed(done: Done) -> None:
    assert list(done.report["checks"]) == OPERATORS
    assert all(0 <= error <= 1e-5 for error in done.report["checks"].values())
    rows = done.report["rows"]
    assert {row["operator"] for row in rows} == set(OPERATORS)
    for row in rows:
        assert row["seconds"] > 0 and row["other_seconds"] > 0
        assert row["ratio"] == pytest.approx(row["seconds"] / row["other_seconds"])
        assert bench.as_line(bench.Row(**row)) in done.said.splitlines()


def test_times_by_length_have_slopes(done: Done) -> None:
    by_length = done.report["seconds_by_length"]
    assert done.report["slopes"].keys() == by_length.keys() == {"elementwise", "linear_attention", "softmax attention"}
    for name, points in by_length.items():
        assert [length for length, _ in points] == LENGTHS
        assert done.report["slopes"][name] == pytest.approx(bench.slope([tuple(point) for point in points]))
        assert f"  {name}: seconds ~ tokens^{done.report['slopes'][name]:.2f}" in done.said.splitlines()


def test_accuracy_and_memory_are_told(done: Done) -> None:
    errors = done.report["errors_over_2^20_tokens"]
    assert errors.keys() == {"float32", "bfloat16"}
    for dtype, limit in (("float32", 1e-5), ("bfloat16", 1e-2)):
        assert all(0 < error <= limit for error in errors[dtype].values()), errors
    assert done.report["elementwise_extra_tensors"] > 0


def test_the_plot_is_a_picture(done: Done) -> None:
    assert (done.out / "kernels-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in done.out.iterdir()) == ["kernels-cpu.json", "kernels-cpu.png"]


@pytest.mark.parametrize("power", [0, 1, 2])
def test_slope_is_the_exponent(power: int) -> None:
    """Of the lengths from 8192 on; at shorter ones other costs count."""
    points = [(length, 3e-7 * length**power) for length in (8192, 16384, 65536, 2**20)]
    assert bench.slope([(1024, 5.0), (4096, 7.0), *points]) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize("ratio, told", [(2.0, "2.00"), (0.5, "0.50"), (0.025, "1/40.0")])
def test_a_small_ratio_is_told_as_a_fraction(ratio: float, told: str) -> None:
    line = bench.as_line(bench.Row("name", "forward", ratio * 3e-3, "a copy", 3e-3, ratio, "<= 2"))
    assert line == f"| name | forward | {ratio * 3:.2f} ms | a copy | 3.00 ms | {told} | <= 2 |"


def off_by_one(y: Tensor) -> Tensor:
    return y + 1


def twice_the_gradient(y: Tensor) -> Tensor:
    return 2 * y - y.detach()


def no_number(y: Tensor) -> Tensor:
    return y * torch.nan


def no_gradient(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda grad: grad * torch.nan)
    return y


@pytest.mark.parametrize("mistake", [off_by_one, twice_the_gradient, no_number, no_gradient])
@pytest.mark.parametrize(
    "operator", ["elementwise_attention", "linear_attention", "delta_rule", "short_conv", "long_conv"]
)
def test_a_wrong_operator_is_not_timed(
    operator: str,
    mistake: Callable[[Tensor], Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = getattr(bench, operator)

    def wrong(*inputs: Tensor, backend: str = "auto", **options: Any) -> tuple[Tensor, object]:
        y, end = right(*inputs, backend=backend, **options)
        return y if backend == "reference" else mistake(y), end

    shrink(monkeypatch)
    monkeypatch.setattr(bench, operator, wrong)
    code = main(["bench", "--out", str(tmp_path), "--threads", "1", "--longest", str(LENGTHS[-1])])
    out, err = capsys.readouterr()
    assert code == 2 and bench.HEADER not in out
    (line,) = err.splitlines()
    assert line.startswith("longreach: kernels = ") and operator.removesuffix("_attention") in line
    assert list(tmp_path.iterdir()) == []


def test_a_slow_machine_gets_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax attention is given up before the lengths that slopes are told from."""
    shrink(monkeypatch)
    monkeypatch.setattr(bench, "BUDGET", 0.0)
    monkeypatch.setattr(bench, "LENGTHS", [1024, *LENGTHS])
    assert main(["bench", "--out", str(tmp_path), "--threads", "1", "--longest", str(LENGTHS[-1])]) == 0
    report = read(tmp_path)
    assert [length for length, _ in report["seconds_by_length"]["softmax attention"]] == [1024]
    assert math.isfinite(report["slopes"]["elementwise"])
    assert (tmp_path / "kernels-cpu.png").exists()


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown bench": (["kernel"], ["NAME", "'kernel'"]),
    "no number": (["--threads", "all"], ["--threads", "'all'"]),
    "threads below 0": (["--threads", "-1"], ["--threads = -1", "at least 0"]),
    "too short": (["--longest", "8192"], ["--longest = 8192", "at least 16384"]),
    "out is a file": (["--out", "file"], ["--out = 'file'", "directory"]),
    "out is below a file": (["--out", "file/below"], ["--out = 'file/below'", "directory"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    words, expected = MISTAKES[name]
    (tmp_path / "file").touch()
    done = longreach("bench", *words, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("longreach: ")
    for word in expected:
        assert word in line, f"{word!r} is missing in {line!r}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
