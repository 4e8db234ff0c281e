"""Neighbouring tokens: this rank's piece with the tokens just beside it, wherever they are.

Point to point, from the ranks that hold them: the next one, or several when pieces are shorter than the reach. The
gradients of borrowed tokens travel back to their owners and add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mesh import Axis, as_bytes
from .traffic import Note, Once, every_time, unnoted


@dataclass(frozen=True)
class Move:
    """Tokens ``[start, stop)`` of the sequence, owned by one rank and borrowed by another."""

    owner: int
    borrower: int
    start: int
    stop: int


def plan(lengths: Sequence[int], left: int, right: int) -> list[Move]:
    """Who lends what to whom, so that every non-empty piece sees ``left`` tokens before and ``right`` after it."""
    stops = list(accumulate(lengths))
    moves = []
    for borrower, (length, stop) in enumerate(zip(lengths, stops, strict=True)):
        if length == 0:
            continue
        for low, high in ((stop - length - left, stop - length), (stop, stop + right)):
            for owner, (size, end) in enumerate(zip(lengths, stops, strict=True)):
                start, finish = max(low, end - size), min(high, end)
                if owner != borrower and start < finish:
                    moves.append(Move(owner, borrower, start, finish))
    return moves


def borrow(
    x: Tensor,
    axis: Axis,
    lengths: Sequence[int],
    left: int,
    right: int,
    fill: float,
    note: Note = unnoted,
    once: Once = every_time,
) -> Tensor:
    """``x [B, n, ...]`` with its neighbours, ``[B, left + n + right, ...]``; ``fill`` beyond the sequence's ends.
    No autograd.
    """
    first = sum(lengths[: axis.rank])
    pad = x.new_full((x.shape[0], left, *x.shape[2:]), fill)
    tail = x.new_full((x.shape[0], right, *x.shape[2:]), fill)
    extended = torch.cat([pad, x, tail], dim=1)
    if axis.size == 1:
        return extended
    moves = plan(lengths, left, right)
    sends = [(m.borrower, x[:, m.start - first : m.stop - first]) for m in moves if m.owner == axis.rank]
    targets = [
        (m.owner, extended[:, m.start - first + left : m.stop - first + left]) for m in moves if m.borrower == axis.rank
    ]
    arrived = once(lambda: _exchange(sends, [(rank, t.shape) for rank, t in targets], x, axis, note))
    for (_, target), received in zip(targets, arrived, strict=True):
        target.copy_(received)
    return extended


def give_back(grad: Tensor, axis: Axis, lengths: Sequence[int], left: int, right: int, note: Note = unnoted) -> Tensor:
    """Adjoint of `borrow`: the gradient of ``x [B, n, ...]`` from that of the extended piece."""
    first, length = sum(lengths[: axis.rank]), lengths[axis.rank]
    own = grad[:, left : left + length].clone()
    if axis.size == 1:
        return own
    moves = plan(lengths, left, right)
    sends = [
        (m.owner, grad[:, m.start - first + left : m.stop - first + left]) for m in moves if m.borrower == axis.rank
    ]
    targets = [(m.borrower, own[:, m.start - first : m.stop - first]) for m in moves if m.owner == axis.rank]
    for (_, target), received in zip(
        targets, _exchange(sends, [(rank, t.shape) for rank, t in targets], grad, axis, note), strict=True
    ):
        target += received
    return own


def _exchange(
    sends: list[tuple[int, Tensor]],
    receives: list[tuple[int, torch.Size]],
    like: Tensor,
    axis: Axis,
    note: Note,
) -> list[Tensor]:
    """Send tensors to ranks of the axis and receive tensors of known shapes from others, all at once."""
    outgoing = [as_bytes(tensor) for _, tensor in sends]
    arrived = [like.new_zeros(shape) for _, shape in receives]  # in a plan nobody sends
    operations = [
        dist.P2POp(dist.isend, data, axis.ranks[rank], group=axis.group)
        for data, (rank, _) in zip(outgoing, sends, strict=True)
    ]
    operations += [
        dist.P2POp(dist.irecv, tensor.view(-1).view(torch.uint8), axis.ranks[rank], group=axis.group)
        for tensor, (rank, _) in zip(arrived, receives, strict=True)
    ]
    with note(sum(data.numel() for data in outgoing)):
        requests = dist.batch_isend_irecv(operations) if operations else []
    for request in requests:
        request.wait()
    return arrived


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: Axis, lengths: Sequence[int], left: int, right: int, note: Note, once: Once
    ) -> Tensor:
        ctx.plan = (axis, lengths, left, right, note)
        return borrow(x, axis, lengths, left, right, 0.0, note, once)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return give_back(grad.contiguous(), *ctx.plan), None, None, None, None, None, None


def halo(
    x: Tensor,
    axis: Axis,
    lengths: Sequence[int],
    left: int,
    right: int = 0,
    note: Note = unnoted,
    once: Once = every_time,
) -> Tensor:
    """This rank's piece with the tokens beside it; differentiable.

    Args:
        x: ``[B, lengths[axis.rank], ...]``.
        axis: the ranks that share the sequence.
        lengths: tokens that each of them holds; pieces may be empty.
        left, right: tokens wanted before and after the piece.

    Returns:
        ``[B, left + n + right, ...]``, zero beyond the sequence's ends (everywhere beside an empty piece).
    """
    return _Halo.apply(x, axis, lengths, left, right, note, once)


def total(x: Tensor, axis: Axis, note: Note = unnoted) -> Tensor:
    """The sum of all ranks' ``x``, which it may overwrite."""
    if axis.size > 1:
        with note(x.numel() * x.element_size()):
            dist.all_reduce(x, group=axis.group)
    return x


