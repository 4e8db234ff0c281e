"""How a command line is parsed, and the arguments that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import InputError
from .exit_codes import INPUT_ERROR, report_error

if TYPE_CHECKING:
    import torch


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


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where the model computes; see `device_of`."""
    device_help = "cpu, cuda or cuda:N, where the model computes (default: the GPU, if torch sees one)"
    parser.add_argument("--device", metavar="NAME", help=device_help)


def device_of(arguments: argparse.Namespace) -> torch.device | None:
    """The device of ``--device``; None for the default.

    Raises:
        InputError: there is no such device.
    """
    import torch

    if arguments.device is None:
        return None
    try:
        found = torch.device(arguments.device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        number = torch.cuda.device_count()
        known = ["cpu", *(f"cuda:{index}" for index in range(number))]
        raise InputError("--device", arguments.device, f"one of {', '.join(known)}")
    return found


def add_threads(parser: argparse.ArgumentParser) -> None:
    """How many threads compute on a CPU; see `threads_of`."""
    threads_help = "threads that compute on a CPU (default: by OMP_NUM_THREADS, else by the cores and the work)"
    parser.add_argument("--threads", type=int, metavar="N", help=threads_help)


def threads_of(arguments: argparse.Namespace) -> int:
    """The number of ``--threads``; 0 for the default.

    Raises:
        InputError: it is below 1.
    """
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError("--threads", arguments.threads, "at least 1")
    return arguments.threads or 0


def add_source(parser: argparse.ArgumentParser) -> None:
    """The documents that a command reads, and which of them; see `check_source`."""
    source_help = "file or folder of text, JSONL, CSV, Parquet, FASTA, .npy arrays of token ids or tar shards; "
    source_help += "cpython: Python's own library"
    parser.add_argument("source", metavar="SOURCE", help=source_help)
    fraction_help = "fraction of the documents to hold out for validation (default 0.05)"
    parser.add_argument("--valid-fraction", type=float, default=0.05, help=fraction_help)
    field_help = "key of each JSONL line, or column of a CSV or Parquet file, with the text or the messages of a chat; "
    field_help += "nested keys are joined by dots (default text)"
    parser.add_argument("--field", default="text", metavar="NAME", help=field_help)
    bad_help = "skip up to N documents and files that cannot be read (default 0)"
    parser.add_argument("--max-bad", type=int, metavar="N", default=0, help=bad_help)
    binary_help = "files whose content is no text: skip and count them, read their bytes, or end with an error "
    binary_help += "(default skip; a single file is never skipped)"
    parser.add_argument("--binary", choices=("skip", "bytes", "error"), default="skip", help=binary_help)


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


def check_reports(arguments: argparse.Namespace) -> None:
    """Raise `InputError` unless the files of ``--json`` and ``--figure`` can be made."""
    for option in ("json", "figure"):
        check_output_file(f"--{option}", getattr(arguments, option))
    if arguments.figure and Path(arguments.figure).suffix != ".png":
        raise InputError("--figure", arguments.figure, "a name that ends in .png")


@contextmanager
def writing_reports() -> Iterator[None]:
    """Turn an `OSError` of a file of ``--json`` or ``--figure`` into an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError("--json or --figure", error.filename, f"cannot be written: {error.strerror}") from None
