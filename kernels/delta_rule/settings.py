"""The settings of the delta rule, shared by its implementations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_LOG_DECAY = -1000.0  # whose exponential is 0 in fp64; differences of sums stay numbers where one is -inf
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Settings:
    """The operator's settings, the same for every shard of a sequence. Its inputs are q, k, v, beta and, with decays,
    log_decay.

    Attributes:
        scale: multiplies q; None for ``K ** -0.5``.
        normalize_qk: divide q and k by their norms.
    """

    scale: float | None = None
    normalize_qk: bool = False

    def query_scale(self, q: Tensor) -> float:
        """What multiplies q."""
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def features(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """q or k ``[..., K]`` as the recurrence takes them, but for `query_scale`."""
        x = x.to(dtype)
        return x * inverse_norm(x) if self.normalize_qk else x


def inverse_norm(x: Tensor) -> Tensor:
    """``[..., 1]``, of ``x [..., K]``."""
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def log_decays(inputs: tuple[Tensor, ...]) -> Tensor:
    """``[B, L, H, 1 or K]`` fp64: the logarithm of each token's decay, for a head or for each row of its state."""
    beta, *given = inputs[3:]
    if not given:
        return beta.new_zeros(*beta.shape, 1, dtype=torch.float64)
    decay = given[0].to(torch.float64)
    decay = torch.where(decay < LEAST_LOG_DECAY, LEAST_LOG_DECAY, decay)  # a clamp has no gradient where it is NaN
    return decay if decay.dim() == 4 else decay.unsqueeze(-1)


def per_head(x: Tensor, heads: int) -> Tensor:
    """``x [B, L, G, K]`` for each of H heads, ``[B, L, H, K]``: head h reads group ``h // (H / G)``."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def state_dtype(inputs: tuple[Tensor, ...]) -> torch.dtype:
    """The dtype of states and sums: fp64 for fp64 q, k or v, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs[:3]) else torch.float32
