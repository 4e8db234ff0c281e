"""What a stateful mixer provides, and its scan over the tokens that one rank holds.

A causal operator has one state, which flows from left to right. A non-causal one has two, stacked in front: one flows
to the right, one to the left. Gradients of states flow against them.

Documents: ``segments [B, L]`` are non-decreasing ids >= 0. A state enters a shard only where the shard's first token
continues the document of the token before it. ``A = 0`` for a shard in which a document begins, and ``B`` is the final
state of its last document alone. `local_map` looks for documents that begin after the shard's first token; across
ranks, `scan` also looks at the first token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _aliases
from .transition import AffineMap, Diagonal, Transition, broadcast_rows

NO_TOKENS = -1  # the document id that an empty shard reports


class Carry(NamedTuple):
    """What a sequence needs of the tokens before it.

    Attributes:
        state: ``[B, ...]``, fp32 or better for recurrent states, the tokens themselves for convolutions.
        segment: int64 document ids the state belongs to (``[B]``; convolutions ``[B, tokens]``), or None.
    """

    state: Tensor
    segment: Tensor | None = None


class FusedForward(NamedTuple):
    """The results of `StatefulOp.fused_forward`.

    Attributes:
        initial: the initial state ``[B, ...]`` in the dtype of states.
        y, saved: as of `StatefulOp.apply_state`.
        transition: ``A``, as of `StatefulOp.local_transition`; it may be masked by documents already. None if
            `StatefulOp.fused_backward` does without it.
        final: the final state, ``A initial + B``.
    """

    initial: Tensor
    y: Tensor
    saved: tuple[Tensor, ...]
    transition: Tensor | None
    final: Tensor


class StatefulOp:
    """A sequence mixer that reaches other tokens through a recurrent state: two passes and their adjoints.

    ``inputs`` is a tuple of tensors (activations ``[B, L, ...]`` of this shard and, where the operator has them,
    parameters); ``segments`` is ``[B, L]`` or None. ``initial``, the state before the shard, and the gradient of the
    final state have the shape of ``B``: ``[B, ...]`` for a causal operator, ``[2, B, ...]`` for a non-causal one (from
    the left, from the right).

    A new operator defines `local_transition` and `apply_state` in differentiable PyTorch; the adjoints follow by
    automatic differentiation of this shard alone. Fast operators override them.

    Attributes:
        causal: whether states flow from left to right only.
        transition: the class of transitions of which `local_transition` returns the tensor.
        isolates: whether what is not finite in a document stays out of the results of others; else `isolation` helps.
        plain_sum: of a non-causal operator whose A is 1, which has the same B in both directions where there are no
            documents, and uses the sum of both initial states: one state is exchanged for both directions.
    """

    causal: bool = True
    transition: type[Transition] = Diagonal
    isolates: bool = True
    plain_sum: bool = False
    __match_args__: tuple[str, ...] = ()  # settings that rebuild it under torch.compile; dataclasses define them

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _aliases.adopt_methods(cls, _aliases.OPERATOR_METHODS)

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        """The implementation of this operator for such inputs; `scan` asks once per call."""
        return self

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        """This shard's ``(A, B)``, independent of the initial state.

        ``A`` is the tensor of a `transition` and ignores documents (`local_map` masks it). ``B`` is the sum over the
        last document; a non-causal operator stacks the sums over the last and the first document, ``[2, B, ...]``.
        """
        raise TypeError(f"{type(self).__name__} defines no local_transition")

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output ``[B, L, ...]`` and tensors for `input_grads`. ``initial`` reaches the first document
        only, and the right-end state of a non-causal operator the last one.
        """
        raise TypeError(f"{type(self).__name__} defines no apply_state")

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        """Output and final state of a causal operator in one pass, where the initial state is known beforehand.

        Used where no other rank holds tokens of the sequence; ``initial`` is None for zeros.
        """
        transition, state = local_map(self, inputs, segments)
        initial = torch.zeros_like(state) if initial is None else initial.to(state.dtype)
        y, saved = self.apply_state(inputs, segments, initial)
        return FusedForward(initial, y, saved, transition.tensor, transition.apply(initial) + state)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        """What this shard's outputs contribute to the gradient of ``initial``; the shape of ``initial``."""
        with torch.enable_grad():
            initial = initial.detach().requires_grad_()
            y, _ = self.apply_state(inputs, segments, initial)
        return _vector_jacobian([y], [initial], [grad])[0]

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, given those of the output (``grad``) and of the final state (``final_grad``)."""
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in inputs)
            y, _ = self.apply_state(leaves, segments, initial)
            final = local_map(self, leaves, segments).apply(initial)
        grads = iter(_vector_jacobian([y, final], [x for x in leaves if x.requires_grad], [grad, final_grad]))
        return tuple(next(grads) if x.requires_grad else None for x in leaves)

    def fused_backward(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        transition: Tensor | None,
        saved: tuple[Tensor, ...],
        grad: Tensor,
        final_grad: Tensor | None,
        need_initial_grad: bool,
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """The adjoint of `local_scan`: by default, of `incoming_state_grad`, the transition and `input_grads`.

        Args:
            initial, transition, saved: of `LocalScan`.
            grad: of the output.
            final_grad: of the final state ``[B, ...]``; None for zeros.
            need_initial_grad: whether the gradient of the initial state is asked for.

        Returns:
            The gradients of the inputs, and that of the initial state ``[B, ...]`` or None.
        """
        one_way = initial if self.causal else initial[0]
        initial_grad = None
        if need_initial_grad:
            own = self.incoming_state_grad(inputs, segments, initial, saved, grad)
            initial_grad = own if self.causal else own[0]
            if final_grad is not None:
                assert transition is not None
                initial_grad = initial_grad + self.transition(transition).adjoint().apply(final_grad)
        final_grads = both_directions(self, final_grad, one_way)
        return self.input_grads(inputs, segments, initial, final_grads, saved, grad), initial_grad


def _vector_jacobian(outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Vector-Jacobian products; zeros where an output, such as that of an empty shard, does not depend on an input."""
    pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if y.requires_grad]
    if not pairs or not inputs:
        return tuple(torch.zeros_like(x) for x in inputs)
    used, upstream = zip(*pairs, strict=True)
    return torch.autograd.grad(used, inputs, upstream, materialize_grads=True)


