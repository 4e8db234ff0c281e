"""The scan of a stateful mixer over a whole sequence, of which this rank may hold one shard.

On one rank it is `local_scan`. Across ranks, each shard's summary is an affine map of the state, ``(A, B)``: the ranks
exchange summaries, each takes what an exclusive scan over the shards gives it as its initial state, and computes its
outputs. Backward, gradients of states take the same way in the other direction:

    forward     local_map  ->  exclusive scan over shards  ->  apply_state
    backward    incoming_state_grad  ->  exclusive scan from right to left, of the adjoint maps  ->  input_grads

How summaries are exchanged is the business of a `StateExchange` (`parallel.relay`); operators know no ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _aliases
from ..errors import InputError
from . import compiled
from .state import (
    NO_TOKENS,
    Carry,
    FusedForward,
    StatefulOp,
    boundary_ids,
    continuation_masks,
    full_precision,
    local_map,
    local_scan,
    masked_state,
)
from .transition import AffineMap, Diagonal, Matrix, Transition, exclusive_chunk_scan, widened

__all__ = [
    "NO_TOKENS",
    "AffineMap",
    "Carry",
    "Diagonal",
    "DirectionalScan",
    "FusedForward",
    "Matrix",
    "StateExchange",
    "StatefulOp",
    "Transition",
    "exclusive_chunk_scan",
    "scan",
]

T = TypeVar("T")


class DirectionalScan(NamedTuple):
    """A scan of states over all shards in one direction.

    Attributes:
        state: ``[B, ...]``, the B of this shard's affine map.
        initial: the state before the first shard (behind the last one if ``reverse``), equal on all ranks; None for
            zeros.
        reverse: from right to left.
        need_final_state: whether the state after all shards is asked for.
    """

    state: Tensor
    initial: Tensor | None
    reverse: bool
    need_final_state: bool


class StateExchange(Protocol):
    """Exchanges states between the ranks that hold the shards of a sequence. All ranks call it in the same order.

    Attributes:
        rank, size: the number of this shard, and how many there are.
        need_final_state: whether the carry of a forward pass is asked for; if not, `scan` returns one with an empty
            state.
    """

    rank: int
    size: int
    need_final_state: bool

    def gather_boundary_ids(self, first: Tensor, last: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every shard's first and last document id ``[B]``, in the order of the sequence."""
        ...

    def exclusive_scan(
        self, transition: Transition, scans: Sequence[DirectionalScan], saved: Sequence[Transition] | None = None
    ) -> tuple[list[tuple[Tensor, Tensor | None]], Sequence[Transition]]:
        """Exclusive scans of the affine maps ``(transition, scan.state)`` over all shards.

        Args:
            transition: the A of this shard's map, the same in all directions.
            scans: shapes and directions agree between ranks.
            saved: in backward, the transitions that the forward scan returned; the exchange takes their adjoints.

        Returns:
            For each scan the state that enters this shard, and the final state (may be None where it is not needed);
            and the transitions of all shards, if the exchange brought them: an adjoint needs not send them again.
        """
        ...

    def run_cached(self, collective: Callable[[], T]) -> T:
        """What ``collective`` returns; where a layer is recomputed for its gradients, what it returned at first."""
        ...

    def detached(self) -> StateExchange:
        """The exchange without its caches, for the backward pass. The autograd graph keeps it; with the caches, it
        would keep its own outputs alive, a cycle that Python's garbage collector cannot see.
        """
        ...


@dataclass(frozen=True)
class ScanContext:
    """What the backward of a scan across ranks needs of the forward.

    Attributes:
        exchange: to the other ranks.
        transition: A of this shard's map, 0 where a document begins in it or at its first token.
        continues: ``[B]``, whether the shard continues its predecessor's document; None for always.
        causal: whether states flow from left to right only.
        shared: whether one sum serves both directions.
        saved: the transitions that the forward exchange returned.
    """

    exchange: StateExchange
    transition: Transition
    continues: Tensor | None
    causal: bool
    shared: bool
    saved: Sequence[Transition] = ()

    def mask_boundary(self, state: Tensor) -> Tensor:
        """``state`` where it may cross the boundary between this shard and the one before, else 0."""
        return masked_state(self.continues, state)


