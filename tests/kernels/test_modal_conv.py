"""Modal convolution: the definition against the fast paths, outputs and all gradients, however the sequence is cut."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from helpers import assert_close, run_distributed
from torch import Tensor

from longreach.errors import InputError
from longreach.kernels.long_conv import long_conv
from longreach.kernels.modal_conv import (
    BACKENDS,
    ModalConv,
    chunked,
    modal_kernel,
    reference_modal_conv,
)
from longreach.kernels.scan import Carry, scan
from longreach.parallel.mesh import Axis
from longreach.parallel.relay import AxisStateExchange

BATCH, WIDTH, MODES = 2, 6, 4
LENGTHS = [0, 1, 2, 3, 63, 64, 65, 500]
NAMES = ("y", "carry", "ids", "dx", "dlog_decay", "dangle", "dre", "dim", "dcarry")
# The largest error as a share of the largest value (or of 1), and the relative RMS error. A gradient in bf16 may be
# rounded twice: x reaches the output and the outgoing carry.
TOLERANCES = {torch.float64: (1e-13, 1e-13), torch.float32: (2e-6, 1e-6), torch.bfloat16: (8e-3, 3e-3)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors this small, a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def unwritten_memory_shows() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs of chunks, the last of them incomplete."""
    monkeypatch.setattr(chunked, "CPU_SLAB", 3 * chunked.CHUNK_LEN * BATCH * WIDTH)


def documents(length: int, before: int) -> Tensor:
    """Ids ``[BATCH, before + length]``: row 0 short documents and single tokens, row 1 some that cross blocks."""
    ids = torch.stack([(torch.rand(before + length) < 0.2).cumsum(0), torch.zeros(before + length, dtype=torch.long)])
    for start in (before + 2, before + 64, before + 65, before + 300):
        ids[1, start:] += 1
    return ids


def make(length: int, *, with_carry: bool = True, with_segments: bool = False) -> dict[str, Any]:
    """Random inputs of `ModalConv` in fp64, rounded to bf16; the modes forget within 2 to 2000 tokens."""
    x, re, im = torch.randn(BATCH, length, WIDTH), torch.randn(WIDTH, MODES), torch.randn(WIDTH, MODES)
    log_decay, angle = -7.5 * torch.rand(WIDTH, MODES), 3 * torch.randn(WIDTH, MODES)
    inputs = [t.bfloat16().double() for t in (x, log_decay, angle, re, im)]
    state = torch.randn(BATCH, WIDTH, MODES, dtype=torch.complex64).to(torch.complex128)
    segments = ids = None
    if with_segments:
        all_ids = documents(length, 1)
        ids, segments = all_ids[:, 0], all_ids[:, 1:]
    return {"inputs": inputs, "carry": Carry(state, ids) if with_carry else None, "segments": segments}


def modal_conv(*inputs: Tensor, backend: str = "auto", **how: Any) -> tuple[Tensor, Carry]:
    return scan(ModalConv(backend=backend), *inputs, **how)


