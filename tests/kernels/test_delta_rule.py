"""The delta rule: the recurrence, and transformers, against the chunked path, outputs and all gradients, however the
sequence is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, run_distributed
from torch import Tensor

from longreach.errors import InputError
from longreach.kernels.delta_rule import BACKENDS, DeltaRule, chunked, delta_rule, reference_delta_rule
from longreach.kernels.scan import Carry, StateExchange, scan
from longreach.parallel.mesh import Axis, node_axes
from longreach.parallel.relay import AxisStateExchange
from longreach.parallel.span import Span
from longreach.parallel.traffic import Traffic

BATCH, GROUPS, HEADS, WIDTH, VALUES = 2, 2, 4, 5, 7
GATES = (None, "head", "channel")


@pytest.fixture(autouse=True)
def unwritten_memory_shows() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors this small, a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk or two per slab, so that short sequences have several slabs."""
    monkeypatch.setattr(chunked, "CPU_WORKSPACE", 1 << 18)


@pytest.fixture
def cpp() -> None:
    """Skips where no C++ can be compiled."""
    if lack := BACKENDS.options["cpu"].unsupported_reason("cpu", WIDTH, VALUES, False, torch.float32):
        pytest.skip(lack)


def make(
    length: int,
    gate: str | None,
    groups: int = HEADS,
    documents: bool = False,
    norm: bool = False,
    strength: float = 1,
    width: int = WIDTH,
    values: int = VALUES,
) -> dict[str, Any]:
    """Inputs, upstream gradients, a carry and documents, of which row 1 does not continue the carry's; fp64."""
    torch.manual_seed(length)
    q, k = torch.randn(2, BATCH, length, groups, width, dtype=torch.float64)
    v = torch.randn(BATCH, length, HEADS, values, dtype=torch.float64)
    inputs = [q, k if norm else F.normalize(k, dim=-1), v, 2 * torch.rand(BATCH, length, HEADS, dtype=torch.float64)]
    if gate:
        shape = (*v.shape[:3], width) if gate == "channel" else v.shape[:3]
        inputs.append(-strength * torch.rand(shape, dtype=torch.float64))
    segments = torch.stack([(torch.rand(length) < share).cumsum(0) for share in (0.05, 0.02)]) if documents else None
    state = torch.randn(BATCH, HEADS, width, values, dtype=torch.float64)
    ids = None if segments is None else torch.tensor([0, -1]) + (segments[:, 0] if length else 0)
    upstream = [torch.randn_like(v), torch.randn_like(state)]
    return {"inputs": inputs, "segments": segments, "carry": Carry(state, ids), "upstream": upstream, "norm": norm}


def call(fn: Callable[..., Any], inputs: list[Tensor], **options: Any) -> tuple[Tensor, Carry]:
    gate = inputs[4] if len(inputs) == 5 else None
    found: tuple[Tensor, Carry] = fn(*inputs[:4], log_decay=gate, **options)
    return found


def all_of(fn: Callable[..., Any], data: dict[str, Any], dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Output, final state, the gradients of the inputs and that of the initial state."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in data["inputs"]]
    state = data["carry"].state.clone().requires_grad_()
    carry = Carry(state, data["carry"].segment)
    options = {"carry": carry, "segments": data["segments"], "normalize_qk": data["norm"], **options}
    y, after = call(fn, leaves, **options)
    upstream = [data["upstream"][0].to(y.dtype), data["upstream"][1].to(after.state.dtype)]
    grads = torch.autograd.grad([y, after.state], [*leaves, state], upstream, materialize_grads=True)
    return [y.detach(), after.state.detach(), *grads]


def assert_all_close(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    names = ["y", "state", "dq", "dk", "dv", "dbeta", *(["dlog_decay"] if len(found) == 8 else []), "dinitial"]
    for name, got, want in zip(names, found, wanted, strict=True):
        assert_close(name, got, want, rel_rms=limit, rms_floor=1e-3 if got.dtype == torch.float64 else 1e-2)


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 200])
def test_chunks_are_the_recurrence(length: int, gate: str | None) -> None:
    for groups, documents, norm in (
        (HEADS, False, False),
        (GROUPS, False, True),
        (HEADS, True, True),
        (GROUPS, True, False),
    ):
        data = make(length, gate, groups, documents, norm)
        assert_all_close(all_of(delta_rule, data), all_of(reference_delta_rule, data), 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_the_reference_backend(gate: str | None) -> None:
    """Its adjoints are those that `StatefulOp` derives."""
    data = make(20, gate, GROUPS, True)
    assert_all_close(all_of(delta_rule, data, backend="reference"), all_of(reference_delta_rule, data), 1e-12)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1100])
