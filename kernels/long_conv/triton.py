"""Long convolution on GPUs: Triton kernels for the passes of `chunked` around the FFTs, which are the FFT library's.

1. ``_pack_kernel``: tokens to rows in fp32, transposed through shared memory, with the zeros that pad them.
2. ``_unpack_kernel``: rows to tokens in their dtype, and the division by the size, which else is a pass of its own.
3. ``_correlate_kernel``: both products of the backward pass. The forward one is one pass in PyTorch too.

Bytes per point of a row of N = size points, for L = N / 2 tokens of 16 bits and one row a channel:

| pass | reads and writes | PyTorch |
|---|---|---|
| pack | 1, 4 | zeros 4; copy 1, 2 |
| unpack | 2, 1 | scale 4, 4; copy 2, 1 |
| correlate | 12, 8 | conjugate twice 8, 8; multiply twice 16, 8 |

Forward packs tokens and taps and unpacks one row, backward packs tokens, their gradients and taps, and unpacks one.
"""

# Kernels have Triton's types, which mypy does not know.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import TYPES, Tiling, Variant, launch, launch_fastest
from . import chunked
from .chunked import Batch, Spectra

# Tokens and channels of a tile. The usual one takes 16 KiB of shared memory in fp32; it moves 64 bytes of a token of 16
# bits and 512 of a row. Slices of few channels leave half of it empty; many may do better with whole cache lines.
TILINGS = tuple(
    Tiling({"TOKENS": tokens, "CHANNELS": channels}, num_warps=4)
    for tokens, channels in ((128, 32), (128, 16), (64, 64))
)
# Complex numbers of a program that multiplies spectra: two loads of 16 bytes for each thread and spectrum.
POINTS = 512
# Programs that keep the memory of a large GPU busy. Only where there are more, one sums several rows.
PROGRAMS = 2048
MAX_ROWS = 64  # rows that one program sums, in fp32


@triton.jit
def _row(starts, lengths, row, num_past, length, DOCUMENTS: tl.constexpr):
    """The sequence of a row, the row's first token there (negative in the past), and its number of tokens."""
    if DOCUMENTS:
        start = tl.load(starts + row)
        return start // (num_past + length), start % (num_past + length) - num_past, tl.load(lengths + row)
    else:
        return row, -num_past, num_past + length


