"""Element-wise attention in Triton against the definition: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import interpreted
from helpers import assert_close

from longreach.kernels.elementwise import reference_elementwise_attention
from longreach.kernels.elementwise.chunked import Chunked
from longreach.kernels.gpu import Tiling
from longreach.kernels.scan import Carry, StatefulOp, scan

SHAPES = [(2, 2, 17), (1, 65, 3), (1, 1000, 256), (2, 500, 100)]  # on a GPU
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
RESULTS = ["y", "final state", "dq", "dk", "dv", "initial state's gradient"]
both_ways = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])


def assert_all_close(got: list[Tensor], want: list[Tensor], rms: float, names: Sequence[str] = RESULTS) -> None:
    """Relative RMS error below ``rms`` and the largest error below ten times that; 0.01 counts as no smaller truth."""
    assert len(got) == len(want) <= len(names)
    for name, x, truth in zip(names, got, want):
        size = truth.double().abs().max().clamp(min=0.01) if truth.numel() else 0.0
        assert_close(name, x, truth, max_abs=10 * rms * size, rel_rms=rms, rms_floor=0.01)


def extreme_inputs() -> Tensor:
    """q, k, v and upstream gradients up to 1e4, ``[4, 1, 5 tokens, cases]``: mixed, and the corners."""
    signs = torch.randn(4, 5, 3).sign()
    cases = [signs * 10 ** (torch.rand(4, 5, 3) * 9 - 5), signs * 1e4]
    # Keys where exp(-k^2) is tiny, denormal or 0; queries from nothing to far outside.
    for key in (5.0, 8.4, 9.5, 10.1, 10.3):
        for query in (0.0, 1.0, 30.0, 1e4):
            sizes = torch.tensor([query, key, 1e4, 1e4]).view(4, 1, 1)
            cases += [signs * sizes, sizes.expand_as(signs)]
    return torch.cat(cases, dim=-1).unsqueeze(1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The interpreted kernels, with chunks and programs so small that a few tokens fill several."""
    module = interpreted.load("elementwise")
    monkeypatch.setattr(module, "CHUNK", 4)
    tile = {"ROWS": 2, "COLS": 32}
    monkeypatch.setattr(module, "TILINGS", dict.fromkeys(module.TILINGS, (Tiling(tile, num_warps=1),)))
    monkeypatch.setattr(module, "CHUNK_STATES_TILE", tile)
    with np.errstate(over="ignore"):
        yield module


def make(
    shape: tuple[int, int, int], order: int, documents: float, dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Carry, Tensor | None]:
    """q, k and v (a view of a wider tensor), both upstream gradients, a carry, and documents that begin at random."""
    batch, length, width = shape
    q, k = torch.randn(2, *shape, device=device).mul(0.7).to(dtype)
    v = torch.randn(batch, length, 2 * width, device=device).to(dtype).chunk(2, dim=-1)[1]
    grad = torch.randn(shape, device=device).to(dtype)
    segments = last = None
    if documents:
        segments = 5 + (torch.rand(batch, length, device=device) < documents).long().cumsum(dim=1)
        last = segments[:, 0] - torch.arange(batch, device=device) % 2 if length else segments.new_zeros(batch)
    earlier = torch.randn(3, batch, 9, width, device=device).mul(0.7)
    _, carry = reference_elementwise_attention(*earlier, order=order)
    return (q, k, v), grad, torch.randn_like(carry.state), Carry(carry.state, last), segments


