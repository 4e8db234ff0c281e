"""The delta rule: a recurrent state of one matrix per head, of which a token replaces what its key reads. README.md has
the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .. import gpu
from ..backends import Backends, Option
from ..isolation import Isolated
from ..scan import StateExchange, scan
from ..state import Carry, StatefulOp
from ..transition import Matrix
from . import cpu
from .chunked import Chunked
from .reference import Reference, reference_delta_rule
from .settings import Settings

__all__ = ["DeltaRule", "delta_rule", "reference_delta_rule"]


def _triton() -> type[StatefulOp]:
    from .triton import Triton

    return Triton


def _triton_unsupported(device: str, width: int, values: int, per_channel: bool, *dtypes: torch.dtype) -> str:
    return gpu.unsupported_reason(device, *dtypes)


BACKENDS: Backends[Callable[..., StatefulOp]] = Backends(
    "delta_rule",
    {
        "cpu": Option(lambda: cpu.Native, cpu.unsupported_reason),
        "triton": Option(_triton, _triton_unsupported),
        "chunked": Option(lambda: Chunked),
        "reference": Option(lambda: Reference),
    },
)


@dataclass(frozen=True)
class DeltaRule(Settings, StatefulOp):
    """The delta rule as `scan` runs it: ``y = scan(DeltaRule(...), q, k, v, beta)``, or ``q, k, v, beta, log_decay``.
    See `delta_rule`.

    Attributes:
        backend: "auto", or the name of an implementation.
    """

    backend: str = "auto"
    transition = Matrix

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        _check_inputs(inputs)
        q, _, v, *gates = inputs
        case = q.shape[-1], v.shape[-1], gates[-1].dim() == 4, *(x.dtype for x in inputs[:3])
        op = BACKENDS.choose(self.backend, q.device, *case)(self.scale, self.normalize_qk)
        return op if op.isolates else Isolated(op, 4)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    carry: Carry | None = None,
    segments: Tensor | None = None,
    relay: StateExchange | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Carry]:
    """The (gated) delta rule: ``y_i = scale * q_i S_i``, where token i replaces a share beta of what its key reads.

    ``S_i = S' + beta_i k_i^T (v_i - k_i S')`` with ``S' = exp(log_decay_i) S_{i-1}``, for each head. Keys are meant to
    be of norm 1 and beta in [0, 1], or [0, 2]: then no product of transitions grows.

    Source: DeltaNet by chunks, arXiv 2406.06484; with one decay per head (Gated DeltaNet), arXiv 2412.06464; with one
    per channel (Kimi Delta Attention), arXiv 2510.26692.

    Args:
        q, k: ``[B, L, G, K]``, floating, H a multiple of G: head h reads group ``h // (H / G)``. L may be 0 on some
            ranks.
        v: ``[B, L, H, V]``, floating.
        beta: ``[B, L, H]``, floating.
        log_decay: ``[B, L, H]``, or ``[B, L, H, K]`` for each row of the state, floating, at most 0: the logarithm of
            each token's decay. None for a decay of 1.
        scale: multiplies q; None for ``K ** -0.5``.
        normalize_qk: multiply q and k by ``rsqrt(sum(x ** 2) + 1e-6)``.
        carry: of the tokens before the sequence: state ``[B, H, K, V]``, fp32 or fp64; segment ``[B]`` int64, or None.
            None at the beginning.
        segments: ``[B, L]`` int64 non-decreasing document ids >= 0, or None for one document.
        relay: exchanges states with the ranks that hold the other shards; None if this is the whole sequence.
        backend: "auto", "cpu" (C++, with one decay a head), "triton" (GPUs), "chunked" (portable PyTorch) or
            "reference" (token by token, the definition).

    Returns:
        ``[B, L, H, V]`` in the dtype of v, and the carry after the whole sequence, its state in fp32 (fp64 for fp64
        inputs). States and sums are held in that dtype whatever the inputs' is.

    Raises:
        InputError: a shape, a dtype or a backend that is not one of those above.
    """
    inputs = (q, k, v, beta) if log_decay is None else (q, k, v, beta, log_decay)
    _check_inputs(inputs)
    _check_context(inputs, carry, segments)
    return scan(DeltaRule(scale, normalize_qk, backend), *inputs, segments=segments, carry=carry, relay=relay)


def _require(good: bool, name: str, given: object, allowed: str) -> None:
    if not good:
        raise InputError(f"delta_rule: {name}", given, allowed)


def _check_inputs(inputs: tuple[Tensor, ...]) -> None:
    """Raise `InputError` for tensors that do not fit each other."""
    q, k, v, beta, *gates = inputs
    for name, x in zip(("q", "k", "v", "beta", "log_decay"), inputs, strict=False):
        _require(x.is_floating_point(), f"{name}.dtype", str(x.dtype), "a floating dtype")
        _require(x.device == q.device, f"{name}.device", str(x.device), f"that of q, {q.device}")
    for name, x in (("q", q), ("v", v)):
        _require(x.dim() == 4, f"{name}.shape", list(x.shape), "[B, L, G, K] or [B, L, H, V]")
    heads, groups, tokens = v.shape[2], q.shape[2], list(q.shape[:2])
    _require(k.shape == q.shape, "k.shape", list(k.shape), f"that of q, {list(q.shape)}")
    _require(list(v.shape[:2]) == tokens, "v.shape", list(v.shape), f"{[*tokens, 'H', 'V']} as q")
    good = heads % groups == 0 if groups else not heads
    _require(good, "v.shape", list(v.shape), f"a multiple of the {groups} heads of q")
    _require(beta.shape == v.shape[:3], "beta.shape", list(beta.shape), f"{[*tokens, heads]}")
    for gate in gates:
        shapes = [*tokens, heads], [*tokens, heads, q.shape[-1]]
        _require(list(gate.shape) in shapes, "log_decay.shape", list(gate.shape), f"{shapes[0]} or {shapes[1]}")


def _check_context(inputs: tuple[Tensor, ...], carry: Carry | None, segments: Tensor | None) -> None:
    """Raise `InputError` for what does not fit the inputs, before the first collective."""
    q, _, v = inputs[:3]
    batch, length = q.shape[:2]
    if segments is not None:
        _require(segments.dtype == torch.int64, "segments.dtype", str(segments.dtype), "torch.int64")
        _require(segments.shape == (batch, length), "segments.shape", list(segments.shape), f"[{batch}, {length}]")
    if carry is not None:
        shape = [batch, v.shape[2], q.shape[-1], v.shape[-1]]
        _require(list(carry.state.shape) == shape, "carry.state.shape", list(carry.state.shape), f"{shape}")
        dtypes = (torch.float32, torch.float64)
        _require(carry.state.dtype in dtypes, "carry.state.dtype", str(carry.state.dtype), "fp32 or fp64")
        if carry.segment is not None:
            ids = carry.segment
            _require(ids.shape == (batch,), "carry.segment.shape", list(ids.shape), f"[{batch}]")
            _require(ids.dtype == torch.int64, "carry.segment.dtype", str(ids.dtype), "torch.int64")
