"""`adapt`, and how an adapted model is called."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...kernels.linear_attention import LinearAttention
from ...parallel.span import Span
from .current import View, current_view, use
from .empty import WithoutTokens, without_tokens
from .functions import replacement
from .probe import check_mixing, check_positions, check_results
from .rebind import methods, rebound

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARYING_ROPES = ("dynamic", "longrope")  # whose angles depend on the length of what one rank sees
PASSED_ON = ("logits_to_keep", "output_hidden_states", "return_dict", "inputs_embeds")
_RECOMPUTE = "longreach_recompute"  # attribute of an adapted model

_replayed: ContextVar[Tensor | None] = ContextVar("replayed", default=None)  # what a base model answers without running


def adapt(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``model(tokens, span=span)`` run on a part of a sequence; this instance is changed, and returned.

    Args:
        model: a causal language model of transformers. It stays usable without a span, `generate` included; its
            ``state_dict`` and ``save_pretrained`` are as before.

    Raises:
        InputError: a layer mixes tokens in a way that is not known, by name; or a function that mixes tokens has
            parameters that are not known; or positions do not come from ``position_ids``; or the model gives other
            numbers with a span than without it.
    """
    if hasattr(model, _RECOMPUTE):
        return model
    _check_config(model.config)
    base = model.base_model
    whole = {id(model), id(base)}
    mixing = {
        name: module
        for name, module in model.named_modules()
        if _rebind(module, f"{name} ({type(module).__name__})") and id(module) not in whole
    }
    layers = dict(_layers(model, mixing))
    for name, module in {**mixing, **layers}.items():
        _under_view(module, name, is_layer=name in layers)
    if base is not model:
        _replayable(base)
    _with_span(model)
    setattr(model, _RECOMPUTE, False)
    if not any(parameter.is_meta for parameter in model.parameters()):

        def run(tokens: Tensor, span: Span) -> Tensor:
            return _call(model, View(span, is_local=True), tokens)

        def run_whole(tokens: Tensor, span: Span | None) -> Tensor:
            return model(tokens, use_cache=False).logits if span is None else _call(model, View(span), tokens)

        check_mixing(model, run)
        check_positions(model, run)
        check_results(model, run_whole)
    return model


def set_recompute(model: PreTrainedModel, recompute: bool) -> None:
    """Whether an adapted model keeps only each layer's input for backward, and computes the layer again then."""
    setattr(model, _RECOMPUTE, recompute)


def hidden_states(model: PreTrainedModel, tokens: Tensor, span: Span) -> Tensor:
    """``[B, n]`` ids of this shard -> ``[B, n, D]``, what an adapted model's head reads."""
    _check_call(model)
    if tokens.shape[1] == 0:
        one: Tensor = hidden_states(model, tokens.new_zeros(len(tokens), 1), WithoutTokens.from_span(span))
        return one[:, :0]
    with use(View(span, getattr(model, _RECOMPUTE))):
        found: Tensor = model.base_model(tokens, **_arguments(model.base_model, tokens, span))[0]
    return found


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """``[B, n, D]`` of `hidden_states` -> logits ``[B, n, vocab]`` by the model's own head, whatever it computes."""
    token = _replayed.set(hidden)
    try:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        found: Tensor = model(ids, use_cache=False, return_dict=True).logits
    finally:
        _replayed.reset(token)
    return found


def _check_config(config: Any) -> None:
    """Refuse what makes one rank's result depend on the others in ways that a span does not know."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError("model", type(config).__name__, "a causal language model, not an encoder with a decoder")
    if getattr(config, "output_router_logits", False):
        fix = "set output_router_logits=false: its loss is a mean over the tokens of one rank"
        raise InputError("config.output_router_logits", True, "false where a span is given", fix)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in VARYING_ROPES:
            allowed = f"none of {', '.join(VARYING_ROPES)}: their angles depend on how many tokens one rank sees"
            raise InputError("config.rope_parameters.rope_type", rope["rope_type"], allowed, "yarn, linear or llama3")


def random_settings(config: Any) -> dict[str, float]:
    """Settings of a model that draw random numbers in training, such as dropouts, that are not 0."""
    names = ("drop", "jitter")
    return {
        key: value
        for key, value in config.to_dict().items()
        if any(part in key for part in names) and isinstance(value, (int, float)) and value
    }


def _check_call(model: PreTrainedModel) -> None:
    """Refuse what in training gives a token another value on another rank, in another block or when computed again."""
    if not model.training:
        return
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            fix = "switch it off, and longreach.framework.hf.set_recompute(model, True) on"
            raise InputError(
                f"{name}.gradient_checkpointing", True, "off: it computes layers again without the span", fix
            )
        if isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p):
            allowed = "none in training with a span: its values depend on the other tokens, or on chance"
            raise InputError(name, type(module).__name__, allowed, "model.eval(), or another layer")
    drawn = random_settings(model.config)
    if drawn:
        allowed = "0 in training with a span: every rank and every recomputation would draw its own"
        raise InputError(
            f"config.{next(iter(drawn))}", next(iter(drawn.values())), allowed, "set it to 0, or model.eval()"
        )


def _rebind(module: nn.Module, where: str) -> bool:
    """Put the functions that take a span into the module's methods; whether any was changed."""
    changed = False
    for name, method in methods(module):
        ours = rebound(method, lambda global_name, value: replacement(global_name, value, where))
        if ours is not method:
            setattr(module, name, types.MethodType(ours, module))
            changed = True
    return changed