def cross_rank_scan(
    exchange: StateExchange, op: StatefulOp, own: AffineMap, segments: Tensor | None, carry: Carry | None
) -> tuple[Tensor, Carry, ScanContext]:
    """The state that enters this shard, the carry behind the last shard, and the context for backward.

    Args:
        exchange: to the other ranks.
        op: the operator.
        own: this shard's affine map, of `local_map`.
        segments: ``[B, L]`` this shard's document ids, or None.
        carry: what came before the whole sequence.
    """
    transition, state = own
    masks, last = continuation_masks(
        [] if segments is None else exchange.gather_boundary_ids(*boundary_ids(segments)), carry
    )
    continues = masks[exchange.rank] if masks else None
    to_right = state if op.causal else state[0]
    if continues is not None:
        transition = transition.masked(continues, to_right)
    # Without documents, a plain sum is the same in both directions: one is sent.
    shared = not op.causal and op.plain_sum and segments is None
    context = ScanContext(exchange.detached(), transition, continues, op.causal, shared)
    initial = None if carry is None else carry.state.to(to_right.dtype)
    scans = [DirectionalScan(to_right, initial, False, exchange.need_final_state)]
    if not op.causal:
        scans.append(DirectionalScan(to_right if shared else context.mask_boundary(state[1]), None, True, False))
    ((entering, final), *from_right), saved = exchange.exclusive_scan(transition, scans)
    final = to_right.new_empty(0) if final is None else final
    entering = context.mask_boundary(entering)
    entering = torch.stack([entering, from_right[0][0]]) if from_right else entering
    return entering, Carry(final, last), replace(context, saved=saved)


