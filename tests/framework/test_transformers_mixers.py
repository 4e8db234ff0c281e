"""The mixers that transformers has too, with the same weights: `mamba2` and `gated_deltanet`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

from longreach.errors import InputError
from longreach.framework.mixers import GatedDeltaNetConfig, Mamba2Config, build_mixer
from longreach.parallel.span import Span

WIDTH = 16
Pair: TypeAlias = Callable[[], tuple[nn.Module, nn.Module]]


def both(
    ours: nn.Module, theirs: nn.Module, length: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and the gradient of the input, of either module."""
    torch.manual_seed(1)
    x, upstream = torch.randn(2, 2, length, WIDTH).to(dtype)
    results = []
    for run in (lambda x: ours(x, Span()), theirs):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf], upstream)])
    return results[0], results[1]


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter += 0.1 * torch.randn_like(parameter)


def mamba2() -> tuple[nn.Module, nn.Module]:
    """Our mixer and the layer of transformers, with the same weights."""
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    shape = TheirConfig(
        hidden_size=WIDTH,
        num_heads=8,
        head_dim=4,
        state_size=6,
        n_groups=2,
        expand=2,
        chunk_size=8,
        num_hidden_layers=1,
    )
    theirs = Mamba2Mixer(shape, 0)
    randomize(theirs)
    ours = build_mixer("mamba2", WIDTH, Mamba2Config(head_width=4, state_size=6, groups=2), causal=True)
    ours.load_state_dict(
        {
            "project.weight": theirs.in_proj.weight,
            "conv.weight": theirs.conv1d.weight.squeeze(1),
            "conv.bias": theirs.conv1d.bias,
            "gate.log_rate": theirs.A_log,
            "gate.bias": theirs.dt_bias,
            "skip": theirs.D,
            "norm.weight": theirs.norm.weight,
            "out.weight": theirs.out_proj.weight,
        }
    )
    return ours, theirs


def gated_deltanet() -> tuple[nn.Module, nn.Module]:
    """Our mixer and the layer of transformers, with the same weights."""
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    heads, groups, key, value = 4, 2, 5, 6
    shape = Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_value_heads=heads,
        linear_num_key_heads=groups,
        linear_key_head_dim=key,
        linear_value_head_dim=value,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = Qwen3NextGatedDeltaNet(shape, 0)
    randomize(theirs)
    config = GatedDeltaNetConfig(heads=heads, key_heads=groups, key_width=key, value_width=value)
    ours = build_mixer("gated_deltanet", WIDTH, config, causal=True)
    # Theirs have q, k, v and z of a group of heads side by side, and likewise beta and the decay.
    per_group = heads // groups
    q, k, v, z = theirs.in_proj_qkvz.weight.view(groups, -1, WIDTH).split(
        [key, key, per_group * value, per_group * value], dim=1
    )
    beta, decay = theirs.in_proj_ba.weight.view(groups, -1, WIDTH).split([per_group, per_group], dim=1)
    ours.load_state_dict(
        {
            "qkv.weight": torch.cat([part.flatten(0, 1) for part in (q, k, v)]),
            "conv.weight": theirs.conv1d.weight.squeeze(1),
            "conv.bias": torch.zeros_like(ours.conv.bias),
            "beta.weight": beta.flatten(0, 1),
            "decay.weight": decay.flatten(0, 1),
            "gate.log_rate": theirs.A_log,
            "gate.bias": theirs.dt_bias,
            "norm.weight": theirs.norm.weight,
            "output_gate.weight": z.flatten(0, 1),
            "out.weight": theirs.out_proj.weight,
        }
    )
    return ours, theirs


@pytest.mark.parametrize("length", [1, 7, 70])
@pytest.mark.parametrize("pair", [mamba2, gated_deltanet], ids=lambda pair: pair.__name__)
def test_a_mixer_with_the_weights_of_transformers(pair: Pair, length: int) -> None:
    for name, found, wanted in zip(("y", "gradient"), *both(*pair(), length), strict=True):
        assert_close(name, found, wanted, rel_rms=1e-5)


@pytest.mark.parametrize("pair", [mamba2, gated_deltanet], ids=lambda pair: pair.__name__)
def test_sixteen_bits_are_as_exact_as_those_of_transformers(pair: Pair) -> None:
    """Weights and inputs in bf16: the error against the same layer in fp32, of the output and of the gradient."""
    ours, theirs = pair()
    exact, _ = both(ours, theirs, 70)
    rounded = both(copy.deepcopy(ours).bfloat16(), copy.deepcopy(theirs).bfloat16(), 70, torch.bfloat16)
    for wanted, found, others in zip(exact, *rounded, strict=True):
        error, allowed = ((x.float() - wanted).norm() / wanted.norm() for x in (found, others))
        assert error <= 1.25 * allowed


def test_gated_deltanet_without_decay_does_not_forget() -> None:
    """A fact that was written once is read behind a thousand writes along other keys."""
    config = GatedDeltaNetConfig(heads=1, key_width=4, value_width=4, decay="none")
    mixer = build_mixer("gated_deltanet", WIDTH, config, causal=True)
    assert mixer.gate is None
    q = torch.tensor([1.0, 0, 0, 0]).expand(1, 1001, 1, 4)
    keys = torch.cat([q[:, :1], torch.tensor([0, 1.0, 0, 0]).expand(1, 1000, 1, 4)], dim=1)
    values, beta = torch.randn(1, 1001, 1, 4), torch.ones(1, 1001, 1)
    y = Span().scan(mixer.attention, q, keys, values, beta)
    assert_close("y", y[:, -1] * 2, values[:, 0], rel_rms=1e-5)  # scale: 4 ** -0.5


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_mixers_with_decays_see_the_past_only(name: str) -> None:
    config = {"mamba2": Mamba2Config(head_width=4), "gated_deltanet": GatedDeltaNetConfig()}[name]
    with pytest.raises(InputError, match=f"model.causal.*{name}"):
        build_mixer(name, WIDTH, config, causal=False)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (Mamba2Config(head_width=5), "head_width"),
        (Mamba2Config(head_width=4, groups=3), "groups"),
        (Mamba2Config(head_width=4, dt_min=0.2), "dt_min"),
    ],
)
def test_sizes_of_mamba2_that_do_not_fit(config: Mamba2Config, field: str) -> None:
    with pytest.raises(InputError, match=rf"model\.mamba2\.{field}"):
        build_mixer("mamba2", WIDTH, config, causal=True)
