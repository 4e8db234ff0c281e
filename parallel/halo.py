"""Neighbouring tokens: what lies just beside this rank's piece, wherever it is.

Point to point, from the ranks that hold them: the next one, or several when pieces are shorter than the reach. They
travel while work that needs no neighbour goes on. The gradients of borrowed tokens travel back to their owners in the
same way, and add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Trip:
    """Tensors on their way between ranks of an axis, all at once.

    Args:
        sends: (rank, tensor) for each to send.
        receives: (rank, shape) for each to receive.
        like: of the dtype and device of them all.
        axis: the ranks.
        note: counts the bytes sent and the time.
    """

    def __init__(
        self,
        sends: list[tuple[int, Tensor]],
        receives: list[tuple[int, torch.Size]],
        like: Tensor,
        axis: Axis,
        note: Note,
    ) -> None:
        self._note = note
        self._sent = [as_bytes(tensor) for _, tensor in sends]  # kept until they are there
        self._received = [like.new_zeros(shape) for _, shape in receives]  # in a plan nobody sends
        operations = [
            dist.P2POp(dist.isend, data, axis.ranks[rank], group=axis.group)
            for data, (rank, _) in zip(self._sent, sends, strict=True)
        ]
        operations += [
            dist.P2POp(dist.irecv, tensor.view(-1).view(torch.uint8), axis.ranks[rank], group=axis.group)
            for tensor, (rank, _) in zip(self._received, receives, strict=True)
        ]
        self._requests: list[dist.Work] = []
        if operations:
            with note(sum(data.numel() for data in self._sent)):
                self._requests = dist.batch_isend_irecv(operations)

    def arrived(self) -> list[Tensor]:
        """What was received, once it is there."""
        if self._requests:
            with self._note(0):
                for request in self._requests:
                    request.wait()
        self._requests, self._sent = [], []
        return self._received


@dataclass
class _Loan:
    """One piece's neighbours: who lends what, and the exchanges that are under way.

    Attributes:
        lengths: tokens that each rank of ``axis`` holds; pieces may be empty.
        left, right: tokens wanted before and after the piece.
        note: counts the bytes.
        once: makes the exchange of tokens, or remembers it.
        forth, back: the tokens, and later their gradients.
    """

    axis: Axis
    lengths: Sequence[int]
    left: int
    right: int
    note: Note = unnoted
    once: Once = every_time
    forth: Trip | None = None
    back: Trip | None = None

    def __post_init__(self) -> None:
        moves = plan(self.lengths, self.left, self.right) if self.axis.size > 1 else []
        first, rank = sum(self.lengths[: self.axis.rank]), self.axis.rank
        stop = first + self.lengths[rank]
        # Of this piece, what each borrower gets; of its two sides, one after the other, what each owner lends.
        self._lent = [(m.borrower, slice(m.start - first, m.stop - first)) for m in moves if m.owner == rank]
        shift = {True: self.left - first, False: self.left - stop}
        self._borrowed = [
            (m.owner, slice(m.start + shift[m.start < first], m.stop + shift[m.start < first]))
            for m in moves
            if m.borrower == rank
        ]

    def depart(self, x: Tensor) -> None:
        """Send what others borrow of ``x [B, n, ...]``."""

        def exchange() -> Trip:
            shapes = [(rank, _shape(x, place.stop - place.start)) for rank, place in self._borrowed]
            return Trip([(rank, x[:, place]) for rank, place in self._lent], shapes, x, self.axis, self.note)

        self.forth = self.once(exchange)

    def sides(self, like: Tensor, fill: float) -> Tensor:
        """The borrowed tokens ``[B, left + right, ...]``, ``fill`` beyond the sequence's ends."""
        assert self.forth is not None
        sides = like.new_full(_shape(like, self.left + self.right), fill)
        for (_, place), tokens in zip(self._borrowed, self.forth.arrived(), strict=True):
            sides[:, place] = tokens
        return sides

    def give_back(self, grad: Tensor) -> None:
        """Send the gradients of the borrowed tokens ``[B, left + right, ...]`` to their owners."""
        shapes = [(rank, _shape(grad, place.stop - place.start)) for rank, place in self._lent]
        self.back = Trip([(rank, grad[:, place]) for rank, place in self._borrowed], shapes, grad, self.axis, self.note)

    def take_back(self, grad: Tensor) -> None:
        """Add the gradients of the lent tokens to ``grad [B, n, ...]``."""
        if self.back is not None:
            for (_, place), tokens in zip(self._lent, self.back.arrived(), strict=True):
                grad[:, place] += tokens


def _shape(x: Tensor, length: int) -> torch.Size:
    return torch.Size((x.shape[0], length, *x.shape[2:]))


