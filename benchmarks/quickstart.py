"""What the quickstart learns in its time, and what each of its settings is worth: trains it as it was, as it is, and
with one setting changed at a time. Prints a table of benchmarks/README.md.

    python benchmarks/quickstart.py                          # all rows
    python benchmarks/quickstart.py --resume                 # rows that are missing; others stay
    python benchmarks/quickstart.py --table                  # print what was found

As it was and as it is, both train as users train, on the config's ranks and one after the other; the other rows on one
thread each, as many at a time as there are cores, so that their seconds compare with the first of these only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from trainings import longreach, num_parameters, rows_of, training_seconds

from longreach.framework.runtime.files import replace_text
from longreach.launch.bench import environment, table_header, table_line

RESULTS = Path(__file__).parent / "results" / "quickstart.json"
LONG = ["data.seq_len=8192", "train.steps=500", "optim.warmup_steps=10"]
HALF = ["data.seq_len=4096", "train.steps=1000", "optim.warmup_steps=20"]
BETAS = "optim.betas=[0.9,0.95]"
USERS = {"as it was": [*LONG, BETAS, "deepspeed=zero1"], "as it is": []}
# The same settings on one thread, then one of them changed.
ALONE = {
    "as it is, one thread": [],
    "500 steps of 8,192 tokens": LONG,
    "1,000 steps of 4,096 tokens": HALF,
    "1,800 steps of 2,048 tokens": ["data.seq_len=2048", "train.steps=1800"],
    "half the learning rate": ["optim.lr=2e-3"],
    "twice the learning rate": ["optim.lr=8e-3"],
    "a lower end of the schedule": ["optim.min_lr_ratio=0.02"],
    "betas as by default": [BETAS],
    "gated_deltanet for chela": ["model.mixers=[elementwise,gated_deltanet]"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep rows of the same words, and train what is missing")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings of one thread at a time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    machines = {True: environment("cpu", 2), False: environment("cpu", 1)}
    if not arguments.table:
        kept = {name for name, row in rows.items() if row["words"] == {**USERS, **ALONE}.get(name)}
        missing = [name for name in (*USERS, *ALONE) if not (arguments.resume and name in kept)]
        with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(arguments.jobs) as pool:
            for name in missing:
                if name in USERS:
                    row = _row(name, USERS[name], Path(place))
                    _keep(arguments.out, rows, name, {**row, "environment": machines[True]})
            running = {pool.submit(_row, name, ALONE[name], Path(place)): name for name in missing if name in ALONE}
            for future in as_completed(running):
                _keep(arguments.out, rows, running[future], {**future.result(), "environment": machines[False]})
    print(table(rows))
    return 0


def table(rows: dict[str, Any]) -> str:
    """A Markdown table, a row for each training."""
    lines = [table_header(["quickstart", "words", "parameters", "seconds of all steps", "held-out bits per byte"])]
    for name, row in rows.items():
        words = f"`{' '.join(row['words'])}`" if row["words"] else ""
        cells = [name, words, f"{row['num_parameters']:,}", f"{row['seconds']:.1f}", f"{row['bits']:.3f}"]
        lines.append(table_line(cells))
    return "\n".join(lines)


def _keep(out: Path, rows: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    rows[name] = row
    order = [name for name in (*USERS, *ALONE) if name in rows]
    replace_text(out, json.dumps({name: rows[name] for name in order}, indent=1) + "\n")
    print(f"{name}: {row['bits']:.3f} bits per byte, {row['seconds']:.1f} s", file=sys.stderr, flush=True)


def _row(name: str, words: list[str], place: Path) -> dict[str, Any]:
    run = Path(tempfile.mkdtemp(dir=place))
    last = ["monitor.sample_len=0", "train.validate_every=0", f"run.dir={run}"]
    if name in USERS:
        command = [sys.executable, "-m", "longreach", "train", "quickstart", *words, *last]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        longreach("train", "quickstart", "parallel.ranks=1", *words, *last, run=run)
    (held_out,) = rows_of(run / "validation.jsonl")
    measured = {"bits": held_out["bits_per_token"], "seconds": training_seconds(run)}
    return {"words": words, "num_parameters": num_parameters("quickstart", words), **measured}


if __name__ == "__main__":
    sys.exit(main())
