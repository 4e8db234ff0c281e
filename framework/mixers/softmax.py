"""Softmax attention with rotary positions: the baseline, whose state (the KV cache) grows with the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...parallel.span import ChannelShard, Span

MASK_ELEMENTS = 1 << 24  # of a mask of queries by keys that is held at a time


@dataclass
class SoftmaxConfig:
    """Options of the ``softmax`` mixer.

    Attributes:
        heads: number of heads; divides the width.
        rope_base: base of the rotary positions (Su et al. 2021, arXiv 2104.09864).
    """

    heads: int = 4
    rope_base: float = 10_000.0


class Softmax(nn.Module):
    """Multi-head attention over the whole sequence, sharded by heads between all-to-alls (as DeepSpeed Ulysses)."""

    def __init__(self, width: int, config: SoftmaxConfig, *, causal: bool = True) -> None:
        super().__init__()
        if width % (2 * config.heads):
            raise InputError("model.softmax.heads", config.heads, f"2 * heads must divide the width {width}")
        self.heads, self.base, self.causal = config.heads, config.rope_base, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        position = torch.arange(span.position, span.position + x.shape[1], device=x.device)
        q, k = (rotate(part, position, self.base) for part in (q, k))
        y = span.by_channel(self._attend, torch.cat([q, k, v], dim=-1), reach=None)
        return self.out(y.flatten(-2))

    def _attend(self, shard: ChannelShard) -> Tensor:
        """All tokens of some heads ``[B, T + L, H_r, 3K]`` -> ``[B, L, H_r, K]``."""
        q, k, v = (part.transpose(1, 2) for part in shard.tokens.chunk(3, dim=-1))
        q, num_past, ids = q[:, :, shard.num_past :], shard.num_past, shard.segments
        if not q.numel():  # more ranks than heads
            return q.transpose(1, 2)
        # A single token sees all tokens: no mask.
        if ids is None and not (self.causal and num_past and q.shape[2] > 1):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and not num_past)
            return y.transpose(1, 2)
        size = max(1, MASK_ELEMENTS // (len(q) * k.shape[2]))  # of a mask of all queries, some rows at a time
        bounds = [(start, min(start + size, q.shape[2])) for start in range(0, q.shape[2], size)]
        if len(bounds) == 1:
            return self._masked(q, k, v, ids, num_past, *bounds[0]).transpose(1, 2)
        parts = [
            checkpoint(self._masked, q, k, v, ids, num_past, *rows, use_reentrant=False, preserve_rng_state=False)
            for rows in bounds
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _masked(
        self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, num_past: int, start: int, stop: int
    ) -> Tensor:
        """Attention ``[B, H, stop - start, K]`` of some queries of ``q [B, H, L, K]``, with causality and documents."""
        seen = num_past + stop if self.causal else k.shape[2]
        place = torch.arange(seen, device=k.device)
        queries = slice(num_past + start, num_past + stop)
        mask = place[queries].unsqueeze(-1) >= place if self.causal else place.new_ones(1, seen, dtype=torch.bool)
        if ids is not None:
            mask = mask & (ids[:, queries].unsqueeze(-1) == ids[:, :seen].unsqueeze(-2)).unsqueeze(1)
        return F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], attn_mask=mask)


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """``x [B, L, H, K]`` turned by the angles of its ``position [L]``."""
    half = x.shape[-1] // 2
    rate = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = position.to(torch.float64).unsqueeze(-1) * rate
    cos, sin = (f(angle).to(x.dtype).unsqueeze(1) for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
