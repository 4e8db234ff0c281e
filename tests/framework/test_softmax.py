"""Softmax attention, the baseline: masks of some rows at a time give what one mask gives, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from longreach.framework.mixers.softmax import Softmax, SoftmaxConfig
from longreach.kernels import attention
from longreach.kernels.state import Carry
from longreach.parallel.span import Span

LENGTH, PAST = 50, 9


def run(mixer: Softmax, x: Tensor, documents: bool, carried: bool) -> list[Tensor]:
    ids = (torch.arange(LENGTH).expand(2, -1) // 13 + 1) if documents else None
    carry = {}
    if carried:
        torch.manual_seed(5)
        past = torch.randn(2, PAST, 2, 12, dtype=x.dtype)
        carry = {".by_channel": Carry(past, torch.ones(2, PAST, dtype=torch.long) if documents else None)}
    y = mixer(x, Span(segments=ids, carry=carry, start=PAST if carried else 0))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("documents", "carried"), [(True, False), (True, True), (False, True)])
def test_masks_of_some_rows(documents: bool, carried: bool, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    mixer = Softmax(8, SoftmaxConfig(heads=2), causal=causal).double()
    x = torch.randn(2, LENGTH, 8, dtype=torch.float64, requires_grad=True)
    expected = run(mixer, x, documents, carried)
    largest = 0
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(*inputs: Tensor, attn_mask: Tensor | None = None, **how: bool) -> Tensor:
        nonlocal largest
        largest = max(largest, 0 if attn_mask is None else attn_mask.numel())
        return plain(*inputs, attn_mask=attn_mask, **how)

    monkeypatch.setattr(attention, "MASK_ELEMENTS", 700)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    names = ("y", "dx", *(name for name, _ in mixer.named_parameters()))
    for name, mine, theirs in zip(names, run(mixer, x, documents, carried), expected):
        assert_close(name, mine, theirs, max_abs=1e-12)
    assert 0 < largest <= 700 or (not causal and not documents)
