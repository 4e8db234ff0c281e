"""Linear attention with a decay of each token and groups of heads: the recurrence against every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import accumulate, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, run_distributed
from torch import Tensor

from longreach.errors import InputError
from longreach.kernels.linear_attention import BACKENDS, LinearAttention, chunked, linear_attention
from longreach.kernels.scan import Carry
from longreach.parallel.mesh import Axis
from longreach.parallel.relay import AxisStateExchange
from longreach.parallel.span import Span

BATCH, HEADS, WIDTH, VALUES = 2, 4, 5, 7
NAMES = ("y", "carry", "dq", "dk", "dv", "dlog_decay", "dcarry")
# The largest error as a share of the largest value (or of 1).
TOLERANCES = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 2e-2}
DTYPES = {"reference": (torch.float64,), "chunked": tuple(TOLERANCES), "cpu": (torch.float32, torch.bfloat16)}
# Of each head: hardly any decay, the usual ones, and one that forgets within a token.
RATES = torch.tensor([1e-5, 0.05, 1.0, 20.0], dtype=torch.float64)


@pytest.fixture(params=DTYPES)
def backend(request: pytest.FixtureRequest) -> str:
    """Each implementation that runs here."""
    name: str = request.param
    if lack := BACKENDS.options[name].unsupported_reason("cpu", torch.float32, torch.float32, WIDTH, VALUES, True):
        pytest.skip(lack)
    return name


@pytest.fixture(autouse=True)
def unwritten_memory_shows() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks per slab, so that short sequences have several slabs."""
    per_chunk = BATCH * HEADS * (64 * (64 + WIDTH + VALUES) + 2 * WIDTH * VALUES)
    monkeypatch.setattr(chunked, "CPU_WORKSPACE", 5 * per_chunk // 2)


def make(length: int, groups: int = HEADS, normalize: bool = False, documents: bool = False) -> dict[str, Any]:
    """Random inputs of a whole sequence in fp64, rounded to bf16, and a carry; positive features with ``normalize``."""
    q, k = torch.randn(2, BATCH, length, groups, WIDTH)
    v, state = torch.randn(BATCH, length, HEADS, VALUES), torch.randn(BATCH, HEADS, WIDTH, VALUES + normalize)
    if normalize:
        q, k = F.softplus(q), F.softplus(k)
        state[..., -1] = F.softplus(state[..., -1])
    tensors = [q, k, v, -torch.rand(BATCH, length, HEADS) * RATES, state]
    q, k, v, log_decay, state = (x.bfloat16().double() for x in tensors)
    segments = ids = None
    if documents:
        # Row 0: many short documents. Row 1: documents that span chunks, with a single token between.
        segments = torch.stack([(torch.rand(length) < 0.2).cumsum(0), torch.zeros(length, dtype=torch.long)])
        for start in (70, 71, 150):
            segments[1, start:] += 1
        # What was carried belongs to the first document of row 0, and to an earlier one of row 1.
        ids = segments[:, 0] + torch.tensor([0, 10]) if length else torch.tensor([0, 1])
    return {"inputs": [q, k, v, log_decay], "carry": Carry(state, ids), "segments": segments}


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    carry: Carry,
    segments: Tensor | None,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Carry]:
    """The definition, token by token."""
    heads = v.shape[2]
    q, k = (x[:, :, torch.arange(heads) // (heads // x.shape[2])] for x in (q, k))
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v
    state, last, outs = carry.state, carry.segment, []
    for i in range(v.shape[1]):
        decay = log_decay[:, i].exp()[..., None, None]
        if segments is not None:
            decay = decay * (segments[:, i] == last)[:, None, None, None]
            last = segments[:, i]
        state = decay * state + k[:, i, :, :, None] * values[:, i, :, None, :]
        read = scale * (q[:, i, :, None, :] @ state).squeeze(-2)
        outs.append(read[..., :-1] / read[..., -1:] if normalize else read)
    return torch.stack(outs, 1) if outs else v + 0 * q.sum(), Carry(state, last)


def all_of(fn: Any, data: dict[str, Any], dtype: torch.dtype = torch.float64, **settings: Any) -> list[Tensor]:
    """Outputs and all gradients of ``fn``, for fixed upstream gradients of the output and of the outgoing carry."""
    carry = data["carry"]
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in data["inputs"]]
    state = carry.state.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
    q, k, v, log_decay = leaves
    carry = Carry(state, carry.segment)
    y, after = fn(q, k, v, log_decay=log_decay, carry=carry, segments=data["segments"], **settings)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in (y, after.state)]
    grads = torch.autograd.grad([y, after.state], [*leaves, state], upstream, materialize_grads=True)
    return [y.detach(), after.state.detach(), *grads]


