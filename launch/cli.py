"""The command line: ``longreach COMMAND ...``. Each command is a module in `launch.commands`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from .. import __version__
from .arguments import Parser, parse
from .commands import (
    bench,
    completion,
    distill,
    doctor,
    embed,
    evaluate,
    export,
    generate,
    lr,
    pack,
    predict,
    runs,
    tokenizer,
    train,
    verify,
)
from .exit_codes import BROKEN_PIPE, INTERRUPTED, report_error, report_errors
from .process import exit_process, prepare_libraries, unblock_signals


class Command(Protocol):
    """What a module of `launch.commands` has.

    Attributes:
        SUMMARY: one line for the list of commands.
        DESCRIPTION: what ``longreach COMMAND --help`` shows above the options.
        EXAMPLES: what it shows below them.
    """

    SUMMARY: str
    DESCRIPTION: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command; returns the exit code."""


COMMANDS: dict[str, Command] = {
    "train": train,
    "lr": lr,
    "runs": runs,
    "verify": verify,
    "evaluate": evaluate,
    "generate": generate,
    "predict": predict,
    "embed": embed,
    "pack": pack,
    "tokenizer": tokenizer,
    "export": export,
    "distill": distill,
    "bench": bench,
    "doctor": doctor,
    "completion": completion,
}


def build_parser() -> Parser:
    """The parser of the whole command line.

    What it parses has ``command``, the function to run, ``parser``, that of the command, and ``whole_parser``.
    """
    description = "Train models on very long sequences, one sequence split over many ranks."
    parser = Parser(prog="longreach", description=description)
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(whole_parser=parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=f"examples:{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(command=command.run, parser=subparser)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = parse(build_parser(), words)
    prepare_libraries()
    try:
        with report_errors() as outcome:
            outcome.exit_code = arguments.command(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards what is still in the buffer
        return BROKEN_PIPE
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # after ^C, a progress bar or half a line of text
        return report_error("interrupted", INTERRUPTED)
    return outcome.exit_code


def program() -> NoReturn:
    """The program `longreach`."""
    unblock_signals()
    exit_process(main())
