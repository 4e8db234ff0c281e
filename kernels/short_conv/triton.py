"""Short convolution in Triton: each program reads a chunk of tokens in order, a sliding window of them in registers.

Every token is read once, except the W - 1 beside a chunk (backward 2 (W - 1)). With chunks of C tokens, in bf16,
forward moves ``4 + 2 (W - 1) / C`` bytes per token and channel, backward ``6 + 6 (W - 1) / C`` and ``8 (W + 1) / C``
for the chunks' sums of the gradients of weight and bias. Those are fp32 inside a chunk and fp64 between chunks.
"""

# Kernels have Triton's types, which mypy does not know.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import TYPES, Tiling, Variant, launch_fastest
from .autograd import ConvInputs

MIN_TAPS, MAX_TAPS = 2, 8
CHANNELS = 256
# Programs that keep the memory of a large GPU busy; a shard with fewer chunks than that has shorter ones.
PROGRAMS = 4096
MIN_CHUNK, MAX_CHUNK = 32, 512


@triton.jit
def _where(condition, column, width):
    """The mask of existing columns, all False unless ``condition`` (a scalar) holds."""
    return column < tl.where(condition, width, 0)


@triton.jit
def _read(x, past, token, x_token, past_token, num_past, length, column, width):
    """Channels ``column`` of a token: of ``past`` where ``token`` is negative, zero where there is none."""
    position = tl.full([], token, tl.int64)
    before = past + (position + num_past) * past_token
    source = tl.where(position < 0, before, x + position * x_token)
    mask = _where((position >= -num_past) & (position < length), column, width)
    return tl.load(source + column, mask=mask, other=0)


@triton.jit
def _read_id(segments, past_ids, token, segment_token, past_token, num_past, length):
    """The document of a token, -1 where there is no token."""
    position = tl.full([], token, tl.int64)
    before = past_ids + (position + num_past) * past_token
    source = tl.where(position < 0, before, segments + position * segment_token)
    return tl.load(source, mask=(position >= -num_past) & (position < length), other=-1)


