"""The state law, what a stateful mixer provides, and the one autograd Function that runs it.

A piece of a sequence needs nothing of its past but a small state, and every state obeys one law:
``state_out = A * state_in + B``. ``(A, B)`` is the piece's summary; it is known without the past, so all pieces
can be summarized at once and their summaries folded afterwards. Who holds the other pieces (other ranks, an
earlier block, the tokens already generated) is the relay's business; this file and the operators never know.

Directions: a causal operator has one state, flowing from left to right. A non-causal one has two, stacked in
front: what flows to the right, and what flows to the left. Gradients flow against their states.

Documents: ``segments [B, L]`` are non-decreasing ids >= 0. A state enters a piece only where the piece's first
token continues the document of the token before it, and leaves it unmixed with earlier documents: ``A = 0``
for a piece in which a document begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError

T = TypeVar("T")
NO_TOKENS = -1  # the document id that an empty piece reports


class Carry(NamedTuple):
    """What a piece needs of its past.

    Attributes:
        state: ``[B, ...]``, fp32 or better for recurrent states, the tokens themselves for convolutions.
        segment: int64 document ids the state belongs to (``[B]``; convolutions ``[B, tokens]``), or None.
    """

    state: Tensor
    segment: Tensor | None = None


class FusedForward(NamedTuple):
    """A causal piece's whole passage, see `StatefulOp.fused_forward`.

    Attributes:
        past: the state that entered, in the dtype of states.
        y, saved: as of `StatefulOp.apply_state`.
        decay: ``A``, ignoring documents (`scan` zeroes it).
        end: the state that leaves, ``A past + B``.
    """

    past: Tensor
    y: Tensor
    saved: tuple[Tensor, ...]
    decay: Tensor
    end: Tensor


class StatefulOp:
    """A mixer that reaches its past through a state: two passes and their adjoints.

    ``inputs`` is a tuple of tensors (activations ``[B, L, ...]`` and, where the operator has them, parameters);
    ``segments`` is ``[B, L]`` or None. ``past`` and ``future`` have the shape of the state ``B``:
    ``[B, ...]`` for a causal operator and ``[2, B, ...]`` for a non-causal one (from the left, from the right).

    A new operator defines `local_transition` and `apply_state` in differentiable PyTorch; the adjoints then follow by
    automatic differentiation of this piece alone. Fast operators override them.
    """

    causal: bool = True
    plain_sum: bool = True  # non-causal: without documents, what flows left is what flows right
    __match_args__: tuple[str, ...] = ()  # what makes it again, under torch.compile; dataclasses know it

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        """The implementation of this operator that serves such inputs; `scan` asks once."""
        return self

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        """This piece's ``(A, B)``, without knowing the past.

        ``A`` broadcasts against one state ``[B, ...]`` and ignores documents (`scan` zeroes it). ``B`` holds the last
        document's sum; a non-causal operator stacks the last document's and the first document's sums ``[2, B, ...]``.
        """
        raise TypeError(f"{type(self).__name__} defines no summarize")

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output ``[B, L, ...]`` and what `input_grads` wants saved. ``past`` reaches the first document only."""
        raise TypeError(f"{type(self).__name__} defines no attend")

    def fused_forward(self, inputs: tuple[Tensor, ...], segments: Tensor | None, start: Tensor | None) -> FusedForward:
        """A causal piece that is the whole sequence: `apply_state`, and what leaves it; ``start`` is None for zeros.

        Nobody waits for this piece's summary, so a fast operator gets all in one walk over the tokens.
        """
        decay, state = transition(self, inputs, segments)
        past = torch.zeros_like(state) if start is None else start.to(state.dtype)
        y, saved = self.apply_state(inputs, segments, past)
        return FusedForward(past, y, saved, decay, decay * past + state)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        """What this piece's outputs contribute to the gradient of ``past``; the shape of ``past``."""
        with torch.enable_grad():
            past = past.detach().requires_grad_()
            y, _ = self.apply_state(inputs, segments, past)
        return _pull_back([y], [past], [grad])[0]

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        future: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, given the output's gradient and ``future``, the gradient of the outgoing state."""
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
            y, _ = self.apply_state(leaves, segments, past)
            decay, state = transition(self, leaves, segments)
            leaving = decay * past + state
        grads = iter(_pull_back([y, leaving], [x for x in leaves if x.requires_grad], [grad, future]))
        return tuple(next(grads) if x.requires_grad else None for x in leaves)


