"""The operators as ``torch.compile`` sees them: custom ops ``longreach::*``, which a graph keeps whole.

Eager code never comes here. While a model is traced, `scan`, `short_conv` and `long_conv` call these ops instead of
their autograd Functions. What a graph is told of an op are its results' shapes: gradients have the shapes of what they
belong to, and the shapes of a mixer's results are found by its own passes, run on tensors without data (`is_traced`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import long_conv as long
from . import short_conv as short
from .long_conv.chunked import LongConv
from .scan import Carry, StatefulOp, broadcast_rows, edges, full_precision, gates, through, transition
from .short_conv.autograd import Local, Piece, run


def alone(
    op: StatefulOp, inputs: Sequence[Tensor], segments: Tensor | None, carry: Carry | None
) -> tuple[Tensor, Carry]:
    """`scan` of a piece that is the whole sequence, as one node of a graph; arguments and results as there."""
    state, segment = carry if carry is not None else (None, None)
    entry, last = gates([] if segments is None else [edges(segments)], carry)
    if state is not None and entry and entry[0] is not None:
        state = broadcast_rows(entry[0], state) * state
    y, end, *_ = torch.ops.longreach.scan(name_of(op), list(inputs), segments, state)
    return y, Carry(end, last if segments is not None else segment)


def name_of(op: StatefulOp) -> str:
    """What `_named` makes the operator of again, in this process or another one."""
    kind = type(op)
    settings = tuple([getattr(op, setting) for setting in kind.__match_args__])
    return f"{kind.__module__}:{kind.__qualname__}{settings!r}"


@cache
def _named(name: str) -> StatefulOp:
    module, _, call = name.partition(":")
    kind, bracket, settings = call.partition("(")
    return attrgetter(kind)(import_module(module))(*ast.literal_eval(bracket + settings))


@torch.library.custom_op("longreach::scan", mutates_args=())
def scan(op: str, inputs: Sequence[Tensor], segments: Tensor | None, start: Tensor | None) -> list[Tensor]:
    """The output, the state that leaves, ``A``, and what `scan_grad` wants saved: a scalar stands for the output."""
    return _run(_named(op), tuple(inputs), segments, start)


@scan.register_fake
def _(op: str, inputs: Sequence[Tensor], segments: Tensor | None, start: Tensor | None) -> list[Tensor]:
    # Documents change no shape but that of A, and some implementations look where they begin. Sizes are numbers: passes
    # walk over the tokens, so a graph is of one length.
    y, end, decay, *saved = _run(
        _named(op), tuple(_fixed(x) for x in inputs), None, None if start is None else _fixed(start)
    )
    if segments is not None:
        decay = decay.new_empty(segments.shape[0], *decay.shape[1:])
    return [y, end, decay, *saved]


def _fixed(x: Tensor) -> Tensor:
    sizes, strides = ([int(number) for number in numbers] for numbers in (x.shape, x.stride()))
    return torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device)


def _run(op: StatefulOp, inputs: tuple[Tensor, ...], segments: Tensor | None, start: Tensor | None) -> list[Tensor]:
    with _undisturbed(inputs[0]):
        op = op.resolve_backend(inputs)
        if op.causal:
            _, y, saved, decay, end = op.fused_forward(inputs, segments, start)
            decay = through(decay, segments, end)
        else:
            decay, state = transition(op, inputs, segments)
            past = _past(op, start, state[0])
            y, saved = op.apply_state(inputs, segments, past)
            end = decay * past[0] + state[0]
        if segments is not None:
            decay = decay.expand(segments.shape[0], *decay.shape[1:])
        # Nothing may be given twice, and what has documents may lie otherwise in memory.
        return [y, end.contiguous(), decay.contiguous(), *(y.new_zeros(()) if x is y else x for x in saved)]


def _past(op: StatefulOp, start: Tensor | None, like: Tensor) -> Tensor:
    """What enters the piece: ``start`` from the left, nothing from the right."""
    past = torch.zeros_like(like) if start is None else start.to(like.dtype)
    return past if op.causal else torch.stack([past, torch.zeros_like(past)])


@torch.library.custom_op("longreach::scan_grad", mutates_args=())
def scan_grad(
    op: str,
    inputs: Sequence[Tensor],
    segments: Tensor | None,
    start: Tensor | None,
    end: Tensor,
    decay: Tensor,
    saved: Sequence[Tensor],
    grad: Tensor,
    grad_end: Tensor | None,
) -> list[Tensor]:
    """The gradients of the inputs, then that of ``start``, empty where there is none."""
    piece = tuple(inputs)
    with _undisturbed(grad):
        one = _named(op).resolve_backend(piece)
        past, kept = _past(one, start, end), tuple(saved)
        to_start = end.new_empty(0)
        if start is not None:
            to_past = one.incoming_state_grad(piece, segments, past, kept, grad)
            to_start = to_past if one.causal else to_past[0]
            if grad_end is not None:
                to_start = to_start + decay.conj() * grad_end
            to_start = to_start.to(start.dtype)
        future = _past(one, grad_end, end)
        grads = one.input_grads(piece, segments, past, future, kept, grad)
    return [
        *(torch.zeros_like(x) if part is None else part.contiguous() for x, part in zip(piece, grads, strict=True)),
        to_start.contiguous(),
    ]


@scan_grad.register_fake
def _(
    op: str,
    inputs: Sequence[Tensor],
    segments: Tensor | None,
    start: Tensor | None,
    end: Tensor,
    decay: Tensor,
    saved: Sequence[Tensor],
    grad: Tensor,
    grad_end: Tensor | None,
) -> list[Tensor]:
    return [*(_like(x) for x in inputs), end.new_empty(0) if start is None else _like(start)]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@contextmanager
def _undisturbed(like: Tensor) -> Iterator[None]:
    """As in an autograd Function's passes: no gradients are recorded, no product is cast.

    A custom op runs below autograd, and inside of a dispatch mode without conjugation too, silently: a pass may use
    both for a piece of its own, as `StatefulOp`'s adjoints do.
    """
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in _PLAIN:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.no_grad(), full_precision(like):
        yield


_PLAIN = [
    getattr(torch._C.DispatchKey, name)
    for name in (
        "AutogradFunctionality",
        "AutogradOther",
        "AutogradNestedTensor",
        "ADInplaceOrView",
        "Conjugate",
        "Negative",
        "ZeroTensor",
    )
]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    op, tensors, segments, start = inputs
    y, end, decay, *saved = output
    ctx.save_for_backward(segments, start, end, decay, *tensors, *(y if x.dim() == 0 else x for x in saved))
    ctx.op, ctx.num_inputs, ctx.shape, ctx.dtype = op, len(tensors), y.shape, y.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    segments, start, end, decay, *tensors = ctx.saved_tensors
    inputs, saved = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
    grad, grad_end = grads[:2]
    if grad is None:
        grad = end.new_zeros(ctx.shape, dtype=ctx.dtype)
    *parts, to_start = torch.ops.longreach.scan_grad(ctx.op, inputs, segments, start, end, decay, saved, grad, grad_end)
    return None, list(parts), None, None if start is None else to_start


scan.register_autograd(_backward, setup_context=_save)


def short_conv_by(backend: str) -> Callable[..., tuple[Tensor, Carry]]:
    """`Local` as one node of a graph; the node chooses the implementation when it runs."""

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
    """See `short_conv.function.Local`."""
    return _local(x, weight, backend).forward(Piece(x, weight, bias, past, past_ids, segments, left, silu))


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
    """See `short_conv.function.Local`; empty for no bias."""
    piece = Piece(x, weight, bias, past, past_ids, segments, left, silu)
    dx, dw, db, dpast = _local(x, weight, backend).backward(grad, piece)
    return _contiguous(dx, dw, x.new_empty(0) if db is None else db, dpast)


def _local(x: Tensor, weight: Tensor, backend: str) -> Local:
    found = short.BACKENDS.choose(backend, x.device, x.dtype, weight.dtype, weight.shape[1])
    assert isinstance(found, Local), backend
    return found


@short_conv.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


@short_conv_grad.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, *_: Any) -> list[Tensor]:
    return [_like(x), _like(weight), x.new_empty(0) if bias is None else _like(bias), _like(past)]


def _save_short_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


def _short_conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, *past = ctx.saved_tensors
    dx, dw, db, dpast = torch.ops.longreach.short_conv_grad(grad, x, weight, bias, *past, *ctx.rest)
    return dx, dw, None if bias is None else db, dpast, None, None, None, None, None


short_conv.register_autograd(_short_conv_backward, setup_context=_save_short_conv)


def long_conv_by(backend: str) -> Callable[..., tuple[Tensor, Carry]]:
    """`LongConv` as one node of a graph; the node chooses the implementation when it runs."""

    def convolve(*arguments: Any) -> Tensor:
        return torch.ops.longreach.long_conv(*arguments, backend)

    return partial(long.chunked.run, convolve)


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
    return _long(x, kernel, backend).forward(x, kernel, skip, past, ids, centre)


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
    """See `long_conv.chunked.backward`; empty for no skip."""
    dx, dkernel, dskip, dpast = _long(x, kernel, backend).backward(grad, x, kernel, skip, past, ids, centre)
    return _contiguous(dx, dkernel, x.new_empty(0) if dskip is None else dskip, dpast)


def _long(x: Tensor, kernel: Tensor, backend: str) -> LongConv:
    found = long.BACKENDS.choose(backend, x.device, x.dtype, kernel.dtype)
    assert isinstance(found, LongConv), backend
    return found


@long_conv.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


@long_conv_grad.register_fake
def _(grad: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None, past: Tensor, *_: Any) -> list[Tensor]:
    return [_like(x), _like(kernel), x.new_empty(0) if skip is None else _like(skip), _like(past)]


def _save_long_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _long_conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, kernel, skip, past, ids = ctx.saved_tensors
    dx, dkernel, dskip, dpast = torch.ops.longreach.long_conv_grad(grad, x, kernel, skip, past, ids, *ctx.rest)
    return dx, dkernel, None if skip is None else dskip, dpast, None, None, None


long_conv.register_autograd(_long_conv_backward, setup_context=_save_long_conv)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """What the fake kernels promise of gradients."""
    return [x.contiguous() for x in tensors]
