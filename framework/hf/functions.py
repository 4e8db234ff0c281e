"""Forms of transformers' functions that mix tokens which take the span of the running layer.

Each has the parameters of the function in whose place it stands, and calls that one where there is no span. What it
cannot compute with a span is refused, never ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...kernels.attention import attention, windowed_attention
from ...kernels.delta_rule import DeltaRule
from ...kernels.linear_attention import LinearAttention
from ...kernels.short_conv import short_conv
from ...parallel.span import ChannelShard
from .current import View, current_view

ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}  # which the kernel computes


@dataclass(frozen=True)
class Mask:
    """What a layer's attention sees, in the place of a tensor.

    Attributes:
        causal: whether a token sees itself and earlier ones only.
        window: how many tokens a token sees, itself included; 0 for all.
    """

    causal: bool = True
    window: int = 0


def replacement(name: str, value: Any, where: str) -> Any | None:
    """What stands in the place of the global ``name`` of a file of transformers, or None for what stays.

    Args:
        where: the layer that reads it, for messages.

    Raises:
        InputError: a function of this name with other parameters than those that we know.
    """
    if name == "mamba2_split_conv1d_scan_combined":
        return _with_span(_fused_mamba2, value)
    if name in FORMS:
        form, known = FORMS[name]
        given = set(inspect.signature(value).parameters)
        if not known <= given or not given <= known | IGNORED:
            others = sorted(given - known - IGNORED) or sorted(known - given)
            allowed = f"the parameters of {name} that are known ({', '.join(others)} differ)"
            raise InputError(f"{where}: {name}", sorted(given), allowed, "another version of transformers")
        return _with_span(form, value)
    if name == "ALL_ATTENTION_FUNCTIONS":
        return _Attentions(value)
    if getattr(value, "__module__", "") == "transformers.masking_utils" and name.startswith("create_"):
        if name not in MASKS:
            return _refusing(name, value, where)
        return _mask_maker(MASKS[name], value)
    return None


def _with_span(form: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    known = inspect.signature(original)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        view = current_view()
        if view is None:
            return original(*args, **kwargs)
        bound = known.bind(*args, **kwargs)
        extra = bound.arguments.pop("kwargs", {})
        for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx", "initial_state", "initial_states"):
            if {**extra, **bound.arguments}.get(name) is not None:
                raise InputError(
                    name, "a tensor", "None where a span is given", "Span.segments and Span.carry say as much"
                )
        return form(view, **bound.arguments)

    return call


def _causal_conv(
    view: View,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """``[B, D, L]``, ``weight [D, W]`` -> ``[B, D, L]``."""
    x = hidden_states.to(weight.dtype).transpose(1, 2)
    known = activation in ACTIVATIONS
    inner = ACTIVATIONS[activation] if known else None
    if view.is_local:
        y = x * weight.sum(-1) + (0 if bias is None else bias)
        return y.transpose(1, 2).to(hidden_states.dtype)

    def run(tokens: Tensor, segments: Tensor | None) -> Tensor:
        return short_conv(tokens, weight, bias, activation=inner, segments=segments)[0]

    y = view.span.halo(x, weight.shape[-1] - 1, 0, run, name=view.name("conv"))
    if not known:
        from transformers.activations import ACT2FN

        y = ACT2FN[activation](y)
    return y.transpose(1, 2).to(hidden_states.dtype)


def _fused_mamba2(view: View, *_: Any, **__: Any) -> None:
    """The fused kernel of a whole layer has no form with a span; the layer then calls the others."""


def _mamba2_scan(
    view: View,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> Tensor:
    """``hidden_states [B, L, H, P]``, ``dt [B, L, H]``, ``A [H]``, ``B, C [B, L, G, N]`` -> ``[B, L, H, P]`` in fp32 or
    better.

    On GPUs the scan multiplies in the dtype of its inputs and adds in fp32, as Mamba's own kernel; elsewhere it does
    both in fp32 or better, as transformers.
    """
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = _wide(dt.clamp(*dt_limit))
    x, key, query = (part if part.is_cuda else _wide(part) for part in (hidden_states, B, C))
    inputs = query, key, (dt.unsqueeze(-1) * x).to(x.dtype), A.to(dt.dtype) * dt
    y = _local(*inputs) if view.is_local else view.span.scan(LinearAttention(), *inputs, name=view.name("scan"))
    return y if D is None else y + D.unsqueeze(-1) * x


def _delta_rule(
    view: View,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """``query, key [B, L, G, K]``, ``value [B, L, H, V]``, ``beta [B, L, H]``, ``g [B, L, H]`` or ``[B, L, H, K]`` ->
    ``[B, L, H, V]``, and no state: the span carries it.
    """
    inputs = query, key, value, beta, g
    if view.is_local:
        return _local(*inputs).to(query.dtype), None
    op = DeltaRule(normalize_qk=use_qk_l2norm_in_kernel)
    return view.span.scan(op, *inputs, name=view.name("scan")).to(query.dtype), None


def _attention(
    view: View,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """``query [B, H, L, K]``, ``key [B, G, L, K]``, ``value [B, G, L, V]`` -> ``[B, L, H, V]``."""
    where = f"{view.span.layer} ({type(module).__name__})"
    for name in ("softcap", "s_aux", "position_bias", "cu_seq_lens_q", "block_sequence_ids"):
        if others.get(name) is not None:
            raise InputError(f"{where}: {name}", "given", "None: attention with a span does not know it")
    if dropout:
        raise InputError(f"{where}: dropout", dropout, "0", "set attention_dropout=0 in the model's configuration")
    if not isinstance(attention_mask, Mask):
        given = "a tensor" if isinstance(attention_mask, Tensor) else repr(attention_mask)
        raise InputError(f"{where}: attention_mask", given, "made by the functions of transformers.masking_utils")
    if not (attention_mask.causal or view.is_local) and (view.span.keep_carry or view.span.start):
        fix = "the whole sequence in one block (parallel.block_len=0)"
        raise InputError(f"{where}: attention in both directions", "in blocks", "whole sequences", fix)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups, heads, width = key.shape[1], query.shape[1] // key.shape[1], query.shape[-1]
    # [B, L, G, heads, K] and so on: heads that share keys stay together.
    q, k, v = query.unflatten(1, (groups, heads)).permute(0, 3, 1, 2, 4), key.transpose(1, 2), value.transpose(1, 2)
    if view.is_local:
        signs = torch.linspace(-1, 1, width, dtype=q.dtype, device=q.device)  # so that a rotation changes the sum
        y = v.unsqueeze(3) * (1 + ((q + k.unsqueeze(3)) * signs).mean(-1, keepdim=True))
    elif attention_mask.window and attention_mask.causal:
        y = _sliding(view, q, k, v, attention_mask.window, scale)
    else:
        y = _full(view, q, k, v, attention_mask.causal, scale)
    return y.reshape(*y.shape[:2], groups * heads, value.shape[-1]).contiguous(), None


def _full(view: View, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Attention over the whole sequence, each rank some heads of it. ``q [B, L, G, heads, K]``, ``k [B, L, G, K]``, ``v
    [B, L, G, V]`` -> ``[B, L, G, heads, V]``.
    """
    groups, heads, width, values = q.shape[2], q.shape[3], q.shape[4], v.shape[-1]
    # Where ranks are more than the heads of k and v, these are repeated, so that every rank has queries to answer.
    repeats = next((n for n in range(1, heads + 1) if heads % n == 0 and n * groups >= view.span.axis.size), heads)
    q = q.reshape(*q.shape[:2], groups * repeats, -1)
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))

    def run(shard: ChannelShard) -> Tensor:
        own_q, own_k, own_v = shard.tokens.split([q.shape[-1], width, values], dim=-1)
        own_q = own_q[:, shard.num_past :].unflatten(-1, (-1, width))
        y = attention(own_q, own_k, own_v, causal=causal, scale=scale, segments=shard.segments)
        return y.flatten(-2)

    y = view.span.by_channel(
        run, torch.cat([q, k, v], dim=-1), past_columns=width + values, name=view.name("attention")
    )
    return y.unflatten(-1, (-1, values)).reshape(*y.shape[:2], groups, heads, values)


