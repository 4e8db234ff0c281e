"""A training run: its directory, its checkpoints, and what it records."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...errors import InputError
from ...parallel.mesh import Mesh, first_rank_only
from ...parallel.traffic import Traffic
from .. import checkpoint
from ..config import RunConfig, as_written, save
from ..deepspeed.engine import Engine
from ..model import SequenceModel
from ..model.directory import FOREIGN, keep_files
from ..monitoring.hosts import HostReport, Hosts
from ..monitoring.monitor import Monitor
from ..monitoring.probe import Probe
from ..tasks import Score, Task
from .curriculum import epochs_of
from .files import write_text
from .lock import RunLock
from .loss_guard import Diverged, LossGuard
from .patience import count_validation, has_ended, reason
from .resume import check_resume, run_identity
from .schedule import shortened
from .validation import score

MANY_EPOCHS = 10  # from which on a run says that it reads the same data so often


@dataclass
class Run:
    """A run between its set-up and its end.

    Attributes:
        config, mesh, task, engine: what it trains, and where.
        saver: writes its checkpoints.
        monitor: of the first rank; None on the others.
        hosts: collects what ranks wait for.
        state: of the loop, as a checkpoint keeps it: ``step``, ``consumed`` and ``tokens`` (steps, sequences of
            ``data.seq_len`` tokens, and tokens so far), ``held_out`` and ``held_out_by_source`` (losses of the last
            validation), and the keys of `patience`.
    """

    config: RunConfig
    mesh: Mesh
    task: Task
    engine: Engine
    saver: checkpoint.Saver
    monitor: Monitor | None
    hosts: Hosts
    state: dict[str, Any]

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir)

    def check_loss(self, guard: LossGuard, metrics: dict[str, float], sequences: Callable[[], list[int]]) -> str:
        """`LossGuard.check` of the step after ``state["step"]``; completes the last checkpoint before it raises."""
        try:
            return guard.check(self.state["step"] + 1, metrics, sequences)
        except Diverged:
            self.saver.wait()
            raise

    def record_step(
        self,
        metrics: dict[str, float],
        seconds: dict[str, float],
        traffic: Traffic,
        warning: str,
        report: HostReport | None = None,
    ) -> None:
        """Record the step that ``state`` counts already.

        Args:
            metrics: of `train_step`.
            seconds: ``step_seconds``, and the parts of it that `train_step` does not know.
            traffic: of the step; it is cleared.
            warning: of `check_loss`.
            report: on the hosts, where one is due.
        """
        if self.monitor is not None:
            tokens = self.config.data.batch_size * self.config.data.seq_len
            speed = {"tokens_per_second": tokens / seconds["step_seconds"], **seconds}
            sent = {f"bytes_{verb}": num_bytes for verb, num_bytes in traffic.by_verb().items()}
            counts = {"tokens": self.state["tokens"]}
            self.monitor.step({"step": self.state["step"], **metrics, **counts, **speed, **sent}, report)
            if warning:
                self.monitor.print_line(warning)
        traffic.clear()

    def validate(self) -> bool:
        """Set ``held_out`` to the mean loss over the held-out examples, and show it with its course over positions.

        It is None if no example is held out, or none that was read has a label.

        Returns:
            Whether it is the lowest so far.
        """
        probe = Probe(self.engine.module, enabled=self.monitor is not None)
        found = self._score("valid", self.config.train.validate_batches, probe)
        if found is not None and self.monitor is not None:
            metrics = found.metrics | {f"loss/{name}": loss for name, loss in found.by_source.items()}
            self.monitor.validation(self.state["step"], found.loss, found.by_position, metrics, probe)
        self.state["held_out"] = None if found is None else found.loss
        self.state["held_out_by_source"] = {} if found is None else found.by_source
        return count_validation(self.state)

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more to train."""
        return has_ended(self.config, self.state)

    def finish(self) -> None:
        """Record the results of a run that has ended."""
        if self.monitor is not None:
            if self.state["step"] < self.config.train.steps:
                self.monitor.print_line(_early_end(self.config, self.state))
            self.monitor.finish()

    def test(self) -> Score | None:
        """The model's score in the task's test, also written to ``result.json``; None where the task has none."""
        found = self._score("test")
        if found is not None and self.mesh.world.rank == 0:
            result = {
                "task": as_written(self.config)["task"],
                "title": self.task.title,
                "mixers": self.config.model.mixers,
                "seed": self.config.run.seed,
                "step": self.state["step"],
                "num_parameters": self.engine.num_parameters,
                "num_labels": found.num_labels,
                "loss": found.loss,
                "metrics": found.metrics,
                "chance": self.task.baseline_metrics,
            }
            write_text(self.directory / "result.json", json.dumps(result, indent=2) + "\n")
        return found

    def save(self, due: bool, wait: bool) -> float:
        """Complete the last checkpoint if all its files are written; start the next one.

        Args:
            due: start one.
            wait: until it is complete.

        Returns:
            The seconds that this took of the training.
        """
        started = time.monotonic()
        self.saver.poll()
        if due:
            self.saver.start({**self.state, **run_identity(self.config, self.task)})
        if wait:
            self.saver.wait()
        return time.monotonic() - started

    def _score(self, *what: Any) -> Score | None:
        self.engine.eval()
        head = cast(SequenceModel, self.engine.module).head
        found = score(self.config, self.engine, head, self.mesh, self.task, *what)
        self.engine.train()
        return found


