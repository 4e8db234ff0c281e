"""Linear attention with a trainable feed-forward feature map (arXiv 2211.04076) as a mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...kernels.linear_attention import LinearAttention
from ...parallel.span import Span
from ..layers import ShortConv, dropout


@dataclass
class FeedforwardKernelConfig:
    """Options of the ``feedforward_kernel`` mixer.

    Attributes:
        heads: number of heads; divides the width.
        kernel: feature map: "ffn" softplus(x W); "glu" f(x W_o) * sigmoid(x W_g); "amglu" the same with a low-rank
            gate.
        layers: feature maps stacked, 1 to 3; f is the identity in inner layers and softplus in the last. "ffn" has one
            layer: without gates, several would be one linear map.
        dropout: rate at the input of each feature layer.
        penalty: weight of ``mse(W_o W_o^T, I)``, summed over feature layers and added to the loss; 0 for none. The
            author's code adds it for q and again for k, whose matrices are the same: his weight w is ``2 w`` here, 0.02
            for 0.01.
        conv_len: taps of the short convolution on q, k and v, which makes the order of tokens visible; 0 for none.
        bias: whether the projections to q, k and v and the one of the output have biases, as the author's have.
    """

    heads: int = 4
    kernel: Literal["ffn", "glu", "amglu"] = "glu"
    layers: int = 1
    dropout: float = 0.1
    penalty: float = 0.02
    conv_len: int = 4
    bias: bool = False


class KernelLayer(nn.Module):
    """One layer of the feature map, a matrix per head, no bias.

    Args:
        heads: H.
        head_width: K; features are as wide as heads.
        kind: "ffn", "glu" or "amglu".
        last: whether this is the last layer, whose features are positive (softplus).
    """

    def __init__(self, heads: int, head_width: int, kind: str, last: bool) -> None:
        super().__init__()
        self.last = last
        self.out = nn.Parameter(torch.empty(heads, head_width, head_width))
        rank = max(1, head_width // 4) if kind == "amglu" else head_width
        self.gate_in = self.gate_out = None
        if kind != "ffn":
            self.gate_in = nn.Parameter(torch.empty(heads, head_width, rank))
            if kind == "amglu":
                self.gate_out = nn.Parameter(torch.empty(heads, rank, head_width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal output matrices, He-normal gates (the paper's choice)."""
        for matrix in self.out:
            nn.init.orthogonal_(matrix)
        for gate in (self.gate_in, self.gate_out):
            if gate is not None:
                nn.init.normal_(gate, std=(2.0 / gate.shape[1]) ** 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, L, H, K]`` -> features of the same shape, and the orthogonality penalty (a scalar)."""
        features = torch.einsum("blhk,hkf->blhf", x, self.out)
        if self.last:
            features = F.softplus(features)
        if self.gate_in is not None:
            gate = torch.einsum("blhk,hkr->blhr", x, self.gate_in)
            if self.gate_out is not None:
                gate = torch.einsum("blhr,hrf->blhf", gate, self.gate_out)
            features = features * torch.sigmoid(gate)
        gram = self.out @ self.out.transpose(-1, -2)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return features, (gram - eye).square().mean()


class FeedforwardKernel(nn.Module):
    """Normalized linear attention; q and k pass through the same trainable feature map."""

    def __init__(self, width: int, config: FeedforwardKernelConfig, *, causal: bool = True) -> None:
        super().__init__()
        if width % config.heads:
            raise InputError("model.feedforward_kernel.heads", config.heads, f"a divisor of the width {width}")
        if config.kernel not in ("ffn", "glu", "amglu"):
            raise InputError("model.feedforward_kernel.kernel", config.kernel, "one of ffn, glu, amglu")
        if not 1 <= config.layers <= 3:
            raise InputError("model.feedforward_kernel.layers", config.layers, "1 to 3")
        if config.kernel == "ffn" and config.layers > 1:
            allowed = "1 with kernel = ffn: several layers without gates are one linear map"
            raise InputError("model.feedforward_kernel.layers", config.layers, allowed, "kernel=glu or amglu stacks")
        self.heads, self.dropout, self.penalty = config.heads, config.dropout, config.penalty
        self.attention = LinearAttention(causal=causal, normalize=True, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.conv = ShortConv(3 * width, config.conv_len, causal=causal) if config.conv_len else None
        self.features = nn.ModuleList(
            KernelLayer(config.heads, width // config.heads, config.kernel, last=layer == config.layers - 1)
            for layer in range(config.layers)
        )
        self.out = nn.Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """``[B, L, D]`` -> ``[B, L, D]``, and the weighted orthogonality penalty (a scalar)."""
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv = self.conv(qkv, span)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv.chunk(3, dim=-1))
        penalty = x.new_zeros(())
        for number, layer in enumerate(self.features):
            q, cost = layer(dropout(q, self.dropout, span, f"q{number}"))
            k, _ = layer(dropout(k, self.dropout, span, f"k{number}"))
            penalty = penalty + self.penalty * cost
        return self.out(span.scan(self.attention, q, k, v).flatten(-2)), penalty