def _sliding(view: View, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Attention to the last ``window`` tokens, whose keys and values come by a halo; shapes as in `_full`."""
    span, left = view.span, window - 1
    both = span.halo(torch.cat([k, v], dim=-1), left, name=view.name("attention"))
    k, v = both.split([k.shape[-1], v.shape[-1]], dim=-1)
    return windowed_attention(
        q, k, v, window, scale=scale, missing=left - span.position, segments=span.halo_segments(left)
    )


class _Attentions:
    """In the place of ``ALL_ATTENTION_FUNCTIONS``: ours where there is a span."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def get_interface(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        view = current_view()
        return self._registry.get_interface(*args, **kwargs) if view is None else partial(_attention, view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    def __getitem__(self, name: str) -> Any:
        view = current_view()
        return self._registry[name] if view is None else partial(_attention, view)


def _mask_maker(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        if current_view() is None:
            return original(*args, **kwargs)
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        for name in ("or_mask_function", "and_mask_function", "block_sequence_ids"):
            if given.get(name) is not None:
                raise InputError(f"{original.__name__}: {name}", "given", "None: a span's masks do not know it")
        if kind == "recurrent":
            return None
        config = given["config"]
        causal = kind != "bidirectional" and getattr(config, "is_causal", True) is not False
        return Mask(causal, config.sliding_window if kind == "sliding" else 0)

    return make


def _refusing(name: str, original: Callable[..., Any], where: str) -> Callable[..., Any]:
    @wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        if current_view() is None:
            return original(*args, **kwargs)
        raise InputError(
            f"{where}: {name}", "called", f"one of {', '.join(MASKS)}: attention with a span knows no other"
        )

    return make


def _local(*inputs: Tensor) -> Tensor:
    """Of each token alone, and of all inputs: ``[B, L, G, K]`` twice, ``[B, L, H, V]``, ``[B, L, H, ...]`` -> ``[B, L,
    H, V]``.
    """
    v, others = inputs[2], (inputs[0], inputs[1], *inputs[3:])
    return v + sum(x.flatten(2).mean(-1)[..., None, None] for x in others)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


IGNORED = {"kwargs", "initial_state", "initial_states", "output_final_state", "return_final_states", "chunk_size"}
_DELTA = {"query", "key", "value", "g", "beta", "use_qk_l2norm_in_kernel"}
FORMS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "causal_conv1d_fn": (_causal_conv, {"hidden_states", "weight", "bias", "activation"}),
    "mamba2_chunk_scan": (
        _mamba2_scan,
        {"hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus", "dt_limit"},
    ),
    "torch_chunk_gated_delta_rule": (_delta_rule, _DELTA),
    "chunk_kimi_delta_attention": (_delta_rule, _DELTA),
}
MASKS = {
    "create_causal_mask": "causal",
    "create_sliding_window_causal_mask": "sliding",
    "create_bidirectional_mask": "bidirectional",
    "create_recurrent_attention_mask": "recurrent",
}
