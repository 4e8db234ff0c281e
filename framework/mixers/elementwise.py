"""Element-wise attention (arXiv 2501.05730) as a mixer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...kernels.elementwise import ElementwiseAttention
from ...parallel.span import Span
from ..layers import RMSNorm, ShortConv


@dataclass
class ElementwiseConfig:
    """Options of the ``elementwise`` mixer.

    Attributes:
        order: highest order of the series, even.
        conv_len: taps of the short convolution on q, k and v, which makes the order of tokens visible; 0 for none.
        norm_group: channels per group in which q and k are RMS-normalized; 0 for none, as in the paper.
        norm_scale: initial root mean square of q and k; 0.5 keeps ``2 q k`` where the series is accurate.
    """

    order: int = 6
    conv_len: int = 4
    norm_group: int = 64
    norm_scale: float = 0.5


class Elementwise(nn.Module):
    """q, k, v by one projection and a short convolution; q and k bounded; element-wise attention; projection out."""

    def __init__(self, width: int, config: ElementwiseConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.attention = ElementwiseAttention(order=config.order, causal=causal)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.conv = ShortConv(3 * width, config.conv_len, causal=causal) if config.conv_len else None
        group = config.norm_group
        self.q_norm = RMSNorm(width, group, config.norm_scale) if group else nn.Identity()
        self.k_norm = RMSNorm(width, group, config.norm_scale) if group else nn.Identity()
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv = self.conv(qkv, span)
        q, k, v = qkv.chunk(3, dim=-1)
        return self.out(span.scan(self.attention, self.q_norm(q), self.k_norm(k), v))
