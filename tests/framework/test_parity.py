"""Every mixer split over ranks against one process: outputs, carries and all gradients; and decoding token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_distributed
from torch import Tensor, nn

from longreach.framework.mixers import CONFIGS, MIXERS
from longreach.framework.mixers.registry import run_files
from longreach.framework.model import ModelConfig, build_model
from longreach.kernels.scan import Carry
from longreach.parallel.mesh import Axis
from longreach.parallel.span import Span

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "examples" / "ema.py"
WIDTH = 12
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHARES = [[9, 6], [8, 8, 1], [3, 3, 3, 1], [2, 2, 1, 0]]  # uneven, shorter than a convolution's reach, empty


@dataclass(frozen=True)
class Case:
    """One mixer with its options; ``taps`` reach farther than most shares."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    file: str = ""  # that registers it

    def build(self, causal: bool) -> nn.Module:
        torch.manual_seed(1)
        run_files([self.file] if self.file else [])
        config = CONFIGS[self.mixer]() if self.file else getattr(ModelConfig(), self.mixer)
        for name, value in self.options.items():
            assert hasattr(config, name)
            setattr(config, name, value)
        mixer: nn.Module = MIXERS[self.mixer](WIDTH, config, causal=causal)
        for parameter in mixer.parameters():  # so that no gradient is zero by a zero weight
            parameter.data += 0.1 * torch.randn_like(parameter)
        return mixer


CASES = {
    "elementwise": Case("elementwise", {"norm_group": 5}),
    "elementwise-plain": Case("elementwise", {"norm_group": 0, "conv_len": 0, "order": 2}),
    "chela-modal": Case("chela", {"heads": 3, "modes": 4}),
    "chela-modal-decay": Case("chela", {"heads": 3, "modes": 2, "decay": True, "arrangement": "parallel"}),
    "chela-free": Case("chela", {"heads": 3, "long_kernel": "free", "long_len": 7}),
    "chela-decaying": Case("chela", {"heads": 3, "long_kernel": "decaying", "long_len": 40}),
    "feedforward_kernel": Case("feedforward_kernel", {"heads": 3, "layers": 2}),
    "feedforward_kernel-amglu": Case("feedforward_kernel", {"heads": 3, "kernel": "amglu"}),
    "feedforward_kernel-ffn": Case("feedforward_kernel", {"heads": 3, "kernel": "ffn", "layers": 3}),
    "softmax": Case("softmax", {"heads": 3}),
    "ema, of docs/write-a-mixer.md": Case("ema", {"longest": 20.0}, str(EXAMPLE)),
}


def supported(case: Case, causal: bool) -> bool:
    """A forgetting linear attention and the example have no non-causal form."""
    return causal or not (case.options.get("decay") or case.file)


def documents(length: int, dtype: torch.dtype) -> Tensor:
    return (
        torch.randint(0, 3, (2, length)).clamp(max=1).cumsum(1)
        if length > 1
        else torch.zeros(2, length, dtype=torch.int64)
    )


def carry_before(mixer: nn.Module, packed: bool, dtype: torch.dtype) -> dict[str, Carry]:
    """What an earlier block of 6 tokens leaves."""
    span = Span(keep_carry=True, segments=torch.zeros(2, 6, dtype=torch.int64) if packed else None)
    with torch.no_grad():
        mixer(torch.randn(2, 6, WIDTH, dtype=dtype), span)
    return span.carry_out


