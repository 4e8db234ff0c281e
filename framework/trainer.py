"""The training loop, top to bottom.

The loss of an optimizer step is the sum of its token losses over the number of its labelled tokens, however the work
is split. Each rank adds the part of its own tokens; `Engine` sums gradients over ranks and micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..parallel import streaming
from ..parallel.cost import Link
from ..parallel.heartbeat import Heartbeat
from ..parallel.mesh import Mesh, first_rank_only, gather_values, init_mesh, join_world, to_device, world_size
from ..parallel.span import Span
from ..parallel.traffic import Traffic
from .config import OptimConfig, RunConfig, check_curriculum_end, validate
from .data import Batch
from .deepspeed.engine import Engine
from .deepspeed.settings import deepspeed_settings
from .inference.initial import initialize_run
from .model import build_model
from .model.heads import labelled
from .model.trained import freeze
from .monitoring.exchanges import record_exchanges
from .monitoring.hosts import Hosts
from .monitoring.profile import StepProfile
from .runtime.curriculum import read_steps, stages_of
from .runtime.loss_guard import LossGuard
from .runtime.memory import check_memory, tokens_at_a_time
from .runtime.preemption import Preemption
from .runtime.process import abort, check_compile, compile_model, peak_memory, set_num_threads
from .runtime.rank_consistency import check_rank_consistency, check_same_data
from .runtime.run import keeps_best, open_run
from .runtime.schedule import learning_rate
from .runtime.status import RunStatus
from .runtime.storage import check_shared_storage
from .runtime.validation import blocks_of
from .tasks import Score, Task, kind_of, open_task


@dataclass
class Result:
    """The result of a run.

    Attributes:
        step: optimizer steps done.
        held_out: held-out loss, nats per token; None if nothing was held out.
        held_out_by_source: that of each of several sources.
        run_dir: its directory.
        plot: the loss curve.
        stopped: why it ended before its last step, if it did.
        test: the score in the task's test.
        baseline_metrics: the metrics of the task's baseline, by name.
    """

    step: int
    held_out: float | None
    run_dir: Path
    plot: Path | None
    stopped: str = ""
    test: Score | None = None
    baseline_metrics: dict[str, float] = field(default_factory=dict)
    held_out_by_source: dict[str, float] = field(default_factory=dict)


def train(config: RunConfig) -> Result:
    """Train as ``config`` says, in the world that this process was started in; a collective over its ranks.

    Raises:
        InputError: something in the config, the data or the checkpoint does not fit; before the first step.
    """
    mesh, task, engine = set_up(config)
    with open_run(config, mesh, task, engine) as run, RunStatus(config, mesh.world, run.state) as status:
        monitor, state, steps, stopped, save_seconds = run.monitor, run.state, config.train.steps, "", 0.0
        with (
            Preemption(config.train.time_limit) as preemption,
            Heartbeat(mesh.world, config.parallel.timeout, status.abort) as heartbeat,
        ):
            traffic, guard = Traffic(mesh.device), LossGuard(config.train)
            inputs = read_steps(config, mesh, task, state["step"], state["consumed"])
            on_trace = monitor.profile if monitor is not None else None
            profile = StepProfile(config.monitor.profile_steps, run.directory, mesh.world.rank, engine.module, on_trace)
            recorded = partial(record_exchanges, run.directory, mesh.world.rank, traffic)
            run.hosts.meet()
            while not run.has_ended and not stopped:
                step = state["step"] + 1
                heartbeat.set_phase(f"in step {step}")
                started = time.monotonic()
                read = next(inputs)
                data_wait = time.monotonic() - started
                lr = learning_rate(config.optim, state["step"], steps)
                with recorded(step, config.monitor.record_exchanges), profile.step(step):
                    metrics = train_step(read.config, engine, mesh, read.batch, read.position, lr, traffic, run.hosts)
                warning = run.check_loss(guard, metrics, read.windows)
                state["step"], state["consumed"] = step, state["consumed"] + config.data.batch_size
                state["tokens"] += config.data.batch_size * config.data.seq_len
                seconds = {"step_seconds": time.monotonic() - started, "data_wait_seconds": data_wait}
                report = run.hosts.report() if step == steps or _is_due(config.train.log_every, step) else None
                run.record_step(metrics, {**seconds, "save_seconds": save_seconds}, traffic, warning, report)
                if report is not None:
                    status.running()
                stopped = preemption.reason(mesh.world) if step < steps else ""
                run.hosts.meet()
                is_best = False
                if step == steps or (_is_due(config.train.validate_every, step) and not stopped):
                    is_best = run.validate()
                heartbeat.set_phase(f"after step {step}")
                ends = run.has_ended or bool(stopped)
                due = ends or _is_due(config.checkpoint.every, step) or (is_best and keeps_best(config))
                save_seconds = run.save(due=due, wait=ends)
            profile.finish()
        test = None if stopped else run.test()
        if not stopped:
            run.finish()
        status.end(stopped)
        plot = monitor.plot() if monitor is not None and config.monitor.plot else None
    gather_values([0.0], mesh.world)  # a barrier: no rank leaves while the first one writes
    engine.close()
    held_out, by_source = state.get("held_out"), state.get("held_out_by_source", {})
    return Result(state["step"], held_out, run.directory, plot, stopped, test, task.baseline_metrics, by_source)


def _is_due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def train_step(
    config: RunConfig,
    engine: Engine,
    mesh: Mesh,
    batch: list[Batch],
    position: int,
    lr: float,
    traffic: Traffic,
    hosts: Hosts | None = None,
) -> dict[str, float]:
    """One optimizer step over this data rank's micro-batches.

    Args:
        config: of the run, or of its stage.
        batch: the micro-batches of whole sequences; every rank of a sequence passes the same ones.
        position: of the first sequence in its dataset, over all ranks.
        lr: learning rate of this step.
        traffic: counts what is exchanged.
        hosts: is told what every rank waited for, in the same exchange as the losses.

    Returns:
        ``loss`` (nats, or squared errors, per labelled token), ``penalty``, ``lr``, ``grad_norm``,
        ``peak_memory_bytes``: over all ranks. ``seq_len``: tokens of a sequence. And four parts of this rank's time:
        ``exchange_seconds`` in the exchanges of the span's verbs and in sums over ranks, ``zero_seconds`` in
        DeepSpeed's collectives, ``optimizer_seconds`` in the rest of the engine's step, ``compute_seconds`` for all
        else: forward and backward. With ``hosts``, what `Hosts.add` returns.
    """
    started = time.monotonic()
    for stopwatch in (traffic.waiting, engine.comm_timer, engine.step_timer):
        stopwatch.read()  # validation and checkpoints are not part of the step
    num_labels = _count_labels(batch, mesh, traffic)
    sums = accumulate_gradients(config, engine, mesh, batch, position, num_labels, traffic)
    engine.comm_timer.lap()
    norm = engine.step(lr)
    nll_sum, penalty_sum, grad_norm = torch.cat([sums, norm.to(sums).view(1)]).tolist()  # here the host waits
    exchange_seconds, (reducing, gathering) = traffic.waiting.read(), engine.comm_timer.read_laps()
    zero_seconds, optimizer_seconds = reducing + gathering, max(0.0, engine.step_timer.read() - gathering)
    peak = peak_memory(mesh.device)
    own = hosts.own(exchange_seconds + zero_seconds, peak) if hosts is not None else []
    with traffic.waiting:
        ranks = gather_values([nll_sum, penalty_sum, peak, *own], mesh.world)
    exchange_seconds += traffic.waiting.read()
    elsewhere = exchange_seconds + zero_seconds + optimizer_seconds
    return {
        "loss": sum(row[0] for row in ranks) / num_labels,
        "penalty": sum(row[1] for row in ranks),
        "lr": lr,
        "seq_len": config.data.seq_len,
        "grad_norm": grad_norm,
        "peak_memory_bytes": max(row[2] for row in ranks),
        "compute_seconds": max(0.0, time.monotonic() - started - elsewhere),
        "exchange_seconds": exchange_seconds,
        "zero_seconds": zero_seconds,
        "optimizer_seconds": optimizer_seconds,
        **(hosts.add([row[3:] for row in ranks]) if hosts is not None else {}),
    }


def _count_labels(batch: list[Batch], mesh: Mesh, traffic: Traffic) -> float:
    """The labelled tokens of a step, over all data ranks; batches lie in main memory."""
    own = float(sum(np.count_nonzero(labelled(micro.labels).numpy()) for micro in batch))
    with traffic.waiting:
        count = sum(row[0] for row in gather_values([own], mesh.data))
    if count == 0:
        indices = torch.cat([micro.indices for micro in batch]).tolist()
        allowed = "must hold a token that has a next one in its document"
        fix = "set data.packing=stream, or a larger data.seq_len"
        raise InputError("the sequences of a step", indices, allowed, fix)
    return count


def accumulate_gradients(
    config: RunConfig,
    engine: Engine,
    mesh: Mesh,
    batch: list[Batch],
    position: int,
    num_labels: float,
    traffic: Traffic,
) -> Tensor:
    """Forward and backward of this rank's shard of each micro-batch, block by block where it is streamed.

    Args:
        config, position: as of `train_step`.
        num_labels: of the whole step, over all ranks.

    Returns:
        ``[2]`` fp64, on the device: this rank's sum of token losses, and its part of the penalty on weights.
    """
    first = position + mesh.data.rank * (config.data.batch_size // mesh.data.size)
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for number, micro in enumerate(batch):
        start = first + number * config.train.micro_batch_size
        rows = torch.arange(start, start + len(micro.tokens), device=mesh.device)
        spans = blocks_of(micro, config, mesh, dropout_seeds=rows * 1_000_003 + config.run.seed, traffic=traffic)
        # The penalty counts once in a step: each term that a rank, micro-batch and block adds has its part of it.
        num_terms = mesh.world.size * len(batch) * len(spans)
        others_follow = iter([True] * (len(spans) - 1) + [number + 1 < len(batch)])  # after each block's backward

        def forward_only(span: Span, micro: Batch = micro) -> None:
            engine(to_device(span.shard(micro.tokens), mesh.device), span=span, head=False)

        def block_loss(span: Span, micro: Batch = micro, num_terms: int = num_terms) -> Tensor:
            tokens, labels = (to_device(span.shard(x), mesh.device) for x in (micro.tokens, micro.labels))
            nll, penalty = engine(tokens, span=span, labels=labels)
            sums.add_(torch.stack([nll.detach().double().sum(), penalty.detach().double() / num_terms]))
            return nll.sum() / num_labels + penalty / num_terms

        def backward(loss: Tensor, others_follow: Iterator[bool] = others_follow) -> None:
            engine.backward(loss, is_last=not next(others_follow))

        streaming.train(spans, forward_only, block_loss, backward, park=config.parallel.park_carries)
    return sums


def set_up(config: RunConfig) -> tuple[Mesh, Task, Engine]:
    """Join the world, open the data and build the model; nothing is written to the run directory."""
    config.parallel.ranks = world_size()
    validate(config)
    check_compile(config.train.compile)
    settings = settings_of(config)
    set_num_threads(config.train.threads, tokens_at_a_time(config) * config.model.width)
    join_world(config.parallel.timeout)
    mesh = mesh_of(config)
    with Heartbeat(mesh.world, config.parallel.timeout, abort):
        task, engine = _open(config, settings, mesh)
        gather_values([0.0], mesh.world)  # a barrier: no rank falls silent while another one is monitored
    return mesh, task, engine


def _open(config: RunConfig, settings: dict[str, Any], mesh: Mesh) -> tuple[Task, Engine]:
    """Compare the ranks, open the data and build the model."""
    check_rank_consistency(config, mesh.world)
    check_shared_storage(Path(config.run.dir), mesh.world, config.parallel.timeout)
    task = start_task(config, mesh)
    check_same_data(task, mesh.world)
    if config.data.epochs:
        sequences = len(task.sequences("train", None))
        config.train.steps = max(1, math.ceil(config.data.epochs * sequences / config.data.batch_size))
        config.optim.schedule_steps = config.optim.schedule_steps or config.train.steps
        check_curriculum_end(config)
    for stage in stages_of(config):
        stage.sequences(task)  # checks that there are such
    if config.train.patience and "valid" not in task.splits:
        allowed = f"needs held-out data, and {task.title} has none"
        raise InputError("train.patience", config.train.patience, allowed, "set data.valid_fraction")
    check_memory(config, settings, mesh)
    return task, start_engine(config, settings, mesh)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's settings for a run."""
    return deepspeed_settings(
        config.deepspeed,
        precision=config.train.precision,
        batch_size=config.data.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=num_micro_batches(config),
        clip=config.optim.clip,
        world_size=config.parallel.ranks,
    )