class _WithPast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, extended: Tensor, past: Tensor, first: int, left: int, axis: Axis, note: Note) -> Tensor:
        reach = max(0, left - first) if extended.shape[1] else 0
        ctx.where, ctx.axis, ctx.note = (reach, first, left), axis, note
        out = extended.clone()
        out[:, :reach] = past[:, first : first + reach]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        reach, first, left = ctx.where
        to_past = grad.new_zeros(grad.shape[0], left, *grad.shape[2:])
        to_past[:, first : first + reach] = grad[:, :reach]
        own = grad.clone()
        own[:, :reach] = 0
        return own, total(to_past, ctx.axis, ctx.note), None, None, None, None


def with_past(
    extended: Tensor, past: Tensor, axis: Axis, lengths: Sequence[int], left: int, note: Note = unnoted
) -> Tensor:
    """``extended`` of `halo` with tokens from before the sequence, ``past [B, left, ...]``, put where they belong.

    ``past`` is the same on every rank, and so is its gradient (a collective, run by all ranks).
    """
    first = sum(lengths[: axis.rank]) if lengths[axis.rank] else left
    return _WithPast.apply(extended, past.to(extended.dtype), first, left, axis, note)


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, past: Tensor, axis: Axis, lengths: Sequence[int], reach: int, note: Note
    ) -> Tensor:
        length, first, own = sum(lengths), sum(lengths[: axis.rank]), lengths[axis.rank]
        start, stop = max(first, length - reach), first + own  # this rank's tokens in the tail
        out = x.new_zeros(x.shape[0], reach, *x.shape[2:])
        slots, tokens = slice(0, 0), slice(0, 0)
        if start < stop:
            slots = slice(start - length + reach, stop - length + reach)
            tokens = slice(start - first, own)
            out[:, slots] = x[:, tokens]
        out = total(out, axis, note)
        kept = max(0, reach - length)
        if kept:
            out[:, :kept] = past[:, past.shape[1] - kept :]
        ctx.where = (slots, tokens, kept, x.shape, past.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        slots, tokens, kept, x_shape, past_shape = ctx.where
        to_x, to_past = grad.new_zeros(x_shape), grad.new_zeros(past_shape)
        to_x[:, tokens] = grad[:, slots]
        if kept:
            to_past[:, past_shape[1] - kept :] = grad[:, :kept]
        return to_x, to_past, None, None, None, None


def tail(
    x: Tensor, past: Tensor | None, axis: Axis, lengths: Sequence[int], reach: int, note: Note = unnoted
) -> Tensor:
    """The last ``reach`` tokens of (``past``, whole sequence), ``[B, reach, ...]``, on every rank; zeros where
    there are none.

    Its gradient is the full one on every rank, so only the owner of a token adds it.
    """
    if past is None:
        past = x.new_zeros(x.shape[0], reach, *x.shape[2:])
    return _Tail.apply(x, past.to(x.dtype), axis, lengths, reach, note)
