"""Bidirectional modal convolution: a causal one over the tokens, and one over the tokens in reverse order."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..state import StatefulOp


class Centred(StatefulOp):
    """The passes of `CentredModalConv`, each as two passes of a causal implementation.

    Args:
        from_left, from_right: two objects of an implementation of `ModalConv`, which may keep what one pass computes
            for the next.
    """

    causal = False

    def __init__(self, from_left: StatefulOp, from_right: StatefulOp) -> None:
        self._ways = from_left, from_right

    def _sides(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None
    ) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Inputs and document ids of the causal convolution from the left, and of the one from the right, reversed."""
        x, log_decay, angle, re, im = inputs
        from_left = (x, log_decay, angle, re[0], im[0])
        from_right = (x.flip(1), log_decay, angle, re[1], im[1])
        return [(from_left, segments), (from_right, None if segments is None else segments.flip(1))]

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        (decay, to_right), (_, to_left) = (
            one_way.local_transition(*side)
            for one_way, side in zip(self._ways, self._sides(inputs, segments), strict=True)
        )
        return decay, torch.stack([to_right, to_left])

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (left, left_saved), (right, right_saved) = (
            one_way.apply_state(*side, start)
            for one_way, side, start in zip(self._ways, self._sides(inputs, segments), initial, strict=True)
        )
        return left + right.flip(1), (*left_saved, *right_saved)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        return torch.stack(
            [
                one_way.incoming_state_grad(*side, start, (states,), upstream)
                for one_way, side, start, states, upstream in zip(
                    self._ways, self._sides(inputs, segments), initial, saved, (grad, grad.flip(1)), strict=True
                )
            ]
        )

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        (dx, *ways), (dx_flipped, *back) = (
            cast(tuple[Tensor, ...], one_way.input_grads(*side, start, end, (states,), upstream))
            for one_way, side, start, end, states, upstream in zip(
                self._ways,
                self._sides(inputs, segments),
                initial,
                final_grad,
                saved,
                (grad, grad.flip(1)),
                strict=True,
            )
        )
        ddecay, dangle = ways[0] + back[0], ways[1] + back[1]
        dre, dim = torch.stack([ways[2], back[2]]), torch.stack([ways[3], back[3]])
        return dx + dx_flipped.flip(1), ddecay, dangle, dre, dim
