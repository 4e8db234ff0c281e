"""`longreach train --dry-run`: real training steps as one rank of a world whose other ranks do not exist, which measure
memory and computing time of a rank and predict its communication.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError
from ..framework.config import RunConfig, validate
from ..framework.data import Batch, Batches, ByteVocabulary, SubwordVocabulary
from ..framework.deepspeed.engine import Engine
from ..framework.deepspeed.workarounds import disable_stage3_order_check
from ..framework.model import ModelConfig
from ..framework.model.directory import directory_of, read_config
from ..framework.monitoring.hosts import Hosts
from ..framework.runtime.memory import GIB, Memory, compare, free_memory, needed_memory
from ..framework.runtime.process import peak_memory
from ..framework.tasks import Task, open_task
from ..framework.trainer import mesh_of, num_micro_batches, settings_of, start_engine, train_step
from ..parallel import cost
from ..parallel.mesh import Mesh, default_device, fake_world, leave_world
from ..parallel.recorder import Event, Recorder
from ..parallel.traffic import Traffic


@dataclass
class Line:
    """The exchanges (collectives and messages) of one kind that a step makes for one purpose.

    Attributes:
        purpose: the verb of `Span` that makes them, or "ZeRO".
        kind, ranks: as in `Event`; how many ranks take part.
        number: exchanges in a step.
        num_bytes: that this rank sends in them.
        seconds: predicted by `parallel.cost`.
    """

    purpose: str
    kind: str
    ranks: int
    number: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Plan:
    """What one rank needs, and what it does in a step.

    Attributes:
        rank: which one.
        world: number of ranks.
        sequence: number of ranks that share a sequence.
        num_parameters: of the whole model.
        num_tokens: that this rank processes in a step.
        memory_bytes: peak; of the device on a GPU, resident on a CPU.
        needed: the sum of what it needs at least; None if unknown.
        available_bytes: on this machine before the run; None if unknown.
        flops: of the matrix products that torch sees; the mixers' own kernels are not among them.
        compute_seconds: of a step on this machine, where exchanges take no time.
        exchanges: by purpose and kind.
    """

    rank: int
    world: int
    sequence: int
    num_parameters: int
    num_tokens: int
    memory_bytes: float
    needed: Memory | None
    available_bytes: int | None
    flops: int
    compute_seconds: float
    exchanges: list[Line] = field(default_factory=list)

    @property
    def exchange_seconds(self) -> float:
        """Predicted, where no exchange overlaps with computation."""
        return sum(line.seconds for line in self.exchanges)


def plan(
    config: RunConfig,
    *,
    node_size: int = 8,
    rank: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Plan:
    """Run three training steps as one rank of ``config.parallel.ranks``, on random tokens or a task's examples; the
    second one is timed.

    Nothing is written, and no corpus of text is read. The process joins a fake world and leaves it.

    Args:
        config: of the run.
        node_size: ranks per node: what is exchanged within one takes the faster link.
        rank: which one to be; by default one in the middle of a sequence, which has neighbours on both sides, and of
            softmax attention a head to compute.
        say: called with a line that says what is being computed.

    Raises:
        InputError: something in the config does not fit.
    """
    validate(config)
    world, sequence = config.parallel.ranks, config.parallel.num_sequence_ranks
    rank = min(sequence // 2, max(0, _num_heads(config.model) - 1)) if rank is None else rank
    if node_size < 1:
        raise InputError("--per-node", node_size, "at least 1")
    if not 0 <= rank < world:
        raise InputError("rank", rank, f"one of the {world} ranks, from 0 on")
    settings, device = settings_of(config), default_device()
    configure_model(config)
    config.model.init_from = ""  # the other ranks, with which all would agree on the weights, are not there
    needed, available = needed_memory(config, settings, device.type == "cuda"), free_memory(device)
    if needed is not None and available is not None and (warning := compare(config, needed, available)):
        say(warning)
    batch = sample_batch(config)
    disable_stage3_order_check()
    fake_world(world, rank, min(node_size, world))
    try:
        mesh = mesh_of(config)
        engine, hosts = start_engine(config, settings, mesh), Hosts(mesh, Path(config.run.dir))
        say(f"running three steps of rank {rank}, {engine.num_parameters:,} parameters")
        started = time.monotonic()
        _step(config, engine, mesh, batch, Traffic(), hosts)  # compiles kernels, fills caches
        say(f"the first step took {time.monotonic() - started:.1f} s; running two more")
        traffic = Traffic()
        started = time.monotonic()
        _step(config, engine, mesh, batch, traffic, hosts)
        seconds = time.monotonic() - started
        with Recorder(traffic) as recorder, FlopCounterMode(display=False) as flops:
            _step(config, engine, mesh, batch, traffic, hosts)
        lengths = -(-config.data.seq_len // sequence)
        own = max(0, min(lengths, config.data.seq_len - mesh.sequence.rank * lengths))
        return Plan(
            rank=rank,
            world=world,
            sequence=sequence,
            num_parameters=engine.num_parameters,
            num_tokens=own * config.data.batch_size // config.parallel.num_data_ranks,
            memory_bytes=peak_memory(mesh.device),
            needed=needed,
            available_bytes=available,
            flops=flops.get_total_flops(),
            compute_seconds=seconds,
            exchanges=_lines(recorder.events, mesh, min(node_size, world)),
        )
    except RuntimeError as error:
        if "inputBuffer is empty" not in str(error):
            raise
        allowed = "a rank that has a head of softmax attention: torch's fake world cannot send nothing"
        raise InputError("rank", rank, allowed, "leave it out") from None
    finally:
        leave_world()


def _num_heads(model: ModelConfig) -> int:
    """The ranks of a sequence that softmax attention keeps busy: as many as it has heads."""
    if directory_of(model) is not None:
        return int(getattr(read_config(model).get_text_config(), "num_attention_heads", 0) or sys.maxsize)
    return model.softmax.heads if "softmax" in model.mixers else sys.maxsize


def sample_batch(config: RunConfig) -> Batch:
    """A micro-batch: of random tokens for the language task, else of the task's examples."""
    shape = config.train.micro_batch_size, config.data.seq_len
    if (task := configure_model(config)) is not None:
        return Batches(task.sequences("train", 0), shape[0], micro_batch_size=shape[0]).load(0)
    tokens = torch.randint(0, config.model.vocab, shape)
    segments = torch.zeros(shape, dtype=torch.int64) if config.data.packing == "documents" else None
    return Batch(tokens, tokens, segments, torch.zeros(shape[0], dtype=torch.int64))


