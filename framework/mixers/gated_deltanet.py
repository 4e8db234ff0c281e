"""Gated DeltaNet (arXiv 2412.06464) as a mixer: the delta rule, with a decay that depends on the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...bounds import bounded
from ...errors import InputError
from ...kernels.delta_rule import DeltaRule
from ...parallel.span import Span
from ..layers import DecayGate, RMSNorm, ShortConv


@dataclass
class GatedDeltaNetConfig:
    """Options of the ``gated_deltanet`` mixer.

    Attributes:
        heads: H, number of heads of the values.
        key_heads: G, number of heads of the queries and keys; divides ``heads``; 0 for as many.
        key_width: K, channels of a query or key of one head; 0 for three quarters of the model's width over all heads.
        value_width: V, channels of a value of one head; 0 for twice ``key_width``.
        conv_len: taps of the short convolution on q, k and v.
        decay: of the state: one per "head" (Gated DeltaNet), one per "channel" of the keys (Kimi Delta Attention, arXiv
            2510.26692), or "none" (DeltaNet, arXiv 2406.06484).
        negative_eigenvalues: beta is in (0, 2) rather than in (0, 1), so that a write may turn the state around (arXiv
            2411.12537).
    """

    heads: int = bounded(4, minimum=1)
    key_heads: int = bounded(0, minimum=0)
    key_width: int = bounded(0, minimum=0)
    value_width: int = bounded(0, minimum=0)
    conv_len: int = bounded(4, minimum=1)
    decay: Literal["head", "channel", "none"] = "head"
    negative_eigenvalues: bool = False


class GatedDeltaNet(nn.Module):
    """q, k, v by a projection and a short convolution with SiLU; q and k of length 1; the delta rule; a gated norm.

    ``S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T`` and ``y_t = K^-0.5 q_t S_t`` for each head.
    """

    causal_only = True

    def __init__(self, width: int, config: GatedDeltaNetConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.groups = config.heads, config.key_heads or config.heads
        if self.heads % self.groups:
            raise InputError("model.gated_deltanet.key_heads", config.key_heads, f"a divisor of heads = {config.heads}")
        key = config.key_width or max(1, 3 * width // (4 * self.heads))
        value = config.value_width or 2 * key
        self.sizes = [self.groups * key, self.groups * key, self.heads * value]  # q, k, v
        self.attention = DeltaRule(normalize_qk=True)
        self.highest_beta = 2.0 if config.negative_eigenvalues else 1.0
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = ShortConv(sum(self.sizes), config.conv_len, activation="silu")
        self.beta = nn.Linear(width, self.heads, bias=False)
        self.by_channel = config.decay == "channel"
        self.decay: nn.Module | None = None
        self.gate: DecayGate | None = None
        if config.decay == "head":
            self.decay, self.gate = nn.Linear(width, self.heads, bias=False), DecayGate(self.heads)
        elif config.decay == "channel":
            narrow, wide = nn.Linear(width, value, bias=False), nn.Linear(value, self.heads * key, bias=False)
            self.decay, self.gate = nn.Sequential(narrow, wide), DecayGate(self.heads * key, shared=key)
        self.norm = RMSNorm(value, eps=1e-5)
        self.output_gate = nn.Linear(width, self.heads * value, bias=False)
        self.out = nn.Linear(self.heads * value, width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""
        q, k, v = self.conv(self.qkv(x), span).split(self.sizes, dim=-1)
        q, k = (part.unflatten(-1, (self.groups, -1)) for part in (q, k))
        inputs = [q, k, v.unflatten(-1, (self.heads, -1)), self.highest_beta * self.beta(x).sigmoid()]
        if self.decay is not None and self.gate is not None:
            _, log_decay = self.gate(self.decay(x))
            inputs.append(log_decay.unflatten(-1, (self.heads, -1)) if self.by_channel else log_decay)
        y = span.scan(self.attention, *inputs)
        return self.out(self.norm(y).flatten(-2) * F.silu(self.output_gate(x)))