def differentiate(
    run: Any, inputs: tuple[Tensor, ...], carry: Carry | None, grad: Tensor, state_grad: Tensor
) -> list[Tensor]:
    """Output, outgoing state, and the gradients of the inputs and of the incoming state."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    if carry is not None:
        leaves.append(carry.state.detach().requires_grad_())
        carry = Carry(leaves[-1], carry.segment)
    y, end = run(*leaves[:3], carry=carry)
    grads = torch.autograd.grad([y, end.state], leaves, [grad.to(y.dtype), state_grad.to(end.state.dtype)])
    return [y.detach(), end.state.detach(), *grads]


def compare(
    module: ModuleType,
    shape: tuple[int, int, int],
    order: int,
    causal: bool,
    documents: float,
    *,
    dtype: torch.dtype = torch.float32,
    rms: float = 2e-6,
    device: str = "cpu",
    with_carry: bool = True,
) -> None:
    """Triton's kernels in ``dtype`` against the definition in fp64, on the same numbers."""
    inputs, grad, state_grad, carry, segments = make(shape, order, documents, dtype, device)

    def triton(*args: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
        return scan(module.Triton(order, causal), *args, carry=carry, segments=segments)

    def truth(*args: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
        return reference_elementwise_attention(*args, order=order, causal=causal, carry=carry, segments=segments)

    wide = Carry(carry.state.double(), carry.segment) if with_carry else None
    got = differentiate(triton, inputs, carry if with_carry else None, grad, state_grad)
    assert all(x.dtype == dtype for x in (got[0], *got[2:5]))
    assert_all_close(got, differentiate(truth, tuple(x.double() for x in inputs), wide, grad, state_grad), rms)


@both_ways
@pytest.mark.parametrize("documents", [0, 0.3], ids=["", "documents"])
def test_equals_the_definition(tiny: ModuleType, causal: bool, documents: float) -> None:
    """Catches a wrong adjoint, a state that reaches a foreign document, a row that is not there but counts."""
    compare(tiny, (2, 10, 3), 4, causal, documents)


@both_ways
@pytest.mark.parametrize("order, length", [(2, 0), (2, 1), (6, 2), (8, 5)])
def test_equals_the_definition_at_every_order(tiny: ModuleType, order: int, length: int, causal: bool) -> None:
    """With less precision than longer ones: dq of a token that sees itself alone is 0 but for noise."""
    for documents in (0, 0.3):
        compare(tiny, (1, length, 3), order, causal, documents, with_carry=length != 5, rms=4e-6)


# The interpreter truncates to bf16, which doubles the error.
@pytest.mark.parametrize("dtype, rms", [(torch.bfloat16, 5e-3), (torch.float16, 3e-4)])
def test_equals_the_definition_in_16_bits(tiny: ModuleType, dtype: torch.dtype, rms: float) -> None:
    """Catches sums in the dtype of the inputs: the errors allowed are those of rounding outputs and gradients once."""
    compare(tiny, (1, 9, 33), 4, True, 0.3, dtype=dtype, rms=rms)
    compare(tiny, (1, 5, 33), 4, False, 0, dtype=dtype, rms=rms)


def test_equals_the_definition_in_chunks_as_they_are() -> None:
    """Catches what holds for chunks of 4 tokens only."""
    with np.errstate(over="ignore"):
        compare(interpreted.load("elementwise"), (1, 130, 17), 2, True, 0.02)


def passes(
    op: StatefulOp,
    inputs: tuple[Tensor, ...],
    grad: Tensor,
    segments: Tensor | None,
    initial: Tensor,
    final_grad: Tensor,
    *,
    alone: bool,
) -> list[Tensor]:
    """What the four passes give, in the order of `scan`; or without the two summaries, if ``alone``."""
    summaries = [] if alone else [op.local_transition(inputs, segments)[1]]
    y, saved = op.apply_state(inputs, segments, initial)
    if not alone:
        summaries.append(op.incoming_state_grad(inputs, segments, initial, saved, grad))
    grads = op.input_grads(inputs, segments, initial, final_grad, saved, grad)
    return [*summaries, y, *(x for x in grads if x is not None)]


@both_ways
@pytest.mark.parametrize("documents", [0, 0.3], ids=["", "documents"])
@pytest.mark.parametrize("alone", [False, True], ids=["", "alone"])
def test_passes_equal_the_portable_ones(tiny: ModuleType, causal: bool, documents: float, alone: bool) -> None:
    """Catches a summary that misleads other ranks, a state from the wrong side, a result that is kept too long."""
    inputs, grad, _, _, segments = make((1, 7, 3), 2, documents, torch.float32, "cpu")
    initial, final_grad = torch.randn(2, 1, 2, 3, 3) if causal else torch.randn(2, 2, 1, 2, 3, 3)
    initial = initial + 3  # denominators stay away from 0
    op = tiny.Triton(2, causal)
    got = passes(op, inputs, grad, segments, initial, final_grad, alone=alone)
    wide = (x.double() for x in (grad, initial, final_grad))
    grad, initial, final_grad = wide
    inputs = tuple(x.double() for x in inputs)
    want = passes(Chunked(2, causal), inputs, grad, segments, initial, final_grad, alone=alone)
    states = [] if alone else ["B", "initial state's gradient"]
    assert_all_close(got, want, 2e-6, [*states, "y", "dq", "dk", "dv"])
    assert op.key_totals is None and op.query_grad is None


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_finite_inputs_give_finite_results(tiny: ModuleType, causal: bool, dtype: torch.dtype) -> None:
    """Catches 0/0 where all weights underflow, 0*inf in powers and in gradients, and overflow of fp16."""
    for name in tiny.TILINGS:
        tiny.TILINGS[name] = (Tiling({"ROWS": 2, "COLS": 128}, num_warps=1),)  # the cases, side by side
    q, k, v, grad = extreme_inputs().to(dtype)
    state_grad = torch.randn(1, 2, 9, q.shape[2])
    got = differentiate(lambda *x, carry: scan(tiny.Triton(8, causal), *x), (q, k, v), None, grad, state_grad)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("guard", ["floored", "clamped", "underflow", "saturated"])
def test_guards_are_those_of_the_definition(tiny: ModuleType, guard: str) -> None:
    """Catches a backend whose results differ from the others' where a guard acts."""
    (q, k, v), grad, state_grad, _, _ = make((1, 6, 3), 4, 0, torch.float32, "cpu")
    if guard == "floored":
        k = 8.5 + 0.01 * k
        grad, state_grad = grad * 1e-8, torch.zeros_like(state_grad)
    elif guard == "clamped":
        q[:, 3:] *= 1e4
        assert (q.abs() > 1000).any()
    elif guard == "underflow":
        k[:, :3] *= 1e3
    else:
        v = v.abs() + 3
        grad = grad * 1e26

    def truth(*x: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
        return reference_elementwise_attention(*x, order=4)

    got = differentiate(lambda *x, carry: scan(tiny.Triton(4), *x), (q, k, v), None, grad, state_grad)
    want = differentiate(truth, (q.double(), k.double(), v.double()), None, grad, state_grad)
    sizes = [x.abs().max() for x in want]
    assert_all_close([x / size for x, size in zip(got, sizes)], [x / size for x, size in zip(want, sizes)], 1e-5)
    if guard == "clamped":
        assert got[2][q.abs() > 1000].eq(0).all()


@needs_gpu
@both_ways
@pytest.mark.parametrize("documents", [0, 0.01, 0.3], ids=["", "documents", "short documents"])
@pytest.mark.parametrize("shape, order", [*((shape, 6) for shape in SHAPES), *((SHAPES[-1], x) for x in (2, 4, 8))])
def test_equals_the_definition_on_a_gpu(
    shape: tuple[int, int, int], order: int, documents: float, causal: bool
) -> None:
    module = importlib.import_module("longreach.kernels.elementwise.triton")
    for dtype, rms in ((torch.float32, 2e-6), (torch.bfloat16, 2.5e-3), (torch.float16, 3e-4)):
        compare(module, shape, order, causal, documents, dtype=dtype, rms=rms, device="cuda")


@needs_gpu
def test_a_million_tokens_keep_their_digits() -> None:
    """Catches a long running sum in fp32: against plain fp64 sums, relative error <= 1e-5."""
    module = importlib.import_module("longreach.kernels.elementwise.triton")
    q, k, v = torch.randn(3, 1, 2**20, 64, device="cuda").mul_(0.5)
    v = v + 1
    y, _ = scan(module.Triton(2), q, k, v)
    q, k, v = q.double(), k.double(), v.double()
    num, den = torch.zeros_like(q), torch.zeros_like(q)
    for n, c in enumerate((1, 2, 2)):
        term = k**n * torch.exp(-k * k)
        num += c * q**n * (term * v).cumsum(dim=1)
        den += c * q**n * term.cumsum(dim=1)
    error = (y - num / den).square().mean().sqrt() / (num / den).square().mean().sqrt()
    assert error <= 1e-5, f"{error:.1e}"
