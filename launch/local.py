"""Ranks on this machine, started through torchrun's Python interface."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .exit_codes import FAILED, INTERRUPTED, Outcome, report_error
from .process import forward_signal


def train_on_local_ranks(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run ``longreach train`` with these arguments as ``num_ranks`` ranks; returns the exit code."""
    signal.signal(signal.SIGINT, forward_signal)  # the ranks save a checkpoint
    with report_rank_errors() as outcome:
        signals = "SIGTERM,SIGHUP,SIGQUIT"
        start_ranks(num_ranks, sys.executable, "-m", "longreach.launch.train", *arguments, signals=signals)
    return outcome.exit_code


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

    logging.disable(logging.ERROR)  # torchrun's log: the ranks report what went wrong
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id="longreach",
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

    outcome = Outcome()
    try:
        yield outcome
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        outcome.exit_code = failure.exitcode
        if failure.exitcode == -signal.SIGINT:
            outcome.exit_code = report_error("interrupted", INTERRUPTED)
        elif failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            outcome.exit_code = report_error(f"rank {rank} was ended by {name}", FAILED)
    except SignalException as error:
        reason = "interrupted" if error.sigval == signal.SIGINT else f"ended by {error.sigval.name}"
        outcome.exit_code = report_error(reason, 128 + error.sigval)
