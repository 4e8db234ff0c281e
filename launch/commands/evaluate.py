"""`longreach evaluate`: score a trained model on held-out documents, on files, or by the test of a task."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from ..arguments import add_device, add_model_directory, add_threads, check_output_file, device_of, threads_of

if TYPE_CHECKING:
    from ...framework.inference.evaluate import Evaluation
    from ...framework.tasks import Score, Task

SUMMARY = "score a model: bits per byte of held-out documents or other files; a task by its test set"
DESCRIPTION = """Score the newest model of a run on the documents that were held out from it, or on other files
(--source). A run of a task (docs/tasks.md) is scored on the test set of the task: then only --json and key=value
may be given."""
EXAMPLES = """
  longreach evaluate runs/quickstart
  longreach evaluate runs/quickstart --source book.txt    # a file of any length as one sequence
  longreach evaluate runs/needle data.seq_len=65536 parallel.block_len=16384    # a task's test, at another length"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach evaluate``."""
    add_model_directory(parser)
    source_help = "score these files and folders instead; each document that `pack` finds in them is one sequence"
    parser.add_argument("--source", metavar="PATH", nargs="+", default=[], help=source_help)
    document_help = "print one line per document; each held-out document is then one sequence too, from an empty state"
    parser.add_argument("--by-document", action="store_true", help=document_help)
    contexts_help = "score again with the state reset every N tokens, for each N: where the figures fall, more context "
    contexts_help += "helps"
    parser.add_argument("--contexts", metavar="N,N", default="", help=contexts_help)
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON; also for a task")
    parser.add_argument("--figure", metavar="FILE.png", help="plot bits per byte by position, and by context")
    batches_help = "number of held-out batches to score; 0, the default, scores all"
    parser.add_argument("--batches", type=int, default=0, help=batches_help)
    add_device(parser)
    add_threads(parser)
    overrides_help = "replaces one value of the run's config, as in data.seq_len=1048576"
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=overrides_help)


def run(arguments: argparse.Namespace) -> int:
    """Print the scores of a run or an export; returns the exit code."""
    contexts, threads = _check(arguments), threads_of(arguments)
    from ...framework.data.tally import told
    from ...framework.inference.evaluate import evaluate, evaluate_task, has_test, plot, write_json
    from ...framework.runtime.process import set_num_threads

    set_num_threads(threads)
    device = device_of(arguments)
    if has_test(arguments.run_dir):
        if arguments.source or arguments.by_document or contexts or arguments.batches or arguments.figure:
            allowed = "is of a task: only --json and key=value say how it is scored"
            raise InputError("RUN_DIR", arguments.run_dir, allowed)
        return _print_task(*evaluate_task(arguments.run_dir, arguments.overrides, device), arguments.json)
    found = evaluate(
        arguments.run_dir,
        arguments.source,
        overrides=arguments.overrides,
        by_document=arguments.by_document,
        max_batches=arguments.batches,
        contexts=contexts,
        device=device,
    )
    _print_tables(found, arguments.by_document)
    for line in told(found.counts):
        print(line)
    try:
        if arguments.json:
            write_json(found, Path(arguments.json))
        if arguments.figure:
            plot(found, Path(arguments.figure), arguments.run_dir)
    except OSError as error:
        raise InputError("--json or --figure", error.filename, f"cannot be written: {error.strerror}") from None
    return 0


def _check(arguments: argparse.Namespace) -> list[int]:
    """Raise `InputError` for a mistake in the arguments; returns the numbers of ``--contexts``."""
    if arguments.batches < 0:
        raise InputError("--batches", arguments.batches, "at least 0")
    if arguments.batches and (arguments.source or arguments.by_document):
        raise InputError("--batches", arguments.batches, "for the windows that training validates with", "leave it out")
    contexts = _contexts(arguments.contexts)
    for option in ("json", "figure"):
        check_output_file(f"--{option}", getattr(arguments, option))
    if arguments.figure and Path(arguments.figure).suffix != ".png":
        raise InputError("--figure", arguments.figure, "a name that ends in .png")
    return contexts


def _contexts(text: str) -> list[int]:
    """The numbers of ``--contexts``."""
    try:
        found = [int(word) for word in text.split(",") if word]
    except ValueError:
        found = [0]
    if any(number < 1 for number in found):
        raise InputError("--contexts", text, "numbers of tokens, at least 1", "for example 256,1024,4096")
    return found


def _print_tables(found: Evaluation, by_document: bool) -> None:
    """Print the scores of everything, by position, by context, and by document."""
    whole = found.score.whole
    print(
        f"{whole.num_tokens:,} tokens: {whole.loss:.4f} nats, {whole.bits_per_byte:.4f} bits per {found.unit}, "
        f"perplexity {whole.perplexity:.3f}"
    )
    print(f"from position{f'bits per {found.unit}':>16}   standard error       tokens")
    for one in found.score.by_position:
        error = "-" if math.isnan(one.error) else f"{found.bits(one.error):.4f}"  # of a single sequence there is none
        print(f"{one.first:13,}{found.bits(one.loss):16.4f}{error:>17}{one.num_tokens:13,}")
    if found.by_context:
        print(f"{'state reset every':>20}{f'bits per {found.unit}':>16}")
        for context, figure in found.by_context:
            print(f"{context:13,} tokens{figure.bits_per_byte:16.4f}")
        print(f"{'never':>20}{whole.bits_per_byte:16.4f}")
    if by_document:
        print(f"       tokens      nats{f'bits per {found.unit}':>16}   perplexity   document")
        for name, figure in found.score.documents:
            cells = f"{figure.loss:10.4f}{figure.bits_per_byte:16.4f}{figure.perplexity:13.3f}"
            print(f"{figure.num_tokens:13,}{cells}   {name if name.isprintable() else ascii(name)}")


def _print_task(task: Task, found: Score | None, json_file: str | None) -> int:
    if found is None:
        raise InputError("data", task.title, "an example to be scored")
    print(f"{task.title}: {found.num_labels:,} answers, loss {found.loss:.4f}")
    for name, value in found.metrics.items():
        print(f"{name:>12}{value:10.4f}   (baseline: {task.baseline_metrics[name]:.4f})")
    if json_file:
        Path(json_file).write_text(json.dumps({**asdict(found), "chance": task.baseline_metrics}, indent=2) + "\n")
    return 0
