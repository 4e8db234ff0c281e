"""The short convolution as ``torch.compile`` sees it: the custom op ``longreach::short_conv``.

A graph keeps it whole; it chooses the implementation when it runs. Eager code does not call it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..compiled import contiguous_like
from ..state import Carry
from .autograd import ConvBackend, ConvInputs, run
from .backends import BACKENDS


def traced(backend: str) -> Callable[..., tuple[Tensor, Carry]]:
    """The convolution as one node of a graph; the arguments and results of `reference_short_conv`."""

    def convolve(*arguments: Any) -> Tensor:
        return torch.ops.longreach.short_conv(*arguments, backend)

    return partial(run, convolve)


@torch.library.custom_op("longreach::short_conv", mutates_args=())
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor,
    past_ids: Tensor | None,
    segments: Tensor | None,
    left: int,
    silu: bool,
    backend: str,
) -> Tensor:
    """The output of one shard; the arguments are those of `ConvInputs`."""
    return _choose(x, weight, backend).forward(ConvInputs(x, weight, bias, past, past_ids, segments, left, silu))


@torch.library.custom_op("longreach::short_conv_grad", mutates_args=())
def short_conv_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor,
    past_ids: Tensor | None,
    segments: Tensor | None,
    left: int,
    silu: bool,
    backend: str,
) -> list[Tensor]:
    """The gradients of x, weight, bias (empty for None) and past."""
    inputs = ConvInputs(x, weight, bias, past, past_ids, segments, left, silu)
    dx, dweight, dbias, dpast = _choose(x, weight, backend).backward(grad, inputs)
    return [part.contiguous() for part in (dx, dweight, x.new_empty(0) if dbias is None else dbias, dpast)]


def _choose(x: Tensor, weight: Tensor, backend: str) -> ConvBackend:
    found = BACKENDS.choose(backend, x.device, x.dtype, weight.dtype, weight.shape[1])
    assert isinstance(found, ConvBackend), backend
    return found


@short_conv.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return contiguous_like(x)


@short_conv_grad.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, *_: Any) -> list[Tensor]:
    dbias = x.new_empty(0) if bias is None else contiguous_like(bias)
    return [contiguous_like(x), contiguous_like(weight), dbias, contiguous_like(past)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, *past = ctx.saved_tensors
    dx, dweight, dbias, dpast = torch.ops.longreach.short_conv_grad(grad, x, weight, bias, *past, *ctx.rest)
    return dx, dweight, None if bias is None else dbias, dpast, None, None, None, None, None


short_conv.register_autograd(_backward, setup_context=_save)
