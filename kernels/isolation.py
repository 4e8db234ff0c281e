"""Keeps what is not finite in its own document, where an implementation's documents share products with masks.

0 times NaN is NaN: such a product carries it from one document to others. Where a result is not finite, `Isolated`
computes it a second time, with zeros in the place of all that is not finite. Documents that have nothing of the kind
get the results of this second run, which are those that they would have had beside finite ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import is_traced
from .state import FusedForward, StatefulOp
from .transition import Transition


@dataclass(frozen=True)
class Isolated(StatefulOp):
    """``op`` with documents that are isolated on CPUs. A GPU is not waited for: there, what is not finite spreads.

    Attributes:
        op: an implementation whose inputs are all ``[B, L, ...]``.
        log_decay: the number of the input that may be -inf, a decay of 0.
    """

    op: StatefulOp
    log_decay: int

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.op.causal

    @property
    def plain_sum(self) -> bool:  # type: ignore[override]
        return self.op.plain_sum

    @property
    def transition(self) -> type[Transition]:  # type: ignore[override]
        return self.op.transition

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        transition, state = self.op.local_transition(inputs, segments)
        spoilt = self._spoilt((transition, state), segments, inputs)
        if spoilt is None:
            return transition, state
        other, clean = self.op.local_transition(self._finite(inputs), segments)
        ends = spoilt[:, -1] if self.causal else torch.stack([spoilt[:, -1], spoilt[:, 0]])
        return _choose(spoilt[:, -1], transition, other), _choose(ends, state, clean)

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, saved = self.op.apply_state(inputs, segments, initial)
        spoilt = self._spoilt((y,), segments, inputs, before=initial)
        if spoilt is not None:
            y = _choose(spoilt, y, self.op.apply_state(self._finite(inputs), segments, _numbers(initial))[0])
        return y, saved

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        found = self.op.fused_forward(inputs, segments, initial)
        spoilt = self._spoilt((found.y, found.final), segments, inputs, before=found.initial)
        if spoilt is None:
            return found
        clean = self.op.fused_forward(self._finite(inputs), segments, _numbers(found.initial))
        transition, last = found.transition, spoilt[:, -1]
        if transition is not None and clean.transition is not None:
            transition = _choose(last, transition, clean.transition)
        y, final = _choose(spoilt, found.y, clean.y), _choose(last, found.final, clean.final)
        return FusedForward(found.initial, y, found.saved, transition, final)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        own = self.op.incoming_state_grad(inputs, segments, initial, saved, grad)
        spoilt = self._spoilt((own,), segments, (*inputs, grad), before=initial)
        if spoilt is None:
            return own
        finite, start = self._finite(inputs), _numbers(initial)
        _, saved = self.op.apply_state(finite, segments, start)
        clean = self.op.incoming_state_grad(finite, segments, start, saved, _numbers(grad))
        ends = spoilt[:, 0] if self.causal else torch.stack([spoilt[:, 0], spoilt[:, -1]])
        return _choose(ends, own, clean)

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        grads = self.op.input_grads(inputs, segments, initial, final_grad, saved, grad)
        spoilt = self._spoilt(grads, segments, (*inputs, grad), before=initial, after=final_grad)
        if spoilt is None:
            return grads
        finite, start = self._finite(inputs), _numbers(initial)
        _, saved = self.op.apply_state(finite, segments, start)
        clean = self.op.input_grads(finite, segments, start, _numbers(final_grad), saved, _numbers(grad))
        return _choose_each(spoilt, grads, clean)

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
        rest = final_grad, need_initial_grad
        grads, own = self.op.fused_backward(inputs, segments, initial, transition, saved, grad, *rest)
        after = final_grad
        if after is not None and not self.causal:
            after = torch.stack([after, torch.zeros_like(after)])
        spoilt = self._spoilt((*grads, own), segments, (*inputs, grad), before=initial, after=after)
        if spoilt is None:
            return grads, own
        finite, start = self._finite(inputs), _numbers(initial)
        _, saved = self.op.apply_state(finite, segments, start)
        transition = None if transition is None else _numbers(transition)
        end = None if final_grad is None else _numbers(final_grad)
        clean, other = self.op.fused_backward(
            finite, segments, start, transition, saved, _numbers(grad), end, need_initial_grad
        )
        if own is not None and other is not None:
            own = _choose(spoilt[:, 0], own, other)
        return _choose_each(spoilt, grads, clean), own

    def _spoilt(
        self,
        results: Sequence[Tensor | None],
        segments: Tensor | None,
        tokens: tuple[Tensor, ...],
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> Tensor | None:
        """The tokens of documents in which something is not finite, ``[B, L]`` bool; None where all results are finite.

        Args:
            results: what the operator has computed.
            segments: ``[B, L]`` or None.
            tokens: all that was given for each token, the inputs first.
            before, after: states, and their gradients, that enter from the left and from the right.
        """
        if segments is None or not segments.shape[1] or not segments.is_cpu or is_traced(segments):
            return None
        # A sum, as it needs no other tensor; one that overflows costs a second run.
        if all(x is None or bool(x.sum(dtype=_wide(x)).isfinite()) for x in results):
            return None
        bad = torch.zeros_like(segments, dtype=torch.bool)
        for number, x in enumerate(tokens):
            good = x.isfinite() | (x == -torch.inf) if number == self.log_decay < len(tokens) - 1 else x.isfinite()
            bad |= ~good.flatten(2).all(-1)
        for state, token in ((before, 0), (after, -1)):
            if state is not None:
                ends = [state] if self.causal else list(state)
                for one, place in zip(ends, (token, -1 - token), strict=False):
                    bad[:, place] |= ~one.isfinite().flatten(1).all(-1)
        starts = torch.zeros_like(segments)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        document = starts.cumsum(1)
        return torch.zeros_like(segments).scatter_add_(1, document, bad.long()).gather(1, document) > 0

    def _finite(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(_numbers(x, -torch.inf if n == self.log_decay else 0.0) for n, x in enumerate(inputs))


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _numbers(x: Tensor, least: float = 0.0) -> Tensor:
    """``x`` with 0 in the place of NaN and infinity, and ``least`` in that of -infinity."""
    return x.nan_to_num(0.0, 0.0, least)


def _choose(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """``one`` where ``mask`` holds, which has the first dimensions of ``one``."""
    return torch.where(mask.view(*mask.shape, *(1 for _ in range(one.dim() - mask.dim()))), one, other)


def _choose_each(
    mask: Tensor, ones: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    pairs = zip(ones, others, strict=True)
    return tuple(None if x is None or other is None else _choose(mask, x, other) for x, other in pairs)
