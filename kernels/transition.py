"""Affine maps of recurrent states, and their composition.

What a run of tokens does to the state that enters it is an affine map, ``state_out = A state_in + B``. ``A`` is the
transition of the run; ``B`` is its final state from zeros. ``(A, B)`` is known without the state that enters, so all
shards of a sequence, or all chunks of a shard, can be summarized at once. The maps of two neighbours compose, in order:
``(A1, B1) then (A2, B2) = (A2 A1, A2 B1 + B2)``. That makes a scan over shards or chunks associative.

States are ``[B, ...]`` in fp32 or better (complex64 or better).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transition(ABC):
    """The linear part ``A`` of a state's affine map, whichever structure it has.

    Attributes:
        tensor: what represents ``A``, and what is sent between ranks. ``type(transition)(tensor)`` rebuilds it.
        commutes: whether the order of composition does not matter.
    """

    tensor: Tensor
    commutes: ClassVar[bool] = False

    @abstractmethod
    def apply(self, state: Tensor) -> Tensor:
        """``A state``, of the shape of ``state [B, ...]``."""

    @abstractmethod
    def then(self, later: Transition) -> Transition:
        """The transition of this run of tokens followed by that of ``later``: ``A_later A``."""

    @abstractmethod
    def adjoint(self) -> Transition:
        """``A^H``, which maps gradients of final states to gradients of initial states."""

    @abstractmethod
    def masked(self, keep: Tensor, state: Tensor) -> Transition:
        """``A`` in the rows of the batch where ``keep [B]`` (bool) holds, 0 elsewhere.

        ``state [B, ...]`` is any state, for its shape.
        """

    @abstractmethod
    def sections(self, state: Tensor, number: int) -> Iterator[tuple[slice, Transition]]:
        """Cut the elements of a contiguous ``state``, in memory order, into at most ``number`` ranges over which ``A``
        is block-diagonal. Yields each range, and ``A`` on it as a transition of flat states (`affine`).
        """

    @abstractmethod
    def affine(self, state: Tensor, bias: Tensor, out: Tensor) -> None:
        """``out = A state + bias`` for a range of `sections`; all three of one dimension."""


@dataclass(frozen=True)
class Diagonal(Transition):
    """``A`` multiplies elementwise; ``tensor`` broadcasts against a state ``[B, ...]``. A decay, or 1."""

    commutes: ClassVar[bool] = True

    def apply(self, state: Tensor) -> Tensor:
        return self.tensor * _passing(self.tensor, state)

    def then(self, later: Transition) -> Diagonal:
        return Diagonal(later.tensor * _passing(later.tensor, self.tensor))

    def adjoint(self) -> Diagonal:
        return Diagonal(self.tensor.conj())

    def masked(self, keep: Tensor, state: Tensor) -> Diagonal:
        return Diagonal(self.tensor.masked_fill(~broadcast_rows(keep, state), 0))

    def sections(self, state: Tensor, number: int) -> Iterator[tuple[slice, Transition]]:
        start = 0
        for part in self.tensor.expand_as(state).reshape(-1).chunk(number):
            yield slice(start, start + len(part)), Diagonal(part)
            start += len(part)

    def affine(self, state: Tensor, bias: Tensor, out: Tensor) -> None:
        torch.addcmul(bias, self.tensor, _passing(self.tensor, state), out=out)


@dataclass(frozen=True)
class Matrix(Transition):
    """``A`` is a matrix for each head: ``tensor [B or 1, H, K, K]`` multiplies a state ``[B, H, K, V]`` from the left.

    Products are computed in fp64, which neither autocast nor TF32 touches: they are few, one or two for each shard.
    """

    def apply(self, state: Tensor) -> Tensor:
        return (widened(self.tensor) @ widened(_passing(self.tensor, state, matrices=True))).to(state.dtype)

    def then(self, later: Transition) -> Matrix:
        own = widened(_passing(later.tensor, self.tensor, matrices=True))
        return Matrix((widened(later.tensor) @ own).to(self.tensor.dtype))

    def adjoint(self) -> Matrix:
        return Matrix(self.tensor.mH)

    def masked(self, keep: Tensor, state: Tensor) -> Matrix:
        return Matrix(self.tensor.masked_fill(~broadcast_rows(keep, state), 0))

    def sections(self, state: Tensor, number: int) -> Iterator[tuple[slice, Transition]]:
        blocks = self.tensor.expand(*state.shape[:2], -1, -1).flatten(0, 1)  # of a row and head, one after the other
        size, start = math.prod(state.shape[2:]), 0
        for part in blocks.chunk(number):
            yield slice(start, start + len(part) * size), Matrix(part)
            start += len(part) * size

    def affine(self, state: Tensor, bias: Tensor, out: Tensor) -> None:
        number, width, _ = self.tensor.shape
        shape = number, width, len(state) // max(1, number * width)
        state = widened(_passing(self.tensor, state.view(shape), matrices=True))
        bias = widened(bias.view(shape))
        out.view(shape).copy_(torch.baddbmm(bias, widened(self.tensor), state))


class AffineMap(NamedTuple):
    """The summary of a run of tokens: ``state_out = transition.apply(state_in) + state``.

    Attributes:
        transition: ``A``.
        state: ``B``, ``[B, ...]``, the final state from zeros.
    """

    transition: Transition
    state: Tensor

    def apply(self, state: Tensor) -> Tensor:
        """``A state + B``."""
        return self.transition.apply(state) + self.state

    def then(self, later: AffineMap) -> AffineMap:
        """This map followed by ``later``."""
        return AffineMap(self.transition.then(later.transition), later.apply(self.state))


def _passing(a: Tensor, state: Tensor, *, matrices: bool = False) -> Tensor:
    """``state`` before a product with A, with 0 in the place of what is not finite where A (all of a matrix) is 0.

    Where a document begins, nothing passes of those before. Finite states stay, for the gradient of A. On GPUs, whose
    kernels do not part documents so and where each operation is a launch, the state is returned as it is.
    """
    if state.device.type != "cpu":
        return state
    forgotten = (a == 0).flatten(-2).all(-1)[..., None, None] if matrices else a == 0
    lost = forgotten & ~state.isfinite()
    if not state.is_complex():
        return torch.where(lost, torch.zeros((), dtype=state.dtype), state)
    # torch's `where` reads complex numbers at multiples of 16 bytes alone, and a loaded state may lie between.
    parts = torch.view_as_real(state.resolve_conj())
    return torch.view_as_complex(torch.where(lost.unsqueeze(-1), torch.zeros((), dtype=parts.dtype), parts))


def widened(x: Tensor) -> Tensor:
    """A floating tensor in fp64, a complex one in complex128."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def broadcast_rows(values: Tensor, like: Tensor) -> Tensor:
    """``values [B]`` as ``[B, 1, ...]``, with the dimensions of ``like [B, ...]``."""
    return values.view(-1, *(1 for _ in range(like.dim() - 1)))


