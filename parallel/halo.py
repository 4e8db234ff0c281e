"""Halo exchange: the tokens beside this rank's shard, from the ranks that hold them; differentiable.

Point to point, from the next rank, or from several where shards are shorter than the halo. Work that needs no
neighbour overlaps with the exchange. Backward, the gradients of halo tokens travel back to the ranks that own them and
are added there.
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
from .traffic import ByteCounter, CollectiveCache, uncached, uncounted


@dataclass(frozen=True)
class Transfer:
    """Tokens ``[start, stop)`` of the sequence, sent from the rank that holds them to one whose halo they are in."""

    source: int
    destination: int
    start: int
    stop: int


def halo_transfers(lengths: Sequence[int], left: int, right: int) -> list[Transfer]:
    """The transfers by which every non-empty shard gets ``left`` tokens before and ``right`` tokens after it.

    Args:
        lengths: tokens of each rank's shard, in order.
        left, right: halo tokens on either side; they may span several shards.
    """
    stops = list(accumulate(lengths))
    transfers = []
    for destination, (length, stop) in enumerate(zip(lengths, stops, strict=True)):
        if length == 0:
            continue
        for low, high in ((stop - length - left, stop - length), (stop, stop + right)):
            for source, (size, end) in enumerate(zip(lengths, stops, strict=True)):
                start, finish = max(low, end - size), min(high, end)
                if source != destination and start < finish:
                    transfers.append(Transfer(source, destination, start, finish))
    return transfers


class P2PBatch:
    """Sends and receives between ranks of an axis, started together.

    Args:
        sends: (rank, tensor) for each send.
        receives: (rank, shape) for each receive.
        like: has the dtype and device of all of them.
        axis: the ranks.
        count: counts the bytes sent and the time.
    """

    def __init__(
        self,
        sends: list[tuple[int, Tensor]],
        receives: list[tuple[int, torch.Size]],
        like: Tensor,
        axis: Axis,
        count: ByteCounter,
    ) -> None:
        self._count = count
        self._sent = [as_bytes(tensor) for _, tensor in sends]  # referenced until the sends are done
        self._received = [like.new_zeros(shape) for _, shape in receives]  # a dry run receives nothing
        # Receives first: gloo tells the other rank so on the same connection, where the word would wait behind a send.
        operations = [
            dist.P2POp(dist.irecv, tensor.view(-1).view(torch.uint8), axis.ranks[rank], group=axis.group)
            for tensor, (rank, _) in zip(self._received, receives, strict=True)
        ]
        operations += [
            dist.P2POp(dist.isend, data, axis.ranks[rank], group=axis.group)
            for data, (rank, _) in zip(self._sent, sends, strict=True)
        ]
        self._requests: list[dist.Work] = []
        if operations:
            with count(sum(data.numel() for data in self._sent)):
                self._requests = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        """The received tensors, once they have arrived."""
        if self._requests:
            with self._count(0):
                for request in self._requests:
                    request.wait()
        self._requests, self._sent = [], []
        return self._received


class HaloExchange:
    """The exchange of one shard's halo, forward and backward.

    Args:
        axis: the ranks that share the sequence.
        lengths: tokens of each rank's shard; shards may be empty.
        left, right: halo tokens before and after the shard.
        count: counts the bytes.
    """

    def __init__(
        self, axis: Axis, lengths: Sequence[int], left: int, right: int, count: ByteCounter = uncounted
    ) -> None:
        self.axis, self.width, self.count = axis, left + right, count
        self._forward: P2PBatch | None = None
        self._backward: P2PBatch | None = None
        transfers = halo_transfers(lengths, left, right) if axis.size > 1 else []
        first, rank = sum(lengths[: axis.rank]), axis.rank
        stop = first + lengths[rank]
        # (rank, tokens of this shard) for each send, and (rank, tokens of the halo, its sides end to end) for each
        # receive.
        self._sends = [(t.destination, slice(t.start - first, t.stop - first)) for t in transfers if t.source == rank]
        shift = {True: left - first, False: left - stop}
        self._receives = [
            (t.source, slice(t.start + shift[t.start < first], t.stop + shift[t.start < first]))
            for t in transfers
            if t.destination == rank
        ]

    def start(self, x: Tensor, cached: CollectiveCache = uncached) -> None:
        """Start to exchange tokens of ``x [B, n, ...]``; ``cached`` keeps the exchange for recomputation."""

        def exchange() -> P2PBatch:
            shapes = [(rank, _shape(x, place.stop - place.start)) for rank, place in self._receives]
            return P2PBatch([(rank, x[:, place]) for rank, place in self._sends], shapes, x, self.axis, self.count)

        self._forward = cached(exchange)

    def finish(self, like: Tensor, fill: float) -> Tensor:
        """The halo ``[B, left + right, ...]``, both sides end to end; ``fill`` beyond the sequence's ends."""
        assert self._forward is not None
        halo = like.new_full(_shape(like, self.width), fill)
        for (_, place), tokens in zip(self._receives, self._forward.wait(), strict=True):
            halo[:, place] = tokens
        return halo

    def start_backward(self, grad: Tensor) -> None:
        """Start to send the gradients of the halo tokens ``[B, left + right, ...]`` to the ranks that own them."""
        shapes = [(rank, _shape(grad, place.stop - place.start)) for rank, place in self._sends]
        sends = [(rank, grad[:, place]) for rank, place in self._receives]
        self._backward = P2PBatch(sends, shapes, grad, self.axis, self.count)

    def finish_backward(self, grad: Tensor) -> None:
        """Add the received gradients to those of this shard's tokens, ``grad [B, n, ...]``, in place."""
        if self._backward is not None:
            for (_, place), tokens in zip(self._sends, self._backward.wait(), strict=True):
                grad[:, place] += tokens