def test_cpp(length: int, dtype: torch.dtype) -> None:
    """In C++: several states are saved at the greatest length; K and V of whole vectors, and not."""
    flags = ((False, False), (True, True)) if length > 100 else product((False, True), repeat=2)
    for gate, (documents, norm) in product((None, "head"), flags):
        size = {"width": 5, "values": 48} if documents else {"width": 64, "values": 7}
        data = make(length, gate, GROUPS, documents, norm, **size)
        data["inputs"] = [x.to(dtype).double() for x in data["inputs"]]
        data["upstream"][0] = data["upstream"][0].to(dtype).double()
        found = all_of(delta_rule, data, dtype, backend="cpu")
        assert found[0].dtype == found[2].dtype == dtype and found[1].dtype == torch.float32
        assert_all_close(found, all_of(delta_rule, data), 3e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.usefixtures("cpp")
def test_cpp_takes_views() -> None:
    """q, k and v of one projection, and the gradient of a sum, which is an expanded number."""
    found = []
    for backend in ("cpu", "chunked"):
        x = torch.randn(2, 70, 4, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        beta, q, k, v = x[..., 0].sigmoid(), *x.split(8, dim=-1)
        y, _ = delta_rule(q, k, v, beta, log_decay=-x[..., 1].exp(), normalize_qk=True, backend=backend)
        found.append([y, *torch.autograd.grad(y.sum(), x)])
    for got, want in zip(*found, strict=True):
        assert_close("view", got, want, rel_rms=2e-6)


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("strength", [30.0, 3000.0])
def test_strong_decays(gate: str, strength: float) -> None:
    """Catches an exponential of a difference above 0, which overflows, and sums that forget weak decays beside them."""
    data = make(150, gate, strength=strength)
    decay = data["inputs"][4]
    decay[:, ::3] *= 1e-4
    decay[:, 40:80] *= 1e-3
    assert_all_close(all_of(delta_rule, data), all_of(reference_delta_rule, data), 1e-10)
    decay[0, 50] = -torch.inf
    for backend in ("auto", "chunked"):
        found = all_of(delta_rule, data, torch.float32, backend=backend)
        assert_all_close(found, all_of(reference_delta_rule, data), 3e-6)


def test_scale() -> None:
    data = make(10, "head")
    y, _ = call(delta_rule, data["inputs"], scale=1.0)
    torch.testing.assert_close(call(delta_rule, data["inputs"])[0], y * WIDTH**-0.5)


def theirs(name: str) -> Callable[..., tuple[Tensor, Carry]]:
    """A function of transformers, with the interface of `delta_rule`."""
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    fn = getattr(kimi if "kimi" in name else qwen, name)
    fn = getattr(fn, "__wrapped__", fn)

    def run(*x: Tensor, log_decay: Tensor, carry: Carry, segments: None, normalize_qk: bool) -> tuple[Tensor, Carry]:
        q, k, v, beta = x
        y, state = fn(
            q,
            k,
            v,
            g=log_decay,
            beta=beta,
            initial_state=carry.state.float(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=normalize_qk,
        )
        return y, Carry(state)

    return run


@pytest.mark.parametrize(
    "name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "chunk_kimi_delta_attention"]
)
def test_it_is_what_transformers_computes(name: str) -> None:
    pytest.importorskip("transformers")
    kimi = "kimi" in name
    data = make(100, "channel" if kimi else "head", HEADS if kimi else GROUPS, norm=True)
    wanted = all_of(theirs(name), data, torch.float32)
    assert_all_close(all_of(delta_rule, data, torch.float32), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", GATES)
def test_narrow_dtypes(gate: str | None, dtype: torch.dtype) -> None:
    """States and sums are in fp32; outputs and gradients are rounded once."""
    data = make(200, gate, GROUPS, True, True)
    data["inputs"] = [x.to(dtype).double() for x in data["inputs"]]
    found = all_of(delta_rule, data, dtype)
    assert [x.dtype for x in found] == [dtype, torch.float32, *[dtype] * (len(found) - 3), torch.float64]
    data["upstream"][0] = data["upstream"][0].to(dtype).double()
    assert_all_close(found, all_of(reference_delta_rule, data), 2e-6 if dtype == torch.float32 else 4e-3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = all_of(delta_rule, data, dtype)
    assert all(torch.equal(a, b) for a, b in zip(cast, found, strict=True))


def test_adjoint_without_some_gradients() -> None:
    """A loss of the output or of the final state alone, and inputs that need no gradient."""
    data = make(70, "channel")
    for used in (0, 1):
        grads = []
        for fn in (delta_rule, reference_delta_rule):
            leaves = [x.clone().requires_grad_(number != 1) for number, x in enumerate(data["inputs"])]
            y, after = call(fn, leaves)
            wanted = [x for x in leaves if x.requires_grad]
            upstream = data["upstream"][used]
            grads.append(torch.autograd.grad((y, after.state)[used], wanted, upstream, materialize_grads=True))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def in_pieces(
    *x: Tensor, log_decay: Tensor | None, cuts: list[int], carry: Carry, segments: Any, **options: Any
) -> Any:
    """`delta_rule` shard by shard, each from the carry of the one before."""
    rows, inputs = [], [*x, *([] if log_decay is None else [log_decay])]
    for length, stop in zip(cuts, accumulate(cuts), strict=True):
        tokens = slice(stop - length, stop)
        ids = None if segments is None else segments[:, tokens]
        shard = [part[:, tokens] for part in inputs]
        y, carry = call(delta_rule, shard, carry=carry, segments=ids, **options)
        rows.append(y)
    return torch.cat(rows, 1), carry


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("gate", GATES)
def test_streamed_and_decoded(gate: str | None) -> None:
    for documents, cuts in product((False, True), ([100, 0, 100], [1] * 12 + [188], [63, 64, 73])):
        data = make(200, gate, GROUPS, documents)
        assert_all_close(all_of(in_pieces, data, cuts=cuts), all_of(delta_rule, data), 1e-12)


def test_decoding_holds_states_in_fp64() -> None:
    data = make(300, "head")
    inputs, carry = [x.float() for x in data["inputs"]], Carry(data["carry"].state)
    with torch.no_grad():
        y, after = in_pieces(*inputs[:4], log_decay=inputs[4], cuts=[1] * 300, carry=carry, segments=None)
        wide, want = call(delta_rule, [x.double() for x in inputs], carry=carry)
    assert y.dtype == torch.float32 and after.state.dtype == torch.float64
    assert_close("state", after.state, want.state, rel_rms=1e-13)
    assert_close("y", y, wide, rel_rms=1e-6)


def exchange(axis: Axis, relay: str, traffic: Traffic | None = None) -> StateExchange:
    axis = replace(axis, relay=relay)
    if relay == "hierarchical":  # nodes of two ranks
        node, peers = node_axes([axis.ranks], 2)
        axis = replace(axis, node=node, peers=peers)
    return AxisStateExchange(axis, *([] if traffic is None else [traffic.counter("layer", "scan")]))


def on_rank(axis: Axis, shares: list[int], cases: list[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    """What this rank computes of the whole, for each relay, backend and data: as `all_of`."""
    stop = list(accumulate(shares))[axis.rank]
    tokens = slice(stop - shares[axis.rank], stop)
    results = []
    for relay, backend, data in cases:
        own = dict(data, inputs=[x[:, tokens] for x in data["inputs"]])
        own["segments"] = None if data["segments"] is None else data["segments"][:, tokens]
        own["upstream"] = [data["upstream"][0][:, tokens], data["upstream"][1]]
        given = exchange(axis, relay) if axis.size > 1 else None
        dtype = torch.float32 if backend == "cpu" else torch.float64
        results.append(all_of(delta_rule, own, dtype, backend=backend, relay=given))
    return results


@pytest.mark.parametrize(
    ("relays", "shares"),
    [
        (("gather", "pipeline", "recursive_doubling"), [70, 30]),
        (("gather", "pipeline", "recursive_doubling", "auto"), [3, 0, 1]),
        (("gather", "pipeline", "recursive_doubling", "hierarchical"), [10, 65, 1, 24]),
        (("gather", "pipeline", "recursive_doubling", "hierarchical"), [2, 2, 1, 0]),
    ],
)
def test_ranks_are_one_process(relays: tuple[str, ...], shares: list[int]) -> None:
    """Catches matrices multiplied in the wrong order or not transposed on the way back, and a document passed over."""
    cases, lack = [], BACKENDS.options["cpu"].unsupported_reason("cpu", WIDTH, VALUES, False, torch.float32)
    for gate, documents in (("head", False), ("channel", True), (None, True)):
        data = make(sum(shares), gate, GROUPS, documents)
        cases += [(relay, "chunked", data) for relay in relays]
        if sum(shares) < 10:
            cases += [(relay, "reference", data) for relay in relays]
        if gate != "channel" and not lack:
            cases.append((relays[0], "cpu", data))
    ranks = run_distributed(on_rank, len(shares), shares, cases)
    for case, (_, backend, data) in enumerate(cases):
        parts = [rank[case] for rank in ranks]
        whole = all_of(delta_rule, data)
        for mine in parts:
            joined = [torch.cat([part[i] for part in parts], 1) for i in (0, *range(2, len(whole) - 1))]
            assert_all_close([joined[0], mine[1], *joined[1:], mine[-1]], whole, 3e-6 if backend == "cpu" else 1e-12)


def sent(axis: Axis, relay: str, length: int) -> int:
    """Bytes that this rank sends of states, forward and backward, without a carry."""
    inputs = [x[:, :length].float().requires_grad_() for x in make(64, "head")["inputs"]]
    traffic = Traffic()
    y, _ = call(delta_rule, inputs, relay=exchange(axis, relay, traffic))
    y.sum().backward()
    return sum(traffic.bytes.values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_equal_the_formulas(ranks: int) -> None:
    """Catches an A where a state is enough. A pipeline's rank in the middle sends the same, however many ranks."""
    state, matrix = (4 * BATCH * HEADS * WIDTH * columns for columns in (VALUES, WIDTH))

    def doublings(places_after: int) -> int:
        """Maps that a rank sends: to those at distances 1, 2, 4, ... that exist, and to the next one."""
        steps = [1, *(2**n for n in range(8) if 2**n < ranks)]
        return sum(step <= places_after for step in steps)

    for relay in ("gather", "pipeline", "recursive_doubling", *(["hierarchical"] if ranks == 4 else [])):
        for length in (4, 64):
            for rank, found in enumerate(run_distributed(sent, ranks, relay, length)):
                after, last = ranks - 1 - rank, (rank == ranks - 1) * state  # which broadcasts the final state
                expected = {
                    "gather": 2 * state + matrix,  # the adjoint knows all matrices
                    "hierarchical": 4 * (state + matrix),
                    "pipeline": ((after > 0) + (rank > 0)) * state + last,
                    "recursive_doubling": (doublings(after) + doublings(rank)) * (state + matrix) + last,
                }
                assert found == expected[relay], (relay, rank)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_compiled(gate: str, packed: bool) -> None:
    """Traced, as one node of a graph, and run by it; its shapes are those that the graph was told."""
    data = make(70, gate, GROUPS, packed)
    dtype = torch.float32 if gate == "head" else torch.float64

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(*x: Tensor, **options: Any) -> tuple[Tensor, Carry]:
        y, carry = delta_rule(*(part * 1 for part in x), **options)
        return y * 1, carry

    found = all_of(run, data, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, all_of(delta_rule, data, dtype), strict=True))


def test_a_span_scans_it() -> None:
    data = make(70, "channel")
    op = DeltaRule(scale=0.5)
    y, _ = call(delta_rule, data["inputs"], scale=0.5)
    assert torch.equal(Span().scan(op, *data["inputs"]), y) and torch.equal(scan(op, *data["inputs"])[0], y)


@pytest.mark.parametrize("rate", [0.1, 4.6])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_gradients_of_gates_are_as_exact_as_others(backend: str, rate: float) -> None:
    """Catches differences of larger sums: at a decay of 0.01 (a rate of 4.6) they lose two more digits."""
    for documents in (False, True):
        data = make(700, "head", documents=documents, norm=True)
        data["inputs"][4] = torch.full_like(data["inputs"][4], -rate)
        found, want = all_of(delta_rule, data, torch.float32, backend=backend), all_of(delta_rule, data)
        for got, truth in zip(found, want, strict=True):
            assert_close("gradients", got, truth, rel_rms=2e-6)


def test_a_million_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decays 0.9999 and 0.01, beta 1 and 2, repeated keys, in bf16: outputs and gradients are numbers, and as exact at
    the end as at the beginning. Only these two parts are computed in fp64, with what their decays still see.
    """
    monkeypatch.setattr(chunked, "MAX_CHUNK", 32)  # less work
    length, width, values, edge = 1 << 20, 4, 2, 1 << 12
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, length, 4, width).bfloat16()
    for start in (2 * edge, length // 2, length - 4 * edge):
        k[:, start : start + 2 * edge] = k[:, start : start + 1]
    v, upstream = torch.randn(2, 1, length, 4, values).bfloat16()
    decay = torch.tensor([0.9999, 0.9999, 0.01, 0.01]).log().expand(1, length, 4)
    beta = torch.tensor([1.0, 2.0, 1.0, 2.0]).bfloat16().expand(1, length, 4)

    def run(tokens: slice, heads: slice, dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [x[:, tokens, heads].to(dtype or x.dtype).requires_grad_() for x in (q, k, v, beta, decay)]
        y, _ = call(delta_rule, leaves, normalize_qk=True)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream[:, tokens, heads].to(y.dtype))]

    found = run(slice(None), slice(None), None)
    assert all(bool(x.isfinite().all()) for x in found)
    names = ["y", "dq", "dk", "dv", "dbeta", "dlog_decay"]
    for heads, seen in ((slice(0, 2), 1 << 17), (slice(2, 4), 2 * edge)):
        errors = []
        for tokens, compared in ((slice(0, seen), slice(0, edge)), (slice(length - seen, length), slice(-edge, None))):
            pairs = zip(found, run(tokens, heads, torch.float64), strict=True)
            parts = [(x[:, tokens, heads][:, compared].double(), truth[:, compared]) for x, truth in pairs]
            errors.append(
                [torch.stack([(a - b)[:, :, h].norm() / b[:, :, h].norm() for h in range(2)]) for a, b in parts]
            )
        for name, first, last in zip(names, *errors, strict=True):
            # With beta 2 and a slow decay, what the rounding of repeated keys does adds up.
            limits = torch.tensor([1e-5, 4e-3 if heads.start == 0 else 1e-5] if name == "dlog_decay" else [4e-3] * 2)
            assert bool((first < limits).all() and (last < limits).all()), (name, heads, first, last)


@torch.no_grad()
def test_repeated_keys() -> None:
    """With beta 2, 10,000 equal keys reflect the same numbers as often before they decay: what the rounding of a key
    does adds up. Catches an inverse whose own rounding does so too, which multiplied the error by 10.
    """
    length, heads, width = 1 << 14, 8, 8
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, length, heads, width)
    k[:] = k[:, :1]
    v, beta = torch.randn(1, length, heads, 4), torch.full((1, length, heads), 2.0)
    decay = torch.full_like(beta, 0.9999).log()
    found = call(delta_rule, [q, k, v, beta, decay], normalize_qk=True)[0]
    want = call(delta_rule, [x.double() for x in (q, k, v, beta, decay)], normalize_qk=True)[0]
    assert_close("y", found, want, rel_rms=1.5e-3)


X, GATE = torch.zeros(2, 8, 4, 5), torch.zeros(2, 8, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": X[0]}, "q.shape"),
        ({"q": X.long()}, "q.dtype"),
        ({"k": X[:, :7]}, "k.shape"),
        ({"v": X[:, :, :3]}, "v.shape"),
        ({"v": X[:1]}, "v.shape"),
        ({"v": X.to("meta")}, "v.device"),
        ({"beta": X}, "beta.shape"),
        ({"beta": GATE.long()}, "beta.dtype"),
        ({"log_decay": X[..., :4]}, "log_decay.shape"),
        ({"log_decay": GATE[:, :, :2]}, "log_decay.shape"),
        ({"segments": torch.zeros(2, 7, dtype=torch.long)}, "segments.shape"),
        ({"segments": torch.zeros(2, 8, dtype=torch.int32)}, "segments.dtype"),
        ({"carry": Carry(torch.zeros(2, 4, 5, 4))}, "carry.state.shape"),
        ({"carry": Carry(torch.zeros(2, 4, 5, 5).bfloat16())}, "carry.state.dtype"),
        ({"carry": Carry(torch.zeros(2, 4, 5, 5), torch.zeros(1, dtype=torch.long))}, "carry.segment.shape"),
        ({"carry": Carry(torch.zeros(2, 4, 5, 5), torch.zeros(2))}, "carry.segment.dtype"),
        ({"backend": "abacus"}, "backend"),
        ({"backend": "cpu", "log_decay": X}, "backend"),
    ],
)
def test_mistakes_are_told_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        delta_rule(**({"q": X, "k": X, "v": X, "beta": GATE} | wrong))
    assert "\n" not in str(caught.value)
