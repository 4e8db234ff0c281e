"""A whole model on every layout: split over ranks, streamed, both; dense, packed, uneven. Loss and all gradients.

What it must equal is the same model run once, on the whole sequence, by one process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import run_distributed
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from longreach.framework.mixers import MIXERS, Mamba2Config
from longreach.framework.model import IGNORED, ModelConfig, build_model
from longreach.parallel import streaming
from longreach.parallel.mesh import Axis, Mesh, node_axes
from longreach.parallel.span import Span

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
PATTERNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "elementwise": (["elementwise"], {}),
    "chela-free": (["chela"], {"long_kernel": "free", "long_len": 7}),
    "chela-decaying": (["chela"], {"long_kernel": "decaying", "long_len": 40}),
    "chela-modal": (["chela"], {"modes": 3}),
    "feedforward_kernel": (["feedforward_kernel"], {}),
    "mamba2": (["mamba2"], {}),
    "gated_deltanet": (["gated_deltanet"], {}),
    "softmax": (["softmax"], {}),
    "hybrid": (["elementwise", "chela", "feedforward_kernel", "softmax"], {"modes": 3}),
}


@dataclass(frozen=True)
class Case:
    """One run of a model.

    Attributes:
        pattern: of `PATTERNS`.
        length: tokens of the whole sequence.
        starts: where documents begin, in each of two rows; None for no documents.
        block_len: tokens of a streamed block on each rank; 0 for the whole sequence.
        lengths: tokens of each rank; empty for the usual shares.
        dtype: of weights and activations.
        causal: direction of the model.
        recompute: compute blocks of the model again in backward.
        relay: how states travel; hierarchical (of 4 ranks) as on two nodes of two ranks.
    """

    pattern: str
    length: int
    starts: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    block_len: int = 0
    lengths: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    causal: bool = True
    recompute: bool = False
    relay: str = "gather"

    @property
    def segments(self) -> Tensor | None:
        if self.starts is None:
            return None
        rows = [[sum(start <= i for start in starts) for i in range(self.length)] for starts in self.starts]
        return torch.tensor(rows)


@cache
def two_nodes(axis: Axis) -> Axis:
    node, peers = node_axes([axis.ranks], 2)
    return replace(axis, relay="hierarchical", node=node, peers=peers)


def run(axis: Axis, case: Case) -> dict[str, Tensor]:
    """This rank's summand of the loss and of every parameter's gradient."""
    if axis.size > 1:
        axis = two_nodes(axis) if case.relay == "hierarchical" else replace(axis, relay=case.relay)
    torch.manual_seed(1)
    mixers, chela = PATTERNS[case.pattern]
    config = ModelConfig(vocab=17, width=16, depth=max(2, len(mixers)), mixers=mixers, causal=case.causal)
    for name, value in chela.items():
        setattr(config.chela, name, value)
    config.chela.heads = config.feedforward_kernel.heads = config.softmax.heads = 2
    config.elementwise.norm_group = 6
    config.mamba2 = Mamba2Config(head_width=8, state_size=5)
    model = build_model(config)
    for parameter in model.parameters():  # so that no gradient is small only by what the weights begin with
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.to(case.dtype)
    model.recompute = case.recompute
    torch.manual_seed(2)
    tokens, labels = torch.randint(0, 17, (2, 2, case.length))
    labels[:, :2] = IGNORED
    count = (labels != IGNORED).sum()
    fields: dict[str, Any] = {"segments": case.segments, "dropout_seeds": torch.tensor([5, 6])}
    spans = streaming.blocks(Mesh(sequence=axis), case.length, case.block_len, **fields)
    if case.lengths and axis.size > 1:
        spans = [replace(spans[0], lengths=case.lengths)]
        spans[0].segments = None if case.segments is None else spans[0].shard(case.segments)
    total = torch.zeros((), dtype=torch.float64)

    def loss(span: Span) -> Tensor:
        nll, penalty = model(span.shard(tokens), span, span.shard(labels))
        value = nll.sum() / count + penalty / (axis.size * len(spans))
        total.add_(value.detach())
        return value

    streaming.train(spans, lambda span: model(span.shard(tokens), span, head=False), loss, Tensor.backward)
    results = {"loss": total}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        results[name] = parameter.grad
    return results


def run_all(axis: Axis, cases: list[Case]) -> list[dict[str, Tensor]]:
    return [run(axis, case) for case in cases]


@cache
def run_whole(case: Case) -> dict[str, Tensor]:
    return run(Axis(), case)


def check(cases: list[Case], ranks: int) -> None:
    """Compare each case on so many ranks with the whole sequence in this process."""
    parts = run_distributed(run_all, ranks, cases) if ranks > 1 else [run_all(Axis(), cases)]
    for number, case in enumerate(cases):
        plain = replace(case, block_len=0, lengths=(), recompute=False, relay="gather")
        for name, wanted in run_whole(plain).items():
            found = torch.stack([part[number][name] for part in parts]).sum(0)
            # Where only a document's first token counts, some gradients are nothing but rounding.
            error = (found - wanted).norm() / wanted.norm().clamp(min=1e-3)
            limit = TOLERANCE[case.dtype]
            assert error <= limit, f"{case}: {name}: relative RMS error {float(error):.2e}"


def layouts(pattern: str, ranks: int) -> list[Case]:
    """{dense, documents, uneven} x {whole, streamed} x {fp64, fp32}; non-causal ones whole; some recomputed."""
    dense = Case(pattern, 24)
    # Documents that begin on a rank's edge (12 of 2 ranks, 8 of 3, 6 of 4), several in one share, one over all.
    documents = Case(pattern, 24, ((6, 7, 9, 12, 16), ()))
    uneven = Case(pattern, 23, ((1, 22), (8,)))
    cases = [replace(case, causal=False) for case in (dense, documents, uneven)]
    cases += [replace(uneven, causal=False, recompute=True), replace(uneven, block_len=5, recompute=True)]
    for relay in ("pipeline", "recursive_doubling", *(["hierarchical"] if ranks == 4 else [])):
        cases += [replace(uneven, relay=relay), replace(dense, relay=relay, causal=False)]
    for case in (dense, documents, uneven):
        cases += [replace(case, block_len=block_len) for block_len in (0, 3, 5)]
        cases += [replace(case, block_len=block_len, dtype=torch.float32) for block_len in (0, 5)]
    if any(getattr(MIXERS[mixer], "causal_only", False) for mixer in PATTERNS[pattern][0]):
        cases = [replace(case, causal=True) for case in cases]
    return cases


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_layout_gives_one_loss_and_one_gradient(pattern: str, ranks: int) -> None:
    """Catches a carry, halo, fold or all-to-all that loses, repeats or misplaces something at some edge."""
    check(layouts(pattern, ranks), ranks)


def test_documents_matter() -> None:
    """The comparison above would not see documents that are ignored everywhere."""
    for pattern in PATTERNS:
        packed = Case(pattern, 24, ((6, 7, 9, 12, 16), ()))
        assert (run(Axis(), packed)["loss"] - run(Axis(), replace(packed, starts=None))["loss"]).abs() > 1e-4


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int]:
    """A case and its number of ranks: any length, any documents, and any blocks or any split."""
    ranks = draw(st.integers(2, 4))
    split = draw(st.booleans())
    lengths = tuple(draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))) if split else ()
    length = sum(lengths) if split else draw(st.integers(3, 40))
    if length < 3:
        lengths, length = (*lengths[:-1], lengths[-1] + 3), length + 3
    starts = st.lists(st.integers(0, length - 1), max_size=6).map(lambda found: tuple(sorted(found)))
    return (
        Case(
            draw(st.sampled_from(sorted(PATTERNS))),
            length,
            draw(st.none() | st.tuples(starts, starts)),
            0 if split else draw(st.integers(0, 9)),
            lengths,
            recompute=draw(st.booleans()),
            relay=draw(
                st.sampled_from(["gather", "pipeline", "recursive_doubling", "hierarchical" if ranks == 4 else "auto"])
            ),
        ),
        ranks,
    )


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_layout_gives_one_loss_and_one_gradient(drawn: tuple[Case, int]) -> None:
    case, ranks = drawn
    check([case], ranks)