def _shape(x: Tensor, length: int) -> torch.Size:
    return torch.Size((x.shape[0], length, *x.shape[2:]))


class _StartHalo(torch.autograd.Function):
    """Start an exchange. Returns x, its first and last ``edge`` tokens, and a handle that orders `_FinishHalo`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, exchange: HaloExchange, edge: int, cached: CollectiveCache
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exchange.start(x, cached)
        ctx.exchange, ctx.edge = exchange, edge
        return x.view_as(x), x[:, :edge].clone(), x[:, x.shape[1] - edge :].clone(), x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, first: Tensor, last: Tensor, _: Tensor) -> tuple[Any, ...]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        grad[:, : ctx.edge] += first
        grad[:, grad.shape[1] - ctx.edge :] += last
        ctx.exchange.finish_backward(grad)
        return grad, None, None, None


class _FinishHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, x: Tensor, exchange: HaloExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish(x, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.exchange.start_backward(grad.contiguous())
        return grad.new_zeros(()), None, None


class _OverwriteEdges(torch.autograd.Function):
    """Overwrite the first and the last tokens of ``y [B, n, ...]``, in place."""

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


LocalFunction = Callable[[Tensor, slice], Tensor]
"""A function of tokens ``[B, m, ...]`` and of their places in the shard with its halo. Each of its ``[B, m, ...]``
outputs depends on its own token and on as many tokens before and after it as the halo is wide; it sees zeros beyond
those that it gets.
"""


def halo(
    x: Tensor,
    axis: Axis,
    lengths: Sequence[int],
    left: int,
    right: int = 0,
    count: ByteCounter = uncounted,
    cached: CollectiveCache = uncached,
    past: Tensor | None = None,
    fn: LocalFunction | None = None,
) -> Tensor:
    """This rank's shard with its halo, or a function of both; differentiable.

    Args:
        x: ``[B, lengths[axis.rank], ...]``.
        axis: the ranks that share the sequence.
        lengths: tokens of each rank's shard; shards may be empty.
        left, right: halo tokens before and after the shard.
        count: counts the bytes.
        cached: keeps the exchange for recomputation.
        past: ``[B, left, ...]``, the tokens before the whole sequence; None for zeros. They are the same on every
            rank, and so is their gradient (a collective, run by all ranks).
        fn: a local function of shard and halo. It runs on the tokens that need no halo while the exchange goes on.

    Returns:
        ``[B, left + n + right, ...]``, zero beyond the sequence's ends (everywhere beside an empty shard); with ``fn``,
        its outputs for the shard's tokens, ``[B, n, ...]``.
    """
    length, width, one_rank = x.shape[1], left + right, axis.size == 1
    if fn is not None and (not width or (one_rank and past is None)):
        return fn(x, slice(left, left + length))
    inside = None
    if one_rank:
        sides = x.new_zeros(_shape(x, width))
    else:
        overlap = fn is not None and length > 2 * width
        exchange = HaloExchange(axis, lengths, left, right, count)
        x, opening, closing, handle = _StartHalo.apply(x, exchange, width if overlap else 0, cached)
        if fn is not None and overlap:
            inside = fn(x, slice(left, left + length))
        sides = _FinishHalo.apply(handle, x, exchange)
    before, after = sides.split([left, right], dim=1)
    if past is not None and left:
        before = with_past(before, past, axis, lengths, left, count)
    if fn is None:
        return torch.cat([before, x, after], dim=1)
    if inside is None:
        return fn(torch.cat([before, x, after], dim=1), slice(0, width + length))[:, left : left + length]
    # The outputs at either end that depend on the halo, from just the tokens that they depend on.
    first = last = inside.new_empty(_shape(inside, 0))  # not a slice, whose gradient would be zeros as large as it
    if left:
        first = fn(torch.cat([before, opening], dim=1), slice(0, left + width))[:, left : 2 * left]
    if right:
        last = fn(torch.cat([closing, after], dim=1), slice(left + length - width, length + width))[:, left:width]
    return _OverwriteEdges.apply(inside, first, last)


def with_halo(
    x: Tensor, axis: Axis, lengths: Sequence[int], left: int, right: int, fill: float, count: ByteCounter = uncounted
) -> Tensor:
    """``x [B, n, ...]`` with its halo, ``[B, left + n + right, ...]``, ``fill`` beyond the sequence's ends. Without
    autograd: for document ids.
    """
    exchange = HaloExchange(axis, lengths, left, right, count)
    exchange.start(x)
    before, after = exchange.finish(x, fill).split([left, right], dim=1)
    return torch.cat([before, x, after], dim=1)


def all_reduce_sum(x: Tensor, axis: Axis, count: ByteCounter = uncounted) -> Tensor:
    """The sum of all ranks' ``x``, in place."""
    if axis.size > 1:
        with count(x.numel() * x.element_size()):
            dist.all_reduce(x, group=axis.group)
    return x


