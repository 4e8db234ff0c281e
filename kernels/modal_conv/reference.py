"""Modal convolution by its definition: what every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import NO_TOKENS, Carry


def reference_modal_conv(
    x: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    re: Tensor,
    im: Tensor,
    *,
    carry: Carry | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Carry]:
    """The recurrence ``s_i = lambda s_{i-1} + x_i``, ``y_i = sum_n Re((re + i im) s_i)``, from zero in every document.

    ``lambda = exp(-exp(log_decay) + i angle)``, NaN where log_decay or angle is not finite. Computed in fp64, token by
    token.

    Args:
        x: ``[B, L, D]``, any floating dtype.
        log_decay, angle, re, im: ``[D, N]``.
        carry: the state ``[B, D, N]`` complex before the first token, and its document ids ``[B]`` (None: that of the
            first token).
        segments: ``[B, L]`` document ids, or None.

    Returns:
        ``y [B, L, D]`` in x's dtype, and the carry after the last token, complex128.
    """
    log_decay, angle = log_decay.double(), angle.double()
    log_decay = log_decay + 0 * (log_decay + angle)
    decay = torch.exp(torch.complex(-log_decay.exp(), angle))
    amplitude = torch.complex(re.double(), im.double())
    state, ids = carry if carry is not None else (decay.new_zeros(x.shape[0], *decay.shape), None)
    if segments is not None and carry is None:
        ids = segments.new_full(segments.shape[:1], NO_TOKENS)
    rows = []
    for i in range(x.shape[1]):
        if segments is not None:
            if ids is not None:
                state = state.where((segments[:, i] == ids).view(-1, 1, 1), 0)
            ids = segments[:, i]
        state = decay * state + x[:, i].double().unsqueeze(-1)
        rows.append((amplitude * state).real.sum(-1))
    y = torch.stack(rows, dim=1) if rows else x.double()
    return y.to(x.dtype), Carry(state, ids)
