"""The long convolution as ``torch.compile`` sees it: the custom op ``longreach::long_conv``.

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
from .backends import BACKENDS
from .chunked import LongConv, run


def traced(backend: str) -> Callable[..., tuple[Tensor, Carry]]:
    """The convolution as one node of a graph; the arguments and results of `reference_long_conv`."""

    def convolve(*arguments: Any) -> Tensor:
        return torch.ops.longreach.long_conv(*arguments, backend)

    return partial(run, convolve)


@torch.library.custom_op("longreach::long_conv", mutates_args=())
def long_conv(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    past: Tensor,
    ids: Tensor | None,
    centre: int,
    backend: str = "auto",
) -> Tensor:
    """See `long_conv.chunked.forward`."""
    return _choose(x, kernel, backend).forward(x, kernel, skip, past, ids, centre)


@torch.library.custom_op("longreach::long_conv_grad", mutates_args=())
def long_conv_grad(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    past: Tensor,
    ids: Tensor | None,
    centre: int,
    backend: str = "auto",
) -> list[Tensor]:
    """See `long_conv.chunked.backward`; an empty tensor where there is no skip."""
    dx, dkernel, dskip, dpast = _choose(x, kernel, backend).backward(grad, x, kernel, skip, past, ids, centre)
    return [part.contiguous() for part in (dx, dkernel, x.new_empty(0) if dskip is None else dskip, dpast)]


def _choose(x: Tensor, kernel: Tensor, backend: str) -> LongConv:
    found = BACKENDS.choose(backend, x.device, x.dtype, kernel.dtype)
    assert isinstance(found, LongConv), backend
    return found


@long_conv.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return contiguous_like(x)


@long_conv_grad.register_fake
def _(grad: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None, past: Tensor, *_: Any) -> list[Tensor]:
    dskip = x.new_empty(0) if skip is None else contiguous_like(skip)
    return [contiguous_like(x), contiguous_like(kernel), dskip, contiguous_like(past)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, kernel, skip, past, ids = ctx.saved_tensors
    dx, dkernel, dskip, dpast = torch.ops.longreach.long_conv_grad(grad, x, kernel, skip, past, ids, *ctx.rest)
    return dx, dkernel, None if skip is None else dskip, dpast, None, None, None


long_conv.register_autograd(_backward, setup_context=_save)