def mesh_of(config: RunConfig) -> Mesh:
    """The joined world, laid out as the config says."""
    parallel = config.parallel
    near, far = (Link(*link) if link else None for link in (parallel.near, parallel.far))
    return init_mesh(parallel.num_sequence_ranks, relay=parallel.relay, near=near, far=far)


def start_task(config: RunConfig, mesh: Mesh) -> Task:
    """The task with its data, prepared on the first rank and opened on all; sets what the model takes from it."""
    first_rank_only(lambda: kind_of(config.task).prepare(config.data), mesh.world)
    task = open_task(config.task, config.data)
    task.configure_model(config.model)
    return task


def start_engine(config: RunConfig, settings: dict[str, Any], mesh: Mesh) -> Engine:
    """The model with weights drawn from ``run.seed``, or of ``model.init_from``, its optimizer, and DeepSpeed."""
    torch.manual_seed(config.run.seed)
    model = build_model(config.model).to(mesh.device)
    if config.model.init_from:
        initialize_run(model, config, mesh)
    model.recompute = config.train.recompute
    freeze(model, config.train.freeze)
    if config.train.compile:
        compile_model(model)
    return Engine(model, _optimizer(model, config.optim), settings, mesh)


def _optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW of what is not frozen; only the matrices of linear layers and embeddings have weight decay."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if id(p) in matrices]
    others = [p for p in trained if id(p) not in matrices]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    beta1, beta2 = optim.betas
    fused = True if torch.cuda.is_available() else None  # one launch for many tensors
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps, fused=fused)


def num_micro_batches(config: RunConfig) -> int:
    """Micro-batches of a data rank in a step: the steps of gradient accumulation."""
    return config.data.batch_size // (config.parallel.num_data_ranks * config.train.micro_batch_size)
