"""How far a needle is found: trains ``longreach train needle`` on longer and longer haystacks in one run, and scores it
in haystacks of up to 1,048,576 tokens, read block by block: the second table of docs/results.md.

    python benchmarks/needle.py            # a quarter of an hour on two cores
    python benchmarks/needle.py --table    # print the table of what was found
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
TESTED = {64: 256, 256: 256, 1024: 256, 4096: 64, 16384: 64, 65536: 64, 262144: 16, 1048576: 16}  # tokens: examples
FARTHEST = {"softmax": 16384}  # where one takes too long beyond


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.table:
        mixers = ["chela", "elementwise, order 6", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"]
        with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(lambda mixer: _row(mixer, Path(directory)), mixers))
        report = {"environment": environment("cpu", 1), "stages": STAGES, "rows": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(json.loads(arguments.out.read_text())))
    return 0


def table(report: dict[str, Any]) -> str:
    """The accuracies as a Markdown table."""
    lengths = [int(length) for length in report["rows"][0]["accuracy"]]
    lines = [f"| mixer | {' | '.join(f'{length:,}' for length in lengths)} |", "|---" * (1 + len(lengths)) + "|"]
    for row in report["rows"]:
        cells = [row["accuracy"].get(str(length)) for length in lengths]
        lines.append(f"| {row['mixer']} | {' | '.join('' if c is None else f'{c:.3f}' for c in cells)} |")
    return "\n".join(lines)


def _row(mixer: str, directory: Path) -> dict[str, Any]:
    run = Path(tempfile.mkdtemp(dir=directory))
    for length, batch, steps in STAGES:
        sizes = [f"data.seq_len={length}", f"data.batch_size={batch}", f"train.micro_batch_size={batch}"]
        longreach("train", "needle", *MIXERS[mixer], *sizes, f"train.steps={steps}", "data.accept_change=true", run=run)
    found = {}
    for length, examples in TESTED.items():
        if length <= FARTHEST.get(mixer, length):
            sizes = [f"data.seq_len={length}", f"task.test_examples={examples}", "parallel.block_len=8192"]
            file = run / f"{length}.json"
            batch = ["data.batch_size=4", "train.micro_batch_size=4"]
            longreach("evaluate", str(run), *sizes, *batch, "--json", str(file))
            found[str(length)] = json.loads(file.read_text())["metrics"]["accuracy"]
            print(f"{mixer}, {length:,} tokens: {found[str(length)]:.3f}", file=sys.stderr, flush=True)
    return {"mixer": mixer, "accuracy": found}


if __name__ == "__main__":
    sys.exit(main())
