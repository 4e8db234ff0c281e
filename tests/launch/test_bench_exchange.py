"""The ranks of `longreach bench parallel`: layers are exact, a wrong one is seen, exchanges are repeated alike."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from helpers import run_distributed
from torch import Tensor

from longreach.framework.deepspeed.ulysses import init_deepspeed_world
from longreach.launch.bench import exchange
from longreach.parallel.mesh import Axis
from longreach.parallel.recorder import Event, Recorder

WIDTH, HEADS, TOKENS = 32, 4, 64


def first_rank_is_off(axis: Axis, *inputs: Tensor) -> Tensor:
    y = exchange.layers(WIDTH, HEADS)["elementwise"].run(axis, *inputs)
    return y * 1.001 if axis.size > 1 and axis.rank == 0 else y


def errors(axis: Axis) -> tuple[dict[str, float], float]:
    """Of all layers against one rank, and of a layer of which one rank is wrong."""
    init_deepspeed_world()
    layers = exchange.layers(WIDTH, HEADS)
    wrong = replace(layers["elementwise"], run=first_rank_is_off)
    found = {name: exchange.error(layer, axis, TOKENS) for name, layer in layers.items()}
    return found, exchange.error(wrong, axis, TOKENS)


def test_four_ranks_agree_with_one_and_a_wrong_rank_is_seen_by_all() -> None:
    for found, wrong in run_distributed(errors, 4):
        assert len(found) == 14 and max(found.values()) <= 1e-5
        assert 1e-4 < wrong < 1e-2


def record_and_replay(axis: Axis) -> dict[str, tuple[list[Event], list[Event]]]:
    init_deepspeed_world()
    made = {}
    for name, layer in exchange.layers(WIDTH, HEADS).items():
        inputs = [torch.randn(1, TOKENS // axis.size, *shape, requires_grad=True) for shape in layer.shapes]
        with Recorder() as recorder:
            layer.run(axis, *inputs).sum().backward()
        everyone: list[list[Event]] = [[] for _ in axis.ranks]
        dist.all_gather_object(everyone, recorder.events, group=axis.group)
        with Recorder() as again:
            exchange.replay(everyone, axis)()
        made[name] = (recorder.events, again.events)
    return made


def test_the_same_exchanges_are_made_again() -> None:
    for made in run_distributed(record_and_replay, 4):
        for events, again in made.values():
            assert events and events == again
        assert [event.kind for event in made["ring attention"][0]].count("send") == 3 + 3 + 4
        assert [event.kind for event in made["Ulysses"][0]] == ["all_to_all"] * 8


def pipelined(axis: Axis) -> tuple[list[Event], list[Event]]:
    """A state that goes from neighbour to neighbour, and a broadcast: kinds that no layer here makes by default."""
    nowhere = [rank for rank in (axis.rank - 1, axis.rank + 1) if 0 <= rank < axis.size]
    with Recorder() as recorder:
        requests = [dist.irecv(torch.empty(3), rank, group=axis.group) for rank in nowhere if rank < axis.rank]
        requests += [dist.isend(torch.ones(3), rank, group=axis.group) for rank in nowhere if rank > axis.rank]
        for request in requests:
            assert request is not None
            request.wait()
        dist.broadcast(torch.ones(5), 2, group=axis.group)
    everyone: list[list[Event]] = [[] for _ in axis.ranks]
    dist.all_gather_object(everyone, recorder.events, group=axis.group)
    with Recorder() as again:
        exchange.replay(everyone, axis)()
    assert exchange._received(everyone, axis.rank) == 12 * (axis.rank > 0) + 20 * (axis.rank != 2)
    return recorder.events, again.events


def test_messages_and_broadcasts_are_made_again() -> None:
    for events, again in run_distributed(pipelined, 3):
        assert len(events) >= 2 and events == again
