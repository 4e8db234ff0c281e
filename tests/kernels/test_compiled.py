"""The operators as custom ops: what `torch.library.opcheck` asks of one, and the results of the eager operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from longreach.kernels import compiled
from longreach.kernels.delta_rule import DeltaRule
from longreach.kernels.elementwise import ElementwiseAttention
from longreach.kernels.linear_attention import LinearAttention
from longreach.kernels.long_conv import compiled as compiled_long_conv
from longreach.kernels.long_conv import long_conv
from longreach.kernels.modal_conv import CentredModalConv, ModalConv
from longreach.kernels.scan import Carry, StatefulOp, scan
from longreach.kernels.short_conv import compiled as compiled_short_conv
from longreach.kernels.short_conv import short_conv

BATCH, LENGTH, WIDTH = 2, 5, 3


class Average(StatefulOp):
    """``s_i = a s_{i-1} + x_i``, y = s: its adjoints are `StatefulOp`'s, by automatic differentiation."""

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        y, _ = self.apply_state(inputs, segments, torch.zeros_like(inputs[0][:, 0]))
        return (inputs[1] ** LENGTH).unsqueeze(0), y[:, -1]

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, rate = inputs
        rows = [rate * past + x[:, 0]]
        for i in range(1, LENGTH):
            goes_on = 1 if segments is None else (segments[:, i] == segments[:, i - 1]).to(x.dtype).unsqueeze(-1)
            rows.append(rate * rows[-1] * goes_on + x[:, i])
        return torch.stack(rows, 1), ()


def heads() -> list[Tensor]:
    return [*torch.randn(2, BATCH, LENGTH, 2, 3).abs(), torch.randn(BATCH, LENGTH, 2, 4)]


def gated_heads() -> list[Tensor]:
    return [*heads(), *torch.rand(2, BATCH, LENGTH, 2).mul(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))]


def tokens() -> list[Tensor]:
    return list(torch.randn(3, BATCH, LENGTH, WIDTH))


def modes(*sides: int) -> list[Tensor]:
    rates = torch.randn(2, WIDTH, 2)
    return [torch.randn(BATCH, LENGTH, WIDTH), *rates, *torch.randn(2, *sides, WIDTH, 2)]


MIXERS = {
    "elementwise": (ElementwiseAttention(2), tokens),
    "elementwise-chunked": (ElementwiseAttention(2, backend="chunked"), tokens),
    "elementwise-centred": (ElementwiseAttention(2, causal=False), tokens),
    "linear": (LinearAttention(decay=(0.9, 0.5)), heads),
    "linear-chunked": (LinearAttention(normalize=True, backend="chunked"), heads),
    "linear-normalized": (LinearAttention(normalize=True), heads),
    "linear-gated": (LinearAttention(), lambda: [*heads(), -torch.rand(BATCH, LENGTH, 2)]),
    "linear-gated-chunked": (
        LinearAttention(normalize=True, backend="chunked"),
        lambda: [*(x[:, :, :1] for x in heads()[:2]), torch.randn(BATCH, LENGTH, 2, 4), -torch.rand(BATCH, LENGTH, 2)],
    ),
    "linear-groups": (LinearAttention(), lambda: [*(x[:, :, :1] for x in heads()[:2]), heads()[2]]),
    "delta-rule": (DeltaRule(), gated_heads),
    "delta-rule-chunked": (DeltaRule(normalize_qk=True, backend="chunked"), gated_heads),
    "modal": (ModalConv(), modes),
    "modal-chunked": (ModalConv(backend="chunked"), modes),
    "modal-centred": (CentredModalConv(), lambda: modes(2)),
    "average": (Average(), lambda: [torch.randn(BATCH, LENGTH, WIDTH), torch.rand(WIDTH)]),
}


@pytest.fixture(autouse=True)
def dynamo_forgets_the_mock() -> Iterator[None]:
    """The compiler looks functions up once, by name: it would keep the `is_compiling` that `traced` puts there."""
    yield
    torch._dynamo.trace_rules.clear_lru_cache()


