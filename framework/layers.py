"""The small parts that mixers and blocks share: norms, gates, the short convolution, position-keyed dropout."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.dropout import dropout as position_dropout
from ..kernels.rms_norm import rms_norm
from ..kernels.short_conv import short_conv
from ..parallel.span import Span


class RMSNorm(nn.Module):
    """RMS normalization, of all channels or within groups of them, with a learnable scale per channel.

    ``y = weight * x / sqrt(mean(x^2) + eps)`` with the mean over the channels of a group, for each token by itself: the
    same on any shard. ``forward(x [B, L, D])`` returns ``[B, L, D]`` in the dtype of x; sums are in fp32 or better.

    Args:
        width: D, channels.
        group: channels per group (the last group may be smaller); 0 for all. One head's channels normalize each head.
        scale: initial value of ``weight [D]``.
        eps: added to the mean square.

    Source: "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """

    def __init__(self, width: int, group: int = 0, scale: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.group, self.eps = min(group or width, width), eps
        self.weight = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, D]`` -> the same, every group with root mean square ``scale``."""
        whole = x.shape[-1] - x.shape[-1] % self.group
        if whole == x.shape[-1]:
            return rms_norm(x, self.weight, self.group, self.eps)
        parts, weights = (t.split([whole, x.shape[-1] - whole], dim=-1) for t in (x, self.weight))
        sizes = self.group, x.shape[-1] - whole
        return torch.cat([rms_norm(*some, self.eps) for some in zip(parts, weights, sizes, strict=True)], dim=-1)


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` whose gradient in 16 bits is summed in fp32 on a CPU too, as on a GPU.

    torch adds there in the weight's dtype: in bf16, the sum of equal terms stops at 256 of them.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Ids ``[...]`` -> ``[..., D]``."""
        if input.device.type == "cpu" and self.weight.dtype.itemsize == 2:
            return _Rows.apply(self.weight, input)
        return super().forward(input)


class _Rows(torch.autograd.Function):
    """``weight[ids]``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32)
        return total.index_add_(0, ids.flatten(), grad.reshape(-1, ctx.shape[1]).float()).to(ctx.dtype), None


class SwiGLU(nn.Module):
    """Gated feed-forward layer ``W_down(silu(x W_gate) * (x W_up))``, Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""
        return self.down(_Gated.apply(self.gate_up(x)))


class _Gated(torch.autograd.Function):
    """``silu(gate) * up`` of ``[..., 2 hidden]``; saves its input only."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        to_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat([to_gate, F.silu(gate).mul_(grad)], dim=-1)


class ShortConv(nn.Module):
    """Depthwise convolution over the last few tokens (causal) or the nearest ones (centred), with a halo exchange.

    ``y[t] = activation(bias + sum_w weight[:, w] x[t - left + w])``, ``left = W - 1`` (causal) or ``W // 2``; tokens
    beyond the sequence's ends and of other documents count as 0. ``forward(x [B, L, D], span)`` returns ``[B, L, D]``:
    the same on any shard, streamed or token by token. A layer may call one such module; of two, in one layer,
    `Span.halo` refuses the second, as both carries would have one name: convolve their inputs together.

    Args:
        width: D, channels.
        taps: W; ``weight [D, W]`` is drawn from Normal(0, 1/sqrt(W)), ``bias [D]`` is 0.
        activation: None or "silu", applied to the result.
        causal: over the W tokens up to the current one, or centred on it.
    """

    def __init__(self, width: int, taps: int, *, activation: str | None = None, causal: bool = True) -> None:
        super().__init__()
        self.activation, self.causal = activation, causal
        self.left = taps - 1 if causal else taps // 2
        self.right = taps - 1 - self.left
        self.weight = nn.Parameter(torch.zeros(width, taps))
        self.bias = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            nn.init.normal_(self.weight, std=taps**-0.5)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""

        def convolve(tokens: Tensor, segments: Tensor | None) -> Tensor:
            activation, causal = self.activation, self.causal
            return short_conv(tokens, self.weight, self.bias, activation=activation, causal=causal, segments=segments)[
                0
            ]

        return span.halo(x, self.left, self.right, convolve)


class DecayGate(nn.Module):
    """Decays that depend on the token: ``exp(-rate * step)`` with ``step = softplus(raw + bias)``.

    Args:
        size: numbers of a token, one per head or per channel.
        rates: range of the rates at the start of training, drawn uniformly.
        steps: range of the step sizes at the start of training, drawn log-uniformly.
        shared: neighbouring numbers that share a rate; divides ``size``.

    Source: "Transformers are SSMs", arXiv 2405.21060.
    """

    def __init__(
        self,
        size: int,
        rates: tuple[float, float] = (1.0, 16.0),
        steps: tuple[float, float] = (0.001, 0.1),
        shared: int = 1,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.log_rate = nn.Parameter(torch.empty(size // shared).uniform_(*rates).log_())
        step = torch.empty(size).uniform_(*map(math.log, steps)).exp_()
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(bias) = step

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, L, size]`` -> the step sizes and the logarithms of the decays, of the same shape, in fp32 or better:
        16 bits do not tell a slow decay from 1.
        """
        wide = torch.promote_types(raw.dtype, torch.float32)
        step = F.softplus(raw.to(wide) + self.bias.to(wide))
        rate = self.log_rate.to(wide).exp()
        return step, step * -(rate if self.shared == 1 else rate.repeat_interleave(self.shared))


def dropout(x: Tensor, rate: float, span: Span, name: str) -> Tensor:
    """Dropout whose mask is a hash of (row's seed, layer, global position, channel).

    So it does not depend on how the sequence is split, and is the same when a layer is recomputed.

    Args:
        x: ``[B, L, ...]``.
        rate: probability of zero; the rest is divided by ``1 - rate``.
        span: gives the rows' seeds (``dropout_seeds``; None switches dropout off) and the position of the first token.
        name: distinguishes several dropouts of one layer.
    """
    if span.dropout_seeds is None or rate == 0.0 or x.numel() == 0:
        return x
    salt = _crc32(f"{span.layer}.{name}")
    return position_dropout(x, rate, span.dropout_seeds.to(x.device), span.position, salt)


def _crc32(text: str) -> int:
    """`zlib.crc32`, which `torch.compile` cannot trace."""
    crc = 0xFFFFFFFF
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (crc & 1) * 0xEDB88320
    return crc ^ 0xFFFFFFFF
