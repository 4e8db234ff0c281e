"""Streaming: one sequence block after block, with exact gradients in memory that does not grow with its length.

A block needs nothing of its past but a carry. `read` walks forward and hands each block the carry of the one before.
`train` first walks forward without gradients and keeps the carries that enter the blocks, nothing else. Then it walks
back: each block is run again from its carry, and what pulls on it is its own loss and the gradient of the carry that it
left. The cost is one more forward pass. On ranks each block is spread over all of them, so none waits for another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.scan import Carry
from .mesh import Mesh
from .span import Span

T = TypeVar("T")
Carries = Mapping[str, Carry]


def blocks(mesh: Mesh, length: int, block_len: int = 0, *, segments: Tensor | None = None, **fields: Any) -> list[Span]:
    """The spans of a sequence that is processed block by block.

    Args:
        mesh: its sequence axis shares each block.
        length: L, tokens of the whole sequence.
        block_len: tokens of a block on each rank; 0 for one block of everything.
        segments: ``[B, L]`` document ids of the whole sequence, or None.
        fields: further attributes of each `Span`.

    Returns:
        This rank's span of each block, in the order of the sequence. The first and all others start without a carry;
        `read` and `train` fill it in.
    """
    stride = block_len * mesh.sequence.size or max(1, length)
    spans = []
    for start in range(0, max(1, length), stride):
        span = Span.of(mesh, min(stride, length - start), start=start, **fields)
        if segments is not None:
            span.segments = span.shard(segments).to(mesh.device)
        spans.append(span)
    return spans


def read(blocks: Sequence[Span], run: Callable[[Span], T]) -> Iterator[T]:
    """What ``run`` gives for each block, each from the carry of those before it; without gradients."""
    carry: Carries = {}
    for number, block in enumerate(blocks):
        span = block.with_carry(carry, keep_carry=number + 1 < len(blocks))
        with torch.no_grad():
            result = run(span)
        carry = span.carry_out
        yield result


def train(
    blocks: Sequence[Span],
    advance: Callable[[Span], object],
    loss: Callable[[Span], Tensor],
    backward: Callable[[Tensor], None],
    *,
    park: bool = False,
) -> None:
    """The exact gradient of the sum of all blocks' losses, one block's activations at a time.

    Args:
        blocks: of `blocks`; a single one is an ordinary forward and backward pass.
        advance: runs the model over a block for the sake of its carry; called without gradients.
        loss: this rank's summand of a block's loss, a scalar. It computes what ``advance`` computed, dropout included.
        backward: adds the gradient of a scalar to the parameters' (``Tensor.backward``, or that of an engine).
            It may scale it, by the same factor in all calls.
        park: keep the carries between the blocks in host memory.
    """
    store = _Store(park)
    entries = [store.put({})]
    for block in blocks[:-1]:
        span = block.with_carry(store.get(entries[-1]), keep_carry=True)
        with torch.no_grad():
            advance(span)
        entries.append(store.put(span.carry_out))
    grads: dict[str, Tensor | None] = {}
    for block in reversed(blocks):
        carry = _leaves(store.get(entries.pop()))
        span = block.with_carry(carry, keep_carry=bool(grads))
        value = loss(span)
        left = {key: span.carry_out[key].state for key, grad in grads.items() if grad is not None}
        backward(_Pull.apply(value, [grads[key] for key in left], *left.values()))
        grads = {key: entry.state.grad for key, entry in carry.items()}


@dataclass(frozen=True)
class _Store:
    """Where carries wait: on their device, or in host memory."""

    park: bool

    def put(self, carries: Carries) -> list[tuple[str, Carry, torch.device]]:
        kept = []
        for key, (state, segment) in carries.items():
            # `to` copies nothing that lies on the CPU already.
            kept.append((key, Carry(state.to("cpu") if self.park else state, segment), state.device))
        return kept

    def get(self, kept: list[tuple[str, Carry, torch.device]]) -> Carries:
        return {key: Carry(state.to(device), segment) for key, (state, segment), device in kept}


def _leaves(carries: Carries) -> Carries:
    return {key: Carry(state.detach().requires_grad_(), segment) for key, (state, segment) in carries.items()}


class _Pull(torch.autograd.Function):
    """A scalar whose gradient also pulls on states, by gradients that are known (and scaled as its own will be)."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *states: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, *ctx.grads
