"""Token mixers, by name: each file holds one module and its config; `registry` adds those of a user."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import InputError
from .chela import ChelaConfig
from .elementwise import ElementwiseConfig
from .feedforward_kernel import FeedforwardKernelConfig
from .gated_deltanet import GatedDeltaNetConfig
from .mamba2 import Mamba2Config
from .registry import CONFIGS, MIXERS, options, register
from .softmax import SoftmaxConfig


def build_mixer(name: str, width: int, config: Any, *, causal: bool) -> nn.Module:
    """The mixer ``name``. Its ``forward(x [B, L, D], span)`` returns ``[B, L, D]``, or that and a penalty on its
    weights.

    Args:
        name: a key of `MIXERS`.
        width: D.
        config: the mixer's own config, of `options` where it is registered.
        causal: whether tokens see only their past.

    Raises:
        InputError: unknown name, options that do not fit the width, or a causal mixer (attribute ``causal_only``) where
            tokens see later ones.
    """
    if name not in MIXERS:
        raise InputError("model.mixers", name, f"one of {', '.join(MIXERS)}")
    if not causal and getattr(MIXERS[name], "causal_only", False):
        raise InputError("model.causal", causal, f"true with the mixer {name}", "choose elementwise or chela")
    return MIXERS[name](width, config, causal=causal)


__all__ = [
    "CONFIGS",
    "MIXERS",
    "ChelaConfig",
    "ElementwiseConfig",
    "FeedforwardKernelConfig",
    "GatedDeltaNetConfig",
    "Mamba2Config",
    "SoftmaxConfig",
    "build_mixer",
    "options",
    "register",
]
