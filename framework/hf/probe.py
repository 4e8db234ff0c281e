"""Runs an adapted model on a few tokens to find what mixes tokens, or numbers them, without the span.

In the first runs the known functions are replaced by functions of each token alone (`View.is_local`). Then one token's
value must reach no other token, and a token's value must not depend on those before it. At last the sequence in two
blocks must give what the model gives without a span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...parallel.span import Span

LENGTH, PLACE, START = 11, 5, 4  # tokens; the one that is not a number; where the second run begins
Run = Callable[[Tensor, Span], Tensor]


def check_mixing(model: nn.Module, run: Run) -> None:
    """Raise `InputError` naming the first module by which a token reaches others.

    Args:
        run: tokens ``[1, n]`` and a span -> logits ``[1, n, vocab]``, with known functions of each token alone.
    """
    others = [place for place in range(LENGTH) if place != PLACE]
    names = {id(module): name for name, module in model.named_modules()}
    running: list[nn.Module] = [model]
    found: list[nn.Module] = []

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, PLACE] = torch.nan
        return output

    def reached(value: Any) -> bool:
        # Not [n, D]: those of one expert may be as many.
        return any(x[0, others].isnan().any() for x in _tensors(value) if x.dim() == 3 and x.shape[:2] == (1, LENGTH))

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not found and reached((args, kwargs)):
            found.append(running[-1])
        running.append(module)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        running.pop()
        if not found and reached(output):
            found.append(module)

    with _evaluating(model), _hooks(model, enter, leave) as handles:
        handles.append(model.get_input_embeddings().register_forward_hook(spoil, prepend=True))  # type: ignore[operator]
        try:
            logits = run(_tokens(model, LENGTH), Span())
        except InputError:
            raise
        except Exception as error:  # of code that takes a mask or a state to be a tensor
            raise _refused(names, running[-1], f"cannot run with a span ({error})") from error
    if not found and logits[:, others].isnan().any():
        found.append(model)
    if found:
        raise _refused(names, found[0], "mixes tokens by none of the functions of transformers that can take a span")


def _refused(names: dict[int, str], module: nn.Module, reason: str) -> InputError:
    fix = "known are causal_conv1d_fn, mamba2_chunk_scan, the delta rules and the attention interface"
    return InputError(names.get(id(module)) or "the model", type(module).__name__, reason, fix)


def check_positions(model: nn.Module, run: Run) -> None:
    """Raise `InputError` naming the first module that numbers tokens by itself; ``run`` as for `check_mixing`."""
    names = {id(module): name for name, module in model.named_modules()}
    tokens = _tokens(model, LENGTH)
    outputs: list[list[tuple[nn.Module, Tensor]]] = []

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        outputs[-1].extend((module, x[:, -(LENGTH - START) :]) for x in _tensors(output) if x.dim() == 3)

    with _evaluating(model), _hooks(model, None, leave):
        for start in (0, START):
            outputs.append([])
            run(tokens[:, start:], Span(start=start))
    for (module, whole), (_, part) in zip(*outputs, strict=False):
        if whole.shape == part.shape and not _close(whole, part):
            raise _refused(names, module, "numbers tokens by itself, not by position_ids")


def check_results(model: nn.Module, run: Callable[[Tensor, Span | None], Tensor]) -> None:
    """Raise `InputError` unless a sequence in two blocks gives what it gives without a span.

    This finds what the checks above cannot: arguments that are ignored, positions that begin elsewhere than at 0. Of a
    model that sees both directions, which has no blocks, the sequence is one.

    Args:
        run: tokens ``[1, n]``, and a span or None -> logits ``[1, n, vocab]``.
    """
    outputs: list[dict[tuple[int, int], tuple[nn.Module, Tensor]]] = []

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        for x in _tensors(output):
            if x.dim() == 3:
                found = outputs[-1]
                found[id(module), sum(key[0] == id(module) for key in found)] = module, x

    def in_blocks(*lengths: int) -> Tensor:
        span, parts = Span(keep_carry=len(lengths) > 1), []
        del outputs[1:]
        for part in tokens.split(lengths, dim=1):
            outputs.append({})
            parts.append(run(part, span))
            span = span.next_block(part.shape[1])
        return torch.cat(parts, dim=1)

    tokens = _tokens(model, LENGTH)
    with _evaluating(model), _hooks(model, None, leave):
        outputs.append({})
        expected = run(tokens, None)
        try:
            logits = in_blocks(START, LENGTH - START)
        except InputError:
            logits = in_blocks(LENGTH)
    if _same(expected, logits):
        return
    names = {id(module): name for name, module in model.named_modules()}
    for key, (module, x) in outputs[0].items():
        blocks = [block[key][1] for block in outputs[1:] if key in block]
        if sum(block.shape[1] for block in blocks) == x.shape[1] == LENGTH and not _same(x, torch.cat(blocks, dim=1)):
            raise _refused(names, module, "gives other numbers with a span than without")
    raise _refused(names, model, "gives other numbers with a span than without")


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether most tokens have the same values, to rounding; some may have gone to other experts by rounding."""
    error = (x - y).float().norm(dim=-1) / x.float().norm(dim=-1).clamp(min=1e-30)
    return not error.median() > (0.3 if torch.finfo(x.dtype).bits < 32 else 1e-2)


def _close(x: Tensor, y: Tensor) -> bool:
    # Norms and decays of a model in fp64 are computed in fp32.
    rounding = max(torch.finfo(dtype).eps for dtype in (x.dtype, torch.float32)) ** 0.5
    return bool(((x - y).abs().max() <= rounding * y.abs().max()).item())


def _tokens(model: nn.Module, length: int) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return (torch.arange(1, length + 1, device=weight.device) % weight.shape[0]).unsqueeze(0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooks(model: nn.Module, enter: Any, leave: Any) -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        for module in model.modules():
            if enter is not None:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield handles
    finally:
        for handle in handles:
            handle.remove()
