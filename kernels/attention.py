"""Softmax attention of the last L of T tokens, by PyTorch's own kernels: causal, within documents, within a window.

Masks are made for some queries at a time, so that memory stays linear in the length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MASK_ELEMENTS = 1 << 24  # of a mask of queries by keys that is held at a time
WINDOW_ROWS = 256  # queries that attend to a window at a time, at least


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, segments: Tensor | None = None
) -> Tensor:
    """Softmax attention: ``y_i = sum_j softmax_j(scale * q_i . k_j) v_j`` over the tokens j of i's document.

    Args:
        q: ``[B, L, G, h, K]``: h heads of queries for each head of k and v.
        k, v: ``[B, T, G, K]`` and ``[B, T, G, V]``, T >= L; the queries are those of the last L tokens.
        causal: whether a token sees itself and earlier tokens only.
        scale: None for ``K ** -0.5``.
        segments: ``[B, T]`` int64 document ids, or None for one document.

    Returns:
        ``[B, L, G, h, V]``.
    """
    length, seen = q.shape[1], k.shape[1]
    if not q.numel():  # no tokens, or more ranks than heads
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + (q.sum() + k.sum() + v.sum())
    if segments is None and (not causal or length == seen or length == 1):
        return _heads(q, k, v, None, causal and length == seen and length > 1, scale)
    size = max(1, MASK_ELEMENTS // (len(q) * seen))
    if size >= length:
        return _masked(q, k, v, segments, causal, scale, 0, length)
    parts = [
        checkpoint(
            _masked, q, k, v, segments, causal, scale, start, min(start + size, length),
            use_reentrant=False, preserve_rng_state=False,
        )
        for start in range(0, length, size)
    ]  # fmt: skip
    return torch.cat(parts, dim=1)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float | None = None,
    missing: int = 0,
    segments: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention to the last ``window`` tokens, itself included.

    Args:
        q: ``[B, L, G, h, K]``.
        k, v: ``[B, window - 1 + L, G, K]`` and ``[..., V]``: of these tokens and those just before.
        missing: how many of the first tokens of k and v are none, as the sequence begins after them.
        segments: ``[B, window - 1 + L]`` int64 document ids, -1 where there is no token; None for one document.

    Returns:
        ``[B, L, G, h, V]``.
    """
    length, left = q.shape[1], window - 1
    if not q.numel():
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + (q.sum() + k.sum() + v.sum())
    step, parts = max(WINDOW_ROWS, window), []
    for start in range(0, length, step):
        stop = min(start + step, length)
        place = torch.arange(start, stop + left, device=q.device)  # of the keys; query i is at i + left
        query = place[left:, None]
        mask = (place <= query) & (place > query - window) & (place >= missing)
        if segments is not None:
            ids = segments[:, start : stop + left]
            mask = mask & (ids[:, left:, None] == ids[:, None, :])
            mask = mask.unsqueeze(1)
        keys = slice(start, stop + left)
        parts.append(_heads(q[:, start:stop], k[:, keys], v[:, keys], mask, False, scale))
    return torch.cat(parts, dim=1)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, causal: bool, scale: float | None, start: int, stop: int
) -> Tensor:
    """The outputs of the queries ``start`` to ``stop``."""
    before = k.shape[1] - q.shape[1]
    seen = before + stop if causal else k.shape[1]
    place = torch.arange(seen, device=k.device)
    queries = slice(before + start, before + stop)
    mask = place[queries].unsqueeze(-1) >= place if causal else place.new_ones(1, seen, dtype=torch.bool)
    if ids is not None:
        mask = (mask & (ids[:, queries].unsqueeze(-1) == ids[:, :seen].unsqueeze(-2))).unsqueeze(1)
    return _heads(q[:, start:stop], k[:, :seen], v[:, :seen], mask, False, scale)


def _heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    groups, heads = q.shape[2:4]
    query, key, value = q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scale, values = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    most = max(q.shape[-1], values)  # the kernel without an L x L matrix wants one width
    query, key, value = (x if x.shape[-1] == most else F.pad(x, (0, most - x.shape[-1])) for x in (query, key, value))
    y = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads > 1
    )
    return y[..., :values].transpose(1, 2).unflatten(2, (groups, heads))
