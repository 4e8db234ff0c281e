"""The definition of linear attention: every pair of tokens, O(L^2). Any floating dtype, plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import Carry, StatefulOp, local_map
from .settings import LEAST_LOG_DECAY, Settings, is_gated, per_head, state_dtype


class Reference(Settings, StatefulOp):
    """Linear attention by its definition; the adjoints are those of automatic differentiation."""

    isolates = False

    def takes_groups(self, inputs: tuple[Tensor, ...]) -> bool:
        return True

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        _, k, v, *_ = inputs
        dtype = state_dtype(*inputs)
        k, v = per_head(k, v).to(dtype), self.values(v.to(dtype))
        _, until = self._state_weights(inputs, dtype)
        right = torch.einsum("blhk,bhl,blhv->bhkv", _only(k, segments, -1), until, v)
        if self.causal:
            return self.decay_over(inputs, right), right
        left = torch.einsum("blhk,blhv->bhkv", _only(k, segments, 0), v)
        return self.decay_over(inputs, right), torch.stack([right, left])

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        dtype = state_dtype(*inputs)
        q, k, v = (per_head(x, inputs[2]).to(dtype) for x in inputs[:3])
        weight = self._pair_weights(inputs, dtype)
        if segments is not None:
            weight = weight * (segments[:, :, None] == segments[:, None, :]).unsqueeze(1)
        y = torch.einsum("bihk,bjhk,bhij,bjhv->bihv", q, k, weight, self.values(v))
        from_left, from_right = (initial, None) if self.causal else initial.unbind()
        since, _ = self._state_weights(inputs, dtype)
        y = y + torch.einsum("bihk,bhi,bhkv->bihv", _only(q, segments, 0), since, from_left)
        if from_right is not None:
            y = y + torch.einsum("bihk,bhkv->bihv", _only(q, segments, -1), from_right)
        y = self.scale * y
        if self.normalize:
            divisor = y[..., -1:]
            # 0 times an infinite divisor is NaN, where the quotient would be 0.
            y = y[..., :-1] / (divisor.clamp(min=self.eps) + 0 * divisor)
        return y.to(inputs[2].dtype), ()

    def _pair_weights(self, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """``[B or 1, H or 1, L, L]``, of token j (column) in the output of token i (row)."""
        position = torch.arange(inputs[0].shape[1], device=inputs[0].device)
        distance = position[:, None] - position
        if is_gated(inputs):
            total = _running_sum(inputs[3])
            between = total.unsqueeze(-1) - total.unsqueeze(-2)
            return between.masked_fill(distance < 0, -torch.inf).exp().to(dtype)
        weight = self._power(distance.clamp(min=0), dtype)
        return (weight * (distance >= 0) if self.causal else weight).unsqueeze(0)

    def _state_weights(self, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[B or 1, H or 1, L]``, of the initial state in each token's output and of each token in the final state."""
        if is_gated(inputs):
            total = _running_sum(inputs[3])
            return total.exp().to(dtype), (total[..., -1:] - total).exp().to(dtype)
        since = torch.arange(1, inputs[0].shape[1] + 1, device=inputs[0].device)
        return self._power(since, dtype).unsqueeze(0), self._power(since.flip(0) - 1, dtype).unsqueeze(0)

    def _power(self, exponents: Tensor, dtype: torch.dtype) -> Tensor:
        """``decay^exponents``: ``[H or 1, ...]``."""
        decays = self.decays(exponents.device)
        if decays is None:
            return torch.ones_like(exponents, dtype=dtype).unsqueeze(0)
        return (decays.view(-1, *(1,) * exponents.dim()) ** exponents).to(dtype)


def _running_sum(log_decay: Tensor) -> Tensor:
    """``[B, L, H]`` -> ``[B, H, L]`` in fp64: the log of the decay from before the first token to each."""
    return log_decay.double().clamp(min=LEAST_LOG_DECAY).cumsum(1).transpose(1, 2)


def _only(x: Tensor, segments: Tensor | None, token: int) -> Tensor:
    """``x [B, L, H, K]``, zero outside the document of the first (0) or last (-1) token."""
    if segments is None or not segments.shape[1]:
        return x
    return x * (segments == segments[:, token].unsqueeze(1))[:, :, None, None]


def reference_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    decay: tuple[float, ...] | None = None,
    causal: bool = True,
    normalize: bool = False,
    carry: Carry | None = None,
    segments: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Carry]:
    """`linear_attention` of a whole sequence by its definition; plain autograd gives every gradient.

    Args:
        q, k: ``[B, L, G, K]``, H a multiple of G.
        v: ``[B, L, H, V]``.
        log_decay: ``[B, L, H]`` <= 0, or None.
        decay: one number in (0, 1] for each head, or None for 1.
        causal: whether token i sees tokens j <= i only.
        normalize: divide by the sum of the weights, or ``eps`` where it is less.
        carry: state ``[B, H, K, V]`` (``V + 1`` with ``normalize``) before the sequence, or None.
        segments: ``[B, L]`` document ids, or None for one document.
        scale: multiplies q.
        eps: the least divisor.

    Returns:
        ``[B, L, H, V]`` in the dtype of v, and the carry after the sequence.
    """
    op = Reference(causal, decay, normalize, eps, scale)
    inputs = (q, k, v) if log_decay is None else (q, k, v, log_decay)
    map_ = local_map(op, inputs, segments)
    factor, state = map_.transition.tensor, map_.state
    own = state if causal else state[0]
    initial, last = torch.zeros_like(own), None
    if carry is not None:
        initial, last = carry.state.to(own.dtype), carry.segment
    if segments is not None and q.shape[1]:
        if last is not None:
            initial = initial * (segments[:, 0] == last)[:, None, None, None]
        last = segments[:, -1]
    y, _ = op.apply_state(inputs, segments, initial if causal else torch.stack([initial, torch.zeros_like(initial)]))
    return y, Carry(factor * initial + own, last)