def run_mixer(
    axis: Axis, name: str, causal: bool, packed: bool, dtype: torch.dtype, lengths: list[int]
) -> dict[str, tuple[str, Tensor]]:
    """Results by name, each with how ranks' parts make the whole: "tokens" in a row, "sum" over ranks, "same" on
    all.
    """
    mixer = CASES[name].build(causal).to(dtype)
    torch.manual_seed(2)
    length = sum(lengths)
    x, upstream = torch.randn(2, 2, length, WIDTH, dtype=dtype)
    ids = documents(length, dtype) if packed else None
    before = carry_before(mixer, packed, dtype) if causal else {}
    states = {key: carry.state.clone().requires_grad_() for key, carry in before.items()}
    carry = {key: Carry(states[key], carry.segment) for key, carry in before.items()}
    stop = list(accumulate(lengths))[axis.rank]
    mine = slice(stop - lengths[axis.rank], stop)
    dropout_seeds = torch.tensor([5, 6])
    span = Span(
        axis=axis,
        lengths=lengths,
        start=6 if causal else 0,
        segments=None if ids is None else ids[:, mine],
        carry=carry,
        keep_carry=causal,
        dropout_seeds=dropout_seeds,
    )
    piece = x[:, mine].clone().requires_grad_()
    y = mixer(piece, span)
    y, penalty = y if isinstance(y, tuple) else (y, y.new_zeros(()))
    after = {key: value.state for key, value in span.carry_out.items()}
    torch.manual_seed(3)
    wanted = {key: torch.randn_like(value) for key, value in after.items()}
    share = penalty / axis.size
    outputs = [y, *after.values()] + ([share] if share.requires_grad else [])
    grads = [upstream[:, mine], *wanted.values()] + ([torch.ones_like(share)] if share.requires_grad else [])
    torch.autograd.backward(outputs, grads)
    results = {"y": ("tokens", y.detach()), "x.grad": ("tokens", piece.grad)}
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        results[f"{key}.grad"] = ("sum", parameter.grad)
    for key, value in after.items():
        results[f"carry {key}"] = ("same", value.detach())
    for key, state in states.items():
        assert state.grad is not None, key
        results[f"carry {key}.grad"] = ("same", state.grad)
    return results  # type: ignore[return-value]


def assert_parts_make(
    whole: dict[str, tuple[str, Tensor]], ranks: list[dict[str, tuple[str, Tensor]]], dtype: Any
) -> None:
    for name, (how, expected) in whole.items():
        parts = [rank[name][1] for rank in ranks]
        if how == "tokens":
            close(torch.cat(parts, 1), expected, dtype, name)
        elif how == "sum":
            close(torch.stack(parts).sum(0), expected, dtype, name)
        else:
            for part in parts:
                close(part, expected, dtype, name)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    """Relative root mean square error."""
    assert got.shape == expected.shape and got.isfinite().all(), name
    if expected.numel():
        error = (got - expected).abs().square().mean().sqrt() / expected.abs().square().mean().sqrt().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], f"{name}: relative RMS error {float(error):.2e}"


def run_mixers(axis: Axis, specs: list[tuple[Any, ...]]) -> list[dict[str, tuple[str, Tensor]]]:
    return [run_mixer(axis, *spec) for spec in specs]


@pytest.mark.parametrize("lengths", SHARES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_mixer_over_ranks_equals_one_process(name: str, lengths: list[int]) -> None:
    """Catches a wrong halo, fold, all-to-all, carry or gradient scale: causal or not, packed or not, fp64 and fp32."""
    specs = [
        (name, causal, packed, dtype, lengths)
        for causal in (True, False)
        if supported(CASES[name], causal)
        for packed in (False, True)
        for dtype in (torch.float64, torch.float32)
    ]
    ranks = run_distributed(run_mixers, len(lengths), specs)
    for number, spec in enumerate(specs):
        whole = run_mixer(Axis(), *spec[:-1], [sum(lengths)])
        assert_parts_make(whole, [rank[number] for rank in ranks], spec[3])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("packed", [False, True])
def test_token_by_token_equals_the_parallel_pass(name: str, packed: bool) -> None:
    """Recurrent decoding from the carry, each mixer, across document boundaries too."""
    mixer = CASES[name].build(causal=True).double()
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    ids = documents(11, x.dtype) if packed else None
    with torch.no_grad():
        whole = mixer(x, Span(segments=ids))
        span, rows = Span(keep_carry=True), []
        for i in range(11):
            span.segments = None if ids is None else ids[:, i : i + 1]
            rows.append(mixer(x[:, i : i + 1], span))
            span = span.next_block(1)
    whole = whole[0] if isinstance(whole, tuple) else whole
    steps = torch.cat([row[0] if isinstance(row, tuple) else row for row in rows], 1)
    close(steps, whole, torch.float64, name)


def test_model_decodes_the_logits_of_the_parallel_pass() -> None:
    torch.manual_seed(1)
    mixers = ["elementwise", "chela", "feedforward_kernel", "softmax"]
    model = build_model(ModelConfig(vocab=17, width=24, depth=4, mixers=mixers)).double()
    tokens = torch.randint(0, 17, (2, 9))
    with torch.no_grad():
        whole = model(tokens)
        span = Span(keep_carry=True)
        for i in range(9):
            close(model(tokens[:, i : i + 1], span)[:, 0], whole[:, i], torch.float64, f"token {i}")
            span = span.next_block(1)
