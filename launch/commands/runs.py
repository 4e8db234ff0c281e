"""`longreach runs`: the runs below a directory, and how each is doing."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from ...errors import InputError

SUMMARY = "list the runs below a directory: step, loss, speed, state and why"
DESCRIPTION = """List the runs below DIR, a line each: those that run, those that failed or whose process is gone, those
that were stopped, and those that are finished; the latest change first. Nothing but files is read: a process that is
gone is noticed on the host on which it ran, elsewhere only that there is no news."""
EXAMPLES = """
  longreach runs
  longreach runs /shared/runs --watch 10
  longreach runs /shared/runs --json > runs.jsonl    # a line of JSON for each run, for scripts"""

CLEAR = "\x1b[H\x1b[2J\x1b[3J"  # of a terminal
NARROWEST, PIPED = 80, 120  # columns: the fewest that a table takes, and those where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach runs``."""
    directory_help = "a directory with runs somewhere below it, or a run (default runs)"
    parser.add_argument("directory", metavar="DIR", nargs="?", default="runs", help=directory_help)
    parser.add_argument("--json", action="store_true", help="print each run as one line of JSON")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="list them again every so many seconds")


def run(arguments: argparse.Namespace) -> int:
    """List the runs, once or until Ctrl-C; returns the exit code."""
    directory = Path(arguments.directory)
    if not directory.is_dir():
        raise InputError("DIR", arguments.directory, "must be a directory", "give the one above your runs")
    if arguments.watch is not None and not 0 < arguments.watch < 1e6:
        raise InputError("--watch", arguments.watch, "a number of seconds above 0")
    while True:
        _list(directory, arguments.json, arguments.watch is not None)
        if arguments.watch is None:
            return 0
        time.sleep(arguments.watch)


def _list(directory: Path, as_json: bool, is_watched: bool) -> None:
    from ..runs import find_runs, table

    found = find_runs(directory)
    if as_json:
        lines = [json.dumps(run.as_row()) for run in found]
    else:
        on_terminal = sys.stdout.isatty()
        columns, rows = shutil.get_terminal_size((PIPED, 0))
        lines = table(found, max(NARROWEST, columns)) or [f"no runs below {directory}"]
        if is_watched and on_terminal:
            print(end=CLEAR)
            if rows and len(lines) > rows - 1:
                lines = [*lines[: max(1, rows - 2)], f"... and {len(lines) - max(1, rows - 2)} more"]
    print("\n".join(lines) + "\n" * bool(lines), end="", flush=True)