def _layers(model: nn.Module, mixing: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The layers of the outermost lists of layers that hold what mixes tokens."""
    mixers = {id(module) for module in mixing.values()}
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{path}.") for path in outer):
            continue
        if any(id(part) in mixers for part in module.modules()):
            outer.append(name)
            yield from ((f"{name}.{number}", layer) for number, layer in enumerate(module))


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's forward without its ``self``."""
    function: Callable[..., Any] = module.forward.__func__  # type: ignore[attr-defined]
    return function


def _under_view(module: nn.Module, name: str, is_layer: bool) -> None:
    """Run the module under the view of the layer ``name``; a layer of the model may be recomputed."""
    original = _own_forward(module)

    @wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        view = current_view()
        if view is None:
            return original(self, *args, **kwargs)
        own = view.layer_name(name)
        if not (is_layer and view.recompute and torch.is_grad_enabled()):
            with use(view.of_layer(name, own)):
                return original(self, *args, **kwargs)

        def run(*args: Any) -> Any:
            with use(view.of_layer(name, own, cache_collectives=True)):
                return original(self, *args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    module.forward = types.MethodType(forward, module)


def _replayable(base: nn.Module) -> None:
    """Let the base model answer with given hidden states, so that the head alone is run."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    original = _own_forward(base)

    class Replayed(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    @wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = _replayed.get()
        return original(self, *args, **kwargs) if given is None else Replayed(last_hidden_state=given)

    base.forward = types.MethodType(forward, base)


def _with_span(model: PreTrainedModel) -> None:
    original = _own_forward(model)

    @wraps(original)
    def forward(self: Any, input_ids: Tensor | None = None, *args: Any, span: Span | None = None, **kwargs: Any) -> Any:
        if span is None or current_view() is not None:
            return original(self, input_ids, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        wrong = sorted(given.keys() - set(PASSED_ON))
        if wrong or args:
            allowed = f"input_ids, span, {', '.join(PASSED_ON)}"
            fix = "a span brings positions, documents and the carry; losses: longreach.framework.hf.hidden_states"
            raise InputError("model(...)", wrong or "positional arguments", allowed, fix)
        _check_call(self)
        tokens = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        if tokens.shape[1] == 0:
            kwargs.pop("inputs_embeds", None)
            one = tokens.new_zeros(len(tokens), 1, dtype=torch.int64)
            return without_tokens(self(one, span=WithoutTokens.from_span(span), **kwargs))
        with use(View(span, getattr(self, _RECOMPUTE))):
            return original(self, input_ids, **_arguments(self, tokens, span), **kwargs)

    model.forward = types.MethodType(forward, model)


def _call(model: PreTrainedModel, view: View, tokens: Tensor) -> Tensor:
    """Logits under ``view``."""
    with use(view):
        found: Tensor = model(tokens, **_arguments(model, tokens, view.span), return_dict=True).logits
    return found


def _arguments(module: nn.Module, tokens: Tensor, span: Span) -> dict[str, Any]:
    """What a forward is told beside its tokens."""
    known = inspect.signature(_own_forward(module)).parameters
    arguments: dict[str, Any] = {"use_cache": False}
    if "position_ids" in known:
        arguments["position_ids"] = positions(tokens, span)
    return arguments


@torch.no_grad()
def positions(tokens: Tensor, span: Span) -> Tensor:
    """``[1, n]``, or ``[B, n]`` with documents: each token's number in its document, over all ranks and blocks."""
    batch, length = tokens.shape[:2]
    if span.segments is None:
        first = span.position - isinstance(span, WithoutTokens)  # of the one that nothing reads: in the table's range
        return torch.arange(first, first + length, device=tokens.device).unsqueeze(0)
    one = torch.ones(batch, length, 1, 1, dtype=torch.float64, device=tokens.device)  # exact below 2^53
    counted = span.for_layer("positions").scan(LinearAttention(), one, one, one)
    return (counted[..., 0, 0].round().long() - 1).clamp(min=0)
