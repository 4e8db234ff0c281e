"""Long convolution by its definition: what every backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..state import NO_TOKENS, Carry


def reference_long_conv(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    causal: bool = True,
    carry: Carry | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Carry]:
    """``y_i = skip * x_i + sum_m kernel[:, m] x_{i + centre - m}``, where ``i + centre - m`` is in i's document.

    ``centre = 0`` if causal, ``K // 2`` otherwise. Computed in fp64, tap by tap: O(L K).

    Args:
        x: ``[B, L, D]``, any floating dtype.
        kernel: ``[D, K]``.
        skip: ``[D]`` or None.
        causal: whether tokens see only themselves and their past.
        carry: state ``[B, K - 1, D]``, the tokens before x, and their ids ``[B, K - 1]`` (-1: no token; None: those
            of the first document of x).
        segments: ``[B, L]`` document ids, or None.

    Returns:
        ``y [B, L, D]`` in x's dtype, and the last ``K - 1`` tokens with their ids.
    """
    batch, length, width = x.shape
    num_taps = kernel.shape[1]
    centre = 0 if causal else num_taps // 2
    state, ids = carry if carry is not None else (x.new_zeros(batch, num_taps - 1, width), None)
    if segments is not None and carry is None:
        ids = segments.new_full((batch, num_taps - 1), NO_TOKENS)
    elif segments is not None and ids is None and length:
        ids = segments[:, :1].expand(batch, num_taps - 1)
    tokens = torch.cat([state.to(x.dtype), x], dim=1)
    all_ids = None if segments is None or ids is None else torch.cat([ids, segments], dim=1)
    # Position p of the padded tokens is token p - (K - 1) of x.
    padded = F.pad(tokens.double(), (0, 0, 0, centre))
    y = torch.zeros_like(x, dtype=torch.float64)
    for tap in range(num_taps):
        first_seen = num_taps - 1 + centre - tap
        seen = padded[:, first_seen : first_seen + length]
        if all_ids is not None and segments is not None:
            seen_ids = F.pad(all_ids, (0, centre), value=NO_TOKENS)[:, first_seen : first_seen + length]
            seen = torch.where((seen_ids == segments).unsqueeze(-1), seen, 0)
        y = y + kernel[:, tap].double() * seen
    if skip is not None:
        y = y + skip.double() * x.double()
    after = Carry(tokens[:, length:], None if all_ids is None else all_ids[:, length:])
    return y.to(x.dtype), after
