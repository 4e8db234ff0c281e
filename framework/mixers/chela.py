"""CHELA: short-long convolutions with linear attention (after arXiv 2406.08128) as a mixer.

The paper's long convolution has learned taps: ``long_kernel`` "decaying" or "free". The default, "modal", is this
project's recurrent variant: a diagonal state-space recurrence in their place. The block's details beyond the abstract
are this project's too (the convolutions: kernels/long_conv/README.md and kernels/modal_conv/README.md):
``C = silu(long(silu(short(x))))``; q and k are affine functions of one shared
``silu(C W_z)``; values are ``silu(x W_v)``; the attention's output, normalized per head, is gated by ``silu(C W_g)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...kernels.linear_attention import LinearAttention
from ...kernels.long_conv import long_conv
from ...kernels.modal_conv import CentredModalConv, ModalConv
from ...parallel.span import ChannelShard, Span
from ..layers import RMSNorm, ShortConv


@dataclass
class ChelaConfig:
    """Options of the ``chela`` mixer.

    Attributes:
        heads: number of heads; divides the shared width and the value width.
        shared_width: z, width of q and k over all heads; 0 for half the model's width.
        value_width: e, width of values over all heads; 0 for twice the model's width.
        short_len: W, taps of the short convolution.
        long_kernel: "modal" (our recurrent variant, not the paper's: damped complex exponentials, a diagonal
            state-space recurrence; ranks exchange states, decoding costs O(modes) a token), or learned taps as in the
            paper: "free", or "decaying" (interpolated at several scales, shrinking with distance, of norm 1 at the
            start of training, as in SGConv, arXiv 2210.09298).
        long_len: K, taps of a free or decaying kernel.
        modes: N, complex exponentials per channel of a modal kernel.
        arrangement: "sequential": ``long(silu(short(x)))``; "parallel": ``long(x) + short(x)``, mergeable by
            `Chela.merge_`.
        decay: linear attention with a fixed decay per head (1 - 2^-5 .. 1 - 2^-12).
    """

    heads: int = 4
    shared_width: int = 0
    value_width: int = 0
    short_len: int = 4
    long_kernel: Literal["modal", "free", "decaying"] = "modal"
    long_len: int = 1024
    modes: int = 8
    arrangement: Literal["sequential", "parallel"] = "sequential"
    decay: bool = False


class ModalKernel(nn.Module):
    """Long convolution by damped complex exponentials, ``h[m] = Re(sum_n c_n lambda_n^m)``, plus ``skip * x``: a
    diagonal state-space recurrence, in place of the paper's learned taps.
    """

    def __init__(self, width: int, modes: int, causal: bool) -> None:
        super().__init__()
        self.conv = ModalConv() if causal else CentredModalConv()
        # Time constants from 4 to 4096 tokens, spread over the modes; slow rotations.
        rates = torch.logspace(math.log10(1 / 4), math.log10(1 / 4096), modes)
        self.log_decay = nn.Parameter(rates.log().expand(width, modes).clone())
        self.angle = nn.Parameter(torch.rand(width, modes) * math.pi / 8)
        # Each mode's gain is about its share of a unit response.
        gain = rates / modes**0.5
        sides = 1 if causal else 2
        self.real = nn.Parameter(torch.randn(sides, width, modes) * gain)
        self.imag = nn.Parameter(torch.randn(sides, width, modes) * gain)
        self.skip = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""
        real, imag = (p[0] if len(p) == 1 else p for p in (self.real, self.imag))
        return span.scan(self.conv, x, self.log_decay, self.angle, real, imag, name="long_conv") + self.skip * x


class TapKernel(nn.Module):
    """Long convolution by K taps per channel, learned one by one ("free") or interpolated at several scales
    ("decaying"), plus ``skip * x``.

    A decaying kernel is SGConv's: Normal(0, 1) points, interpolated linearly, each scale half the weight of the one
    before, the taps of each channel divided by their norm at the start of training, so that the convolution of white
    noise has the variance of its input. As the taps are linear in the points, the points themselves are divided: there
    is no buffer. (SGConv keeps the divisor apart: the kernels are the same, but a step of Adam moves its taps less, by
    that divisor.)
    """

    base = 32  # learned points per scale of a decaying kernel

    def __init__(self, width: int, taps: int, kind: str, causal: bool) -> None:
        super().__init__()
        self.taps, self.causal = taps, causal
        scales = 1 + max(0, math.ceil(math.log2(taps / self.base))) if kind == "decaying" else 0
        shape = (scales, width, self.base) if scales else (width, taps)
        self.points = nn.Parameter(torch.randn(shape) * (1.0 if scales else 0.002))
        if scales:
            with torch.no_grad():
                self.points.div_(self.kernel().norm(dim=1, keepdim=True))
        self.skip = nn.Parameter(torch.ones(width))
        self.bias: nn.Parameter | None = None  # a merged short convolution's

    def kernel(self) -> Tensor:
        """The taps ``[D, K]``, the current token's first (causal) or in the middle (centred)."""
        if self.points.dim() == 2:
            return self.points
        # The first two scales have `base` taps, each later one twice as many and half the weight of the one before.
        scales = [
            F.interpolate(p.unsqueeze(0), size=self.base * 2 ** max(0, scale - 1), mode="linear")[0] / 2**scale
            for scale, p in enumerate(self.points)
        ]
        taps = torch.cat(scales, dim=-1)
        if self.causal:
            return taps[:, : self.taps]
        # Centred: near taps in the middle, alternating sides outward.
        order = torch.arange(self.taps, device=taps.device) - self.taps // 2
        near = torch.where(order < 0, -2 * order - 1, 2 * order).clamp(max=self.taps - 1)
        return taps[:, near]

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""
        kernel, skip = self.kernel(), self.skip

        def convolve(shard: ChannelShard) -> Tensor:
            y, _ = long_conv(
                shard.tokens,
                kernel[shard.channels],
                skip[shard.channels],
                causal=self.causal,
                segments=shard.segments,
            )
            return y[:, shard.num_past :]

        y = span.by_channel(convolve, x, reach=self.taps - 1 if self.causal else None)
        return y if self.bias is None else y + self.bias


