"""Softmax attention with rotary positions: the baseline, whose state (the KV cache) grows with the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...kernels.attention import attention
from ...parallel.span import ChannelShard, Span


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
        y = span.by_channel(self._attend, torch.cat([q, k, v], dim=-1), past_columns=2 * q.shape[-1])
        return self.out(y.flatten(-2))

    def _attend(self, shard: ChannelShard) -> Tensor:
        """All tokens of some heads ``[B, T + L, H_r, 3K]`` -> ``[B, L, H_r, K]``."""
        q, k, v = shard.tokens.chunk(3, dim=-1)
        q = q[:, shard.num_past :].unsqueeze(3)
        return attention(q, k, v, causal=self.causal, segments=shard.segments).squeeze(3)


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """``x [B, L, H, K]`` turned by the angles of its ``position [L]``."""
    half = x.shape[-1] // 2
    rate = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = position.to(torch.float64).unsqueeze(-1) * rate
    cos, sin = (f(angle).to(x.dtype).unsqueeze(1) for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
