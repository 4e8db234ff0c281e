"""`longreach lr`: find a learning rate by a range test."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from .train import (
    add_config,
    advice_if_out_of_memory,
    is_first_rank,
    is_launched,
    log_on_standard_error,
    with_world_size,
)

if TYPE_CHECKING:
    from ...framework.runtime.lr_range import RangeTest

SUMMARY = "find a learning rate: a short training in which it grows"
DESCRIPTION = """Train a few steps as CONFIG says, with a rate that grows exponentially from --from to --to, until the
loss diverges (the range test of Smith 2017, arXiv 1506.01186). A tenth of the rate at which the loss is lowest is
suggested. The run directory is that of CONFIG with -lr at its end; lr.json there has every step, plots/lr.png the
curve."""
EXAMPLES = """
  longreach lr quickstart
  longreach lr quickstart --from 1e-5 --to 10 --steps 200 model.width=256
Ranks are those of `longreach train`; with a launcher: torchrun ... -m longreach lr CONFIG"""

ROWS = 12  # of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach lr``."""
    add_config(parser)
    parser.add_argument("--from", dest="low", type=float, metavar="LR", default=1e-6, help="the first rate (1e-6)")
    parser.add_argument("--to", dest="high", type=float, metavar="LR", default=1.0, help="the last rate (1)")
    parser.add_argument("--steps", type=int, metavar="N", default=100, help="number of steps (100)")


def run(arguments: argparse.Namespace) -> int:
    """Run the test as a rank, or start ``parallel.ranks`` local ranks; returns the exit code."""
    from ...framework.config import load, without_secrets

    overrides = with_world_size(arguments.overrides)
    config = load(arguments.config, overrides)
    try:
        if not is_launched() and config.parallel.ranks > 1:
            from ..local import fewer_ranks, train_on_local_ranks

            overrides = fewer_ranks(config, overrides)
            options = ["--from", repr(arguments.low), "--to", repr(arguments.high), "--steps", str(arguments.steps)]
            words = ["lr", arguments.config, *overrides, *options]
            if config.parallel.ranks > 1:
                return train_on_local_ranks(config.parallel.ranks, words, module="longreach")
        from ...framework.runtime.lr_range import range_test
        from ...parallel.mesh import leave_world

        log_on_standard_error()
        with advice_if_out_of_memory(config):
            found = range_test(config, arguments.low, arguments.high, arguments.steps)
        if is_first_rank():
            _print(found, Path(config.run.dir))
        leave_world()
        return 0
    except InputError as error:
        raise without_secrets(error, config) from None


def _print(found: RangeTest, directory: Path) -> None:
    print(f"{'learning rate':>14} {'loss':>10}")
    count = len(found.rates)
    lowest = found.rates.index(found.lowest)
    shown = sorted({lowest, *(round(row * (count - 1) / (ROWS - 1)) for row in range(ROWS))})
    for at in shown:
        mark = "  lowest" if at == lowest else ""
        print(f"{found.rates[at]:14.2e} {found.losses[at]:10.4f}{mark}")
    for line in filter(None, (found.ended, found.note)):
        print(line)
    print(f"all steps: {directory / 'lr.json'}; curve: {directory / 'plots' / 'lr.png'}")
    print(f"suggested: optim.lr={found.suggested:.2g}")