def configure_model(config: RunConfig) -> Task | None:
    """Set what the model takes from its task; of the language task, which is not opened, the vocabulary of the data."""
    data, model = config.data, config.model
    if config.task.name != "language":
        task = open_task(config.task, data)
        task.configure_model(model)
        return task
    if not model.vocab:
        trained = SubwordVocabulary.read(data.tokenizer).size if data.tokenizer else 0
        model.vocab = trained or data.vocab or ByteVocabulary.size
    return None


def _step(config: RunConfig, engine: Engine, mesh: Mesh, batch: Batch, traffic: Traffic, hosts: Hosts) -> None:
    train_step(config, engine, mesh, [batch] * num_micro_batches(config), 0, config.optim.lr, traffic, hosts)
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()


def _lines(events: list[Event], mesh: Mesh, node_size: int) -> list[Line]:
    near, far = mesh.sequence.near, mesh.sequence.far
    lines: dict[tuple[str, str, int], Line] = {}
    for event in events:
        purpose, ranks = event.verb or "ZeRO", len(event.ranks)
        line = lines.setdefault((purpose, event.kind, ranks), Line(purpose, event.kind, ranks))
        together = len({rank // node_size for rank in event.ranks}) == 1
        line.number += 1
        line.num_bytes += event.num_bytes
        line.seconds += cost.seconds(event.kind, event.num_bytes, ranks, near if together else far)
    return sorted(lines.values(), key=lambda line: -line.num_bytes)


def as_text(plan: Plan) -> str:
    """A plan as a table."""
    fitting = f"enough for {(plan.available_bytes or 0) // max(1, int(plan.memory_bytes)):,} such ranks"
    rows = [
        f"rank {plan.rank} of {plan.world}, {plan.sequence} ranks per sequence",
        f"parameters            {plan.num_parameters:,} in the whole model",
        f"tokens                {plan.num_tokens:,} per step",
        f"peak memory           {plan.memory_bytes / GIB:.2f} GiB",
        *([f"  at least            {plan.needed.total / GIB:.2f} GiB: {plan.needed}"] if plan.needed else []),
        *([f"available here        {plan.available_bytes / GIB:.2f} GiB, {fitting}"] if plan.available_bytes else []),
        f"matrix products       {plan.flops / 1e12:.3f} TFLOP per step (the mixers' own kernels are not counted)",
        "exchanges per step:",
        f"  {'for':<12} {'kind':<15} {'ranks':>6} {'number':>7} {'bytes':>15} {'predicted':>12}",
    ]
    for line in plan.exchanges:
        rows.append(
            f"  {line.purpose:<12} {line.kind:<15} {line.ranks:>6} {line.number:>7} {line.num_bytes:>15,} "
            f"{line.seconds * 1e3:>9.2f} ms"
        )
    total = plan.compute_seconds + plan.exchange_seconds
    rows.append(
        f"step                  {total:.3f} s = {plan.compute_seconds:.3f} s of computation, measured on this machine, "
        f"+ {plan.exchange_seconds:.3f} s of exchanges, predicted"
    )
    return "\n".join(rows)
