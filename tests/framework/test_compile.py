"""``torch.compile`` of the whole model: one graph, and what eager code gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import run_world
from helpers import run_distributed
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.mixers import Mamba2Config
from longreach.framework.model import ModelConfig, build_model
from longreach.framework.runtime.process import compile_model
from longreach.framework.trainer import train
from longreach.parallel import streaming
from longreach.parallel.mesh import Axis, Mesh
from longreach.parallel.span import Span

BATCH, LENGTH, VOCAB = 2, 20, 17


@dataclass(frozen=True)
class Case:
    """A model and a span. Packed: several documents in a row."""

    mixers: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    causal: bool = True
    packed: bool = False
    streamed: bool = False

    def span(self) -> Span:
        ids = torch.arange(LENGTH).expand(BATCH, -1) // 7 if self.packed else None
        return Span(segments=ids, dropout_seeds=torch.tensor([5, 6]) if self.packed else None, keep_carry=self.streamed)


CASES = {
    "elementwise": Case(["elementwise"]),
    "chela": Case(["chela"]),
    "feedforward_kernel": Case(["feedforward_kernel"]),
    "decays by the token": Case(["mamba2", "gated_deltanet"], packed=True),
    "packed": Case(["elementwise", "chela", "feedforward_kernel"], packed=True),
    "centred": Case(["elementwise", "chela", "feedforward_kernel"], causal=False),
    "taps": Case(["chela"], {"long_kernel": "free", "long_len": 7}, packed=True),
    "streamed": Case(["elementwise", "chela"], streamed=True),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch, of autograd Functions
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by torch, of carries
@pytest.mark.parametrize("name", CASES)
def test_one_graph_gives_what_eager_code_gives(name: str) -> None:
    """Catches graph breaks, an operator's gradient that a graph drops, and a choice frozen while tracing."""
    case = CASES[name]
    config = ModelConfig(vocab=VOCAB, width=16, depth=len(case.mixers), mixers=case.mixers, causal=case.causal)
    for option, value in case.options.items():
        setattr(config.chela, option, value)
    config.mamba2 = Mamba2Config(head_width=8, state_size=5)
    model = build_model(config)
    tokens, labels = torch.randint(0, VOCAB, (2, BATCH, LENGTH))

    def run(step: Any) -> list[Tensor]:
        model.zero_grad()
        span = case.span()
        losses, penalty = step(tokens, span, labels)
        if case.streamed:
            more, cost = step(tokens, span.next_block(LENGTH), labels)
            losses, penalty = losses + more, penalty + cost
        (losses.mean() + penalty).backward()
        grads = [parameter.grad for parameter in model.parameters()]
        return [losses.detach(), *(grad.clone() for grad in grads if grad is not None)]

    expected = run(model)
    called = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called.update(str(node.target).removesuffix(".default") for node in graph.graph.nodes)
        return lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    counters.clear()
    got = run(torch.compile(model, fullgraph=True, backend=backend))
    assert not counters["graph_break"]
    assert {"longreach.scan", "longreach.short_conv"} <= called
    assert ("longreach.long_conv" in called) == (name == "taps")
    limit = 2e-6 if name == "decays by the token" else 1e-6  # sums over all tokens, in fp32
    for mine, theirs in zip(got, expected, strict=True):
        assert float((mine - theirs).norm()) <= limit * float(theirs.norm())


