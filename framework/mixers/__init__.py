"""Token mixers, by name: each file holds one module and its config."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...kernels.errors import InputError
from .chela import Chela, ChelaConfig
from .elementwise import Elementwise, ElementwiseConfig
from .feedforward_kernel import FeedforwardKernel, FeedforwardKernelConfig
from .softmax import Softmax, SoftmaxConfig

MIXERS: dict[str, Any] = {
    "elementwise": Elementwise,
    "chela": Chela,
    "feedforward_kernel": FeedforwardKernel,
    "softmax": Softmax,
}


def build_mixer(name: str, width: int, config: Any, *, causal: bool) -> nn.Module:
    """The mixer ``name``. Its ``forward(x [B, L, D], span)`` returns ``[B, L, D]``, or that and a penalty on its
    weights.

    Args:
        name: a key of `MIXERS`.
        width: D.
        config: the mixer's own config.
        causal: whether tokens see only their past.

    Raises:
        InputError: unknown name, or options that do not fit the width.
    """
    if name not in MIXERS:
        raise InputError("model.mixers", name, f"one of {', '.join(MIXERS)}")
    return MIXERS[name](width, config, causal=causal)


__all__ = [
    "MIXERS",
    "ChelaConfig",
    "ElementwiseConfig",
    "FeedforwardKernelConfig",
    "SoftmaxConfig",
    "build_mixer",
]
