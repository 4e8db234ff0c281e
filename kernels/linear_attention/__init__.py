"""Linear attention: a recurrent state of one matrix per head. README.md has the formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .reference import Reference, reference_linear_attention
from .settings import Settings

__all__ = ["LinearAttention", "linear_attention", "reference_linear_attention"]


def _triton() -> type[StatefulOp]:
    from .triton import Triton

    return Triton


def _triton_unsupported(device: str, q: torch.dtype, v: torch.dtype, width: int, values: int) -> str:
    # Wider fp32 would spill registers.
    most = {torch.bfloat16: 256, torch.float16: 128}.get(q, 64) if q == v else 64
    fits = min(width, values) > 0 and max(width, values) <= most
    size = "" if fits else f"K and V of 1 to {most}, not {width} and {values}"
    return gpu.unsupported_reason(device, q, v) or size


BACKENDS: Backends[Callable[..., StatefulOp]] = Backends(
    "linear_attention",
    {
        "cpu": Option(lambda: cpu.Native, cpu.unsupported_reason),
        "triton": Option(_triton, _triton_unsupported),
        "chunked": Option(lambda: Chunked),
        "reference": Option(lambda: Reference),
    },
)


@dataclass(frozen=True)
class LinearAttention(Settings, StatefulOp):
    """Linear attention as `scan` runs it: ``y = scan(LinearAttention(...), q, k, v)``. See `linear_attention`.

    Attributes:
        backend: "auto", or the name of an implementation.
    """

    backend: str = "auto"

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        q, k, v = inputs
        if q.shape != k.shape or q.dim() != 4 or v.shape[:-1] != q.shape[:-1]:  # fast ones read memory by these
            shapes = [list(x.shape) for x in inputs]
            raise InputError("linear_attention: shapes of q, k, v", shapes, "[B, L, H, K] twice and [B, L, H, V]")
        if self.decay is not None and len(self.decay) != q.shape[2]:
            raise InputError("linear_attention: decay", self.decay, f"{q.shape[2]} numbers, one a head")
        implementation = BACKENDS.choose(self.backend, q.device, q.dtype, v.dtype, q.shape[-1], v.shape[-1])
        return implementation(self.causal, self.decay, self.normalize, self.eps, self.scale)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | Sequence[float] | None = None,
    causal: bool = True,
    normalize: bool = False,
    carry: Carry | None = None,
    segments: Tensor | None = None,
    relay: StateExchange | None = None,
    backend: str = "auto",
    scale: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Carry]:
    """Linear attention: ``y_i = scale * q_i S_i`` with ``S_i = decay * S_{i-1} + k_i^T v_i``, for each head.

    With ``normalize``, ``y_i = scale * q_i S_i / max(scale * q_i . z_i, eps)`` with ``z_i = decay * z_{i-1} + k_i``: a
    weighted mean of the values where q and k are positive. Where the divisor is clamped, no gradient flows through it.

    Source: "Transformers are RNNs", arXiv 2006.16236, equations 16 to 20; by chunks: arXiv 2406.08128.

    Args:
        q, k: ``[B, L, H, K]``, floating; L may be 0 on some ranks.
        v: ``[B, L, H, V]``, floating.
        decay: ``[H]``, one number in (0, 1] for each head, or None for 1; it gets no gradient. Only with ``causal``.
            A sequence of floats, or a tensor in main memory, synchronizes with the device in its first call alone.
        causal: whether token i sees tokens j <= i only; otherwise it sees all tokens of its document.
        normalize: divide by the sum of the weights.
        carry: of the tokens before the sequence: state ``[B, H, K, V]``, or ``[B, H, K, V + 1]`` with ``normalize`` (z
            is the last column), fp32 or fp64; segment ``[B]`` int64, or None. None at the beginning.
        segments: ``[B, L]`` int64 non-decreasing document ids >= 0, or None for one document.
        relay: exchanges states with the ranks that hold the other shards; None if this is the whole sequence.
        backend: "auto", "cpu" (C++), "triton" (GPUs), "chunked" (portable PyTorch) or "reference" (O(L^2), the
            definition).
        scale: multiplies q.
        eps: the least divisor, above 0.

    Returns:
        ``[B, L, H, V]`` in the dtype of v, and the carry after the whole sequence, its state in fp32 (fp64 for fp64
        inputs). States and sums are held in that dtype whatever the inputs' is.

    Raises:
        InputError: a shape, a dtype, a decay or a backend that is not one of those above.
    """
    decays = _decays(decay)
    _check(q, k, v, decays, normalize, carry, segments)
    op = LinearAttention(causal, decays, normalize, eps, scale, backend)
    return scan(op, q, k, v, segments=segments, carry=carry, relay=relay)


def _decays(decay: Tensor | Sequence[float] | None) -> tuple[float, ...] | None:
    if decay is None:
        return None
    if isinstance(decay, Tensor):
        if decay.dim() != 1 or not decay.is_floating_point():
            given = f"{list(decay.shape)} {decay.dtype}"
            raise InputError("linear_attention: decay", given, "a floating tensor [H], or None")
        return tuple(decay.tolist())
    return tuple(float(x) for x in decay)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: tuple[float, ...] | None,
    normalize: bool,
    carry: Carry | None,
    segments: Tensor | None,
) -> None:
    """Raise `InputError` for what does not fit, before the first collective."""

    def require(good: bool, name: str, given: object, allowed: str) -> None:
        if not good:
            raise InputError(f"linear_attention: {name}", given, allowed)

    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.is_floating_point(), f"{name}.dtype", str(x.dtype), "a floating dtype")
        require(x.dim() == 4, f"{name}.shape", list(x.shape), "[B, L, H, K] or [B, L, H, V]")
        require(x.device == q.device, f"{name}.device", str(x.device), f"that of q, {q.device}")
    batch, length, heads, width = q.shape
    require(k.shape == q.shape, "k.shape", list(k.shape), f"that of q, {list(q.shape)}")
    require(v.shape[:3] == q.shape[:3], "v.shape", list(v.shape), f"[{batch}, {length}, {heads}, V] as q")
    require(decay is None or len(decay) == heads, "decay", decay, f"{heads} numbers, one a head")
    if segments is not None:
        require(segments.dtype == torch.int64, "segments.dtype", str(segments.dtype), "torch.int64")
        require(segments.shape == (batch, length), "segments.shape", list(segments.shape), f"[{batch}, {length}]")
    if carry is not None:
        shape = [batch, heads, width, v.shape[-1] + normalize]
        require(list(carry.state.shape) == shape, "carry.state.shape", list(carry.state.shape), f"{shape}")
        dtypes = (torch.float32, torch.float64)
        require(carry.state.dtype in dtypes, "carry.state.dtype", str(carry.state.dtype), "fp32 or fp64")
        if carry.segment is not None:
            ids = carry.segment
            require(ids.shape == (batch,), "carry.segment.shape", list(ids.shape), f"[{batch}]")
            require(ids.dtype == torch.int64, "carry.segment.dtype", str(ids.dtype), "torch.int64")
