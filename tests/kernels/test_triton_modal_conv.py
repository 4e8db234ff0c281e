"""The modal convolution in Triton against the definition: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import interpreted
from helpers import assert_close

from longreach.kernels.gpu import Tiling
from longreach.kernels.modal_conv import BACKENDS, reference_modal_conv
from longreach.kernels.modal_conv.centred import Centred
from longreach.kernels.modal_conv.chunked import Chunked
from longreach.kernels.scan import Carry, StatefulOp, scan

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
with_documents = pytest.mark.parametrize("documents", [0, 0.3], ids=["", "documents"])
NAMES = ("y", "carry", "dx", "dlog_decay", "dangle", "dre", "dim", "dcarry")
RMS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The interpreted kernels, with chunks so small that a few tokens fill several."""
    module = interpreted.load("modal_conv")
    monkeypatch.setattr(module, "PROGRAMS", 0)
    monkeypatch.setattr(module, "CHUNKS", {torch.float32: 8, torch.float16: 6, torch.bfloat16: 5})
    return module


def make(
    shape: tuple[int, int, int], modes: int, documents: float, device: str = "cpu"
) -> tuple[list[Tensor], Tensor | None, Carry, list[Tensor]]:
    """Inputs in fp64 rounded to 16 bits, documents that begin at random, a carry of some rows' first documents, and the
    gradients of y and of the final state.

    x has strides, and modes forget within 2 to 2000 tokens.
    """
    batch, length, width = shape
    x = torch.randn(batch, length, 2 * width, device=device).chunk(2, dim=-1)[1]
    log_decay, angle, re, im = torch.randn(4, width, modes, device=device)
    inputs = [t.bfloat16().double() for t in (x, -7.5 * log_decay.sigmoid(), 3 * angle, re, im)]
    state, state_grad = torch.randn(2, batch, width, modes, dtype=torch.complex64, device=device)
    segments = ids = None
    if documents:
        segments = 5 + (torch.rand(batch, length, device=device) < documents).long().cumsum(dim=1)
        ids = segments[:, 0] - torch.arange(batch, device=device) % 2
    grad = torch.randn(shape, device=device).bfloat16()
    return inputs, segments, Carry(state, ids), [grad, state_grad]


