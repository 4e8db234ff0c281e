"""Portable PyTorch: FFTs over whole documents, a slice of the channels at a time.

L tokens behind their past are convolved circularly with n >= L + K - 1 points: what wraps around falls on places
that nobody reads. The adjoint is two correlations of the same size. Documents of similar length share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..scan import NO_TOKENS, Carry
from ..short_conv.past import read_carry, write_carry

# Bytes of workspace for a slice of the channels. Smaller slices run the FFTs no faster, larger ones leave the cache.
WORKSPACE = 1 << 27
# Channels in a slice, whatever they take: copying fewer into and out of [B, L, D] wastes most of every cache line.
MIN_CHANNELS = 4
# Up to this many tokens, as in decoding, the sum of L K products is cheaper than FFTs of L + K - 1 points.
DIRECT_LEN = 16


@dataclass(frozen=True)
class LongConv:
    """An implementation: FFTs of one piece.

    Attributes:
        forward: ``(x, kernel, skip, past, ids, centre) -> y``, as `forward`.
        backward: ``(grad, *the same)`` to the gradients of x, kernel, skip (or None) and past, as `backward`.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor]]

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Tensor, Carry]:
        """The arguments and results of `reference_long_conv`, in fp32 or better; saves nothing but its inputs."""
        return run(partial(_LongConv.apply, self), *arguments, **options)


