"""Tiny models of transformers with random weights, and what they compute of a sequence: plainly, or under a `Span`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, WIDTH = 29, 32
IGNORED = -100

_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "pad_token_id": None, "bos_token_id": None}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_MLP = {"intermediate_size": 24}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 8}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "mamba2": {
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 6,
        "n_groups": 2,
        "num_hidden_layers": 2,
        "chunk_size": 8,
        "eos_token_id": None,
    },
    "bamba": {
        **_ATTENTION,
        **_MLP,
        **_MAMBA,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
    },
    "falcon_h1": {
        **_ATTENTION,
        **_MLP,
        **_MAMBA,
        "num_hidden_layers": 2,
        "mamba_d_ssm": 64,
        "mamba_rms_norm": True,
        "key_multiplier": 0.7,
        "attention_in_multiplier": 1.3,
        "attention_out_multiplier": 0.8,
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.9,
        "ssm_multipliers": [0.9, 1.1, 1.2, 0.8, 1.3],
    },
    "nemotron_h": {
        **_ATTENTION,
        **_MLP,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "ssm_state_size": 6,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 12,
    },
    "olmo_hybrid": {**_ATTENTION, **_MLP, **_DELTA, "num_hidden_layers": 3, "layer_types": _HYBRID},
    "qwen3_next": {
        **_ATTENTION,
        **_MLP,
        **_DELTA,
        **_EXPERTS,
        "num_hidden_layers": 3,
        "layer_types": _HYBRID,
        "shared_expert_intermediate_size": 12,
        "mlp_only_layers": [0],
    },
    "qwen3_5_text": {**_ATTENTION, **_MLP, **_DELTA, "num_hidden_layers": 3, "layer_types": _HYBRID},
    "kimi_linear": {
        **_MLP,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "layer_types": _HYBRID,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 7,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "linear_head_dim": 6,
        "linear_num_heads": 4,
    },
    "llama": {**_ATTENTION, **_MLP, "num_hidden_layers": 2},
    "qwen3": {**_ATTENTION, **_MLP, "num_hidden_layers": 2},
    # Families that share the functions of those above.
    "granitemoehybrid": {
        **_ATTENTION,
        **_MLP,
        **_MAMBA,
        "num_hidden_layers": 3,
        "layer_types": _HYBRID,
        "num_local_experts": 4,
        "shared_intermediate_size": 12,
        "position_embedding_type": "rope",
        "attention_multiplier": 0.4,
    },
    "zamba2": {
        **_MLP,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_mem_blocks": 1,
        "mamba_d_state": 6,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        "eos_token_id": None,
    },
    "lfm2": {
        **_MLP,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_multiple_of": 8,
        "conv_bias": True,
    },
    "mistral": {**_ATTENTION, **_MLP, "num_hidden_layers": 2, "sliding_window": 5},
    "gemma3_text": {
        **_ATTENTION,
        **_MLP,
        "num_hidden_layers": 3,
        "layer_types": _SLIDING,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
    },
    "hrm_text": {  # runs the same layers several times
        "num_attention_heads": 4,
        "head_dim": 8,
        **_MLP,
        "num_hidden_layers": 1,
        "H_cycles": 1,
        "L_cycles": 2,
        "L_bp_cycles": [2],
        "prefix_lm": False,
    },
    "qwen3_moe": {**_ATTENTION, **_MLP, **_EXPERTS, "num_hidden_layers": 2, "norm_topk_prob": True},
}


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model of `FAMILIES`, or of ``changes`` alone, in which every mixing layer matters, in training mode."""
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(seed)
    config._experts_implementation = "eager"  # others compute in fp32 or less only
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize(model)
    return model.to(dtype).train()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw all parameters anew: of a scale at which no layer is nearly the identity, decays from slow to fast."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last == "A_log":
            parameter.uniform_(-3, 1)
        elif last == "dt_bias":
            parameter.uniform_(-2, 1)
        elif parameter.dim() > 1:
            parameter.normal_(0, 0.4 if "embed" in name else 1.2 * parameter[0].numel() ** -0.5)
        else:
            parameter += 0.2 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)


class Wide(TorchFunctionMode):
    """Reads float32 as float64 wherever a dtype is named, so that a model in fp64 computes in fp64 throughout.

    Norms, decays, states and softmax of transformers convert to fp32 whatever comes in, which would leave nothing to
    compare beyond that.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy of ``logits [B, n, V]`` at ``labels [B, n]``, those of -100 left out."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def data(length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[batch, length]``, some of which are left out."""
    generator = torch.Generator().manual_seed(length)
    tokens, labels = torch.randint(1, VOCAB, (2, batch, length), generator=generator)
    labels[:, :2] = IGNORED
    return tokens, labels


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter by its name; nothing where it took no part (an expert without tokens)."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def plain(model: nn.Module, tokens: Tensor, labels: Tensor, bounds: list[list[int]]) -> dict[str, Tensor]:
    """Logits, loss and all gradients of transformers alone, one document at a time.

    ``bounds``: of each row, where its documents begin.
    """
    logits = torch.empty(*tokens.shape, VOCAB, dtype=next(model.parameters()).dtype)
    total = torch.zeros((), dtype=logits.dtype)
    for row, starts in enumerate(bounds):
        for start, stop in zip(starts, [*starts[1:], tokens.shape[1]], strict=True):
            place = slice(row, row + 1), slice(start, stop)
            out = model(tokens[place], use_cache=False).logits
            loss = nll(out, labels[place])
            loss.backward()
            logits[place] = out.detach()
            total = total + loss.detach()
    return {"logits": logits, "loss": total, **gradients(model)}
