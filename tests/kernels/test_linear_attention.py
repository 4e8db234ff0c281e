"""Linear attention: the definition against every fast path, outputs and all gradients, however the sequence is cut."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, run_distributed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longreach.errors import InputError
from longreach.kernels.linear_attention import (
    BACKENDS,
    LinearAttention,
    chunked,
    linear_attention,
    reference_linear_attention,
)
from longreach.kernels.linear_attention.settings import powers
from longreach.kernels.scan import Carry, scan
from longreach.parallel.mesh import Axis
from longreach.parallel.relay import AxisStateExchange
from longreach.parallel.span import Span

BATCH, HEADS, WIDTH, VALUES = 2, 3, 5, 7
DECAY = (1.0, 0.5, 0.97)
NAMES = ("y", "carry", "dq", "dk", "dv", "dcarry")
# The largest error as a share of the largest value (or of 1), and the relative RMS error.
TOLERANCES = {torch.float64: (1e-13, 1e-14), torch.float32: (2e-6, 1e-6), torch.bfloat16: (4e-3, 3e-3)}
# The gradient of a weighted mean holds v - y, a small difference early in a document, and y is kept as it is returned.
MEAN_TOLERANCES = {torch.float64: (1e-13, 1e-13), torch.float32: (2e-6, 4e-6), torch.bfloat16: (3e-2, 3e-2)}
DTYPES = {"chunked": (torch.float64, torch.float32, torch.bfloat16), "cpu": (torch.float32, torch.bfloat16)}


@pytest.fixture(params=DTYPES)
def backend(request: pytest.FixtureRequest) -> str:
    """Each fast implementation that runs here."""
    name: str = request.param
    if lack := BACKENDS.options[name].unsupported_reason("cpu", torch.float32, torch.float32, WIDTH, VALUES):
        pytest.skip(lack)
    return name


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
    """Two chunks per slab, so that short sequences have several slabs."""
    per_chunk = BATCH * HEADS * (64 * (64 + WIDTH + VALUES) + 2 * WIDTH * VALUES)
    monkeypatch.setattr(chunked, "CPU_WORKSPACE", 5 * per_chunk // 2)


def make(
    length: int,
    normalize: bool = False,
    with_carry: bool = True,
    with_segments: bool = False,
    width: int = WIDTH,
    values: int = VALUES,
) -> dict[str, Any]:
    """Random inputs of a whole sequence in fp64, rounded to bf16; positive features with ``normalize``."""
    q, k = torch.randn(2, BATCH, length, HEADS, width)
    v = torch.randn(BATCH, length, HEADS, values)
    state = torch.randn(BATCH, HEADS, width, values + normalize)
    if normalize:
        q, k = F.softplus(q), F.softplus(k)
        state[..., -1] = F.softplus(state[..., -1])
    q, k, v, state = (x.bfloat16().double() for x in (q, k, v, state))
    segments = ids = None
    if with_segments:
        # Row 0: many short documents and single tokens. Row 1: documents that span chunks, with a single token between.
        segments = torch.stack([(torch.rand(length) < 0.2).cumsum(0), torch.zeros(length, dtype=torch.long)])
        for start in (70, 71, 300):
            segments[1, start:] += 1
        # What was carried belongs to the first document of row 0, and to an earlier one of row 1.
        ids = segments[:, 0] + torch.tensor([0, 10]) if length else torch.tensor([0, 1])
    return {"q": q, "k": k, "v": v, "segments": segments, "carry": Carry(state, ids) if with_carry else None}


def all_of(
    fn: Any, data: dict[str, Any], dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[Tensor | None, ...]:
    """Outputs and all gradients of ``fn``, for fixed upstream gradients of the output and of the outgoing carry."""
    carry = data["carry"]
    leaves = [data[name].to(dtype).requires_grad_() for name in "qkv"]
    if carry is not None:
        leaves.append(carry.state.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        carry = Carry(leaves[3], carry.segment)
    y, after = fn(*leaves[:3], carry=carry, segments=data["segments"], **settings)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in (y, after.state)]
    grads = torch.autograd.grad([y, after.state], leaves, upstream)
    return y.detach(), after.state.detach(), *grads, *([] if carry is not None else [None])


def assert_all_close(
    actual: tuple[Tensor | None, ...],
    expected: tuple[Tensor | None, ...],
    tolerance: tuple[float, float] = TOLERANCES[torch.float64],
) -> None:
    """Compares what `all_of` returns: largest error, and relative RMS error."""
    for name, got, want in zip(NAMES, actual, expected, strict=True):
        largest = 0.0 if want is None or not want.numel() else want.abs().max().item()
        # The weighted mean of one token does not depend on q and k: then there is nothing to be relative to.
        rel_rms = tolerance[1] if largest > 1e-9 else None
        assert_close(name, got, want, max_abs=tolerance[0] * max(1.0, largest), rel_rms=rel_rms)


SETTINGS = [
    {"decay": decay, "causal": causal, "normalize": normalize, "scale": 0.7}
    for decay, causal, normalize in product((None, DECAY), (True, False), (False, True))
    if causal or decay is None
]


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 128, 129, 500])
def test_every_backend_is_the_definition(length: int, backend: str, small_slabs: None) -> None:
    for settings, with_carry, with_segments in product(SETTINGS, (False, True), (False, True)):
        data = make(length, settings["normalize"], with_carry, with_segments)
        truth = all_of(reference_linear_attention, data, **settings)
        for dtype in DTYPES[backend]:
            fast = all_of(linear_attention, data, dtype, backend=backend, **settings)
            assert fast[0].dtype == dtype and fast[1].dtype == torch.promote_types(dtype, torch.float32)
            assert_all_close(fast, truth, (MEAN_TOLERANCES if settings["normalize"] else TOLERANCES)[dtype])


@pytest.mark.parametrize("width, values", [(1, 1), (1, 64), (33, 130), (200, 3)])
def test_any_width(width: int, values: int, backend: str) -> None:
    dtype = DTYPES[backend][0]
    for settings in SETTINGS:
        # A mean weighted by one feature does not depend on q: fp32 leaves its rounding, not relative to anything.
        if width == 1 and settings["normalize"] and dtype != torch.float64:
            continue
        data = make(150, settings["normalize"], width=width, values=values)
        truth = all_of(reference_linear_attention, data, **settings)
        fast = all_of(linear_attention, data, dtype, backend=backend, **settings)
        assert_all_close(fast, truth, MEAN_TOLERANCES[dtype])


def test_threads_and_strides_change_nothing() -> None:
    """Catches heads that two threads share or none takes, and tokens that are taken for neighbours in memory."""
    if lack := BACKENDS.options["cpu"].unsupported_reason("cpu", torch.float32, torch.float32, WIDTH, VALUES):
        pytest.skip(lack)
    data = make(200, True, with_segments=True, width=32, values=20)
    want = all_of(linear_attention, data, torch.float32, backend="cpu", decay=DECAY, normalize=True)
    parts = [data[name].flatten(2) for name in "qkv"]
    wide = torch.cat([*parts, torch.zeros(BATCH, 200, 3)], dim=2)

    def strided(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple[Tensor, Carry]:
        cut = torch.cat([*(x.flatten(2) for x in (q, k, v)), wide[..., -3:].to(q.dtype)], dim=2)
        shards = cut.split([*(x.shape[2] for x in parts), 3], dim=2)[:3]
        return linear_attention(*(x.unflatten(2, (HEADS, -1)) for x in shards), **rest)

    for count in (1, 2, 3, 16):
        torch.set_num_threads(count)
        for fn in (linear_attention, strided):
            got = all_of(fn, data, torch.float32, backend="cpu", decay=DECAY, normalize=True)
            assert_all_close(got, want, (0.0, 0.0))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_definition_is_the_recurrence(normalize: bool) -> None:
    data = make(9, normalize)
    q, k, v, state = data["q"], data["k"], data["v"], data["carry"].state
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) if normalize else v
    decay = torch.tensor(DECAY, dtype=torch.float64).view(1, -1, 1, 1)
    outs = []
    for i in range(9):
        state = decay * state + k[:, i, :, :, None] * v[:, i, :, None, :]
        read = 0.7 * (q[:, i, :, None, :] @ state).squeeze(-2)
        outs.append(read[..., :-1] / read[..., -1:] if normalize else read)
    y, carry = reference_linear_attention(
        q, k, data["v"], decay=DECAY, normalize=normalize, carry=data["carry"], scale=0.7
    )
    torch.testing.assert_close(y, torch.stack(outs, dim=1))
    torch.testing.assert_close(carry.state, state)


def in_shards(cuts: list[int], **settings: Any) -> Any:
    """`linear_attention` shard by shard, each from the carry of the one before."""

    def run(q: Tensor, k: Tensor, v: Tensor, *, carry: Carry | None, segments: Tensor | None) -> Any:
        outs = []
        for start, stop in zip([0, *cuts], [*cuts, q.shape[1]]):
            shard = (x[:, start:stop] for x in (q, k, v))
            ids = None if segments is None else segments[:, start:stop]
            y, carry = linear_attention(*shard, carry=carry, segments=ids, **settings)
            outs.append(y)
        return torch.cat(outs, dim=1), carry

    return run


# With segments, documents of row 1 begin at 70, 71 and 300.
@pytest.mark.parametrize("cuts", [[70], [71], [100, 299], [64, 300], [64, 64, 128]])
def test_shards_are_the_whole(cuts: list[int]) -> None:
    for settings, with_segments in product(SETTINGS, (False, True)):
        if settings["causal"]:
            data = make(320, settings["normalize"], with_segments=with_segments)
            whole = all_of(linear_attention, data, **settings)
            assert_all_close(all_of(in_shards(cuts, **settings), data), whole, (1e-12, 1e-13))


def test_token_by_token_is_the_whole() -> None:
    for normalize in (False, True):
        data = make(80, normalize, with_segments=True)
        whole = all_of(linear_attention, data, decay=DECAY, normalize=normalize)
        tokens = all_of(in_shards(list(range(1, 80)), decay=DECAY, normalize=normalize), data)
        assert_all_close(tokens, whole, (1e-12, 1e-13))


@pytest.mark.parametrize("cuts", [[71], [64, 64, 128], list(range(1, 80))])
def test_shards_in_fp32_are_the_definition(cuts: list[int], backend: str) -> None:
    for normalize, with_segments in product((False, True), (False, True)):
        data = make(320 if len(cuts) < 9 else 80, normalize, with_segments=with_segments)
        truth = all_of(reference_linear_attention, data, decay=DECAY, normalize=normalize)
        shards = in_shards(cuts, decay=DECAY, normalize=normalize, backend=backend)
        tolerance = (MEAN_TOLERANCES if normalize else TOLERANCES)[torch.float32]
        assert_all_close(all_of(shards, data, torch.float32), truth, tolerance)


def test_gradients_are_finite_differences() -> None:
    for settings, with_segments in product(SETTINGS, (False, True)):
        data = make(6, settings["normalize"])
        segments = torch.tensor([[0, 0, 1, 2, 2, 2], [0] * 6]) if with_segments else None
        ids = torch.zeros(BATCH, dtype=torch.long) if with_segments else None

        def outputs(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            state: Tensor,
            segments: Any = segments,
            ids: Any = ids,
            settings: Any = settings,
        ) -> tuple[Tensor, Tensor]:
            y, carry = linear_attention(q, k, v, carry=Carry(state, ids), segments=segments, **settings)
            return y, carry.state

        leaves = [x.clone().requires_grad_() for x in (data["q"], data["k"], data["v"], data["carry"].state)]
        assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


def test_fast_decay_of_a_long_sequence(backend: str) -> None:
    data = make(4096)
    for decay in ((0.5,) * HEADS, (1e-30, 1e-3, 0.999)):
        fast = all_of(linear_attention, data, torch.float32, decay=decay, backend=backend)
        assert_all_close(fast, all_of(linear_attention, data, decay=decay), TOLERANCES[torch.float32])


def test_undecayed_sums_of_a_long_sequence(backend: str) -> None:
    k, v = torch.rand(2, 1, 1 << 18, 1, 2)
    _, carry = linear_attention(k, k, v, backend=backend)
    truth = torch.einsum("blhk,blhv->bhkv", k.double(), v.double())
    assert ((carry.state.double() - truth).abs() / truth).max() < 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_a_clamped_divisor_passes_no_gradient(causal: bool, backend: str) -> None:
    q, k, v = (torch.randn(BATCH, 130, HEADS, n) for n in (WIDTH, WIDTH, VALUES))
    data = {"q": q, "k": k * 1e-3, "v": v, "segments": None, "carry": None}
    data["q"][0] = 0
    settings = {"normalize": True, "causal": causal, "eps": 0.1}
    truth = all_of(reference_linear_attention, data, **settings)
    fast = all_of(linear_attention, data, torch.float32, backend=backend, **settings)
    assert_all_close(fast, truth, TOLERANCES[torch.float32])
    assert (fast[0][0] == 0).all()


def test_nothing_to_divide_by(backend: str) -> None:
    zeros = torch.zeros(1, 70, 1, 4)
    data = {"q": zeros, "k": zeros, "v": zeros, "segments": None, "carry": None}
    fast = all_of(linear_attention, data, torch.float32, backend=backend, normalize=True)
    assert all(x is None or x.isfinite().all() for x in fast)


@pytest.mark.parametrize("backend", ["chunked", "cpu", "reference"], indirect=True)
def test_autocast_leaves_states_in_fp32(backend: str) -> None:
    data = make(130)
    plain = all_of(linear_attention, data, torch.float32, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = all_of(linear_attention, data, torch.float32, backend=backend)
    assert_all_close(cast, plain, (0.0, 0.0))


def test_a_loss_of_the_output_or_of_the_carry_alone(backend: str) -> None:
    for settings in SETTINGS:
        data = make(70, settings["normalize"])
        for used in (0, 1):
            grads = []
            for name, dtype in ((backend, DTYPES[backend][0]), ("reference", torch.float64)):
                inputs = (data["q"], data["k"], data["v"], data["carry"].state)
                leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
                y, after = linear_attention(*leaves[:3], carry=Carry(leaves[3]), backend=name, **settings)
                loss = (y, after.state)[used].square().sum()
                grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
            for got, want in zip(*grads):
                scale = want.abs().max().clamp(min=1)
                torch.testing.assert_close(got / scale, (want / scale).to(got.dtype))


def on_rank(axis: Axis, shares: list[int], cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Any]:
    """What this rank computes of the whole, for each case: its shard of y, the carry, and its gradients."""
    stops = list(accumulate(shares))
    tokens = slice(stops[axis.rank] - shares[axis.rank], stops[axis.rank])
    results = []
    for data, settings in cases:
        leaves = [data[name][:, tokens].clone().requires_grad_() for name in "qkv"]
        leaves.append(data["carry"].state.clone().requires_grad_())
        carry = Carry(leaves[3], data["carry"].segment)
        segments = None if data["segments"] is None else data["segments"][:, tokens]
        relay = AxisStateExchange(axis)
        y, after = linear_attention(*leaves[:3], carry=carry, segments=segments, relay=relay, **settings)
        upstream = [data["grad"][:, tokens], data["grad_carry"]]
        grads = torch.autograd.grad([y, after.state], leaves, upstream)
        results.append([x.detach() for x in (y, after.state, *grads)] + [after.segment])
    return results


def in_fp32(data: dict[str, Any]) -> dict[str, Any]:
    narrow = {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in data.items()}
    return narrow | {"carry": Carry(data["carry"].state.float(), data["carry"].segment)}


@pytest.mark.parametrize("shares", [[130, 70], [0, 200], [129, 0, 71], [1, 64, 65, 70], [0, 150, 50, 0]])
def test_ranks_are_one_process(shares: list[int]) -> None:
    """Catches a state folded in the wrong order, through the wrong document, or counted once a rank."""
    cases = []
    for settings, with_segments in product(SETTINGS, (False, True)):
        data = make(200, settings["normalize"], with_segments=with_segments)
        data["grad"], data["grad_carry"] = torch.randn_like(data["v"]), torch.randn_like(data["carry"].state)
        cases.append((data, settings))
        if not BACKENDS.options["cpu"].unsupported_reason("cpu", torch.float32, torch.float32, WIDTH, VALUES):
            cases.append((in_fp32(data), settings | {"backend": "cpu"}))
    ranks = run_distributed(on_rank, len(shares), shares, cases)
    (alone,) = run_distributed(on_rank, 1, [200], cases)
    for case, (*whole, last) in enumerate(alone):
        shards = [rank[case] for rank in ranks]
        for shard in shards:
            assert (shard[-1] is None and last is None) or torch.equal(shard[-1], last)
        for index, name in enumerate(NAMES):
            if name in ("carry", "dcarry"):
                found = [shard[index] for shard in shards]
            else:
                found = [torch.cat([shard[index] for shard in shards], dim=1)]
            for got in found:
                limit = 1e-13 if whole[index].dtype == torch.float64 else 1e-6
                assert_close(f"{name}, {cases[case][1]}", got, whole[index], rel_rms=limit)


def test_a_span_scans_it() -> None:
    data = make(70)
    q, k, v = (data[name] for name in "qkv")
    op = LinearAttention(decay=DECAY, scale=0.5)
    expected, _ = linear_attention(q, k, v, decay=torch.tensor(DECAY, dtype=torch.float64), scale=0.5)
    assert torch.equal(Span().scan(op, q, k, v), expected)
    assert torch.equal(scan(op, q, k, v)[0], expected)
    assert hash(op) == hash(LinearAttention(decay=DECAY, scale=0.5))


def test_an_expanded_gradient(backend: str) -> None:
    data = make(130)
    grads = []
    for name, dtype in ((backend, DTYPES[backend][0]), ("reference", torch.float64)):
        leaves = [data[x].to(dtype, copy=True).requires_grad_() for x in "qkv"]
        linear_attention(*leaves, backend=name)[0].sum().backward()
        grads.append([x.grad for x in leaves])
    for got, want in zip(*grads):
        assert (got - want).norm() <= TOLERANCES[got.dtype][1] * want.norm()


def test_mixed_dtypes(backend: str) -> None:
    """Features may be wider than values, as autocast makes them."""

    def narrow(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple[Tensor, Carry]:
        y, carry = linear_attention(q, k, v.bfloat16(), backend=backend, **rest)
        assert y.dtype == torch.bfloat16 and carry.state.dtype == torch.float32
        return y, carry

    data = make(70)
    truth = all_of(reference_linear_attention, data)
    assert_all_close(all_of(narrow, data, torch.float32), truth, TOLERANCES[torch.bfloat16])


X = torch.zeros(2, 8, 3, 4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"q": X[0]}, "q.shape"),
        ({"q": X.long()}, "q.dtype"),
        ({"k": X[:, :7]}, "k.shape"),
        ({"v": X[:, :, :2]}, "v.shape"),
        ({"v": X.to("meta")}, "v.device"),
        ({"decay": torch.full((3,), 0.0)}, "decay"),
        ({"decay": [0.5, 1.5, 1.0]}, "decay"),
        ({"decay": [float("nan")] * 3}, "decay"),
        ({"decay": torch.ones(2)}, "decay"),
        ({"decay": torch.ones(3, 1)}, "decay"),
        ({"decay": torch.ones(3), "causal": False}, "decay"),
        ({"normalize": True, "eps": 0.0}, "eps"),
        ({"segments": torch.zeros(2, 7, dtype=torch.long)}, "segments.shape"),
        ({"segments": torch.zeros(2, 8, dtype=torch.int32)}, "segments.dtype"),
        ({"carry": Carry(torch.zeros(2, 3, 4, 5))}, "carry.state.shape"),
        ({"carry": Carry(torch.zeros(2, 3, 4, 4)), "normalize": True}, "carry.state.shape"),
        ({"carry": Carry(torch.zeros(2, 3, 4, 4).bfloat16())}, "carry.state.dtype"),
        ({"carry": Carry(torch.zeros(2, 3, 4, 4), torch.zeros(1, dtype=torch.long))}, "carry.segment.shape"),
        ({"carry": Carry(torch.zeros(2, 3, 4, 4), torch.zeros(2))}, "carry.segment.dtype"),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_mistakes_are_told_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        linear_attention(**({"q": X, "k": X, "v": X} | wrong))
    assert "\n" not in str(caught.value)


def test_powers_of_decays_are_kept() -> None:
    """The same tensor at every call, so nothing is copied from the host; none that `torch.compile` works with."""
    case = DECAY, (0, 1, 65), torch.device("meta")
    with FakeTensorMode():
        assert type(powers(*case)) is not Tensor
    with torch.inference_mode():
        kept = powers(*case)
    assert type(kept) is Tensor and not kept.is_inference()
    assert powers(*case) is kept and powers(DECAY, (0, 1, 64), case[2]) is not kept
    with FakeTensorMode():
        assert type(powers(*case)) is not Tensor
    on_host = powers(DECAY, (-1, 0, 1, 65), torch.device("cpu"))
    assert on_host.tolist() == [[0.0, *(x**n for n in (0, 1, 65))] for x in DECAY]
