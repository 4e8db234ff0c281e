"""Mixers in the form of their papers: kernels of SGConv's shape and norm, options of the feed-forward kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.mixers import FeedforwardKernelConfig
from longreach.framework.mixers.chela import TapKernel
from longreach.framework.mixers.feedforward_kernel import FeedforwardKernel, KernelLayer
from longreach.framework.model import ModelConfig, build_model
from longreach.parallel.span import Span


def sgconv(points: Tensor, taps: int) -> Tensor:
    """The kernel of SGConv (arXiv 2210.09298) up to a factor per channel: scale i has the weight ``2^-i``."""
    pieces = []
    for i, piece in enumerate(points):
        pieces.append(F.interpolate(piece[None], scale_factor=2 ** max(0, i - 1), mode="linear")[0] * 2.0**-i)
    return torch.cat(pieces, dim=1)[:, :taps]


@pytest.mark.parametrize("taps", [16, 32, 100, 1024])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "centred"])
def test_a_decaying_kernel_begins_with_norm_1_in_each_channel(taps: int, causal: bool) -> None:
    torch.manual_seed(0)
    module = TapKernel(6, taps, "decaying", causal)
    kernel = module.kernel().detach()
    assert kernel.shape == (6, taps)
    torch.testing.assert_close(kernel.norm(dim=1), torch.ones(6))
    assert not list(module.buffers()), "checkpoints of earlier versions would lack it"
    if causal:
        torch.testing.assert_close(kernel, sgconv(module.points.detach(), taps))


def test_the_divisor_of_the_norm_is_that_of_the_start() -> None:
    """Training changes the norm: it is no constraint."""
    torch.manual_seed(0)
    module = TapKernel(3, 64, "decaying", causal=True)
    before = module.kernel().detach()
    with torch.no_grad():
        module.points.mul_(3)
    torch.testing.assert_close(module.kernel().detach(), 3 * before)


def test_a_decaying_kernel_keeps_the_scale_of_its_input() -> None:
    torch.manual_seed(0)
    module = TapKernel(32, 512, "decaying", causal=True).double()
    x = torch.randn(1, 20_000, 32, dtype=torch.float64)
    with torch.no_grad():
        y = (module(x, Span()) - module.skip * x)[:, 512:]
    assert y.std().item() == pytest.approx(1, rel=0.03)


def test_a_feature_map_without_gates_has_one_layer() -> None:
    """Two would be one linear map."""
    config = ModelConfig(vocab=8, width=8, depth=1, mixers=["feedforward_kernel"])
    config.feedforward_kernel.kernel, config.feedforward_kernel.layers = "ffn", 2
    with pytest.raises(
        InputError, match=r"^model\.feedforward_kernel\.layers = 2: 1 with kernel = ffn: .*; kernel=glu"
    ):
        build_model(config)


def test_the_penalty_of_a_feature_map_is_the_authors() -> None:
    """He adds 0.01 of the mean squared error for q, and as much for k, of the same matrices."""
    torch.manual_seed(0)
    mixer = FeedforwardKernel(8, FeedforwardKernelConfig(heads=2))
    layer = mixer.features[0]
    assert isinstance(layer, KernelLayer)
    with torch.no_grad():
        layer.out.add_(0.3 * torch.randn_like(layer.out))
    _, penalty = mixer(torch.randn(1, 3, 8), Span())
    error = F.mse_loss(layer.out @ layer.out.mT, torch.eye(4).expand(2, 4, 4))
    torch.testing.assert_close(penalty, 0.01 * error + 0.01 * error)


def test_the_configs_are_the_papers() -> None:
    taps, kernel = load("chela-taps").model, load("listops-feedforward-kernel").model
    assert (taps.mixers, taps.chela.long_kernel, taps.chela.arrangement) == (["chela"], "decaying", "sequential")
    assert (kernel.width, kernel.depth, kernel.feedforward_kernel.heads) == (512, 6, 8)
    with torch.device("meta"):
        kernel.vocab, kernel.outputs = 16, 10
        names = {name for name, _ in build_model(kernel).named_parameters()}
    assert {"blocks.5.mixer.qkv.bias", "blocks.5.mixer.out.bias"} <= names
