"""Element-wise attention: every backend against the definition, the definition against the exact attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from helpers import assert_close, run_distributed
from torch import Tensor

from longreach.errors import InputError
from longreach.kernels.elementwise import (
    BACKENDS,
    ElementwiseAttention,
    chunked,
    elementwise_attention,
    exact_elementwise_attention,
    reference_elementwise_attention,
)
from longreach.kernels.scan import Carry, scan
from longreach.parallel.mesh import Axis
from longreach.parallel.relay import AxisStateExchange
from longreach.parallel.traffic import Traffic

BATCH, WIDTH = 2, 3
LENGTHS = [1, 2, 63, 64, 65, 128, 129, 500]
DOCUMENTS = ["none", "many", "spanning", "single"]
RESULTS = ["y", "final state", "dq", "dk", "dv", "initial state's gradient"]


def assert_all_close(
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    rms: float,
    largest: float | None = None,
    names: Sequence[str] = RESULTS,
) -> None:
    """Relative RMS error below ``rms``, and the largest error below ``largest`` (10 rms) times the largest value.

    Errors are relative to the truth's size, or to 0.05 where it is smaller: dq of a token alone is 0, but for rounding.
    """
    assert len(got) == len(want) <= len(names)
    for name, x, truth in zip(names, got, want):
        assert truth.isfinite().all(), name
        limit = 10 * rms if largest is None else largest
        size = truth.double().abs().max().clamp(min=0.05) if truth.numel() else 0.0
        assert_close(name, x, truth, max_abs=limit * size, rel_rms=rms, rms_floor=0.05)


def make_inputs(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, BATCH, length, WIDTH, dtype=torch.float64)
    return (0.7 * q).to(dtype), (0.7 * k).to(dtype), v.to(dtype)


def make_segments(kind: str, length: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "single":
        return torch.arange(length).expand(BATCH, -1).clone()
    begins = torch.rand(BATCH, length) < (0.3 if kind == "many" else 0.012)
    if kind == "spanning" and length > 70:
        begins[0, 64] = True  # at the edge of a chunk, too
    begins[:, 0] = False
    return 5 + begins.long().cumsum(dim=1)


def make_carry(order: int, segments: Tensor | None, dtype: torch.dtype = torch.float64) -> Carry:
    """The carry behind 9 tokens: their document goes on in row 0, and ends in row 1 (with documents)."""
    _, carry = reference_elementwise_attention(*make_inputs(9, dtype), order=order)
    if segments is None:
        return carry
    return Carry(carry.state, segments[:, 0] - torch.tensor([0, 1]))


def run(
    inputs: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    *,
    carry: Carry | None = None,
    segments: Tensor | None = None,
    **options: object,
) -> list[Tensor]:
    """Output, outgoing state, and the gradients of q, k, v and of the incoming state if there is one."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    if carry is not None:
        leaves.append(carry.state.detach().clone().requires_grad_())
        carry = Carry(leaves[3], carry.segment)
    y, end = elementwise_attention(*leaves[:3], carry=carry, segments=segments, **options)  # type: ignore[arg-type]
    assert y.dtype == inputs[0].dtype
    if segments is not None:
        assert end.segment is not None and end.segment.equal(segments[:, -1])
    grads = grads[0].to(y.dtype), grads[1].to(end.state.dtype)
    return [y.detach(), end.state.detach(), *torch.autograd.grad([y, end.state], leaves, grads)]


def make_grads(length: int, order: int) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(BATCH, length, WIDTH, dtype=torch.float64),
        torch.randn(BATCH, 2, order + 1, WIDTH, dtype=torch.float64),
    )