def all_of(
    fn: Any, data: dict[str, Any], dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[Tensor | None, ...]:
    """Outputs and all gradients of ``fn``, for fixed upstream gradients of the output and of the outgoing carry."""
    leaves = [t.to(dtype).requires_grad_() for t in data["inputs"]]
    carry = data["carry"]
    if carry is not None:
        wide = torch.promote_types(dtype, torch.float32)
        wide = wide.to_complex() if carry.state.is_complex() else wide
        leaves.append(carry.state.to(wide).requires_grad_())
        carry = Carry(leaves[-1], carry.segment)
        settings = {**settings, "carry": carry}
    num_inputs = len(data["inputs"])
    y, after = fn(*leaves[:num_inputs], segments=data["segments"], **settings)
    outputs = [(t, upstream_of(t, seed)) for seed, t in enumerate((y, after.state)) if t.requires_grad]
    used, upstream = zip(*outputs, strict=True)
    grads = torch.autograd.grad(used, leaves, upstream, materialize_grads=True)
    return y.detach(), after.state.detach(), after.segment, *grads, *([] if carry is not None else [None])


def upstream_of(t: Tensor, seed: int) -> Tensor:
    dtype = torch.complex64 if t.is_complex() else torch.float32
    values = torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return values.to(t.dtype) if t.is_complex() else values.bfloat16().to(t.dtype)


def assert_all_close(
    actual: tuple[Tensor | None, ...],
    expected: tuple[Tensor | None, ...],
    tolerance: tuple[float, float],
    names: tuple[str, ...] = NAMES,
) -> None:
    """Compares what `all_of` returns: largest error, and relative RMS error."""
    for name, got, want in zip(names, actual, expected, strict=True):
        largest = 0.0 if want is None or not want.numel() else want.abs().max().item()
        exact = want is not None and not want.any()  # an FFT gives no exact zeros
        max_abs, floor = tolerance[0] * max(1.0, largest), 1.0 if exact else 0.0
        assert_close(name, got, want, max_abs=max_abs, rel_rms=tolerance[1], rms_floor=floor)


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("lengths", [[40, 60], [1, 2, 97], [30, 0, 70], [98, 1, 1], [64, 36]])
def test_shards_equal_the_whole(lengths: list[int], with_segments: bool) -> None:
    data = make(sum(lengths), with_segments=with_segments)
    if with_segments:
        data["segments"][1, lengths[0] :] += 1  # a document begins where the sequence is cut

    def in_shards(x: Tensor, *inputs: Tensor, carry: Carry, segments: Tensor | None) -> tuple[Tensor, Carry]:
        outs = []
        for length, stop in zip(lengths, accumulate(lengths), strict=True):
            ids = None if segments is None else segments[:, stop - length : stop]
            y, carry = modal_conv(x[:, stop - length : stop], *inputs, carry=carry, segments=ids)
            outs.append(y)
        return torch.cat(outs, dim=1), carry

    assert_all_close(all_of(in_shards, data), all_of(modal_conv, data), (1e-13, 1e-13))


@pytest.mark.parametrize("length", [*LENGTHS, 192, 1000])
def test_the_modal_convolution_is_its_recurrence(length: int, small_workspace: None) -> None:
    for with_carry, with_segments in ((False, False), (True, False), (False, True), (True, True)):
        data = make(length, with_carry=with_carry, with_segments=with_segments)
        expected = all_of(reference_modal_conv, data)
        assert_all_close(all_of(modal_conv, data), expected, TOLERANCES[torch.float64])
        if not BACKENDS.options["cpu"].unsupported_reason("cpu", torch.float32, torch.float32, MODES):
            actual = all_of(modal_conv, data, torch.float32, backend="cpu")
            assert_all_close(actual, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("length", [1, 500])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_precision_of_the_modal_convolution(backend: str, length: int, dtype: torch.dtype, with_segments: bool) -> None:
    data = make(length, with_segments=with_segments)
    actual = all_of(modal_conv, data, dtype, backend=backend)
    assert actual[0] is not None and actual[0].dtype == dtype
    assert actual[1] is not None and actual[1].dtype == torch.complex64
    assert_all_close(actual, all_of(reference_modal_conv, data), TOLERANCES[dtype])


def test_slow_modes_stay_exact_over_long_sequences(small_workspace: None) -> None:
    """Angles times 10000 tokens, and modes that forget in 1000000: fp32 against the same in fp64."""
    data = make(10_000)
    data["inputs"][1] = data["inputs"][1] - 6
    expected = all_of(modal_conv, data)
    assert_all_close(all_of(modal_conv, data, torch.float32), expected, (2e-5, 5e-6))


@pytest.mark.parametrize("length", [1, 64, 100, 500])
def test_the_modal_convolution_is_a_long_one_with_its_kernel(length: int) -> None:
    data = make(length, with_carry=False, with_segments=True)

    def free_form(x: Tensor, *parameters: Tensor, segments: Tensor) -> tuple[Tensor, Carry]:
        y, _ = long_conv(x, modal_kernel(*parameters, length=x.shape[1]), segments=segments)
        return y, Carry(y[:, :0])

    def modal_form(*inputs: Tensor, segments: Tensor) -> tuple[Tensor, Carry]:
        y, _ = modal_conv(*inputs, segments=segments)
        return y, Carry(y[:, :0])

    expected = all_of(free_form, data)
    assert_all_close(all_of(modal_form, data), expected, TOLERANCES[torch.float64])


def test_the_modal_kernel_is_a_sum_of_powers() -> None:
    _, log_decay, angle, re, im = make(0)["inputs"]
    exponents = torch.arange(1001).view(-1, 1, 1)
    decay = torch.complex(-log_decay.exp(), angle)
    expected = (torch.complex(re, im) * torch.exp(decay * exponents)).real.sum(-1).t()
    for length in (0, 1, 2, 15, 16, 17, 1001):
        actual = modal_kernel(log_decay, angle, re, im, length)
        assert_all_close((actual,), (expected[:, :length],), (1e-12, 1e-12), ("kernel",))


def test_every_boundary_of_a_chunk() -> None:
    """A document of every length up to two chunks, from every place."""
    edges = [(first, second) for first in range(1, 65) for second in range(first + 1, first + 130, 7)]
    first, second = torch.tensor(edges).t().unsqueeze(-1)
    position = torch.arange(200)
    ids = (position >= first).long() + (position >= second)
    x, *parameters = make(200)["inputs"]
    x, parameters = x[:1, :, :1].expand(len(edges), -1, -1), [p[:1] for p in parameters]
    (y, _), (expected, _) = (fn(x, *parameters, segments=ids) for fn in (modal_conv, reference_modal_conv))
    assert_all_close((y,), (expected,), TOLERANCES[torch.float64], ("y",))


def test_modal_gradients_are_those_of_finite_differences() -> None:
    data = make(6, with_segments=True)
    x, *parameters = data["inputs"]
    leaves = (x[..., :1], *(p[:1, :2] for p in parameters), data["carry"].state[:, :1, :2])
    leaves = tuple(t.clone().requires_grad_() for t in leaves)

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        carry = Carry(inputs[-1], data["carry"].segment)
        y, after = modal_conv(*inputs[:-1], carry=carry, segments=data["segments"])
        return y, after.state

    assert torch.autograd.gradcheck(run, leaves)


WAYS = {
    "reference": reference_modal_conv,
    "chunked": partial(modal_conv, backend="chunked"),
    "cpu": partial(modal_conv, backend="cpu"),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and (
        lack := BACKENDS.options["cpu"].unsupported_reason("cpu", *[torch.float32] * 2, MODES)
    ):
        pytest.skip(lack)
    return WAYS[request.param]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_documents_do_not_share_what_is_not_finite(way: Any, value: float, small_workspace: None) -> None:
    """Catches a mask that is a product: 0 times NaN. Documents end inside of chunks, with one, and with a slab."""
    edges = [0, 10, 40, 64, 150, 192, 300, 500]
    data = make(500)
    x, state = data["inputs"][0], data["carry"].state
    ids = torch.bucketize(torch.arange(500), torch.tensor(edges), right=True).expand(BATCH, -1)
    for spoilt in range(1, len(edges)):
        start, stop = edges[spoilt - 1 : spoilt + 1]
        spoilt_x, carry = x.clone(), Carry(state.clone(), ids[:, 0])
        spoilt_x[:, start, 0] = carry.state[:, 1] = value
        inputs = [spoilt_x, *data["inputs"][1:]]
        y, after, _, dx, *_ = all_of(way, {"inputs": inputs, "carry": carry, "segments": ids}, torch.float32)
        assert y is not None and after is not None and dx is not None
        wanted = torch.ones(BATCH, 500, WIDTH, dtype=torch.bool)
        wanted[:, start:stop, 0] = wanted[:, :10, 1] = False
        assert y.isfinite().equal(wanted) and dx.isfinite().all()
        assert after[:, 2:].isfinite().all() and after[:, 0].isfinite().all() == (stop < 500)


@pytest.mark.parametrize(
    ("log_decay", "angle"), [(torch.inf, torch.nan), (torch.inf, 1.0), (-torch.inf, 1.0), (800.0, torch.nan)]
)
def test_parameters_that_are_not_finite_show(way: Any, log_decay: float, angle: float) -> None:
    """Catches exp(-inf + i NaN), which is 0, and rates that make all decays finite."""
    data = make(70)
    data["inputs"][1][0, 0], data["inputs"][2][0, 0] = log_decay, angle
    y, after, _, dx, *others = all_of(way, data, torch.float32)
    assert y is not None and after is not None and dx is not None
    assert not y[..., 0].isfinite().any() and not dx[:, :-1, 0].isfinite().any()
    assert y[..., 1:].isfinite().all() and dx[..., 1:].isfinite().all()
    assert not after[:, 0, 0].isfinite().any() and after[:, 1:].isfinite().all()
    assert not any(x[0, 0].isfinite() for x in others[:2] if x is not None)


def modal_shard(axis: Axis, data: dict[str, Any], lengths: list[int]) -> tuple[Tensor | None, ...]:
    """`all_of` for this rank's tokens."""
    stop = list(accumulate(lengths))[axis.rank]
    start = stop - lengths[axis.rank]
    x, *parameters = data["inputs"]
    segments = data["segments"]
    shard = {
        "inputs": [x[:, start:stop], *parameters],
        "carry": data["carry"],
        "segments": None if segments is None else segments[:, start:stop],
    }

    def run(x: Tensor, *parameters: Tensor, **how: Any) -> tuple[Tensor, Carry]:
        # Upstream gradients are those of the whole sequence.
        y, after = scan(ModalConv(), x, *parameters, relay=AxisStateExchange(axis), **how)
        whole = torch.zeros(BATCH, sum(lengths), WIDTH, dtype=y.dtype)
        return torch.cat([whole[:, :start], y, whole[:, stop:]], dim=1), after

    y, state, ids, dx, *others = all_of(run, shard)
    assert y is not None
    return y[:, start:stop], state, ids, dx, *others


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("with_carry", [False, True])
@pytest.mark.parametrize("lengths", [[50, 51], [1, 100], [70, 0, 31], [0, 64, 37], [33, 0, 1, 67], [26, 26, 26, 23]])
def test_the_modal_convolution_across_ranks(lengths: list[int], with_carry: bool, with_segments: bool) -> None:
    """Catches a decay without its conjugate on the way back, a state in another document, a carry counted P times."""
    data = make(sum(lengths), with_carry=with_carry, with_segments=with_segments)
    if with_segments:
        data["segments"][1, lengths[0] :] += 1  # a document begins where the ranks meet
    expected = all_of(modal_conv, data)
    ranks = run_distributed(modal_shard, len(lengths), data, lengths)
    y, dx = (torch.cat([rank[i] for rank in ranks], dim=1) for i in (0, 3))
    sums = [sum(rank[i] for rank in ranks) for i in range(4, 8)]
    for _, state, ids, *_, dcarry in ranks:
        assert_all_close((y, state, ids, dx, *sums, dcarry), expected, (1e-12, 1e-12))


def test_mistakes_with_modes_are_named() -> None:
    with pytest.raises(InputError, match=r"ModalConv: causal = False.*CentredModalConv"):
        ModalConv(causal=False)
    with pytest.raises(InputError, match="ModalConv: inputs"):
        modal_conv(torch.zeros(2, 5, 3), *(torch.zeros(4, 2),) * 4)
