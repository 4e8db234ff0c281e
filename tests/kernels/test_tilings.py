"""How a kernel is cut: the choice between tilings, by times that are made up, and the tilings that operators offer."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import interpreted

from longreach.kernels import gpu
from longreach.kernels.gpu import Choices, Tiling
from longreach.kernels.long_conv.chunked import LongConv
from longreach.kernels.scan import scan
from longreach.kernels.short_conv.autograd import ConvBackend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TILINGS = tuple(Tiling({"ROWS": rows}, num_warps=4) for rows in (1, 2, 4))
CASE = ("a GPU", "kernel", torch.bfloat16, 11, None)


class Machine:
    """A GPU that takes ``times[i]`` milliseconds for the i-th of `TILINGS`."""

    def __init__(self, directory: Path, *times: float) -> None:
        self.times, self.ran = times, list[int]()
        self.choices = Choices(lambda: directory, self.milliseconds)

    def run(self, tiling: Tiling) -> None:
        self.ran.append(TILINGS.index(tiling))

    def milliseconds(self, run: Callable[[], None]) -> float:
        run()
        return self.times[self.ran[-1]]

    def fastest(self, case: tuple[Any, ...] = CASE, **how: Any) -> int:
        return TILINGS.index(self.choices.fastest(case, TILINGS, self.run, **how))


@pytest.mark.parametrize(
    ("times", "number"),
    [
        ((5.0, 3.0, 4.0), 1),
        ((5.0, 4.9, 4.0), 2),
        ((5.0, 4.9, 4.8), 0),  # that is noise
        ((5.0, math.inf, 4.0), 2),  # one that does not fit
        ((math.inf, 3.0, math.inf), 1),
        ((math.inf, math.inf, math.inf), 0),  # the launch itself will say so
    ],
)
def test_the_fastest_is_measured_once(tmp_path: Path, times: tuple[float, ...], number: int) -> None:
    machine = Machine(tmp_path, *times)
    assert machine.fastest() == machine.fastest() == number
    assert machine.ran == [0, 1, 2] * gpu.ROUNDS  # in turns
    another = Machine(tmp_path, 1.0, 9.0, 9.0)  # another process
    assert another.fastest() == number and not another.ran


def test_a_short_kernel_is_not_tuned(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu.SHORT / 2, 0.0, 0.0)
    assert machine.fastest() == machine.fastest() == 0
    assert machine.ran == [0] and not list(tmp_path.iterdir())


def test_cases_and_lists_of_tilings_are_told_apart(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 5.0, 3.0, 4.0)
    machine.fastest()
    assert machine.fastest(("another GPU", *CASE[1:])) == 1
    assert machine.choices.fastest(CASE, TILINGS[:2], machine.run) == TILINGS[1]
    assert len(machine.ran) == 8 * gpu.ROUNDS and len(list(tmp_path.iterdir())) == 3


def test_without_measuring(tmp_path: Path) -> None:
    """What is not known is the first one, and not remembered; what a file has is known."""
    machine = Machine(tmp_path, 5.0, 3.0, 4.0)
    assert machine.fastest(measure=False) == 0 and not machine.ran and not list(tmp_path.iterdir())
    assert machine.fastest() == machine.fastest(measure=False) == 1
    assert Machine(tmp_path).fastest(measure=False) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", "{}", '{"number": 3}', '{"number": -1}', '{"number": "1"}', "\xff"]
)
def test_a_damaged_file_is_made_again(tmp_path: Path, text: str) -> None:
    Machine(tmp_path, 5.0, 3.0, 4.0).fastest()
    (path,) = tmp_path.iterdir()
    path.write_text(text, encoding="latin-1")
    machine = Machine(tmp_path, 5.0, 4.0, 3.0)
    assert machine.fastest() == 2 and machine.ran
    assert json.loads(path.read_text(encoding="utf-8"))["number"] == 2


def test_a_directory_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(tmp_path / "gone", 5.0, 3.0, 4.0)
    assert machine.fastest() == machine.fastest() == 1
    assert "measures again" in caplog.text


def test_ranks_that_measure_at_the_same_time(tmp_path: Path) -> None:
    """One measures and writes while another one measures: both have an answer, and one whole file is left."""
    others = []

    class Slow(Machine):
        def milliseconds(self, run: Callable[[], None]) -> float:
            others.append(Machine(tmp_path, 5.0, 4.0, 3.0).fastest())
            return super().milliseconds(run)

    assert Slow(tmp_path, 5.0, 3.0, 4.0).fastest() == 1 and set(others) == {2}
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text(encoding="utf-8"))["number"] == 1


class Kernel:
    """Stands for a compiled kernel."""

    __name__, cache_key = "kernel", "of this source"

    def __init__(self) -> None:
        self.launched = list[tuple[int, int]]()

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *x, ROWS, **how: self.launched.append((grid[0], ROWS))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    """A compiled kernel and a GPU that prefers 2 rows."""
    kernel = Kernel()

    def milliseconds(run: Callable[[], None]) -> float:
        run()
        return 3.0 if kernel.launched[-1][1] == 2 else 5.0

    monkeypatch.setattr(gpu, "_is_compiled", lambda kernel: True)
    monkeypatch.setattr(gpu, "_where", lambda device: ("a GPU", "3.7"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gpu, "CHOICES", Choices(lambda: tmp_path, milliseconds))
    return kernel


def launch(kernel: Any, length: int = 12, **how: Any) -> None:
    gpu.launch_fastest(kernel, TILINGS, lambda tile: length // tile["ROWS"], torch.zeros(3), length, 0.5, **how)


def test_launches_of_a_class_share_a_tiling(compiled: Kernel) -> None:
    launch(compiled)
    assert compiled.launched[-1] == (6, 2) and len(compiled.launched) == 3 * gpu.ROUNDS + 1
    launch(compiled, 15)
    assert compiled.launched[-1] == (7, 2) and len(compiled.launched) == 3 * gpu.ROUNDS + 2
    for how in ({"length": 16}, {"FLAG": True}, {"FLAG": False}):
        compiled.launched.clear()
        launch(compiled, **how)
        assert len(compiled.launched) == 3 * gpu.ROUNDS + 1


@pytest.mark.parametrize("where", ["torch.cuda.is_current_stream_capturing", "torch.compiler.is_compiling"])
def test_nothing_is_measured_in_a_capture_or_a_trace(
    compiled: Kernel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as now:
        now.setattr(where, lambda: True)
        launch(compiled)
        assert compiled.launched == [(12, 1)]
    launch(compiled)
    assert compiled.launched[-1] == (6, 2)
    monkeypatch.setattr(where, lambda: True)
    compiled.launched.clear()
    launch(compiled)
    assert compiled.launched == [(6, 2)]


def test_deterministic_algorithms_take_the_first(compiled: Kernel) -> None:
    torch.use_deterministic_algorithms(True)
    launch(compiled)
    torch.use_deterministic_algorithms(False)
    assert compiled.launched == [(12, 1)]


def test_shapes_alone_launch_nothing(compiled: Kernel) -> None:
    with FakeTensorMode():
        launch(compiled)
    launch(compiled, 0)
    assert not compiled.launched


def test_the_interpreter_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CHOICES", None)
    module = interpreted.load("long_conv")
    LongConv(module.forward, module.backward)(torch.randn(1, 20, 3), torch.randn(3, 4))


def run_elementwise(module: ModuleType, device: str) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, 10, 70, device=device)]
    ids = (torch.arange(10, device=device) // 3).unsqueeze(0)
    outs = [
        scan(module.Triton(2), *leaves, segments=None)[0],
        scan(module.Triton(2, causal=False), *leaves, segments=ids)[0],
    ]
    return [*outs, *torch.autograd.grad([y.square().sum() for y in outs], leaves)]


def run_short_conv(module: ModuleType, device: str) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in (torch.randn(1, 70, 9, device=device), torch.randn(9, 4, device=device))]
    y, _ = ConvBackend(module.forward, module.backward)(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def run_long_conv(module: ModuleType, device: str) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in (torch.randn(1, 150, 20, device=device), torch.randn(20, 30, device=device))]
    ids = (torch.arange(150, device=device) // 60).unsqueeze(0)
    by = LongConv(module.forward, module.backward)
    outs = [by(*leaves)[0], by(*leaves, segments=ids)[0]]
    return [*outs, *torch.autograd.grad([y.square().sum() for y in outs], leaves)]


RUNS = {"elementwise": run_elementwise, "short_conv": run_short_conv, "long_conv": run_long_conv}
TUNED = [("elementwise", 1), ("short_conv", 1), ("long_conv", 1), ("long_conv", 2)]


def with_tiling(
    operator: str, module: ModuleType, device: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Results of the operator where every kernel runs with its tiling of that number, or its last one."""

    def fixed(kernel: Any, tilings: tuple[Tiling, ...], *arguments: Any, **settings: Any) -> None:
        used = tilings[min(number, len(tilings) - 1)]
        gpu.launch_fastest(kernel, [used], *arguments, **settings)

    monkeypatch.setattr(module, "launch_fastest", fixed)
    if operator == "elementwise":
        monkeypatch.setattr(module, "CHUNK", 8)
    torch.manual_seed(0)
    return RUNS[operator](module, device)


