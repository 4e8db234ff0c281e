"""The state law itself, by the smallest operators that obey it: their adjoints come from `StatefulOp`'s defaults."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from helpers import run_distributed
from torch import Tensor

from longreach.errors import InputError
from longreach.kernels import native
from longreach.kernels.delta_rule import DeltaRule
from longreach.kernels.elementwise import ElementwiseAttention
from longreach.kernels.linear_attention import LinearAttention
from longreach.kernels.modal_conv import CentredModalConv, ModalConv
from longreach.kernels.scan import (
    AffineMap,
    Carry,
    FusedForward,
    Matrix,
    StatefulOp,
    exclusive_chunk_scan,
    scan,
)
from longreach.parallel.mesh import Axis, node_axes
from longreach.parallel.relay import AxisStateExchange


class GatedAverage(StatefulOp):
    """``s_i = a_i s_{i-1} + x_i``, y = s: a decay that depends on the input, so gradients flow through A too."""

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        x, gate = inputs
        zero = x.new_zeros(x.shape[0], x.shape[2])
        if not x.shape[1]:
            return torch.ones_like(zero), zero
        return gate.prod(1), self.apply_state(inputs, segments, zero)[0][:, -1]

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, gate = inputs
        rows, state = [], past
        for i in range(x.shape[1]):
            if segments is not None and i:
                state = state * (segments[:, i] == segments[:, i - 1]).to(x.dtype).unsqueeze(-1)
            state = gate[:, i] * state + x[:, i]
            rows.append(state)
        return (torch.stack(rows, 1) if rows else x * gate), ()


class TwoSided(StatefulOp):
    """A decaying sum over past and future tokens (non-causal, and not one plain sum)."""

    causal = False
    rate = 0.7

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        (x,) = inputs
        length = x.shape[1]
        power = self.rate ** torch.arange(length, dtype=x.dtype)
        to_right, to_left = power.flip(0).view(-1, 1).expand(x.shape), power.view(-1, 1).expand(x.shape)
        if segments is not None and length:
            to_right = to_right * (segments == segments[:, -1:]).unsqueeze(-1)
            to_left = to_left * (segments == segments[:, :1]).unsqueeze(-1)
        return x.new_full((1, 1), self.rate**length), torch.stack([(to_right * x).sum(1), (to_left * x).sum(1)])

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (x,) = inputs
        place = torch.arange(x.shape[1])
        weight = self.rate ** (place.view(-1, 1) - place).abs().to(x.dtype)
        left, right = self.rate ** (place + 1).to(x.dtype), self.rate ** (len(place) - place).to(x.dtype)
        mask = torch.ones(1, len(place), len(place), dtype=torch.bool)
        head = tail = torch.ones(1, len(place), dtype=torch.bool)
        if segments is not None:
            mask = segments.unsqueeze(1) == segments.unsqueeze(2)
            head, tail = segments == segments[:, :1], segments == segments[:, -1:]
        y = (weight * mask.to(x.dtype)) @ x
        y = y + (left * head).unsqueeze(-1) * past[0].unsqueeze(1)
        return y + (right * tail).unsqueeze(-1) * past[1].unsqueeze(1), ()


def _case(two_sided: bool, length: int, documents: bool, seed: int) -> tuple[list[Tensor], Tensor | None, Carry]:
    torch.manual_seed(seed)
    inputs = [torch.randn(2, length, 3, dtype=torch.float64)]
    if not two_sided:
        inputs.append(torch.rand(2, length, 3, dtype=torch.float64))
    segments = torch.randint(0, 2, (2, length)).cumsum(1) if documents else None
    carry = Carry(
        torch.randn(2, 3, dtype=torch.float64),
        None if segments is None else segments[:, 0] - 1 + torch.arange(2),
    )
    return inputs, segments, carry


def _run(
    axis: Axis, two_sided: bool, length: int, lengths: list[int], documents: bool, seed: int, way: str = "gather"
) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's outputs and gradients (per token), and the replicated ones (carry out, gradient of carry in)."""
    inputs, segments, carry = _case(two_sided, length, documents, seed)
    stop = list(accumulate(lengths))[axis.rank]
    mine = slice(stop - lengths[axis.rank], stop)
    leaves = [x[:, mine].clone().requires_grad_() for x in inputs]
    state = carry.state.clone().requires_grad_()
    axis = replace(axis, relay=way)
    if way == "hierarchical":  # two nodes of two ranks
        node, peers = node_axes([axis.ranks], 2)
        axis = replace(axis, node=node, peers=peers)
    relay = AxisStateExchange(axis) if axis.size > 1 else None
    ids = None if segments is None else segments[:, mine]
    op = TwoSided() if two_sided else GatedAverage()
    y, after = scan(op, *leaves, segments=ids, carry=Carry(state, carry.segment), relay=relay)
    upstream = torch.randn(2, length, 3, dtype=torch.float64)[:, mine]
    grads = torch.autograd.grad([y, after.state], [*leaves, state], [upstream, torch.ones_like(state)])
    return [y.detach(), *grads[:-1]], [after.state.detach(), grads[-1]]


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("way", "lengths"),
    [
        *(("gather", lengths) for lengths in ([5, 1], [4, 4, 3], [3, 0, 1], [2, 2, 1, 0], [5, 1, 8, 9])),
        *(("hierarchical", lengths) for lengths in ([2, 2, 1, 0], [5, 1, 8, 9], [0, 3, 0, 1])),
        *(("pipeline", lengths) for lengths in ([5, 1], [4, 4, 3], [3, 0, 1], [5, 1, 8, 9])),
        *(("recursive_doubling", lengths) for lengths in ([5, 1], [4, 4, 3], [3, 0, 1], [5, 1, 8, 9])),
        ("auto", [4, 4, 3]),
    ],
)
def test_pieces_equal_the_whole(two_sided: bool, documents: bool, way: str, lengths: list[int]) -> None:
    """Catches a sweep that skips a piece, mixes documents, or misses a decay on the way there or back."""
    for seed in range(3):
        args = (two_sided, sum(lengths), lengths, documents, seed, way)
        whole, carried = _run(Axis(), two_sided, sum(lengths), [sum(lengths)], documents, seed)
        rows = run_distributed(_run, len(lengths), *args)
        for part, expected in zip(zip(*(row[0] for row in rows), strict=True), whole, strict=True):
            torch.testing.assert_close(torch.cat(part, 1), expected, rtol=0, atol=1e-13)
        for row in rows:
            for part, expected in zip(row[1], carried, strict=True):
                torch.testing.assert_close(part, expected, rtol=0, atol=1e-13)


