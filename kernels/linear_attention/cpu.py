"""Linear attention in C++ for CPUs (`cpu.cpp`): each pass reads a head's tokens once in each direction, without copies.

Saved for the backward pass is what `Chunked` saves; states are recomputed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..backends import is_traced
from ..state import FusedForward
from .gated import GatedChunked

SOURCE = Path(__file__).with_name("cpu.cpp")
DTYPES = (torch.float32, torch.bfloat16)
MAX_STATE = 1 << 16  # elements of a state, 16 bytes each: larger states do not fit a processor's cache


def unsupported_reason(
    device: str, q_dtype: torch.dtype, v_dtype: torch.dtype, width: int, values: int, gated: bool = False
) -> str:
    """Why the C++ kernels do not serve ``q [..., width]`` and ``v [..., values]``; "" if they do."""
    if not 0 < width * values <= MAX_STATE:
        return f"K * V in 1 to {MAX_STATE}, not {width} * {values}"
    return native.unsupported_reason(SOURCE, device, q_dtype, v_dtype)


@dataclass(frozen=True)
class Native(GatedChunked):
    """`Chunked` with its causal passes in C++, for fp32 and bf16; states and sums are fp32, chunks are summed in fp64.

    Non-causal passes are those of `Chunked`: a document is one matrix product ``K^T V``.
    """

    @property
    def isolates(self) -> bool:  # type: ignore[override]
        return self.causal

    def takes_groups(self, inputs: tuple[Tensor, ...]) -> bool:
        return self._is_supported(inputs) or super().takes_groups(inputs)

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self._is_supported(inputs):
            return super().local_transition(inputs, segments)
        final = self._state(inputs)
        if not is_traced(final):
            native.load(SOURCE).linear_attention(*self._arguments(inputs, segments, final=final))
        return self.decay_over(inputs, final), final

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self._is_supported(inputs):
            return super().apply_state(inputs, segments, initial)
        y, saved = self._empty_outputs(inputs)
        if not is_traced(y):
            arguments = self._arguments(inputs, segments, y=y, saved=saved, initial=initial)
            native.load(SOURCE).linear_attention(*arguments)
        return y, saved

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        if not self._is_supported(inputs):
            return super().fused_forward(inputs, segments, initial)
        final, (y, saved) = self._state(inputs), self._empty_outputs(inputs)
        initial = torch.zeros_like(final) if initial is None else initial.to(final.dtype)
        if not is_traced(y):
            arguments = self._arguments(inputs, segments, y=y, saved=saved, initial=initial, final=final)
            native.load(SOURCE).linear_attention(*arguments)
        return FusedForward(initial, y, saved, self.decay_over(inputs, final), final)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        if not self._is_supported(inputs):
            return super().incoming_state_grad(inputs, segments, initial, saved, grad)
        initial_grad = self._state(inputs)
        if not is_traced(grad):
            arguments = self._arguments(inputs, segments, grad=grad, saved=saved, final=initial_grad)
            native.load(SOURCE).linear_attention(*arguments)
        return initial_grad

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        if not self._is_supported(inputs):
            return super().input_grads(inputs, segments, initial, final_grad, saved, grad)
        if is_traced(grad):
            return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        q, k, v, *gates = inputs
        # A group of heads that several tasks share has a gradient of q and k from each.
        tasks = max(1, v.shape[2] // max(1, q.shape[2]) // self._task_heads(inputs))
        of_tasks = (*q.shape[:2], q.shape[2] * tasks, q.shape[3])
        dq, dk = (x.new_empty(of_tasks, dtype=x.dtype if tasks == 1 else torch.float32) for x in (q, k))
        dv = torch.empty_like(v, memory_format=torch.contiguous_format)
        gate_grads = [v.new_empty(x.shape, dtype=torch.float32) for x in gates]
        arguments = self._arguments(
            inputs, segments, grad=grad, saved=saved, grads=(dq, dk, dv), gate_grads=gate_grads, initial=initial,
            final_grad=final_grad,
        )  # fmt: skip
        native.load(SOURCE).linear_attention(*arguments)
        if tasks > 1:
            dq, dk = (x.unflatten(2, (-1, tasks)).sum(3).to(y.dtype) for x, y in ((dq, q), (dk, k)))
        return dq, dk, dv, *(grad.to(x.dtype) for grad, x in zip(gate_grads, gates, strict=True))

    def _is_supported(self, inputs: tuple[Tensor, ...]) -> bool:
        return self.causal and all(x.dtype in DTYPES for x in inputs[:3])

    def _task_heads(self, inputs: tuple[Tensor, ...]) -> int:
        """Consecutive heads that a thread processes together."""
        q, _, v, *_ = inputs
        sizes = q.shape[0], v.shape[2], q.shape[2], q.shape[3], v.shape[3] + self.normalize
        return int(native.load(SOURCE).linear_attention_heads(*map(ctypes.c_int64, sizes)))

    def _state(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """A state, uninitialized: fp32 ``[B, H, K, V]``, or ``[B, H, K, V + 1]`` with ``normalize``."""
        q, _, v, *_ = inputs
        sizes = q.shape[0], v.shape[2], q.shape[3], v.shape[3] + self.normalize
        return q.new_empty(sizes, dtype=torch.float32)

    def _empty_outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Uninitialized: y, and what is saved, with ``normalize`` y and the fp32 divisors ``[B, L, H, 1]``."""
        y = torch.empty_like(inputs[2], memory_format=torch.contiguous_format)
        return y, (y, y.new_empty(*y.shape[:-1], 1, dtype=torch.float32)) if self.normalize else ()

    def _arguments(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        *,
        y: Tensor | None = None,
        grad: Tensor | None = None,
        saved: tuple[Tensor, ...] = (),
        grads: tuple[Tensor | None, ...] = (None, None, None),
        gate_grads: Sequence[Tensor] = (),
        initial: Tensor | None = None,
        final_grad: Tensor | None = None,
        final: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The arguments of `linear_attention` in `cpu.cpp`: forward, or backward given ``grad [B, L, H, V]``.

        Outputs that are None are not computed. Backward, ``final`` receives the gradient of the initial state.
        """
        q, k, v, *gates = inputs
        y, divisor = saved or (y, None)
        initial, final_grad = (None if x is None else x.contiguous() for x in (initial, final_grad))
        batch, length, groups, width = q.shape
        heads, values = v.shape[2:]
        state_shape = (batch, heads, width, values + self.normalize)
        for state in (initial, final_grad, final):
            assert state is None or (state.shape == state_shape and state.dtype == torch.float32)
        tokens = native.last_dim_contiguous(q, k, v, grad, y, *grads)
        log_decay = gates[0].float().contiguous() if gates else None
        gate_grad = gate_grads[0] if gate_grads else None
        starts = native.document_starts(segments)
        decays = None if self.decay is None else torch.tensor(self.decay, dtype=torch.float64)
        steps = [step * (x.itemsize if x is not None else 0) for x in tokens for step in native.strides(x, dims=3)]
        return (
            grad is not None,
            self.normalize,
            native.integers(batch, length, heads, groups, width, values, self._task_heads(inputs)),
            native.Pointers(*tokens, starts, initial, final_grad, final, divisor, decays, log_decay, gate_grad),
            native.integers(*steps),
            (ctypes.c_uint8 * 8)(*(x is not None and x.dtype == torch.bfloat16 for x in tokens)),
            ctypes.c_float(self.scale),
            ctypes.c_float(self.eps),
        )
