"""How far a needle is found: trains ``longreach train needle`` on longer and longer haystacks in one run, and scores it
in haystacks of up to 1,048,576 tokens, read block by block: the tables of docs/results.md.

    python benchmarks/needle.py                            # every mixer and pattern; hours on two cores
    python benchmarks/needle.py "chela, gated_deltanet"    # one of them, or a pattern
    python benchmarks/needle.py --table                    # print the tables of what was found

Patterns are trained on up to 65,536 tokens, with three seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tasks import MIXERS, longreach

from longreach.launch.bench import environment

RESULTS = Path(__file__).parent / "results" / "needle.json"
# (tokens, sequences a step, steps so far): the first is the config's own.
STAGES = [(64, 64, 600), (256, 32, 900), (1024, 16, 1200)]
LONGER = [(4096, 8, 1400), (16384, 4, 1600), (65536, 2, 1700)]  # of patterns, after these
SINGLE = ["chela", "elementwise, order 6", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"]
PATTERNS = [f"{mixer}, {memory}" for memory in ("gated_deltanet",) for mixer in ("elementwise", "chela")]
SEEDS = 3  # of a pattern
TESTED = {64: 256, 256: 256, 1024: 256, 4096: 64, 16384: 64, 65536: 64, 262144: 16, 1048576: 16}  # tokens: examples
FARTHEST = {"softmax": 16384}  # where one takes too long beyond


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", default=[*SINGLE, *PATTERNS], help="mixers and patterns")
    parser.add_argument("--table", action="store_true", help="print the tables and train nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if not arguments.table:
        cases = [(name, seed) for name in arguments.names for seed in range(SEEDS if name in PATTERNS else 1)]
        with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(arguments.jobs) as pool:
            for row in pool.map(lambda case: _row(*case, Path(directory)), cases):
                rows[f"{row['mixer']} / {row['seed']}"] = row
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{table(rows, SINGLE)}\n\n{table(rows, PATTERNS)}")
    return 0


def table(rows: dict[str, Any], names: list[str]) -> str:
    """The accuracies of these mixers as a Markdown table; of several seeds, the lowest to the highest."""
    lines = [f"| mixer | {' | '.join(f'{length:,}' for length in TESTED)} |", "|---" * (1 + len(TESTED)) + "|"]
    for name in names:
        found = [row["accuracy"] for row in rows.values() if row["mixer"] == name]
        if found:
            every = [[one[str(n)] for one in found if str(n) in one] for n in TESTED]
            lines.append(f"| {name} | {' | '.join(map(_range, every))} |")
    return "\n".join(lines)


def _range(found: list[float]) -> str:
    ends = sorted({f"{accuracy:.3f}" for accuracy in (min(found), max(found))}) if found else []
    return " to ".join(ends)


def _row(name: str, seed: int, directory: Path) -> dict[str, Any]:
    run = Path(tempfile.mkdtemp(dir=directory))
    stages = STAGES + (LONGER if name in PATTERNS else [])
    words = [f"model.mixers=[{name}]"] if name in PATTERNS else MIXERS[name]
    for length, batch, steps in stages:
        sizes = [f"data.seq_len={length}", f"data.batch_size={batch}", f"train.micro_batch_size={batch}"]
        more = [f"train.steps={steps}", f"run.seed={seed}", "data.accept_change=true"]
        longreach("train", "needle", *words, *sizes, *more, run=run)
    found = {}
    for length, examples in TESTED.items():
        if length <= FARTHEST.get(name, length):
            sizes = [f"data.seq_len={length}", f"task.test_examples={examples}", "parallel.block_len=8192"]
            file = run / f"{length}.json"
            batch = ["data.batch_size=4", "train.micro_batch_size=4"]
            longreach("evaluate", str(run), *sizes, *batch, "--json", str(file))
            found[str(length)] = json.loads(file.read_text())["metrics"]["accuracy"]
            print(f"{name}, seed {seed}, {length:,} tokens: {found[str(length)]:.3f}", file=sys.stderr, flush=True)
    return {"mixer": name, "seed": seed, "stages": stages, "accuracy": found, "environment": environment("cpu", 1)}


if __name__ == "__main__":
    sys.exit(main())
