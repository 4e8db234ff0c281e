"""Span's verbs `halo` and `by_channel` on ranks against the whole sequence on one, outputs and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import run_distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longreach.kernels.long_conv import long_conv, reference_long_conv
from longreach.kernels.scan import Carry
from longreach.kernels.short_conv import reach, reference_short_conv, short_conv
from longreach.parallel import reshard
from longreach.parallel.mesh import Axis
from longreach.parallel.span import ChannelShard, Span

BATCH = 2
TAPS = 5
LENGTHS = [[50, 51], [1, 100], [2, 0, 99], [0, 64, 37], [98, 1, 1, 1], [33, 2, 1, 65], [26, 26, 26, 23]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors this small, a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(length: int, width: int, num_taps: int, with_segments: bool, *cuts: int) -> dict[str, Any]:
    """Inputs in fp64 of a convolution over ``length`` tokens; a document begins at every cut of row 1."""
    inputs = [torch.randn(BATCH, length, width), torch.randn(width, num_taps) / num_taps**0.5, torch.randn(width)]
    segments = None
    if with_segments:
        segments = torch.stack([(torch.rand(length) < 0.1).cumsum(0), torch.zeros(length, dtype=torch.long)])
        for cut in cuts:
            segments[1, cut:] += 1
    return {"inputs": [t.double() for t in inputs], "segments": segments}


def upstream_of(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)


def whole_of(fn: Any, data: dict[str, Any], **settings: Any) -> list[Tensor]:
    """Output and gradients of the reference ``fn`` over the whole sequence."""
    leaves = [t.clone().requires_grad_() for t in data["inputs"]]
    y, _ = fn(*leaves, segments=data["segments"], **settings)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream_of(y))]


def share_of(axis: Axis, mixer: Any, data: dict[str, Any], blocks: list[list[int]]) -> list[Tensor]:
    """Output and gradients of ``mixer(span, x, weights)`` for this rank's tokens of every block (lists of lengths)."""
    leaves = [t.clone().requires_grad_() for t in data["inputs"]]
    x, *weights = leaves
    carries: Any = {}
    first, outs, mine = 0, [], []
    for lengths in blocks:
        stop = first + sum(lengths[: axis.rank + 1])
        tokens = slice(stop - lengths[axis.rank], stop)
        segments = None if data["segments"] is None else data["segments"][:, tokens]
        span = Span(
            axis=axis, lengths=lengths, start=first, segments=segments, carry=carries, keep_carry=len(blocks) > 1
        )
        outs.append(mixer(span.for_layer("layer"), x[:, tokens], *weights))
        mine.append(tokens)
        carries, first = span.carry_out, first + sum(lengths)
    upstream = upstream_of(x)
    grads = torch.autograd.grad(outs, leaves, [upstream[:, tokens] for tokens in mine], materialize_grads=True)
    y = torch.zeros_like(x)
    for tokens, out in zip(mine, outs, strict=True):
        y[:, tokens] = out
    return [y.detach(), *grads]


