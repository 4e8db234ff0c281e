"""The delta rule in C++ for CPUs (`cpu.cpp`), with one decay a head: a thread keeps a head's chunks in its caches."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .. import native
from ..backends import is_traced
from .chunked import Chunked, Grads, Inputs

SOURCE = Path(__file__).with_name("cpu.cpp")
CHUNK = 64  # of cpu.cpp
INTERVAL = 8  # chunks between the states that are saved
MAX_STATE = 1 << 16  # elements of a state: larger ones do not fit a processor's cache


def unsupported_reason(device: str, width: int, values: int, per_channel: bool, *dtypes: torch.dtype) -> str:
    """Why the C++ kernels do not serve ``q [..., width]`` and ``v [..., values]``; "" if they do."""
    if per_channel:
        return "one decay a head, not one a channel"
    if not 0 < width * values <= MAX_STATE:
        return f"K * V in 1 to {MAX_STATE}, not {width} * {values}"
    return native.unsupported_reason(SOURCE, device, *dtypes)


class Native(Chunked):
    """`Chunked` in C++, for fp32 and bf16; a step of decoding, which is in fp64, is `Chunked`'s."""

    isolates = True

    def local_transition(self, inputs: Inputs, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        final, transition = self._state(inputs), self._state(inputs, inputs[0].shape[-1])
        self._call(inputs, segments, final=final, transition=transition)
        return transition, final

    def incoming_state_grad(
        self, inputs: Inputs, segments: Tensor | None, initial: Tensor, saved: tuple[Tensor, ...], grad: Tensor
    ) -> Tensor:
        initial_grad = self._state(inputs)
        self._call(inputs, segments, grad=grad, initial_grad=initial_grad)
        return initial_grad

    def fused_backward(
        self,
        inputs: Inputs,
        segments: Tensor | None,
        initial: Tensor,
        transition: Tensor | None,
        saved: tuple[Tensor, ...],
        grad: Tensor,
        final_grad: Tensor | None,
        need_initial_grad: bool,
    ) -> tuple[Grads, Tensor | None]:
        q, _, v = inputs[:3]
        dq, dk = q.new_empty(2, *v.shape[:3], q.shape[-1], dtype=torch.float32)  # of each head, of groups too
        shapes = {"dv": v.shape, "dbeta": v.shape[:3], **({"dlog_decay": v.shape[:3]} if len(inputs) == 5 else {})}
        others = {name: v.new_empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
        initial_grad = self._state(inputs) if need_initial_grad else None
        states = {"initial": initial, "final_grad": final_grad, "initial_grad": initial_grad, "checkpoints": saved[0]}
        self._call(inputs, segments, grad=grad, dq=dq, dk=dk, **others, **states)
        found = [*(x.unflatten(2, (q.shape[2], -1)).sum(3) for x in (dq, dk)), *others.values()]
        return tuple(part.to(x.dtype) for part, x in zip(found, inputs, strict=True)), initial_grad

    def _forward(self, inputs: Inputs, segments: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, span = inputs[2], CHUNK * INTERVAL
        y, final = torch.empty_like(v, dtype=torch.float32, memory_format=torch.contiguous_format), self._state(inputs)
        checkpoints = initial.new_empty(max(0, -(-v.shape[1] // span) - 1), *initial.shape)
        self._call(inputs, segments, y=y, initial=initial, final=final, checkpoints=checkpoints)
        return y.to(v.dtype), checkpoints, final

    def _state(self, inputs: Inputs, columns: int = 0) -> Tensor:
        """Uninitialized: fp32 ``[B, H, K, columns or V]``."""
        q, _, v = inputs[:3]
        return v.new_empty(v.shape[0], v.shape[2], q.shape[-1], columns or v.shape[-1], dtype=torch.float32)

    def _call(self, inputs: Inputs, segments: Tensor | None, **given: Tensor | None) -> None:
        """`delta_rule` of cpu.cpp: backward where ``grad`` is given. Outputs that are not given are not computed."""
        if is_traced(inputs[0]):
            return
        q, k, v, *gates = inputs
        tokens = native.last_dim_contiguous(*(None if x is None else x.float() for x in (q, k, v, given.get("grad"))))
        dense = [x.float().contiguous() for x in gates] + [None] * (2 - len(gates))
        outputs = [given.get(name) for name in ("y", "dq", "dk", "dv", "dbeta", "dlog_decay")]
        states = [given.get(name) for name in ("initial", "final_grad", "final", "transition", "initial_grad")]
        states = [None if x is None else x.contiguous() for x in (*states, given.get("checkpoints"))]
        for x in states:
            assert x is None or x.dtype == torch.float32
        sizes = *v.shape[:3], v.shape[2] // max(1, q.shape[2]), q.shape[-1], v.shape[-1], INTERVAL
        native.load(SOURCE).delta_rule(
            native.integers(*sizes),
            native.Pointers(*tokens, *dense, *outputs, native.document_starts(segments), *states),
            native.integers(*native.strides(*tokens, dims=3)),
            ctypes.c_float(self.query_scale(q)),
            ctypes.c_bool(self.normalize_qk),
        )
