"""Short convolution: a few taps per channel over neighbouring tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import InputError
from .. import gpu
from ..backends import Backends, Option
from ..conv_carry import check_tokens, reach
from ..scan import Carry
from . import chunked, cpu
from .autograd import Local
from .reference import reference_short_conv

__all__ = ["reach", "reference_short_conv", "short_conv"]


def _triton() -> Local:
    from . import triton

    return Local(triton.forward, triton.backward)


def _triton_unsupported(device: str, x: torch.dtype, weight: torch.dtype, taps: int) -> str:
    return gpu.unsupported_reason(device, x, weight) or ("" if 2 <= taps <= 8 else f"2 to 8 taps, not {taps}")


BACKENDS: Backends[Callable[..., tuple[Tensor, Carry]]] = Backends(
    "short_conv",
    {
        "cpu": Option(lambda: Local(cpu.forward, cpu.backward), cpu.unsupported_reason),
        "triton": Option(_triton, _triton_unsupported),
        "chunked": Option(lambda: Local(chunked.forward, chunked.backward)),
        "reference": Option(lambda: reference_short_conv),
    },
)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    causal: bool = True,
    carry: Carry | None = None,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Carry]:
    """Depthwise convolution with W taps per channel.

    ``y_i = activation(bias + sum_j weight[:, j] x_{i + j - left})`` over tokens of i's document. If causal,
    ``left = W - 1``: ``weight[:, -1]`` multiplies the current token. Otherwise ``left = W // 2``, and
    ``weight[:, W // 2]`` does.

    Args:
        x: ``[B, L, D]``, any floating dtype; computed in fp32 or better. L may be 0.
        weight: ``[D, W]``, ``W >= 1``.
        bias: ``[D]``, or None.
        activation: None or "silu".
        causal: whether tokens see only themselves and their past.
        carry: the tokens before x: state ``[B, W - 1, D]``, zeros where there were none, and their document ids
            ``[B, W - 1]`` (-1: no token; None: those of the first document of x). Of more tokens the last ones count,
            and there may be fewer.
        segments: ``[B, L]`` int64 non-decreasing document ids of x, or None for one document. -1 marks a position
            without a token, as in `Span.halo_segments`: no token sees it, and its own output means nothing.
        backend: "auto", "cpu" (C++), "triton" (GPUs), "chunked" (portable PyTorch) or "reference" (the definition).

    Returns:
        ``y [B, L, D]`` in x's dtype, and the carry for the tokens that follow: the last ``W - 1`` tokens, in x's dtype.

    Raises:
        InputError: shapes that do not fit, an unknown activation or backend, a carry with ids for tokens without.
    """
    check_tokens("short_conv", x, carry, segments)
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or not weight.shape[1]:
        raise InputError("short_conv: weight", list(weight.shape), f"[D, W] with D = {x.shape[2]} and W >= 1")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError("short_conv: bias", list(bias.shape), f"[D] with D = {x.shape[2]}")
    if activation not in (None, "silu"):
        raise InputError("short_conv: activation", activation, "None or 'silu'")
    if torch.compiler.is_compiling() and backend != "reference":
        from ..library import short_conv_by  # which eager code can do without

        convolution = short_conv_by(backend)
    else:
        convolution = BACKENDS.choose(backend, x.device, x.dtype, weight.dtype, weight.shape[1])
    return convolution(x, weight, bias, activation=activation, causal=causal, carry=carry, segments=segments)