class _WithPast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, extended: Tensor, past: Tensor, first: int, left: int, axis: Axis, count: ByteCounter
    ) -> Tensor:
        reach = max(0, left - first) if extended.shape[1] else 0
        ctx.where, ctx.axis, ctx.count = (reach, first, left), axis, count
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
        return own, all_reduce_sum(to_past, ctx.axis, ctx.count), None, None, None, None


def with_past(
    extended: Tensor, past: Tensor, axis: Axis, lengths: Sequence[int], left: int, count: ByteCounter = uncounted
) -> Tensor:
    """A shard's halo in which tokens from before the sequence, ``past [B, left, ...]``, replace the zeros.

    ``extended`` begins with the ``left`` halo tokens. ``past`` is the same on every rank, and so is its gradient (a
    collective, run by all ranks).
    """
    first = sum(lengths[: axis.rank]) if lengths[axis.rank] else left
    return _WithPast.apply(extended, past.to(extended.dtype), first, left, axis, count)


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, past: Tensor, axis: Axis, lengths: Sequence[int], reach: int, count: ByteCounter
    ) -> Tensor:
        length, first, own = sum(lengths), sum(lengths[: axis.rank]), lengths[axis.rank]
        start, stop = max(first, length - reach), first + own  # this rank's tokens in the tail
        out = x.new_zeros(x.shape[0], reach, *x.shape[2:])
        slots, tokens = slice(0, 0), slice(0, 0)
        if start < stop:
            slots = slice(start - length + reach, stop - length + reach)
            tokens = slice(start - first, own)
            out[:, slots] = x[:, tokens]
        out = all_reduce_sum(out, axis, count)
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
    x: Tensor, past: Tensor | None, axis: Axis, lengths: Sequence[int], reach: int, count: ByteCounter = uncounted
) -> Tensor:
    """The last ``reach`` tokens of (``past``, whole sequence), ``[B, reach, ...]``, on every rank; zeros where there
    are none.

    Its gradient is the full one on every rank; only the rank that owns a token adds it.
    """
    if past is None:
        past = x.new_zeros(x.shape[0], reach, *x.shape[2:])
    return _Tail.apply(x, past.to(x.dtype), axis, lengths, reach, count)
