"""The kernels of flash-linear-attention at the same shapes, where it is installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from .capture import GPUS
from .cases import HEAD_WIDTH, STANDARD, TAPS, Case, Shape, tensor
from .report import PassRow, pass_rows

NAME = "flash-linear-attention"


def _linear_attention(shape: Shape) -> Any:
    chunk = import_module("fla.ops.linear_attn").chunk_linear_attn

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = chunk(q, k, v, scale=HEAD_WIDTH**-0.5, normalize=False)[0]
        return y

    return [tensor(shape.batch, shape.length, shape.width // HEAD_WIDTH, HEAD_WIDTH) for _ in range(3)], run


def _retention(shape: Shape) -> Any:
    chunk = import_module("fla.ops.retention").chunk_retention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = chunk(q, k, v, scale=HEAD_WIDTH**-0.5)[0]
        return y

    return [tensor(shape.batch, shape.length, shape.width // HEAD_WIDTH, HEAD_WIDTH) for _ in range(3)], run


def _short_conv(shape: Shape) -> Any:
    convolution = import_module("fla.modules.convolution").causal_conv1d

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = convolution(x, weight, bias, activation="silu", backend="triton")[0]
        return y

    return [tensor(shape.batch, shape.length, shape.width), tensor(shape.width, TAPS), tensor(shape.width)], run


CASES = [
    Case("linear_attention", NAME, _linear_attention),
    Case("linear_attention", f"{NAME}, decay", _retention),
    Case("short_conv", f"{NAME}, SiLU", _short_conv),
]


def rows(target: str) -> tuple[list[PassRow], list[str]]:
    """The passes of its operators, and a line for each that is skipped."""
    if find_spec("fla") is None:
        return [], [f"{NAME}: skipped, it is not installed"]
    found: list[PassRow] = []
    skipped = []
    for case in CASES:
        try:
            found += pass_rows(case, STANDARD, GPUS[target])
        except Exception as error:  # another project's code, whose versions differ
            skipped.append(f"{case.name}: skipped, {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    return found, skipped
