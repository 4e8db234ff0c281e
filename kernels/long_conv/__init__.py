"""Long convolution: a kernel per channel that may be as long as the sequence, given tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..conv_carry import check_tokens
from ..state import Carry
from . import compiled
from .backends import BACKENDS
from .reference import reference_long_conv

__all__ = ["long_conv", "reference_long_conv"]


def long_conv(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    causal: bool = True,
    carry: Carry | None = None,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Carry]:
    """Depthwise convolution with K taps per channel, by FFT.

    ``y_i = skip * x_i + sum_m kernel[:, m] x_{i + centre - m}`` over tokens of i's document. If causal, ``centre = 0``:
    ``kernel[:, 0]`` multiplies the current token, ``kernel[:, m]`` the one m before it. Otherwise ``centre = K // 2``:
    ``kernel[:, K // 2]`` multiplies the current token.

    Args:
        x: ``[B, L, D]``, any floating dtype; computed in fp32, or fp64 where x or kernel is. L may be 0.
        kernel: ``[D, K]``, ``K >= 1``, shorter or longer than L.
        skip: ``[D]``, or None.
        causal: whether tokens see only themselves and their past.
        carry: the tokens before x: state ``[B, K - 1, D]``, zeros where there were none, and their document ids
            ``[B, K - 1]`` (-1: no token; None: those of the first document of x). Of more tokens the last ones count,
            and there may be fewer.
        segments: ``[B, L]`` int64 non-decreasing document ids of x, or None for one document. -1 marks a position
            without a token: no token sees it, and its own output means nothing.
        backend: "auto", "cpu" (C++), "triton" (GPUs), "chunked" (portable PyTorch) or "reference" (the definition).

    Returns:
        ``y [B, L, D]`` in x's dtype, and the carry for the tokens that follow: the last ``K - 1`` tokens, in x's dtype.

    Raises:
        InputError: shapes that do not fit, an unknown backend, a carry with ids for tokens without.
    """
    check_tokens("long_conv", x, carry, segments)
    if kernel.dim() != 2 or kernel.shape[0] != x.shape[2] or not kernel.shape[1]:
        raise InputError("long_conv: kernel", list(kernel.shape), f"[D, K] with D = {x.shape[2]} and K >= 1")
    if skip is not None and skip.shape != kernel.shape[:1]:
        raise InputError("long_conv: skip", list(skip.shape), f"[D] with D = {x.shape[2]}")
    if torch.compiler.is_compiling() and backend != "reference":
        convolution = compiled.traced(backend)
    else:
        convolution = BACKENDS.choose(backend, x.device, x.dtype, kernel.dtype)
    return convolution(x, kernel, skip, causal=causal, carry=carry, segments=segments)
