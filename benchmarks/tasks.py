"""Trains the tasks of ``configs/`` with each mixer, and keeps what their tests found: the table of docs/results.md.

    python benchmarks/tasks.py                       # all of them; about an hour on two cores
    python benchmarks/tasks.py digits adding         # these
    python benchmarks/tasks.py --table               # print the table of what was found so far

Every run is ``longreach train CONFIG`` with the words that the table names and a seed; its ``result.json`` is the
figure. Nothing is chosen by the test: the steps are the config's, and the last model is scored, once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from longreach.launch.bench import cpu_only, environment, last_line

RESULTS = Path(__file__).parent / "results" / "tasks.json"
EA6, EA2 = "elementwise, order 6", "elementwise, order 2"
MIXERS = {
    EA6: ["model.mixers=[elementwise]"],
    EA2: ["model.mixers=[elementwise]", "model.elementwise.order=2"],
    "chela": ["model.mixers=[chela]"],
    "feedforward_kernel": ["model.mixers=[feedforward_kernel]"],
    "softmax": ["model.mixers=[softmax]"],
}
MOST = [EA6, "chela", "feedforward_kernel", "softmax"]
# For a CPU.
LISTOPS = ["data.batch_size=8", "model.width=64", "model.depth=2", "train.steps=1500"]
LISTOPS_256 = ["data.seq_len=256", "data.batch_size=16", "model.width=64", "model.depth=2", "train.steps=500"]
# By config, and what tells two runs of one apart: which mixers, how many seeds, and words that make it smaller.
RUNS: dict[str, tuple[list[str], int, list[str]]] = {
    "japanese-vowels": ([*MIXERS], 5, []),
    "digits": (MOST, 3, []),
    "forecast": (MOST, 3, []),
    "adding": ([EA6, "softmax"], 1, []),
    "needle": (["chela", EA6], 1, []),
    "recall": (["chela", "softmax"], 1, []),
    "retrieval": (["chela", "feedforward_kernel"], 1, []),
    "listops": (["chela", "softmax", EA6], 1, LISTOPS),
    "listops 256": (["chela", "softmax"], 1, LISTOPS_256),
}
# What papers report for the very same data: (config, mixer) -> metric. arXiv 2501.05730, table of UEA archives.
PAPERS = {("japanese-vowels", EA6): 0.973, ("japanese-vowels", EA2): 0.957, ("japanese-vowels", "softmax"): 0.970}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", default=[*RUNS], help=f"of {', '.join(RUNS)}")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if not arguments.table:
        with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
            cases = [(name, mixer) for name in arguments.names for mixer in RUNS[name][0]]
            found = pool.map(lambda case: _row(*case, Path(directory)), cases)
            for key, row in zip(map(" / ".join, cases), found, strict=True):
                rows[key] = row
                print(f"{key}: {_figures(row)}", file=sys.stderr, flush=True)
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return 0


def table(rows: dict[str, Any]) -> str:
    """Results as a Markdown table."""
    lines = [
        "| `longreach train` | mixer | parameters | steps | seeds | ours | simplest answer | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        cells = [
            f"`{' '.join([row['config'], *row['words']])}`",
            row["mixer"],
            f"{row['num_parameters']:,}",
            row["steps"],
            len(row["results"]),
            _figures(row),
            _named(row["chance"]),
            f"{PAPERS[case]:.3f}" if (case := (row["config"], row["mixer"])) in PAPERS else "",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _row(name: str, mixer: str, directory: Path) -> dict[str, Any]:
    config, (_, seeds, words) = name.partition(" ")[0], RUNS[name]
    results = [_train(config, [*words, *MIXERS[mixer], f"run.seed={seed}"], directory) for seed in range(seeds)]
    return {
        "config": config,
        "mixer": mixer,
        "words": words,
        "num_parameters": results[0]["num_parameters"],
        "steps": results[0]["step"],
        "chance": results[0]["chance"],
        "results": [result["metrics"] for result in results],
        "environment": environment("cpu", 1),
    }


def longreach(*words: str, run: Path | None = None) -> None:
    """``longreach WORDS...`` on one thread of a processor; a training into the directory ``run``, with no more than it
    needs there.
    """
    quiet = ["train.threads=1", "monitor.tensorboard=false", "monitor.plot=false", "checkpoint.every=0"]
    command = [sys.executable, "-m", "longreach", *words, *([*quiet, f"run.dir={run}"] if run else [])]
    with tempfile.NamedTemporaryFile("w") as log:
        if subprocess.run(command, stdout=log, stderr=log, env=cpu_only(OMP_NUM_THREADS="1")).returncode:
            sys.exit(f"{' '.join(command)}: {last_line(Path(log.name))}")


def _train(config: str, words: list[str], directory: Path) -> dict[str, Any]:
    run = Path(tempfile.mkdtemp(dir=directory))
    longreach("train", config, *words, run=run)
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def _figures(row: dict[str, Any]) -> str:
    """Each metric's mean over the seeds, and their standard deviation."""
    texts = []
    for name in row["results"][0]:
        values = [result[name] for result in row["results"]]
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        texts.append(f"{name} {mean(values):.3f}{spread}")
    return ", ".join(texts)


def _named(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
