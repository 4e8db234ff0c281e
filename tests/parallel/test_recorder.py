"""The recorder: what it says of each exchange, and that all ranks make the same exchanges in the same order."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from helpers import run_distributed

from longreach.framework.model import ModelConfig, build_model
from longreach.kernels.elementwise import ElementwiseAttention
from longreach.parallel import link_benchmark, streaming
from longreach.parallel.halo import P2PBatch
from longreach.parallel.mesh import Axis, Mesh
from longreach.parallel.recorder import Event, Recorder
from longreach.parallel.span import Span
from longreach.parallel.traffic import Traffic, uncounted

MIXERS = ["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"]


def one_of_each(axis: Axis) -> list[Event]:
    x = torch.ones(6)
    with Recorder() as recorder:
        dist.all_gather_into_tensor(torch.empty(6 * axis.size), x, group=axis.group)
        dist.all_to_all_single(torch.empty(3), x[:3], [1, 1, 1], [1, 1, 1], group=axis.group)
        dist.all_reduce(x, group=axis.group)
        dist.broadcast(x, axis.ranks[1], group=axis.group)
        dist.reduce_scatter_tensor(torch.empty(2), x, group=axis.group)
        if axis.rank == 0:
            dist.send(x, axis.ranks[2], group=axis.group)
        if axis.rank == 2:
            dist.recv(x, axis.ranks[0], group=axis.group)
    return recorder.events


@pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")
def test_kinds_ranks_and_bytes() -> None:
    for rank, events in enumerate(run_distributed(one_of_each, 3)):
        everybody = (0, 1, 2)
        wanted = [
            Event("all_gather", everybody, 24),
            Event("all_to_all", everybody, 8),
            Event("all_reduce", everybody, 24),
            Event("broadcast", everybody, 24 if rank == 1 else 0),
            Event("reduce_scatter", everybody, 24),
        ]
        wanted += [Event("send", (0, 2), 24)] * (rank == 0) + [Event("receive", (0, 2), 0)] * (rank == 2)
        assert events == wanted


def exchanges(
    axis: Axis, block_len: int, recompute: bool, packed: bool
) -> tuple[list[Event], dict[tuple[str, str], int]]:
    """What a forward and backward pass exchanges, and how `Traffic` counts it."""
    torch.manual_seed(1)
    config = ModelConfig(vocab=17, width=16, depth=len(MIXERS), mixers=MIXERS)
    config.chela.heads = config.feedforward_kernel.heads = config.softmax.heads = 2
    config.mamba2.head_width = 8
    model = build_model(config)
    model.recompute = recompute
    tokens = torch.randint(0, 17, (2, 23))
    segments = (torch.arange(23) // 9).expand(2, -1) if packed else None
    traffic = Traffic()
    spans = streaming.blocks(Mesh(sequence=axis), 23, block_len, segments=segments, traffic=traffic)

    def loss(span: Span) -> torch.Tensor:
        nll, penalty = model(span.shard(tokens), span, span.shard(tokens))
        return nll.sum() + penalty

    with Recorder(traffic) as recorder:
        streaming.train(spans, lambda span: model(span.shard(tokens), span, head=False), loss, torch.Tensor.backward)
    return recorder.events, dict(traffic.bytes)


def both_ways(axis: Axis) -> list[list[str]]:
    """The kinds of the exchanges of each way to send and receive at once."""
    relayed = replace(axis, relay="recursive_doubling")
    x = torch.ones(1, 6, 2)
    other = 1 - axis.rank

    def scan() -> None:
        span = streaming.blocks(Mesh(sequence=relayed), 12)[0]
        span.for_layer("0").scan(ElementwiseAttention(causal=False), x, x, x)

    ways = (
        lambda: P2PBatch([(other, x)], [(other, x.shape)], x, axis, uncounted).wait(),
        lambda: link_benchmark.measure(Mesh(sequence=axis, world=axis), (8, 64), 1),
        scan,
    )
    kinds = []
    for way in ways:
        with Recorder() as recorder:
            way()
        kinds.append([event.kind for event in recorder.events])
    return kinds


def test_receives_are_posted_before_sends() -> None:
    """Else gloo's word that a rank receives waits behind what it sends: the two directions take turns."""
    for rank, kinds in enumerate(run_distributed(both_ways, 2)):
        for way in kinds:
            pairs = [pair for pair in pairwise(way) if "receive" in pair and "send" in pair]
            assert ("receive", "send") in pairs, (rank, way)
            first = next(kind for kind in way if kind in ("send", "receive"))
            assert first == "receive", (rank, way)


def without_point_to_point(events: list[Event]) -> list[Event]:
    """Collectives, whose order must be the same everywhere; and their bytes, but for those of an all-to-all."""
    return [
        Event(e.kind, e.ranks, 0 if e.kind == "all_to_all" else e.num_bytes, e.layer, e.verb)
        for e in events
        if e.kind not in ("send", "receive")
    ]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block_len", [0, 4])
def test_all_ranks_exchange_in_one_order_and_states_once(block_len: int, packed: bool, ranks: int) -> None:
    """Catches an exchange that one rank makes and another does not, or that a recomputed layer makes again."""
    plain, again = (run_distributed(exchanges, ranks, block_len, recompute, packed) for recompute in (False, True))
    for run in (plain, again):
        for events, counted in run:
            assert without_point_to_point(events) == without_point_to_point(run[0][0])
            for label, num_bytes in counted.items():
                assert sum(e.num_bytes for e in events if (e.layer, e.verb) == label) == num_bytes, label
            assert all(e.layer and e.verb for e in events), "an exchange that nobody counts"
    for verb in ("scan", "halo"):
        for (events, _), (repeated, _) in zip(plain, again, strict=True):
            mine, theirs = ([e for e in x if e.verb == verb] for x in (events, repeated))
            assert sorted(map(str, mine)) == sorted(map(str, theirs))
    sent = [sum(e.num_bytes for e in x[0][0] if e.verb == "by_channel") for x in (plain, again)]
    assert sent[1] > sent[0], "what is as large as the sequence is sent again rather than kept"