@triton.jit
def _tile(width, low, high, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's row, places in it, of tiles that hold ``[low, high)``, and channels."""
    program, columns = tl.program_id(0), tl.cdiv(width, CHANNELS)
    first = low // TOKENS
    num_tiles = tl.cdiv(high, TOKENS) - first
    place = (first + program // columns % num_tiles) * TOKENS + tl.arange(0, TOKENS)
    channel = program % columns * CHANNELS + tl.arange(0, CHANNELS)
    return (program // columns // num_tiles).to(tl.int64), place.to(tl.int64), channel.to(tl.int64)


@triton.jit
def _pack_kernel(
    rows,  # [R, D, N] fp32
    x,  # [B, L, D]
    past,  # [B, T, D]
    starts,  # [R] int64, as lengths; see `Batch`
    lengths,
    x_batch,
    x_token,
    x_channel,
    past_batch,
    past_token,
    past_channel,
    num_past,
    length,
    width,
    size,
    first,
    low,
    high,
    PAST: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Places ``[low, high)`` of all rows: ``first`` zeros, tokens (zeros for the past if not PAST), zeros."""
    row, place, channel = _tile(width, low, high, TOKENS, CHANNELS)
    sequence, begin, count = _row(starts, lengths, row, num_past, length, DOCUMENTS)
    inside = (place >= first) & (place - first < count)
    token = begin + place - first
    columns = (channel < width)[None, :]
    source = x + sequence * x_batch + (token * x_token)[:, None] + (channel * x_channel)[None, :]
    value = tl.load(source, mask=(inside & (token >= 0))[:, None] & columns, other=0).to(tl.float32)
    if PAST:
        token += num_past
        source = past + sequence * past_batch + (token * past_token)[:, None] + (channel * past_channel)[None, :]
        value += tl.load(source, mask=(inside & (token < num_past))[:, None] & columns, other=0).to(tl.float32)
    target = rows + row * width * size + place[:, None] + (channel * size)[None, :]
    tl.store(target, value, mask=(place < high)[:, None] & columns)


@triton.jit
def _unpack_kernel(
    rows,  # as `_pack_kernel`
    x,
    past,
    starts,
    lengths,
    x_batch,
    x_token,
    x_channel,
    past_batch,
    past_token,
    past_channel,
    num_past,
    length,
    width,
    size,
    first,
    low,
    high,
    PAST: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The tokens that start at ``first`` in each row, all in places ``[low, high)``, over ``size``."""
    row, place, channel = _tile(width, low, high, TOKENS, CHANNELS)
    sequence, begin, count = _row(starts, lengths, row, num_past, length, DOCUMENTS)
    inside = (place >= first) & (place - first < count)
    token = begin + place - first
    columns = (channel < width)[None, :]
    if not PAST:
        inside &= token >= 0
    source = rows + row * width * size + place[:, None] + (channel * size)[None, :]
    value = tl.load(source, mask=inside[:, None] & columns, other=0) * (1.0 / size)
    target = x + sequence * x_batch + (token * x_token)[:, None] + (channel * x_channel)[None, :]
    tl.store(target, value.to(x.dtype.element_ty), mask=(inside & (token >= 0))[:, None] & columns)
    if PAST:
        token += num_past
        target = past + sequence * past_batch + (token * past_token)[:, None] + (channel * past_channel)[None, :]
        tl.store(target, value.to(past.dtype.element_ty), mask=(inside & (token < num_past))[:, None] & columns)


@triton.jit
def _complex(spectrum, place, mask, POINTS: tl.constexpr):
    """The real and the imaginary parts of interleaved complex numbers."""
    return tl.split(tl.reshape(tl.load(spectrum + place, mask=mask, other=0.0), (POINTS, 2)))


@triton.jit
def _correlate_kernel(
    tokens,  # [R, D, F, 2] fp32: spectra; a program's sum of ~tokens upstream replaces the first of its rows
    upstream,  # [R, D, F, 2] fp32, which becomes ~taps upstream
    taps,  # [D, F, 2] fp32
    num_points,  # 2 D F
    num_rows,
    rows_per_program,
    POINTS: tl.constexpr,
):
    """Several rows per program, so that ``taps`` are read once and the sum stays in registers."""
    num_tiles = tl.cdiv(num_points, 2 * POINTS)
    place = (tl.program_id(0) % num_tiles).to(tl.int64) * (2 * POINTS) + tl.arange(0, 2 * POINTS)
    first = (tl.program_id(0) // num_tiles).to(tl.int64) * rows_per_program
    mask = place < num_points
    taps_re, taps_im = _complex(taps, place, mask, POINTS)
    sum_re = tl.zeros([POINTS], tl.float32)
    sum_im = tl.zeros([POINTS], tl.float32)
    for row in range(first, tl.minimum(first + rows_per_program, num_rows)):
        here = row * num_points + place
        re, im = _complex(upstream, here, mask, POINTS)
        token_re, token_im = _complex(tokens, here, mask, POINTS)
        sum_re += token_re * re + token_im * im
        sum_im += token_re * im - token_im * re
        back = tl.join(re * taps_re + im * taps_im, im * taps_re - re * taps_im)
        tl.store(upstream + here, tl.reshape(back, (2 * POINTS,)), mask=mask)
    total = tl.reshape(tl.join(sum_re, sum_im), (2 * POINTS,))
    tl.store(tokens + first * num_points + place, total, mask=mask)


class Triton(Spectra):
    """See the module's docstring. Spectra are complex64.

    A slice of the channels takes the GPU longer than a CPU takes to launch its kernels. At least 8 channels: tokens of
    16 bits are then read half a sector of 32 bytes at a time.
    """

    workspace = 1 << 30
    min_channels = 8

    def of(self, batch: Batch, past: Tensor | None, x: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
        num_rows = len(x if batch.starts is None else batch.starts)
        rows = torch.empty(num_rows, x.shape[2], batch.size, dtype=dtype, device=x.device)
        _launch(_pack_kernel, batch, rows, first, past, x, 0, batch.size)
        return torch.fft.rfft(rows)

    def put(self, batch: Batch, spectrum: Tensor, first: int, past: Tensor | None, x: Tensor) -> None:
        rows = torch.fft.irfft(spectrum, batch.size, norm="forward")
        if batch.starts is None:
            low = first + (batch.num_past if past is None else 0)
            _launch(_unpack_kernel, batch, rows, first, past, x, low, first + batch.num_past + x.shape[1])
        else:
            _launch(_unpack_kernel, batch, rows, first, past, x, first, first + batch.longest)

    def correlate(self, tokens: Tensor, upstream: Tensor, taps: Tensor) -> Tensor:
        num_rows, num_tiles = len(tokens), triton.cdiv(taps.numel(), POINTS)
        rows = min(MAX_ROWS, max(1, num_rows * num_tiles // PROGRAMS))
        sums = triton.cdiv(num_rows, rows)
        spectra = [torch.view_as_real(x) for x in (tokens, upstream, taps)]
        launch(_correlate_kernel, num_tiles * sums, *spectra, 2 * taps.numel(), num_rows, rows, POINTS, num_warps=4)
        return tokens[0] if sums == 1 else tokens[::rows].sum(dim=0)


def _launch(
    kernel: Any, batch: Batch, rows: Tensor, first: int, past: Tensor | None, x: Tensor, low: int, high: int
) -> None:
    """Run ``kernel`` for places ``[low, high)`` of ``rows``, which are those of ``batch``."""
    num_rows, width, size = rows.shape
    past = past if batch.num_past else None
    strides = [stride for part in (x, past) for stride in ((0, 0, 0) if part is None else part.stride())]

    def programs(tile: Mapping[str, int]) -> int:
        columns, tokens = triton.cdiv(width, tile["CHANNELS"]), tile["TOKENS"]
        return num_rows * columns * (triton.cdiv(high, tokens) - low // tokens)

    launch_fastest(
        kernel, TILINGS, programs, rows, x, past, batch.starts, batch.lengths, *strides,
        batch.num_past, x.shape[1], width, size, first, low, high,
        PAST=past is not None, DOCUMENTS=batch.starts is not None,
    )  # fmt: skip


forward = partial(chunked.forward, spectra=Triton())
backward = partial(chunked.backward, spectra=Triton())


def variants() -> Iterator[Variant]:
    """Packing and unpacking of x alone, with all else, and of taps, in all tilings; the products."""
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [("plain", bf16, False, "x_channel"), ("all", bf16, True, "x_channel"), ("all", fp32, True, "x_channel")]
    for name, dtype, everything, contiguous in [*cases, ("taps", fp32, False, "x_token")]:
        flags = {"PAST": everything, "DOCUMENTS": everything, contiguous: 1, "past_channel": 1}
        types = {"rows": "*fp32", "x": TYPES[dtype], "past": TYPES[dtype], "starts": "*i64", "lengths": "*i64"}
        for kernel in (_pack_kernel, _unpack_kernel) if name != "taps" else (_pack_kernel,):
            for tiling, num_warps, num_stages in TILINGS:
                constants = flags | tiling
                given = types | dict.fromkeys(constants, "constexpr")
                strides = dict.fromkeys((x for x in kernel.arg_names if x.startswith(("x_", "past_"))), "i64")
                signature = {x: (strides | given).get(x, "i32") for x in kernel.arg_names}
                full = f"{kernel.__name__[1:-7]}-{name}-{dtype}-{tiling['CHANNELS']}".replace("torch.", "")
                yield Variant(full, kernel, signature, constants, num_warps, num_stages)
    types = dict.fromkeys(("tokens", "upstream", "taps"), "*fp32") | {"POINTS": "constexpr"}
    signature = {x: types.get(x, "i32") for x in _correlate_kernel.arg_names}
    yield Variant("correlate", _correlate_kernel, signature, {"POINTS": POINTS}, 4, 1)