def exclusive_chunk_scan(
    decay: Tensor | None, state: Tensor, initial: Tensor, continues: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """The state before each of N consecutive chunks: an exclusive scan of their diagonal affine maps.

    Not for matrices: `delta_rule` goes from chunk to chunk, as factors of a chunk's matrix cost less than its products.

    Args:
        decay: ``[1 or B, N, ...]``, each chunk's ``A``, broadcasting against ``state``; None where every ``A`` is 1.
        state: ``[B, N, ...]``, each chunk's ``B``.
        initial: ``[B, ...]``, the state before the first chunk (behind the last one if ``reverse``).
        continues: ``[B, N]`` bool, whether chunk i takes the final state of chunk i - 1 (i + 1 if ``reverse``); None
            for always. A document that begins inside a chunk is in ``decay`` (0) and ``state`` already. For
            ``reverse`` this is not the forward mask but the one shifted by a chunk.
        reverse: scan from right to left.

    Returns:
        ``[B, N + 1, ...]`` in fp64 (complex128): row i is the state before chunk i, the last row the final state. If
        ``reverse``, row i + 1 is the state that enters chunk i from the right, and row 0 is the final state. Depth
        ``log2 N`` (Hillis and Steele 1986), or a cumulative sum where every ``A`` is 1. In fp64, so that the rounding
        of a million terms stays far below that of fp32.
    """
    wide = torch.complex128 if state.is_complex() else torch.float64
    if reverse:
        flipped = exclusive_chunk_scan(
            None if decay is None else decay.flip(1),
            state.flip(1),
            initial,
            None if continues is None else continues.flip(1),
        )
        return flipped.flip(1)
    total = torch.cat([initial.to(wide).unsqueeze(1), state.to(wide)], dim=1)
    if decay is None and continues is None:
        return total.cumsum(dim=1)
    trailing = (1,) * (state.dim() - 2)
    ones = torch.ones(1, state.shape[1], *trailing, dtype=wide, device=state.device)
    factor = ones if decay is None else decay.to(wide)
    mask = None
    if continues is not None:
        mask = continues.to(wide).view(*continues.shape, *trailing)
        factor = factor * mask
    # The first row is the initial state itself: a map with A = 0, B = initial.
    factor = torch.cat([torch.zeros_like(factor[:, :1]), factor], dim=1)
    step = 1
    while step < total.shape[1]:
        total = torch.cat([total[:, :step], total[:, step:] + factor[:, step:] * total[:, :-step]], dim=1)
        factor = torch.cat([factor[:, :step], factor[:, step:] * factor[:, :-step]], dim=1)
        step *= 2
    if mask is not None:
        total = torch.cat([total[:, :-1] * mask, total[:, -1:]], dim=1)
    return total
