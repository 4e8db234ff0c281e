"""Long convolution in Triton against the definition: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import interpreted
from helpers import assert_close

from longreach.kernels.backends import Option
from longreach.kernels.gpu import Tiling
from longreach.kernels.long_conv import BACKENDS, chunked, long_conv, reference_long_conv
from longreach.kernels.long_conv.chunked import LongConv
from longreach.kernels.scan import Carry

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NAMES = ("y", "carry", "dx", "dkernel", "dskip", "dcarry")
# The largest error as a share of the largest value, and the relative RMS error. The interpreter cuts off what bf16
# cannot hold, where a GPU rounds.
TOLERANCES = {torch.float32: (2e-6, 1e-6), torch.float16: (1e-3, 5e-4), torch.bfloat16: (8e-3, 5e-3)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The interpreted kernels, cut so small that a few tokens and channels fill several tiles, slices and programs."""
    module = interpreted.load("long_conv")
    monkeypatch.setattr(module, "TILINGS", (Tiling({"TOKENS": 32, "CHANNELS": 2}, 4),))
    monkeypatch.setattr(module, "POINTS", 128)
    monkeypatch.setattr(module, "PROGRAMS", 4)
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    monkeypatch.setattr(module.Triton, "workspace", 1)
    monkeypatch.setattr(module.Triton, "min_channels", 4)
    monkeypatch.setattr(chunked, "DIRECT_LEN", 0)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote shows
    yield module
    torch.use_deterministic_algorithms(False)


