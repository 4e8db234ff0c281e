"""The records of a run: metrics.jsonl, TensorBoard, the console, and the loss curve at the end.

`charts` lays out TensorBoard, `figures` draws, `probe` inspects the model, `profile` traces steps, `exchanges` lists
the exchanges between ranks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ...errors import InputError
from ..config import RunConfig, to_yaml
from . import figures
from .charts import TAGS, hyperparameters, layout
from .hosts import HostReport
from .probe import Probe

matplotlib.use("Agg")
log = logging.getLogger("longreach.monitor")
BITS = math.log2(math.e)  # bits in a nat
HELD_OUT = "held-out"  # TensorBoard's run of held-out scores
RECENT = 20  # last steps whose mean training loss is the result
SLOW_REPORTS = 3  # in a row, in which a rank is the slowest before the console names it ...
WAIT_SHARE, MIN_WAIT = 0.2, 0.1  # ... and the others wait for it such a part of a step, and as many seconds


class Monitor:
    """Records a run on rank 0, below its directory.

    In TensorBoard, held-out scores are a run of their own beside that of training, ``held-out``: TensorBoard draws each
    run in a colour, and all tags of a run in the same one.

    Args:
        run_dir: gets ``metrics.jsonl``, ``validation.jsonl``, ``tensorboard/`` and ``plots/``.
        config: shown in TensorBoard as text.
        first_step: steps done before; rows of later steps, left by a run that was stopped, are dropped.
        hosts: names of those on which the ranks are.
    """

    def __init__(self, run_dir: Path, config: RunConfig, first_step: int, hosts: Sequence[str] = ()) -> None:
        self.run_dir, self.config = run_dir, config
        self.in_bits = config.task.name == "language"  # losses are of tokens
        self.metrics, self.validations = run_dir / "metrics.jsonl", run_dir / "validation.jsonl"
        self.rows = _rows_up_to(self.metrics, first_step)
        self.held_out = _rows_up_to(self.validations, first_step)
        _write_rows(self.metrics, self.rows)
        _write_rows(self.validations, self.held_out)
        self.board: SummaryWriter | None = None
        self.held_out_board: SummaryWriter | None = None
        self.console = Console(stderr=True, highlight=False, markup=False)
        self.progress: Progress | None = None
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
                console=self.console,
            )
            self.progress.start()
            self.task = self.progress.add_task("", total=config.train.steps, completed=first_step, state="")
        if config.monitor.tensorboard:
            with self._guard_tensorboard():
                threading.excepthook = _ignore_writer_errors
                with _side_file(run_dir, "layout") as board:
                    board.add_custom_scalars(layout(config, hosts))
                directory = run_dir / "tensorboard"
                self.board = SummaryWriter(str(directory), purge_step=first_step + 1)
                self.held_out_board = SummaryWriter(str(directory / HELD_OUT), purge_step=first_step + 1)
                self.board.add_text("config", f"```yaml\n{to_yaml(config)}\n```", first_step)
        self.started, self.first_step = time.monotonic(), first_step
        self.host_report: HostReport | None = None
        self.slowest, self.times_slowest = -1, 0

    def print_line(self, line: str) -> None:
        """Print one line, above the progress bar if there is one."""
        (self.progress.console if self.progress else self.console).print(line, soft_wrap=True)

    def step(self, row: dict[str, Any], report: HostReport | None = None) -> None:
        """Record one optimizer step; ``row["step"]`` counts from 1.

        Args:
            row: numbers, by name.
            report: on the hosts, over the steps since the last one.
        """
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        before = self.rows[-1].get("skipped_steps", 0) if self.rows else 0
        row["skipped_steps"] = before + (not finite)
        if self.in_bits:
            row["bits_per_token"] = row["loss"] * BITS
        self.rows.append(row)
        hosts = {} if report is None else report.as_row()
        _append(self.metrics, {name: value if math.isfinite(value) else None for name, value in row.items()} | hosts)
        step = row["step"]
        with self._guard_tensorboard():
            for name, value in row.items():
                if self.board is not None and name != "step" and math.isfinite(value):
                    self.board.add_scalar(TAGS.get(name, f"train/{name}"), value, step)
            for tag, value in ({} if report is None else report.scalars()).items():
                if self.board is not None:
                    self.board.add_scalar(tag, value, step)
        bits = f"{row['bits_per_token']:.3f} bits/token  " if self.in_bits else ""
        state = f"loss {row['loss']:.4f}  {bits}{row['tokens_per_second']:,.0f} tokens/s"
        if self.progress is not None:
            self.progress.update(self.task, completed=step, state=state)
        elif step % self.config.train.log_every == 0 or step == self.config.train.steps:
            pace = (time.monotonic() - self.started) / (step - self.first_step)
            left = _format_seconds(pace * (self.config.train.steps - step))
            self.print_line(f"step {step}/{self.config.train.steps}  {state}  {left} left")
        if report is not None:
            self._name_slowest(step, report, row["step_seconds"])

    def _name_slowest(self, step: int, report: HostReport, step_seconds: float) -> None:
        """Say once in the console which rank the others wait for, if it is the same one in several reports."""
        self.host_report = report
        waited = report.waited_for_slowest_seconds
        is_slow = waited > max(MIN_WAIT, WAIT_SHARE * step_seconds)
        rank = report.slowest_rank if is_slow else -1
        self.times_slowest = self.times_slowest + 1 if rank == self.slowest else 1
        self.slowest = rank
        if is_slow and self.times_slowest == SLOW_REPORTS:
            where = f"step {step}: rank {rank} on {report.slowest_host} is the slowest"
            self.print_line(f"{where}: the other ranks wait for it {waited:.2f} s of {step_seconds:.2f} s a step")

    def validation(
        self, step: int, loss: float, by_position: list[tuple[int, float]], metrics: dict[str, float], probe: Probe
    ) -> None:
        """Record a validation: ``loss`` in nats a token, the loss of each bin of positions, the task's other metrics,
        and what a probe found in the model.
        """
        row = {"step": step, "loss": loss, **metrics}
        if self.in_bits:
            row["bits_per_token"] = loss * BITS
            row["gain_of_context"] = (by_position[0][1] - by_position[-1][1]) * BITS
            sources = "".join(f", {name.removeprefix('loss/')} {value:.4f}" for name, value in metrics.items())
            self.print_line(f"step {step}: held-out {loss:.4f} nats, {loss * BITS:.4f} bits/token{sources}")
        else:
            found = "".join(f", {name} {value:.4f}" for name, value in metrics.items())
            self.print_line(f"step {step}: held-out {loss:.4f}{found}")
        if probe.outside_range is not None:
            row["outside_range"] = probe.outside_range
        self.held_out.append({**row, "by_position": by_position})
        _append(self.validations, self.held_out[-1])
        if self.board is None or self.held_out_board is None:
            return
        title = f"held-out, step {step}"
        with self._guard_tensorboard():
            for name, value in row.items():
                if name in TAGS:
                    self.board.add_scalar(TAGS[name], value, step)
                elif name != "step":
                    self.held_out_board.add_scalar(f"validation/{name}", value, step)
            if self.in_bits:
                bits = [(position, value * BITS) for position, value in by_position]
                self.board.add_figure("validation/by_position", figures.by_position(bits, title), step)
            self.board.add_figure("figures/where_the_time_goes", figures.time_parts(self.rows), step)
            if self.host_report is not None and self.host_report.num_ranks > 1:
                self.board.add_figure("figures/who_waits", figures.waits(self.host_report, f"step {step}"), step)
            if probe.kernels:
                self.board.add_figure("figures/long_kernels", figures.long_kernels(probe.kernels, title), step)
            if probe.products:
                self.board.add_figure("figures/products", figures.products(probe.products, title), step)

    def profile(self, step: int, path: Path, table: str) -> None:
        """Show the table of a trace, and where the trace is."""
        self.print_line(f"step {step}: traced in {path}; open it in https://ui.perfetto.dev or chrome://tracing")
        if self.board is not None:
            with self._guard_tensorboard():
                self.board.add_text("profile/top_operators", f"{path}\n\n```\n{table}\n```", step)

    def finish(self) -> None:
        """Add the finished run to TensorBoard's table of runs: hyperparameters and results."""
        if self.board is None or not self.rows:
            return
        step, finite = self.rows[-1]["step"], [row for row in self.rows if _is_finite(row["loss"])]
        results = {}
        if self.held_out:
            results["result/held_out"] = self.held_out[-1]["loss"]
        if finite:
            results["result/loss"] = fmean(row["loss"] for row in finite[-RECENT:])
        results["result/tokens_per_second"] = median(row["tokens_per_second"] for row in self.rows)
        with self._guard_tensorboard(), _side_file(self.run_dir, "results") as board:
            assert board.file_writer is not None
            for summary in hparams(hyperparameters(self.config), results):
                board.file_writer.add_summary(summary, step)
            for tag, value in results.items():
                board.add_scalar(tag, value, step)

    def plot(self) -> Path | None:
        """Draw the loss curve from ``metrics.jsonl``; returns the PNG's path, or None if it cannot be written."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        shown = [row for row in self.rows if _is_finite(row["loss"])]
        scale = BITS if self.in_bits else 1.0
        axes.plot([r["step"] for r in shown], [r["loss"] * scale for r in shown], lw=0.8, label="training")
        if self.held_out:
            steps, losses = zip(*[(r["step"], r["loss"] * scale) for r in self.held_out], strict=True)
            axes.plot(steps, losses, "o-", label="held-out")
        axes.set(xlabel="step", ylabel="bits per token" if self.in_bits else "loss", title=self.run_dir.name)
        axes.legend()
        axes.grid(alpha=0.3)
        path = self.run_dir / "plots" / "loss.png"
        try:
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=120)
        except OSError as error:
            self.print_line(f"warning: {path} cannot be written ({error.strerror}); metrics.jsonl has every step")
            return None
        return path

    def close(self) -> None:
        """Stop the progress bar and flush TensorBoard."""
        if self.progress is not None:
            self.progress.stop()
        for board in (self.board, self.held_out_board):
            if board is not None:
                with self._guard_tensorboard():
                    board.close()

    @contextmanager
    def _guard_tensorboard(self) -> Iterator[None]:
        """Catch the errors of writing TensorBoard's files: warn once, and go on without them."""
        try:
            yield
        except OSError as error:
            directory = self.run_dir / "tensorboard"
            why = error.strerror or str(error)
            self.print_line(
                f"warning: {directory} cannot be written ({why}): no more charts; metrics.jsonl has every step"
            )
            self.board = self.held_out_board = None


