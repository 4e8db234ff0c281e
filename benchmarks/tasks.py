"""Trains the tasks of ``configs/`` with each mixer, and a small language model; keeps what their tests found: tables of
docs/results.md.

    python benchmarks/tasks.py                       # all of them; about two hours on two cores
    python benchmarks/tasks.py digits adding         # these
    python benchmarks/tasks.py "recall / mamba2"     # one mixer of a task
    python benchmarks/tasks.py --table               # print the tables of what was found so far

Every run is ``longreach train CONFIG`` with the words that the table names and a seed; its ``result.json`` is the
figure, or the held-out loss of ``language``. Nothing is chosen by the test: the steps are the config's, and the last
model is scored, once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from longreach.framework.config import load
from longreach.framework.model import build_model
from longreach.launch.bench import cpu_only, environment, last_line

RESULTS = Path(__file__).parent / "results" / "tasks.json"
EA6, EA2 = "elementwise, order 6", "elementwise, order 2"
MIXERS = {
    EA6: ["model.mixers=[elementwise]"],
    EA2: ["model.mixers=[elementwise]", "model.elementwise.order=2"],
    "chela": ["model.mixers=[chela]"],
    "feedforward_kernel": ["model.mixers=[feedforward_kernel]"],
    "mamba2": ["model.mixers=[mamba2]"],
    "gated_deltanet": ["model.mixers=[gated_deltanet]"],
    "softmax": ["model.mixers=[softmax]"],
}
MOST = [EA6, "chela", "feedforward_kernel", "softmax"]
LANGUAGE = "language"  # the quickstart, shorter; each mixer's feed-forward layers are so wide that all models are alike
FFN_RATIOS = {
    EA6: 3.125,
    "chela": 2.25,
    "feedforward_kernel": 3.0,
    "mamba2": 1.8125,
    "gated_deltanet": 2.4375,
    "softmax": 3.1875,
}
# For a CPU.
LISTOPS = ["data.batch_size=8", "model.width=64", "model.depth=2", "train.steps=1500"]
LISTOPS_256 = ["data.seq_len=256", "data.batch_size=16", "model.width=64", "model.depth=2", "train.steps=500"]
# By config, and what tells two runs of one apart: which mixers, how many seeds, and words that make it smaller.
RUNS: dict[str, tuple[list[str], int, list[str]]] = {
    "japanese-vowels": ([EA6, EA2, "chela", "feedforward_kernel", "softmax"], 5, []),
    "digits": (MOST, 3, []),
    "forecast": (MOST, 3, []),
    "adding": ([EA6, "softmax"], 1, []),
    "needle": (["chela", EA6, "mamba2", "gated_deltanet"], 1, []),
    "recall": (["chela", "softmax", "mamba2", "gated_deltanet"], 1, []),
    "retrieval": (["chela", "feedforward_kernel"], 1, []),
    "listops": (["chela", "softmax", EA6], 1, LISTOPS),
    "listops 256": (["chela", "softmax"], 1, LISTOPS_256),
    LANGUAGE: ([*FFN_RATIOS], 1, ["parallel.ranks=1", "train.steps=150", "monitor.sample_len=0"]),
}
# What papers report for the very same data: (config, mixer) -> metric. arXiv 2501.05730, table of UEA archives.
PAPERS = {("japanese-vowels", EA6): 0.973, ("japanese-vowels", EA2): 0.957, ("japanese-vowels", "softmax"): 0.970}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = f"of {', '.join(RUNS)}; 'NAME / MIXER' for one mixer"
    parser.add_argument("names", metavar="NAME", nargs="*", default=[*RUNS], help=choices)
    parser.add_argument("--table", action="store_true", help="print the tables and train nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    every = [(name, mixer) for name in RUNS for mixer in RUNS[name][0]]
    cases = [case for case in every if case[0] in arguments.names or " / ".join(case) in arguments.names]
    rows: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if not arguments.table:
        with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(arguments.jobs) as pool:
            found = pool.map(lambda case: _row(*case, Path(directory)), cases)
            for key, row in zip(map(" / ".join, cases), found, strict=True):
                rows[key] = row
                rows = {known: rows[known] for known in map(" / ".join, every) if known in rows}
                print(f"{key}: {_figures(row)}", file=sys.stderr, flush=True)
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{table(rows)}\n\n{language_table(rows)}")
    return 0


def table(rows: dict[str, Any]) -> str:
    """Results as a Markdown table."""
    lines = [
        "| `longreach train` | mixer | parameters | steps | seeds | ours | simplest answer | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        if row["config"] == "quickstart":
            continue
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


def language_table(rows: dict[str, Any]) -> str:
    """Bits per byte of the language models as a Markdown table."""
    lines = ["| mixer | `model.ffn_ratio` | parameters | held-out bits per byte |", "|---|---|---|---|"]
    for row in rows.values():
        if row["config"] == "quickstart":
            ratio = row["words"][-1].partition("=")[2]
            bits = _figures(row).removeprefix("bits per byte ")
            lines.append(f"| {row['mixer']} | {ratio} | {row['num_parameters']:,} | {bits} |")
    return "\n".join(lines)


def words_of(name: str, mixer: str) -> tuple[str, list[str]]:
    """The config of a run, and the words beside those of its mixer and seed."""
    words = RUNS[name][2]
    if name == LANGUAGE:
        return "quickstart", [*words, f"model.ffn_ratio={FFN_RATIOS[mixer]}"]
    return name.partition(" ")[0], words


def _row(name: str, mixer: str, directory: Path) -> dict[str, Any]:
    seeds, (config, words) = RUNS[name][1], words_of(name, mixer)
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
    if (run / "result.json").exists():
        found: dict[str, Any] = json.loads((run / "result.json").read_text())
        return found
    last = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])  # tokens are bytes
    size = sum(p.numel() for p in build_model(load(str(run / "config.yaml")).model).parameters())
    metrics = {"bits per byte": last["loss"] / math.log(2)}
    return {"num_parameters": size, "step": last["step"], "chance": {}, "metrics": metrics}


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