def _twice(axis: Axis, lengths: list[int]) -> Tensor:
    """The gradient of two scans, one behind the other, through one relay."""
    inputs, _, carry = _case(False, sum(lengths), False, 0)
    stop = list(accumulate(lengths))[axis.rank]
    x, gate = (x[:, stop - lengths[axis.rank] : stop].clone().requires_grad_() for x in inputs)
    relay = AxisStateExchange(axis)
    first, _ = scan(GatedAverage(), x, gate, carry=carry, relay=relay)
    second, _ = scan(GatedAverage(), first, gate * gate, relay=relay)
    return torch.autograd.grad(second.square().sum(), x)[0]


def test_a_relay_serves_several_scans() -> None:
    """Catches a relay that remembers what belongs to one of them."""
    whole = _twice(Axis(), [9])
    torch.testing.assert_close(torch.cat(run_distributed(_twice, 2, [5, 4]), 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
def test_adjoints_equal_finite_differences(two_sided: bool, documents: bool) -> None:
    inputs, segments, carry = _case(two_sided, 6, documents, 0)
    op = TwoSided() if two_sided else GatedAverage()

    def whole(state: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        y, after = scan(op, *leaves, segments=segments, carry=Carry(state, carry.segment))
        return y, after.state

    leaves = [x.requires_grad_() for x in (carry.state, *inputs)]
    assert torch.autograd.gradcheck(whole, leaves)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_pieces", [1, 2, 5, 8])
def test_entering_states(num_pieces: int, gated: bool, decayed: bool, reverse: bool) -> None:
    decay = torch.rand(1, num_pieces, 3, dtype=torch.float64) if decayed else None
    state = torch.randn(2, num_pieces, 3, dtype=torch.float64)
    start = torch.randn(2, 3, dtype=torch.float64)
    gate = torch.rand(2, num_pieces) < 0.5 if gated else None
    rows, x = {}, start
    order = range(num_pieces - 1, -1, -1) if reverse else range(num_pieces)
    for piece in order:
        rows[piece] = x if gate is None else x * gate[:, piece : piece + 1]
        x = (1.0 if decay is None else decay[:, piece]) * rows[piece] + state[:, piece]
    expected = [rows[piece] for piece in range(num_pieces)]
    expected = [x, *expected] if reverse else [*expected, x]
    got = exclusive_chunk_scan(decay, state, start, gate, reverse=reverse)
    torch.testing.assert_close(got, torch.stack(expected, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "op",
    [ElementwiseAttention(causal=False), LinearAttention(causal=False), CentredModalConv()],
    ids=lambda op: op.__class__.__name__,
)
def test_a_plain_sum_is_declared_where_there_is_one(op: StatefulOp) -> None:
    """Catches states that ranks exchange twice, or once where the two directions differ."""
    x = torch.rand(3, 1, 6, 4, 8)
    inputs = {
        "ElementwiseAttention": (*x.flatten(3),),
        "LinearAttention": (*x,),
        "CentredModalConv": (x[0].flatten(2), -torch.rand(32, 2), torch.rand(32, 2), *torch.rand(2, 2, 32, 2)),
    }[type(op).__name__]
    own = op.resolve_backend(inputs)
    transition, (to_right, to_left) = own.local_transition(inputs, None)
    same = bool((transition == 1).all()) and torch.allclose(to_right, to_left)
    assert op.plain_sum == own.plain_sum == same


DECODED = {
    "elementwise": (ElementwiseAttention(order=2), 3, 0),
    "linear attention": (LinearAttention(), 3, 0),
    "linear attention, normalized": (LinearAttention(normalize=True), 3, 0),
    "linear attention, decay": (LinearAttention(decay=(1 - 2**-12,) * 4), 3, 0),
    "modal convolution": (ModalConv(), 1, 4),
}


@pytest.mark.parametrize("name", DECODED)
@torch.no_grad()
def test_decoding_does_not_drift_from_streaming(name: str) -> None:
    """Behind a million tokens, 3,000 tokens one by one: catches sums in fp32 that no longer see a single term, and a
    rate that is rounded once a token.
    """
    op, num_inputs, num_parameters = DECODED[name]
    before, after, block = 1 << 20, 3000, 1 << 16
    x = torch.rand(num_inputs, 1, before + after, 4)
    x = x.unsqueeze(-1) if name.startswith("linear") else x
    rates = torch.tensor([[-9.0, -12.0]]).expand(4, 2)
    parameters = (rates, torch.rand(4, 2), torch.rand(4, 2), torch.rand(4, 2)) if num_parameters else ()

    def run(starts: list[int], wide: bool, carry: Carry | None = None) -> Carry:
        def cast(t: Tensor) -> Tensor:
            return t.double() if wide else t

        for first, last in pairwise(starts):
            shard = (cast(part[:, first:last]) for part in x)
            _, carry = scan(op, *shard, *map(cast, parameters), carry=carry)
        assert carry is not None
        return carry

    blocks = list(range(0, before + 1, block))
    whole = run([*blocks, before + after], wide=True)
    streamed = run([*blocks, before + after], wide=False)
    decoded = run(list(range(before, before + after + 1)), wide=False, carry=run(blocks, wide=False))
    errors = [float((carry.state - whole.state).abs().max() / whole.state.abs().max()) for carry in (decoded, streamed)]
    assert errors[0] <= 3 * max(errors[1], 1e-7)
    # What the last tokens added.
    last = [
        carry.state.to(whole.state.dtype) - run(blocks, wide=wide).state
        for carry, wide in ((decoded, False), (whole, True))
    ]
    assert float((last[0] - last[1]).abs().max()) <= 1e-5 * float(last[1].abs().max()) + 1e-12


def _matrices(seed: int, batch: int = 2) -> tuple[Matrix, Matrix, Tensor, Tensor]:
    torch.manual_seed(seed)
    first, second = torch.randn(2, batch, 3, 4, 4, dtype=torch.float64)
    return Matrix(first), Matrix(second), *torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)


def test_matrices_compose_in_order() -> None:
    first, second, state, other = _matrices(0)
    one_by_one = second.apply(first.apply(state))
    torch.testing.assert_close(first.then(second).apply(state), one_by_one)
    torch.testing.assert_close(
        AffineMap(first, other).then(AffineMap(second, state)).apply(other),
        second.apply(first.apply(other) + other) + state,
    )
    # <A x, y> = <x, A^H y>
    torch.testing.assert_close((first.apply(state) * other).sum(), (state * first.adjoint().apply(other)).sum())


def test_matrices_of_documents() -> None:
    """Where a document begins, A is 0, also one that all rows of the batch share."""
    for batch in (1, 2):
        first, _, state, _ = _matrices(1, batch)
        masked = first.masked(torch.tensor([True, False]), state)
        assert masked.tensor.shape[0] == 2
        assert torch.equal(masked.apply(state)[0], first.apply(state)[0]) and not masked.apply(state)[1].any()


@pytest.mark.parametrize("number", [1, 4, 100])
@pytest.mark.parametrize("batch", [1, 2])
def test_sections_of_matrices(batch: int, number: int) -> None:
    """What a pipeline passes on, slice by slice, is the whole."""
    first, _, state, bias = _matrices(2, batch)
    out = torch.full_like(state, torch.nan)
    sections = list(first.sections(state, number))
    assert len(sections) <= number and (number == 1 or len(sections) > 1)
    for part, own in sections:
        own.affine(state.view(-1)[part], bias.view(-1)[part], out.view(-1)[part])
    torch.testing.assert_close(out, first.apply(state) + bias)


def test_products_of_matrices_are_exact() -> None:
    """Neither autocast nor TF32 rounds the factors, and fp32 sums do not round the products."""
    first, second, state, _ = _matrices(3)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = Matrix(first.tensor.float()).then(Matrix(second.tensor.float()))
        applied = Matrix(first.tensor.float()).apply(state.float())
    assert narrow.tensor.dtype == applied.dtype == torch.float32
    wide = second.tensor.float().double() @ first.tensor.float().double()
    assert torch.equal(narrow.tensor, wide.float())
    assert torch.equal(applied, (first.tensor.float().double() @ state.float().double()).float())


class Forgetful(StatefulOp):
    """A sum whose local passes need no transition: the forward returns none, and the backward is one pass."""

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        initial = torch.zeros_like(inputs[0][:, 0]) if initial is None else initial
        y = initial.unsqueeze(1) + inputs[0].cumsum(1)
        return FusedForward(initial, y, (), None, y[:, -1].clone())

    def fused_backward(self, inputs: tuple[Tensor, ...], *context: Any) -> Any:
        grad, final_grad, need_initial_grad = context[-3:]
        final_grad = torch.zeros_like(grad[:, 0]) if final_grad is None else final_grad
        to_x = final_grad.unsqueeze(1) + grad.flip(1).cumsum(1).flip(1)
        return (to_x,), to_x[:, 0].clone() if need_initial_grad else None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_local_pass_may_need_no_transition(compiled: bool) -> None:
    x, state = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    segments = torch.zeros(2, 5, dtype=torch.long)

    def run(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = scan(Forgetful(), x, segments=segments, carry=Carry(state))
        return y, after.state

    fn = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    y, final = fn(x, state)
    torch.testing.assert_close(y, state.unsqueeze(1) + x.cumsum(1))
    torch.testing.assert_close(final, y[:, -1])
    to_x, to_state = torch.autograd.grad(y.sum() + 3 * final.sum(), [x, state])
    torch.testing.assert_close(to_x, (3 + torch.arange(5.0, 0, -1)).view(1, 5, 1).expand_as(x))
    torch.testing.assert_close(to_state, torch.full_like(state, 8.0))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_a_named_backend_decodes(backend: str) -> None:
    """A step of decoding is in fp64, which not every backend serves; a backend that does not exist is refused."""
    if backend == "cpu" and not native.compiler():
        pytest.skip("no C++ compiler")
    q = torch.randn(1, 6, 2, 4)
    for op, inputs in ((LinearAttention, (q, q, q)), (DeltaRule, (q, q, q, q[..., 0]))):
        before, step = (tuple(x[:, tokens] for x in inputs) for tokens in (slice(5), slice(5, 6)))
        carry = scan(op(backend=backend), *before)[1]
        y, after = scan(op(backend=backend), *step, carry=carry)
        assert y.dtype == torch.float32 and after.state.dtype == torch.float64
        torch.testing.assert_close(y, scan(op(backend=backend), *inputs)[0][:, 5:])
        with pytest.raises(InputError, match="abacus"):
            scan(op(backend="abacus"), *step, carry=carry)
