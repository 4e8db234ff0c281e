"""Linear attention in C++ for CPUs (`cpu.cpp`): a head's tokens are read once in each direction, where they lie.

Nothing is saved for backward that `Chunked` does not save: the states are made again.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import native
from ..backends import is_traced
from ..scan import FusedForward
from .chunked import Chunked

SOURCE = Path(__file__).with_name("cpu.cpp")
DTYPES = (torch.float32, torch.bfloat16)
MAX_STATE = 1 << 16  # elements, of 16 bytes: larger states leave a processor's cache


def unsupported_reason(device: str, q_dtype: torch.dtype, v_dtype: torch.dtype, width: int, values: int) -> str:
    """Why the C++ kernels do not serve ``q [..., width]`` and ``v [..., values]``; "" if they do."""
    if not 0 < width * values <= MAX_STATE:
        return f"K * V in 1 to {MAX_STATE}, not {width} * {values}"
    return native.unsupported_reason(SOURCE, device, q_dtype, v_dtype)


@dataclass(frozen=True)
class Native(Chunked):
    """`Chunked` with its causal passes in C++, for fp32 and bf16; states and sums are fp32, blocks add up in fp64.

    Not causal, a document is one product ``K^T V``, which `Chunked` leaves to the matrix product of PyTorch.
    """

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self._serves(inputs):
            return super().local_transition(inputs, segments)
        state = self._state(inputs)
        self._call(inputs, segments, end=state)
        return self.decay_over(inputs[0].shape[1], state), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self._serves(inputs):
            return super().apply_state(inputs, segments, past)
        return self._forward(inputs, segments, past, None)

    def fused_forward(self, inputs: tuple[Tensor, ...], segments: Tensor | None, start: Tensor | None) -> FusedForward:
        if not self._serves(inputs):
            return super().fused_forward(inputs, segments, start)
        end = self._state(inputs)
        past = torch.zeros_like(end) if start is None else start.to(end.dtype)
        y, saved = self._forward(inputs, segments, past, end)
        decay = self.decay_over(inputs[0].shape[1], end)
        return FusedForward(past, y, saved, decay, end)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        if not self._serves(inputs):
            return super().incoming_state_grad(inputs, segments, past, saved, grad)
        to_past = self._state(inputs)
        self._call(inputs, segments, grad=grad, saved=saved, end=to_past)
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
        if not self._serves(inputs):
            return super().input_grads(inputs, segments, past, future, saved, grad)
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        self._call(inputs, segments, grad=grad, saved=saved, grads=grads, past=past, future=future)
        return grads

    def _serves(self, inputs: tuple[Tensor, ...]) -> bool:
        return self.causal and all(x.dtype in DTYPES for x in inputs)

    def _state(self, inputs: tuple[Tensor, ...]) -> Tensor:
        q, _, v = inputs
        batch, _, heads, width = q.shape
        return q.new_empty(batch, heads, width, v.shape[-1] + self.normalize, dtype=torch.float32)

    def _forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor, end: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = torch.empty_like(inputs[2], memory_format=torch.contiguous_format)
        saved = (y, past.new_empty(*y.shape[:-1], 1)) if self.normalize else ()
        self._call(inputs, segments, y=y, saved=saved, past=past, end=end)
        return y, saved

    def _call(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        *,
        y: Tensor | None = None,
        grad: Tensor | None = None,
        saved: tuple[Tensor, ...] = (),
        grads: tuple[Tensor | None, ...] = (None, None, None),
        past: Tensor | None = None,
        future: Tensor | None = None,
        end: Tensor | None = None,
    ) -> None:
        """Run `cpu.cpp`, backward if there is a ``grad``; outputs are None where they are not wanted."""
        if is_traced(inputs[0]):
            return
        q, _, v = inputs
        state = (*q.shape[:1], *q.shape[2:], v.shape[-1] + self.normalize)
        y, divisor = saved or (y, None)
        ends = [x if x is None else x.contiguous() for x in (past, future)]
        assert all(x is None or (x.shape == state and x.dtype == torch.float32) for x in (*ends, end))
        tokens = native.rows(*inputs, grad, y, *grads)
        begins = native.begins(segments)
        decays = None if self.decay is None else torch.tensor(self.decay, dtype=torch.float64)
        steps = [step * (x.itemsize if x is not None else 0) for x in tokens for step in native.strides(x, dims=3)]
        native.load(SOURCE).linear_attention(
            grad is not None,
            self.normalize,
            native.integers(*q.shape, v.shape[-1]),
            native.pointers(*tokens, begins, *ends, end, divisor, decays),
            native.integers(*steps),
            (ctypes.c_uint8 * 8)(*(x is not None and x.dtype == torch.bfloat16 for x in tokens)),
            ctypes.c_float(self.scale),
            ctypes.c_float(self.eps),
        )
