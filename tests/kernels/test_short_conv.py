"""Short convolution: the definition against the fast path, outputs and all gradients, however the sequence is cut."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from longreach.errors import InputError
from longreach.kernels.scan import Carry
from longreach.kernels.short_conv import BACKENDS, chunked, reach, reference_short_conv, short_conv

BATCH, WIDTH = 2, 5
LENGTHS = [0, 1, 2, 3, 63, 64, 65, 500]
NAMES = ("y", "carry", "ids", "dx", "dweight", "dbias", "dcarry")
# The largest error as a share of the largest value (or of 1), and the relative RMS error.
TOLERANCES = {torch.float64: (1e-14, 1e-15), torch.float32: (3e-7, 3e-7), torch.bfloat16: (4e-3, 3e-3)}


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


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 tokens, so that short sequences have several."""
    monkeypatch.setattr(chunked, "CPU_CHUNK", 64 * BATCH * WIDTH)


def make(length: int, num_taps: int, *, with_carry: bool = True, with_segments: bool = False) -> dict[str, Any]:
    """Random inputs in fp64, rounded to bf16."""
    x = torch.randn(BATCH, length, WIDTH)
    weight, bias = torch.randn(WIDTH, num_taps) / num_taps**0.5, torch.randn(WIDTH)
    state = torch.randn(BATCH, num_taps - 1, WIDTH)
    x, weight, bias, state = (t.bfloat16().double() for t in (x, weight, bias, state))
    segments = ids = None
    if with_segments:
        # Row 0: short documents and single tokens. Row 1: documents across chunks, a single token between two of them.
        tokens = num_taps - 1 + length
        all_ids = torch.stack([(torch.rand(tokens) < 0.4).cumsum(0), torch.zeros(tokens, dtype=torch.long)])
        for start in (num_taps, 64 + num_taps, 65 + num_taps, 300):
            all_ids[1, start:] += 1
        all_ids[1, : num_taps // 2] = -1  # nothing was there
        ids, segments = all_ids[:, : num_taps - 1], all_ids[:, num_taps - 1 :]
        state = state * (ids >= 0).unsqueeze(-1)
    carry = Carry(state, ids) if with_carry else None
    return {"x": x, "weight": weight, "bias": bias, "carry": carry, "segments": segments}


def all_of(
    fn: Any, data: dict[str, Any], dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[Tensor | None, ...]:
    """Outputs and all gradients of ``fn``, for fixed upstream gradients of the output and of the outgoing carry."""
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (data["x"], data["weight"], data["bias"])]
    carry = data["carry"]
    if carry is not None:
        leaves.append(carry.state.to(dtype).requires_grad_())
        carry = Carry(leaves[3], carry.segment)
    y, after = fn(*leaves[:3], carry=carry, segments=data["segments"], **settings)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for t in (y, after.state)]
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad([y, after.state], wanted, upstream, materialize_grads=True))
    named = [None if leaf is None else next(grads) for leaf in leaves]
    return y.detach(), after.state.detach(), after.segment, *named, *([] if carry is not None else [None])


