"""The learning-rate range test: a short training in which the learning rate grows from step to step.

Smith 2017, "Cyclical learning rates for training neural networks", section 3.3 (arXiv 1506.01186). That the rate grows
exponentially, where the test ends, and that a tenth of the rate with the lowest loss is suggested is as in
https://sgugger.github.io/how-do-you-find-a-good-learning-rate.html, but for the smoothing: here a mean of neighbouring
steps, which does not lag behind.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ...errors import InputError
from ...parallel.heartbeat import Heartbeat
from ...parallel.mesh import gather_values
from ...parallel.traffic import Traffic
from ..config import RunConfig
from ..trainer import set_up, train_step
from .curriculum import read_steps
from .files import write_text
from .process import abort
from .run import open_run

DIVERGED = 4.0  # times the lowest loss ends the test
NEIGHBOURS = 2  # steps on either side whose losses are averaged
FRACTION = 0.1  # of the learning rate with the lowest loss is suggested


@dataclass(frozen=True)
class RangeTest:
    """The result of a test.

    Attributes:
        rates: learning rate of each step.
        losses: training loss of each step, before its update; smoothed.
        lowest: the learning rate at which it is lowest.
        suggested: a tenth of that.
        ended: why the test ended before its last step; empty if it did not.
        note: what to change where the lowest loss is at an end of the range; else empty.
    """

    rates: list[float]
    losses: list[float]
    lowest: float
    suggested: float
    ended: str
    note: str


def check_range(low: float, high: float, steps: int) -> None:
    """Raise InputError for a range or a number of steps that is no test."""
    if not 0 < low < high < math.inf:
        raise InputError("--from, --to", [low, high], "must be two rates above 0, the smaller one first")
    if steps < 10:
        raise InputError("--steps", steps, "must be at least 10")


def range_test(config: RunConfig, low: float, high: float, steps: int) -> RangeTest:
    """Train ``steps`` steps at rates from ``low`` to ``high``, in a new run directory; a collective over all ranks.

    The weights, which are of no use, are not saved; ``lr.json`` in the directory has the result, and ``plots/lr.png``.

    Args:
        config: of the run; changed, so that its directory ends in ``-lr``, all sequences have ``data.seq_len`` tokens,
            and nothing of it is resumed or validated.
        low, high: learning rates of the first and the last step.
        steps: of the test, at least 10.

    Raises:
        InputError: as of `trainer.train`, or the very first losses are not finite.
    """
    check_range(low, high, steps)
    config.run.dir = f"{config.run.dir.rstrip('/')}-lr"
    config.train.steps, config.train.patience, config.train.validate_every = steps, 0, 0
    config.data.epochs, config.data.curriculum = 0.0, []
    config.checkpoint.resume, config.checkpoint.keep_best = False, False
    mesh, task, engine = set_up(config)
    rates, losses, ended = list[float](), list[float](), ""
    with (
        open_run(config, mesh, task, engine) as run,
        Heartbeat(mesh.world, config.parallel.timeout, abort) as heartbeat,
    ):
        traffic, state = Traffic(mesh.device), run.state
        inputs = read_steps(config, mesh, task, 0, 0)
        while state["step"] < steps and not ended:
            step = state["step"] + 1
            heartbeat.set_phase(f"in step {step}")
            started = time.monotonic()
            rate = low * (high / low) ** ((step - 1) / (steps - 1))
            read = next(inputs)
            metrics = train_step(read.config, engine, mesh, read.batch, read.position, rate, traffic)
            state["step"], state["consumed"] = step, state["consumed"] + config.data.batch_size
            state["tokens"] += config.data.batch_size * config.data.seq_len
            run.record_step(metrics, {"step_seconds": time.monotonic() - started}, traffic, "")
            ended = _end(metrics["loss"], min(losses, default=math.inf), step, rate)
            if not ended:
                rates.append(rate)
                losses.append(metrics["loss"])
        if len(losses) <= NEIGHBOURS:
            raise InputError("--from", low, f"is too large already: {ended}", f"set --from {low / 1000:g}")
        found = _result(rates, losses, ended)
        if run.monitor is not None:
            _write(run.directory, found)
    gather_values([0.0], mesh.world)  # a barrier: no rank leaves while the first one writes
    engine.close()
    return found


def _end(loss: float, lowest: float, step: int, rate: float) -> str:
    if math.isfinite(loss) and loss <= DIVERGED * lowest:
        return ""
    return f"the loss diverged at step {step}, at a learning rate of {rate:.2g}: {loss:.4g}"


def _result(rates: Sequence[float], losses: Sequence[float], ended: str) -> RangeTest:
    smooth = _smoothed(losses)
    at = min(range(len(smooth)), key=smooth.__getitem__)
    note = ""
    if at == 0:
        note = "the loss is lowest at the first step: lower --from"
    elif at == len(smooth) - 1 and not ended:
        note = "the loss is lowest at the last step: raise --to"
    return RangeTest([*rates], smooth, rates[at], FRACTION * rates[at], ended, note)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and its `NEIGHBOURS` on either side, as far as there are as many on both."""
    means = []
    for at in range(len(losses)):
        reach = min(NEIGHBOURS, at, len(losses) - 1 - at)
        near = losses[at - reach : at + reach + 1]
        means.append(sum(near) / len(near))
    return means


def _write(directory: Path, found: RangeTest) -> None:
    write_text(directory / "lr.json", json.dumps(asdict(found)) + "\n")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses)
    axes.axvline(found.suggested, color="grey", linestyle=":", label=f"suggested: {found.suggested:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title=directory.name)
    axes.legend()
    (directory / "plots").mkdir(exist_ok=True)
    figure.savefig(directory / "plots" / "lr.png", dpi=120)
