"""The operators at named shapes, forward and backward, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ....framework.mixers.chela import Chela, ChelaConfig
from ....framework.model import Block
from ....kernels.delta_rule import delta_rule
from ....kernels.dropout import dropout
from ....kernels.elementwise import elementwise_attention
from ....kernels.linear_attention import linear_attention
from ....kernels.long_conv import triton as long_conv
from ....kernels.long_conv.chunked import LongConv
from ....kernels.modal_conv import ModalConv
from ....kernels.rms_norm import rms_norm
from ....kernels.scan import scan
from ....kernels.short_conv import short_conv
from ....parallel.span import Span
from .capture import Gpu, Recording, footprint, recorded

ORDER = 6  # of element-wise attention
HEAD_WIDTH = 128  # K and V of linear attention
TAPS = 4  # of the short convolution
MODES = 8  # of the modal convolution
DEVICE: ContextVar[str] = ContextVar("DEVICE", default="meta")  # of the tensors; those on "meta" have no data


@dataclass(frozen=True)
class Shape:
    """B, L and D of ``[B, L, D]``; linear attention has ``D / HEAD_WIDTH`` heads, or D of width 1 where that is none.

    Attributes:
        taps: K of the long convolution; None for L.
    """

    batch: int
    length: int
    width: int
    taps: int | None = None

    @property
    def numel(self) -> int:
        return self.batch * self.length * self.width


STANDARD = Shape(1, 131_072, 2_048)


@dataclass(frozen=True)
class Case:
    """An operator in one of its variants.

    Attributes:
        operator: its name.
        variant: "plain", "decay", "normalize", "documents", ...
        make: given a shape, the operator's inputs (of which those that require gradients are counted) and the function
            that computes its output from them.
    """

    operator: str
    variant: str
    make: Callable[[Shape], tuple[list[Tensor], Callable[..., Tensor]]] = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.operator} {self.variant}"


@dataclass(frozen=True)
class Pass:
    """What one pass of a case runs.

    Attributes:
        case, name: the case; "forward" or "backward".
        recording: launches and operations of PyTorch.
        least_bytes: of the tensors that the pass must at least read and write: inputs and output; forward's inputs, the
            gradient of the output and those of the inputs.
    """

    case: Case
    name: str
    recording: Recording
    least_bytes: int


def passes(case: Case, shape: Shape, gpu: Gpu) -> tuple[Pass, Pass]:
    """The forward pass, which saves tensors for the backward one, and the backward pass."""
    inputs, function = case.make(shape)
    with recorded(gpu.target) as forward:
        y = function(*inputs)
    grad = torch.empty_like(y, memory_format=torch.contiguous_format)
    with recorded(gpu.target) as backward:
        torch.autograd.grad(y, inputs, grad)
    given = sum(map(footprint, inputs))
    return (
        Pass(case, "forward", forward, given + footprint(y)),
        Pass(case, "backward", backward, 2 * given + footprint(y)),
    )


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor on `DEVICE`, of random numbers or the ids of 4 documents; it requires a gradient where its dtype can."""
    device = DEVICE.get()
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=dtype.is_floating_point)
    if not dtype.is_floating_point:
        return _ids(shape, device)
    return torch.randn(shape, dtype=dtype, device=device).mul_(0.5).requires_grad_()