class Chela(nn.Module):
    """Short and long convolution, then gated linear attention whose q and k share one projection."""

    def __init__(self, width: int, config: ChelaConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.sequential = config.heads, config.arrangement == "sequential"
        shared, value = config.shared_width or width // 2, config.value_width or 2 * width
        _check(config, shared, value)
        act = "silu" if self.sequential else None
        self.short: ShortConv | None = ShortConv(width, config.short_len, activation=act, causal=causal)
        self.long: ModalKernel | TapKernel
        if config.long_kernel == "modal":
            self.long = ModalKernel(width, config.modes, causal)
        else:
            self.long = TapKernel(width, config.long_len, config.long_kernel, causal)
        decay = None
        if config.decay:
            slowest = max(1, config.heads - 1)
            decay = tuple(1.0 - 2.0 ** -(5 + 7 * head / slowest) for head in range(config.heads))
        self.attention = LinearAttention(causal=causal, decay=decay, scale=shared**-0.5)
        self.shared = nn.Linear(width, shared, bias=False)
        self.value = nn.Linear(width, value, bias=False)
        self.gate = nn.Linear(width, value, bias=False)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(shared)), nn.Parameter(torch.ones(shared))
        self.q_shift, self.k_shift = nn.Parameter(torch.zeros(shared)), nn.Parameter(torch.zeros(shared))
        self.norm = RMSNorm(value, value // config.heads)
        self.out = nn.Linear(value, width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""
        if self.short is None:
            context = self.long(x, span)
        elif self.sequential:
            context = self.long(self.short(x, span), span)
        else:
            context = self.long(x, span) + self.short(x, span)
        context = F.silu(context)
        shared = F.silu(self.shared(context))
        q = (shared * self.q_scale + self.q_shift).unflatten(-1, (self.heads, -1))
        k = (shared * self.k_scale + self.k_shift).unflatten(-1, (self.heads, -1))
        v = F.silu(self.value(x)).unflatten(-1, (self.heads, -1))
        mixed = span.scan(self.attention, q, k, v).flatten(-2)
        return self.out(F.silu(self.gate(context)) * self.norm(mixed))

    @torch.no_grad()
    def merge_(self) -> Chela:
        """Fold the short taps of a parallel arrangement into the first long taps, for inference; exact.

        Raises:
            InputError: sequential arrangement, a modal kernel (it has no taps), or a centred one.
        """
        if self.sequential or self.short is None or not isinstance(self.long, TapKernel) or not self.long.causal:
            raise InputError(
                "model.chela.arrangement",
                "sequential" if self.sequential else "parallel",
                "merge_ takes a causal parallel arrangement with a free or decaying kernel",
            )
        taps = self.long.kernel().clone()
        short = self.short.weight.flip(-1)
        taps = F.pad(taps, (0, max(0, short.shape[1] - taps.shape[1])))
        taps[:, : short.shape[1]] += short
        self.long.points = nn.Parameter(taps)
        self.long.taps = taps.shape[1]
        self.long.bias = nn.Parameter(self.short.bias.clone())
        self.short = None
        return self


def _check(config: ChelaConfig, shared: int, value: int) -> None:
    for field, width in (("shared_width", shared), ("value_width", value)):
        if width % config.heads:
            raise InputError(f"model.chela.{field}", width, f"a multiple of model.chela.heads = {config.heads}")
    if config.long_kernel not in ("modal", "free", "decaying"):
        raise InputError("model.chela.long_kernel", config.long_kernel, "one of modal, free, decaying")
    if config.arrangement not in ("sequential", "parallel"):
        raise InputError("model.chela.arrangement", config.arrangement, "one of sequential, parallel")