def counted_model() -> tuple[Any, list[int]]:
    """A compiled model, and the number of tokens for which each of its graphs was made."""
    mixers, lengths = ["elementwise", "chela", "feedforward_kernel"], []
    config = ModelConfig(vocab=VOCAB, width=16, depth=3, mixers=mixers, dropout=0.1, positions="sinusoidal")

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        lengths.append(
            max(x.shape[1] for x in inputs if isinstance(x, Tensor) and x.dim() == 2 and not x.requires_grad)
        )
        return lookup_backend("eager")(graph, inputs)

    torch.compiler.reset()
    model = build_model(config)
    compile_model(model, backend=backend)
    return model, lengths


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch, of autograd Functions
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by torch, of carries
def test_blocks_of_one_shape_share_their_graphs() -> None:
    """20 blocks, three steps: one graph for the first position, one for all others, forward alone and with backward."""
    model, graphs = counted_model()
    tokens, labels = torch.randint(0, VOCAB, (2, BATCH, 20 * LENGTH))
    expected = build_model(model.config)
    expected.load_state_dict(model.state_dict())

    def step(model: Any, seed: int) -> None:
        seeds = torch.tensor([seed, seed + 1])
        spans = streaming.blocks(Mesh(), 20 * LENGTH, LENGTH, dropout_seeds=seeds)

        def loss(span: Span) -> Tensor:
            losses, penalty = model(span.shard(tokens), span, span.shard(labels))
            return losses.sum() + penalty

        streaming.train(spans, lambda span: model(span.shard(tokens), span, head=False), loss, lambda x: x.backward())

    for seed in range(3):
        step(model, seed)
        step(expected, seed)
    assert len(graphs) <= 6, graphs  # the last block keeps no carry
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert float((mine.grad - theirs.grad).norm()) <= 1e-5 * float(theirs.grad.norm())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch, of autograd Functions
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by torch, of carries
def test_every_length_has_its_graph() -> None:
    """Catches lengths beyond torch's limit of graphs, which run without one and without a word."""
    model, graphs = counted_model()
    for _ in range(2):
        for length in range(LENGTH, LENGTH + 12):
            tokens = torch.randint(0, VOCAB, (BATCH, length))
            model(tokens, Span(dropout_seeds=torch.tensor([1, 2])), tokens)
    assert sorted(graphs) == list(range(LENGTH, LENGTH + 12))


def eager_and_compiled(axis: Axis, lengths: list[int]) -> tuple[list[Tensor], list[Tensor], int]:
    """Losses and gradients of this rank's piece, and the number of graphs."""
    torch.manual_seed(1)
    mixers = ["elementwise", "chela", "feedforward_kernel"]
    model = build_model(ModelConfig(vocab=VOCAB, width=16, depth=len(mixers), mixers=mixers))
    tokens, labels = torch.randint(0, VOCAB, (2, BATCH, lengths[axis.rank]))

    def run() -> list[Tensor]:
        model.zero_grad()
        losses, penalty = model(tokens, Span(axis=axis, lengths=lengths), labels)
        (losses.mean() + penalty).backward()
        grads = [parameter.grad for parameter in model.parameters()]
        return [losses.detach(), *(grad.clone() for grad in grads if grad is not None)]

    expected = run()
    torch.compiler.reset()
    counters.clear()
    model.compile(backend="aot_eager")
    return expected, run(), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("lengths", [[10, 9]], ids=str)
def test_ranks_compile_what_lies_between_their_exchanges(lengths: list[int]) -> None:
    for expected, got, graphs in run_distributed(eager_and_compiled, len(lengths), lengths):
        assert graphs > 3
        for mine, theirs in zip(got, expected, strict=True):
            assert float((mine - theirs).norm()) <= 1e-5 * float(theirs.norm())


def train_twice(rank: int, source: str, directory: str, ranks: int) -> list[float]:
    """The held-out losses of an eager and of a compiled run."""
    small = [f"data.source={source}", "data.seq_len=64", "model.width=16", "train.steps=3", "optim.warmup_steps=1"]
    small += [
        "train.validate_batches=1",
        "monitor.sample_len=0",
        f"parallel.ranks={ranks}",
        f"parallel.sequence={ranks}",
    ]
    held_out = []
    for compile in ("false", "true"):
        result = train(load("quickstart", [*small, f"train.compile={compile}", f"run.dir={directory}/{compile}"]))
        assert result.held_out is not None
        held_out.append(result.held_out)
    return held_out


def test_a_path_that_the_compiler_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler of CPU code hands the linker its own folder, cut at each space."""
    monkeypatch.setattr(torch, "__file__", "/home/me/my projects/torch/__init__.py")
    with pytest.raises(InputError, match=r"^train.compile = True: .*/home/me/my projects/torch; set it to false"):
        train(load("quickstart", ["train.compile=true", "parallel.ranks=1", "parallel.sequence=1"]))


@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler cannot link to a path with a space")
@pytest.mark.timeout(400)
def test_training_with_compile(corpus: Path, tmp_path: Path) -> None:
    """By torch's own compiler, with DeepSpeed around it and two ranks."""
    for eager, compiled in run_world(train_twice, 2, str(corpus), str(tmp_path), 2, timeout=360):
        assert compiled == pytest.approx(eager, rel=1e-5)
