"""Element-wise attention by its definition: what every backend is tested against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..state import Carry

Q_LIMIT = 1000.0  # q is clamped to this magnitude
DEN_FLOOR = 1e-30  # the denominator is never taken smaller
GRAD_LIMIT = 1e25  # gradients of one token's sums, and of q, saturate at this magnitude


def reference_elementwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = 6,
    causal: bool = True,
    carry: Carry | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Carry]:
    """Element-wise attention with ``exp(2 q k)`` replaced by its Taylor polynomial of even order: the EA-series.

    For every channel, with ``c_n = 2^n / n!`` and ``w_j = exp(-k_j^2)``, j over the tokens that token i may see::

        S_n(i) = sum_j k_j^n w_j v_j     Z_n(i) = sum_j k_j^n w_j
        y_i = sum_n c_n q_i^n S_n(i) / sum_n c_n q_i^n Z_n(i)

    Computed in fp64 with a mask ``[L, L]`` and differentiated by autograd, so it is for short sequences.

    Guards, the same in every backend, that change nothing in the ordinary range and keep NaN and Inf out of outputs
    and gradients, for finite inputs and upstream gradients up to 1e4 in magnitude and orders up to 8:

    1. q is clamped to +-`Q_LIMIT`; beyond it q has no gradient.
    2. ``k^n w`` is built upwards from ``w``, so that it is 0 where ``w`` underflows, never ``0 * inf``.
    3. The denominator is floored at `DEN_FLOOR`; where it is, no gradient flows through it.
    4. The gradients of ``S_n(i)``, ``Z_n(i)`` and ``q_i`` saturate at +-`GRAD_LIMIT`, and outputs and gradients are
       clamped to the finite range of their dtype.

    They hide nothing: what depends on NaN or on an infinity is NaN.

    Args:
        q, k, v: ``[B, L, D]``, any floating dtype.
        order: the highest power, even.
        causal: whether token i sees only the tokens j <= i, or all.
        carry: ``(S, Z)`` before the first token, ``[B, 2, order + 1, D]``, and its documents ``[B]`` or None.
        segments: ``[B, L]`` non-decreasing document ids; tokens see only their own document.

    Returns:
        ``y [B, L, D]`` in the dtype of the inputs, and the carry after the last token, in fp32 or fp64.

    Source: arXiv 2501.05730, the EA-series; the text's reading, in which t is the highest power.
    """
    batch, length, width = q.shape
    wide_q, wide_k, wide_v = _saturated(_widened(q, GRAD_LIMIT), Q_LIMIT), exposed(_widened(k)), _widened(v)

    powers = [torch.exp(-wide_k.square())]
    for _ in range(order):
        powers.append(powers[-1] * wide_k)
    keys = torch.stack(powers, dim=1)  # [B, t+1, L, D]
    terms = torch.stack([keys * wide_v.unsqueeze(1), keys], dim=1)  # [B, 2, t+1, L, D]

    ids = q.new_zeros(batch, length, dtype=torch.int64) if segments is None else segments
    visible = ids.unsqueeze(2) == ids.unsqueeze(1)  # [B, L, L], row i sees column j
    if causal:
        visible = visible.tril()
    sums = _VisibleSum.apply(visible, terms)

    start = wide_q.new_zeros(batch, 2, order + 1, width)
    last = None
    if carry is not None:
        start, last = carry.state.double(), carry.segment
    before = ids[:, :1] if segments is None or last is None else last.unsqueeze(1)
    # The carry reaches the first token's document, if that is the carry's document.
    continued = (ids == before) & (ids == ids[:, :1])
    sums = sums + start.unsqueeze(3).where(continued[:, None, None, :, None], 0)
    if sums.requires_grad:
        sums.register_hook(lambda grad: _saturated(grad, GRAD_LIMIT))

    coefficients = torch.stack([2.0**n / math.factorial(n) * wide_q**n for n in range(order + 1)], dim=1)
    num, den = (coefficients.unsqueeze(1) * sums).sum(dim=2).unbind(dim=1)
    y = _saturated(num / (den.clamp(min=DEN_FLOOR) + 0 * den), torch.finfo(q.dtype).max).to(q.dtype)

    state = start
    if length:
        in_last = (ids == ids[:, -1:])[:, None, None, :, None]
        whole = continued[:, -1][:, None, None, None]
        state = start.where(whole, 0) + terms.where(in_last, 0).sum(dim=3)
    if segments is not None:
        last = ids[:, -1] if length else last
    return y, Carry(state.to(state_dtype(q.dtype)), last)


def exact_elementwise_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, segments: Tensor | None = None
) -> Tensor:
    """Element-wise attention without the series: per channel ``y_i = sum_j softmax_j(-(q_i - k_j)^2) v_j``.

    Args:
        q, k, v: ``[B, L, D]``, any floating dtype.
        causal: whether token i sees only the tokens j <= i, or all.
        segments: ``[B, L]`` document ids; tokens see only their own document.

    Returns:
        ``[B, L, D]``. Takes ``[B, L, L, D]`` memory.

    Source: arXiv 2501.05730, the definition of element-wise attention.
    """
    scores = -(q.unsqueeze(2) - k.unsqueeze(1)).square()
    ids = q.new_zeros(q.shape[:2], dtype=torch.int64) if segments is None else segments
    visible = ids.unsqueeze(2) == ids.unsqueeze(1)
    if causal:
        visible = visible.tril()
    scores = scores.masked_fill(~visible.unsqueeze(3), -math.inf)
    return (scores.softmax(dim=2) * v.unsqueeze(1)).sum(dim=2)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exposed(x: Tensor) -> Tensor:
    """``x`` with NaN for infinities, which a clamp, an exponential or a quotient would turn into finite numbers."""
    return torch.add(x, x, alpha=0)  # 0 times an infinity is NaN


def finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, clamped to its finite range; NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _saturated(x: Tensor, limit: float) -> Tensor:
    """``x`` clamped to +-``limit``; NaN for what is not finite, and so for the gradient of what is not."""
    return x.clamp(-limit, limit) + 0 * x


class _VisibleSum(torch.autograd.Function):
    """``sum_j visible_ij terms_j`` and its adjoint, in which what is not finite stays in its document."""

    @staticmethod
    def forward(ctx: Any, visible: Tensor, terms: Tensor) -> Tensor:
        ctx.save_for_backward(visible)
        return _visible_sum(visible, terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (visible,) = ctx.saved_tensors
        return None, _visible_sum(visible.mT, grad)


def _visible_sum(visible: Tensor, terms: Tensor) -> Tensor:
    """``[B, 2, t+1, L, D]``, given ``visible [B, L, L]`` and ``terms [B, 2, t+1, L, D]``."""
    spoilt = ~terms.isfinite()
    sums = torch.einsum("bij,bsnjd->bsnid", visible.double(), terms.masked_fill(spoilt, 0))
    if spoilt.any():
        sums = sums.masked_fill(torch.einsum("bij,bsnjd->bsnid", visible.double(), spoilt.double()) > 0, math.nan)
    return sums


def _widened(x: Tensor, grad_limit: float = math.inf) -> Tensor:
    """A copy of ``x`` in fp64; its gradient is clamped to ``grad_limit`` and to what the dtype of ``x`` can hold."""
    wide = x.to(torch.float64, copy=True)
    if wide.requires_grad:
        limit = min(grad_limit, torch.finfo(x.dtype).max)
        wide.register_hook(lambda grad: _saturated(grad, limit))
    return wide
