"""`longreach train`: train as a config says, or plan a training with ``--dry-run``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from ..arguments import add_threads, threads_of
from ..exit_codes import GRACE_SECONDS, STOPPED, CommandFailed, report_error
from ..process import stop_while_starting

if TYPE_CHECKING:
    from ...framework.config import RunConfig
    from ...framework.trainer import Result

SUMMARY = "train as a config says"
DESCRIPTION = """Train as CONFIG says. On one machine this starts parallel.ranks ranks itself; under torchrun or
deepspeed (`torchrun ... -m longreach.launch.train CONFIG`) it is one of the ranks that they started."""
EXAMPLES = """
  longreach train quickstart
  longreach train quickstart data.source=my-texts train.steps=1000 run.dir=runs/mine
  longreach train quickstart data.seq_len=1048576 parallel.block_len=16384 train.steps=3 optim.warmup_steps=0 \
train.validate_every=0 run.dir=runs/million    # streamed: a million tokens, block by block
  longreach train lm-125m --dry-run --world 64                # plan: nothing is trained
  longreach train quickstart optim.lr=1e-3,4e-3 model.width=64,128    # a sweep: four runs, one after the other
Run the same command again to resume from the newest checkpoint; give another run.dir to start a new run.
Keys: docs/config.md; RUN_DIR/config.yaml (by default runs/CONFIG/config.yaml) has those of a run."""

CONFIGS = Path(__file__).parents[2] / "configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach train``."""
    add_config(parser)
    deepspeed_help = "path of a DeepSpeed JSON config; the same as deepspeed=F"
    parser.add_argument("--deepspeed_config", metavar="F", help=deepspeed_help)
    plan_help = "do not train: predict memory and time of a job of --world ranks, from three steps of one of its ranks "
    plan_help += "on this machine"
    parser.add_argument("--dry-run", action="store_true", help=plan_help)
    add_threads(parser)
    world_help = "with --dry-run: number of ranks (default parallel.ranks)"
    parser.add_argument("--world", type=int, metavar="N", help=world_help)
    node_help = "with --dry-run: number of ranks per node (default 8)"
    parser.add_argument("--per-node", type=int, metavar="N", default=8, help=node_help)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The config that a command trains by, and the values that replace some of it."""
    names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    parser.add_argument("config", metavar="CONFIG", help=f"path of a YAML file, or one of {names}")
    overrides_help = "replaces one value of CONFIG, as in train.steps=1000"
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=overrides_help)


def run(arguments: argparse.Namespace) -> int:
    """Train as a rank of the world that a launcher started; without a launcher, start ``parallel.ranks`` local ranks.

    Returns:
        The exit code.
    """
    launched = is_launched()
    overrides = _overrides(arguments)
    if any("," in word for word in overrides) and (exit_code := _sweep(arguments, overrides)) is not None:
        return exit_code
    if not launched and not arguments.dry_run:
        stop_while_starting()
    from ...framework.config import load, without_secrets

    config = load(arguments.config, overrides)
    try:
        if arguments.dry_run:
            return _print_plan(config, arguments.per_node)
        if not launched and config.parallel.ranks > 1:
            from ..local import fewer_ranks, train_on_local_ranks

            overrides = fewer_ranks(config, overrides)
            if config.parallel.ranks > 1:
                return train_on_local_ranks(config.parallel.ranks, [arguments.config, *overrides])
        # Imported here, so that a mistake in the config is reported before the seconds that this takes.
        from ...framework.trainer import train

        log_on_standard_error()
        with advice_if_out_of_memory(config):
            result = train(config)
        return _finish(config, result)
    except InputError as error:
        raise without_secrets(error, config) from None


def _sweep(arguments: argparse.Namespace, overrides: list[str]) -> int | None:
    """Train every combination of the values that are lists; returns None if none is."""
    from ..sweep import split, sweep

    single, varied = split(overrides)
    if not varied:
        return None
    for option, given in (("a launcher", is_launched()), ("--dry-run", arguments.dry_run)):
        if given:
            (key, values), *_ = varied.items()
            allowed = f"must be one value under {option}: a sweep starts its runs by itself, one after the other"
            raise InputError(key, ",".join(values), allowed)
    return sweep(arguments.config, single, varied)


def is_launched() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def with_world_size(overrides: list[str]) -> list[str]:
    """``key=value`` with the number of ranks that a launcher started."""
    return [*overrides, *([f"parallel.ranks={os.environ['WORLD_SIZE']}"] if is_launched() else [])]


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """The ``key=value`` of the command line, its options and the launcher's environment among them."""
    overrides = list(arguments.overrides)
    if arguments.deepspeed_config:
        overrides.append(f"deepspeed={json.dumps(arguments.deepspeed_config)}")
    if threads := threads_of(arguments):
        overrides.append(f"train.threads={threads}")
    overrides = with_world_size(overrides)
    if arguments.world is not None:
        if not arguments.dry_run:
            raise InputError("--world", arguments.world, "only with --dry-run", "set parallel.ranks instead")
        overrides.append(f"parallel.ranks={arguments.world}")
    return overrides


def _print_plan(config: RunConfig, node_size: int) -> int:
    from ..dry_run import as_text, plan

    print(as_text(plan(config, node_size=node_size, say=partial(print, file=sys.stderr, flush=True))))
    return 0


def is_first_rank() -> bool:
    """Whether this process is the rank that reports."""
    return os.environ.get("RANK", "0") == "0"


def log_on_standard_error() -> None:
    """Log lines of the package in plain text; what all ranks find is logged by the first one alone."""
    from ...framework.monitoring.monitor import configure_logging

    configure_logging(logging.INFO if is_first_rank() else logging.ERROR)


@contextmanager
def advice_if_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Raise `CommandFailed`, which says what to change, in place of an error that says that memory ran out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        raise CommandFailed(_memory_advice(config)) from None


def _memory_advice(config: RunConfig) -> str:
    """What a run that ran out of memory could change."""
    from ...framework.runtime.memory import advice

    parallel = config.parallel
    return (
        f"out of memory: data.seq_len = {config.data.seq_len} on {parallel.num_sequence_ranks} ranks of a sequence, "
        f"parallel.block_len = {parallel.block_len}; {advice(config)}"
    )


def _finish(config: RunConfig, result: Result) -> int:
    """Report the result on the first rank and leave the world; returns the exit code."""
    from ...parallel.mesh import leave_world
    from ..report import report

    if is_first_rank() and result.stopped:
        reason = f"stopped after step {result.step}, {result.stopped}"
        kept = f"a checkpoint of step {result.step} was saved in {result.run_dir / 'checkpoints'}"
        report_error(f"{reason}; {kept}: run the same command again to resume", STOPPED)
    elif is_first_rank():
        report(config, result)
    leave_world()  # only after success: a rank that fails must not wait for the others
    if result.stopped and not is_first_rank():
        time.sleep(GRACE_SECONDS)  # the launcher ends all ranks when one ends with this exit code
    return STOPPED if result.stopped else 0