@cache
def _ids(shape: tuple[int, ...], device: str) -> Tensor:
    return (torch.arange(shape[-1], device=device) * 4 // shape[-1]).expand(shape).contiguous()


def _documents(shape: Shape, documents: bool) -> Tensor | None:
    return tensor(shape.batch, shape.length, dtype=torch.int64) if documents else None


def _elementwise(shape: Shape, *, causal: bool = True, documents: bool = False) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        segments = _documents(shape, documents)
        return elementwise_attention(q, k, v, order=ORDER, causal=causal, segments=segments, backend="triton")[0]

    return [tensor(shape.batch, shape.length, shape.width) for _ in range(3)], run


def _linear_attention(
    shape: Shape,
    *,
    causal: bool = True,
    decay: bool = False,
    gated: bool = False,
    normalize: bool = False,
    documents: bool = False,
) -> Any:
    heads = max(1, shape.width // HEAD_WIDTH)
    width = shape.width // heads
    decays = [1 - 2.0 ** -(5 + i % 8) for i in range(heads)] if decay else None

    def run(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
        options: dict[str, Any] = {"decay": decays, "causal": causal, "normalize": normalize}
        options["log_decay"] = gates[0] if gates else None
        options["segments"] = _documents(shape, documents)
        return linear_attention(q, k, v, scale=width**-0.5, backend="triton", **options)[0]

    inputs = [tensor(shape.batch, shape.length, heads, width) for _ in range(3)]
    if gated:
        rates = tensor(shape.batch, shape.length, heads, dtype=torch.float32)
        inputs.append(rates.detach().abs().neg().requires_grad_())
    return inputs, run


def _short_conv(shape: Shape, *, activation: str | None = "silu", documents: bool = False) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        segments = _documents(shape, documents)
        return short_conv(x, weight, bias, activation=activation, segments=segments, backend="triton")[0]

    x = tensor(shape.batch, shape.length, shape.width)
    return [x, tensor(shape.width, TAPS), tensor(shape.width)], run


def _delta_rule(shape: Shape, *, documents: bool = False) -> Any:
    heads = max(1, shape.width // HEAD_WIDTH)
    tokens = shape.batch, shape.length, heads
    segments = tensor(*tokens[:2], dtype=torch.int64) if documents else None

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
        return delta_rule(q, k, v, beta, log_decay=log_decay, segments=segments, backend="triton")[0]

    q, k, v = (tensor(*tokens, shape.width // heads) for _ in range(3))
    return [q, k, v, tensor(*tokens), tensor(*tokens)], run


def _long_conv(shape: Shape, *, causal: bool = True, documents: bool = False) -> Any:
    def run(x: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
        segments = None
        if documents:  # the portable part reads where they begin
            segments = torch.arange(shape.length).mul_(4).div_(shape.length, rounding_mode="floor")
            segments = segments.expand(shape.batch, -1)
        return convolution(x, kernel, skip, causal=causal, segments=segments)[0]

    convolution = LongConv(long_conv.forward, long_conv.backward)
    x, taps = tensor(shape.batch, shape.length, shape.width), shape.taps or shape.length
    fp32 = partial(tensor, dtype=torch.float32)
    return [x, fp32(shape.width, taps), fp32(shape.width)], run


def _modal_conv(shape: Shape, *, dtype: torch.dtype = torch.bfloat16, documents: bool = False) -> Any:
    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        segments = _documents(shape, documents)
        return scan(ModalConv(backend="triton"), x, *parameters, segments=segments)[0]

    x = tensor(shape.batch, shape.length, shape.width, dtype=dtype)
    return [x, *(tensor(shape.width, MODES, dtype=dtype) for _ in range(4))], run


def _dropout(shape: Shape) -> Any:
    seeds = tensor(shape.batch, dtype=torch.int64)
    return [tensor(shape.batch, shape.length, shape.width)], lambda x: dropout(x, 0.1, seeds)


def _rms_norm(shape: Shape, group: int = 0) -> Any:
    weight = tensor(shape.width)
    inputs = [tensor(shape.batch, shape.length, shape.width), weight]
    return inputs, lambda x, weight: rms_norm(x, weight, min(group or shape.width, shape.width))


def _chela_block(shape: Shape) -> Any:
    """A block as of the config ``lm-125m``, with dropout: norms, mixer, gated feed-forward layer."""
    with torch.device(DEVICE.get()):
        mixer = Chela(shape.width, ChelaConfig(heads=2 * shape.width // HEAD_WIDTH, modes=MODES))
        block = Block(mixer, shape.width, shape.width * 8 // 3 // 8 * 8, dropout=0.1).bfloat16()
    span = Span(dropout_seeds=tensor(shape.batch, dtype=torch.int64), layer="blocks.0")
    return [tensor(shape.batch, shape.length, shape.width), *block.parameters()], lambda x, *_: block(x, span)[0]


_MAKERS: Mapping[str, tuple[Callable[..., Any], Mapping[str, Mapping[str, Any]]]] = {
    "elementwise": (
        _elementwise,
        {
            "plain": {},
            "documents": {"documents": True},
            "non-causal": {"causal": False},
            "non-causal documents": {"causal": False, "documents": True},
        },
    ),
    "linear_attention": (
        _linear_attention,
        {
            "plain": {},
            "decay": {"decay": True},
            "log_decay": {"gated": True},
            "log_decay documents": {"gated": True, "documents": True},
            "normalize": {"normalize": True},
            "documents": {"documents": True},
            "non-causal": {"causal": False},
            "non-causal normalize documents": {"causal": False, "normalize": True, "documents": True},
        },
    ),
    "delta_rule": (_delta_rule, {"log_decay": {}, "log_decay documents": {"documents": True}}),
    "short_conv": (
        _short_conv,
        {"SiLU": {}, "plain": {"activation": None}, "SiLU documents": {"documents": True}},
    ),
    "dropout": (_dropout, {"plain": {}}),
    "rms_norm": (_rms_norm, {"plain": {}, "groups of 64": {"group": 64}}),
    "chela block": (_chela_block, {"dropout": {}}),
    "long_conv": (_long_conv, {"plain": {}, "non-causal": {"causal": False}}),
    "modal_conv": (_modal_conv, {"plain": {}, "fp32": {"dtype": torch.float32}, "documents": {"documents": True}}),
}


def cases() -> list[Case]:
    """Every operator in every variant."""
    return [
        Case(operator, variant, partial(make, **options))
        for operator, (make, variants) in _MAKERS.items()
        for variant, options in variants.items()
    ]


def long_conv_documents() -> Case:
    """The long convolution of four documents, whose lengths are read from a real tensor."""
    return Case("long_conv", "documents", partial(_long_conv, documents=True))