def compare(
    length: int,
    order: int,
    causal: bool,
    documents: str,
    with_carry: bool,
    dtype: torch.dtype,
    rms: float,
    backend: str = "chunked",
) -> None:
    """A backend in ``dtype`` against the definition in fp64, on the same numbers."""
    if lack := BACKENDS.options[backend].unsupported_reason("cpu", dtype, order):
        pytest.skip(lack)
    inputs = make_inputs(length, dtype)
    segments = make_segments(documents, length)
    carry = make_carry(order, segments, dtype) if with_carry else None
    y_grad, state_grad = make_grads(length, order)
    grads = y_grad.to(dtype), state_grad
    options = {"order": order, "causal": causal, "segments": segments}
    got = run(inputs, grads, carry=carry, backend=backend, **options)
    wide_carry = None if carry is None else Carry(carry.state.double(), carry.segment)
    q, k, v = (x.double() for x in inputs)
    want = run((q, k, v), grads, carry=wide_carry, backend="reference", **options)
    assert_all_close(got, want, rms)


@pytest.mark.parametrize(
    "backend, dtype, rms", [("chunked", torch.float64, 1e-12), ("cpu", torch.float32, 5e-6)], ids=["chunked", "cpu"]
)
@pytest.mark.parametrize("with_carry", [False, True], ids=["", "carry"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_definition(
    length: int, causal: bool, documents: str, with_carry: bool, backend: str, dtype: torch.dtype, rms: float
) -> None:
    """Catches a wrong adjoint, a padded token that counts, a state that reaches a foreign document."""
    if documents == "single" and dtype == torch.float32:
        rms = 4e-5  # dq is 0 for a token alone, the difference of two equal numbers
    compare(length, 4, causal, documents, with_carry, dtype, rms, backend)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize("order", [2, 6, 8])
def test_equals_the_definition_at_every_order(order: int, causal: bool) -> None:
    for documents in ("none", "spanning"):
        for length in (1, 129, 500):
            compare(length, order, causal, documents, True, torch.float64, 1e-12)


@pytest.mark.parametrize(
    "backend, dtype, rms",
    [
        ("chunked", torch.float32, 2e-6),
        ("chunked", torch.bfloat16, 2.5e-3),
        ("chunked", torch.float16, 3e-4),
        ("cpu", torch.float32, 5e-6),
        ("cpu", torch.bfloat16, 2.5e-3),
    ],
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_equals_the_definition_in_every_dtype(backend: str, dtype: torch.dtype, rms: float, causal: bool) -> None:
    """Catches sums in the dtype of the inputs: the errors allowed are those of rounding outputs and gradients once."""
    for order in (2, 4, 6, 8) if backend == "cpu" else (2, 4, 6):
        for documents in ("none", "many", "spanning"):
            for length in (65, 500):
                compare(length, order, causal, documents, True, dtype, rms, backend)


def test_threads_and_strides_change_nothing() -> None:
    """Catches channels that two threads share or none takes, and tokens that are taken for neighbours in memory."""
    if lack := BACKENDS.options["cpu"].unsupported_reason("cpu", torch.float32, 6):
        pytest.skip(lack)
    wide = torch.randn(3, 70, 3 * 80)
    q, k, v = wide.chunk(3, dim=-1)
    grads = torch.randn(3, 70, 80), torch.randn(3, 2, 7, 80)
    want = run((q.contiguous(), k.contiguous(), v.contiguous()), grads, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            y, end = elementwise_attention(q, k, v, backend="cpu")
            assert y.equal(want[0]) and end.state.equal(want[1])
            for got, truth in zip(run((q, k, v), grads, backend="cpu"), want):
                assert got.equal(truth)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_equals_the_definition_over_slabs(causal: bool, documents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches states that are lost between the slabs in which a long shard is worked on."""
    for chunks in (1, 3):
        monkeypatch.setitem(chunked.SLAB_ELEMENTS, "cpu", chunks * 64 * BATCH * WIDTH)
        compare(500, 4, causal, documents, True, torch.float64, 1e-12)


@pytest.mark.parametrize("documents", ["none", "many", "edge"])
def test_shards_equal_the_whole(documents: str) -> None:
    """Catches a carry that loses a document, outputs and gradients alike; "edge": a document begins at each cut."""
    length, order = 200, 6
    inputs, grads = make_inputs(length), make_grads(length, order)
    segments = make_segments("many" if documents == "edge" else documents, length)
    for cuts in ([0, 77, 200], [0, 1, 128, 200], [0, 64, 64, 200]):
        if documents == "edge":
            begins = torch.zeros(BATCH, length, dtype=torch.int64)
            begins[:, cuts[1:-1]] = 1
            segments = begins.cumsum(dim=1)
        carry = make_carry(order, segments)
        want = run(inputs, grads, carry=carry, segments=segments, order=order)
        leaves = [x.clone().requires_grad_() for x in (*inputs, carry.state)]
        now, parts = Carry(leaves[3], carry.segment), []
        for first, last in pairwise(cuts):
            ids = None if segments is None else segments[:, first:last]
            y, now = elementwise_attention(
                *(x[:, first:last] for x in leaves[:3]), order=order, carry=now, segments=ids
            )
            parts.append(y)
        out = [torch.cat(parts, dim=1), now.state]
        assert_all_close([*(x.detach() for x in out), *torch.autograd.grad(out, leaves, grads)], want, 1e-12)


def test_decoding_token_by_token_equals_the_whole() -> None:
    inputs = make_inputs(70, torch.float32)
    segments = make_segments("many", 70)
    with torch.no_grad():
        want, end = elementwise_attention(*inputs, segments=segments)
        carry, parts = None, []
        for i in range(70):
            y, carry = elementwise_attention(
                *(x[:, i : i + 1] for x in inputs), carry=carry, segments=segments[:, i : i + 1]
            )
            parts.append(y)
    assert carry is not None
    assert_all_close([torch.cat(parts, dim=1), carry.state], [want, end.state], 1e-6)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_gradients_are_derivatives(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences, independent of the reference; chunks of 2, slabs of 1, so that states cross their edges."""
    monkeypatch.setattr(chunked, "CHUNK_LEN", 2)
    monkeypatch.setitem(chunked.SLAB_ELEMENTS, "cpu", 1)
    for order, documents in ((2, "none"), (4, "many")):
        segments = None if documents == "none" else torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 2]])
        carry = make_carry(order, segments)
        inputs = [x[..., :1].clone().requires_grad_() for x in (*make_inputs(5), carry.state)]

        def outputs(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            state: Tensor,
            order: int = order,
            segments: Tensor | None = segments,
            ids: Tensor | None = carry.segment,
        ) -> tuple[Tensor, Tensor]:
            y, end = elementwise_attention(
                q, k, v, order=order, causal=causal, carry=Carry(state, ids), segments=segments
            )
            return y, end.state

        assert torch.autograd.gradcheck(outputs, inputs)


def test_no_tokens() -> None:
    """A rank with an empty share passes the carry on: A = 1, B = 0."""
    inputs = make_inputs(0)
    carry = make_carry(6, None)
    for causal in (True, False):
        decay, state = ElementwiseAttention(6, causal).resolve_backend(inputs).local_transition(inputs, None)
        assert decay.eq(1).all() and state.eq(0).all()
        grads = make_grads(0, 6)
        y, end, *input_grads, carry_grad = run(inputs, grads, carry=carry, causal=causal)
        assert y.shape == (BATCH, 0, WIDTH) and all(x.shape == y.shape for x in input_grads)
        assert end.equal(carry.state) and carry_grad.equal(grads[1])


def error_bound(reach: float, order: int, v: Tensor) -> float:
    """How far the series may be from the exact attention where ``|2 q k| <= reach`` for all pairs of tokens.

    Taylor's remainder relative to ``exp(x)`` is at most ``e = reach^(t+1) / (t+1)! * exp(reach)`` on either side of 0.
    With exact weights p and relative errors d, ``|d| <= e``: ``y_series - y = sum p d (v - y) / sum p (1 + d)``, so its
    magnitude is at most ``e / (1 - e)`` times the range of v.
    """
    e = reach ** (order + 1) / math.factorial(order + 1) * math.exp(reach)
    return e / (1 - e) * float(v.max() - v.min())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_series_nears_the_exact_attention(causal: bool) -> None:
    """Catches a missing factor 2 or a missing exp(-k^2): the error must obey the bound at every order, and shrink."""
    reach = 0.7  # the 10% range of order 2
    limit = math.sqrt(reach / 2)
    q, k, v = torch.rand(3, 1, 200, 4, dtype=torch.float64) * 2 - 1
    q, k = q * limit, k * limit
    segments = (torch.rand(1, 200) < 0.05).long().cumsum(dim=1)
    exact = exact_elementwise_attention(q, k, v, causal=causal, segments=segments)
    errors = []
    for order in (2, 4, 6, 8):
        y, _ = elementwise_attention(q, k, v, order=order, causal=causal, segments=segments)
        errors.append((y - exact).abs().max().item())
        assert errors[-1] <= error_bound(reach, order, v), order
    assert all(later < earlier / 10 for earlier, later in pairwise(errors)), errors


def test_exact_attention_is_stable() -> None:
    """Far-away keys: the nearest one wins, where a plain exp would give 0 / 0."""
    q, k, v = torch.tensor([[[300.0]]]), torch.tensor([[[100.0], [200.0]]]), torch.tensor([[[1.0], [2.0]]])
    y = exact_elementwise_attention(q.expand(1, 2, 1), k, v, causal=False)
    assert y.equal(torch.full((1, 2, 1), 2.0))


def extreme_inputs(length: int) -> Tensor:
    """q, k, v and upstream gradients of magnitudes up to 1e4, ``[4, cases, length, width]``: mixed, and the corners."""
    signs = torch.randn(4, 1, length, WIDTH, dtype=torch.float64).sign()
    cases = [signs * 10 ** (torch.rand(4, 1, length, WIDTH, dtype=torch.float64) * 9 - 5), signs * 1e4]
    # Keys where exp(-k^2) is tiny, denormal or 0 (fp32, fp64); queries from nothing to far outside; the largest v, g.
    for key in (5.0, 8.0, 8.4, 9.5, 10.1, 10.3, 26.0):
        for query in (0.0, 1e-3, 1.0, 30.0, 1e4):
            sizes = torch.tensor([query, key, 1e4, 1e4], dtype=torch.float64).view(4, 1, 1, 1)
            cases += [signs * sizes, sizes.expand_as(signs)]
    return torch.cat(cases, dim=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_finite_inputs_give_finite_results(backend: str, dtype: torch.dtype) -> None:
    """Catches 0/0 where all weights underflow, 0*inf in powers and in gradients, and overflow of fp16."""
    for order in (2, 4, 6, 8):
        for length in (1, 70):
            q, k, v, grad = extreme_inputs(length).to(dtype)
            state_grad = torch.randn(len(q), 2, order + 1, WIDTH)
            state = make_carry(order, None, dtype).state[:1].expand(len(q), -1, -1, -1)
            for causal in (True, False):
                for carry in (None, Carry(state)):
                    got = run((q, k, v), (grad, state_grad), carry=carry, order=order, causal=causal, backend=backend)
                    assert all(x.isfinite().all() for x in got), (order, length, causal)


@pytest.mark.parametrize("guard", ["floored", "clamped", "underflow", "saturated"])
def test_guards_are_those_of_the_definition(guard: str) -> None:
    """Catches a backend whose results differ from the others' where a guard acts."""
    q, k, v = make_inputs(130)
    grads = make_grads(130, 4)
    if guard == "floored":  # every denominator, also with no gradient through it
        k = 9.5 + 0.1 * k
        grads = grads[0] * 1e-8, torch.zeros_like(grads[1])
    elif guard == "clamped":
        q[:, 50:] *= 1e4
        assert (q.abs() > 1000).any()
    elif guard == "underflow":
        k[:, :100] *= 1e3
    else:
        v = v.abs() + 3
        grads = grads[0] * 1e27, grads[1]
    for causal in (True, False):
        got = run((q, k, v), grads, order=4, causal=causal, backend="chunked")
        want = run((q, k, v), grads, order=4, causal=causal, backend="reference")
        sizes = [x.abs().max() for x in want]
        assert_all_close([x / size for x, size in zip(got, sizes)], [x / size for x, size in zip(want, sizes)], 1e-9)
        if guard == "clamped":
            assert got[2][q.abs() > 1000].eq(0).all()


def test_a_million_tokens_keep_their_digits() -> None:
    """Catches a long running sum in fp32, forward and backward: against plain fp64 sums, relative error <= 1e-5."""
    length = 2**20
    q, k, v = torch.randn(3, 1, length, 1).mul_(0.5)
    v = v + 1  # sums that grow
    k = k + 0.2 * v  # keys that tell of values: else dq is 0 but for noise
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y, end = elementwise_attention(*leaves)
    grad = torch.randn_like(y) + 1
    grads = torch.autograd.grad(y, leaves, grad)
    with torch.no_grad():
        q, k, v, g = (x.detach().double() for x in (q, k, v, grad))
        weight = torch.exp(-k * k)
        coefficients = [2.0**n / math.factorial(n) for n in range(7)]
        s = [(k**n * weight * v).cumsum(dim=1) for n in range(7)]
        z = [(k**n * weight).cumsum(dim=1) for n in range(7)]
        den = sum(c * q**n * z_n for n, (c, z_n) in enumerate(zip(coefficients, z)))
        truth = sum(c * q**n * s_n for n, (c, s_n) in enumerate(zip(coefficients, s))) / den
        a = g / den
        dq = a * sum(2 * c * q**n * (s[n + 1] - truth * z[n + 1]) for n, c in enumerate(coefficients[:-1]))
        dv = 0
        dk = 0
        for n, c in enumerate(coefficients):
            r = (c * q**n * a).flip(1).cumsum(dim=1).flip(1)
            u = -(c * q**n * a * truth).flip(1).cumsum(dim=1).flip(1)
            dv = dv + weight * k**n * r
            lower = n * k ** (n - 1) if n else torch.zeros_like(k)
            dk = dk + weight * (lower - 2 * k ** (n + 1)) * (v * r + u)
        state = torch.stack([torch.stack([x[:, -1] for x in sums], dim=1) for sums in (s, z)], dim=1)
    for got, want in ((y, truth), (end.state, state), (grads[0], dq), (grads[1], dk), (grads[2], dv)):
        error = (got.detach().double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error <= 1e-5, f"{error:.1e}"
    assert (y.detach().double() - truth).abs().max() / truth.abs().max() <= 1e-5


def test_mixed_dtypes_are_refused_by_the_operator_itself() -> None:
    """Catches C++ that reads bf16 as fp32: a mixer calls `scan` without the public function's checks."""
    q, k, v = torch.randn(3, 1, 70, 16)
    with pytest.raises(InputError, match="dtypes of q, k, v"):
        scan(ElementwiseAttention(), q, k, v.bfloat16())


def test_autocast_leaves_the_sums_alone() -> None:
    """Catches a sum over a block that autocast turns into a product in bf16."""
    inputs, grads = make_inputs(200, torch.float32), make_grads(200, 6)
    want = run(inputs, grads, segments=make_segments("none", 200))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(inputs, grads)
    assert all(x.equal(truth) for x, truth in zip(got, want))


def local_results(
    axis: Axis,
    cases: list[tuple[list[int], bool, tuple[Tensor, ...], tuple[Tensor, Tensor], Carry | None, Tensor | None]],
) -> list[tuple[list[Tensor], int]]:
    """This rank's outputs and gradients of every case, and the bytes that it sent."""
    results = []
    for shares, causal, inputs, (y_grad, state_grad), carry, segments in cases:
        first = sum(shares[: axis.rank])
        mine = slice(first, first + shares[axis.rank])
        traffic = Traffic()
        leaves = [x[:, mine].clone().requires_grad_() for x in inputs]
        if carry is not None:
            leaves.append(carry.state.clone().requires_grad_())
            carry = Carry(leaves[3], carry.segment)
        y, end = elementwise_attention(
            *leaves[:3],
            order=4,
            causal=causal,
            carry=carry,
            segments=None if segments is None else segments[:, mine],
            relay=AxisStateExchange(axis, traffic.counter("", "scan")),
        )
        grads = torch.autograd.grad([y, end.state], leaves, [y_grad[:, mine], state_grad])
        results.append(([y.detach(), end.state.detach(), *grads], traffic.bytes["", "scan"]))
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_shards_on_ranks_equal_the_whole(ranks: int) -> None:
    """Catches a state folded in the wrong order or direction, a lost summand, a share of no or one token."""
    length = 150
    shares = {
        2: [[75, 75], [150, 0]],
        3: [[70, 0, 80], [1, 2, 147]],
        4: [[0, 65, 0, 85], [129, 1, 1, 19]],
    }[ranks]
    cases = []
    for share in shares:
        for causal in (True, False):
            for documents in ("none", "many", "spanning"):
                segments = make_segments(documents, length)
                if segments is not None and documents == "spanning":
                    segments[1] = 7  # one document over all ranks
                for carry in (None, make_carry(4, segments)):
                    cases.append((share, causal, make_inputs(length), make_grads(length, 4), carry, segments))
    answers = run_distributed(local_results, ranks, cases)
    state_bytes = 8 * BATCH * 2 * 5 * WIDTH  # in fp64
    for case, (share, causal, inputs, grads, carry, segments) in enumerate(cases):
        want = run(inputs, grads, carry=carry, segments=segments, order=4, causal=causal)
        parts = [answers[rank][case][0] for rank in range(ranks)]
        joined = [torch.cat([part[i] for part in parts], dim=1) for i in (0, 2, 3, 4)]
        assert_all_close(joined, [want[i] for i in (0, 2, 3, 4)], 1e-10, names=["y", "dq", "dk", "dv"])
        for part in parts:  # the carry and its gradient are the same, and whole, on every rank
            assert_all_close([part[1], *part[5:]], [want[1], *want[5:]], 1e-10, names=[RESULTS[1], RESULTS[5]])
        ways = 2 if segments is not None and not causal else 1
        sent = 2 * ways * state_bytes + (8 if segments is None else 8 * BATCH)  # independent of the length
        assert [answers[rank][case][1] for rank in range(ranks)] == [sent] * ranks, (share, causal, segments is None)


GOOD = {
    "q": torch.zeros(2, 4, 3),
    "k": torch.zeros(2, 4, 3),
    "v": torch.zeros(2, 4, 3),
    "carry": Carry(torch.zeros(2, 2, 7, 3), torch.zeros(2, dtype=torch.int64)),
    "segments": torch.zeros(2, 4, dtype=torch.int64),
}


@pytest.mark.parametrize(
    "wrong, field",
    [
        ({"order": 3}, "order"),
        ({"order": 0}, "order"),
        ({"order": -2}, "order"),
        ({"order": 2.0}, "order"),
        ({"q": torch.zeros(4, 3)}, "shape of q"),
        ({"q": torch.zeros(2, 4, 3).long()}, "dtype of q"),
        ({"k": torch.zeros(2, 5, 3)}, "shape of k"),
        ({"v": torch.zeros(2, 4, 1)}, "shape of v"),
        ({"v": torch.zeros(2, 4, 3).bfloat16()}, "dtype of v"),
        ({"segments": torch.zeros(2, 3).long()}, "shape of segments"),
        ({"segments": torch.zeros(2, 4)}, "dtype of segments"),
        ({"order": 4}, "shape of carry.state"),
        ({"carry": Carry(torch.zeros(2, 2, 7, 3).bfloat16())}, "dtype of carry.state"),
        ({"carry": Carry(torch.zeros(2, 2, 7, 3), torch.zeros(2, 1).long())}, "shape of carry.segment"),
        ({"backend": "fast"}, "backend"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_mistake_is_told_in_one_line(wrong: dict[str, object], field: str) -> None:
    elementwise_attention(**GOOD)  # type: ignore[arg-type]
    with pytest.raises(InputError) as caught:
        elementwise_attention(**{**GOOD, **wrong})  # type: ignore[arg-type]
    assert field in str(caught.value) and "\n" not in str(caught.value)
