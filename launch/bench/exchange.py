"""One rank of `longreach bench parallel`: what a layer of each kind exchanges, and how long it takes.

``python -m longreach.launch.bench.exchange DIRECTORY RANK RANKS`` joins the other ranks by a file in that directory.
There, ``job.json`` holds a `Job`; the first rank writes ``found.json``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...framework.deepspeed.ulysses import init_deepspeed_world
from ...framework.mixers import Mamba2Config
from ...framework.mixers.chela import ChelaConfig, ModalKernel, TapKernel
from ...kernels.delta_rule import DeltaRule
from ...kernels.elementwise import ElementwiseAttention
from ...kernels.linear_attention import LinearAttention
from ...kernels.scan import StatefulOp
from ...parallel import cost, link_benchmark
from ...parallel.mesh import Axis, all_gather, gather_values, init_mesh
from ...parallel.recorder import Event, Recorder
from ...parallel.span import Span
from . import median
from .kernels import softmax_attention
from .peers import ring, ulysses

BY_PIPELINE = ", by pipeline"
STATES = (
    "elementwise",
    "linear_attention, chela",
    "linear_attention, feedforward_kernel",
    "linear_attention, mamba2",
    "delta_rule, gated_deltanet",
)
PEERS = ("Ulysses", "ring attention")


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        tokens: of the sequence, over all ranks.
        width: D.
        heads: of attention.
        checked: tokens of the sequence on which the result of every layer is first compared with that of one rank.
        budget: seconds for which a measurement is repeated, at least once.
        timeout: seconds that an exchange may take.
    """

    tokens: int = 32_768
    width: int = 512
    heads: int = 8
    checked: int = 512
    budget: float = 5.0
    timeout: float = 600.0


@dataclass(frozen=True)
class Found:
    """A layer's forward and backward pass; of times and bytes, those of the rank with the most.

    Attributes:
        layer: its name.
        ranks: that share the sequence.
        seconds: of both passes.
        exchange_seconds: of the same exchanges, replayed without the computation between them.
        predicted_seconds: of these, by `parallel.cost` and the link that was measured between these ranks.
        forward_bytes, backward_bytes: that a rank sends.
        received_bytes: that a rank receives in both passes: of a gather, what all others send.
        error: largest relative RMS error against one rank, of the output and all gradients.
    """

    layer: str
    ranks: int
    seconds: float
    exchange_seconds: float
    predicted_seconds: float
    forward_bytes: int
    backward_bytes: int
    received_bytes: int
    error: float

    @property
    def num_bytes(self) -> int:
        return self.forward_bytes + self.backward_bytes


@dataclass(frozen=True)
class Layer:
    """A sequence mixer to measure.

    Attributes:
        shapes: of a token in each input.
        run: computes the output of this rank's shard ``[1, n, *shape]``, given the axis and the inputs.
        parameters: whose gradients are computed too.
        alone: computes the same over the whole sequence on one rank; None for ``run``.
    """

    shapes: Sequence[tuple[int, ...]]
    run: Callable[..., Tensor]
    parameters: Sequence[Tensor] = ()
    alone: Callable[..., Tensor] | None = None


