"""The training loop, top to bottom.

One scale for the loss, however the work is split: the sum of the token losses of the whole optimizer step over the
number of its labelled tokens. Each rank adds the summand of its own tokens; `Engine` sums gradients over ranks and
micro-batches.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..parallel import streaming
from ..parallel.cost import Link
from ..parallel.heartbeat import Heartbeat
from ..parallel.mesh import Mesh, first_rank_only, gather_values, init_mesh, join_world, world_size
from ..parallel.recorder import Recorder
from ..parallel.span import Span
from ..parallel.traffic import Traffic
from . import checkpoint
from .config import OptimConfig, RunConfig, as_written, save, validate
from .data import Batch
from .deepspeed.engine import Engine, deepspeed_settings
from .heads import labelled
from .model import Model, build_model
from .monitoring.monitor import Monitor
from .monitoring.probe import Probe
from .monitoring.profile import StepProfile
from .runtime.files import write_text
from .runtime.lock import RunLock
from .runtime.loss_guard import Diverged, LossGuard
from .runtime.preemption import Preemption
from .runtime.rank_consistency import check_rank_consistency
from .runtime.validation import batches_of, blocks_of, score
from .tasks import Score, Task, kind_of, open_task

log = logging.getLogger("longreach.trainer")


@dataclass
class Result:
    """What a run tells when it ends: steps done, held-out loss (nats a token; None if nothing was held out), its
    directory, the loss curve, why it ended before its last step, if it did; and how the task's test was done, beside
    what the simplest answer reaches.
    """

    step: int
    held_out: float | None
    run_dir: Path
    plot: Path | None
    stopped: str = ""
    test: Score | None = None
    baseline_metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class _Run:
    """What a run works with from its first step to its last; only the first rank has a monitor."""

    config: RunConfig
    mesh: Mesh
    task: Task
    engine: Engine
    saver: checkpoint.Saver
    monitor: Monitor | None
    state: dict[str, Any]

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir)


def train(config: RunConfig) -> Result:
    """Train as ``config`` says, in the world that this process was started in; a collective over its ranks.

    Raises:
        InputError: something in the config, the data or the checkpoint does not fit; before the first step.
    """
    config.parallel.ranks = world_size()
    validate(config)
    _check_compile(config)
    settings = settings_of(config)
    _set_threads(config.train.threads)
    join_world(config.parallel.timeout)
    mesh = mesh_of(config)
    check_rank_consistency(config, mesh.world)
    task = start_task(config, mesh)
    run_dir, lock = Path(config.run.dir), RunLock()
    engine = start_engine(config, settings, mesh)
    directory, keep = run_dir / "checkpoints", config.checkpoint
    found = checkpoint.resume(engine, directory) if keep.resume else None
    saved, state = found or (None, {"step": 0, "consumed": 0})
    changed = [] if saved is None else _changes(config, task, state)
    kept = checkpoint.Keep(keep.keep_last, keep.keep_every, keep.keep_best)
    saver = checkpoint.Saver(engine, directory, kept, config.parallel.timeout)
    saver.check_space()
    # Only now that everything fits: a mistake leaves no new directory, and an old one as it was.
    first_rank_only(lambda: _start_run_dir(run_dir, config, task, lock, state["step"]), mesh.world)
    monitor = Monitor(run_dir, config, state["step"]) if mesh.world.rank == 0 else None
    if monitor is not None:
        monitor.say(_introduction(config, task, engine.num_parameters, mesh))
        if saved is not None:
            monitor.say(_continuation(saved, state["step"], config.train.steps))
        for line in changed:
            monitor.say(line)
    run = _Run(config, mesh, task, engine, saver, monitor, state)
    try:
        with (
            Preemption(config.train.time_limit) as preemption,
            Heartbeat(mesh.world, config.parallel.timeout, _give_up) as heartbeat,
        ):
            stopped = _loop(run, preemption, heartbeat)
        test = None if stopped else _test(run)
        if monitor is not None and not stopped:
            monitor.finish()
        plot = monitor.plot() if monitor is not None and config.monitor.plot else None
    finally:
        if monitor is not None:
            monitor.close()
        lock.release()
    gather_values([0.0], mesh.world)  # so that no rank goes while the first one writes
    engine.close()
    return Result(state["step"], state.get("held_out"), run_dir, plot, stopped, test, task.baseline_metrics)


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


def start_engine(config: RunConfig, settings: dict[str, Any], mesh: Mesh) -> Engine:
    """The model, freshly drawn, with its optimizer and DeepSpeed."""
    torch.manual_seed(config.run.seed)
    model = build_model(config.model).to(mesh.device)
    model.recompute = config.train.recompute
    if config.train.compile:
        model.compile(dynamic=False)
    return Engine(model, _optimizer(model, config.optim), settings, mesh)


def _loop(run: _Run, preemption: Preemption, heartbeat: Heartbeat) -> str:
    """Steps, validations and checkpoints until ``train.steps``; why it ended before, if it did."""
    config, mesh, state, saver = run.config, run.mesh, run.state, run.saver
    steps = config.train.steps
    traffic, loss_guard = Traffic(mesh.device), LossGuard(config.train)
    batches = batches_of(config, mesh, run.task, "train", config.run.seed)
    micro_batches = batches.iterate(state["consumed"], steps - state["step"])
    profile = StepProfile(
        config.monitor.profile_steps,
        run.directory,
        mesh.world.rank,
        run.engine.module,
        lambda *found: run.monitor.profile(*found) if run.monitor is not None else None,
    )
    stopped, save_seconds = "", 0.0
    while state["step"] < steps and not stopped:
        heartbeat.set_phase(f"in step {state['step'] + 1}")
        started = time.monotonic()
        batch = list(islice(micro_batches, batches.num_micro_batches))
        waited = time.monotonic() - started
        lr = learning_rate(config.optim, state["step"], steps)
        with _recorder(config, mesh, run.directory, traffic, state["step"]), profile.step(state["step"] + 1):
            row = train_step(config, run.engine, mesh, batch, state["consumed"], lr, traffic)
        try:
            notable = loss_guard.check(state["step"] + 1, row, partial(batches.windows, state["consumed"]))
        except Diverged:
            saver.wait()  # for what is on its way from before
            raise
        state["step"] += 1
        state["consumed"] += config.data.batch_size
        if run.monitor is not None:
            seconds = time.monotonic() - started
            tokens = config.data.batch_size * config.data.seq_len
            speed = {
                "tokens_per_second": tokens / seconds,
                "step_seconds": seconds,
                "data_wait_seconds": waited,
                "save_seconds": save_seconds,
            }
            sent = {f"bytes_{verb}": num_bytes for verb, num_bytes in traffic.by_verb().items()}
            run.monitor.step({"step": state["step"], **row, "tokens": tokens * state["step"], **speed, **sent})
            if notable:
                run.monitor.say(notable)
        traffic.clear()
        last = state["step"] == steps
        stopped = "" if last else preemption.reason(mesh.world)
        if last or (_due(config.train.validate_every, state["step"]) and not stopped):
            state["held_out"] = _validate(run)
        heartbeat.set_phase(f"after step {state['step']}")
        saving = time.monotonic()
        saver.poll()
        if last or stopped or _due(config.checkpoint.every, state["step"]):
            saver.start({**state, **_identity(config, run.task)})
        if last or stopped:
            saver.wait()
        save_seconds = time.monotonic() - saving
    profile.finish()
    return stopped


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def train_step(
    config: RunConfig,
    engine: Engine,
    mesh: Mesh,
    batch: list[Batch],
    consumed: int,
    lr: float,
    traffic: Traffic,
) -> dict[str, float]:
    """One optimizer step over this data rank's micro-batches.

    Args:
        batch: the micro-batches of whole sequences; every rank of a sequence passes the same ones.
        consumed: sequences trained on before, over all ranks.
        lr: learning rate of this step.
        traffic: counts what is exchanged.

    Returns:
        ``loss`` (nats, or squared errors, a labelled token), ``penalty``, ``lr``, ``grad_norm``,
        ``peak_memory_bytes``: over all ranks. And where this rank's time went, four parts of it: ``exchange_seconds``
        in the verbs' exchanges and in agreeing on sums, ``zero_seconds`` in DeepSpeed's collectives,
        ``optimizer_seconds`` in the rest of the engine's step, ``compute_seconds`` for all else: forward and backward.
    """
    started = time.monotonic()
    for stopwatch in (traffic.waiting, engine.waiting):
        stopwatch.read()  # what came before counts elsewhere
    num_labels = float(sum(int(labelled(micro.labels).sum()) for micro in batch))
    with traffic.waiting:
        count = sum(row[0] for row in gather_values([num_labels], mesh.data))
    if count == 0:
        indices = torch.cat([micro.indices for micro in batch]).tolist()
        allowed = "must hold a token that has a next one in its document"
        raise InputError(
            "the sequences of a step", indices, allowed, "set data.packing=stream, or a larger data.seq_len"
        )
    share = config.data.batch_size // mesh.data.size
    nll_sum = penalty_sum = 0.0
    for number, micro in enumerate(batch):
        first = consumed + mesh.data.rank * share + number * config.train.micro_batch_size
        rows = torch.arange(first, first + len(micro.tokens), device=mesh.device)
        spans = blocks_of(micro, config, mesh, dropout_seeds=rows * 1_000_003 + config.run.seed, traffic=traffic)
        # The penalty counts once: each of the summands that ranks, micro-batches and blocks add carries its part of it.
        summands = mesh.world.size * len(batch) * len(spans)

        def advance(span: Span, micro: Batch = micro) -> None:
            engine(span.shard(micro.tokens).to(mesh.device), span=span, head=False)

        def summand(span: Span, micro: Batch = micro, summands: int = summands) -> Tensor:
            nonlocal nll_sum, penalty_sum
            tokens, labels = (span.shard(x).to(mesh.device) for x in (micro.tokens, micro.labels))
            nll, penalty = engine(tokens, span=span, labels=labels)
            nll_sum += float(nll.detach().double().sum())
            penalty_sum += float(penalty.detach()) / summands
            return nll.sum() / count + penalty / summands

        streaming.train(spans, advance, summand, engine.backward, park=config.parallel.park_carries)
    reducing, stepping = engine.waiting.read(), time.monotonic()
    grad_norm = engine.step(lr)
    gathering = engine.waiting.read()
    optimizer_seconds = max(0.0, time.monotonic() - stepping - gathering)
    with traffic.waiting:
        rows_all = gather_values([nll_sum, penalty_sum, peak_memory(mesh)], mesh.world)
    exchange_seconds, zero_seconds = traffic.waiting.read(), reducing + gathering
    elsewhere = exchange_seconds + zero_seconds + optimizer_seconds
    loss = sum(row[0] for row in rows_all) / count
    return {
        "loss": loss,
        "penalty": sum(row[1] for row in rows_all),
        "lr": lr,
        "grad_norm": grad_norm,
        "peak_memory_bytes": max(row[2] for row in rows_all),
        "compute_seconds": max(0.0, time.monotonic() - started - elsewhere),
        "exchange_seconds": exchange_seconds,
        "zero_seconds": zero_seconds,
        "optimizer_seconds": optimizer_seconds,
    }


def _validate(run: _Run) -> float | None:
    """Mean loss over the held-out examples, shown with its course over positions; None if none is held out, or none
    that was read has a label.
    """
    probe = Probe(run.engine.module, wanted=run.monitor is not None)
    found = _score(run, "valid", run.config.train.validate_batches, probe)
    if found is not None and run.monitor is not None:
        run.monitor.validation(run.state["step"], found.loss, found.by_position, found.metrics, probe)
    return None if found is None else found.loss


def _test(run: _Run) -> Score | None:
    """How the model does in the task's test, also written to ``result.json``; None where the task has none."""
    found = _score(run, "test")
    if found is not None and run.mesh.world.rank == 0:
        result = {
            "task": as_written(run.config)["task"],
            "title": run.task.title,
            "mixers": run.config.model.mixers,
            "seed": run.config.run.seed,
            "step": run.state["step"],
            "num_parameters": run.engine.num_parameters,
            "num_labels": found.num_labels,
            "loss": found.loss,
            "metrics": found.metrics,
            "chance": run.task.baseline_metrics,
        }
        write_text(run.directory / "result.json", json.dumps(result, indent=2) + "\n")
    return found


