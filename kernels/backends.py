"""Which implementation of an operator runs: chosen once per operator and device, and said once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import TypeVar

import torch

from .errors import InputError

T = TypeVar("T")
log = logging.getLogger("longreach.kernels")


def choose(operator: str, backends: Mapping[str, T], backend: str, device: torch.device) -> T:
    """The implementation named ``backend``, or for "auto" the preferred one for the device.

    Args:
        operator: the operator's name, for messages.
        backends: implementations that can run here, by name, the preferred first.
        backend: "auto" or a name.
        device: where the tensors are.

    Raises:
        InputError: there is no such backend, or it cannot run here. Never falls back silently.
    """
    if backend == "auto":
        backend = _preferred(operator, tuple(backends), device.type)
    if backend not in backends:
        raise InputError(f"{operator}: backend", backend, f"one of auto, {', '.join(backends)} on {device.type}")
    return backends[backend]


@cache
def _preferred(operator: str, names: tuple[str, ...], device: str) -> str:
    log.info("%s on %s runs %s", operator, device, names[0])
    return names[0]