def make(shape: tuple[int, int, int], taps: int, documents: str, skip: bool, carry: bool) -> dict[str, Any]:
    """x, kernel, skip and carried tokens; upstream gradients; the documents of the carried tokens and of x."""
    batch, length, width = shape
    carried = torch.randn(batch, taps - 1, width) if carry else None
    made: dict[str, Any] = {"ids": None, "segments": None}
    if documents != "none":
        ids = (torch.rand(batch, taps - 1 + length) < {"many": 0.15, "few": 0.02}[documents]).cumsum(1)
        ids[0, : taps // 2] = -1  # nothing was there
        made["ids"], made["segments"] = ids[:, : taps - 1], ids[:, taps - 1 :]
        carried = None if carried is None else carried * (made["ids"] >= 0).unsqueeze(-1)
    kernel = torch.randn(width, taps) / taps**0.5
    made["leaves"] = [torch.randn(shape), kernel, torch.randn(width) if skip else None, carried]
    made["grads"] = [torch.randn(shape), torch.randn(batch, taps - 1, width)]
    return made


def all_of(fn: Any, made: dict[str, Any], dtype: torch.dtype, device: str, **settings: Any) -> list[Tensor | None]:
    """Outputs and gradients of ``fn``."""
    leaves = [None if x is None else x.to(device, dtype).requires_grad_() for x in made["leaves"]]
    ids, segments = (None if x is None else x.to(device) for x in (made["ids"], made["segments"]))
    carry = None if leaves[3] is None else Carry(leaves[3], ids)
    y, after = fn(*leaves[:3], carry=carry, segments=segments, **settings)
    wanted = [x for x in leaves if x is not None]
    grads = [x.to(device, dtype) for x in made["grads"]]
    got = iter(torch.autograd.grad([y, after.state], wanted, grads, materialize_grads=True))
    return [y.detach(), after.state.detach(), *(None if x is None else next(got) for x in leaves)]


def compare(
    module: ModuleType,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    taps: int,
    documents: str,
    skip: bool = True,
    carry: bool = True,
    **settings: Any,
) -> None:
    made = make(shape, taps, documents, skip, carry)
    made |= {name: [None if x is None else x.to(dtype) for x in made[name]] for name in ("leaves", "grads")}
    got = all_of(LongConv(module.forward, module.backward), made, dtype, device, **settings)
    truth = all_of(reference_long_conv, made, torch.float64, device, **settings)
    for name, x, want in zip(NAMES, got, truth, strict=True):
        assert x is None or x.dtype == dtype, name
        (largest, rms), num = TOLERANCES[dtype], 0 if want is None else want.numel()
        size = want.abs().max().clamp(min=1) if num else 0.0
        assert_close(name, x, want, max_abs=largest * size, rel_rms=rms, rms_floor=1 / max(1, num) ** 0.5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize("length, taps", [(1, 1), (1, 9), (2, 2), (5, 3), (63, 17), (20, 50)])
def test_interpreted_is_the_definition(tiny: ModuleType, length: int, taps: int, causal: bool) -> None:
    for documents in ("none", "many"):
        compare(tiny, "cpu", torch.float32, (2, length, 5), taps, documents, causal=causal)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("documents", ["none", "few"])
def test_interpreted_settings(tiny: ModuleType, documents: str, dtype: torch.dtype) -> None:
    compare(tiny, "cpu", dtype, (1, 65, 3), 40, documents)
    compare(tiny, "cpu", dtype, (3, 33, 2), 4, documents, skip=False, carry=False)
    compare(tiny, "cpu", dtype, (1, 31, 1), 64, documents, skip=False, causal=False)


def test_views_tokens_of_another_dtype_and_an_expanded_gradient(tiny: ModuleType) -> None:
    """Catches a stride or a dtype taken for granted: x is a part of a view, and a sum's gradient has strides of 0."""
    wide, kernel, past = torch.randn(2, 24, 20), torch.randn(20, 7), torch.randn(2, 19, 7)
    grads = []
    for fn in (LongConv(tiny.forward, tiny.backward), reference_long_conv):
        leaves = [wide.clone().requires_grad_(), kernel.clone().requires_grad_(), past.double().requires_grad_()]
        y, _ = fn(leaves[0].transpose(1, 2)[:, :, 8:15], leaves[1].t(), None, carry=Carry(leaves[2]))
        y.sum().backward()
        grads.append([y.detach(), *(x.grad for x in leaves)])
    for name, got, want in zip(("y", "dx", "dkernel", "dcarry"), *grads):
        told = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, check_dtype=False, msg=told)


def test_places_without_tokens(tiny: ModuleType) -> None:
    """A shard of padding only: no document, no kernel runs, and the gradients are zeros."""
    leaves = [torch.randn(1, 20, 3).requires_grad_(), torch.randn(3, 4).requires_grad_()]
    y, _ = LongConv(tiny.forward, tiny.backward)(*leaves, segments=torch.full((1, 20), -1))
    assert not y.any() and not any(x.any() for x in torch.autograd.grad(y.sum(), leaves))


def test_fp64_is_left_to_the_portable_implementation() -> None:
    lacks = BACKENDS.options["triton"].unsupported_reason
    assert not lacks("cuda", torch.bfloat16, torch.float32)
    assert "fp32" in lacks("cuda", torch.float32, torch.float64) and "GPU" in lacks("cpu", torch.float32)


@pytest.mark.parametrize("packed", [False, True])
def test_as_one_node_of_a_graph(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """`torch.compile` keeps the op whole and gives what eager code gives."""
    monkeypatch.setattr(BACKENDS, "options", {"triton": Option(lambda: LongConv(tiny.forward, tiny.backward))})
    monkeypatch.setattr(BACKENDS, "_chosen", {})
    x, kernel, skip = torch.randn(2, 20, 3), torch.randn(3, 9), torch.randn(3)
    ids = (torch.arange(20) // 8).expand(2, -1) if packed else None

    def run(*leaves: Tensor) -> Tensor:
        return long_conv(*leaves, segments=ids)[0].square()

    results = []
    for fn in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, kernel, skip)]
        y = fn(*leaves)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    torch.compiler.reset()
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize("documents", ["none", "few", "many"])
@pytest.mark.parametrize("taps", [3, 200, 1500])
def test_compiled_is_the_definition(taps: int, documents: str, causal: bool, dtype: torch.dtype) -> None:
    module = importlib.import_module("longreach.kernels.long_conv.triton")
    for shape in ((2, 17, 40), (1, 1000, 100), (3, 129, 32)):
        compare(module, "cuda", dtype, shape, taps, documents, causal=causal)
    compare(module, "cuda", dtype, (2, 500, 33), taps, documents, skip=False, carry=False, causal=causal)


@needs_gpu
@pytest.mark.parametrize("number", range(3))
def test_compiled_tilings(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("longreach.kernels.long_conv.triton")
    monkeypatch.setattr(module, "TILINGS", module.TILINGS[number : number + 1])
    compare(module, "cuda", torch.bfloat16, (2, 999, 70), 300, "few")