@contextmanager
def open_run(config: RunConfig, mesh: Mesh, task: Task, engine: Engine) -> Iterator[Run]:
    """Resume from the newest checkpoint, if there is one, and hold the run directory; a collective.

    Nothing is written before everything fits: a mistake leaves no new directory, and an old one as it was.

    Raises:
        InputError: the checkpoint or the run directory cannot be used.
    """
    run_dir, keep, lock = Path(config.run.dir), config.checkpoint, RunLock()
    directory = run_dir / "checkpoints"
    found = checkpoint.resume(engine, directory) if keep.resume else None
    saved, state = found or (None, {"step": 0, "consumed": 0, "tokens": 0})
    inexact = [] if saved is None else check_resume(config, task, state)
    state.setdefault("tokens", state["consumed"] * config.data.seq_len)
    kept = checkpoint.Keep(keep.keep_last, keep.keep_every, keeps_best(config))
    saver = checkpoint.Saver(engine, directory, kept, config.parallel.timeout)
    saver.check_space()
    ended = has_ended(config, state)
    first_rank_only(lambda: _open_directory(run_dir, config, task, lock, ended), mesh.world)
    hosts = Hosts(mesh, run_dir)
    monitor = Monitor(run_dir, config, state["step"], hosts.names) if mesh.world.rank == 0 else None
    if monitor is not None:
        resumed = [] if saved is None else [_resume_line(saved, config, state)]
        if not ended:
            shorter = shortened(config.optim, config.train.steps)
            resumed += [*inexact, *([shorter] if shorter else [])]
        for line in (_summary_line(config, task, engine, mesh), *resumed):
            monitor.print_line(line)
    try:
        yield Run(config, mesh, task, engine, saver, monitor, hosts, state)
    finally:
        if monitor is not None:
            monitor.close()
        lock.release()


def _open_directory(run_dir: Path, config: RunConfig, task: Task, lock: RunLock, ended: bool) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(run_dir)
        if not ended:  # else nothing is trained by this configuration
            save(config, run_dir / "config.yaml")
        task.write_run_files(run_dir)
        keep_files(config.model, run_dir / FOREIGN)
    except OSError as error:
        allowed = f"must be a writable directory ({error.strerror})"
        raise InputError("run.dir", str(run_dir), allowed, "set run.dir") from None


def _summary_line(config: RunConfig, task: Task, engine: Engine, mesh: Mesh) -> str:
    """Model, data and layout of a run."""
    mixers, model = ", ".join(config.model.mixers), config.model
    by_source = epochs_of(config, task)
    epochs = ", ".join(f"{number:,.3g} epochs{f' of {name}' * bool(name)}" for name, number in by_source.items())
    most = max(by_source.values())
    often = f"; each is read {most:,.0f} times: give more data, or fewer steps" if most >= MANY_EPOCHS else ""
    shorter = "".join(f"{tokens:,} ({steps:,} steps), then " for tokens, steps in config.data.curriculum)
    trained = "" if engine.num_trained == engine.num_parameters else f", {engine.num_trained:,} of them trained,"
    return (
        f"{engine.num_parameters:,} parameters{trained} ({mixers}; width {model.width}, depth {model.depth}), "
        f"{task.introduction()}, sequences of {shorter}{config.data.seq_len:,} tokens, "
        f"{config.train.steps:,} steps or {epochs}, "
        f"sequence-parallel {mesh.sequence.size}, data-parallel {mesh.data.size}{often}"
    )


def _resume_line(saved: Path, config: RunConfig, state: dict[str, Any]) -> str:
    step, steps = state["step"], config.train.steps
    if step >= steps:
        done = f"finished: {saved} is at step {step} of {steps}; nothing is trained"
        return f"{done}: raise train.steps to go on, or give another run.dir"
    if has_ended(config, state):
        return f"finished: {saved}; nothing is trained: raise train.patience to go on, or give another run.dir"
    return f"resuming from {saved}"


def keeps_best(config: RunConfig) -> bool:
    """Whether the checkpoint with the lowest held-out loss is saved and kept."""
    return config.checkpoint.keep_best or config.train.patience > 0


def _early_end(config: RunConfig, state: dict[str, Any]) -> str:
    """Why a run ended early, and where its best checkpoint is."""
    best = checkpoint.path_of(Path(config.run.dir) / "checkpoints", state.get("best_step", 0))
    where = f" in {best}" if best.is_dir() else ""
    return f"stopped early at step {state['step']}: {reason(state)}{where}"