def assert_all_close(
    actual: tuple[Tensor | None, ...],
    expected: tuple[Tensor | None, ...],
    tolerance: tuple[float, float] = TOLERANCES[torch.float64],
    names: tuple[str, ...] = NAMES,
) -> None:
    """Compares what `all_of` returns: largest error, and relative RMS error."""
    for name, got, want in zip(names, actual, expected, strict=True):
        largest = 0.0 if want is None or not want.numel() else want.abs().max().item()
        assert_close(name, got, want, max_abs=tolerance[0] * max(1.0, largest), rel_rms=tolerance[1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_fast_path_is_the_definition(length: int, causal: bool) -> None:
    for num_taps in range(1, 9):
        for with_carry, with_segments in ((False, False), (True, False), (False, True), (True, True)):
            data = make(length, num_taps, with_carry=with_carry, with_segments=with_segments)
            activation = "silu" if num_taps % 2 else None
            settings = {"causal": causal, "activation": activation}
            expected = all_of(reference_short_conv, data, **settings)
            assert_all_close(all_of(short_conv, data, **settings), expected)
            if not BACKENDS.options["cpu"].unsupported_reason("cpu", torch.float32, torch.float32, num_taps):
                actual = all_of(short_conv, data, torch.float32, backend="cpu", **settings)
                assert_all_close(actual, expected, (1e-6, 1e-6))


def test_threads_and_strides_change_nothing() -> None:
    """Catches chunks that two threads share or none takes, and tokens that are taken for neighbours in memory."""
    wide = torch.randn(2, 2100, 3 * 24)
    x, weight, grad = wide[..., 24:48], torch.randn(24, 4), torch.randn(2, 24, 2100).transpose(1, 2)
    results = []
    for threads, strided in ((1, False), (2, True), (5, True)):
        torch.set_num_threads(threads)
        leaves = [x.detach().requires_grad_(), weight.clone().requires_grad_()]
        y, _ = short_conv(leaves[0] if strided else leaves[0].contiguous(), leaves[1], activation="silu")
        results.append((y, *torch.autograd.grad(y, leaves, grad if strided else grad.contiguous())))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_precision(dtype: torch.dtype, with_segments: bool, activation: str | None) -> None:
    data = make(500, 4, with_segments=with_segments)
    settings = {"activation": activation}
    expected = all_of(reference_short_conv, data, **settings)
    actual = all_of(short_conv, data, dtype, **settings)
    assert actual[0] is not None and actual[0].dtype == dtype
    assert_all_close(actual, expected, TOLERANCES[dtype])


def test_the_current_token_is_the_last_tap_or_the_middle_one() -> None:
    x = torch.randn(1, 6, 1, dtype=torch.float64)
    weight = torch.arange(1.0, 5.0, dtype=torch.float64).view(1, 4)
    impulse = torch.zeros_like(x)
    impulse[:, 2] = 1
    y, _ = short_conv(impulse, weight)
    assert y.flatten().tolist() == [0, 0, 4, 3, 2, 1]
    assert reach(4) == (3, 0)
    y, _ = short_conv(impulse, weight, causal=False)
    assert y.flatten().tolist() == [0, 4, 3, 2, 1, 0]
    assert reach(4, causal=False) == (2, 1)


def test_without_bias() -> None:
    data = make(65, 4)
    data["bias"] = None
    assert_all_close(all_of(short_conv, data, activation="silu"), all_of(reference_short_conv, data, activation="silu"))


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("lengths", [[40, 60], [1, 2, 97], [3, 0, 97], [98, 1, 1], [64, 36]])
@pytest.mark.parametrize("num_taps", [1, 2, 4, 8])
def test_shards_equal_the_whole(lengths: list[int], num_taps: int, with_segments: bool) -> None:
    data = make(sum(lengths), num_taps, with_segments=with_segments)
    if with_segments:
        data["segments"][1, lengths[0] :] += 1  # a document begins where the sequence is cut

    def in_shards(
        x: Tensor, weight: Tensor, bias: Tensor, *, carry: Carry, segments: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Carry]:
        outs = []
        for length, stop in zip(lengths, accumulate(lengths), strict=True):
            ids = None if segments is None else segments[:, stop - length : stop]
            y, carry = short_conv(x[:, stop - length : stop], weight, bias, carry=carry, segments=ids, **settings)
            outs.append(y)
        return torch.cat(outs, dim=1), carry

    assert_all_close(all_of(in_shards, data, activation="silu"), all_of(short_conv, data, activation="silu"))


@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_mix(causal: bool) -> None:
    """Each document alone gives what it gives among the others, single tokens too."""
    lengths = [1, 1, 7, 1, 64, 3]
    data = make(sum(lengths), 4, with_carry=False)
    data["segments"] = torch.repeat_interleave(torch.arange(6) * 2, torch.tensor(lengths)).expand(BATCH, -1)
    y, _ = short_conv(**data, causal=causal)
    for length, stop in zip(lengths, accumulate(lengths), strict=True):
        alone, _ = short_conv(data["x"][:, stop - length : stop], data["weight"], data["bias"], causal=causal)
        assert_all_close((y[:, stop - length : stop],), (alone,), names=("y",))


@pytest.mark.parametrize("causal", [True, False])
def test_no_token_sees_a_place_without_a_token(causal: bool) -> None:
    """The ids of `Span.halo_segments`: -1 beyond the ends of the sequence, whatever lies there."""
    data = make(70, 4, with_carry=False, with_segments=True)
    x = torch.nn.functional.pad(data["x"], (0, 0, 3, 3), value=100.0)
    ids = torch.nn.functional.pad(data["segments"], (3, 3), value=-1)
    padded, _ = short_conv(x, data["weight"], data["bias"], causal=causal, segments=ids)
    y, _ = short_conv(**data, causal=causal)
    assert_all_close((padded[:, 3:-3],), (y,), names=("y",))


def test_a_carry_without_ids_belongs_to_the_first_document() -> None:
    data = make(65, 4, with_segments=True)
    data["carry"] = Carry(data["carry"].state)
    expected = all_of(reference_short_conv, data)
    assert_all_close(all_of(short_conv, data), expected)
    data["carry"] = Carry(data["carry"].state, data["segments"][:, :1].expand(-1, 3))
    assert_all_close(all_of(short_conv, data), expected)


def test_a_longer_carry_counts_by_its_last_tokens_and_a_shorter_one_as_zeros_before() -> None:
    data = make(10, 4)
    state = data["carry"].state
    expected = all_of(short_conv, data)
    longer = Carry(torch.cat([torch.ones_like(state), state], dim=1))
    assert_all_close(short_conv(**{**data, "carry": longer})[:1], expected[:1], names=("y",))
    cleared = Carry(torch.cat([torch.zeros_like(state[:, :2]), state[:, 2:]], dim=1))
    y, after = short_conv(**{**data, "carry": Carry(state[:, 2:])})
    expected_y, _ = short_conv(**{**data, "carry": cleared})
    assert_all_close((y, after.state), (expected_y, data["x"][:, -3:]), names=("y", "carry"))


def test_the_carry_does_not_keep_the_shard_alive() -> None:
    _, after = short_conv(**make(500, 4))
    assert after.state.untyped_storage().nbytes() == after.state.numel() * after.state.element_size()


def test_inputs_need_not_be_contiguous() -> None:
    data = make(70, 3, with_segments=True)
    x = data["x"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y, _ = short_conv(**{**data, "x": x})
    (dx,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient, too
    plain = data["x"].requires_grad_()
    expected, _ = reference_short_conv(**{**data, "x": plain})
    assert_all_close((y, dx), (expected, *torch.autograd.grad(expected.sum(), plain)), names=("y", "dx"))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_finite_differences(causal: bool) -> None:
    data = make(5, 3, with_segments=True)
    leaves = [data[name].requires_grad_() for name in ("x", "weight", "bias")]
    state = data["carry"].state.requires_grad_()

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        carry = Carry(state, data["carry"].segment)
        y, after = short_conv(x, weight, bias, activation="silu", causal=causal, carry=carry, segments=data["segments"])
        return y, after.state

    assert torch.autograd.gradcheck(run, (*leaves, state))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"x": torch.zeros(2, 5)}, "short_conv: x"),
        ({"x": torch.zeros(2, 10, WIDTH, dtype=torch.long)}, "short_conv: x"),
        ({"weight": torch.zeros(4, 4)}, "short_conv: weight"),
        ({"weight": torch.zeros(WIDTH, 0)}, "short_conv: weight"),
        ({"bias": torch.zeros(4)}, "short_conv: bias"),
        ({"activation": "relu"}, "short_conv: activation"),
        ({"segments": torch.zeros(2, 9, dtype=torch.long)}, "short_conv: segments"),
        ({"carry": Carry(torch.zeros(2, 3, 4))}, "short_conv: carry.state"),
        ({"carry": Carry(torch.zeros(2, 3, WIDTH), torch.zeros(2, dtype=torch.long))}, "short_conv: carry.segment"),
        ({"carry": Carry(torch.zeros(2, 3, WIDTH), torch.zeros(2, 3, dtype=torch.long))}, "short_conv: segments"),
        ({"backend": "cuda"}, "short_conv: backend"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        short_conv(**{**make(10, 4, with_carry=False), **change})
