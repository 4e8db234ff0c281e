"""Memory of steps that are over: no span, and so no activation, outlives its step; on ranks, streamed, recomputed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import run_distributed
from torch import Tensor

from longreach.framework.model import ModelConfig, build_model
from longreach.parallel import streaming
from longreach.parallel.mesh import Axis, Mesh
from longreach.parallel.span import Span

LENGTH = 32


def spans_that_remain(axis: Axis, block_len: int, recompute: bool) -> int:
    """Of two training steps, after they are over."""
    torch.manual_seed(0)
    mixers = ["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"]
    config = ModelConfig(vocab=11, width=16, depth=len(mixers), mixers=mixers)
    model = build_model(config)
    model.recompute = recompute
    tokens, labels = torch.randint(0, 11, (2, 1, LENGTH))
    seen: list[weakref.ref[Span]] = []

    def loss(span: Span) -> Tensor:
        seen.append(weakref.ref(span))
        nll, penalty = model(span.shard(tokens), span, span.shard(labels))
        return nll.sum() + penalty

    for _ in range(2):
        ids = torch.arange(LENGTH).unsqueeze(0) // 9
        spans = streaming.blocks(Mesh(sequence=axis), LENGTH, block_len, segments=ids)
        streaming.train(spans, lambda span: model(span.shard(tokens), span, head=False), loss, Tensor.backward)
        del spans
    gc.collect()
    return sum(span() is not None for span in seen)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("ranks", "block_len"), [(1, 0), (1, 8), (2, 0), (2, 4)])
def test_no_span_outlives_its_step(ranks: int, block_len: int, recompute: bool) -> None:
    """Catches a cycle through the autograd graph, which Python's garbage collector does not see: on two ranks, each
    step of a streamed or recomputed run kept its activations.
    """
    assert run_distributed(spans_that_remain, ranks, block_len, recompute) == [0] * ranks
