"""How far a needle is found: trains ``longreach train needle`` on longer and longer haystacks in one run, and scores it
in haystacks of up to 1,048,576 tokens, read block by block: a table and a figure of docs/results.md.

    python benchmarks/needle.py                            # every mixer and pattern; hours on two cores
    python benchmarks/needle.py "chela, deltanet"          # one of them, or a pattern
    python benchmarks/needle.py --resume                   # what is missing; other results stay
    python benchmarks/needle.py --table                    # print the table of what was found

Patterns are trained on up to 65,536 tokens, with three seeds. ``--directory`` keeps runs with checkpoints; with
``--resume``, an interrupted training goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

from trainings import MIXERS, hardware, longreach, rows_of, training_seconds

from longreach.framework.runtime.files import replace_text
from longreach.launch.bench import environment, table_header, table_line
from longreach.launch.process import forward_signals

RESULTS = Path(__file__).parent / "results" / "needle.json"
# (tokens, sequences a step, steps so far): the first is the config's own.
STAGES = [(64, 64, 600), (256, 32, 900), (1024, 16, 1200)]
LONGER = [(4096, 8, 1400), (16384, 4, 1600), (65536, 2, 1700)]  # of patterns, after these
SINGLE = ["chela", "elementwise, order 6", "feedforward_kernel", "mamba2", "gated_deltanet", "deltanet", "softmax"]
PATTERNS = ["elementwise, deltanet", "chela, deltanet", "elementwise, gated_deltanet"]
SEEDS = 3  # of a pattern
TESTED = {64: 256, 256: 256, 1024: 256, 4096: 64, 16384: 64, 65536: 64, 262144: 16, 1048576: 16}  # tokens: examples
FARTHEST = {"softmax": 16384}  # where one takes too long beyond


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", default=[*SINGLE, *PATTERNS], help="mixers and patterns")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    parser.add_argument("--resume", action="store_true", help="keep results of the same stages, train what is missing")
    parser.add_argument("--directory", type=Path, help="keep run directories here, with checkpoints")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if not arguments.table:
        cases = [(name, seed) for name in arguments.names for seed in range(SEEDS if name in PATTERNS else 1)]
        if arguments.resume:
            cases = [case for case in cases if rows.get(_key(*case), {}).get("stages") != _stages(case[0])]
        forward_signals()
        with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(arguments.jobs) as pool:
            place = arguments.directory or Path(temporary)
            for future in as_completed([pool.submit(_row, *case, place, arguments) for case in cases]):
                row = future.result()
                rows[_key(row["mixer"], row["seed"])] = row
                replace_text(arguments.out, json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return 0


def table(rows: dict[str, Any]) -> str:
    """The accuracies as a Markdown table, a row for each mixer; of several seeds, the lowest to the highest."""
    names = ["`needle.py`", "trained to", "seeds", *(f"{length:,}" for length in TESTED), "seconds", "machine, commit"]
    lines = [table_header(names)]
    for name, found in _by_mixer(rows).items():
        every = [[row["accuracy"][str(n)] for row in found if str(n) in row["accuracy"]] for n in TESTED]
        times = [row["seconds"] for row in found if "seconds" in row]
        longest = max(length for row in found for length, _, _ in row["stages"])
        cells = [f'`"{name}"`', f"{longest:,}", len(found), *map(_range, every)]
        machines = hardware([row["environment"] for row in found])
        lines.append(table_line([*cells, f"{mean(times):,.0f}" if times else "", machines]))
    return "\n".join(lines)


def figure(rows: dict[str, Any], path: Path) -> None:
    """Draw the accuracy over the length, a line for each mixer; of several seeds the mean, and a band to the lowest and
    the highest.
    """
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawing.subplots()
    for name, found in _by_mixer(rows).items():
        lengths = [n for n in TESTED if all(str(n) in row["accuracy"] for row in found)]
        every = [[row["accuracy"][str(n)] for row in found] for n in lengths]
        longest = max(length for row in found for length, _, _ in row["stages"])
        (line,) = axes.plot(lengths, [*map(mean, every)], marker="o", label=f"{name} (trained to {longest:,})")
        axes.fill_between(lengths, [*map(min, every)], [*map(max, every)], color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks([*TESTED], [f"{length:,}" for length in TESTED], fontsize=8)
    axes.set(xlabel="tokens", ylabel="accuracy", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=120)


def _by_mixer(rows: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each mixer that has any."""
    every = {name: [row for row in rows.values() if row["mixer"] == name] for name in (*SINGLE, *PATTERNS)}
    return {name: found for name, found in every.items() if found}


def _range(found: list[float]) -> str:
    ends = sorted({f"{accuracy:.3f}" for accuracy in (min(found), max(found))}) if found else []
    return " to ".join(ends)


def _key(name: str, seed: int) -> str:
    return f"{name} / {seed}"


def _stages(name: str) -> list[list[int]]:
    return [[*stage] for stage in STAGES + (LONGER if name in PATTERNS else [])]


def _row(name: str, seed: int, place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    run = place / f"{re.sub('[^a-z0-9_]+', '-', name)}-seed-{seed}"
    if not arguments.resume:
        shutil.rmtree(run, ignore_errors=True)
    done = max((line["step"] for line in rows_of(run / "metrics.jsonl")), default=0)
    for length, batch, steps in _stages(name):
        if steps > done:
            sizes = [f"data.seq_len={length}", f"data.batch_size={batch}", f"train.micro_batch_size={batch}"]
            more = [f"train.steps={steps}", f"run.seed={seed}", "data.accept_change=true", "parallel.block_len=8192"]
            longreach("train", "needle", *MIXERS[name], *sizes, *more, run=run)
    found = {}
    for length, examples in TESTED.items():
        if length <= FARTHEST.get(name, length):
            sizes = [f"data.seq_len={length}", f"task.test_examples={examples}", "parallel.block_len=8192"]
            file = run / f"{length}.json"
            batch = ["data.batch_size=4", "train.micro_batch_size=4"]
            longreach("evaluate", str(run), *sizes, *batch, "--json", str(file))
            found[str(length)] = json.loads(file.read_text())["metrics"]["accuracy"]
            print(f"{name}, seed {seed}, {length:,} tokens: {found[str(length)]:.3f}", file=sys.stderr, flush=True)
    row = {"mixer": name, "seed": seed, "stages": _stages(name), "accuracy": found, "seconds": training_seconds(run)}
    return {**row, "environment": environment("cpu", 1)}


if __name__ == "__main__":
    sys.exit(main())