def local_map(op: StatefulOp, inputs: tuple[Tensor, ...], segments: Tensor | None) -> AffineMap:
    """This shard's affine map: ``A = 0`` where a document begins in it, ``B`` of `StatefulOp.local_transition`."""
    transition, state = op.local_transition(inputs, segments)
    return AffineMap(_masked(op.transition(transition), segments, state if op.causal else state[0]), state)


def _masked(transition: Transition, segments: Tensor | None, state: Tensor) -> Transition:
    """The transition of a shard with documents: 0 where one begins inside it. ``state`` is one state ``[B, ...]``."""
    if segments is None:
        return transition
    first, last = boundary_ids(segments)  # equal for an empty shard, which every state passes
    return transition.masked(first == last, state)


def boundary_ids(segments: Tensor) -> tuple[Tensor, Tensor]:
    """The ids ``[B]`` of a shard's first and last document; `NO_TOKENS` for an empty shard."""
    if not segments.shape[1]:
        return (segments.new_full(segments.shape[:1], NO_TOKENS),) * 2
    return segments[:, 0], segments[:, -1].clone()


def continuation_masks(
    ids: list[tuple[Tensor, Tensor]], carry: Carry | None
) -> tuple[list[Tensor | None], Tensor | None]:
    """Which shards continue the document before them.

    Args:
        ids: `boundary_ids` of all shards, in the order of the sequence.
        carry: what came before the first shard.

    Returns:
        For each shard a mask ``[B]``, None for always, and the id ``[B]`` of the sequence's last document.
    """
    last = None if carry is None else carry.segment
    found: list[Tensor | None] = []
    for first_id, last_id in ids:
        empty = first_id == NO_TOKENS
        found.append(None if last is None else (first_id == last) | empty)
        last = last_id if last is None else torch.where(empty, last, last_id)
    return found, last


class LocalScan(NamedTuple):
    """The results of `local_scan`: output, final state ``[B, ...]``, and what `fused_backward` needs besides.

    Attributes:
        y: ``[B, L, ...]``.
        final: the state after the last token, ``[B, ...]``.
        transition: the tensor of ``A``, 0 where a document begins; None if `StatefulOp.fused_backward` needs none.
        initial: ``[B, ...]``, or ``[2, B, ...]`` for a non-causal operator.
        saved: of `StatefulOp.apply_state`.
    """

    y: Tensor
    final: Tensor
    transition: Tensor | None
    initial: Tensor
    saved: tuple[Tensor, ...]


def local_scan(
    op: StatefulOp, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
) -> LocalScan:
    """The scan of a sequence that one rank holds whole. For autograd Functions and custom ops, which record no graph.

    Args:
        op: an implementation, from `StatefulOp.resolve_backend`.
        inputs, segments: as of `StatefulOp`.
        initial: ``[B, ...]``, the state before the sequence where its document goes on, 0 elsewhere; None for zeros.
    """
    if op.causal:
        start, y, saved, transition, final = op.fused_forward(inputs, segments, initial)
        if transition is not None:
            transition = _masked(op.transition(transition), segments, final).tensor
        return LocalScan(y, final, transition, start, saved)
    own = local_map(op, inputs, segments)
    start = both_directions(op, initial, own.state[0])
    y, saved = op.apply_state(inputs, segments, start)
    return LocalScan(y, own.transition.apply(start[0]) + own.state[0], own.transition.tensor, start, saved)


def both_directions(op: StatefulOp, state: Tensor | None, like: Tensor) -> Tensor:
    """A state of the left end, None for zeros, in the dtype of ``like [B, ...]``; a non-causal operator's is stacked
    with zeros, the state of the right end.
    """
    one = torch.zeros_like(like) if state is None else state.to(like.dtype)
    return one if op.causal else torch.stack([one, torch.zeros_like(one)])


def masked_state(mask: Tensor | None, state: Tensor) -> Tensor:
    """``state [B, ...]`` in the rows where ``mask [B]`` holds, 0 elsewhere; None keeps all."""
    # Not a product: 0 times a state that is not finite would be NaN in a document that has not seen it.
    return state if mask is None else state.masked_fill(~broadcast_rows(mask, state), 0)


def full_precision(like: Tensor) -> torch.autocast:
    """States and sums keep their dtype under autocast, which would run their matrix products in 16 bits."""
    kind = like.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)