def cross_rank_scan_backward(
    context: ScanContext, grad: Tensor, final_grad: Tensor | None, need_initial_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Adjoint of `cross_rank_scan`.

    Args:
        context: of the forward.
        grad: of the state that entered this shard.
        final_grad: of the state behind the last shard, the full one on every rank; None for zeros.
        need_initial_grad: whether the gradient of the carry is asked for.

    Returns:
        The gradient of this shard's final state, and that of the carry (the full one on every rank) or None.
    """
    to_left = grad if context.causal else grad[0]
    scans = [DirectionalScan(context.mask_boundary(to_left), final_grad, True, need_initial_grad)]
    if not context.causal:
        scans.append(DirectionalScan(scans[0].state if context.shared else grad[1], None, False, False))
    adjoint = context.transition.adjoint()
    ((final, initial), *from_left), _ = context.exchange.exclusive_scan(adjoint, scans, context.saved)
    return torch.stack([final, context.mask_boundary(from_left[0][0])]) if from_left else final, initial


class _LocalScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: StatefulOp, segments: Tensor | None, initial: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, final, transition, start, saved = local_scan(op, inputs, segments, initial)
        ctx.save_for_backward(segments, start, transition, *inputs, *saved)
        ctx.op, ctx.num_inputs, ctx.shape, ctx.dtype = op, len(inputs), y.shape, y.dtype
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, final_grad: Tensor | None) -> tuple[Any, ...]:
        segments, start, transition, *tensors = ctx.saved_tensors
        inputs, saved = tuple(tensors[: ctx.num_inputs]), tuple(tensors[ctx.num_inputs :])
        wanted = ctx.initial_dtype is not None
        with full_precision(start):
            if grad is None:
                grad = start.new_zeros(ctx.shape, dtype=ctx.dtype)
            grads, initial_grad = ctx.op.fused_backward(
                inputs, segments, start, transition, saved, grad, final_grad, wanted
            )
        return None, None, None if initial_grad is None else initial_grad.to(ctx.initial_dtype), *grads


class _CrossRankScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: StatefulOp,
        exchange: StateExchange,
        segments: Tensor | None,
        carry_segment: Tensor | None,
        carry_state: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        carry = None if carry_state is None else Carry(carry_state, carry_segment)

        def collective() -> tuple[Tensor, Carry, ScanContext]:
            return cross_rank_scan(exchange, op, local_map(op, inputs, segments), segments, carry)

        entering, carry_out, context = exchange.run_cached(collective)
        y, saved = op.apply_state(inputs, segments, entering)
        ctx.save_for_backward(segments, entering, *inputs, *saved)
        ctx.op, ctx.context, ctx.num_inputs, ctx.shape, ctx.dtype = op, context, len(inputs), y.shape, y.dtype
        ctx.carry_dtype = None if carry_state is None else carry_state.dtype
        if segments is not None:
            ctx.mark_non_differentiable(carry_out.segment)
        ctx.set_materialize_grads(False)
        final = carry_out.state.detach()  # another tensor than the cached one, which must not hold this graph
        return y, final, carry_out.segment if segments is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, final_grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        segments, entering, *tensors = ctx.saved_tensors
        inputs, saved = tuple(tensors[: ctx.num_inputs]), tuple(tensors[ctx.num_inputs :])
        with full_precision(entering):
            if grad is None:
                grad = entering.new_zeros(ctx.shape, dtype=ctx.dtype)
            own = ctx.op.incoming_state_grad(inputs, segments, entering, saved, grad)
            final, initial = cross_rank_scan_backward(ctx.context, own, final_grad, ctx.carry_dtype is not None)
            grads = ctx.op.input_grads(inputs, segments, entering, final, saved, grad)
        carry_grad = None if ctx.carry_dtype is None or initial is None else initial.to(ctx.carry_dtype)
        return None, None, None, None, carry_grad, *grads


def scan(
    op: StatefulOp,
    *inputs: Tensor,
    segments: Tensor | None = None,
    carry: Carry | None = None,
    relay: StateExchange | None = None,
) -> tuple[Tensor, Carry]:
    """Run a stateful mixer over the sequence of which ``inputs`` are this rank's shard.

    Args:
        op: the operator.
        inputs: activations ``[B, L, ...]`` of this shard, and parameters.
        segments: ``[B, L]`` int64 non-decreasing document ids >= 0 of this shard, or None for one document.
        carry: what came before the whole sequence (of all ranks); the same on every rank.
        relay: exchanges states with the ranks that hold the other shards; None if this is the whole sequence.

    Returns:
        This shard's output, and the carry behind the whole sequence, the same on every rank (with an empty state where
        ``relay`` needs no final state). The carry's gradient counts once: every rank passes, and receives, the full
        gradient of the carry rather than a summand. Behind a step of decoding (one token, a carry, no gradients), the
        state is in fp64.

    Raises:
        InputError: ``segments`` do not fit the inputs.
    """
    if segments is not None and segments.shape != inputs[0].shape[:2]:
        raise InputError("segments", list(segments.shape), f"[batch, tokens] = {list(inputs[0].shape[:2])}")
    state, segment = carry if carry is not None else (None, None)
    if relay is not None and relay.size > 1:
        with full_precision(inputs[0]):
            own = op.resolve_backend(inputs)
            y, final, last = _CrossRankScan.apply(own, relay, segments, segment, state, *inputs)
        return y, Carry(final, last if last is not None else segment)
    if state is not None and inputs[0].shape[1] == 1 and not torch.is_grad_enabled():
        # A step of decoding: what is rounded once a block must not be rounded once a token.
        wide = tuple(map(widened, inputs))
        op = _in_fp64(op, inputs, wide)
        state, dtype, inputs = widened(state), inputs[0].dtype, wide
    else:
        dtype = None
    masks, last = continuation_masks([] if segments is None else [boundary_ids(segments)], carry)
    initial = state if state is None or not masks else masked_state(masks[0], state)
    if torch.compiler.is_compiling():
        y, final, *_ = torch.ops.longreach.scan(compiled.name_of(op), list(inputs), segments, initial)
    else:
        with full_precision(inputs[0]):
            y, final = _LocalScan.apply(op.resolve_backend(inputs), segments, initial, *inputs)
    y = y if dtype is None else y.to(dtype)
    return y, Carry(final, last if segments is not None else segment)


def _in_fp64(op: StatefulOp, inputs: tuple[Tensor, ...], wide: tuple[Tensor, ...]) -> StatefulOp:
    """The operator for ``wide``, the inputs in fp64: with another backend, if its own serves ``inputs`` alone."""
    if getattr(op, "backend", "auto") == "auto":
        return op
    try:
        op.resolve_backend(wide)
    except InputError:
        op.resolve_backend(inputs)
        automatic: StatefulOp = replace(op, backend="auto")  # type: ignore[type-var]
        return automatic
    return op


def __getattr__(name: str) -> Any:
    return _aliases.attribute(__name__, name)
