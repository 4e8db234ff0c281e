"""One host of `longreach bench network`: training steps of one method, while the rate of its link changes between them.

``python -m longreach.launch.bench.host DIRECTORY`` on each host, with the environment that a launcher sets. There,
``job.json`` holds a `Job`; the first rank writes ``found.json``.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ...framework.config import RunConfig, load
from ...framework.data import Batch
from ...framework.deepspeed.engine import Engine
from ...framework.mixers import SoftmaxConfig, register
from ...framework.mixers.softmax import Softmax, rotate
from ...framework.runtime.process import set_num_threads
from ...framework.trainer import mesh_of, num_micro_batches, settings_of, start_engine, train_step
from ...parallel import cost, link_benchmark
from ...parallel.mesh import Mesh, gather_values, join_world, leave_world
from ...parallel.recorder import Event, Recorder
from ...parallel.span import Span
from ...parallel.traffic import Traffic
from ..dry_run import sample_batch
from . import median
from .peers import ring

MESSAGES, REPEATS = (1 << 10, 1 << 21), 5  # bytes of those that measure the link, and how many
PAYLOAD = 1448 / 1514  # of the bytes on a link: without the headers of TCP, IP and Ethernet
BACKWARD = 2 / 3  # of a step's computation


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        overrides: of the config ``quickstart``.
        lengths: tokens of a sequence, over both hosts.
        rates: of the link, in bits a second, by name; 0 for no limit. The first is what the others are compared with.
        interface: of the link.
        budget: seconds for which the steps of a length are repeated, at least once with each rate.
        most: times that they are repeated.
    """

    overrides: list[str]
    lengths: list[int]
    rates: dict[str, float]
    interface: str
    budget: float
    most: int


@dataclass(frozen=True)
class Found:
    """Training steps at one length and rate.

    Attributes:
        tokens: of a sequence, over both hosts.
        sequences: of a step, whose gradients are reduced once.
        link: name of the rate.
        seconds: of a step, the shortest: other load on the machine only adds to it.
        compute_seconds, waiting_seconds: parts of it: what a host computes, and what it waits for exchanges and for
            the other host; of the host that computes the most.
        bytes: that a host sends in a step, by what they are for; of the host that sends the most in all.
        messages: how many exchanges these are.
        predicted_seconds: by the cost model, from the link and the computation, which does not depend on it: the median
            of those with each rate.
        steps: that were measured.
    """

    tokens: int
    sequences: int
    link: str
    seconds: float
    compute_seconds: float
    waiting_seconds: float
    bytes: dict[str, int]
    messages: int
    predicted_seconds: float
    steps: int

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted_seconds / self.seconds - 1