def _score(run: _Run, *what: Any) -> Score | None:
    run.engine.eval()
    found = score(run.config, run.engine, cast(Model, run.engine.module).head, run.mesh, run.task, *what)
    run.engine.train()
    return found


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then a cosine down to ``min_lr_ratio * lr``."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    total = (optim.schedule_steps or num_steps) - optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total))
    low = optim.min_lr_ratio
    return optim.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def start_task(config: RunConfig, mesh: Mesh) -> Task:
    """The task with its data, made ready on the first rank and opened on all; fills in what the model takes from it."""
    first_rank_only(lambda: kind_of(config.task).prepare(config.data), mesh.world)
    task = open_task(config.task, config.data)
    task.fit(config.model)
    return task


def _optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW; only the matrices of linear layers and embeddings decay."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    beta1, beta2 = optim.betas
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps)


def num_micro_batches(config: RunConfig) -> int:
    """Micro-batches that a data rank adds up in a step."""
    return config.data.batch_size // (config.parallel.num_data_ranks * config.train.micro_batch_size)


@contextmanager
def _recorder(config: RunConfig, mesh: Mesh, run_dir: Path, traffic: Traffic, step: int) -> Iterator[None]:
    """Writes down the exchanges of this rank, if those of this step are wanted."""
    if step >= config.monitor.record_exchanges:
        yield
        return
    with Recorder(traffic) as recorder:
        yield
    path = run_dir / "exchanges" / f"rank-{mesh.world.rank}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="ascii") as file:
        for event in recorder.events:
            file.write(json.dumps({"step": step + 1, **asdict(event)}) + "\n")


