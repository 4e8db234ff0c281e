"""Element-wise attention in C++ for CPUs (`cpu.cpp`): each pass walks the tokens once, and saves only states.

Saved for backward are the states that enter the blocks of 64 tokens, ``2 (t+1) / 64`` of a tensor ``[B, L, D]``;
outputs and denominators are made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..backends import is_traced
from ..scan import FusedForward
from .chunked import Chunked

SOURCE = Path(__file__).with_name("cpu.cpp")
BLOCK = 64  # tokens between the states that are saved, as in cpu.cpp
ORDERS = (2, 4, 6, 8)
LANES = 16  # channels are worked on by so many or by a divisor of it; others are filled up


def unsupported_reason(device: str, dtype: torch.dtype, order: int) -> str:
    """Why the C++ kernels do not serve such inputs; "" if they do."""
    if order not in ORDERS:
        return f"one of the orders {ORDERS}, not {order}"
    return native.unsupported_reason(SOURCE, device, dtype, define=f"ORDER={order}")


@dataclass(frozen=True)
class Native(Chunked):
    """The passes of `Chunked` for ``[B, L, D]`` in fp32 or bf16; states and sums are fp32, blocks add up in fp64."""

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        state = self._state(inputs[0])
        self._forward(inputs, segments, None, None, state, None)
        return state.new_ones(1, 1, 1, 1), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, states = torch.empty_like(inputs[0], memory_format=torch.contiguous_format), self._states(inputs[0])
        self._forward(inputs, segments, past, y, None, states)
        return y, (states,)

    def fused_forward(self, inputs: tuple[Tensor, ...], segments: Tensor | None, start: Tensor | None) -> FusedForward:
        state = self._state(inputs[0])
        past = torch.zeros_like(state) if start is None else start.to(state.dtype)
        y, states = torch.empty_like(inputs[0], memory_format=torch.contiguous_format), self._states(inputs[0])
        self._forward(inputs, segments, past, y, state, states)
        return FusedForward(past, y, (states,), state.new_ones(1, 1, 1, 1), state)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        to_past = torch.zeros_like(past, memory_format=torch.contiguous_format)  # an empty piece writes nothing
        self._call(1, inputs, grad, (None,) * 4, segments, past, None, to_past, saved[0])
        return to_past

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        future: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        self._call(1, inputs, grad, (None, *grads), segments, past, future, None, saved[0])
        return grads

    def _forward(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor | None,
        y: Tensor | None,
        end: Tensor | None,
        states: Tensor | None,
    ) -> None:
        self._call(0, inputs, None, (y, None, None, None), segments, past, None, end, states)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """A state's shape, or that of both directions' states, for inputs like ``x [B, L, D]``."""
        sides = () if self.causal else (2,)
        return *sides, x.shape[0], 2, self.order + 1, x.shape[2]

    def _state(self, x: Tensor) -> Tensor:
        return x.new_zeros(self._shape(x), dtype=torch.float32)  # an empty piece writes nothing

    def _states(self, x: Tensor) -> Tensor:
        blocks = -(-x.shape[1] // BLOCK) if self.causal else 0
        width = -(-x.shape[2] // LANES) * LANES
        return x.new_empty(x.shape[0], blocks, 2, self.order + 1, width, dtype=torch.float32)

    def _call(
        self,
        gradients: int,
        inputs: tuple[Tensor, ...],
        grad: Tensor | None,
        outputs: tuple[Tensor | None, ...],
        segments: Tensor | None,
        past: Tensor | None,
        future: Tensor | None,
        end: Tensor | None,
        states: Tensor | None,
    ) -> None:
        """Run `cpu.cpp`; see there for the arguments, each of which may be None where it is not wanted."""
        if is_traced(inputs[0]):
            return
        batch, length, width = inputs[0].shape
        if width % LANES:
            self._call_filled(gradients, inputs, grad, outputs, segments, past, future, end, states)
            return
        ends = [x if x is None else x.contiguous() for x in (past, future)]
        assert all(x is None or x.shape == inputs[0].shape for x in (*inputs, grad, *outputs))
        assert all(x is None or (x.shape == self._shape(inputs[0]) and x.dtype == torch.float32) for x in (*ends, end))
        tokens = native.rows(*inputs, grad, *outputs)
        begins = native.begins(segments)
        native.load(SOURCE, f"ORDER={self.order}").elementwise(
            inputs[0].dtype == torch.bfloat16,
            self.causal,
            gradients,
            native.integers(batch, length, width),
            native.pointers(*tokens, begins, *ends, end, states if self.causal else None),
            native.integers(*native.strides(*tokens)),
        )

    def _call_filled(
        self,
        gradients: int,
        inputs: tuple[Tensor, ...],
        grad: Tensor | None,
        outputs: tuple[Tensor | None, ...],
        segments: Tensor | None,
        past: Tensor | None,
        future: Tensor | None,
        end: Tensor | None,
        states: Tensor | None,
    ) -> None:
        """`_call` with the channels filled up to whole vectors by zeros, which stay finite and are cut off again."""

        def filled(x: Tensor | None) -> Tensor | None:
            return None if x is None else F.pad(x, (0, -x.shape[-1] % LANES))

        wanted = (*outputs, end)
        made = [filled(x) for x in wanted]
        wide_inputs = tuple(F.pad(x, (0, -x.shape[-1] % LANES)) for x in inputs)
        wide_ends = filled(past), filled(future), made[-1]
        self._call(gradients, wide_inputs, filled(grad), tuple(made[:-1]), segments, *wide_ends, states)
        for x, wide in zip(wanted, made, strict=True):
            if x is not None and wide is not None:
                x.copy_(wide[..., : x.shape[-1]])
