"""All-to-all between two shardings: some tokens of all channels, and all tokens of some channels; differentiable.

The adjoint of each all-to-all is the reverse one. Channels are exchanged in slices, so that a function runs on one
slice while others travel. A "channel" is a unit along dimension 2: a channel of ``[B, L, D]``, or a head of
``[B, L, H, K]``. Ranks get numbers of channels that differ by at most one: neither channels nor tokens must divide by
the ranks.
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
from .traffic import ByteCounter, uncounted

MAX_SLICES = 4  # of a rank's channels
MIN_SLICE_BYTES = 1 << 19  # of a shard: smaller slices cost more in messages than their overlap saves


def channel_shard_sizes(units: int, size: int) -> list[int]:
    """How many of ``units`` channels each of ``size`` ranks holds; they differ by at most one."""
    return [units // size + (rank < units % size) for rank in range(size)]


class AllToAll:
    """An asynchronous all-to-all: ``parts[q]`` is sent to rank q, a tensor of ``shapes[p]`` received from rank p."""

    def __init__(self, parts: list[Tensor], shapes: list[tuple[int, ...]], axis: Axis, count: ByteCounter) -> None:
        self._count = count
        self._sent = torch.cat([part.reshape(-1) for part in parts])
        width, self._shapes = self._sent.element_size(), shapes
        self._sizes = [torch.Size(shape).numel() for shape in shapes]
        self._received = self._sent.new_empty(sum(self._sizes))
        splits = [part.numel() * width for part in parts]
        arriving = [size * width for size in self._sizes]
        into, out = self._received.view(torch.uint8), self._sent.view(torch.uint8)
        with count(sum(splits) - splits[axis.rank]):
            self._request = dist.all_to_all_single(into, out, arriving, splits, group=axis.group, async_op=True)

    def wait(self) -> list[Tensor]:
        """The received tensors, in rank order, once they have arrived."""
        with self._count(0):
            self._request.wait()
        return [flat.view(shape) for flat, shape in zip(self._received.split(self._sizes), self._shapes, strict=True)]


class Resharding:
    """Changes the sharding from tokens to channels and back, one slice of the channels at a time.

    Sharded by tokens, `send_tokens` sends all slices and `receive_tokens` receives them. Sharded by channels,
    `receive_channels` receives a slice and `send_channels` sends one. Send and receive are each other's adjoints.

    Args:
        axis: the ranks that share the sequence.
        lengths: tokens of each rank's shard.
        units: channels in all.
        num_slices: of each rank's channels.
        count: counts the bytes.
    """

    def __init__(self, axis: Axis, lengths: Sequence[int], units: int, num_slices: int, count: ByteCounter) -> None:
        self.axis, self.lengths, self.count = axis, list(lengths), count
        # By rank, the widths of its slices.
        self.widths = [channel_shard_sizes(share, num_slices) for share in channel_shard_sizes(units, axis.size)]
        self._pending: list[AllToAll | None] = [None] * num_slices

    def send_tokens(self, x: Tensor) -> None:
        """Send ``x [B, n, D, ...]``."""
        columns = x.split([width for widths in self.widths for width in widths], dim=2)
        num_slices = len(self._pending)
        for number in range(num_slices):
            own = self.widths[self.axis.rank][number]
            shapes = [(x.shape[0], length, own, *x.shape[3:]) for length in self.lengths]
            self._start(number, list(columns[number::num_slices]), shapes)

    def receive_channels(self, number: int) -> Tensor:
        """Slice ``number`` of this rank's channels, ``[B, L, D_s, ...]``."""
        return torch.cat(self._finish(number), dim=1)

    def send_channels(self, number: int, y: Tensor) -> None:
        """Send slice ``number``, ``y [B, L, D_s, ...]``, to the ranks that hold its tokens."""
        own = self.lengths[self.axis.rank]
        shapes = [(y.shape[0], own, widths[number], *y.shape[3:]) for widths in self.widths]
        self._start(number, list(y.split(self.lengths, dim=1)), shapes)

    def receive_tokens(self) -> Tensor:
        """All channels of this rank's tokens, ``[B, n, D, ...]``."""
        slices = [self._finish(number) for number in range(len(self._pending))]
        return torch.cat([part for parts in zip(*slices, strict=True) for part in parts], dim=2)

    def _start(self, number: int, parts: list[Tensor], shapes: list[tuple[int, ...]]) -> None:
        self._pending[number] = AllToAll(parts, shapes, self.axis, self.count)

    def _finish(self, number: int) -> list[Tensor]:
        pending, self._pending[number] = self._pending[number], None
        assert pending is not None
        return pending.wait()


