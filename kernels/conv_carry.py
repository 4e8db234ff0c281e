"""The carry of a convolution: the last tokens before a shard, and their document ids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .state import NO_TOKENS, Carry


class Past(NamedTuple):
    """The tokens before a shard that a convolution's taps can reach.

    Attributes:
        tokens: ``[B, T, ...]``, T = 0 without a carry.
        ids: ``[B, T]`` int64, their document ids (-1: no token), or None where the shard has no documents.
    """

    tokens: Tensor
    ids: Tensor | None


def reach(num_taps: int, causal: bool = True) -> tuple[int, int]:
    """The number of tokens before and after the current one under the ``num_taps`` taps of a short convolution."""
    left = num_taps - 1 if causal else num_taps // 2
    return left, num_taps - 1 - left


def check_tokens(operator: str, x: Tensor, carry: Carry | None, segments: Tensor | None) -> None:
    """Raise `InputError` unless ``x [B, L, D]``, its ids and the carry fit together."""
    if x.dim() != 3 or not x.is_floating_point():
        raise InputError(f"{operator}: x", f"{x.dtype} {list(x.shape)}", "a floating tensor [B, L, D]")
    batch, length, width = x.shape
    if segments is not None and (segments.shape != (batch, length) or segments.dtype != torch.int64):
        given = f"{segments.dtype} {list(segments.shape)}"
        raise InputError(f"{operator}: segments", given, f"int64 document ids {[batch, length]}")
    if carry is None:
        return
    state, ids = carry
    if state.dim() != 3 or state.shape[0] != batch or state.shape[2] != width:
        raise InputError(f"{operator}: carry.state", list(state.shape), f"tokens [{batch}, tokens, {width}]")
    if ids is not None and ids.shape != state.shape[:2]:
        raise InputError(f"{operator}: carry.segment", list(ids.shape), f"ids {list(state.shape[:2])}")
    if ids is not None and segments is None:
        fix = "pass the ids of x"
        raise InputError(f"{operator}: segments", None, "given where the carry has document ids", fix)


def read_carry(x: Tensor, carry: Carry | None, segments: Tensor | None, reach: int) -> Past:
    """The last ``reach`` tokens of the carry (all, where it has fewer), and their ids.

    A carry without ids belongs to the shard's first document, as in `kernels.scan.scan`.
    """
    if carry is None:
        no_tokens = x.new_empty(x.shape[0], 0, *x.shape[2:])  # not a slice, whose gradient would be zeros as large as x
        return Past(no_tokens, None if segments is None else segments[:, :0])
    state, ids = carry
    if segments is not None and ids is None and x.shape[1]:
        ids = segments[:, :1].expand(state.shape[:2])
    first = max(0, state.shape[1] - reach)
    return Past(state[:, first:], None if ids is None else ids[:, first:])


def write_carry(x: Tensor, segments: Tensor | None, past: Past, reach: int) -> Carry:
    """The last ``reach`` tokens of past and shard, in x's dtype, and their ids; zeros and -1 where there are none."""
    ids = None
    if segments is not None and (past.ids is not None or x.shape[1]):
        past_ids = segments[:, :0] if past.ids is None else past.ids
        ids = _last(segments, past_ids, reach, NO_TOKENS)
    return Carry(_last(x, past.tokens.to(x.dtype), reach, 0), ids)


def _last(x: Tensor, past: Tensor, reach: int, fill: int) -> Tensor:
    new = x[:, max(0, x.shape[1] - reach) :]
    old = past[:, max(0, past.shape[1] + new.shape[1] - reach) :]
    none = x.new_full((x.shape[0], reach - new.shape[1] - old.shape[1], *x.shape[2:]), fill)
    return torch.cat([none, old, new], dim=1)  # a copy: a view would keep the shard in memory


def window(x: Tensor, past: Tensor, start: int, stop: int, dtype: torch.dtype, fill: int = 0) -> Tensor:
    """Tokens ``[start, stop)`` of a shard ``x [B, L, ...]``, ``[B, stop - start, ...]`` in ``dtype``.

    Negative positions are in ``past [B, T, ...]`` (-1 is its last token); ``fill`` where there is no token.
    """
    length, num_past = x.shape[1], past.shape[1]
    if start >= 0 and stop <= length:
        return x[:, start:stop].to(dtype)
    out = torch.full((x.shape[0], stop - start, *x.shape[2:]), fill, dtype=dtype, device=x.device)
    low, high = max(start, -num_past), min(stop, 0)
    if low < high:
        out[:, low - start : high - start] = past[:, low + num_past : high + num_past]
    low, high = max(start, 0), min(stop, length)
    if low < high:
        out[:, low - start : high - start] = x[:, low:high]
    return out