class _Depart(torch.autograd.Function):
    """Begin a loan: x again, its first and last ``ends`` tokens, and a ticket for `_Arrive`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loan: _Loan, ends: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loan.depart(x)
        ctx.loan, ctx.ends = loan, ends
        return x.view_as(x), x[:, :ends].clone(), x[:, x.shape[1] - ends :].clone(), x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, first: Tensor, last: Tensor, _: Tensor) -> tuple[Any, ...]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        grad[:, : ctx.ends] += first
        grad[:, grad.shape[1] - ctx.ends :] += last
        ctx.loan.take_back(grad)
        return grad, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, x: Tensor, loan: _Loan) -> Tensor:
        ctx.loan = loan
        return loan.sides(x, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.loan.give_back(grad.contiguous())
        return grad.new_zeros(()), None, None


class _Mend(torch.autograd.Function):
    """Overwrite the first and the last tokens of ``y [B, n, ...]``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, first: Tensor, last: Tensor) -> Tensor:
        ctx.where = slice(0, first.shape[1]), slice(y.shape[1] - last.shape[1], y.shape[1])
        ctx.mark_dirty(y)
        for place, tokens in zip(ctx.where, (first, last), strict=True):
            y[:, place] = tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        inner = grad.clone()
        for place in ctx.where:
            inner[:, place] = 0
        return inner, *(grad[:, place] for place in ctx.where)


Within = Callable[[Tensor, slice], Tensor]
"""A function of tokens ``[B, m, ...]`` and of their places in the piece with its neighbours. It gives ``[B, m, ...]``,
each of a token and of so many before and after it, with zeros beyond those it gets.
"""


def halo(
    x: Tensor,
    axis: Axis,
    lengths: Sequence[int],
    left: int,
    right: int = 0,
    note: Note = unnoted,
    once: Once = every_time,
    past: Tensor | None = None,
    within: Within | None = None,
) -> Tensor:
    """This rank's piece with the tokens beside it, or a function of them; differentiable.

    Args:
        x: ``[B, lengths[axis.rank], ...]``.
        axis: the ranks that share the sequence.
        lengths: tokens that each of them holds; pieces may be empty.
        left, right: tokens wanted before and after the piece.
        note: counts the bytes.
        once: remembers the exchange of tokens.
        past: ``[B, left, ...]``, the tokens before the whole sequence; None for zeros. They are the same on every
            rank, and so is their gradient (a collective, run by all ranks).
        within: what is wanted of piece and neighbours.

    Returns:
        ``[B, left + n + right, ...]``, zero beyond the sequence's ends (everywhere beside an empty piece); with
        ``within``, its ``[B, n, ...]``, which begins with the tokens that need no neighbour while those travel.
    """
    length, ends, alone = x.shape[1], left + right, axis.size == 1
    if within is not None and (not ends or (alone and past is None)):
        return within(x, slice(left, left + length))
    inside = None
    if alone:
        sides = x.new_zeros(_shape(x, ends))
    else:
        inside_first = within is not None and length > 2 * ends
        loan = _Loan(axis, lengths, left, right, note, once)
        x, opening, closing, ticket = _Depart.apply(x, loan, ends if inside_first else 0)
        if within is not None and inside_first:
            inside = within(x, slice(left, left + length))
        sides = _Arrive.apply(ticket, x, loan)
    before, after = sides.split([left, right], dim=1)
    if past is not None and left:
        before = with_past(before, past, axis, lengths, left, note)
    if within is None:
        return torch.cat([before, x, after], dim=1)
    if inside is None:
        return within(torch.cat([before, x, after], dim=1), slice(0, ends + length))[:, left : left + length]
    # At each end, the outputs that need a neighbour, from as many tokens as they see.
    first = last = inside[:, :0]
    if left:
        first = within(torch.cat([before, opening], dim=1), slice(0, left + ends))[:, left : 2 * left]
    if right:
        last = within(torch.cat([closing, after], dim=1), slice(left + length - ends, length + ends))[:, left:ends]
    return _Mend.apply(inside, first, last)


def borrow(
    x: Tensor, axis: Axis, lengths: Sequence[int], left: int, right: int, fill: float, note: Note = unnoted
) -> Tensor:
    """``x [B, n, ...]`` with its neighbours, ``[B, left + n + right, ...]``; ``fill`` beyond the sequence's ends. No
    autograd.
    """
    loan = _Loan(axis, lengths, left, right, note)
    loan.depart(x)
    before, after = loan.sides(x, fill).split([left, right], dim=1)
    return torch.cat([before, x, after], dim=1)


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
