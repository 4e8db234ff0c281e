"""The settings of linear attention, shared by its implementations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError

LEAST_LOG_DECAY = -1000.0  # whose exponential is 0 in fp64; differences of sums stay numbers where one is -inf


@dataclass(frozen=True)
class Settings:
    """The operator's settings, the same for every shard of a sequence.

    Attributes:
        causal: whether token i sees tokens j <= i only.
        decay: one number in (0, 1] per head; None for 1.
        normalize: divide by the sum of the weights.
        eps: the least divisor.
        scale: multiplies q.
    """

    causal: bool = True
    decay: tuple[float, ...] | None = None
    normalize: bool = False
    eps: float = 1e-6
    scale: float = 1.0
    plain_sum = True  # of `StatefulOp`: a non-causal one has no decay

    def __post_init__(self) -> None:
        if self.decay is not None and not self.causal:
            raise InputError(
                "linear_attention: decay", self.decay, "None where causal=False", "pass causal=True or no decay"
            )
        if self.decay is not None and not all(0 < x <= 1 for x in self.decay):
            raise InputError("linear_attention: decay", self.decay, "in (0, 1] for every head")
        if self.normalize and not self.eps > 0:
            raise InputError("linear_attention: eps", self.eps, "above 0 where normalize=True")

    def decays(self, device: torch.device) -> Tensor | None:
        """``[H]`` fp64, or None for 1; not to be written to, see `powers`."""
        return None if self.decay is None else powers(self.decay, (1,), device).squeeze(1)

    def decay_over(self, inputs: tuple[Tensor, ...], like: Tensor) -> Tensor:
        """``A`` of a shard, in the dtype of ``like``: ``[B or 1, H, 1, 1]``, or ``[1, 1, 1, 1]`` for 1."""
        if is_gated(inputs):
            return inputs[3].sum(1, dtype=torch.float64).exp().to(like.dtype)[..., None, None]
        decays = self.decays(like.device)
        if decays is None:
            return like.new_ones(1, 1, 1, 1)
        return (decays ** inputs[0].shape[1]).to(like.dtype).view(1, -1, 1, 1)

    def takes_groups(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether the implementation takes q and k of fewer heads than v."""
        return False

    def values(self, v: Tensor) -> Tensor:
        """``v [B, L, H, V]``, with a column of ones behind it if ``normalize``: their sum is the divisor."""
        return F.pad(v, (0, 1), value=1) if self.normalize else v


def is_gated(inputs: tuple[Tensor, ...]) -> bool:
    """Whether ``inputs`` are q, k, v and ``log_decay``."""
    return len(inputs) == 4


def per_head(x: Tensor, v: Tensor) -> Tensor:
    """``x [B, L, G, K]`` for each head of ``v [B, L, H, V]``: ``[B, L, H, K]``, head h reads group ``h // (H / G)``."""
    return x if x.shape[2] == v.shape[2] else x.repeat_interleave(v.shape[2] // x.shape[2], dim=2)


def powers(
    decay: tuple[float, ...], exponents: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``decay ** exponents``, ``[H, len(exponents)]``, 0 for exponents below 0: what a token sees of later ones.

    The same tensor at every call: not to be written to.

    A copy from the host at every call would wait for the host, and a CUDA graph could not capture it.
    """
    # Not kept: what has no data or is functional, under a mode of `torch.compile`; and what a CUDA graph would fill.
    passing = type(torch.empty(0)) is not Tensor
    passing = passing or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    make = _kept_powers.__wrapped__ if passing else _kept_powers
    return make(decay, exponents, device, dtype)


@lru_cache(maxsize=64)
def _kept_powers(
    decay: tuple[float, ...], exponents: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False):  # whose tensors autograd would refuse later
        bases, whole = torch.tensor(decay, dtype=torch.float64), torch.tensor(exponents)
        # Waits for the copy, once, so that every stream finds it done.
        table = (bases.unsqueeze(1) ** whole.clamp(min=0)).masked_fill(whole < 0, 0)
        return table.to(dtype).to(device)


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of states and sums: fp64 for fp64 inputs (of q, k and v), else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors[:3]) else torch.float32