@pytest.mark.parametrize(("operator", "number"), TUNED)
def test_a_tiling_changes_no_bit(operator: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tile that a kernel takes for granted: rows, channels and documents end inside of one."""
    module = interpreted.load(operator)
    first, other = (with_tiling(operator, module, "cpu", i, monkeypatch) for i in (0, number))
    assert all(a.equal(b) for a, b in zip(first, other, strict=True))


@needs_gpu
@pytest.mark.parametrize(("operator", "number"), TUNED)
def test_a_compiled_tiling_gives_the_same(operator: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"longreach.kernels.{operator}.triton")
    first, other = (with_tiling(operator, module, "cuda", i, monkeypatch) for i in (0, number))
    for number, (a, b) in enumerate(zip(first, other, strict=True)):
        told = lambda text, number=number: f"result {number}: {text}"  # noqa: E731
        torch.testing.assert_close(a, b, msg=told, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@needs_gpu
def test_a_choice_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured there, kept, and the result is that of the first tiling."""
    monkeypatch.setattr(gpu, "CHOICES", Choices(lambda: tmp_path, gpu._milliseconds))
    monkeypatch.setattr(gpu, "SHORT", 0.0)
    module = importlib.import_module("longreach.kernels.long_conv.triton")
    x, kernel = torch.randn(1, 10_000, 64, device="cuda"), torch.randn(64, 100, device="cuda")
    y, _ = LongConv(module.forward, module.backward)(x, kernel)
    assert list(tmp_path.glob("*.json"))
    monkeypatch.setattr(module, "TILINGS", module.TILINGS[:1])
    again, _ = LongConv(module.forward, module.backward)(x, kernel)
    assert y.equal(again)
