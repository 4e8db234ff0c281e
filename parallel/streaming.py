"""Streaming: a sequence block by block, with exact gradients in memory that does not grow with its length.

A block depends on earlier ones only through a carry. `read` runs forward and passes each block the carry of the one
before. `train` first runs forward without gradients and keeps the carries between blocks, nothing else. Then it goes
back: each block is recomputed from its carry, and its backward starts from its own loss and from the gradient of the
carry that it wrote, known from the block behind it. The cost is one more forward pass, as that of activation
checkpointing. With sequence parallelism each block is sharded over all ranks, so ranks do not wait for one another's
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.state import Carry
from .mesh import Mesh, to_device
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
        This rank's span of each block, in the order of the sequence, without carries; `read` and `train` add them.
    """
    stride = block_len * mesh.sequence.size or max(1, length)
    spans = []
    for start in range(0, max(1, length), stride):
        span = Span.of(mesh, min(stride, length - start), start=start, **fields)
        if segments is not None:
            span.segments = to_device(span.shard(segments), mesh.device)
        spans.append(span)
    return spans


def read(blocks: Sequence[Span], run: Callable[[Span], T]) -> Iterator[T]:
    """The results of ``run`` for each block, each from the carry of the blocks before; without gradients."""
    carry: Carries = {}
    for number, block in enumerate(blocks):
        span = block.with_carry(carry, keep_carry=number + 1 < len(blocks))
        with torch.no_grad():
            result = run(span)
        carry = span.carry_out
        yield result


def train(
    blocks: Sequence[Span],
    forward: Callable[[Span], object],
    loss: Callable[[Span], Tensor],
    backward: Callable[[Tensor], None],
    *,
    park: bool = False,
) -> None:
    """The exact gradient of the sum of all blocks' losses, with the activations of one block at a time.

    Args:
        blocks: of `blocks`; a single one is an ordinary forward and backward pass.
        forward: runs the model over a block for its outgoing carry; called without gradients.
        loss: this rank's summand of a block's loss, a scalar. It computes what ``forward`` computed, dropout included.
        backward: adds the gradient of a scalar to those of the parameters (``Tensor.backward``, or that of an engine).
            It may scale the gradient, by the same factor in all calls.
        park: keep the carries between blocks in host memory.
    """
    store = _CarryStore(park)
    incoming = [store.put({})]
    for block in blocks[:-1]:
        span = block.with_carry(store.get(incoming[-1]), keep_carry=True)
        with torch.no_grad():
            forward(span)
        incoming.append(store.put(span.carry_out))
    grads: dict[str, Tensor | None] = {}
    for block in reversed(blocks):
        carry = _as_leaves(store.get(incoming.pop()))
        span = block.with_carry(carry, keep_carry=bool(grads))
        value = loss(span)
        outgoing = {key: span.carry_out[key].state for key, grad in grads.items() if grad is not None}
        backward(_InjectStateGrads.apply(value, [grads[key] for key in outgoing], *outgoing.values()))
        grads = {key: entry.state.grad for key, entry in carry.items()}
        span.release()


@dataclass(frozen=True)
class _CarryStore:
    """Keeps the carries between blocks, on their device or in host memory."""

    park: bool

    def put(self, carries: Carries) -> list[tuple[str, Carry, torch.device]]:
        kept = []
        for key, (state, segment) in carries.items():
            # `to` copies nothing that lies on the CPU already; from a GPU it copies to pinned memory, in stream order.
            parked = state.to("cpu", non_blocking=True) if self.park else state
            kept.append((key, Carry(parked, segment), state.device))
        return kept

    def get(self, kept: list[tuple[str, Carry, torch.device]]) -> Carries:
        return {key: Carry(state.to(device, non_blocking=True), segment) for key, (state, segment), device in kept}


def _as_leaves(carries: Carries) -> Carries:
    return {key: Carry(state.detach().requires_grad_(), segment) for key, (state, segment) in carries.items()}


class _InjectStateGrads(torch.autograd.Function):
    """A scalar loss whose backward also starts from states whose gradients are known (scaled as its own will be)."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *states: Tensor) -> Tensor:
        ctx.grads = [grad.to(state.dtype) for grad, state in zip(grads, states, strict=True)]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, *ctx.grads
