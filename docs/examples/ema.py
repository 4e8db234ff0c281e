"""A gated exponential moving average: each token sets, channel by channel, how much of the state is kept."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreach import InputError, Span, register
from longreach.kernels.scan import StatefulOp, exclusive_chunk_scan

CHUNK = 64  # tokens of a chunk: these are processed one by one, all chunks at once
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class GatedAverage(StatefulOp):
    """``h[t] = keep[t] h[t-1] + (1 - keep[t]) x[t]``, ``keep = sigmoid(gate)``; inputs x, gate ``[B, L, D]``."""

    def local_transition(self, inputs: Tensors, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        x, gate = inputs
        wide = torch.promote_types(x.dtype, torch.float32)  # states are kept in fp32 or better
        decay = F.logsigmoid(gate.to(wide)).sum(1).exp()  # a product of many factors, by its logarithm
        return decay, _states(x, gate, segments, torch.zeros_like(decay))[:, -1]

    def apply_state(self, inputs: Tensors, segments: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensors]:
        return _states(*inputs, segments, initial)[:, 1:].to(inputs[0].dtype), ()


def _states(x: Tensor, gate: Tensor, segments: Tensor | None, initial: Tensor) -> Tensor:
    """The initial state ``[B, D]`` and that after each token, ``[B, 1 + L, D]``. Factors are at most 1."""
    gate, length = gate.to(initial.dtype), x.shape[1]
    keep, new = torch.sigmoid(gate), torch.sigmoid(-gate) * x
    if segments is not None:  # the first token of a document keeps nothing
        keep = keep.masked_fill(segments.diff(dim=1, prepend=segments[:, :1]).ne(0).unsqueeze(-1), 0.0)
    size = max(1, min(CHUNK, length))
    shape, padding = (-(-length // size), size), (0, 0, 0, -length % size)  # padded tokens change no state
    keep = F.pad(keep, padding, value=1.0).unflatten(1, shape)
    new = F.pad(new, padding).unflatten(1, shape)
    decays, sums = [keep[:, :, 0]], [new[:, :, 0]]  # the affine map of a chunk's tokens up to this one
    for token in range(1, size):
        decays.append(keep[:, :, token] * decays[-1])
        sums.append(keep[:, :, token] * sums[-1] + new[:, :, token])
    before = exclusive_chunk_scan(decays[-1], sums[-1], initial)[:, :-1].to(initial.dtype)
    states = torch.stack(decays, 2) * before.unsqueeze(2) + torch.stack(sums, 2)
    return torch.cat([initial.unsqueeze(1), states.flatten(1, 2)[:, :length]], 1)


@dataclass
class EmaConfig:
    longest: float = 4096.0  # tokens that the slowest channels average over, at initialization


@register("ema", EmaConfig)
class Ema(nn.Module):
    def __init__(self, width: int, config: EmaConfig, *, causal: bool = True) -> None:
        super().__init__()
        if not causal:
            raise InputError("model.causal", False, "true: an exponential moving average is causal")
        self.average, self.inputs = GatedAverage(), nn.Linear(width, 3 * width, bias=False)
        self.keep = nn.Parameter(torch.linspace(0.0, config.longest, width).log1p())
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:  # [B, L, D] -> [B, L, D]
        x, gate, output_gate = self.inputs(x).chunk(3, dim=-1)
        return self.out(F.silu(output_gate) * span.scan(self.average, x, gate + self.keep))
