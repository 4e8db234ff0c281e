"""Position-keyed dropout in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

INCREMENT, FIRST, SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def reference_dropout(x: Tensor, rate: float, seeds: Tensor, start: int = 0, salt: int = 0) -> Tensor:
    """Zero with probability ``rate`` in each place, by a hash of the row's seed, salt, position and channel.

    ``keep = mix(mix(seed + salt) + position * channels + channel) mod 2^31 >= rate * 2^31``. Arguments as of `dropout`.
    """
    channels = x[0, 0].numel()
    position = torch.arange(start, start + x.shape[1], device=x.device)
    cell = position.unsqueeze(-1) * channels + torch.arange(channels, device=x.device)
    bits = _mix(_mix(seeds + salt).view(-1, 1, 1) + cell)
    keep = (bits & 0x7FFFFFFF) >= int(rate * 0x80000000)
    return x * keep.view_as(x).to(x.dtype) / (1.0 - rate)


def _mix(bits: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) on int64, whose products wrap around."""
    bits = bits + INCREMENT
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * FIRST
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * SECOND
    return bits ^ (bits >> 31 & (1 << 33) - 1)