def _is_finite(value: float | None) -> bool:
    """Whether a row's value is a finite number; one read from ``metrics.jsonl`` is None if it was not."""
    return value is not None and math.isfinite(value)


def _rows_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a JSONL file up to a step; a half-written last line is dropped."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                log.warning("%s: dropped a line that is no JSON", path)
                continue
            if row["step"] <= step:
                rows.append(row)
    return rows


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    with _require_writable(path):
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
        os.replace(partial, path)


def _append(path: Path, row: dict[str, Any]) -> None:
    with _require_writable(path), open(path, "a", encoding="ascii") as file:
        file.write(json.dumps(row) + "\n")


@contextmanager
def _require_writable(path: Path) -> Iterator[None]:
    """Raise `InputError` where the record of the run cannot be written: without it, the run is not to go on."""
    try:
        yield
    except OSError as error:
        fix = "make room, then the same command goes on from the last checkpoint"
        raise InputError("run.dir", str(path), f"cannot be written: {error.strerror}", fix) from None


def _ignore_writer_errors(arguments: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, except for TensorBoard's writer: the next call to it raises."""
    if not (isinstance(arguments.exc_value, OSError) and "Writer" in type(arguments.thread).__name__):
        threading.__excepthook__(arguments)


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _LineHandler(logging.Handler):
    """Prints each record on what is standard error at that time: while a progress bar is shown, it prints above it."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # a terminal that is gone does not end the run
            print(self.format(record), file=sys.stderr, flush=True)


def add_sample(run_dir: Path, step: int, prompt: str, text: str) -> None:
    """Add a generated text to the texts of TensorBoard; it takes the place of an earlier one of the run's end.

    Raises:
        OSError: it cannot be written.
    """
    with _side_file(run_dir, "sample") as board:
        board.add_text("sample", f"after `{prompt!r}`:\n\n```\n{text}\n```", step)


@contextmanager
def _side_file(run_dir: Path, name: str) -> Iterator[SummaryWriter]:
    """A file of TensorBoard's beside the main one; it replaces the file of this name that a resumed run left."""
    directory = run_dir / "tensorboard"
    for old in directory.glob(f"events.out.tfevents.*.{name}"):
        old.unlink()
    with SummaryWriter(str(directory), filename_suffix=f".{name}") as board:
        yield board


def configure_logging(level: int = logging.INFO) -> None:
    """Send this package's log lines of a level and above to standard error, one plain line each."""
    handler = _LineHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("longreach")
    root.handlers, root.propagate = [handler], False
    root.setLevel(level)
