"""All tokens of some channels <-> some tokens of all channels: all-to-alls, their own adjoints the other way.

They go in slices of the channels, so that a function works on one while others travel. "Channel" is any unit along
dimension 2: a channel of ``[B, L, D]``, a head of ``[B, L, H, K]``. Units are dealt out as evenly as they go, so
neither they nor the tokens have to divide by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mesh import Axis
from .relay import gather
from .traffic import Note, unnoted

SLICES = 4  # of a rank's channels, at most
SLICED_FROM = 1 << 19  # bytes of a slice of a piece: smaller ones cost more in messages than they hide


def channel_shard_sizes(units: int, size: int) -> list[int]:
    """How many of ``units`` channels each of ``size`` ranks holds; they differ by at most one."""
    return [units // size + (rank < units % size) for rank in range(size)]


class AllToAll:
    """One all-to-all under way: ``parts[q]`` to rank q, a tensor of ``shapes[p]`` from rank p."""

    def __init__(self, parts: list[Tensor], shapes: list[tuple[int, ...]], axis: Axis, note: Note) -> None:
        self._note = note
        self._sent = torch.cat([part.reshape(-1) for part in parts])
        width, self._shapes = self._sent.element_size(), shapes
        self._sizes = [torch.Size(shape).numel() for shape in shapes]
        self._received = self._sent.new_empty(sum(self._sizes))
        splits = [part.numel() * width for part in parts]
        arriving = [size * width for size in self._sizes]
        into, out = self._received.view(torch.uint8), self._sent.view(torch.uint8)
        with note(sum(splits) - splits[axis.rank]):
            self._request = dist.all_to_all_single(into, out, arriving, splits, group=axis.group, async_op=True)

    def arrived(self) -> list[Tensor]:
        """What was received, once it is there."""
        with self._note(0):
            self._request.wait()
        return [flat.view(shape) for flat, shape in zip(self._received.split(self._sizes), self._shapes, strict=True)]


class Resharding:
    """Some tokens of all channels against all tokens of some channels, slice by slice of these.

    On the tokens' side, `scatter` sends all slices and `assemble` receives them; on the channels' side, `shard` receives
    one and `give` sends one. Either side's pair are each other's adjoints.

    Args:
        axis: the ranks that share the sequence.
        lengths: tokens that each of them holds.
        units: channels in all.
        num_slices: of each rank's channels.
        note: counts the bytes.
    """

    def __init__(self, axis: Axis, lengths: Sequence[int], units: int, num_slices: int, note: Note) -> None:
        self.axis, self.lengths, self.note = axis, list(lengths), note
        # By rank, the widths of its slices.
        self.widths = [channel_shard_sizes(share, num_slices) for share in channel_shard_sizes(units, axis.size)]
        self._under_way: list[AllToAll | None] = [None] * num_slices

    def scatter(self, x: Tensor) -> None:
        """Send ``x [B, n, D, ...]``."""
        columns = x.split([width for widths in self.widths for width in widths], dim=2)
        num_slices = len(self._under_way)
        for number in range(num_slices):
            own = self.widths[self.axis.rank][number]
            shapes = [(x.shape[0], length, own, *x.shape[3:]) for length in self.lengths]
            self._start(number, list(columns[number::num_slices]), shapes)

    def take(self, number: int) -> Tensor:
        """Slice ``number`` of this rank's channels, ``[B, L, D_s, ...]``."""
        return torch.cat(self._finish(number), dim=1)

    def give(self, number: int, y: Tensor) -> None:
        """Send slice ``number``, ``y [B, L, D_s, ...]``, to the ranks that hold its tokens."""
        own = self.lengths[self.axis.rank]
        shapes = [(y.shape[0], own, widths[number], *y.shape[3:]) for widths in self.widths]
        self._start(number, list(y.split(self.lengths, dim=1)), shapes)

    def assemble(self) -> Tensor:
        """All channels of this rank's tokens, ``[B, n, D, ...]``."""
        slices = [self._finish(number) for number in range(len(self._under_way))]
        return torch.cat([part for parts in zip(*slices, strict=True) for part in parts], dim=2)

    def _start(self, number: int, parts: list[Tensor], shapes: list[tuple[int, ...]]) -> None:
        self._under_way[number] = AllToAll(parts, shapes, self.axis, self.note)

    def _finish(self, number: int) -> list[Tensor]:
        under_way, self._under_way[number] = self._under_way[number], None
        assert under_way is not None
        return under_way.arrived()


