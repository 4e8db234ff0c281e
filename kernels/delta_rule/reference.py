"""The delta rule by its definition: one token after the other. Any floating dtype, plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import Carry, StatefulOp
from ..transition import Matrix
from .settings import Settings, log_decays, per_head, state_dtype


class Reference(Settings, StatefulOp):
    """The delta rule by its recurrence; the adjoints are those of automatic differentiation."""

    transition = Matrix
    isolates = False

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, *gates = inputs
        zeros = v.new_zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1], dtype=state_dtype(inputs))
        identity = torch.eye(q.shape[-1], dtype=zeros.dtype, device=v.device).expand(*zeros.shape[:2], -1, -1)
        silent = v.new_zeros(*v.shape[:-1], q.shape[-1])
        # A is linear in the state that enters: the final state from each row of the identity, without values.
        _, transition = self._run((q, k, silent, *gates), None, identity)
        return transition, self._run(inputs, segments, zeros)[1]

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._run(inputs, segments, initial)[0], ()

    def _run(self, inputs: tuple[Tensor, ...], segments: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs ``[B, L, H, V]`` and the state after the last token, from ``state [B, H, K, V]``."""
        dtype, heads = state.dtype, inputs[2].shape[2]
        q, k = (per_head(self.features(x, dtype), heads) for x in inputs[:2])
        q, v, beta = q * self.query_scale(q), inputs[2].to(dtype), inputs[3].to(dtype)
        decay = log_decays(inputs).exp().to(dtype)
        rows = []
        for token in range(v.shape[1]):
            if segments is not None and token:
                state = state * (segments[:, token] == segments[:, token - 1])[:, None, None, None]
            key = k[:, token].unsqueeze(-1)
            state = decay[:, token].unsqueeze(-1) * state
            error = v[:, token].unsqueeze(-2) - key.mT @ state
            state = state + beta[:, token, :, None, None] * key @ error
            rows.append((q[:, token].unsqueeze(-2) @ state).squeeze(-2))
        y = torch.stack(rows, 1) if rows else v
        return y.to(inputs[2].dtype), state


def reference_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    carry: Carry | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Carry]:
    """`delta_rule` of a whole sequence by its definition; plain autograd gives every gradient.

    Args:
        q, k: ``[B, L, G, K]``.
        v: ``[B, L, H, V]``, H a multiple of G.
        beta: ``[B, L, H]``.
        log_decay: ``[B, L, H]`` or ``[B, L, H, K]``, or None for a decay of 1.
        scale: multiplies q; None for ``K ** -0.5``.
        normalize_qk: divide q and k by their norms.
        carry: state ``[B, H, K, V]`` before the sequence, or None.
        segments: ``[B, L]`` document ids, or None for one document.

    Returns:
        ``[B, L, H, V]`` in the dtype of v, and the carry after the sequence.
    """
    inputs = (q, k, v, beta) if log_decay is None else (q, k, v, beta, log_decay)
    state = v.new_zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1], dtype=state_dtype(inputs))
    last = None
    if carry is not None:
        state, last = carry.state.to(state.dtype), carry.segment
    if segments is not None and q.shape[1]:
        if last is not None:
            state = state * (segments[:, 0] == last)[:, None, None, None]
        last = segments[:, -1]
    y, state = Reference(scale, normalize_qk)._run(inputs, segments, state)
    return y, Carry(state, last)