@register("ring_attention", SoftmaxConfig)
class RingAttention(Softmax):
    """Softmax attention whose keys and values are passed around the ranks of a sequence (`peers.ring`)."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, D]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        position = torch.arange(span.position, span.position + x.shape[1])
        q, k = (rotate(part, position, self.base) for part in (q, k))
        counters = (span.traffic.counter(span.layer, verb) for verb in ("ring", "ring_grads"))
        return self.out(ring(span.axis, q, k, v, *counters).flatten(-2))


def set_rate(interface: str, bits: float) -> None:
    """Limit what this host sends through an interface to so many bits a second; 0 for no limit."""
    burst = max(1 << 17, int(bits / 8 / 250))  # bytes; at 250 ticks a second, less would not reach the rate
    limit = ["tbf", "rate", f"{bits:.0f}bit", "burst", f"{burst}", "latency", "50ms"] if bits else ["pfifo"]
    subprocess.run(["tc", "qdisc", "replace", "dev", interface, "root", *limit], check=True, timeout=20)


def measure(config: RunConfig, engine: Engine, mesh: Mesh, job: Job, links: dict[str, cost.Link]) -> list[Found]:
    """Steps over sequences of ``config.data.seq_len`` tokens with every rate in turns; a collective."""
    torch.manual_seed(config.run.seed)
    batch = [sample_batch(config)] * num_micro_batches(config)
    traffic = Traffic(mesh.device)
    recorder = Recorder(traffic)
    measured: dict[str, list[list[list[float]]]] = {name: [] for name in links}
    started, number, spent = time.monotonic(), 0, 0.0
    while number < job.most and (not number or spent < job.budget):
        for name in list(job.rates)[:: 1 if number % 2 == 0 else -1]:
            set_rate(job.interface, job.rates[name])
            with nullcontext() if recorder.events else recorder:
                measured[name].append(_step(config, engine, mesh, batch, traffic))
        number += 1
        spent = gather_values([time.monotonic() - started], mesh.world)[0][0]
    everyone: list[list[Event]] = [[] for _ in mesh.world.ranks]
    dist.all_gather_object(everyone, recorder.events)
    shortest = {name: min(steps, key=lambda hosts: max(row[0] for row in hosts)) for name, steps in measured.items()}
    by_host = [median([hosts[rank][1] for hosts in shortest.values()]) for rank in mesh.world.ranks]
    sent = max((_by_purpose(events) for events in everyone), key=lambda some: sum(some.values()))
    busiest = max(mesh.world.ranks, key=lambda rank: by_host[rank])
    return [
        Found(
            tokens=config.data.seq_len,
            sequences=len(batch),
            link=name,
            seconds=max(row[0] for row in hosts),
            compute_seconds=hosts[busiest][1],
            waiting_seconds=hosts[busiest][2],
            bytes=dict(sent),
            messages=sum(event.kind != "receive" for event in everyone[busiest]),
            predicted_seconds=predict(by_host, everyone, links[name], len(batch), config.model.depth),
            steps=len(measured[name]),
        )
        for name, hosts in shortest.items()
    ]


def _step(config: RunConfig, engine: Engine, mesh: Mesh, batch: list[Batch], traffic: Traffic) -> list[list[float]]:
    """A step; returns its seconds, those of computation and those of waiting, of each host."""
    gather_values([0.0], mesh.world)  # a barrier: all hosts begin together, with the same rate
    started = time.monotonic()
    found = train_step(config, engine, mesh, batch, 0, config.optim.lr, traffic)
    seconds = time.monotonic() - started
    compute = found["compute_seconds"] + found["optimizer_seconds"]
    return gather_values([seconds, compute, found["exchange_seconds"] + found["zero_seconds"]], mesh.world)


def _purpose(event: Event) -> str:
    """What an exchange is for: a verb of `Span`, the ring, or the reduction of gradients (and sums over ranks)."""
    return event.verb or "reduction"


def _by_purpose(events: Sequence[Event]) -> Counter[str]:
    sent: Counter[str] = Counter()
    for event in events:
        sent[_purpose(event)] += event.num_bytes
    return sent


def predict(
    compute: Sequence[float], everyone: Sequence[Sequence[Event]], link: cost.Link, sequences: int, depth: int
) -> float:
    """Seconds of a step: computation, and what of the exchanges does not go on beside it.

    Args:
        compute: seconds that each host computes in a step.
        everyone: the exchanges of each host.
        link: between them.
        sequences: that are processed one after the other.
        depth: layers of the model.
    """
    exchanges = max(_exposed(events, min(compute), link, sequences, depth) for events in everyone)
    return max(compute) + exchanges


def _exposed(events: Sequence[Event], compute: float, link: cost.Link, sequences: int, depth: int) -> float:
    of: dict[str, list[float]] = {}
    for event in events:
        if event.kind != "receive":
            seconds = cost.seconds(event.kind, event.num_bytes, len(event.ranks), link)
            of.setdefault(_purpose(event), []).append(seconds)
    reduction = of.pop("reduction", [])
    sums = [one for one in reduction if one > 2 * link.latency + 1e-4]
    total = sum(reduction) - sum(sums) + cost.exposed_seconds(sums, BACKWARD * compute / sequences)
    # In a ring, the next keys and values travel beside the attention to those that are there: forward, then backward.
    passed = of.pop("ring", [])
    for number, seconds in enumerate(passed):
        share = (BACKWARD if number % (2 * depth) >= depth else 1 - BACKWARD) / (depth * sequences)
        total += max(0.0, seconds - share * compute)
    return total + sum(sum(some) for some in of.values())


def main(directory: Path) -> None:
    """Measure every length as one of the hosts, with one thread."""
    job = Job(**json.loads((directory / "job.json").read_text()))
    config = load("quickstart", job.overrides)
    set_num_threads(1)
    join_world(config.parallel.timeout)
    mesh = mesh_of(config)
    links = {}
    for name, bits in job.rates.items():
        set_rate(job.interface, bits)
        gather_values([0.0], mesh.world)
        link = link_benchmark.measure(mesh, MESSAGES, REPEATS)
        # Other load on the machine slows what is measured, but not the limit.
        links[name] = cost.Link(link.latency, bits / 8 * PAYLOAD) if bits else link
    engine = start_engine(config, settings_of(config), mesh)
    found = []
    first = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=min(job.lengths)))
    _step(
        first, engine, mesh, [sample_batch(first)] * num_micro_batches(first), Traffic(mesh.device)
    )  # compiles, warms up
    for tokens in job.lengths:
        at_length = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=tokens))
        found += measure(at_length, engine, mesh, job, links)
        if mesh.world.rank == 0:
            report = {
                "num_parameters": engine.num_parameters,
                "links": {name: asdict(link) for name, link in links.items()},
                "found": [asdict(one) for one in found],
            }
            (directory / "found.json").write_text(json.dumps(report))
            print(f"{tokens:,} tokens", flush=True)
    gather_values([0.0], mesh.world)  # a barrier: no host leaves while another still needs it
    engine.close()
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
