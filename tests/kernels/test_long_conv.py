"""Long convolution: the definition against the fast paths, outputs and all gradients, however the sequence is cut."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from longreach.errors import InputError
from longreach.kernels.long_conv import BACKENDS, chunked, long_conv, reference_long_conv
from longreach.kernels.long_conv import cpu as fft
from longreach.kernels.scan import Carry

BATCH, WIDTH = 2, 6
LENGTHS = [0, 1, 2, 3, 63, 64, 65, 500]
NAMES = ("y", "carry", "ids", "dx", "dkernel", "dskip", "dcarry")
# The largest error as a share of the largest value (or of 1), and the relative RMS error. A gradient in bf16 may be
# rounded twice: x reaches the output and the outgoing carry.
TOLERANCES = {torch.float64: (3e-15, 3e-15), torch.float32: (2e-6, 1e-6), torch.bfloat16: (8e-3, 3e-3)}


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
    """Several slices of the channels."""
    monkeypatch.setattr(chunked.Spectra, "workspace", 1)


def documents(length: int, before: int) -> Tensor:
    """Ids ``[BATCH, before + length]``: row 0 short documents and single tokens, row 1 some that cross chunks."""
    ids = torch.stack([(torch.rand(before + length) < 0.2).cumsum(0), torch.zeros(before + length, dtype=torch.long)])
    for start in (before + 2, before + 64, before + 65, before + 300):
        ids[1, start:] += 1
    return ids


def has_cpu() -> bool:
    return not BACKENDS.options["cpu"].unsupported_reason("cpu", torch.float32, torch.float32)


def make(
    length: int, num_taps: int, *, with_carry: bool = True, with_segments: bool = False, width: int = WIDTH
) -> dict[str, Any]:
    """Random inputs of `long_conv` in fp64, rounded to bf16."""
    x, state = torch.randn(BATCH, length, width), torch.randn(BATCH, num_taps - 1, width)
    kernel, skip = torch.randn(width, num_taps) / num_taps**0.5, torch.randn(width)
    x, kernel, skip, state = (t.bfloat16().double() for t in (x, kernel, skip, state))
    segments = ids = None
    if with_segments:
        all_ids = documents(length, num_taps - 1)
        all_ids[1, : num_taps // 2] = -1  # nothing was there
        ids, segments = all_ids[:, : num_taps - 1], all_ids[:, num_taps - 1 :]
        state = state * (ids >= 0).unsqueeze(-1)
    carry = Carry(state, ids) if with_carry else None
    return {"inputs": [x, kernel, skip], "carry": carry, "segments": segments}


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_fast_path_is_the_definition(
    length: int, causal: bool, small_workspace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_taps in {1, 5, max(length, 1), 2 * length + 2}:
        for with_carry, with_segments in ((False, False), (True, False), (False, True), (True, True)):
            data = make(length, num_taps, with_carry=with_carry, with_segments=with_segments)
            expected = all_of(reference_long_conv, data, causal=causal)
            for direct_len in (0, chunked.DIRECT_LEN) if length <= chunked.DIRECT_LEN else (0,):
                monkeypatch.setattr(chunked, "DIRECT_LEN", direct_len)
                actual = all_of(long_conv, data, causal=causal)
                assert_all_close(actual, expected, TOLERANCES[torch.float64])
                if has_cpu():
                    actual = all_of(long_conv, data, torch.float32, causal=causal, backend="cpu")
                    assert_all_close(actual, expected, TOLERANCES[torch.float32])


@pytest.mark.skipif(not has_cpu(), reason="no C++ compiler")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [1, 3, 16, 17, 40])
def test_vectors_and_tiles_that_are_not_full(width: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length up to 70 in turn, with fewer and with more taps; carried tokens and documents by turns too."""
    monkeypatch.setattr(chunked, "DIRECT_LEN", 0)
    for length in (*range(1, 71, 3 if width > 3 else 1), 1000):
        num_taps = (length * 7 // 10 + 1, length, length + 40)[length % 3]
        how = {"with_carry": length % 4 < 2, "with_segments": length % 2 == 0}
        data = make(length, min(num_taps, 150), width=width, **how)
        actual = all_of(long_conv, data, torch.float32, causal=causal, backend="cpu")
        assert_all_close(actual, all_of(reference_long_conv, data, causal=causal), (2e-6, 1e-5))


@pytest.mark.skipif(not has_cpu(), reason="no C++ compiler")
@pytest.mark.parametrize("size", [*(2**n for n in range(3, 15)), *(odd * 2**n for odd in (3, 5) for n in range(3, 12))])
def test_every_size_of_an_fft(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place of its input and output counts: few taps over many tokens, and many over few."""
    monkeypatch.setattr(chunked, "DIRECT_LEN", 0)
    assert fft.points(size) == size and fft.points(size - 1) == size
    for length, num_taps in ((size - 4, 5), (5, size - 4), (size // 2, size // 2 + 1)):
        if length * num_taps <= 2**18 and num_taps <= 2**12:
            data = make(length, num_taps, with_carry=False, width=2)
            actual = all_of(long_conv, data, torch.float32, backend="cpu")
            assert_all_close(actual, all_of(reference_long_conv, data), TOLERANCES[torch.float32])


@pytest.mark.skipif(not has_cpu(), reason="no C++ compiler")
@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("width", [16, 40])
def test_threads_and_strides_change_nothing(width: int, with_segments: bool) -> None:
    """Catches workspace that two threads share, rows or channels that none takes, sums in another order."""
    wide = torch.randn(5, 300, 3 * width)
    x, grad, kernel = wide[..., width : 2 * width], torch.randn(5, width, 300).transpose(1, 2), torch.randn(width, 250)
    ids = (torch.rand(5, 300) < 0.02).cumsum(1) if with_segments else None
    results = []
    for threads, strided in ((1, False), (2, True), (5, True)):
        torch.set_num_threads(threads)
        leaves = [x.detach().requires_grad_(), kernel.clone().requires_grad_()]
        x_in, kernel_in = leaves if strided else [leaf.contiguous() for leaf in leaves]
        kernel_in = kernel_in.t().contiguous().t() if strided else kernel_in
        y, _ = long_conv(x_in, kernel_in, segments=ids, backend="cpu")
        results.append((y, *torch.autograd.grad(y, leaves, grad if strided else grad.contiguous())))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not has_cpu(), reason="no C++ compiler")
@pytest.mark.parametrize(("dtype", "kernel_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_tokens_and_taps_of_different_dtypes(dtype: torch.dtype, kernel_dtype: torch.dtype) -> None:
    data = make(150, 120, width=17)

    def mixed(x: Tensor, kernel: Tensor, skip: Tensor, **how: Any) -> tuple[Tensor, Carry]:
        return long_conv(x.to(dtype), kernel.to(kernel_dtype), skip, backend="cpu", **how)

    expected = all_of(reference_long_conv, data)
    assert_all_close(all_of(mixed, data, torch.float32), expected, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("length", [10, 500])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_precision(backend: str, length: int, dtype: torch.dtype, with_segments: bool) -> None:
    data = make(length, 700, with_segments=with_segments)
    actual = all_of(long_conv, data, dtype, backend=backend)
    assert actual[0] is not None and actual[0].dtype == dtype
    assert_all_close(actual, all_of(reference_long_conv, data), TOLERANCES[dtype])


def test_the_current_token_is_the_first_tap_or_the_middle_one() -> None:
    kernel = torch.arange(1.0, 5.0, dtype=torch.float64).view(1, 4)
    impulse = torch.zeros(1, 20, 1, dtype=torch.float64)
    impulse[:, 5] = 1
    for causal, first in ((True, 5), (False, 3)):
        y, _ = long_conv(impulse, kernel, causal=causal)
        assert y.flatten()[first : first + 4].tolist() == pytest.approx([1, 2, 3, 4], abs=1e-14)
        assert y.abs().sum().item() == pytest.approx(10, abs=1e-13)


def test_without_skip() -> None:
    data = make(65, 30)
    x, kernel, _ = data["inputs"]
    how = {"carry": data["carry"]}
    assert_all_close(
        (long_conv(x, kernel, **how)[0],), (reference_long_conv(x, kernel, **how)[0],), (1e-14, 1e-14), ("y",)
    )


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("lengths", [[40, 60], [1, 2, 97], [30, 0, 70], [98, 1, 1], [64, 36]])
@pytest.mark.parametrize("num_taps", [1, 20, 100, 150])
def test_shards_equal_the_whole(lengths: list[int], num_taps: int, with_segments: bool) -> None:
    data = make(sum(lengths), num_taps, with_segments=with_segments)
    if with_segments:
        data["segments"][1, lengths[0] :] += 1  # a document begins where the sequence is cut

    def in_shards(x: Tensor, *inputs: Tensor, carry: Carry, segments: Tensor | None) -> tuple[Tensor, Carry]:
        outs = []
        for length, stop in zip(lengths, accumulate(lengths), strict=True):
            ids = None if segments is None else segments[:, stop - length : stop]
            y, carry = long_conv(x[:, stop - length : stop], *inputs, carry=carry, segments=ids)
            outs.append(y)
        return torch.cat(outs, dim=1), carry

    assert_all_close(all_of(in_shards, data), all_of(long_conv, data), (1e-13, 1e-13))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_mix(causal: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Each document alone gives what it gives among the others, single tokens too; nothing leaks through an FFT."""
    lengths = [1, 1, 7, 1, 64, 3, 33]
    x, kernel, skip = make(sum(lengths), 40)["inputs"]
    x = x * torch.repeat_interleave(10.0 ** torch.arange(-3, 4), torch.tensor(lengths)).flip(0).view(1, -1, 1)
    ids = torch.repeat_interleave(torch.arange(len(lengths)) * 2, torch.tensor(lengths)).expand(BATCH, -1)
    y, _ = long_conv(x.to(dtype), kernel.to(dtype), skip.to(dtype), causal=causal, segments=ids)
    for length, stop in zip(lengths, accumulate(lengths), strict=True):
        alone, _ = reference_long_conv(x[:, stop - length : stop], kernel, skip, causal=causal)
        scale = alone.abs().max()
        assert_all_close((y[:, stop - length : stop] / scale,), (alone / scale,), (tolerance, tolerance), ("y",))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_no_token_sees_a_place_without_a_token(causal: bool, dtype: torch.dtype) -> None:
    data = make(70, 30, with_carry=False, with_segments=True)
    x, *kernel_and_skip = (t.to(dtype) for t in data["inputs"])
    padded = torch.nn.functional.pad(x, (0, 0, 3, 3), value=100.0)
    ids = torch.nn.functional.pad(data["segments"], (3, 3), value=-1)
    actual, _ = long_conv(padded, *kernel_and_skip, causal=causal, segments=ids)
    expected, _ = long_conv(x, *kernel_and_skip, causal=causal, segments=data["segments"])
    assert_all_close((actual[:, 3:-3],), (expected,), TOLERANCES[dtype], ("y",))
    assert actual.isfinite().all()


@pytest.mark.parametrize("length", [10, 65])
def test_a_carry_may_be_of_any_length_and_without_ids(length: int) -> None:
    data = make(length, 20, with_segments=True)
    data["carry"] = Carry(data["carry"].state)
    expected = all_of(reference_long_conv, data)
    assert_all_close(all_of(long_conv, data), expected, TOLERANCES[torch.float64])
    state = data["carry"].state
    longer = {**data, "carry": Carry(torch.cat([torch.ones_like(state), state], dim=1))}
    assert_all_close(all_of(long_conv, longer)[:3], expected[:3], TOLERANCES[torch.float64], NAMES[:3])
    shorter = {**data, "carry": Carry(state[:, 15:])}
    cleared = {**data, "carry": Carry(torch.cat([torch.zeros_like(state[:, :15]), state[:, 15:]], dim=1))}
    y, dx = all_of(long_conv, shorter)[0:4:3]
    assert_all_close((y, dx), all_of(reference_long_conv, cleared)[0:4:3], TOLERANCES[torch.float64], ("y", "dx"))


def test_more_ranks_than_channels_leave_some_without() -> None:
    """`Span.by_channel` then calls with no channel at all."""
    inputs = [torch.zeros(2, 70, 0), torch.zeros(0, 9), torch.zeros(0)]
    actual = all_of(long_conv, {"inputs": inputs, "carry": None, "segments": None})
    assert [None if t is None else t.shape for t in actual[3:6]] == [t.shape for t in inputs]


@pytest.mark.parametrize("length", [3, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_finite_differences(causal: bool, length: int) -> None:
    data = make(length, 4, with_segments=True)
    leaves = [t[..., :2].clone() if t.dim() == 3 else t[:2].clone() for t in data["inputs"]]
    state = data["carry"].state[..., :2].clone()

    def run(x: Tensor, kernel: Tensor, skip: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        carry = Carry(state, data["carry"].segment)
        y, after = long_conv(x, kernel, skip, causal=causal, carry=carry, segments=data["segments"])
        return y, after.state

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in (*leaves, state)))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"x": torch.zeros(2, 5)}, "long_conv: x"),
        ({"kernel": torch.zeros(4, 4)}, "long_conv: kernel"),
        ({"kernel": torch.zeros(WIDTH, 0)}, "long_conv: kernel"),
        ({"skip": torch.zeros(4)}, "long_conv: skip"),
        ({"segments": torch.zeros(2, 9, dtype=torch.long)}, "long_conv: segments"),
        ({"carry": Carry(torch.zeros(2, 3, 4))}, "long_conv: carry.state"),
        ({"carry": Carry(torch.zeros(2, 3, WIDTH), torch.zeros(2, 3, dtype=torch.long))}, "long_conv: segments"),
        ({"backend": "cuda"}, "long_conv: backend"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], field: str) -> None:
    x, kernel, skip = make(10, 4)["inputs"]
    with pytest.raises(InputError, match=field):
        long_conv(**{"x": x, "kernel": kernel, "skip": skip, **change})
