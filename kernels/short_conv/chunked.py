"""Short convolution in portable PyTorch: W shifted multiply-adds, over chunks of tokens that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv_carry import window
from ..state import NO_TOKENS
from .autograd import ConvInputs

# Elements of a chunk: 2 MB in fp32, which stays in the cache between the taps, or enough to keep a GPU busy.
CPU_CHUNK, GPU_CHUNK = 1 << 19, 1 << 25


def forward(inputs: ConvInputs) -> Tensor:
    """See `autograd.ConvBackend`."""
    wide = _Wide.of(inputs)
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    for start, stop in wide.chunks():
        z = wide.linear(start, stop)
        y[:, start:stop] = F.silu(z, inplace=True) if inputs.silu else z
    return y


def backward(grad: Tensor, inputs: ConvInputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """See `autograd.ConvBackend`."""
    x, weight, bias, past, _, _, left, silu = inputs
    wide = _Wide.of(inputs)
    num_past, right = past.shape[1], weight.shape[1] - 1 - left
    mirrored = wide.taps.flip(0)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dpast = torch.empty_like(past, memory_format=torch.contiguous_format)
    # Chunks are added in fp64: a sum over a million tokens keeps its digits.
    dtaps = torch.zeros_like(wide.taps, dtype=torch.float64)
    dbias = torch.zeros_like(wide.taps[0], dtype=torch.float64)
    for start, stop in [(-num_past, 0), *wide.chunks()] if num_past else wide.chunks():
        # Token j is seen by the tokens [j - right, j + left].
        first, last = start - right, stop + left
        g = window(grad, grad[:, :0], first, last, wide.taps.dtype)
        if silu:
            g = torch.ops.aten.silu_backward(g, wide.linear(first, last))
        ids = wide.ids(first, last)
        to_tokens = _convolve(g, mirrored, ids, right)
        if stop <= 0:
            dpast[:] = to_tokens
            continue
        dx[:, start:stop] = to_tokens
        g = g[:, right : right + stop - start]
        tokens, ids = wide.tokens(start - left, stop + right), wide.ids(start - left, stop + right)
        for tap in range(weight.shape[1]):
            dtaps[tap] += (g * _seen(tokens, ids, tap, left, stop - start)).sum((0, 1))
        dbias += g.sum((0, 1))
    return dx, dtaps.t().to(weight.dtype), None if bias is None else dbias.to(bias.dtype), dpast


@dataclass(frozen=True)
class _Wide:
    """A shard with the tokens before it; ``taps [W, D]`` and ``bias [D]`` are in the dtype of the computation."""

    x: Tensor
    past: Tensor
    past_ids: Tensor | None
    segments: Tensor | None
    taps: Tensor
    bias: Tensor | None
    left: int

    @classmethod
    def of(cls, inputs: ConvInputs) -> _Wide:
        x, weight, bias, past, past_ids, segments, left, _ = inputs
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        taps = weight.t().to(dtype).contiguous()
        return cls(x, past, past_ids, segments, taps, None if bias is None else bias.to(dtype), left)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The shard's tokens in chunks ``[start, stop)``."""
        batch, length, width = self.x.shape
        elements = CPU_CHUNK if self.x.device.type == "cpu" else GPU_CHUNK
        chunk_len = max(64, elements // max(1, batch * width))
        for start in range(0, length, chunk_len):
            yield start, min(start + chunk_len, length)

    def tokens(self, start: int, stop: int) -> Tensor:
        """Tokens ``[start, stop)``, counted from the shard's first; zeros where there are none."""
        return window(self.x, self.past, start, stop, self.taps.dtype)

    def ids(self, start: int, stop: int) -> Tensor | None:
        """Their document ids, or None where the shard has no documents."""
        if self.segments is None or self.past_ids is None:
            return None
        return window(self.segments, self.past_ids, start, stop, torch.int64, NO_TOKENS)

    def linear(self, start: int, stop: int) -> Tensor:
        """The output ``[B, stop - start, D]`` before the activation; a new tensor."""
        first, last = start - self.left, stop + self.taps.shape[0] - 1 - self.left
        z = _convolve(self.tokens(first, last), self.taps, self.ids(first, last), self.left)
        return z if self.bias is None else z.add_(self.bias)


def _convolve(tokens: Tensor, taps: Tensor, ids: Tensor | None, left: int) -> Tensor:
    """``sum_j taps[j] tokens_{i + j - left}``, ``[B, n, D]``, for the tokens whose neighbours are all given.

    Args:
        tokens: ``[B, n + W - 1, D]``.
        taps: ``[W, D]``.
        ids: ``[B, n + W - 1]`` or None.
        left: taps before the token itself.
    """
    length = tokens.shape[1] - taps.shape[0] + 1
    out = tokens[:, left : left + length] * taps[left]
    for tap in range(taps.shape[0]):
        if tap != left:
            out.addcmul_(_seen(tokens, ids, tap, left, length), taps[tap])
    return out


def _seen(tokens: Tensor, ids: Tensor | None, tap: int, left: int, length: int) -> Tensor:
    """The token under ``tap`` for each of ``length`` tokens, ``[B, length, D]``; zero for another document's."""
    seen = tokens[:, tap : tap + length]
    if ids is None or tap == left:
        return seen
    same = ids[:, tap : tap + length] == ids[:, left : left + length]
    return seen.where(same.unsqueeze(-1), 0)
