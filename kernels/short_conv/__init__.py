"""Short convolution: a few taps per channel over neighbouring tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..conv_carry import check_tokens, reach
from ..state import Carry
from . import compiled
from .backends import BACKENDS
from .reference import reference_short_conv

__all__ = ["reach", "reference_short_conv", "short_conv"]


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
        convolution = compiled.traced(backend)
    else:
        convolution = BACKENDS.choose(backend, x.device, x.dtype, weight.dtype, weight.shape[1])
    return convolution(x, weight, bias, activation=activation, causal=causal, carry=carry, segments=segments)