def assert_all_close(got: list[Tensor], want: list[Tensor], limit: float) -> None:
    """Compares what `all_of` returns."""
    for name, x, truth in zip(NAMES, got, want, strict=True):
        largest = truth.abs().max().clamp(min=1).item() if truth.numel() else 1.0
        assert_close(name, x, truth, max_abs=limit * largest)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 200])
def test_every_backend_is_the_recurrence(length: int, groups: int, backend: str, small_slabs: None) -> None:
    for normalize, documents in product((False, True), (False, True)):
        data, settings = make(length, groups, normalize, documents), {"normalize": normalize, "scale": 0.7}
        truth = all_of(recurrence, data, **settings)
        for dtype in DTYPES[backend]:
            fast = all_of(linear_attention, data, dtype, backend=backend, **settings)
            assert fast[0].dtype == dtype and fast[1].dtype == torch.promote_types(dtype, torch.float32)
            assert_all_close(fast, truth, TOLERANCES[dtype] * (2 if normalize else 1))


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize(
    "settings", [{}, {"decay": (1.0, 0.5, 0.97, 0.1)}, {"causal": False}, {"normalize": True, "causal": False}]
)
def test_groups_without_gates(settings: dict[str, Any], backend: str) -> None:
    """Heads of a group share q and k, as if these were repeated; their gradients are sums over the heads."""
    if lack := BACKENDS.options[backend].unsupported_reason("cpu", torch.float32, torch.float32, WIDTH, VALUES):
        pytest.skip(lack)

    def shared(q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, **rest: Any) -> tuple[Tensor, Carry]:
        return linear_attention(q, k, v, backend=backend, **settings, **rest)

    def repeated(q: Tensor, k: Tensor, *rest: Tensor, **more: Any) -> tuple[Tensor, Carry]:
        q, k = (x.repeat_interleave(HEADS // 2, dim=2) for x in (q, k))
        return shared(q, k, *rest, **more)

    dtype = DTYPES[backend][0]
    for documents in (False, True):
        data = make(130, 2, settings.get("normalize", False), documents)
        assert_all_close(all_of(shared, data, dtype), all_of(repeated, data, dtype), TOLERANCES[dtype])


@pytest.mark.parametrize("groups", [1, 2])
def test_threads_that_share_a_group(groups: int) -> None:
    """Catches gradients of q and k that lack the heads of another thread."""
    if lack := BACKENDS.options["cpu"].unsupported_reason("cpu", torch.float32, torch.float32, WIDTH, VALUES, True):
        pytest.skip(lack)
    data = make(600, groups, documents=True)
    truth = all_of(linear_attention, data)
    for count in (1, 2, 3, 16):
        torch.set_num_threads(count)
        assert_all_close(all_of(linear_attention, data, torch.float32, backend="cpu"), truth, TOLERANCES[torch.float32])


def test_equal_decays_are_a_decay(backend: str) -> None:
    data = make(200)
    rates = torch.tensor([1.0, 0.5, 0.97, 0.01], dtype=torch.float64)
    data["inputs"][3] = rates.log().expand(BATCH, 200, HEADS)
    dtype = DTYPES[backend][0]
    fast = all_of(linear_attention, data, dtype, backend=backend)

    def decayed(*inputs: Tensor, log_decay: Tensor, **rest: Any) -> tuple[Tensor, Carry]:
        return linear_attention(*inputs, decay=rates, **rest)

    want = all_of(decayed, data)
    for index in (0, 1, 2, 3, 4, 6):
        torch.testing.assert_close(fast[index].double(), want[index], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rate", [1e-4, 0.1, 4.6])
def test_gradients_of_gates_are_as_exact_as_others(rate: float, documents: bool, backend: str) -> None:
    """Catches differences of larger sums: at a decay of 0.01 (a rate of 4.6) they lose three more digits."""
    if backend == "reference":
        pytest.skip("fp64")
    data = make(700, 2, documents=documents)
    data["inputs"][3] = torch.full_like(data["inputs"][3], -rate)
    found, want = all_of(linear_attention, data, torch.float32, backend=backend), all_of(linear_attention, data)
    for name, x, truth in zip(NAMES, found, want, strict=True):
        assert_close(name, x, truth, rel_rms=2e-6)


def test_gates_of_zero(backend: str) -> None:
    """``exp(-inf)``: what was before is forgotten; nothing is NaN."""
    data = make(130)
    data["inputs"][3][:, 50::37] = -torch.inf
    truth = all_of(recurrence, data)
    dtype = DTYPES[backend][0]
    assert_all_close(all_of(linear_attention, data, dtype, backend=backend), truth, TOLERANCES[dtype])


def in_shards(cuts: list[int], **settings: Any) -> Any:
    """`linear_attention` shard by shard, each from the carry of the one before."""

    def run(*inputs: Tensor, log_decay: Tensor, carry: Carry, segments: Tensor | None) -> Any:
        outs = []
        for start, stop in zip([0, *cuts], [*cuts, log_decay.shape[1]]):
            q, k, v, gates = (x[:, start:stop] for x in (*inputs, log_decay))
            ids = None if segments is None else segments[:, start:stop]
            y, carry = linear_attention(q, k, v, log_decay=gates, carry=carry, segments=ids, **settings)
            outs.append(y)
        return torch.cat(outs, dim=1), carry

    return run


@pytest.mark.parametrize("cuts", [[70], [71], [64, 64, 128], list(range(1, 80))])
def test_shards_are_the_whole(cuts: list[int], backend: str) -> None:
    """Blocks of a stream, and token by token."""
    dtype = DTYPES[backend][0]
    for groups, normalize, documents in ((1, False, False), (4, True, True)):
        data = make(200 if len(cuts) < 9 else 80, groups, normalize, documents)
        whole = all_of(recurrence, data, normalize=normalize)
        shards = all_of(in_shards(cuts, normalize=normalize, backend=backend), data, dtype)
        assert_all_close(shards, whole, 2 * TOLERANCES[dtype])


def test_decoding_without_gradients_is_the_whole(backend: str) -> None:
    data = make(40, 2)
    inputs, carry = [x.float() for x in data["inputs"]], Carry(data["carry"].state.float())
    run = in_shards(list(range(1, 40)), backend="chunked" if backend == "cpu" else backend)
    with torch.no_grad():
        y, after = run(*inputs[:3], log_decay=inputs[3], carry=carry, segments=None)
    want, state = recurrence(*data["inputs"][:3], log_decay=data["inputs"][3], carry=data["carry"], segments=None)
    assert y.dtype == torch.float32 and after.state.dtype == torch.float64
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.state, state.state, rtol=1e-10, atol=1e-10)


def test_gradients_are_finite_differences() -> None:
    for groups, normalize, documents in product((1, 4), (False, True), (False, True)):
        data = make(6, groups, normalize)
        segments = torch.tensor([[0, 0, 1, 2, 2, 2], [0] * 6]) if documents else None
        ids = torch.zeros(BATCH, dtype=torch.long) if documents else None

        def outputs(*leaves: Tensor, given: Any = (segments, ids, normalize)) -> tuple[Tensor, Tensor]:
            segments, ids, normalize = given
            *inputs, log_decay, state = leaves
            carry = Carry(state, ids)
            y, after = linear_attention(
                *inputs, log_decay=log_decay, carry=carry, segments=segments, normalize=normalize
            )
            return y, after.state

        leaves = [x.clone().requires_grad_() for x in (*data["inputs"], data["carry"].state)]
        assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@cache
def million(decay: float, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """y and the gradients of a sequence of bf16 numbers, a quarter of which has one key, computed in ``dtype``; gates
    are not rounded to bf16.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = torch.randn(4, 1, 1 << 20, 1, 4, generator=generator).bfloat16().to(dtype)
    k[:, 1 << 18 : 1 << 19] = k[:, :1]
    gates = torch.full((1, 1 << 20, 1), decay).log().to(torch.promote_types(dtype, torch.float32))
    leaves = [x.requires_grad_() for x in (q, k, v, gates)]
    y, _ = linear_attention(*leaves[:3], log_decay=leaves[3], backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("decay", [0.9999, 0.01])
def test_a_million_tokens(decay: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is as small at the end as at the beginning. Catches gradients of gates from one sum over all tokens."""
    if backend == "reference":
        pytest.skip("O(L^2)")
    monkeypatch.setattr(chunked, "MIN_CHUNK", 16)  # less work
    edge, length = 4096, 1 << 20
    results = [million(decay, backend, torch.bfloat16), million(decay, "chunked", torch.float64)]
    for name, got, want in zip(("y", "dq", "dk", "dv", "dlog_decay"), *results):
        assert got.isfinite().all()
        places = (slice(start, start + edge) for start in (0, length // 2, length - edge))
        first, middle, last = ((got[:, at] - want[:, at]).norm() / want[:, at].norm() for at in places)
        assert first < (1e-5 if name == "dlog_decay" else 4e-3), (name, first)
        assert max(middle, last) < 1.5 * first + 1e-6, (name, first, middle, last)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_mamba2_of_transformers(length: int, backend: str) -> None:
    """q is its C, k its B, v its x times dt, log_decay is A times dt; outputs, final state and gradients."""
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    batch, heads, head, groups, size = 2, 4, 8, 2, 16
    x, dt = torch.randn(batch, length, heads, head), torch.rand(batch, length, heads)
    b, c = torch.randn(2, batch, length, groups, size)
    a_log, state = torch.rand(heads).log(), torch.randn(batch, heads, head, size)
    upstream = torch.randn(batch, length, heads, head), torch.randn(batch, heads, head, size)
    dtype = DTYPES[backend][-1] if backend != "reference" else torch.float64
    dtype = torch.float32 if dtype == torch.bfloat16 else dtype

    def ours(x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, carry = linear_attention(
            c, b, x * dt[..., None], log_decay=-a_log.exp() * dt, carry=Carry(state.mT), backend=backend
        )
        return y, carry.state.mT

    def theirs(x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        scan = modeling.mamba2_chunk_scan
        return scan(x, dt, -a_log.exp(), b, c, 64, initial_states=state, return_final_states=True)

    results = []
    for fn, kind in ((ours, dtype), (theirs, torch.float32)):
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (x, dt, a_log, b, c, state)]
        outs = fn(*leaves)
        results.append([*outs, *torch.autograd.grad(outs, leaves, [t.to(kind) for t in upstream])])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)


Cases = list[tuple[dict[str, Any], dict[str, Any]]]


def on_rank(axis: Axis, shares: list[int], cases: Cases) -> list[list[Tensor]]:
    """What this rank computes of the whole, for each case: its shard of y, the carry, and its gradients."""
    stops = list(accumulate(shares))
    tokens = slice(stops[axis.rank] - shares[axis.rank], stops[axis.rank])
    results = []
    for data, settings in cases:
        leaves = [x[:, tokens].clone().requires_grad_() for x in data["inputs"]]
        leaves.append(data["carry"].state.clone().requires_grad_())
        carry = Carry(leaves[4], data["carry"].segment)
        segments = None if data["segments"] is None else data["segments"][:, tokens]
        q, k, v, log_decay = leaves[:4]
        y, after = linear_attention(
            q, k, v, log_decay=log_decay, carry=carry, segments=segments, relay=AxisStateExchange(axis), **settings
        )
        upstream = [data["grad"][:, tokens], data["grad_carry"]]
        grads = torch.autograd.grad([y, after.state], leaves, upstream)
        results.append([x.detach() for x in (y, after.state, *grads)])
    return results


@pytest.mark.parametrize("shares", [[3, 0, 1], [130, 70], [1, 64, 65, 70], [129, 0, 71]])
def test_ranks_are_one_process(shares: list[int]) -> None:
    """Catches decays of one shard that are applied to another's state, or gradients of gates that stop at a shard."""
    length, cases = sum(shares), []
    for groups, normalize, documents in ((1, False, False), (4, False, True), (2, True, True)):
        data = make(length, groups, normalize, documents)
        data["grad"] = torch.randn_like(data["inputs"][2])
        data["grad_carry"] = torch.randn_like(data["carry"].state)
        cases.append((data, {"normalize": normalize}))
        if not BACKENDS.options["cpu"].unsupported_reason("cpu", torch.float32, torch.float32, WIDTH, VALUES, True):
            narrow = {
                name: x.float() if isinstance(x, Tensor) and name != "segments" else x for name, x in data.items()
            }
            narrow |= {"inputs": [x.float() for x in data["inputs"]]}
            narrow |= {"carry": Carry(data["carry"].state.float(), data["carry"].segment)}
            cases.append((narrow, {"normalize": normalize, "backend": "cpu"}))
    ranks = run_distributed(on_rank, len(shares), shares, cases)
    (alone,) = run_distributed(on_rank, 1, [length], cases)
    for case, whole in enumerate(alone):
        for index, name in enumerate(NAMES):
            shards = [rank[case][index] for rank in ranks]
            for got in shards if "carry" in name else [torch.cat(shards, dim=1)]:
                limit = 1e-12 if whole[index].dtype == torch.float64 else 4e-6
                largest = whole[index].abs().max().clamp(min=1).item()
                assert_close(f"{name}, {cases[case][1]}", got, whole[index], max_abs=limit * largest)


def test_a_span_scans_it() -> None:
    data = make(70, 2)
    y = Span().scan(LinearAttention(scale=0.5), *data["inputs"])
    q, k, v, log_decay = data["inputs"]
    assert torch.equal(y, linear_attention(q, k, v, log_decay=log_decay, scale=0.5)[0])


X = torch.zeros(2, 8, 4, 4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"log_decay": X[..., 0], "decay": torch.ones(4)}, "log_decay"),
        ({"log_decay": X[..., 0], "causal": False}, "log_decay"),
        ({"log_decay": X}, "log_decay.shape"),
        ({"log_decay": X[:, :7, :, 0]}, "log_decay.shape"),
        ({"log_decay": X[..., 0].long()}, "log_decay.dtype"),
        ({"log_decay": X[..., 0].to("meta")}, "log_decay.device"),
        ({"q": X[:, :, :3], "k": X[:, :, :3]}, "v.shape"),
        ({"q": X[:, :, :2]}, "k.shape"),
    ],
)
def test_mistakes_are_told_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        linear_attention(**({"q": X, "k": X, "v": X} | wrong))
    assert "\n" not in str(caught.value)


def test_an_operator_tells_the_same_mistakes() -> None:
    op = partial(Span().scan, LinearAttention(decay=(0.5,) * 4))
    with pytest.raises(InputError, match="log_decay"):
        op(X, X, X, X[..., 0])