def layers(width: int, heads: int) -> dict[str, Layer]:
    """The layers: the stateful operator of every mixer of this package, a free convolution, and both peers.

    Args:
        width: D.
        heads: H.
    """
    chela, per_head = ChelaConfig(), (heads, width // heads)
    shared, values = (heads, width // 2 // heads), (heads, 2 * width // heads)
    group, key = (1, Mamba2Config().state_size), 3 * width // (4 * heads)
    torch.manual_seed(1)
    modal, free = ModalKernel(width, chela.modes, True), TapKernel(width, chela.long_len, "free", True)

    def normalized(axis: Axis, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _scan(LinearAttention(normalize=True, eps=1e-6), axis, F.softplus(q), F.softplus(k), v)

    def decaying(axis: Axis, q: Tensor, k: Tensor, v: Tensor, raw: Tensor) -> Tensor:
        return _scan(LinearAttention(), axis, q, k, v, -F.softplus(raw))

    def replacing(axis: Axis, q: Tensor, k: Tensor, v: Tensor, share: Tensor, raw: Tensor) -> Tensor:
        return _scan(DeltaRule(normalize_qk=True), axis, q, k, v, share.sigmoid(), -F.softplus(raw))

    def convolved(module: nn.Module, axis: Axis, x: Tensor) -> Tensor:
        y: Tensor = module(x, _span(axis, x))
        return y

    gated = LinearAttention(scale=(width // 2) ** -0.5)
    ours = [
        Layer([(width,)] * 3, partial(_scan, ElementwiseAttention())),
        Layer([shared, shared, values], partial(_scan, gated)),
        Layer([per_head] * 3, normalized),
        Layer([group, group, values, (heads,)], decaying),
        Layer([(heads, key), (heads, key), (heads, 2 * key), (heads,), (heads,)], replacing),
    ]
    states = dict(zip(STATES, ours, strict=True))
    return {
        **states,
        **{name + BY_PIPELINE: replace(layer, run=partial(_by_pipeline, layer.run)) for name, layer in states.items()},
        "modal convolution": Layer([(width,)], partial(convolved, modal), list(modal.parameters())),
        "free convolution": Layer([(width,)], partial(convolved, free), list(free.parameters())),
        "Ulysses": Layer([per_head] * 3, ulysses, alone=softmax_attention),
        "ring attention": Layer([per_head] * 3, ring, alone=softmax_attention),
    }


def _by_pipeline(run: Callable[..., Tensor], axis: Axis, *inputs: Tensor) -> Tensor:
    return run(replace(axis, relay="pipeline"), *inputs)


def _span(axis: Axis, x: Tensor) -> Span:
    return Span(axis=axis, lengths=[x.shape[1]] * axis.size)


def _scan(op: StatefulOp, axis: Axis, *inputs: Tensor) -> Tensor:
    return _span(axis, inputs[0]).scan(op, *inputs)


def error(layer: Layer, axis: Axis, tokens: int) -> float:
    """Largest relative RMS error against one rank: output, gradients of inputs, and of parameters summed over ranks."""
    torch.manual_seed(2)
    whole = [torch.randn(1, tokens, *shape) * 0.5 for shape in layer.shapes]
    shards = [x.chunk(axis.size, dim=1)[axis.rank] for x in whole]
    results = []
    for run, inputs in ((partial(layer.run, axis), shards), (layer.alone or partial(layer.run, Axis()), whole)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = run(*leaves)
        torch.manual_seed(3)
        grad = torch.randn(1, tokens, *y.shape[2:])
        grad = grad.chunk(axis.size, dim=1)[axis.rank] if inputs is shards else grad
        grads = torch.autograd.grad(y, [*leaves, *layer.parameters], grad)
        results.append(([y.detach(), *grads[: len(leaves)]], list(grads[len(leaves) :])))
    (mine, partial_sums), (truth, sums) = results
    for x in partial_sums:
        dist.all_reduce(x, group=axis.group)
    truth = [x.chunk(axis.size, dim=1)[axis.rank] for x in truth]
    pairs = [*zip(mine, truth, strict=True), *zip(partial_sums, sums, strict=True)]
    errors = [float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in pairs]
    # Not `max`, which may pass over NaN.
    return float(torch.tensor(gather_values(errors, axis)).max())


def measure(name: str, layer: Layer, axis: Axis, job: Job, link: cost.Link) -> Found:
    """Check a layer, record what it exchanges, then time it; a collective. ``link`` is that between the ranks."""
    largest_error = error(layer, axis, job.checked)
    torch.manual_seed(4 + axis.rank)
    inputs = [(torch.randn(1, job.tokens // axis.size, *shape) * 0.5).requires_grad_() for shape in layer.shapes]
    upstream: list[Tensor] = []

    def both(forward: AbstractContextManager[object], backward: AbstractContextManager[object]) -> None:
        with forward:
            y = layer.run(axis, *inputs)
        if not upstream:
            upstream.append(torch.randn_like(y))
        with backward:
            torch.autograd.grad(y, [*inputs, *layer.parameters], upstream[0])

    forward, backward = Recorder(), Recorder()
    first = _once(partial(both, forward, backward), axis)
    nothing = nullcontext()
    seconds = first if first > job.budget else _seconds(partial(both, nothing, nothing), axis, job.budget)
    everyone: list[list[Event]] = [[] for _ in range(axis.size)]
    dist.all_gather_object(everyone, [*forward.events, *backward.events], group=axis.group)
    sent = gather_values([float(sum(one.num_bytes for one in some.events)) for some in (forward, backward)], axis)
    most = [max(row[number] for row in sent) for number in range(2)]
    received = max(_received(everyone, rank) for rank in axis.ranks)
    replayed = _seconds(replay(everyone, axis), axis, job.budget)
    predicted = max(
        sum(cost.seconds(event.kind, event.num_bytes, len(event.ranks), link) for event in events)
        for events in everyone
    )
    return Found(name, axis.size, seconds, replayed, predicted, int(most[0]), int(most[1]), received, largest_error)


def _seconds(run: Callable[[], object], axis: Axis, budget: float) -> float:
    """Median time of ``run`` after a first, untimed call; that of the slowest rank each time."""
    _once(run, axis)
    times: list[float] = []
    # The times are the same on all ranks, so all stop after the same number of calls.
    while not times or (sum(times) < budget and len(times) < 100):
        times.append(_once(run, axis))
    return median(times)


def _once(run: Callable[[], object], axis: Axis) -> float:
    gather_values([0.0], axis)  # a barrier: all ranks begin together
    started = time.perf_counter()
    run()
    return max(row[0] for row in gather_values([time.perf_counter() - started], axis))


def _received(everyone: list[list[Event]], rank: int) -> int:
    """Bytes that a rank receives, from the recorded events of all others."""
    total = 0
    for other, events in enumerate(everyone):
        for event in events if other != rank else []:
            if rank in event.ranks:
                total += event.num_bytes // (len(event.ranks) - 1 if event.kind == "all_to_all" else 1)
    return total


def replay(everyone: list[list[Event]], axis: Axis) -> Callable[[], None]:
    """A function that replays the recorded exchanges of this rank, without computation between them.

    Collectives follow one another; point-to-point messages are waited for at the end.

    Args:
        everyone: the events of each rank of ``axis``, in order.
        axis: all ranks of the world.
    """
    sent = {
        other: iter([e for e in events if e.kind == "send" and axis.rank in e.ranks])
        for other, events in enumerate(everyone)
    }
    roots = zip(*([e for e in events if e.kind == "broadcast"] for events in everyone), strict=True)
    steps: list[Callable[[], Any]] = []
    for event in everyone[axis.rank]:
        others = [rank for rank in event.ranks if rank != axis.rank]
        if event.kind == "all_gather":
            steps.append(partial(all_gather, _bytes(event.num_bytes), axis))
        elif event.kind == "all_to_all":
            x = _bytes(event.num_bytes // len(others) * axis.size)
            steps.append(partial(dist.all_to_all_single, torch.empty_like(x), x, group=axis.group))
        elif event.kind == "broadcast":
            root = max(enumerate(next(roots)), key=lambda pair: pair[1].num_bytes)
            steps.append(partial(dist.broadcast, _bytes(root[1].num_bytes), root[0], group=axis.group))
        elif event.kind == "send":
            steps.append(partial(dist.isend, _bytes(event.num_bytes), others[0], group=axis.group))
        else:
            assert event.kind == "receive", event
            size = next(sent[others[0]]).num_bytes
            steps.append(partial(dist.irecv, _bytes(size), others[0], group=axis.group))

    def run() -> None:
        requests = [step() for step in steps]
        for request in requests:
            if isinstance(request, dist.Work):
                request.wait()

    return run


def _bytes(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def main(directory: Path, rank: int, num_ranks: int) -> None:
    """Measure every layer as one of ``num_ranks`` ranks with one thread each."""
    job = Job(**json.loads((directory / "job.json").read_text()))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=job.timeout),
    )
    init_deepspeed_world()
    mesh = init_mesh(num_ranks)
    axis, link = mesh.sequence, link_benchmark.measure(mesh)
    found = [measure(name, layer, axis, job, link) for name, layer in layers(job.width, job.heads).items()]
    if rank == 0:
        report = {"link": asdict(link), "found": [asdict(one) for one in found]}
        (directory / "found.json").write_text(json.dumps(report))
    gather_values([0.0], axis)  # a barrier: no rank leaves while another still needs it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