def short_by_halo(causal: bool, inside_first: bool) -> Any:
    def mixer(span: Span, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        left, right = reach(weight.shape[1], causal)

        def convolve(tokens: Tensor, ids: Tensor | None) -> Tensor:
            return short_conv(tokens, weight, bias, causal=causal, segments=ids)[0]

        if inside_first:
            return span.halo(x, left, right, convolve)
        ids = span.halo_segments(left, right)
        return convolve(span.halo(x, left, right), ids)[:, left : left + x.shape[1]]

    return mixer


def long_by_channel(causal: bool) -> Any:
    def mixer(span: Span, x: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
        def run(whole: ChannelShard) -> Tensor:
            carry = segments = None
            if whole.num_past:
                ids = None if whole.segments is None else whole.segments[:, : whole.num_past]
                carry = Carry(whole.tokens[:, : whole.num_past], ids)
            if whole.segments is not None:
                segments = whole.segments[:, whole.num_past :]
            mine = kernel[whole.channels], skip[whole.channels]
            return long_conv(whole.tokens[:, whole.num_past :], *mine, causal=causal, carry=carry, segments=segments)[0]

        return span.by_channel(run, x, reach=kernel.shape[1] - 1 if causal else None)

    return mixer


def halo_share(
    axis: Axis, data: dict[str, Any], blocks: list[list[int]], causal: bool, inside_first: bool = True
) -> list[Tensor]:
    return share_of(axis, short_by_halo(causal, inside_first), data, blocks)


def by_channel_share(axis: Axis, data: dict[str, Any], blocks: list[list[int]], causal: bool) -> list[Tensor]:
    return share_of(axis, long_by_channel(causal), data, blocks)


def assert_whole(ranks: list[list[Tensor]], expected: list[Tensor]) -> None:
    """What the ranks computed, each for its tokens, adds up to the whole; weights' gradients are summands."""
    for name, parts, want in zip(("y", "dx", "dweight", "dbias"), zip(*ranks, strict=True), expected, strict=True):
        error = sum(parts) - want
        assert error.abs().max() <= 1e-12, name
        assert error.square().mean().sqrt() <= 1e-14 * max(1, want.square().mean().sqrt()), name


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_short_convolution_by_halo(lengths: list[int], causal: bool, with_segments: bool) -> None:
    """Catches shares shorter than the reach, a borrowed token's gradient that is lost, documents seen across ranks."""
    data = make(sum(lengths), 3, TAPS, with_segments, *accumulate(lengths))
    expected = whole_of(reference_short_conv, data, causal=causal)
    for inside_first in (False, True):
        assert_whole(run_distributed(halo_share, len(lengths), data, [lengths], causal, inside_first), expected)


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize(("causal", "taps"), [(True, 130), (False, 130), (True, 9)])
@pytest.mark.parametrize(("lengths", "width"), [(LENGTHS[0], 5), (LENGTHS[2], 2), (LENGTHS[3], 7), (LENGTHS[5], 3)])
def test_a_long_convolution_by_channel(
    lengths: list[int], width: int, causal: bool, taps: int, with_segments: bool
) -> None:
    """Catches channels that do not divide by the ranks, ranks without channels, tokens in the wrong order; of few taps,
    which tokens of neighbours serve better, a loan over several ranks.
    """
    data = make(sum(lengths), width, taps, with_segments, *accumulate(lengths))
    expected = whole_of(reference_long_conv, data, causal=causal)
    assert_whole(run_distributed(by_channel_share, len(lengths), data, [lengths], causal), expected)


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize(
    "blocks", [[[101], [1], [2], [60]], [[50, 51], [1, 1], [0, 3], [30, 40]], [[2, 1, 1], [0, 1, 0], [9, 9, 2]]]
)
def test_blocks_of_a_sequence_one_after_another(blocks: list[list[int]], with_segments: bool) -> None:
    """Streaming: every block finds its past in the carry of the last one, and gradients go back through it."""
    length = sum(map(sum, blocks))
    for num_taps, fn, share in ((TAPS, reference_short_conv, halo_share), (20, reference_long_conv, by_channel_share)):
        data = make(length, 3, num_taps, with_segments, *accumulate(map(sum, blocks)))
        expected = whole_of(fn, data, causal=True)
        assert_whole(run_distributed(share, len(blocks[0]), data, blocks, True), expected)


def sliced_share(axis: Axis, data: dict[str, Any], lengths: list[int]) -> list[Tensor]:
    slices: list[int] = []

    def mixer(span: Span, x: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
        def run(whole: ChannelShard) -> Tensor:
            slices.append(whole.tokens.shape[2])
            y, _ = long_conv(whole.tokens, kernel[whole.channels], skip[whole.channels], segments=whole.segments)
            return y[:, whole.num_past :]

        return span.by_channel(run, x, reach=kernel.shape[1] - 1)

    blocks = [[length - 20 for length in lengths], [20 for _ in lengths]]  # the second finds a carry
    with mock.patch.object(reshard, "MIN_SLICE_BYTES", 1 << 8):
        found = share_of(axis, mixer, data, blocks)
    own = reshard.channel_shard_sizes(19, axis.size)[axis.rank]
    assert len(slices) == 2 * reshard.MAX_SLICES and sum(slices) == 2 * own
    return found


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("lengths", [[50, 51], [40, 70, 21]])
def test_channels_in_slices(lengths: list[int], with_segments: bool) -> None:
    """Catches slices that come back in another order, of channels that do not divide by ranks and slices."""
    data = make(sum(lengths), 19, 130, with_segments, *accumulate(lengths))
    expected = whole_of(reference_long_conv, data)
    assert_whole(run_distributed(sliced_share, len(lengths), data, lengths), expected)


class _ZeroPadded(TorchDispatchMode):
    """Counts the elements of gradients of slices: zeros as large as what was sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements += result.numel() if func.name() == "aten::slice_backward" else 0
        return result


def zero_gradients(axis: Axis, length: int, verb: str) -> int:
    """Elements of zero-padded gradients in the backward pass of a causal short convolution of this rank's shard."""
    width = 4
    x, weight = torch.randn(1, length, width, requires_grad=True), torch.randn(width, TAPS, requires_grad=True)
    span = Span(axis, (length,) * axis.size)
    if verb == "halo":
        y = span.halo(x, TAPS - 1, 0, lambda tokens, _: short_conv(tokens, weight, backend="chunked")[0])
    else:
        operator = short_conv if verb == "short_conv" else long_conv
        y = operator(x, weight, backend="chunked")[0]
    with _ZeroPadded() as padded:
        y.sum().backward()
    return padded.elements


@pytest.mark.parametrize("verb", ["halo", "short_conv", "long_conv"])
def test_an_empty_slice_has_no_gradient_of_the_whole_size(verb: str) -> None:
    """Catches ``x[:, :0]`` in a graph: its gradient costs two passes over memory."""
    length = 100
    for elements in run_distributed(zero_gradients, 2, length, verb):
        assert elements < length
