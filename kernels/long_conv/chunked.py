"""Long convolution in portable PyTorch: FFTs over whole documents, a slice of the channels at a time.

T tokens of past and L new tokens are convolved circularly with n >= L + K - 1 points: what wraps around falls on
outputs that are not used. The adjoint is two correlations of the same size. Documents of similar length share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..conv_carry import read_carry, write_carry
from ..state import NO_TOKENS, Carry

# Up to this many tokens, as in decoding, the sum of L K products is cheaper than FFTs of L + K - 1 points.
DIRECT_LEN = 16


@dataclass(frozen=True)
class LongConv:
    """An implementation of the long convolution of one shard.

    Attributes:
        forward: ``(x, kernel, skip, past, ids, centre) -> y``, as `forward`.
        backward: ``(grad, x, kernel, skip, past, ids, centre)`` to the gradients of x, kernel, skip (or None) and past,
            as `backward`.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor]]

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Tensor, Carry]:
        """Arguments and results as of `reference_long_conv`, computed in fp32 or better. Saves only its inputs."""
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
    """Arguments and results as of `reference_long_conv`, by ``convolve`` (see `forward`), or `_direct`."""
    num_taps = kernel.shape[1]
    past = read_carry(x, carry, segments, num_taps - 1)
    ids = None
    if segments is not None:
        ids = segments if past.ids is None else torch.cat([past.ids, segments], dim=1)
    compute = _direct if x.shape[1] <= DIRECT_LEN else convolve
    y = compute(x, kernel, skip, past.tokens, ids, 0 if causal else num_taps // 2)
    return y, write_carry(x, segments, past, num_taps - 1)


def _reaching(num_taps: int, centre: int, length: int, num_past: int) -> slice:
    """The taps that reach from one of ``length`` tokens to another one, or to one of the ``num_past`` before them."""
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
    own = before + num_past  # position of the first token of x
    rows = [x[:, :0] * taps[0]]  # so that the result depends on the taps even where x is empty
    for i in range(own, own + length):
        seen = slice(i + centre - num_taps + 1, i + centre + 1)
        product = tokens[:, seen] * taps
        if ids is not None:
            product = product.where((ids[:, seen] == ids[:, i : i + 1]).unsqueeze(-1), 0)
        rows.append(product.sum(dim=1, keepdim=True))
    y = torch.cat(rows, dim=1)
    if skip is not None:
        y = y + skip.to(taps.dtype) * tokens[:, own : own + length]
    return y.to(x.dtype)


@dataclass(frozen=True)
class Batch:
    """Rows of tokens that share an FFT size: rows of the batch, or documents of similar length.

    Attributes:
        size: points of the FFT.
        taps: which taps of the kernel reach a token of a row.
        centre: the tap among them that multiplies the current token.
        num_past: T, the tokens before x in each row of the batch.
        starts: ``[R]`` int64, the documents' first tokens as indices of the flattened ``[B * (T + L)]``; None where a
            row is one of the batch, of T + L tokens.
        lengths: ``[R]`` int64, the documents' lengths in tokens.
        longest: the greatest of these.
    """

    size: int
    taps: slice
    centre: int
    num_past: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    longest: int = 0

    @property
    def num_taps(self) -> int:
        return self.taps.stop - self.taps.start

    @cached_property
    def documents(self) -> tuple[Tensor, Tensor] | None:
        """``[R, longest]``: the documents' tokens, as indices like `starts`, and whether they are tokens or padding."""
        if self.starts is None or self.lengths is None:
            return None
        position = torch.arange(self.longest, device=self.starts.device)
        valid = position < self.lengths.unsqueeze(1)
        return torch.where(valid, self.starts.unsqueeze(1) + position, 0), valid


class Spectra:
    """Transforms rows of tokens to spectra and back, and multiplies spectra.

    Attributes:
        workspace: bytes for a slice of the channels. Smaller slices run FFTs no faster, larger ones leave the cache.
        min_channels: channels in a slice, whatever they take: copying fewer into and out of ``[B, L, D]`` wastes most
            of every cache line.
    """

    workspace = 1 << 27
    min_channels = 4

    def of(self, batch: Batch, past: Tensor | None, x: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
        """The spectrum ``[R, D_c, size // 2 + 1]`` of the tokens ``[B, T, D_c]``, None for zeros, and ``[B, L, D_c]``
        behind ``first`` zeros.
        """
        parts = [x.new_zeros(x.shape[0], batch.num_past, x.shape[2]) if past is None else past, x]
        if batch.documents is not None:
            index, valid = batch.documents
            parts = [torch.cat(parts, dim=1).flatten(0, 1)[index].where(valid.unsqueeze(-1), 0)]
        rows = x.new_zeros(parts[0].shape[0], x.shape[2], batch.size, dtype=dtype)
        for part in parts:
            rows[:, :, first : first + part.shape[1]] = part.transpose(1, 2)
            first += part.shape[1]
        return torch.fft.rfft(rows)

    def put(self, batch: Batch, spectrum: Tensor, first: int, past: Tensor | None, x: Tensor) -> None:
        """Write what ``spectrum`` stands for, from ``first`` on, to the tokens ``[B, T, D_c]``, unless they are None,
        and ``[B, L, D_c]``.
        """
        rows, num_past = torch.fft.irfft(spectrum, batch.size), batch.num_past
        if batch.documents is None:
            if past is not None:
                past.copy_(rows[:, :, first : first + num_past].transpose(1, 2))
            x.copy_(rows[:, :, first + num_past : first + num_past + x.shape[1]].transpose(1, 2))
            return
        index, valid = batch.documents
        tokens = rows[:, :, first : first + batch.longest].transpose(1, 2)[valid]
        place, row_len = index[valid], num_past + x.shape[1]
        row, token = place // row_len, place % row_len - num_past
        for part, some, offset in ((past, token < 0, num_past), (x, token >= 0, 0)):
            if part is not None:
                part[row[some], token[some] + offset] = tokens[some].to(part.dtype)

    def correlate(self, tokens: Tensor, upstream: Tensor, taps: Tensor) -> Tensor:
        """``sum_r ~tokens_r upstream_r``; ``upstream`` becomes ``~taps upstream``, the other two are used up."""
        products = tokens.conj_physical_().mul_(upstream)
        upstream.mul_(taps.conj_physical_())
        return products[0] if len(products) == 1 else products.sum(dim=0)


PORTABLE = Spectra()


def forward(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    past: Tensor,
    ids: Tensor | None,
    centre: int,
    spectra: Spectra = PORTABLE,
) -> Tensor:
    """``y [B, L, D]`` of ``x [B, L, D]`` behind ``past [B, T, D]``, ``kernel [D, K]``, ``ids [B, T + L]`` or None."""
    batches, dtype = list(_batches(x, past, ids, kernel.shape[1], centre)), _wide(x, kernel)
    y = _like(x, ids)
    for some in _slices(x, batches, dtype, spectra):
        taps = _taps(kernel[some], skip if skip is None else skip[some], centre, dtype)
        for batch in batches:
            tokens = spectra.of(batch, past[:, :, some], x[:, :, some], dtype)
            spectra.put(batch, tokens.mul_(_transfer(batch, taps, spectra)), batch.centre, None, y[:, :, some])
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    past: Tensor,
    ids: Tensor | None,
    centre: int,
    spectra: Spectra = PORTABLE,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The gradients of x, kernel, skip and past."""
    batches, dtype = list(_batches(x, past, ids, kernel.shape[1], centre)), _wide(x, kernel)
    dx, dpast = _like(x, ids), _like(past, ids)
    dkernel = torch.empty_like(kernel, memory_format=torch.contiguous_format)
    dskip = None if skip is None else torch.empty_like(skip)
    for some in _slices(x, batches, dtype, spectra):
        taps = _taps(kernel[some], skip if skip is None else skip[some], centre, dtype)
        dtaps = torch.zeros_like(taps)
        for batch in batches:
            upstream = spectra.of(batch, None, grad[:, :, some], dtype, batch.centre)
            tokens = spectra.of(batch, past[:, :, some], x[:, :, some], dtype)
            product = spectra.correlate(tokens, upstream, _transfer(batch, taps, spectra))
            # Normalized here: on GPUs irfft divides by the size in a pass of its own.
            correlation = torch.fft.irfft(product, batch.size, norm="forward")
            dtaps[:, batch.taps].add_(correlation[:, : batch.num_taps], alpha=1 / batch.size)
            del tokens, product, correlation  # the workspace has no room for them beside the rows of `put`
            spectra.put(batch, upstream, 0, dpast[:, :, some], dx[:, :, some])
        dkernel[some] = dtaps
        if dskip is not None:
            dskip[some] = dtaps[:, centre]
    return dx, dkernel, dskip, dpast


def _transfer(batch: Batch, taps: Tensor, spectra: Spectra) -> Tensor:
    """The spectrum of those of ``taps [D_c, K]`` that reach a token, computed as of a row of tokens."""
    row = Batch(batch.size, batch.taps, batch.centre, num_past=0)
    return spectra.of(row, None, taps[:, batch.taps].t().unsqueeze(0), taps.dtype)[0]


def _like(x: Tensor, ids: Tensor | None) -> Tensor:
    """An output like x; with ids zeroed, as nothing is written at positions without a token."""
    make = torch.empty_like if ids is None else torch.zeros_like
    return make(x, memory_format=torch.contiguous_format)


def _taps(kernel: Tensor, skip: Tensor | None, centre: int, dtype: torch.dtype) -> Tensor:
    """``kernel [D_c, K]`` in ``dtype``, with the skip added to the tap of the current token."""
    taps = kernel.to(dtype)
    if skip is not None:
        taps = taps.clone() if taps is kernel else taps
        taps[:, centre] += skip
    return taps


class _LongConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: LongConv, *arguments: Any) -> Tensor:
        *tensors, ctx.centre = arguments
        ctx.save_for_backward(*tensors)
        ctx.backend = backend
        return backend.forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, kernel, skip, past, ids = ctx.saved_tensors
        return None, *ctx.backend.backward(grad, x, kernel, skip, past, ids, ctx.centre), None, None


def _batches(x: Tensor, past: Tensor, ids: Tensor | None, num_taps: int, centre: int) -> Iterator[Batch]:
    """All rows: those of the shard, or its documents grouped by length."""
    if ids is None:
        yield _batch(num_taps, centre, x.shape[1], past.shape[1])
        return
    for starts, lengths in documents(ids):
        longest = int(lengths.max())
        batch = _batch(num_taps, centre, longest, 0)
        yield replace(batch, num_past=past.shape[1], starts=starts, lengths=lengths, longest=longest)


def documents(ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The documents of ``ids [B, n]``, grouped by the next power of two of their lengths.

    Returns:
        For each group the first tokens, as indices of the flattened ids, and the lengths: ``[R]`` int64 each.
    """
    is_start = torch.ones_like(ids, dtype=torch.bool)
    is_start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = is_start.flatten().nonzero().squeeze(1)
    lengths = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
    is_token = ids.flatten()[starts] >= 0
    starts, lengths = starts[is_token], lengths[is_token]
    magnitudes = torch.frexp((lengths - 1).double()).exponent  # of lengths in (2^(e-1), 2^e]
    for magnitude in magnitudes.unique().tolist():
        group = magnitudes == magnitude
        yield starts[group], lengths[group]


def fit(num_taps: int, centre: int, length: int, num_past: int) -> tuple[slice, int, int]:
    """The taps and the FFT size for rows of ``length`` tokens after ``num_past`` tokens without outputs.

    Returns:
        The taps that reach a token, which of them multiplies the current token, and the least number of FFT points.
    """
    taps = _reaching(num_taps, centre, length, num_past)
    centre -= taps.start
    # Large enough for all outputs, and for products that wrap around not to reach them.
    return taps, centre, max(num_past + length + centre, length + taps.stop - taps.start - 1 - centre)


def _batch(num_taps: int, centre: int, length: int, num_past: int) -> Batch:
    taps, centre, points = fit(num_taps, centre, length, num_past)
    return Batch(fft_size(points), taps, centre, num_past)


def _slices(x: Tensor, batches: list[Batch], dtype: torch.dtype, spectra: Spectra) -> Iterator[slice]:
    """Slices of the channels, as wide as the workspace allows."""
    rows = [len(x if batch.starts is None else batch.starts) + 1 for batch in batches]
    # Two spectra, their product and its inverse; tokens, their gradients and the outputs', at most half as long each.
    points = 6 * max((num * batch.size for num, batch in zip(rows, batches, strict=True)), default=1)
    width = max(spectra.min_channels, spectra.workspace // (points * dtype.itemsize))
    width -= width % 16 if width > 16 else 0  # whole cache lines
    for start in range(0, x.shape[2], width):
        yield slice(start, min(start + width, x.shape[2]))


@cache
def fft_size(length: int) -> int:
    """The least even number >= ``length`` whose prime factors are 2, 3 and 5: FFT libraries are fast at these."""
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