def differentiate(
    run: Any, inputs: list[Tensor], segments: Tensor | None, carry: Carry, upstream: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Output, outgoing state, and the gradients of the inputs and of the incoming state."""
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    leaves = [x.to(dtype).requires_grad_() for x in inputs] + [carry.state.to(wide).requires_grad_()]
    y, after = run(*leaves[:-1], segments=segments, carry=Carry(leaves[-1], carry.segment))
    grads = [grad.to(x.dtype) for grad, x in zip(upstream, (y, after.state))]
    return [y.detach(), after.state.detach(), *torch.autograd.grad([y, after.state], leaves, grads)]


def triton(module: ModuleType) -> Any:
    return lambda *inputs, **how: scan(module.Triton(), *inputs, **how)


def assert_all_close(got: list[Tensor], want: list[Tensor], rms: float, names: tuple[str, ...] = NAMES) -> None:
    """Relative RMS error below ``rms``, and the largest error below ten times that share of the largest value."""
    for name, x, truth in zip(names, got, want, strict=True):
        assert_close(name, x, truth, max_abs=10 * rms * max(1.0, truth.abs().max().item()), rel_rms=rms)


def compare(
    module: ModuleType,
    shape: tuple[int, int, int],
    modes: int,
    documents: float,
    *,
    dtype: torch.dtype = torch.float32,
    rms: float | None = None,
    device: str = "cpu",
) -> None:
    """Triton's kernels in ``dtype`` against the definition in fp64, on the same numbers."""
    given = make(shape, modes, documents, device)
    got = differentiate(triton(module), *given, dtype)
    assert got[0].dtype == got[2].dtype == dtype and got[1].dtype == torch.complex64
    assert_all_close(got, differentiate(reference_modal_conv, *given, torch.float64), rms or RMS[dtype])


@with_documents
@pytest.mark.parametrize("length", [1, 2, 8, 9, 37])
def test_equals_the_definition(tiny: ModuleType, length: int, documents: float) -> None:
    """Catches a wrong adjoint, a state that reaches a foreign document, a token that is not there but counts."""
    compare(tiny, (2, length, 3), 2, documents)


@pytest.mark.parametrize("modes", [1, 3, 8, 9, 16])
def test_equals_the_definition_with_any_modes(tiny: ModuleType, modes: int) -> None:
    """Catches a group of modes that takes another one's place."""
    compare(tiny, (1, 11, 35), modes, 0.2)


# The interpreter truncates to bf16, which doubles the error.
@pytest.mark.parametrize("dtype, rms", [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_equals_the_definition_in_16_bits(tiny: ModuleType, dtype: torch.dtype, rms: float) -> None:
    compare(tiny, (2, 23, 5), 2, 0.2, dtype=dtype, rms=rms)


@pytest.mark.parametrize("dtype, length", [(torch.float32, 131), (torch.bfloat16, 259)], ids=str)
def test_equals_the_definition_in_chunks_as_they_are(dtype: torch.dtype, length: int) -> None:
    """Catches what holds for short chunks only, by modes that hardly decay."""
    module = interpreted.load("modal_conv")
    inputs, segments, carry, upstream = make((1, length, 3), 2, 0)
    inputs[1] = inputs[1] * 0 - 12
    got = differentiate(triton(module), inputs, segments, carry, upstream, dtype)
    want = differentiate(reference_modal_conv, inputs, segments, carry, upstream, torch.float64)
    assert_all_close(got, want, 1.5e-6 if dtype == torch.float32 else 6e-3)


def passes(
    op: StatefulOp,
    inputs: list[Tensor],
    segments: Tensor | None,
    states: list[Tensor],
    grad: Tensor,
    *,
    alone: bool,
) -> list[Tensor]:
    """What the four passes give, in the order of `scan`; or without the two summaries, if ``alone``."""
    shard = tuple(inputs)
    summaries = [] if alone else list(op.local_transition(shard, segments))
    y, saved = op.apply_state(shard, segments, states[0])
    if not alone:
        summaries.append(op.incoming_state_grad(shard, segments, states[0], saved, grad))
    grads = op.input_grads(shard, segments, *states, saved, grad)
    return [*summaries, y, *(x for x in grads if x is not None)]


@with_documents
@pytest.mark.parametrize("alone", [False, True], ids=["", "alone"])
@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_passes_equal_the_portable_ones(
    tiny: ModuleType, causal: bool, length: int, alone: bool, documents: float
) -> None:
    """Catches a summary that misleads other ranks, a state from the wrong side, a result that is kept too long."""
    inputs, segments, _, (grad, _) = make((2, length, 3), 2, documents)
    states = [*torch.randn(2, 2, 2, 3, 2, dtype=torch.complex64)]
    ops = [tiny.Triton(), tiny.Triton()]
    ways = Centred(*ops), Centred(Chunked(), Chunked())
    if causal:
        ways, states = (ops[0], Chunked()), [state[0] for state in states]
    else:
        inputs[3:] = (torch.stack([x, -x.flip(0)]) for x in inputs[3:])
    got = passes(ways[0], [x.float() for x in inputs], segments, states, grad.float(), alone=alone)
    wide = [state.to(torch.complex128) for state in states]
    want = passes(ways[1], inputs, segments, wide, grad.double(), alone=alone)
    summaries = () if alone else ("A", "B", "initial state's gradient")
    assert_all_close(got, want, 1e-6, (*summaries, "y", "dx", "dlog_decay", "dangle", "dre", "dim"))
    assert all(op.to_right is None and op.to_left is None for op in ops)


def test_no_tokens(tiny: ModuleType) -> None:
    inputs, _, carry, upstream = make((2, 0, 3), 2, 0)
    y, after, *grads = differentiate(triton(tiny), inputs, None, carry, upstream, torch.float32)
    assert y.shape == (2, 0, 3) and after.equal(carry.state) and grads[-1].equal(upstream[1])
    assert not any(x.any() for x in grads[:-1])


def test_documents_do_not_share_what_is_not_finite(tiny: ModuleType) -> None:
    """Catches a mask that is a product: 0 times NaN. Documents end inside of chunks and with one."""
    inputs, _, carry, upstream = make((1, 24, 3), 2, 0)
    segments = (torch.arange(24).unsqueeze(0) >= 5).long() + (torch.arange(24) >= 16)
    inputs[0][:, 9, 0] = upstream[0][:, 9, 1] = torch.nan
    upstream[1][:, 2] = carry.state[:, 2] = torch.inf
    carry = Carry(carry.state, segments[:, 0])
    with np.errstate(invalid="ignore"):
        y, after, dx, *rest = differentiate(triton(tiny), inputs, segments, carry, upstream, torch.float32)
    position = torch.arange(24)
    for found, spoilt in (
        (y[0, :, 0], (position >= 9) & (position < 16)),
        (y[0, :, 2], position < 5),
        (dx[0, :, 1], (position >= 5) & (position < 10)),
        (dx[0, :, 2], position >= 16),
    ):
        assert found.isfinite().equal(~spoilt)
    assert after.isfinite().all() and all(not x[:2].isfinite().any() for x in rest[2:4])


def test_a_tiling_changes_no_bit(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tile that a kernel takes for granted."""
    given = make((1, 11, 35), 2, 0.2)
    found = []
    for cols in (32, 64):
        tilings = (Tiling({"COLS": cols}, num_warps=1),)
        monkeypatch.setattr(tiny, "_tilings", lambda *case, tilings=tilings: tilings)
        found.append(differentiate(triton(tiny), *given, torch.float32))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_what_else_runs_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bf16, fp64 = torch.bfloat16, torch.float64
    assert BACKENDS.automatic("cuda", bf16, torch.float32, 16)[0] == "triton"
    for case, lack in (((bf16, bf16, 17), "up to 16 modes, not 17"), ((fp64, bf16, 8), "not torch.float64")):
        name, missing = BACKENDS.automatic("cuda", *case)
        assert name == "chunked" and lack in missing["triton"]


@needs_gpu
@pytest.mark.parametrize("documents", [0, 0.01, 0.3], ids=["", "documents", "short documents"])
@pytest.mark.parametrize("shape", [(2, 2, 17), (1, 65, 3), (2, 500, 100), (1, 1000, 256)], ids=str)
@pytest.mark.parametrize("modes", [1, 8, 9, 16])
def test_equals_the_definition_on_a_gpu(modes: int, shape: tuple[int, int, int], documents: float) -> None:
    module = importlib.import_module("longreach.kernels.modal_conv.triton")
    for dtype in RMS:
        if dtype != torch.float16 or shape[1] < 500:  # of long sequences, gradients of parameters exceed fp16
            compare(module, shape, modes, documents, dtype=dtype, device="cuda")


@needs_gpu
def test_a_million_tokens_keep_their_digits() -> None:
    """Modes that forget in a million tokens, and angles times that: fp32 against fp64 in PyTorch."""
    module = importlib.import_module("longreach.kernels.modal_conv.triton")
    inputs, _, carry, upstream = make((1, 2**20, 4), 8, 0, "cuda")
    inputs[1] = inputs[1] - 6
    ways = (module.Triton(), torch.float32), (Chunked(), torch.float64)
    got, want = (
        differentiate(lambda *x, op=op, **how: scan(op, *x, **how), inputs, None, carry, upstream, dtype)
        for op, dtype in ways
    )
    assert_all_close(got, want, 1e-5)
