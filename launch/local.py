"""Ranks on this machine, started through torchrun's Python interface."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..framework.monitoring.terminal import line_start
from ..framework.runtime.machine import Machine
from .exit_codes import FAILED, INTERRUPTED, Outcome, report_error
from .process import forward_signals, forwarded

if TYPE_CHECKING:
    from ..framework.config import RunConfig

OUT_OF_MEMORY = (
    "for want of memory: a smaller parallel.block_len or train.recompute=true needs less; "
    "longreach train ... --dry-run measures one rank"
)


def train_on_local_ranks(num_ranks: int, arguments: Sequence[str], module: str = "longreach.launch.train") -> int:
    """Run ``longreach train``, or another ``module``, with these arguments as ``num_ranks`` ranks; the exit code."""
    forward_signals()
    with report_rank_errors() as outcome:
        start_ranks(num_ranks, sys.executable, "-m", module, *arguments, signals="SIGHUP,SIGQUIT")
    return outcome.exit_code


def fewer_ranks(config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Overrides for a machine that has fewer cores, or GPUs, than the config's file asks for ranks; says so in a line.

    Losses are the same on any number of ranks. A number on the command line is taken as it is.

    Args:
        config: of the run; gets their number.
        overrides: of the command line.

    Returns:
        The overrides, with those that say the same.
    """
    import torch

    from ..framework.config import validate

    gpus = torch.cuda.device_count()
    there, given = gpus or Machine().num_cores(), {word.partition("=")[0] for word in overrides}
    if config.parallel.ranks <= there or given & {"parallel", "parallel.ranks"}:
        return [*overrides]
    smaller = copy.deepcopy(config)
    sequences = [config.parallel.sequence] if "parallel.sequence" in given else [config.parallel.sequence, 0]
    for ranks, sequence in itertools.product(range(there, 0, -1), sequences):
        smaller.parallel.ranks, smaller.parallel.sequence = ranks, sequence
        with suppress(InputError):
            validate(smaller)
            has = f"this machine has {there} {'GPU' if gpus else 'core'}{'s' if there > 1 else ''}"
            asked = f"parallel.ranks={config.parallel.ranks}"
            line = f"{asked} in the config, but {has}: training on {ranks}, with the same losses"
            print(f"{line} ({asked} on the command line is taken as it is)", file=sys.stderr, flush=True)
            config.parallel = smaller.parallel
            return [*overrides, f"parallel.ranks={ranks}", f"parallel.sequence={sequence}"]
    return [*overrides]


def start_ranks(
    num_ranks: int,
    entry_point: Callable[..., Any] | str,
    *arguments: str,
    signals: str = "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
) -> Any:
    """Start ranks on this machine and wait until all have ended.

    Args:
        num_ranks: how many.
        entry_point: of every rank: a function, or a program.
        arguments: of the function or the program.
        signals: after which the ranks have 30 seconds to end.

    Returns:
        What the function returned, by rank; of a program, None for each rank.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from ..framework.runtime.process import LOCAL_RUN_ID

    logging.disable(logging.ERROR)  # torchrun's log: the ranks report what went wrong
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=LOCAL_RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle=signals,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    return elastic_launch(settings, entry_point)(*arguments)


@contextmanager
def report_rank_errors() -> Iterator[Outcome]:
    """Turn the errors of torchrun's Python interface into an exit code: that of the first rank that ended early.

    Yields:
        the outcome; its exit code is 0 where all ranks ended with 0.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    outcome, oom_kills = Outcome(), Machine().oom_kills()
    try:
        yield outcome
    except ChildFailedError as error:
        print(end=line_start(), file=sys.stderr, flush=True)  # a rank that was killed leaves its progress bar
        rank, failure = error.get_first_failure()
        outcome.exit_code = failure.exitcode
        if failure.exitcode == -signal.SIGINT:
            outcome.exit_code = report_error("interrupted", INTERRUPTED)
        elif failure.exitcode == -signal.SIGKILL and Machine().oom_kills() > oom_kills:
            outcome.exit_code = report_error(f"rank {rank} was ended by the kernel {OUT_OF_MEMORY}", FAILED)
        elif -failure.exitcode in forwarded:
            name = signal.Signals(-failure.exitcode).name
            outcome.exit_code = report_error(f"ended by {name}", 128 - failure.exitcode)
        elif failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            outcome.exit_code = report_error(f"rank {rank} was ended by {name}", FAILED)
    except SignalException as error:
        reason = "interrupted" if error.sigval == signal.SIGINT else f"ended by {error.sigval.name}"
        outcome.exit_code = report_error(reason, 128 + error.sigval)
