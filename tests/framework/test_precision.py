"""Sums of very many terms in a training step whose dtype is bf16: none may stop growing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed_world import run_world
from helpers import assert_close
from torch import Tensor, nn

from longreach.framework.deepspeed.engine import Engine
from longreach.framework.deepspeed.settings import deepspeed_settings
from longreach.framework.layers import Embedding, RMSNorm, ShortConv, SwiGLU
from longreach.parallel import streaming
from longreach.parallel.mesh import init_mesh
from longreach.parallel.span import Span

TOKENS = 8192  # bf16 has 8 bits: a sum of equal terms that it holds stops at 256 of them


def module_gradients(module: nn.Module, x: Tensor, dtype: torch.dtype, block_len: int) -> list[Tensor]:
    """Of the mean of the output over ``x [1, L, ...]``, a block at a time."""
    module = module.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    length = x.shape[1]

    def loss(span: Span) -> Tensor:
        own = span.shard(x)
        y = module(own, span) if isinstance(module, ShortConv) else module(own)
        return y.sum(dtype=torch.promote_types(dtype, torch.float32)) / length

    blocks = streaming.blocks(init_mesh(), length, block_len)
    streaming.train(blocks, lambda span: loss(span), loss, lambda value: value.backward())
    return [p.grad for p in module.parameters() if p.grad is not None]


MODULES = {
    "embedding": lambda: Embedding(3, 8),
    "norm": lambda: RMSNorm(8),
    "group norm": lambda: RMSNorm(8, group=4),
    "gated": lambda: SwiGLU(8, 8),
    "short convolution": lambda: ShortConv(8, 4, activation="silu"),
    "linear": lambda: nn.Linear(8, 8),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_gradient_of_a_weight_sums_all_tokens(name: str) -> None:
    """Catches a sum over tokens in bf16, by equal terms, which round alike."""
    torch.manual_seed(0)
    module = MODULES[name]()
    x = torch.ones(1, TOKENS, dtype=torch.int64) if name == "embedding" else torch.rand(1, 1, 8).expand(1, TOKENS, 8)
    found = module_gradients(module, x, torch.bfloat16, 0)
    rounded = MODULES[name]().double()
    rounded.load_state_dict(module.state_dict())
    wanted = module_gradients(rounded, x.bfloat16() if x.is_floating_point() else x, torch.float64, 0)
    for got, want in zip(found, wanted, strict=True):
        assert_close(name, got, want, rel_rms=0.02)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def gradient_norm(rank: int, stage: int, num_micro_batches: int) -> float:
    mesh = init_mesh()
    model = Scale()
    sizes: dict[str, Any] = {"batch_size": num_micro_batches, "micro_batch_size": 1, "accumulation": num_micro_batches}
    settings = deepspeed_settings(f"zero{stage}", precision="bf16", clip=0.0, world_size=1, **sizes)
    engine = Engine(model, torch.optim.AdamW(model.parameters()), settings, mesh)
    for _ in range(num_micro_batches):
        engine.backward(engine(torch.ones(8, dtype=torch.bfloat16)) / num_micro_batches)
    norm = float(engine.step(1e-3))
    engine.close()
    return norm


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_micro_batches_add_up_in_fp32(stage: int) -> None:
    """Catches gradients of 1,000 micro-batches that are added in bf16: the norm is that of eight ones."""
    (norm,) = run_world(gradient_norm, 1, stage, 1000)
    assert norm == pytest.approx(8**0.5, rel=5e-3)
