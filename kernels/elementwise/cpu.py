"""Element-wise attention in C++ for CPUs (`cpu.cpp`): each pass reads the tokens once.

Saved for the backward pass are the states before the chunks of 64 tokens, ``2 (t+1) / 64`` of a tensor ``[B, L, D]``;
outputs and denominators are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..backends import is_traced
from ..state import FusedForward
from .chunked import Chunked

SOURCE = Path(__file__).with_name("cpu.cpp")
CHUNK = 64  # tokens between the saved states, as in cpu.cpp
ORDERS = (2, 4, 6, 8)
LANES = 16  # channels are padded to a multiple of this, which every processor's vector width divides


def unsupported_reason(device: str, dtype: torch.dtype, order: int) -> str:
    """Why the C++ kernels do not serve such inputs; "" if they do."""
    if order not in ORDERS:
        return f"one of the orders {ORDERS}, not {order}"
    return native.unsupported_reason(SOURCE, device, dtype, define=f"ORDER={order}")


@dataclass(frozen=True)
class Native(Chunked):
    """The passes of `Chunked` for ``[B, L, D]`` in fp32 or bf16; states and sums are fp32, sums over chunks fp64."""

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        final = self._state(inputs[0])
        if not is_traced(inputs[0]):
            arguments = self._arguments(inputs, segments, final=final)
            native.load(SOURCE, f"ORDER={self.order}").elementwise(*arguments)
        return final.new_ones(1, 1, 1, 1), _unpadded(final, inputs[0])

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, states = _output(inputs[0]), self._chunk_states(inputs[0])
        if not is_traced(inputs[0]):
            arguments = self._arguments(inputs, segments, y=y, initial=initial, states=states)
            native.load(SOURCE, f"ORDER={self.order}").elementwise(*arguments)
        return _unpadded(y, inputs[0]), (states,)

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        final, y, states = self._state(inputs[0]), _output(inputs[0]), self._chunk_states(inputs[0])
        initial = torch.zeros_like(_unpadded(final, inputs[0])) if initial is None else initial.to(final.dtype)
        if not is_traced(inputs[0]):
            arguments = self._arguments(inputs, segments, y=y, initial=initial, final=final, states=states)
            native.load(SOURCE, f"ORDER={self.order}").elementwise(*arguments)
        y, final = _unpadded(y, inputs[0]), _unpadded(final, inputs[0])
        return FusedForward(initial, y, (states,), final.new_ones(1, 1, 1, 1), final)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        initial_grad = self._state(inputs[0])
        if not is_traced(grad):
            arguments = self._arguments(
                inputs, segments, grad=grad, initial=initial, final=initial_grad, states=saved[0]
            )
            native.load(SOURCE, f"ORDER={self.order}").elementwise(*arguments)
        return _unpadded(initial_grad, grad)

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        grads = tuple(_output(x) for x in inputs)
        if not is_traced(grad):
            arguments = self._arguments(
                inputs, segments, grad=grad, grads=grads, initial=initial, final_grad=final_grad, states=saved[0]
            )
            native.load(SOURCE, f"ORDER={self.order}").elementwise(*arguments)
        return tuple(_unpadded(x, grad) for x in grads)

    def _arguments(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        *,
        grad: Tensor | None = None,
        y: Tensor | None = None,
        grads: tuple[Tensor | None, ...] = (None, None, None),
        initial: Tensor | None = None,
        final_grad: Tensor | None = None,
        final: Tensor | None = None,
        states: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The arguments of `elementwise` in `cpu.cpp`: forward, or backward given ``grad [B, L, D]``.

        Outputs that are None are not computed; all have padded channels. Backward, ``final`` receives the gradient of
        the initial state.
        """
        assert all(x is None or x.shape == inputs[0].shape for x in (*inputs, grad))
        padded = [None if x is None else _padded(x) for x in (*inputs, grad)]
        tokens = native.last_dim_contiguous(*padded, y, *grads)
        starts = native.document_starts(segments)
        initial, final_grad = (None if x is None else _padded(x).contiguous() for x in (initial, final_grad))
        batch, length, width = inputs[0].shape
        for state in (initial, final_grad, final):
            assert state is None or (state.shape == self._state_shape(inputs[0]) and state.dtype == torch.float32)
        return (
            inputs[0].dtype == torch.bfloat16,
            self.causal,
            grad is not None,
            native.integers(batch, length, width + -width % LANES),
            native.Pointers(*tokens, starts, initial, final_grad, final, states if self.causal else None),
            native.integers(*native.strides(*tokens)),
        )

    def _state_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of a padded state, or of both directions' states, for inputs like ``x [B, L, D]``."""
        directions = () if self.causal else (2,)
        return *directions, x.shape[0], 2, self.order + 1, _padded_width(x)

    def _state(self, x: Tensor) -> Tensor:
        return x.new_zeros(self._state_shape(x), dtype=torch.float32)  # for an empty shard nothing is written

    def _chunk_states(self, x: Tensor) -> Tensor:
        """The states before the chunks, uninitialized: ``[B, N, 2, t+1, D]`` padded, N = 0 if not causal."""
        num_chunks = -(-x.shape[1] // CHUNK) if self.causal else 0
        return native.empty(x, x.shape[0], num_chunks, 2, self.order + 1, _padded_width(x), dtype=torch.float32)


def _padded_width(x: Tensor) -> int:
    return x.shape[-1] + -x.shape[-1] % LANES


def _padded(x: Tensor) -> Tensor:
    """``x`` with channels padded to whole vectors by zeros, for which every result is finite."""
    return F.pad(x, (0, -x.shape[-1] % LANES)) if x.shape[-1] % LANES else x


def _output(x: Tensor) -> Tensor:
    """An output like ``x [B, L, D]``, uninitialized, with padded channels."""
    return native.empty(x, *x.shape[:2], _padded_width(x))


def _unpadded(x: Tensor, like: Tensor) -> Tensor:
    """The channels of ``x`` that ``like [.., D]`` has."""
    return x if x.shape[-1] == like.shape[-1] else x[..., : like.shape[-1]].contiguous()