def _check_compile(config: RunConfig) -> None:
    """Refuse what torch's compiler of CPU code would end in a page of its linker's words."""
    home = Path(torch.__file__).parent
    if config.train.compile and not torch.cuda.is_available() and " " in str(home):
        allowed = f"false where torch lies in a path with a space, to which its compiler cannot link: {home}"
        raise InputError("train.compile", True, allowed, "set it to false, or make .venv in another place")


def _set_threads(threads: int) -> None:
    """Share the machine's cores among its ranks, unless told otherwise."""
    # torchrun tells the ranks of a machine by one name, deepspeed by the other.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local))


def _give_up(why: str) -> None:
    """End this process, which waits for a rank that is lost; the launcher ends the others."""
    print(f"longreach: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def _start_run_dir(run_dir: Path, config: RunConfig, task: Task, lock: RunLock, step: int) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(run_dir)
        if step < config.train.steps:  # else nothing is trained by this configuration
            save(config, run_dir / "config.yaml")
        task.keep(run_dir)
    except OSError as error:
        raise InputError(
            "run.dir", str(run_dir), f"must be a writable directory ({error.strerror})", "set run.dir"
        ) from None


def peak_memory(mesh: Mesh) -> float:
    """Bytes: of the device on a GPU, resident on a CPU."""
    if mesh.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _identity(config: RunConfig, task: Task) -> dict[str, Any]:
    """What a resumed run must have in common to be the same run."""
    return {"seed": config.run.seed, "batch_size": config.data.batch_size, "data": task.fingerprint}


def _changes(config: RunConfig, task: Task, state: dict[str, Any]) -> list[str]:
    """What is no longer exact in a run that is continued, a line each.

    Raises:
        InputError: the corpus is another one.
    """
    now = _identity(config, task)
    if not checkpoint.is_count(state.get("consumed")):
        raise InputError("checkpoints", config.run.dir, "do not say how far the data was read: no training wrote them")
    if state.get("data") != now["data"] and not config.data.accept_change:
        allowed = "is not the corpus that this run began with: its position there means nothing"
        fix = "give another run.dir, or data.accept_change=true to go on all the same"
        raise InputError("data.source", config.data.source, allowed, fix)
    means = {"seed": "the order of the data", "batch_size": "the order of the data in steps, and the schedule"}
    return [
        f"no longer exact: {key} was {state.get(key)} and is {now[key]}, which changes {what}"
        for key, what in means.items()
        if state.get(key) != now[key]
    ]


def _introduction(config: RunConfig, task: Task, num_parameters: int, mesh: Mesh) -> str:
    mixers, ranks = ", ".join(config.model.mixers), mesh.sequence.size
    return (
        f"{num_parameters:,} parameters ({mixers}; width {config.model.width}, depth {config.model.depth}), "
        f"{task.introduction()}, "
        f"sequences of {config.data.seq_len:,} tokens on {ranks} rank{'s' * (ranks > 1)}, {mesh.data.size} at once"
    )


def _continuation(saved: Path, step: int, num_steps: int) -> str:
    if step < num_steps:
        return f"continuing from {saved}"
    done = f"finished: {saved} is at step {step} of {num_steps}; nothing is trained"
    return f"{done}: raise train.steps to go on, or give another run.dir"
