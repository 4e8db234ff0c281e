"""Groups of heads that share q and k, for implementations that take q and k of every head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..state import FusedForward, StatefulOp
from .settings import per_head


@dataclass(frozen=True)
class Grouped(StatefulOp):
    """``op`` with q and k repeated for the heads of each group; their gradients are sums over these.

    Attributes:
        op: an implementation of linear attention.
    """

    op: StatefulOp

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.op.causal

    @property
    def plain_sum(self) -> bool:  # type: ignore[override]
        return self.op.plain_sum

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.op.local_transition(_per_head(inputs), segments)

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.op.apply_state(_per_head(inputs), segments, initial)

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        return self.op.fused_forward(_per_head(inputs), segments, initial)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        return self.op.incoming_state_grad(_per_head(inputs), segments, initial, saved, grad)

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        dq, dk, *rest = self.op.input_grads(_per_head(inputs), segments, initial, final_grad, saved, grad)
        groups = inputs[0].shape[2]
        of_groups = (x if x is None else x.unflatten(2, (groups, -1)).sum(3) for x in (dq, dk))
        return *of_groups, *rest


def _per_head(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    q, k, v, *rest = inputs
    return per_head(q, v), per_head(k, v), v, *rest
