"""`longreach verify`: check that a config's model trains the same on several ranks, and streamed, as on one rank."""

from __future__ import annotations

import argparse

from ...errors import InputError
from ..exit_codes import FAILED, report_error
from .train import add_config

SUMMARY = "check that a model trains the same however its sequences are split"
DESCRIPTION = """Train the model of CONFIG for two steps on 1, 2, ... ranks, with each sequence whole and streamed,
of one document and of several. Print how much the loss and the gradients differ from those of one rank
that processes each sequence in one pass: in fp64, where only rounding differs, and in train.precision.

It computes on this machine's processor, on sequences of random tokens (of a task: its own examples), and
writes nothing. It ends with exit code 1 if a difference is larger than its limit: 1e-10 in fp64, else 1e-5
or, where that is more, 4 times the difference from fp64 of the same computation on one rank.
Each rank holds the whole model in fp64; --depth and --width make it smaller."""
EXAMPLES = """
  longreach verify quickstart
  longreach verify my.yaml                              # with mixers of your own, from model.code
  longreach verify lm-125m --depth 2 --width 192 --ranks 2    # a smaller model of the same kind"""
RANKS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach verify``."""
    add_config(parser)
    ranks_help = f"compare 1 to N ranks (default {RANKS})"
    parser.add_argument("--ranks", type=int, metavar="N", default=RANKS, help=ranks_help)
    tokens_help = "tokens of a sequence (default 101 random tokens, or data.seq_len of a task)"
    parser.add_argument("--tokens", type=int, metavar="N", help=tokens_help)
    parser.add_argument("--depth", type=int, metavar="N", help="the same as model.depth=N: fewer layers")
    parser.add_argument("--width", type=int, metavar="N", help="the same as model.width=N: fewer channels")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print a table; returns the exit code."""
    from ...framework.config import load, without_secrets

    for name in ("ranks", "tokens"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise InputError(f"--{name}", number, "at least 1")
    sizes = {"model.depth": arguments.depth, "model.width": arguments.width}
    overrides = [f"{key}={number}" for key, number in sizes.items() if number is not None]
    config = load(arguments.config, [*arguments.overrides, *overrides])
    from ..verify import TOKENS, Row, as_line, limit_lines, table_head, verify

    if arguments.tokens or config.task.name == "language":
        config.data.seq_len = arguments.tokens or min(TOKENS, config.data.seq_len)
    found: list[Row] = []

    def show(row: Row) -> None:
        if not found:
            print(table_head(config))
        found.append(row)
        print(as_line(row, config), flush=True)

    try:
        rows = verify(config, arguments.ranks, show)
    except InputError as error:
        raise without_secrets(error, config) from None
    print(*limit_lines(rows, config), sep="\n")
    wrong = [row for row in rows if not row.good]
    if wrong:
        first = wrong[0]
        what = f"{first.worst} differs by {first.errors[first.worst]:.1e} (limit {first.limits[first.worst]:.0e})"
        advice = "longreach.testing.check_mixer finds the cause in a mixer"
        return report_error(f"{len(wrong)} of {len(rows)} rows are beyond the limit; {first}: {what}; {advice}", FAILED)
    print("all are within their limits")
    return 0
