"""Linear attention: a recurrent state of one matrix per head. README.md has the formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .. import gpu
from ..backends import Backends, Option
from ..isolation import Isolated
from ..scan import StateExchange, scan
from ..state import Carry, StatefulOp
from . import cpu
from .gated import GatedChunked
from .grouped import Grouped
from .reference import Reference, reference_linear_attention
from .settings import Settings, is_gated

__all__ = ["LinearAttention", "linear_attention", "reference_linear_attention"]


def _triton() -> type[StatefulOp]:
    from .triton import Triton

    return Triton


def _triton_unsupported(
    device: str, q: torch.dtype, v: torch.dtype, width: int, values: int, gated: bool = False
) -> str:
    # Wider ones would spill registers.
    most = {torch.bfloat16: 128 if gated else 256, torch.float16: 128}.get(q, 64) if q == v else 64
    fits = min(width, values) > 0 and max(width, values) <= most
    size = "" if fits else f"K and V of 1 to {most}, not {width} and {values}"
    return gpu.unsupported_reason(device, q, v) or size


BACKENDS: Backends[Callable[..., StatefulOp]] = Backends(
    "linear_attention",
    {
        "cpu": Option(lambda: cpu.Native, cpu.unsupported_reason),
        "triton": Option(_triton, _triton_unsupported),
        "chunked": Option(lambda: GatedChunked),
        "reference": Option(lambda: Reference),
    },
)


@dataclass(frozen=True)
class LinearAttention(Settings, StatefulOp):
    """Linear attention as `scan` runs it: ``y = scan(LinearAttention(...), q, k, v)``, or ``q, k, v, log_decay``. See
    `linear_attention`.

    Attributes:
        backend: "auto", or the name of an implementation.
    """

    backend: str = "auto"

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        q, k, v, *gates = inputs
        heads, groups = v.shape[-2], q.shape[-2]
        good = q.shape == k.shape and q.dim() == 4 and v.shape[:2] == q.shape[:2] and heads % max(1, groups) == 0
        if not good or any(x.shape != v.shape[:-1] for x in gates):  # fast ones read memory by these
            shapes = [list(x.shape) for x in inputs]
            allowed = "[B, L, G, K] twice, [B, L, H, V] and [B, L, H], H a multiple of G"
            raise InputError("linear_attention: shapes of q, k, v and log_decay", shapes, allowed)
        if self.decay is not None and len(self.decay) != heads:
            raise InputError("linear_attention: decay", self.decay, f"{heads} numbers, one a head")
        if gates and (self.decay is not None or not self.causal):
            allowed = "None where decay is given or causal=False"
            raise InputError("linear_attention: log_decay", list(gates[0].shape), allowed)
        case = q.dtype, v.dtype, q.shape[-1], v.shape[-1], is_gated(inputs)
        implementation = BACKENDS.choose(self.backend, q.device, *case)
        op = implementation(self.causal, self.decay, self.normalize, self.eps, self.scale)
        grouped = heads == groups or (isinstance(op, Settings) and op.takes_groups(inputs))
        whole = op if grouped else Grouped(op)
        return whole if op.isolates else Isolated(whole, 3)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
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

    With ``log_decay`` each token has its own decay, ``exp(log_decay_i)`` in the place of ``decay``: Mamba-2, where q is
    its C, k its B, v its x times dt, and log_decay is A times dt.

    Source: "Transformers are RNNs", arXiv 2006.16236, equations 16 to 20; by chunks: arXiv 2406.08128; with
    ``log_decay``: "Transformers are SSMs", arXiv 2405.21060.

    Args:
        q, k: ``[B, L, G, K]``, floating, H a multiple of G: head h reads group ``h // (H / G)``. L may be 0 on some
            ranks.
        v: ``[B, L, H, V]``, floating.
        log_decay: ``[B, L, H]``, floating, at most 0: the logarithm of each token's decay, or None. It gets a gradient.
            Only with ``causal`` and without ``decay``.
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
    _check(q, k, v, log_decay, decays, normalize, carry, segments)
    op = LinearAttention(causal, decays, normalize, eps, scale, backend)
    inputs = (q, k, v) if log_decay is None else (q, k, v, log_decay)
    return scan(op, *inputs, segments=segments, carry=carry, relay=relay)


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
    log_decay: Tensor | None,
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
        require(x.dim() == 4, f"{name}.shape", list(x.shape), "[B, L, G, K] or [B, L, H, V]")
        require(x.device == q.device, f"{name}.device", str(x.device), f"that of q, {q.device}")
    batch, length, groups, width = q.shape
    heads = v.shape[2]
    require(k.shape == q.shape, "k.shape", list(k.shape), f"that of q, {list(q.shape)}")
    fits = v.shape[:2] == q.shape[:2] and heads % max(1, groups) == 0
    require(fits, "v.shape", list(v.shape), f"[{batch}, {length}, H, V] with H a multiple of q's {groups} heads")
    if log_decay is not None:
        kind, shape = str(log_decay.dtype), list(log_decay.shape)
        require(log_decay.is_floating_point(), "log_decay.dtype", kind, "a floating dtype")
        require(shape == [batch, length, heads], "log_decay.shape", shape, f"[{batch}, {length}, {heads}]")
        require(log_decay.device == q.device, "log_decay.device", str(log_decay.device), f"that of q, {q.device}")
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
