"""All tokens of some channels <-> some tokens of all channels: one all-to-all, and its own adjoint the other way.

"Channel" is any unit along dimension 2: a channel of ``[B, L, D]``, a head of ``[B, L, H, K]``. Units are dealt out
as evenly as they go, so neither they nor the tokens have to divide by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mesh import Axis
from .relay import gather
from .traffic import Note, unnoted


def channel_shares(units: int, size: int) -> list[int]:
    """How many of ``units`` channels each of ``size`` ranks holds; they differ by at most one."""
    return [units // size + (rank < units % size) for rank in range(size)]


def _all_to_all(parts: list[Tensor], shapes: list[tuple[int, ...]], axis: Axis, note: Note) -> list[Tensor]:
    """Send ``parts[q]`` to rank q and receive a tensor of ``shapes[p]`` from rank p."""
    sent = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
    width = parts[0].element_size()
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = parts[0].new_empty(sum(sizes))
    splits = [part.numel() * width for part in parts]
    arriving = [size * width for size in sizes]
    with note(sum(splits) - splits[axis.rank]):
        dist.all_to_all_single(received.view(torch.uint8), sent, arriving, splits, group=axis.group)
    return [flat.view(shape) for flat, shape in zip(received.split(sizes), shapes, strict=True)]


def _to_channels(x: Tensor, axis: Axis, lengths: Sequence[int], units: int, note: Note) -> Tensor:
    shares = channel_shares(units, axis.size)
    shapes = [(x.shape[0], length, shares[axis.rank], *x.shape[3:]) for length in lengths]
    return torch.cat(_all_to_all(list(x.split(shares, dim=2)), shapes, axis, note), dim=1)


def _to_tokens(x: Tensor, axis: Axis, lengths: Sequence[int], units: int, note: Note) -> Tensor:
    shares = channel_shares(units, axis.size)
    shapes = [(x.shape[0], lengths[axis.rank], share, *x.shape[3:]) for share in shares]
    return torch.cat(_all_to_all(list(x.split(list(lengths), dim=1)), shapes, axis, note), dim=2)


class _Reshard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, to_channels: bool, axis: Axis, lengths: Sequence[int], units: int, note: Note
    ) -> Tensor:
        ctx.how = (to_channels, axis, lengths, units, note)
        return (_to_channels if to_channels else _to_tokens)(x, axis, lengths, units, note)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        to_channels, *how = ctx.how
        return (_to_tokens if to_channels else _to_channels)(grad, *how), None, None, None, None, None


def to_channels(x: Tensor, axis: Axis, lengths: Sequence[int], note: Note = unnoted) -> Tensor:
    """Some tokens of all channels ``[B, n, D, ...]`` -> all tokens of this rank's channels ``[B, L, D_r, ...]``."""
    return x if axis.size == 1 else _Reshard.apply(x, True, axis, lengths, x.shape[2], note)


def to_tokens(x: Tensor, axis: Axis, lengths: Sequence[int], units: int, note: Note = unnoted) -> Tensor:
    """All tokens of this rank's share of ``units`` channels ``[B, L, D_r, ...]`` -> this rank's tokens ``[B, n,
    units, ...]``.
    """
    return x if axis.size == 1 else _Reshard.apply(x, False, axis, lengths, units, note)


def _all_channels(x: Tensor, axis: Axis, units: int, note: Note) -> Tensor:
    shares = channel_shares(units, axis.size)
    padded = x.new_zeros(*x.shape[:2], max(shares), *x.shape[3:])
    padded[:, :, : shares[axis.rank]] = x
    rows = gather([padded], axis, note)
    return torch.cat([row[:, :, :share] for (row,), share in zip(rows, shares, strict=True)], dim=2)


def _own_channels(x: Tensor, axis: Axis) -> Tensor:
    return x.split(channel_shares(x.shape[2], axis.size), dim=2)[axis.rank].contiguous()


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
