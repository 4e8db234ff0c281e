"""How a command line is parsed, and the arguments that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import InputError
from .exit_codes import INPUT_ERROR, report_error


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(report_error(f"{message}; see {self.prog} --help", INPUT_ERROR))


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; None for that of the process.

    ``key=value`` is also accepted after an option, where argparse does not return to a list of positional arguments.
    """
    arguments, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if word.startswith("-") or "overrides" not in arguments]
    if unknown:
        hint = " (settings are key=value, as in train.steps=3)" if "overrides" in arguments else ""
        command: argparse.ArgumentParser = getattr(arguments, "parser", parser)
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def add_model_directory(parser: argparse.ArgumentParser) -> None:
    """The model that a command loads."""
    run_dir_help = "directory of a run, such as runs/quickstart, or of an exported model"
    parser.add_argument("run_dir", metavar="RUN_DIR", help=run_dir_help)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The documents that a command reads, and which of them; see `check_source`."""
    source_help = "file or folder of text, JSONL, FASTA, .npy arrays of token ids or tar shards; cpython: Python's own "
    source_help += "library"
    parser.add_argument("source", metavar="SOURCE", help=source_help)
    fraction_help = "fraction of the documents to hold out for validation (default 0.05)"
    parser.add_argument("--valid-fraction", type=float, default=0.05, help=fraction_help)
    field_help = "key of each JSONL line whose value is the text (default text)"
    parser.add_argument("--field", default="text", metavar="NAME", help=field_help)
    bad_help = "skip up to N documents that cannot be read (default 0)"
    parser.add_argument("--max-bad", type=int, metavar="N", default=0, help=bad_help)


def check_source(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for values of `add_source` that are out of range."""
    if not 0 <= arguments.valid_fraction < 1:
        raise InputError("--valid-fraction", arguments.valid_fraction, "from 0 to less than 1")
    if arguments.max_bad < 0:
        raise InputError("--max-bad", arguments.max_bad, "at least 0")


def check_output_file(option: str, path: str | None) -> None:
    """Raise `InputError` unless a file can be made at ``path``, which an option gave; None is no file."""
    if path is not None:
        file = Path(path)
        if (file.exists() and not file.is_file()) or not file.parent.is_dir():
            raise InputError(option, path, "a file in a directory that exists")