class _Scatter(torch.autograd.Function):
    """`Resharding.scatter`; gives a ticket for each slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Resharding, num_slices: int) -> tuple[Tensor, ...]:
        ctx.how = how
        how.scatter(x)
        return tuple(x.new_zeros(()) for _ in range(num_slices))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return ctx.how.assemble(), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, how: Resharding, number: int) -> Tensor:
        ctx.how, ctx.number = how, number
        return how.take(number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.how.give(ctx.number, grad)
        return grad.new_zeros(()), None, None


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, how: Resharding, number: int) -> Tensor:
        ctx.how, ctx.number = how, number
        how.give(number, y)
        return y.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return ctx.how.take(ctx.number), None, None


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Resharding, *tickets: Tensor) -> Tensor:
        ctx.how = how
        return how.assemble()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.how.scatter(grad)
        return None, *(grad.new_zeros(()) for _ in ctx.needs_input_grad[1:])


def by_channel(
    fn: Callable[[Tensor, slice], Tensor], x: Tensor, axis: Axis, lengths: Sequence[int], note: Note = unnoted
) -> Tensor:
    """``fn`` of all tokens, each rank for its channels; differentiable.

    Args:
        fn: gets all tokens of some channels ``[B, L, D_s, ...]``, and which channels these are (``D_s`` may be 0: more
            ranks than channels); returns ``[B, L, D_s, ...]``. It is called for one slice after the other while the
            others travel.
        x: ``[B, lengths[axis.rank], D, ...]``.
        axis: the ranks that share the sequence.
        lengths: tokens that each of them holds.
        note: counts the bytes.

    Returns:
        ``[B, n, D, ...]``.
    """
    units = x.shape[2]
    if axis.size == 1:
        return fn(x, slice(0, units))
    num_bytes = x[:, :1].numel() * x.element_size() * max(lengths)
    num_slices = max(1, min(SLICES, units // axis.size, num_bytes // SLICED_FROM))
    forth, back = (Resharding(axis, lengths, units, num_slices, note) for _ in range(2))
    tickets = _Scatter.apply(x, forth, num_slices)
    first, returned = sum(channel_shard_sizes(units, axis.size)[: axis.rank]), []
    for number, width in enumerate(forth.widths[axis.rank]):
        y = fn(_Take.apply(tickets[number], forth, number), slice(first, first + width))
        returned.append(_Give.apply(y, back, number))
        first += width
    return _Assemble.apply(back, *returned)


def _all_channels(x: Tensor, axis: Axis, units: int, note: Note) -> Tensor:
    shares = channel_shard_sizes(units, axis.size)
    padded = x.new_zeros(*x.shape[:2], max(shares), *x.shape[3:])
    padded[:, :, : shares[axis.rank]] = x
    rows = gather([padded], axis, note)
    return torch.cat([row[:, :, :share] for (row,), share in zip(rows, shares, strict=True)], dim=2)


def _own_channels(x: Tensor, axis: Axis) -> Tensor:
    return x.split(channel_shard_sizes(x.shape[2], axis.size), dim=2)[axis.rank].contiguous()


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: bool, axis: Axis, units: int, note: Note) -> Tensor:
        ctx.how = (own, axis, units, note)
        return _own_channels(x, axis) if own else _all_channels(x, axis, units, note)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        own, axis, units, note = ctx.how
        grad = _all_channels(grad, axis, units, note) if own else _own_channels(grad, axis)
        return grad, None, None, None, None


def own_channels(x: Tensor, axis: Axis, note: Note = unnoted) -> Tensor:
    """This rank's share of the channels of ``x [B, T, D, ...]``, the same on every rank; so is its gradient."""
    return x if axis.size == 1 else _Replicate.apply(x, True, axis, x.shape[2], note)


def all_channels(x: Tensor, axis: Axis, units: int, note: Note = unnoted) -> Tensor:
    """Every rank's channels ``[B, T, units, ...]`` on every rank. Its gradient is the full one on every rank."""
    return x if axis.size == 1 else _Replicate.apply(x, False, axis, units, note)