@triton.jit
def _forward_kernel(
    x,
    weight,
    bias,
    past,
    past_ids,
    segments,
    y,
    x_batch,
    x_token,
    weight_channel,
    weight_tap,
    past_batch,
    past_token,
    past_id_batch,
    past_id_token,
    segment_batch,
    segment_token,
    num_past,
    length,
    width,
    chunk_len,
    num_chunks,
    LEFT: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    num_tiles = (width + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    column = program % num_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = column < width
    batch = (program // num_tiles // num_chunks).to(tl.int64)
    first = program // num_tiles % num_chunks * chunk_len
    last = first + tl.minimum(chunk_len, length - first)
    x += batch * x_batch
    past += batch * past_batch
    y += batch * length * width
    if SEGMENTS:
        segments += batch * segment_batch
        past_ids += batch * past_id_batch
    taps = ()
    for tap in tl.static_range(TAPS):
        taps += (tl.load(weight + column * weight_channel + tap * weight_tap, mask=mask, other=0).to(tl.float32),)
    offset = tl.zeros([BLOCK_D], tl.float32)
    if BIAS:
        offset += tl.load(bias + column, mask=mask, other=0).to(tl.float32)

    # The window holds tokens [i - LEFT, i + TAPS - LEFT) of the next token i, but its last.
    window, ids = (), ()
    for tap in tl.static_range(TAPS - 1):
        window += (_read(x, past, first - LEFT + tap, x_token, past_token, num_past, length, column, width),)
        if SEGMENTS:
            ids += (_read_id(segments, past_ids, first - LEFT + tap, segment_token, past_id_token, num_past, length),)
    for begin in range(first, last, STEP):
        for step in tl.static_range(STEP):
            token = begin + step + TAPS - 1 - LEFT
            window += (_read(x, past, token, x_token, past_token, num_past, length, column, width),)
            if SEGMENTS:
                ids += (_read_id(segments, past_ids, token, segment_token, past_id_token, num_past, length),)
        for step in tl.static_range(STEP):
            z = offset
            for tap in tl.static_range(TAPS):
                seen = window[step + tap].to(tl.float32)
                if SEGMENTS:
                    seen = tl.where(ids[step + tap] == ids[step + LEFT], seen, 0.0)
                z += taps[tap] * seen
            if SILU:
                z *= tl.sigmoid(z)
            target = y + tl.full([], begin + step, tl.int64) * width + column
            tl.store(target, z.to(y.dtype.element_ty), mask=_where(begin + step < last, column, width))
        window = window[STEP:]
        if SEGMENTS:
            ids = ids[STEP:]


@triton.jit
def _backward_kernel(
    grad,
    x,
    weight,
    bias,
    past,
    past_ids,
    segments,
    dx,
    dpast,
    sums,
    grad_batch,
    grad_token,
    x_batch,
    x_token,
    weight_channel,
    weight_tap,
    past_batch,
    past_token,
    past_id_batch,
    past_id_token,
    segment_batch,
    segment_token,
    num_past,
    length,
    width,
    chunk_len,
    num_chunks,
    LEFT: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """``sums [B, N, W + 1, D]``: each chunk's gradients of the taps and the bias. The first chunk includes the past."""
    num_tiles = (width + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    column = program % num_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = column < width
    place = (program // num_tiles).to(tl.int64)
    batch = place // num_chunks
    first = program // num_tiles % num_chunks * chunk_len
    last = first + tl.minimum(chunk_len, length - first)
    first = tl.where(first == 0, -num_past, first)
    grad += batch * grad_batch
    x += batch * x_batch
    past += batch * past_batch
    dx += batch * length * width
    dpast += batch * num_past * width
    if SEGMENTS:
        segments += batch * segment_batch
        past_ids += batch * past_id_batch
    taps = ()
    totals = ()
    for tap in tl.static_range(TAPS):
        taps += (tl.load(weight + column * weight_channel + tap * weight_tap, mask=mask, other=0).to(tl.float32),)
        totals += (tl.zeros([BLOCK_D], tl.float32),)
    total = tl.zeros([BLOCK_D], tl.float32)
    offset = tl.zeros([BLOCK_D], tl.float32)
    if BIAS:
        offset += tl.load(bias + column, mask=mask, other=0).to(tl.float32)

    # Of the next token i, the windows hold tokens [i - LEFT, i + TAPS - LEFT) but the last, and the gradients of z of
    # the TAPS - 1 tokens before i: with that of i, token i - LEFT has all of its own.
    start = first - (TAPS - 1 - LEFT)
    window, ids, upstream, upstream_ids = (), (), (), ()
    for tap in tl.static_range(TAPS - 1):
        window += (_read(x, past, start - LEFT + tap, x_token, past_token, num_past, length, column, width),)
        upstream += (tl.zeros([BLOCK_D], tl.float32),)
        if SEGMENTS:
            ids += (_read_id(segments, past_ids, start - LEFT + tap, segment_token, past_id_token, num_past, length),)
            upstream_ids += (tl.full([], -1, tl.int64),)
    for begin in range(start, last + LEFT, STEP):
        arriving = ()
        for step in tl.static_range(STEP):
            token = begin + step + TAPS - 1 - LEFT
            window += (_read(x, past, token, x_token, past_token, num_past, length, column, width),)
            if SEGMENTS:
                ids += (_read_id(segments, past_ids, token, segment_token, past_id_token, num_past, length),)
            token = tl.full([], begin + step, tl.int64)
            inside = _where((token >= 0) & (token < length), column, width)
            arriving += (tl.load(grad + token * grad_token + column, mask=inside, other=0).to(tl.float32),)
        for step in tl.static_range(STEP):
            g = arriving[step]
            if SILU:
                z = offset
                for tap in tl.static_range(TAPS):
                    seen = window[step + tap].to(tl.float32)
                    if SEGMENTS:
                        seen = tl.where(ids[step + tap] == ids[step + LEFT], seen, 0.0)
                    z += taps[tap] * seen
                gate = tl.sigmoid(z)
                g *= gate * (1 + z * (1 - gate))
            upstream += (g,)
            if SEGMENTS:
                upstream_ids += (ids[step + LEFT],)
            # Gradients at a chunk's edge are computed by both neighbours, and summed by one.
            g = tl.where((begin + step >= first) & (begin + step < last), g, 0.0)
            total += g
            more = ()
            to_token = tl.zeros([BLOCK_D], tl.float32)
            for tap in tl.static_range(TAPS):
                seen = window[step + tap].to(tl.float32)
                back = upstream[step + TAPS - 1 - tap]
                if SEGMENTS:
                    seen = tl.where(ids[step + tap] == ids[step + LEFT], seen, 0.0)
                    same = upstream_ids[step + TAPS - 1 - tap] == upstream_ids[step + TAPS - 1 - LEFT]
                    back = tl.where(same, back, 0.0)
                more += (totals[tap] + g * seen,)
                to_token += taps[tap] * back
            totals = more
            token = tl.full([], begin + step - LEFT, tl.int64)
            own = (token >= first) & (token < last)
            mask_x = _where(own & (token >= 0), column, width)
            tl.store(dx + token * width + column, to_token.to(dx.dtype.element_ty), mask=mask_x)
            target = dpast + (token + num_past) * width + column
            tl.store(target, to_token.to(dpast.dtype.element_ty), mask=_where(own & (token < 0), column, width))
        window, upstream = window[STEP:], upstream[STEP:]
        if SEGMENTS:
            ids, upstream_ids = ids[STEP:], upstream_ids[STEP:]
    sums += place * (TAPS + 1) * width + column
    for tap in tl.static_range(TAPS):
        tl.store(sums + tap * width, totals[tap], mask=mask)
    tl.store(sums + TAPS * width, total, mask=mask)


def forward(inputs: ConvInputs) -> Tensor:
    """See `autograd.ConvBackend`."""
    launch = _Launch(inputs)
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    if y.numel():
        launch(_forward_kernel, (), (y,))
    return y


def backward(grad: Tensor, inputs: ConvInputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """See `autograd.ConvBackend`."""
    launch = _Launch(inputs)
    x, weight, bias, past, *_ = inputs
    dx, dpast = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, past))
    width, taps = weight.shape
    sums = torch.empty(x.shape[0] * launch.num_chunks, taps + 1, width, dtype=torch.float32, device=x.device)
    if sums.numel():
        launch(_backward_kernel, (_rows(grad),), (dx, dpast, sums))
    total = sums.sum(0, dtype=torch.float64)
    return dx, total[:-1].t().to(weight.dtype), None if bias is None else total[-1].to(bias.dtype), dpast


class _Launch:
    """The arguments and the grid with which both kernels are launched on a shard."""

    def __init__(self, inputs: ConvInputs) -> None:
        x, weight, bias, past, past_ids, segments, self.left, silu = inputs
        batch, length, width = x.shape
        x, past = _rows(x), _rows(past.to(x.dtype))
        documents = segments is not None and past_ids is not None
        ids = (past_ids, segments) if documents else (None, None)
        self.tensors = x, weight, None if bias is None else bias.contiguous(), past, *ids
        self.strides = [
            *x.stride()[:2],
            *weight.stride(),
            *past.stride()[:2],
            *(stride for t in ids for stride in ((0, 0) if t is None else t.stride())),
        ]
        num_tiles = triton.cdiv(width, CHANNELS)
        chunk_len = MIN_CHUNK
        while chunk_len < MAX_CHUNK and batch * num_tiles * length >= 2 * chunk_len * PROGRAMS:
            chunk_len *= 2
        self.num_chunks = max(1, triton.cdiv(length, chunk_len))  # one for the past alone
        self.programs = batch * self.num_chunks * num_tiles
        self.sizes = past.shape[1], length, width, chunk_len, self.num_chunks
        self.flags = {"BIAS": bias is not None, "SILU": silu, "SEGMENTS": documents}
        self.taps, self.itemsize = weight.shape[1], x.element_size()

    def __call__(self, kernel: Any, upstream: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        """Run ``kernel`` from the gradient of the output, if any, to ``outputs``."""
        strides = [stride for grad in upstream for stride in grad.stride()[:2]]
        launch_fastest(
            kernel, _tilings(kernel, self.itemsize, self.taps), lambda _: self.programs,
            *upstream, *self.tensors, *outputs, *strides, *self.strides, *self.sizes,
            LEFT=self.left, TAPS=self.taps, BLOCK_D=CHANNELS, **self.flags,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tilings(kernel: Any, itemsize: int, taps: int) -> tuple[Tiling, ...]:
    """Tokens whose loads are under way together, and warps.

    A thread loads 16 bytes at once where its windows of as many channels leave it the registers. With twice the warps
    it loads half as much, and twice as many wait for their loads at once.
    """
    if kernel is _forward_kernel:
        step, num_warps = 4, 1 if itemsize == 2 and taps <= 4 else 2
    else:
        step, num_warps = 3 if taps <= 4 else 2, 2
    return tuple(Tiling({"STEP": step}, num) for num in (num_warps, 2 * num_warps))


def variants() -> Iterator[Variant]:
    """Both kernels with the least and the most that they may be asked for."""
    for dtype, taps in ((torch.bfloat16, 4), (torch.bfloat16, 8), (torch.float32, 4), (torch.float32, 8)):
        for everything in (False, True):
            flags = {"BIAS": everything, "SILU": everything, "SEGMENTS": everything}
            constants = {"LEFT": taps - 1, "TAPS": taps, "BLOCK_D": CHANNELS} | flags
            types = dict.fromkeys(("grad", "x", "weight", "bias", "past", "y", "dx", "dpast"), TYPES[dtype])
            types |= {"past_ids": "*i64", "segments": "*i64", "sums": "*fp32", "STEP": "constexpr"}
            types |= dict.fromkeys(constants, "constexpr")
            for kernel in (_forward_kernel, _backward_kernel):
                signature = {x: types.get(x, "i32") for x in kernel.arg_names}
                name = f"{kernel.__name__[1:-7]}-{dtype}-{taps}-{'all' if everything else 'plain'}"
                tilings = _tilings(kernel, dtype.itemsize, taps)
                for tiling, num_warps, num_stages in tilings if everything else tilings[:1]:
                    full = f"{name}-{num_warps}".replace("torch.", "")
                    yield Variant(full, kernel, signature, constants | tiling, num_warps, num_stages)
