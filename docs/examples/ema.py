"""A gated exponential moving average: each token says, channel by channel, how much of the past it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreach.errors import InputError
from longreach.framework.mixers import register
from longreach.kernels.scan import StatefulOp, exclusive_chunk_scan
from longreach.parallel.span import Span

BLOCK = 64  # tokens that are walked through one by one, in all blocks at once
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class GatedAverage(StatefulOp):
    """``h[t] = keep[t] h[t-1] + (1 - keep[t]) x[t]``, where ``keep = sigmoid(gate)``. The state is ``h [B, D]``.

    Its inputs are ``x`` and ``gate``, both ``[B, L, D]``.
    """

    def local_transition(self, inputs: Tensors, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        x, gate = inputs
        wide = torch.promote_types(x.dtype, torch.float32)  # states are kept in fp32 or better
        kept = F.logsigmoid(gate.to(wide)).sum(1).exp()  # of many tokens: their product, by its logarithm
        return kept, _states(x, gate, segments, past=torch.zeros_like(kept))[:, -1]

    def apply_state(self, inputs: Tensors, segments: Tensor | None, past: Tensor) -> tuple[Tensor, Tensors]:
        return _states(*inputs, segments, past)[:, 1:].to(inputs[0].dtype), ()


def _states(x: Tensor, gate: Tensor, segments: Tensor | None, past: Tensor) -> Tensor:
    """``past [B, D]`` and the state after each token, ``[B, 1 + L, D]``. All factors are at most 1: nothing grows."""
    gate, length = gate.to(past.dtype), x.shape[1]
    keep, new = torch.sigmoid(gate), torch.sigmoid(-gate) * x
    if segments is not None:  # the first token of a document keeps nothing
        keep = keep.masked_fill(segments.diff(dim=1, prepend=segments[:, :1]).ne(0).unsqueeze(-1), 0.0)
    size = max(1, min(BLOCK, length))
    shape, more = (-(-length // size), size), (0, 0, 0, -length % size)  # what fills up the last block changes nothing
    keep = F.pad(keep, more, value=1.0).unflatten(1, shape)
    new = F.pad(new, more).unflatten(1, shape)
    decays, sums = [keep[:, :, 0]], [new[:, :, 0]]  # of each block, from its first token to this one
    for token in range(1, size):
        decays.append(keep[:, :, token] * decays[-1])
        sums.append(keep[:, :, token] * sums[-1] + new[:, :, token])
    before = exclusive_chunk_scan(decays[-1], sums[-1], past)[:, :-1].to(past.dtype)
    states = torch.stack(decays, 2) * before.unsqueeze(2) + torch.stack(sums, 2)
    return torch.cat([past.unsqueeze(1), states.flatten(1, 2)[:, :length]], 1)


@dataclass
class EmaConfig:
    """Options of the ``ema`` mixer: how many tokens its slowest channels remember at the beginning of training."""

    longest: float = 4096.0


@register("ema", EmaConfig)
class Ema(nn.Module):
    """``[B, L, D]`` -> ``[B, L, D]``: the average of a projection, gated, and projected back."""

    def __init__(self, width: int, config: EmaConfig, *, causal: bool = True) -> None:
        super().__init__()
        if not causal:
            raise InputError("model.causal", False, "true: an exponential moving average looks back")
        self.average = GatedAverage()
        self.inputs = nn.Linear(width, 3 * width, bias=False)
        self.keep = nn.Parameter(torch.linspace(0.0, config.longest, width).log1p())
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        x, gate, shown = self.inputs(x).chunk(3, dim=-1)
        return self.out(F.silu(shown) * span.scan(self.average, x, gate + self.keep))
