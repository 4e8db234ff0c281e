"""The definition of linear attention: every pair of tokens, O(L^2). Any floating dtype, plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import Carry, StatefulOp, local_map
from .settings import Settings, state_dtype


class Reference(Settings, StatefulOp):
    """Linear attention by its definition; the adjoints are those of automatic differentiation."""

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        _, k, v = inputs
        dtype = state_dtype(*inputs)
        k, v = k.to(dtype), self.values(v.to(dtype))
        length = k.shape[1]
        age = torch.arange(length - 1, -1, -1, device=k.device)
        weight = self._power(age, dtype)
        right = torch.einsum("blhk,hl,blhv->bhkv", _only(k, segments, -1), weight, v)
        if self.causal:
            return self.decay_over(length, right), right
        left = torch.einsum("blhk,blhv->bhkv", _only(k, segments, 0), v)
        return self.decay_over(length, right), torch.stack([right, left])

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        dtype = state_dtype(*inputs)
        q, k, v = (x.to(dtype) for x in inputs)
        position = torch.arange(q.shape[1], device=q.device)
        distance = position[:, None] - position
        weight = self._power(distance.clamp(min=0), dtype)
        if self.causal:
            weight = weight * (distance >= 0)
        weight = weight.unsqueeze(0)
        if segments is not None:
            weight = weight * (segments[:, :, None] == segments[:, None, :]).unsqueeze(1)
        y = torch.einsum("bihk,bjhk,bhij,bjhv->bihv", q, k, weight, self.values(v))
        from_left, from_right = (initial, None) if self.causal else initial.unbind()
        since = self._power(position + 1, dtype)
        y = y + torch.einsum("bihk,hi,bhkv->bihv", _only(q, segments, 0), since, from_left)
        if from_right is not None:
            y = y + torch.einsum("bihk,bhkv->bihv", _only(q, segments, -1), from_right)
        y = self.scale * y
        if self.normalize:
            divisor = y[..., -1:]
            # 0 times an infinite divisor is NaN, where the quotient would be 0.
            y = y[..., :-1] / (divisor.clamp(min=self.eps) + 0 * divisor)
        return y.to(inputs[2].dtype), ()

    def _power(self, exponents: Tensor, dtype: torch.dtype) -> Tensor:
        """``decay^exponents``: ``[H or 1, ...]``."""
        decays = self.decays(exponents.device)
        if decays is None:
            return torch.ones_like(exponents, dtype=dtype).unsqueeze(0)
        return (decays.view(-1, *(1,) * exponents.dim()) ** exponents).to(dtype)


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
        q, k: ``[B, L, H, K]``.
        v: ``[B, L, H, V]``.
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
    map_ = local_map(op, (q, k, v), segments)
    factor, state = map_.transition.tensor, map_.state
    own = state if causal else state[0]
    initial, last = torch.zeros_like(own), None
    if carry is not None:
        initial, last = carry.state.to(own.dtype), carry.segment
    if segments is not None and q.shape[1]:
        if last is not None:
            initial = initial * (segments[:, 0] == last)[:, None, None, None]
        last = segments[:, -1]
    y, _ = op.apply_state((q, k, v), segments, initial if causal else torch.stack([initial, torch.zeros_like(initial)]))
    return y, Carry(factor * initial + own, last)