def _pull_back(outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Vector-Jacobian products; zeros where an output, such as that of an empty piece, does not depend on an input."""
    pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if y.requires_grad]
    if not pairs or not inputs:
        return tuple(torch.zeros_like(x) for x in inputs)
    used, upstream = zip(*pairs, strict=True)
    return torch.autograd.grad(used, inputs, upstream, materialize_grads=True)


def transition(op: StatefulOp, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The piece's ``(A, B)`` with ``A = 0`` where a document begins inside it."""
    decay, state = op.local_transition(inputs, segments)
    return through(decay, segments, state if op.causal else state[0]), state


def through(decay: Tensor, segments: Tensor | None, like: Tensor) -> Tensor:
    """``A`` of a piece with documents: 0 where one begins inside it. ``like`` is a state ``[B, ...]``."""
    if segments is None:
        return decay
    first, last = edges(segments)  # alike for an empty piece, which lets everything through
    return decay * broadcast_rows(first == last, like)


def broadcast_rows(values: Tensor, like: Tensor) -> Tensor:
    """``values [B]`` shaped to multiply ``like [B, ...]`` (booleans become 0 and 1)."""
    dtype = like.real.dtype if like.is_complex() else like.dtype
    return values.to(dtype).view(-1, *(1 for _ in range(like.dim() - 1)))


class Flow(NamedTuple):
    """States that flow past all pieces in one direction; each piece adds to them.

    Attributes:
        state: ``[B, ...]``, what this piece adds: the B of its map.
        start: what enters the first piece (the last one if ``reverse``), the same everywhere; None for zeros.
        reverse: from right to left.
        wanted: whether anybody asks for what leaves the last piece.
    """

    state: Tensor
    start: Tensor | None
    reverse: bool
    wanted: bool


class Relay(Protocol):
    """Reaches the other pieces of the sequence. What it does is a collective: all pieces ask in the same order.

    Attributes:
        rank, size: which piece this is, and of how many.
        leaves: whether anybody asks for what leaves the last piece; if not, `scan` gives a carry with an empty state.
    """

    rank: int
    size: int
    leaves: bool

    def ends(self, first: Tensor, last: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every piece's first and last document ``[B]``, in the order of the sequence."""
        ...

    def sweep(
        self, decay: Tensor, flows: Sequence[Flow], known: Sequence[Tensor] | None = None
    ) -> tuple[list[tuple[Tensor, Tensor | None]], Sequence[Tensor]]:
        """Send states past all pieces, each of which maps them to ``decay * state + flow.state``.

        Args:
            decay: the A of this piece's map, the same for all flows.
            flows: shapes and directions agree between pieces.
            known: what an earlier sweep found out, of which this is the adjoint: its decays, conjugated.

        Returns:
            For each flow what reaches this piece, and what leaves the last one (it may be None where nobody asks);
            and what an adjoint wants to know.
        """
        ...

    def once(self, exchange: Callable[[], T]) -> T:
        """What ``exchange`` gives; where a piece is computed again for its gradients, what it gave the first time."""
        ...


class Alone:
    """The relay of a piece that is the whole sequence."""

    rank = 0
    size = 1
    leaves = True

    def ends(self, first: Tensor, last: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(first, last)]

    def sweep(
        self, decay: Tensor, flows: Sequence[Flow], known: Sequence[Tensor] | None = None
    ) -> tuple[list[tuple[Tensor, Tensor | None]], Sequence[Tensor]]:
        found: list[tuple[Tensor, Tensor | None]] = []
        for state, start, *_ in flows:
            start = torch.zeros_like(state) if start is None else start
            found.append((start, decay * start + state))
        return found, ()

    def once(self, exchange: Callable[[], T]) -> T:
        return exchange()


@dataclass(frozen=True)
class Place:
    """Where a piece lies among the others: what its fold needs again backward.

    Attributes:
        relay: reaches the others.
        decay: A of this piece's map, 0 where a document begins in it or at its first token.
        gate: ``[B]`` whether it continues its predecessor's document; None for always.
        causal: whether states flow to the right only.
        shared: whether one sum stands for what flows left and what flows right.
        known: what the relay wants to know again.
    """

    relay: Relay
    decay: Tensor
    gate: Tensor | None
    causal: bool
    shared: bool
    known: Sequence[Tensor] = ()

    def at_edge(self, state: Tensor) -> Tensor:
        """``state`` as it crosses the edge between this piece and the one before."""
        return state if self.gate is None else broadcast_rows(self.gate, state) * state


def fold(
    relay: Relay, op: StatefulOp, summary: tuple[Tensor, Tensor], segments: Tensor | None, carry: Carry | None
) -> tuple[Tensor, Carry, Place]:
    """The state from outside this piece, the carry behind the last piece, and the piece's place."""
    decay, state = summary
    entries, last = gates([] if segments is None else relay.ends(*edges(segments)), carry)
    gate = entries[relay.rank] if entries else None
    # A plain sum flows to both sides alike where no document ends, so one crosses.
    shared = not op.causal and op.plain_sum and segments is None
    to_right = state if op.causal else state[0]
    place = Place(relay, decay if gate is None else broadcast_rows(gate, to_right) * decay, gate, op.causal, shared)
    flows = [Flow(to_right, None if carry is None else carry.state.to(to_right.dtype), False, relay.leaves)]
    if not op.causal:
        flows.append(Flow(to_right if shared else place.at_edge(state[1]), None, True, False))
    ((past, end), *from_right), known = relay.sweep(place.decay, flows)
    end = to_right.new_empty(0) if end is None else end
    past = place.at_edge(past)
    past = torch.stack([past, from_right[0][0]]) if from_right else past
    return past, Carry(end, last), replace(place, known=known)


def fold_grad(place: Place, grad: Tensor, end: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Adjoint of `fold`: the gradient of this piece's own state, and that of the incoming carry if ``wanted``."""
    to_left = grad if place.causal else grad[0]
    flows = [Flow(place.at_edge(to_left), end, True, wanted)]
    if not place.causal:
        flows.append(Flow(flows[0].state if place.shared else grad[1], None, False, False))
    ((future, start), *from_left), _ = place.relay.sweep(place.decay.conj(), flows, place.known)
    return torch.stack([future, place.at_edge(from_left[0][0])]) if from_left else future, start


def edges(segments: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last document ``[B]`` of a piece."""
    if not segments.shape[1]:
        return (segments.new_full(segments.shape[:1], NO_TOKENS),) * 2
    return segments[:, 0], segments[:, -1].clone()


def gates(ends: list[tuple[Tensor, Tensor]], carry: Carry | None) -> tuple[list[Tensor | None], Tensor | None]:
    """Which pieces continue what lies before them, given their `edges`; and the last document."""
    last = None if carry is None else carry.segment
    found: list[Tensor | None] = []
    for first_id, last_id in ends:
        empty = first_id == NO_TOKENS
        found.append(None if last is None else (first_id == last) | empty)
        last = last_id if last is None else torch.where(empty, last, last_id)
    return found, last


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: StatefulOp,
        relay: Relay,
        segments: Tensor | None,
        carry_segment: Tensor | None,
        carry_state: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        carry = None if carry_state is None else Carry(carry_state, carry_segment)
        if op.causal and relay.size == 1:
            entries, last = gates([] if segments is None else [edges(segments)], carry)
            gate, start = entries[0] if entries else None, carry_state
            if gate is not None and start is not None:
                start = broadcast_rows(gate, start) * start
            past, y, saved, decay, end = op.fused_forward(inputs, segments, start)
            decay = through(decay, segments, end)
            place = Place(relay, decay if gate is None else broadcast_rows(gate, end) * decay, gate, True, False)
            carry_out = Carry(end, last)
        else:

            def exchange() -> tuple[Tensor, Carry, Place]:
                return fold(relay, op, transition(op, inputs, segments), segments, carry)

            past, carry_out, place = relay.once(exchange)
            y, saved = op.apply_state(inputs, segments, past)
        ctx.save_for_backward(segments, past, *inputs, *saved)
        ctx.op, ctx.place, ctx.num_inputs = op, place, len(inputs)
        ctx.carry_dtype = None if carry_state is None else carry_state.dtype
        if segments is not None:
            ctx.mark_non_differentiable(carry_out.segment)
        ctx.set_materialize_grads(False)
        return y, carry_out.state, carry_out.segment if segments is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_carry: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        segments, past, *tensors = ctx.saved_tensors
        inputs, saved = tuple(tensors[: ctx.num_inputs]), tuple(tensors[ctx.num_inputs :])
        with full_precision(past):
            if grad is None:
                grad = ctx.op.apply_state(inputs, segments, past)[0].zero_()
            if ctx.place.relay.size == 1 and ctx.carry_dtype is None:
                to_past = torch.zeros_like(past)  # nothing came before, so nobody asks
            else:
                to_past = ctx.op.incoming_state_grad(inputs, segments, past, saved, grad)
            future, start = fold_grad(ctx.place, to_past, grad_carry, ctx.carry_dtype is not None)
            grads = ctx.op.input_grads(inputs, segments, past, future, saved, grad)
        start_grad = None if ctx.carry_dtype is None or start is None else start.to(ctx.carry_dtype)
        return None, None, None, None, start_grad, *grads


def full_precision(like: Tensor) -> torch.autocast:
    """States and sums keep their dtype under autocast, which would run their matrix products in 16 bits."""
    return torch.autocast(like.device.type, enabled=False)


def scan(
    op: StatefulOp,
    *inputs: Tensor,
    segments: Tensor | None = None,
    carry: Carry | None = None,
    relay: Relay | None = None,
) -> tuple[Tensor, Carry]:
    """Run a stateful mixer over the sequence of which ``inputs`` are one piece.

    Args:
        op: the mixer's two passes and adjoints.
        inputs: activations ``[B, L, ...]`` of this piece, and parameters.
        segments: ``[B, L]`` int64 non-decreasing document ids >= 0 of this piece, or None for one document.
        carry: what came before the whole sequence; the same on every rank.
        relay: reaches the other pieces; None if there are none.

    Returns:
        This piece's output, and the carry behind the whole sequence, the same on every rank (its state is empty where
        the relay knows that nobody asks). The carry's gradient counts once: every rank passes, and receives, the full
        gradient of the carry rather than a summand.
    """
    if segments is not None and segments.shape != inputs[0].shape[:2]:
        raise InputError("segments", list(segments.shape), f"[batch, tokens] = {list(inputs[0].shape[:2])}")
    if torch.compiler.is_compiling() and (relay is None or relay.size == 1):
        from . import library  # which eager code can do without

        return library.alone(op, inputs, segments, carry)
    state, segment = carry if carry is not None else (None, None)
    with full_precision(inputs[0]):
        alone = relay is None or relay.size == 1
        y, end, last = _Scan.apply(
            op.resolve_backend(inputs), Alone() if alone else relay, segments, segment, state, *inputs
        )
    return y, Carry(end, last if last is not None else segment)


def exclusive_chunk_scan(
    decay: Tensor | None, state: Tensor, start: Tensor, gate: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """The state that enters each of ``n`` neighbouring pieces: the state law, for all pieces at once.

    Args:
        decay: ``[1 or B, n, ...]`` per piece, broadcasting against ``state``; None where every ``A`` is 1.
        state: ``[B, n, ...]`` per piece.
        start: ``[B, ...]``, the state before the first piece (behind the last one if ``reverse``).
        gate: ``[B, n]`` bool, whether piece i takes what piece i - 1 left (i + 1 if ``reverse``); None for always.
        reverse: from right to left.

    Returns:
        ``[B, n + 1, ...]`` in fp64 (complex128): row i enters piece i; the row after the last piece is what leaves it
        (row 0 if ``reverse``, the rows i + 1 entering the pieces). Logarithmic depth; sums in fp64 keep a million
        terms.
    """
    wide = torch.complex128 if state.is_complex() else torch.float64
    if reverse:
        flipped = exclusive_chunk_scan(
            None if decay is None else decay.flip(1),
            state.flip(1),
            start,
            None if gate is None else gate.flip(1),
        )
        return flipped.flip(1)
    total = torch.cat([start.to(wide).unsqueeze(1), state.to(wide)], dim=1)
    if decay is None and gate is None:
        return total.cumsum(dim=1)
    trailing = (1,) * (state.dim() - 2)
    ones = torch.ones(1, state.shape[1], *trailing, dtype=wide, device=state.device)
    factor = ones if decay is None else decay.to(wide)
    if gate is not None:
        gate = gate.to(wide).view(*gate.shape, *trailing)
        factor = factor * gate
    # The first row is the start itself: a piece with A = 0, B = start.
    factor = torch.cat([torch.zeros_like(factor[:, :1]), factor], dim=1)
    step = 1
    while step < total.shape[1]:
        total = torch.cat([total[:, :step], total[:, step:] + factor[:, step:] * total[:, :-step]], dim=1)
        factor = torch.cat([factor[:, :step], factor[:, step:] * factor[:, :-step]], dim=1)
        step *= 2
    if gate is not None:
        total = torch.cat([total[:, :-1] * gate, total[:, -1:]], dim=1)
    return total