def same(run: Any, leaves: list[Tensor], wanted: Any) -> None:
    """``run()`` and ``wanted()`` give the same pairs of output and state, and the same gradients of the leaves."""
    y, after = wanted()
    upstream = [torch.randn_like(y), torch.randn_like(after.state)]
    expected = [y, after.state, *torch.autograd.grad([y, after.state], leaves, upstream, materialize_grads=True)]
    y, after = run()
    got = [y, after.state, *torch.autograd.grad([y, after.state], leaves, upstream, materialize_grads=True)]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_scan(name: str, packed: bool) -> None:
    """Packed: documents, and something carried. Catches results whose shape the graph does not expect, and aliases."""
    op, make = MIXERS[name]
    inputs = [x.requires_grad_() for x in make()]
    segments = torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, 3, 3]]) if packed else None
    carry = None
    if packed:
        with torch.no_grad():
            state = scan(op, *inputs)[1].state
        carry = Carry(state.requires_grad_(), torch.tensor([0, 2]))
    leaves = inputs if carry is None else [*inputs, carry.state]

    def eager() -> tuple[Tensor, Carry]:
        return scan(op, *inputs, segments=segments, carry=carry)

    def traced() -> tuple[Tensor, Carry]:
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            return eager()

    same(traced, leaves, eager)
    call = (compiled.name_of(op), inputs, segments, None if carry is None else carry.state)
    torch.library.opcheck(compiled.scan, call)
    with torch.no_grad():
        y, final, transition, initial, *saved = compiled.scan(*call)
    saved = [y if x.dim() == 0 else x for x in saved]
    detached = [x.detach() for x in inputs]
    for needs_initial in (False, True):
        plain = call[0], detached, segments, initial, transition, saved, torch.randn_like(y), None, needs_initial
        torch.library.opcheck(compiled.scan_grad, plain)
    plain = call[0], detached, segments, initial, transition, saved, torch.randn_like(y), torch.randn_like(final), True
    torch.library.opcheck(compiled.scan_grad, plain)


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("packed", [False, True])
def test_short_conv(packed: bool, backend: str) -> None:
    x, weight, bias, past = (
        torch.randn(shape).requires_grad_()
        for shape in ((BATCH, LENGTH, WIDTH), (WIDTH, 4), (WIDTH,), (BATCH, 3, WIDTH))
    )
    how: dict[str, Any] = {"activation": "silu", "carry": Carry(past)}
    ids = past_ids = None
    if packed:
        ids, past_ids = torch.tensor([[0, 0, 1, 1, 1], [3] * 5]), torch.tensor([[-1, 0, 0], [2, 3, 3]])
        how |= {"segments": ids, "carry": Carry(past, past_ids)}
    same(
        lambda: compiled_short_conv.traced(backend)(x, weight, bias, **how),
        [x, weight, bias, past],
        lambda: short_conv(x, weight, bias, **how),
    )
    call = x, weight, None if packed else bias, past, past_ids, ids, 3, True, backend
    torch.library.opcheck(compiled_short_conv.short_conv, call)
    plain = (part.detach() if isinstance(part, Tensor) else part for part in call)
    torch.library.opcheck(compiled_short_conv.short_conv_grad, (torch.randn_like(x), *plain))


@pytest.mark.parametrize("packed", [False, True])
def test_long_conv(packed: bool) -> None:
    x, kernel, skip, past = (
        torch.randn(shape).requires_grad_() for shape in ((BATCH, 20, WIDTH), (WIDTH, 4), (WIDTH,), (BATCH, 3, WIDTH))
    )
    ids = torch.cat([torch.tensor([[-1, 0, 0], [2, 3, 3]]), torch.arange(20).expand(2, -1) // 8 + 3], 1)
    carry = Carry(past, ids[:, :3] if packed else None)
    y, _ = long_conv(x, kernel, skip, carry=carry, segments=ids[:, 3:] if packed else None)
    call = x, kernel, skip, past, ids if packed else None, 0
    torch.testing.assert_close(compiled_long_conv.long_conv(*call), y)
    torch.library.opcheck(compiled_long_conv.long_conv, call)
    plain = (part.detach() if isinstance(part, Tensor) else part for part in call)
    torch.library.opcheck(compiled_long_conv.long_conv_grad, (torch.randn_like(x), *plain))