def run(
    convolve: Callable[..., Tensor],
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    causal: bool = True,
    carry: Carry | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Carry]:
    """`reference_long_conv` by ``convolve``, which has the arguments of `forward`, or tap by tap for few tokens."""
    num_taps = kernel.shape[1]
    past = read_carry(x, carry, segments, num_taps - 1)
    ids = None
    if segments is not None:
        ids = segments if past.ids is None else torch.cat([past.ids, segments], dim=1)
    by = _direct if x.shape[1] <= DIRECT_LEN else convolve
    y = by(x, kernel, skip, past.tokens, ids, 0 if causal else num_taps // 2)
    return y, write_carry(x, segments, past, num_taps - 1)


def _reaching(num_taps: int, centre: int, length: int, num_past: int) -> slice:
    """The taps through which any of ``length`` tokens sees another one, or one of ``num_past`` before them."""
    return slice(max(0, centre - length + 1), min(num_taps, centre + length + num_past))


def _wide(x: Tensor, kernel: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)


def _direct(x: Tensor, kernel: Tensor, skip: Tensor | None, past: Tensor, ids: Tensor | None, centre: int) -> Tensor:
    """The sum over the taps, token by token; arguments as of `forward`."""
    length, num_past = x.shape[1], past.shape[1]
    some = _reaching(kernel.shape[1], centre, max(length, 1), num_past)
    taps = kernel[:, some].to(_wide(x, kernel)).flip(1).t()
    num_taps, centre = taps.shape[0], centre - some.start
    before = max(0, num_taps - 1 - centre - num_past)
    tokens = F.pad(torch.cat([past.to(taps.dtype), x.to(taps.dtype)], dim=1), (0, 0, before, centre))
    if ids is not None:
        ids = F.pad(ids, (before, centre), value=NO_TOKENS)
    own = before + num_past  # the first of x
    rows = [x[:, :0] * taps[0]]  # so that the result depends on the taps even where x is empty
    for i in range(own, own + length):
        seen = slice(i + centre - num_taps + 1, i + centre + 1)
        product = tokens[:, seen] * taps
        if ids is not None:
            product = product * (ids[:, seen] == ids[:, i : i + 1]).unsqueeze(-1).to(taps.dtype)
        rows.append(product.sum(dim=1, keepdim=True))
    y = torch.cat(rows, dim=1)
    if skip is not None:
        y = y + skip.to(taps.dtype) * tokens[:, own : own + length]
    return y.to(x.dtype)


def forward(x: Tensor, kernel: Tensor, skip: Tensor | None, past: Tensor, ids: Tensor | None, centre: int) -> Tensor:
    """``y [B, L, D]`` of ``x [B, L, D]`` behind ``past [B, T, D]``, ``kernel [D, K]``, ``ids [B, T + L]`` or None."""
    batches, dtype = list(_batches(x, past, ids, kernel.shape[1], centre)), _wide(x, kernel)
    y = _like(x, ids)
    for some in _slices(x, batches, dtype):
        taps = _taps(kernel[some], skip if skip is None else skip[some], centre, dtype)
        unread = torch.empty_like(past[:, :, some])
        for batch in batches:
            tokens = batch.spectrum(past[:, :, some], x[:, :, some], dtype)
            batch.put(tokens.mul_(batch.transfer(taps)), batch.centre, unread, y[:, :, some])
    return y


def backward(
    grad: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None, past: Tensor, ids: Tensor | None, centre: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The gradients of x, kernel, skip and past."""
    batches, dtype = list(_batches(x, past, ids, kernel.shape[1], centre)), _wide(x, kernel)
    dx, dpast = _like(x, ids), _like(past, ids)
    dkernel = torch.empty_like(kernel, memory_format=torch.contiguous_format)
    dskip = None if skip is None else torch.empty_like(skip)
    for some in _slices(x, batches, dtype):
        taps = _taps(kernel[some], skip if skip is None else skip[some], centre, dtype)
        dtaps = torch.zeros_like(taps)
        unread = torch.zeros_like(past[:, :, some])
        for batch in batches:
            upstream = batch.spectrum(unread, grad[:, :, some], dtype, batch.centre)
            product = batch.spectrum(past[:, :, some], x[:, :, some], dtype).conj_physical_().mul_(upstream)
            product = product[0] if len(product) == 1 else product.sum(dim=0)
            dtaps[:, batch.taps] += torch.fft.irfft(product, batch.size)[:, : batch.num_taps]
            upstream.mul_(batch.transfer(taps).conj_physical_())
            batch.put(upstream, 0, dpast[:, :, some], dx[:, :, some])
        dkernel[some] = dtaps
        if dskip is not None:
            dskip[some] = dtaps[:, centre]
    return dx, dkernel, dskip, dpast


def _like(x: Tensor, ids: Tensor | None) -> Tensor:
    """Room for what belongs to x; where there are ids, some positions may hold no token, and nothing is put there."""
    make = torch.empty_like if ids is None else torch.zeros_like
    return make(x, memory_format=torch.contiguous_format)


def _taps(kernel: Tensor, skip: Tensor | None, centre: int, dtype: torch.dtype) -> Tensor:
    """``kernel [D_c, K]``, with the skip in the tap of the current token."""
    taps = kernel.to(dtype)
    if skip is not None:
        taps = taps.clone() if taps is kernel else taps
        taps[:, centre] += skip
    return taps


class _LongConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by: LongConv, *arguments: Any) -> Tensor:
        *tensors, ctx.centre = arguments
        ctx.save_for_backward(*tensors)
        ctx.by = by
        return by.forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, kernel, skip, past, ids = ctx.saved_tensors
        return None, *ctx.by.backward(grad, x, kernel, skip, past, ids, ctx.centre), None, None


@dataclass(frozen=True)
class _Batch:
    """Rows of tokens that are convolved alike: whole sequences, or documents of similar length.

    Attributes:
        size: points of the FFT.
        taps: which taps of the kernel reach a token of a row.
        centre: the tap among them that multiplies the current token.
        index: ``[R, n]`` the rows' tokens, counted through ``[B * (T + L)]``; None where a row is a row of the piece.
        valid: ``[R, n]`` whether that is a token of the row, or filling.
    """

    size: int
    taps: slice
    centre: int
    index: Tensor | None = None
    valid: Tensor | None = None

    @property
    def num_taps(self) -> int:
        return self.taps.stop - self.taps.start

    def transfer(self, taps: Tensor) -> Tensor:
        """The spectrum of those of ``taps [D_c, K]`` that reach a token."""
        rows = taps.new_zeros(taps.shape[0], self.size)
        rows[:, : self.num_taps] = taps[:, self.taps]
        return torch.fft.rfft(rows)

    def spectrum(self, past: Tensor, x: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
        """The spectrum ``[R, D_c, size // 2 + 1]`` of the tokens ``[B, T, D_c]`` and ``[B, L, D_c]`` behind ``first``
        zeros.
        """
        parts = [past, x]
        if self.index is not None and self.valid is not None:
            tokens = torch.cat(parts, dim=1).flatten(0, 1)[self.index]
            parts = [tokens.mul_(self.valid.unsqueeze(-1))]
        rows = x.new_zeros(parts[0].shape[0], x.shape[2], self.size, dtype=dtype)
        for part in parts:
            rows[:, :, first : first + part.shape[1]] = part.transpose(1, 2)
            first += part.shape[1]
        return torch.fft.rfft(rows)

    def put(self, spectrum: Tensor, first: int, past: Tensor, x: Tensor) -> None:
        """Write what ``spectrum`` stands for, from ``first`` on, to the tokens ``[B, T, D_c]`` and ``[B, L, D_c]``."""
        rows, num_past = torch.fft.irfft(spectrum, self.size), past.shape[1]
        if self.index is None or self.valid is None:
            for part in (past, x):
                part.copy_(rows[:, :, first : first + part.shape[1]].transpose(1, 2))
                first += part.shape[1]
            return
        tokens = rows[:, :, first : first + self.index.shape[1]].transpose(1, 2)[self.valid]
        place, stretch = self.index[self.valid], num_past + x.shape[1]
        row, token = place // stretch, place % stretch - num_past
        for part, some, offset in ((past, token < 0, num_past), (x, token >= 0, 0)):
            part[row[some], token[some] + offset] = tokens[some].to(part.dtype)


def _batches(x: Tensor, past: Tensor, ids: Tensor | None, num_taps: int, centre: int) -> Iterator[_Batch]:
    """Everything that is to be convolved: the rows of the piece, or its documents by length."""
    if ids is None:
        yield _batch(num_taps, centre, x.shape[1], past.shape[1])
        return
    for starts, lengths in documents(ids):
        longest = int(lengths.max())
        position = torch.arange(longest, device=x.device)
        valid = position < lengths.unsqueeze(1)
        index = torch.where(valid, starts.unsqueeze(1) + position, 0)
        yield replace(_batch(num_taps, centre, longest, 0), index=index, valid=valid)


def documents(ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The first tokens, counted through ``ids [B, n]``, and the lengths of all documents that share a power of two."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = begins.flatten().nonzero().squeeze(1)
    lengths = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
    is_token = ids.flatten()[starts] >= 0
    starts, lengths = starts[is_token], lengths[is_token]
    magnitudes = torch.frexp((lengths - 1).double()).exponent  # of lengths in (2^(e-1), 2^e]
    for magnitude in magnitudes.unique().tolist():
        alike = magnitudes == magnitude
        yield starts[alike], lengths[alike]


def fit(num_taps: int, centre: int, length: int, num_past: int) -> tuple[slice, int, int]:
    """For rows of ``length`` tokens behind ``num_past`` whose outputs do not matter: the taps that reach a token, which
    of them multiplies the current one, and the least points of an FFT.
    """
    taps = _reaching(num_taps, centre, length, num_past)
    centre -= taps.start
    # All outputs fit in, and no product comes round to one that matters.
    return taps, centre, max(num_past + length + centre, length + taps.stop - taps.start - 1 - centre)


def _batch(num_taps: int, centre: int, length: int, num_past: int) -> _Batch:
    taps, centre, points = fit(num_taps, centre, length, num_past)
    return _Batch(fft_size(points), taps, centre)


def _slices(x: Tensor, batches: list[_Batch], dtype: torch.dtype) -> Iterator[slice]:
    """The channels, as many at a time as the workspace holds."""
    rows = [(x.shape[0] if batch.index is None else batch.index.shape[0]) + 1 for batch in batches]
    # Two spectra, their product and its inverse; tokens, their gradients and the outputs', at most half as long each.
    points = 6 * max((num * batch.size for num, batch in zip(rows, batches, strict=True)), default=1)
    width = max(MIN_CHANNELS, WORKSPACE // (points * dtype.itemsize))
    width -= width % 16 if width > 16 else 0  # whole cache lines
    for start in range(0, x.shape[2], width):
        yield slice(start, min(start + width, x.shape[2]))


@cache
def fft_size(length: int) -> int:
    """The least even number >= ``length`` whose prime factors are 2, 3 and 5: sizes that FFT libraries do fast."""
    best = 2
    while best < length:
        best *= 2
    odds = [3**i * 5**j for i in range(3) for j in range(3)]
    for odd in odds:
        size = 2 * odd
        while size < length:
            size *= 2
        best = min(best, size)
    return best