class _SendTokens(torch.autograd.Function):
    """`Resharding.send_tokens`. Returns a handle for each slice, which orders the receives after the send."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, resharding: Resharding, num_slices: int) -> tuple[Tensor, ...]:
        ctx.resharding = resharding
        resharding.send_tokens(x)
        return tuple(x.new_zeros(()) for _ in range(num_slices))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return ctx.resharding.receive_tokens(), None, None


class _ReceiveChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, resharding: Resharding, number: int) -> Tensor:
        ctx.resharding, ctx.number = resharding, number
        return resharding.receive_channels(number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.resharding.send_channels(ctx.number, grad)
        return grad.new_zeros(()), None, None


class _SendChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, resharding: Resharding, number: int) -> Tensor:
        ctx.resharding, ctx.number = resharding, number
        resharding.send_channels(number, y)
        return y.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return ctx.resharding.receive_channels(ctx.number), None, None


class _ReceiveTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, resharding: Resharding, *handles: Tensor) -> Tensor:
        ctx.resharding = resharding
        return resharding.receive_tokens()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.resharding.send_tokens(grad)
        return None, *(grad.new_zeros(()) for _ in ctx.needs_input_grad[1:])


def by_channel(
    fn: Callable[[Tensor, slice], Tensor], x: Tensor, axis: Axis, lengths: Sequence[int], count: ByteCounter = uncounted
) -> Tensor:
    """``fn`` of all tokens, each rank for its channels; differentiable.

    Args:
        fn: gets all tokens of some channels ``[B, L, D_s, ...]``, and which channels these are (``D_s`` may be 0: more
            ranks than channels); returns ``[B, L, D_s, ...]``. It is called once for each slice.
        x: ``[B, lengths[axis.rank], D, ...]``.
        axis: the ranks that share the sequence.
        lengths: tokens of each rank's shard.
        count: counts the bytes.

    Returns:
        ``[B, n, D, ...]``.
    """
    units = x.shape[2]
    if axis.size == 1:
        return fn(x, slice(0, units))
    num_bytes = x[:, :1].numel() * x.element_size() * max(lengths)
    num_slices = max(1, min(MAX_SLICES, units // axis.size, num_bytes // MIN_SLICE_BYTES))
    forth, back = (Resharding(axis, lengths, units, num_slices, count) for _ in range(2))
    handles = _SendTokens.apply(x, forth, num_slices)
    first, returned = sum(channel_shard_sizes(units, axis.size)[: axis.rank]), []
    for number, width in enumerate(forth.widths[axis.rank]):
        y = fn(_ReceiveChannels.apply(handles[number], forth, number), slice(first, first + width))
        returned.append(_SendChannels.apply(y, back, number))
        first += width
    return _ReceiveTokens.apply(back, *returned)


def _all_channels(x: Tensor, axis: Axis, units: int, count: ByteCounter) -> Tensor:
    shares = channel_shard_sizes(units, axis.size)
    padded = x.new_zeros(*x.shape[:2], max(shares), *x.shape[3:])
    padded[:, :, : shares[axis.rank]] = x
    rows = gather([padded], axis, count)
    return torch.cat([row[:, :, :share] for (row,), share in zip(rows, shares, strict=True)], dim=2)


def _own_channels(x: Tensor, axis: Axis) -> Tensor:
    return x.split(channel_shard_sizes(x.shape[2], axis.size), dim=2)[axis.rank].contiguous()


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: bool, axis: Axis, units: int, count: ByteCounter) -> Tensor:
        ctx.how = (own, axis, units, count)
        return _own_channels(x, axis) if own else _all_channels(x, axis, units, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        own, axis, units, count = ctx.how
        grad = _all_channels(grad, axis, units, count) if own else _own_channels(grad, axis)
        return grad, None, None, None, None


def own_channels(x: Tensor, axis: Axis, count: ByteCounter = uncounted) -> Tensor:
    """This rank's share of the channels of ``x [B, T, D, ...]``, the same on every rank; so is its gradient."""
    return x if axis.size == 1 else _Replicate.apply(x, True, axis, x.shape[2], count)


def all_channels(x: Tensor, axis: Axis, units: int, count: ByteCounter = uncounted) -> Tensor:
    """Every rank's channels ``[B, T, units, ...]`` on every rank. Its gradient is the full one on every rank."""
    return x if axis.size == 1 else _Replicate.apply(x, False, axis, units, count)
