"""Short convolution by its definition: what every backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..state import NO_TOKENS, Carry


def reference_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    causal: bool = True,
    carry: Carry | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Carry]:
    """``y_i = activation(bias + sum_j weight[:, j] x_{i + j - left})``, where ``i + j - left`` is in i's document.

    ``left = W - 1`` if causal, ``W // 2`` otherwise. Computed in fp64.

    Args:
        x: ``[B, L, D]``, any floating dtype.
        weight: ``[D, W]``.
        bias: ``[D]`` or None.
        activation: None or "silu".
        causal: whether tokens see only themselves and their past.
        carry: state ``[B, W - 1, D]``, the tokens before x, and their ids ``[B, W - 1]`` (-1: no token; None: those
            of the first document of x).
        segments: ``[B, L]`` document ids, or None.

    Returns:
        ``y [B, L, D]`` in x's dtype, and the last ``W - 1`` tokens with their ids.
    """
    batch, length, width = x.shape
    num_taps = weight.shape[1]
    left = num_taps - 1 if causal else num_taps // 2
    state, ids = carry if carry is not None else (x.new_zeros(batch, num_taps - 1, width), None)
    if segments is not None and carry is None:
        ids = segments.new_full((batch, num_taps - 1), NO_TOKENS)
    elif segments is not None and ids is None and length:
        ids = segments[:, :1].expand(batch, num_taps - 1)
    tokens = torch.cat([state.to(x.dtype), x], dim=1)
    all_ids = None if segments is None or ids is None else torch.cat([ids, segments], dim=1)
    # Position p of the padded tokens is token p - (W - 1) - left of x.
    padded = F.pad(tokens.double(), (0, 0, left, num_taps - 1 - left))
    y = torch.zeros_like(x, dtype=torch.float64)
    for tap in range(num_taps):
        first = num_taps - 1 + tap
        seen = padded[:, first : first + length]
        if all_ids is not None and segments is not None:
            seen_ids = F.pad(all_ids, (left, num_taps - 1 - left), value=NO_TOKENS)[:, first : first + length]
            seen = torch.where((seen_ids == segments).unsqueeze(-1), seen, 0)
        y = y + weight[:, tap].double() * seen
    if bias is not None:
        y = y + bias.double()
    if activation == "silu":
        y = F.silu(y)
    after = Carry(tokens[:, length:], None if all_ids is None else all_ids[:, length:])
    return y.to(x.dtype), after
