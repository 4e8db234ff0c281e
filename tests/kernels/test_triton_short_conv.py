"""Short convolution in Triton against the definition: interpreted on the CPU, compiled where there is a GPU."""

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

from longreach.kernels.scan import Carry
from longreach.kernels.short_conv.autograd import ConvBackend
from longreach.kernels.short_conv.reference import reference_short_conv

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NAMES = ("y", "carry", "dx", "dweight", "dbias", "dcarry")
# The largest error as a share of the largest value, and the relative RMS error. The interpreter cuts off what bf16
# cannot hold, where a GPU rounds.
TOLERANCES = {torch.float32: (1e-6, 5e-7), torch.float16: (1e-3, 5e-4), torch.bfloat16: (8e-3, 5e-3)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The interpreted kernels, with chunks so short that a few tokens fill several."""
    module = interpreted.load("short_conv")
    monkeypatch.setattr(module, "MIN_CHUNK", 16)
    monkeypatch.setattr(module, "CHANNELS", 8)
    yield module


def make(
    shape: tuple[int, int, int], taps: int, documents: str, with_bias: bool, with_carry: bool
) -> tuple[list[Tensor | None], list[Tensor], Tensor | None, Tensor | None]:
    """x, weight, bias and the carried tokens; upstream gradients; the documents of the carried tokens and of x."""
    batch, length, width = shape
    carried = torch.randn(batch, taps - 1, width) if with_carry else None
    bias = torch.randn(width) if with_bias else None
    leaves = [torch.randn(shape), torch.randn(width, taps) / taps**0.5, bias, carried]
    grads = [torch.randn(shape), torch.randn(batch, taps - 1, width)]
    if documents == "none":
        return leaves, grads, None, None
    ids = (torch.rand(batch, taps - 1 + length) < {"many": 0.4, "few": 0.02}[documents]).cumsum(1)
    ids[0, : taps // 2] = -1  # nothing was there
    return leaves, grads, ids[:, : taps - 1], ids[:, taps - 1 :]


def all_of(
    fn: Any,
    leaves: list[Tensor | None],
    grads: list[Tensor],
    ids: Tensor | None,
    segments: Tensor | None,
    **settings: Any,
) -> list[Tensor | None]:
    """Outputs and gradients of ``fn``."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    carry = None if leaves[3] is None else Carry(leaves[3], ids)
    y, after = fn(*leaves[:3], carry=carry, segments=segments, **settings)
    wanted = [x for x in leaves if x is not None]
    got = iter(torch.autograd.grad([y, after.state], wanted, grads, materialize_grads=True))
    return [y.detach(), after.state.detach(), *(None if x is None else next(got) for x in leaves)]


def compare(
    module: ModuleType,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    taps: int,
    documents: str,
    bias: bool = True,
    carry: bool = True,
    **settings: Any,
) -> None:
    leaves, grads, *ids = make(shape, taps, documents, bias, carry)
    ids = [None if x is None else x.to(device) for x in ids]
    leaves, grads = ([None if x is None else x.to(device, dtype) for x in group] for group in (leaves, grads))
    got = all_of(ConvBackend(module.forward, module.backward), leaves, grads, *ids, **settings)
    leaves, grads = ([None if x is None else x.double() for x in group] for group in (leaves, grads))
    truth = all_of(reference_short_conv, leaves, grads, *ids, **settings)
    for name, x, want in zip(NAMES, got, truth, strict=True):
        assert x is None or x.dtype == dtype, name
        (largest, rms), num = TOLERANCES[dtype], 0 if want is None else want.numel()
        size = want.abs().max().clamp(min=0.1) if num else 0.0
        assert_close(name, x, want, max_abs=largest * size, rel_rms=rms, rms_floor=0.1 / max(1, num) ** 0.5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize("length, taps", [(0, 4), (1, 2), (1, 8), (2, 3), (5, 4), (5, 8), (21, 3)])
def test_interpreted_is_the_definition(tiny: ModuleType, length: int, taps: int, causal: bool) -> None:
    compare(tiny, "cpu", torch.float32, (2, length, 5), taps, "many", causal=causal, activation="silu")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("documents", ["none", "few"])
def test_interpreted_settings(tiny: ModuleType, documents: str, dtype: torch.dtype) -> None:
    compare(tiny, "cpu", dtype, (1, 33, 5), 4, documents, activation="silu")
    compare(tiny, "cpu", dtype, (1, 17, 5), 2, documents, bias=False, carry=False)
    compare(tiny, "cpu", dtype, (2, 3, 9), 4, documents, bias=False, causal=False)


def test_views_and_an_expanded_gradient(tiny: ModuleType) -> None:
    """Catches a stride taken for granted: x is part of a projection, and the gradient of a sum has strides of 0."""
    wide, weight = torch.randn(2, 6, 24), torch.randn(4, 7).t()
    grads = []
    for fn in (ConvBackend(tiny.forward, tiny.backward), reference_short_conv):
        leaves = [wide.clone().requires_grad_(), weight.clone().t().contiguous().t().requires_grad_()]
        y, _ = fn(leaves[0][:, 3:, 8:15], leaves[1], None)
        y.sum().backward()
        grads.append([y.detach(), *(x.grad for x in leaves)])
    for name, got, want in zip(("y", "dx", "dweight"), *grads):
        torch.testing.assert_close(got, want, msg=lambda told, name=name: f"{name}: {told}")


@needs_gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize("documents", ["none", "few", "many"])
@pytest.mark.parametrize("taps, dtype", [*((4, x) for x in TOLERANCES), *((x, torch.float32) for x in (2, 3, 7, 8))])
def test_compiled_is_the_definition(taps: int, documents: str, causal: bool, dtype: torch.dtype) -> None:
    module = importlib.import_module("longreach.kernels.short_conv.triton")
    for shape in ((2, 0, 40), (2, 1, 40), (1, 3000, 1000), (3, 129, 256)):
        compare(module, "cuda", dtype, shape, taps, documents, causal=causal, activation="silu")
    compare(module, "cuda", dtype, (2, 500, 513), taps, documents, bias=False, carry=False, causal=causal)
