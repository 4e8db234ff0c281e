"""`longreach predict`: classes, numbers or forecasts for new data, as a table."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ...errors import InputError
from ..arguments import add_device, add_model_directory, add_threads, check_output_file, device_of, threads_of
from ..exit_codes import INPUT_ERROR, report_error

if TYPE_CHECKING:
    from ...framework.inference.inputs import Input
    from ...framework.inference.predict import Predictor

SUMMARY = "predict classes, numbers or forecasts for new data"
DESCRIPTION = """Predict for new data with the newest model of a run, or with an exported model: the class of pictures,
time series and texts with its probability, numbers in their own unit, the next values of a time series. New data have
the form of the training data, without labels: pictures, CSV or .ts files, texts, or folders of them. The training data
are not needed."""
EXAMPLES = """
  longreach predict runs/digits --source scans --out scans.csv      # a folder of pictures
  longreach predict runs/prices --source prices.csv                 # forecasts, printed as CSV
  longreach predict exported --source new.ts --top 3 --out new.jsonl
The table has a line for each input, for forecasts one for each future step. Inputs that cannot be read are named and
skipped; then the exit code is 2."""

FORMATS = (".csv", ".jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach predict``."""
    add_model_directory(parser)
    source_help = "files and folders of new data"
    parser.add_argument("--source", metavar="PATH", nargs="+", required=True, help=source_help)
    out_help = "write the table as CSV or JSON lines, by the ending of the name: .csv or .jsonl (default: print CSV)"
    parser.add_argument("--out", metavar="FILE", help=out_help)
    top_help = "of classes: the K most probable ones; 0, the default: the probability of each class"
    parser.add_argument("--top", type=int, metavar="K", default=0, help=top_help)
    batch_help = "number of inputs computed at a time (default 32)"
    parser.add_argument("--batch-size", type=int, metavar="N", default=32, help=batch_help)
    block_help = "read long inputs in blocks of N tokens, in bounded memory; causal models only, which by default read "
    block_help += "blocks of 8192 tokens"
    parser.add_argument("--block-len", type=int, metavar="N", default=0, help=block_help)
    add_device(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the table of predictions; returns the exit code."""
    check_output_file("--out", arguments.out)
    if arguments.out and Path(arguments.out).suffix not in FORMATS:
        raise InputError("--out", arguments.out, f"a name that ends in {' or '.join(FORMATS)}")
    for option, least in (("batch_size", 1), ("block_len", 0), ("top", 0)):
        if getattr(arguments, option) < least:
            raise InputError(f"--{option.replace('_', '-')}", getattr(arguments, option), f"at least {least}")
    threads = threads_of(arguments)
    from ...framework.inference.loading import open_predictor
    from ...framework.runtime.process import set_num_threads

    set_num_threads(threads)
    predictor = open_predictor(
        arguments.run_dir,
        device_of(arguments),
        batch_size=arguments.batch_size,
        block_len=arguments.block_len,
        top=arguments.top,
    )
    skipped: list[str] = []
    count = 0
    with _table(arguments.out) as write:
        for answers in predictor.predict(_inputs(predictor, arguments.source, skipped)):
            count += 1
            for answer in answers:
                write(answer)
        if not count:
            fix = f"for example {skipped[0]}" if skipped else ""
            raise InputError("--source", " ".join(arguments.source), "has no input that can be read", fix)
    if arguments.out:
        print(f"{count:,} input{'s' * (count != 1)}: {arguments.out}")
    if skipped:
        sys.stdout.flush()
        return report_error(f"{len(skipped):,} of {count + len(skipped):,} inputs were skipped", INPUT_ERROR)
    return 0


def _inputs(predictor: Predictor, sources: list[str], skipped: list[str]) -> Iterator[Input]:
    """The inputs that can be read; the others are named on standard error, and in ``skipped``."""
    for row in predictor.rows(sources):
        try:
            found = predictor.input_of(row.read(), row.name)
        except InputError as error:
            skipped.append(row.name)
            print(f"longreach: skipped {row.name}: {error}", file=sys.stderr, flush=True)
        else:
            yield found


@contextmanager
def _table(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes a line of the table: to standard output, or to a file, which is there once all is written.

    Raises:
        InputError: the file cannot be written.
    """
    if path is None:
        yield _writer(sys.stdout, is_csv=True)
        return
    file = Path(path)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", newline="", encoding="utf-8") as stream:
            yield _writer(stream, is_csv=file.suffix == ".csv")
        os.replace(partial, file)
    except OSError as error:
        raise InputError("--out", path, f"cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _writer(stream: IO[str], is_csv: bool) -> Callable[[dict[str, Any]], None]:
    """A function that writes answers as lines of CSV, the first below their names, or of JSON."""
    if not is_csv:
        return lambda answer: print(json.dumps(answer, ensure_ascii=False), file=stream)
    lines = csv.writer(stream, lineterminator="\n")
    begun: list[bool] = []

    def write(answer: dict[str, Any]) -> None:
        if not begun:
            begun.append(True)
            lines.writerow(answer)
        lines.writerow(answer.values())

    return write
