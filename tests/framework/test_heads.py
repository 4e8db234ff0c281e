"""The tied head's loss, in slabs of rows: the same whatever their number, and as exact as its dtype allows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn

from longreach.framework.model import heads
from longreach.framework.model.heads import IGNORED, TokenHead

VOCAB, WIDTH, LENGTH = 96, 32, 4096
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}  # bf16 keeps 8 bits: one rounding is 2e-3


def head_and_inputs(dtype: torch.dtype) -> tuple[TokenHead, Tensor, Tensor]:
    torch.manual_seed(3)
    head = TokenHead(WIDTH, nn.Embedding(VOCAB, WIDTH))
    head.weight.data *= 0.5
    x, labels = torch.randn(2, LENGTH // 2, WIDTH), torch.randint(0, VOCAB, (2, LENGTH // 2))
    labels[:, ::7] = IGNORED
    return head.to(dtype), x.to(dtype).requires_grad_(), labels


def truth(head: TokenHead, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Losses and the gradients of x and the weight, in fp64, of all logits at once."""
    head, x = head.double(), x.detach().double().requires_grad_()
    logits = F.linear(head.norm(x), head.weight)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return [losses.view(labels.shape), *torch.autograd.grad(losses.sum(), [x, head.weight])]


@pytest.mark.parametrize("num_slabs", [1, 3, 512])
@pytest.mark.parametrize("dtype", LIMITS)
def test_many_slabs_are_as_exact_as_one(dtype: torch.dtype, num_slabs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gradient of the weight that adds up in 16 bits: 512 terms in bf16 are off by several percent."""
    monkeypatch.setattr(heads, "CPU_LOGIT_BYTES", 4 * VOCAB * -(-LENGTH // num_slabs))
    head, x, labels = head_and_inputs(dtype)
    losses = head(x, labels)
    found = [losses.detach(), *torch.autograd.grad(losses.sum(), [x, head.weight])]
    assert found[0].dtype == torch.promote_types(dtype, torch.float32) and found[2].dtype == dtype
    assert (found[0][labels == IGNORED] == 0).all()
    for name, mine, theirs in zip(("losses", "dx", "dweight"), found, truth(head, x, labels)):
        assert_close(name, mine, theirs, rel_rms=LIMITS[dtype])


def test_no_rows_and_no_labels() -> None:
    head, x, labels = head_and_inputs(torch.float32)
    empty = head(x[:, :0], labels[:, :0])
    assert empty.shape == (2, 0)
    grads = torch.autograd.grad(head(x, torch.full_like(labels, IGNORED)).sum() + empty.sum(), [x, head.weight])
    assert all((grad == 0).all() for grad in grads)


def test_a_label_that_is_not_finite_shows() -> None:
    """A NaN among the features is in the loss of its token, and in the gradient of the weight."""
    head, x, labels = head_and_inputs(torch.float32)
    labels[0, 1] = 5
    x.data[0, 1, 2] = float("nan")
    losses = head(x, labels)
    assert losses[0, 1].isnan() and losses.isnan().sum() == 1
    assert torch.autograd.grad(losses.sum(), head.weight)[0].isnan().any()


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast(autocast: bool) -> None:
    """As `F.linear` does: products in bf16, losses in fp32."""
    head, x, labels = head_and_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = head(x, labels)
    (grad,) = torch.autograd.grad(losses.sum(), head.weight)
    assert losses.dtype == grad.dtype == torch.float32
    assert_close("dweight", grad, truth(head, x, labels)[2], rel_rms=8e-3 if autocast else 2e-6)
