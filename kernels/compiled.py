"""The local scan as ``torch.compile`` sees it: the custom op ``longreach::scan``, one node of a graph.

Eager code does not call it. While a model is traced, `scan` calls this op instead of its autograd Function; both run
`local_scan` and `StatefulOp.fused_backward`. A graph is told the shapes of the results: gradients have those of what
they belong to, and those of the forward pass are found by the operator's own passes on tensors without data
(`is_traced`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .state import StatefulOp, full_precision, local_scan


def name_of(op: StatefulOp) -> str:
    """A text from which `_named` rebuilds the operator, in this process or another one."""
    kind = type(op)
    settings = tuple([getattr(op, setting) for setting in kind.__match_args__])
    return f"{kind.__module__}:{kind.__qualname__}{settings!r}"


@cache
def _named(name: str) -> StatefulOp:
    module, _, call = name.partition(":")
    kind, bracket, settings = call.partition("(")
    return attrgetter(kind)(import_module(module))(*ast.literal_eval(bracket + settings))


@torch.library.custom_op("longreach::scan", mutates_args=())
def scan(op: str, inputs: Sequence[Tensor], segments: Tensor | None, initial: Tensor | None) -> list[Tensor]:
    """`local_scan`: y, the final state, ``A``, the initial state, and what was saved.

    A scalar stands for y among what was saved, and for an ``A`` that is not needed.
    """
    return _forward(op, tuple(inputs), segments, initial)


@scan.register_fake
def _(op: str, inputs: Sequence[Tensor], segments: Tensor | None, initial: Tensor | None) -> list[Tensor]:
    # Documents change no shape but that of A, and some implementations read where they begin. Sizes are made numbers:
    # passes walk over the tokens, so a graph is of one length.
    given = None if initial is None else _fixed(initial)
    y, final, transition, *rest = _forward(op, tuple(_fixed(x) for x in inputs), None, given)
    if segments is not None and transition.dim():
        transition = transition.new_empty(segments.shape[0], *transition.shape[1:])
    return [y, final, transition, *rest]


def _fixed(x: Tensor) -> Tensor:
    sizes, strides = ([int(number) for number in numbers] for numbers in (x.shape, x.stride()))
    return torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device)


def _forward(name: str, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None) -> list[Tensor]:
    with below_autograd(inputs[0]):
        op = _named(name).resolve_backend(inputs)
        y, final, transition, start, saved = local_scan(op, inputs, segments, initial)
        if transition is None:
            transition = y.new_zeros(())
        elif segments is not None:
            transition = transition.expand(segments.shape[0], *transition.shape[1:])
        # An op may not return one of its inputs, or a tensor twice; with documents, strides may differ.
        start = start.clone(memory_format=torch.contiguous_format)
        saved = tuple(y.new_zeros(()) if x is y else x for x in saved)
        return [y, final.contiguous(), transition.contiguous(), start, *saved]


@torch.library.custom_op("longreach::scan_grad", mutates_args=())
def scan_grad(
    op: str,
    inputs: Sequence[Tensor],
    segments: Tensor | None,
    initial: Tensor,
    transition: Tensor,
    saved: Sequence[Tensor],
    grad: Tensor,
    final_grad: Tensor | None,
    need_initial_grad: bool,
) -> list[Tensor]:
    """`StatefulOp.fused_backward`: the gradients of the inputs, then that of the initial state, empty if not needed."""
    shard = tuple(inputs)
    with below_autograd(grad):
        one = _named(op).resolve_backend(shard)
        kept = transition if transition.dim() else None
        grads, initial_grad = one.fused_backward(
            shard, segments, initial, kept, tuple(saved), grad, final_grad, need_initial_grad
        )
    return [
        *(torch.zeros_like(x) if part is None else part.contiguous() for x, part in zip(shard, grads, strict=True)),
        initial.new_empty(0) if initial_grad is None else initial_grad.contiguous(),
    ]


@scan_grad.register_fake
def _(
    op: str,
    inputs: Sequence[Tensor],
    segments: Tensor | None,
    initial: Tensor,
    transition: Tensor,
    saved: Sequence[Tensor],
    grad: Tensor,
    final_grad: Tensor | None,
    need_initial_grad: bool,
) -> list[Tensor]:
    one_way = initial if _named(op).causal else initial[0]
    return [
        *(contiguous_like(x) for x in inputs),
        contiguous_like(one_way) if need_initial_grad else one_way.new_empty(0),
    ]


def contiguous_like(x: Tensor) -> Tensor:
    """An uninitialized tensor like ``x``, contiguous: what fake kernels promise of gradients."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@contextmanager
def below_autograd(like: Tensor) -> Iterator[None]:
    """As in an autograd Function's passes: no gradients are recorded, no product is cast.

    A custom op runs below autograd, and inside of a dispatch mode without conjugation too, silently. A pass may use
    both for a computation of its own, as `StatefulOp`'s adjoints do.
    """
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in _RESTORED:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.no_grad(), full_precision(like):
        yield


_RESTORED = [
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
    op, tensors, segments, initial = inputs
    y, _, transition, start, *saved = output
    ctx.save_for_backward(segments, start, transition, *tensors, *(y if x.dim() == 0 else x for x in saved))
    ctx.op, ctx.num_inputs, ctx.shape, ctx.dtype = op, len(tensors), y.shape, y.dtype
    ctx.initial_dtype = None if initial is None else initial.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    segments, start, transition, *tensors = ctx.saved_tensors
    inputs, saved = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
    grad, final_grad = grads[:2]
    if grad is None:
        grad = start.new_zeros(ctx.shape, dtype=ctx.dtype)
    wanted = ctx.initial_dtype is not None
    *parts, initial_grad = torch.ops.longreach.scan_grad(
        ctx.op, inputs, segments, start, transition, saved, grad, final_grad, wanted
    )
    return None, list(parts), None, initial_grad.to(ctx.initial_dtype) if wanted else None


scan.register_autograd(_backward, setup_context=_save)
