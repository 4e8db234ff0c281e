"""`longreach evaluate`: score a trained model on held-out documents, on files, or by the test of a task."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from ..arguments import (
    add_device,
    add_model_directory,
    add_threads,
    check_reports,
    device_of,
    threads_of,
    writing_reports,
)

if TYPE_CHECKING:
    from ...framework.inference.evaluate import Evaluation
    from ...framework.tasks import Score, Task

SUMMARY = "score a model: bits per byte of held-out documents or other files; a task by its test set"
DESCRIPTION = """Score the newest model of a run on the documents that were held out from it, or on other files
(--source). A run of a task (docs/tasks.md) is scored on the test set of the task: then only --json, key=value and, for
recall and needle, --figure may be given."""
EXAMPLES = """
  longreach evaluate runs/quickstart
  longreach evaluate runs/quickstart --source book.txt    # a file of any length as one sequence
  longreach evaluate runs/quickstart --by-document --min-tokens 65536 --contexts 1024,8192,65536
  longreach evaluate runs/needle data.seq_len=65536 parallel.block_len=16384    # a task's test, at another length"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach evaluate``."""
    add_model_directory(parser)
    source_help = "score these files and folders instead; each document that `pack` finds in them is one sequence"
    parser.add_argument("--source", metavar="PATH", nargs="+", default=[], help=source_help)
    document_help = "print one line per document; each held-out document is then one sequence too, from an empty state"
    parser.add_argument("--by-document", action="store_true", help=document_help)
    shortest_help = "leave out documents of fewer tokens; with --source or --by-document"
    parser.add_argument("--min-tokens", metavar="N", type=int, default=0, help=shortest_help)
    contexts_help = "score again with the state reset every N tokens, for each N: where the figures fall, more context "
    contexts_help += "helps"
    parser.add_argument("--contexts", metavar="N,N", default="", help=contexts_help)
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON; also for a task")
    figure_help = "plot bits per byte by position, and by context; of recall and needle, the accuracy by distance"
    parser.add_argument("--figure", metavar="FILE.png", help=figure_help)
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
    from ...framework.inference.evaluate import evaluate, evaluate_task, has_distances, has_test, plot, write_json
    from ...framework.runtime.process import set_num_threads

    set_num_threads(threads)
    device = device_of(arguments)
    if has_test(arguments.run_dir):
        words = (arguments.source, arguments.by_document, arguments.min_tokens, contexts, arguments.batches)
        if any(words) or (arguments.figure and not has_distances(arguments.run_dir)):
            allowed = "is of a task: only --json, key=value and, for recall and needle, --figure may be given"
            raise InputError("RUN_DIR", arguments.run_dir, allowed)
        task, score = evaluate_task(arguments.run_dir, arguments.overrides, device)
        if score is None:
            raise InputError("data", task.title, "an example to be scored")
        _print_task(task, score)
        with writing_reports():
            _write_task(task, score, arguments)
        return 0
    found = evaluate(
        arguments.run_dir,
        arguments.source,
        overrides=arguments.overrides,
        by_document=arguments.by_document,
        min_tokens=arguments.min_tokens,
        max_batches=arguments.batches,
        contexts=contexts,
        device=device,
    )
    _print_tables(found, arguments.by_document)
    for line in told(found.counts):
        print(line)
    with writing_reports():
        if arguments.json:
            write_json(found, Path(arguments.json))
        if arguments.figure:
            plot(found, Path(arguments.figure), arguments.run_dir)
    return 0


def _check(arguments: argparse.Namespace) -> list[int]:
    """Raise `InputError` for a mistake in the arguments; returns the numbers of ``--contexts``."""
    if arguments.batches < 0:
        raise InputError("--batches", arguments.batches, "at least 0")
    if arguments.batches and (arguments.source or arguments.by_document):
        raise InputError("--batches", arguments.batches, "for the windows that training validates with", "leave it out")
    if arguments.min_tokens < 0:
        raise InputError("--min-tokens", arguments.min_tokens, "at least 0")
    if arguments.min_tokens and not (arguments.source or arguments.by_document):
        raise InputError("--min-tokens", arguments.min_tokens, "for documents", "give --by-document or --source too")
    contexts = _contexts(arguments.contexts)
    check_reports(arguments)
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


def _print_task(task: Task, found: Score) -> None:
    """Print the score of a task's test, and by distance where the task has distances."""
    print(f"{task.title}: {found.num_labels:,} answers, loss {found.loss:.4f}")
    for name, value in found.metrics.items():
        print(f"{name:>12}{value:10.4f}   (baseline: {task.baseline_metrics[name]:.4f})")
    if found.by_distance:
        print(f"from distance{'answers':>12}{'loss':>10}{''.join(f'{name:>12}' for name in found.metrics)}")
        for one in found.by_distance:
            values = "".join(f"{value:12.4f}" for value in one.metrics.values())
            print(f"{one.first:13,}{one.num_labels:12,}{one.loss:10.4f}{values}")


def _write_task(task: Task, found: Score, arguments: argparse.Namespace) -> None:
    """Write ``--json`` and ``--figure``."""
    from ...framework.inference.evaluate import plot_distances

    if arguments.json:
        tree = {**asdict(found), "chance": task.baseline_metrics}
        Path(arguments.json).write_text(json.dumps(tree, indent=2) + "\n")
    if arguments.figure:
        plot_distances(found.by_distance, Path(arguments.figure), f"{task.title}: {arguments.run_dir}")
