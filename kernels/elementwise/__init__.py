"""Element-wise attention: attention per channel, by the Taylor series of its kernel and a recurrent state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .. import gpu
from ..backends import Backends, Option
from ..scan import StateExchange, scan
from ..state import Carry, StatefulOp
from . import cpu
from .chunked import Chunked
from .reference import exact_elementwise_attention, reference_elementwise_attention, state_dtype

__all__ = [
    "ElementwiseAttention",
    "elementwise_attention",
    "exact_elementwise_attention",
    "reference_elementwise_attention",
]

NAME = "elementwise_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def elementwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = 6,
    causal: bool = True,
    carry: Carry | None = None,
    segments: Tensor | None = None,
    relay: StateExchange | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Carry]:
    """The EA-series, in time linear in the length; README.md has the formulas, forward and backward.

    Per channel, with ``w_j = exp(-k_j^2)``, ``c_n = 2^n / n!``, n = 0..order, and j <= i if causal, else all j::

        y_i = sum_n c_n q_i^n (sum_j k_j^n w_j v_j) / sum_n c_n q_i^n (sum_j k_j^n w_j)

    Sums and states are fp32, or fp64 for fp64 inputs. The series is within 10% of ``exp(2 q k)`` for 2 q k in
    [-0.70, 1.10] (order 2), [-1.32, 2.43] (order 4), [-1.91, 3.89] (order 6), so q and k want to be bounded. Inputs and
    upstream gradients up to 1e4 in magnitude give neither NaN nor Inf for orders up to 8: q is clamped to +-1000
    (no gradient beyond it), ``k^n w`` underflows to 0, the denominator is floored at 1e-30 (no gradient through it
    there), what a token adds to the gradients saturates at +-1e25, and results are clamped to their finite range. What
    depends on NaN or on an infinity is NaN.

    Args:
        q, k, v: ``[B, L, D]`` of one device and dtype (fp16, bf16, fp32, fp64): this rank's shard of the sequence.
        order: the highest power of the series, even and at least 2.
        causal: whether a token sees only the tokens up to itself, or all.
        carry: of the tokens before the whole sequence: state ``[B, 2, order + 1, D]`` in the dtype of the sums, segment
            ``[B]`` int64 or None.
        segments: ``[B, L]`` int64 non-decreasing document ids >= 0, or None for one document. Tokens see only their
            own document.
        relay: exchanges states with the ranks that hold the other shards; None if this is the whole sequence.
        backend: "auto", "cpu" (C++), "triton" (GPUs), "chunked" (portable PyTorch), or "reference" (the definition,
            quadratic, for tests).

    Returns:
        ``y [B, L, D]`` in the dtype of the inputs, and the carry after the whole sequence.

    Raises:
        InputError: shapes, dtypes, the order or the backend do not fit.

    Source: "Element-wise Attention Is All You Need", arXiv 2501.05730.
    """
    _check(q, k, v, order, carry, segments)
    if backend == "reference":
        if relay is not None and relay.size > 1:
            allowed = "a sequence split over ranks needs another"
            raise InputError(f"{NAME}: backend", backend, allowed, "pass backend='auto'")
        return reference_elementwise_attention(q, k, v, order=order, causal=causal, carry=carry, segments=segments)
    op = ElementwiseAttention(order, causal, backend)
    return scan(op, q, k, v, segments=segments, carry=carry, relay=relay)


@dataclass(frozen=True)
class ElementwiseAttention(StatefulOp):
    """The EA-series as `scan` runs it: ``y = scan(ElementwiseAttention(...), q, k, v)``. See `elementwise_attention`.

    Attributes:
        order: the highest power t, even.
        causal: whether a token sees only the tokens up to itself, or all.
        backend: "auto", or the name of an implementation.
    """

    order: int = 6
    causal: bool = True
    backend: str = "auto"
    plain_sum = True

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        q, k, v = inputs
        # Fast implementations read memory by q's dtype and shape.
        if not q.dtype == k.dtype == v.dtype:
            given = [str(x.dtype) for x in inputs]
            raise InputError(f"{NAME}: dtypes of q, k, v", given, "one dtype", "cast q, k and v alike")
        if not q.shape == k.shape == v.shape or q.dim() != 3:
            shapes = [tuple(x.shape) for x in inputs]
            raise InputError(f"{NAME}: shapes of q, k, v", shapes, "[batch, tokens, channels], all alike")
        implementation = BACKENDS.choose(self.backend, q.device, q.dtype, self.order)
        return implementation(self.order, self.causal)


def _triton() -> type[Chunked]:
    from .triton import Triton

    return Triton


def _triton_unsupported(device: str, dtype: torch.dtype, order: int) -> str:
    return gpu.unsupported_reason(device, dtype) or ("" if order <= 8 else f"orders up to 8, not {order}")


BACKENDS: Backends[type[Chunked]] = Backends(
    NAME,
    {
        "cpu": Option(lambda: cpu.Native, cpu.unsupported_reason),
        "triton": Option(_triton, _triton_unsupported),
        "chunked": Option(lambda: Chunked),
    },
)


def _check(q: Tensor, k: Tensor, v: Tensor, order: int, carry: Carry | None, segments: Tensor | None) -> None:
    """Raise `InputError` for the first thing that does not fit."""
    if isinstance(order, bool) or not isinstance(order, int) or order < 2 or order % 2:
        raise InputError(
            f"{NAME}: order",
            order,
            "an even number, 2 or more: an odd polynomial goes negative",
            "take 2, 4 or 6",
        )
    if q.dim() != 3:
        raise InputError(f"{NAME}: shape of q", tuple(q.shape), "[batch, tokens, channels]")
    if q.dtype not in DTYPES:
        raise InputError(f"{NAME}: dtype of q", q.dtype, "fp16, bf16, fp32 or fp64", "cast q, k and v")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise InputError(f"{NAME}: shape of {name}", tuple(x.shape), f"that of q, {tuple(q.shape)}")
        if x.dtype != q.dtype:
            raise InputError(f"{NAME}: dtype of {name}", x.dtype, f"that of q, {q.dtype}", "cast q, k and v alike")
        if x.device != q.device:
            raise InputError(f"{NAME}: device of {name}", str(x.device), f"that of q, {q.device}")
    batch, length, width = q.shape
    if segments is not None:
        _check_ids("segments", segments, (batch, length), q.device)
    if carry is not None:
        state = (batch, 2, order + 1, width)
        if tuple(carry.state.shape) != state:
            raise InputError(
                f"{NAME}: shape of carry.state",
                tuple(carry.state.shape),
                f"[batch, 2, order + 1, channels] = {state}",
            )
        if carry.state.dtype not in (state_dtype(q.dtype), torch.float64):  # that of a step of decoding
            raise InputError(
                f"{NAME}: dtype of carry.state",
                carry.state.dtype,
                f"{state_dtype(q.dtype)} for inputs of {q.dtype}",
                "cast the state",
            )
        if carry.state.device != q.device:
            raise InputError(f"{NAME}: device of carry.state", str(carry.state.device), f"that of q, {q.device}")
        if carry.segment is not None:
            _check_ids("carry.segment", carry.segment, (batch,), q.device)


def _check_ids(name: str, ids: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(ids.shape) != shape:
        raise InputError(f"{NAME}: shape of {name}", tuple(ids.shape), f"{shape}")
    if ids.dtype != torch.int64:
        raise InputError(f"{NAME}: dtype of {name}", ids.dtype, "torch.int64", f"{name}.long()")
    if ids.device != device:
        raise InputError(f"{NAME}: device of {name}", str(ids.device), f"that of q, {device}")
