"""Mamba-2 (arXiv 2405.21060) as a mixer: linear attention whose decay depends on the token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bounds import bounded
from ...errors import InputError
from ...kernels.linear_attention import LinearAttention
from ...parallel.span import Span
from ..layers import DecayGate, RMSNorm, ShortConv


@dataclass
class Mamba2Config:
    """Options of the ``mamba2`` mixer.

    Attributes:
        expand: inner width over the model's width.
        head_width: P, channels of a head; divides the inner width; 0 for the largest such number up to 64 with which
            ``groups`` divides the heads. Each head has its own decay.
        state_size: N, numbers of the state for each channel.
        groups: G, sets of heads that share B and C; divides the number of heads.
        conv_len: taps of the short convolution on x, B and C.
        dt_min, dt_max: range of the step sizes at the start of training, drawn log-uniformly for each head.
    """

    expand: int = bounded(2, minimum=1)
    head_width: int = bounded(0, minimum=0)
    state_size: int = bounded(128, minimum=1)
    groups: int = bounded(1, minimum=1)
    conv_len: int = bounded(4, minimum=1)
    dt_min: float = 0.001
    dt_max: float = 0.1


class Mamba2(nn.Module):
    """One projection to z, x, B, C and dt; a short convolution on x, B, C; the scan; the norm of what z gates.

    ``S_t = exp(A dt_t) S_{t-1} + B_t (dt_t x_t)^T`` and ``y_t = C_t S_t + D x_t`` for each head, with
    ``dt = softplus(raw + bias)`` and A = ``-exp(log_rate)``. This is linear attention with q = C, k = B, v = dt x.
    """

    causal_only = True

    def __init__(self, width: int, config: Mamba2Config, *, causal: bool = True) -> None:
        super().__init__()
        inner, size = config.expand * width, config.state_size
        fitting = [number for number in range(1, 65) if inner % (number * config.groups) == 0]
        head_width = config.head_width or max(fitting, default=1)
        if inner % head_width:
            raise InputError("model.mamba2.head_width", head_width, f"a divisor of the inner width {inner}")
        self.heads, self.groups = inner // head_width, config.groups
        if self.heads % config.groups:
            raise InputError("model.mamba2.groups", config.groups, f"a divisor of the number of heads {self.heads}")
        if not 0 < config.dt_min <= config.dt_max:
            raise InputError("model.mamba2.dt_min", config.dt_min, f"above 0, at most dt_max = {config.dt_max}")
        self.sizes = [inner, inner + 2 * config.groups * size, self.heads]  # z; x, B, C; dt
        self.parts = [inner, config.groups * size, config.groups * size]
        self.attention = LinearAttention()
        self.project = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = ShortConv(self.sizes[1], config.conv_len, activation="silu")
        self.gate = DecayGate(self.heads, steps=(config.dt_min, config.dt_max))
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(inner, inner // config.groups, eps=1e-5)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""
        z, mixed, raw = self.project(x).split(self.sizes, dim=-1)
        inner, key, query = self.conv(mixed, span).split(self.parts, dim=-1)
        values = inner.unflatten(-1, (self.heads, -1))
        step, log_decay = self.gate(raw)
        q, k = (part.unflatten(-1, (self.groups, -1)) for part in (query, key))
        v = (step.unsqueeze(-1) * values).to(values.dtype)
        y = span.scan(self.attention, q, k, v, log_decay) + self.skip.unsqueeze(-1) * values
        return self.out(self.norm(y.flatten(-2) * F.silu(z)))
