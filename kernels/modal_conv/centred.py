"""Modal long convolution over both sides: one causal convolution from the left and one, with its own amplitudes,
from the right.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..scan import StatefulOp
from .chunked import ModalConv


class CentredModalConv(StatefulOp):
    """The operator for `span.scan`: inputs ``x [B, L, D]``, ``log_decay, angle [D, N]`` and ``re, im [2, D, N]``.

    ``y_i = sum_{m>=0} h_0[m] x_{i-m} + h_1[m] x_{i+m}``, with the kernels of `ModalConv` for ``re[0], im[0]`` and
    ``re[1], im[1]``. States ``[2, B, D, N]`` complex: from the left, from the right.
    """

    causal = False
    plain_sum = False

    def __init__(self, one_way: StatefulOp | None = None) -> None:
        self._one_way = one_way or ModalConv()

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        return CentredModalConv(self._one_way.resolve_backend(inputs))

    def _sides(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None
    ) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Inputs and documents of the causal convolution of each side; the right one reads backwards."""
        x, log_decay, angle, re, im = inputs
        from_left = (x, log_decay, angle, re[0], im[0])
        from_right = (x.flip(1), log_decay, angle, re[1], im[1])
        return [(from_left, segments), (from_right, None if segments is None else segments.flip(1))]

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        (decay, to_right), (_, to_left) = (
            self._one_way.local_transition(*side) for side in self._sides(inputs, segments)
        )
        return decay, torch.stack([to_right, to_left])

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (left, left_saved), (right, right_saved) = (
            self._one_way.apply_state(*side, start)
            for side, start in zip(self._sides(inputs, segments), past, strict=True)
        )
        return left + right.flip(1), (*left_saved, *right_saved)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        return torch.stack(
            [
                self._one_way.incoming_state_grad(*side, start, (kept,), upstream)
                for side, start, kept, upstream in zip(
                    self._sides(inputs, segments), past, saved, (grad, grad.flip(1)), strict=True
                )
            ]
        )

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        future: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        (dx, *ways), (dx_flipped, *back) = (
            cast(tuple[Tensor, ...], self._one_way.input_grads(*side, start, end, (kept,), upstream))
            for side, start, end, kept, upstream in zip(
                self._sides(inputs, segments), past, future, saved, (grad, grad.flip(1)), strict=True
            )
        )
        ddecay, dangle = ways[0] + back[0], ways[1] + back[1]
        dre, dim = torch.stack([ways[2], back[2]]), torch.stack([ways[3], back[3]])
        return dx + dx_flipped.flip(1), ddecay, dangle, dre, dim
