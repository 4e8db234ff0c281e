"""What saving costs the training that goes on meanwhile, in one run.

    python benchmarks/saving.py quickstart
    python benchmarks/saving.py CONFIG key=value ...

Trains with a checkpoint every ``--every`` steps. A save costs what the training itself waits for it
(``save_seconds``), and what the steps that follow it take longer than the others, while the files are written. Prints
the cost of a save in steps, and its share of the time at the default interval; writes both as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from longreach.framework.config import CheckpointConfig
from longreach.launch.bench import environment

BOUND = 0.05  # of the time of the steps, at the default interval
FIRST = 10  # steps that are not looked at


def main() -> int:
    """Measure, print, write; 1 if saving costs more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="quickstart")
    parser.add_argument("words", nargs="*", help="key=value of the config")
    parser.add_argument("--every", type=int, default=10, help="steps between two saves of this run")
    parser.add_argument("--saves", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/saving.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows, num_bytes = train(options, place)
    row = {"config": " ".join([options.config, *options.words]), "checkpoint_bytes": num_bytes, **cost(rows, options)}
    interval = CheckpointConfig().every
    print(f"{row['config']}: a checkpoint of {num_bytes / 1e6:,.1f} MB, {row['saves']} times")
    print(f"a step without a save        {row['step_seconds']:.4f} s (median)")
    print(f"waited for a save            {row['waited_seconds']:.4f} s (mean)")
    print(f"steps during it, longer by   {row['slowed_seconds']:.4f} s (mean, all together)")
    print(f"a save costs                 {row['steps_a_save']:.2f} steps")
    print(f"of the time, every {interval} steps   {row['share']:.2%} (wanted: below {BOUND:.0%})")
    write(options.out, row)
    return 0 if row["share"] < BOUND else 1


def train(options: argparse.Namespace, place: str) -> tuple[list[dict[str, Any]], int]:
    """The rows of a real training, and the bytes of its last checkpoint."""
    steps = FIRST + options.every * options.saves + options.every - 1
    words = [f"run.dir={place}/run", f"checkpoint.every={options.every}", f"train.steps={steps}", *options.words]
    words += ["train.validate_every=0", "train.validate_batches=1", "monitor.sample_len=0", "monitor.plot=false"]
    subprocess.run([sys.executable, "-m", "longreach", "train", options.config, *words], check=True)
    run = Path(place) / "run"
    newest = max((run / "checkpoints").glob("step-*"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows, sum(file.stat().st_size for file in newest.iterdir())


def cost(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a save: waited for, and added to the steps that follow it, up to the middle between two saves."""
    near = options.every // 2
    looked_at = [row for row in rows if row["step"] > FIRST]
    usual = median(row["step_seconds"] for row in looked_at if (row["step"] - 1) % options.every >= near)
    after = [row for row in looked_at if (row["step"] - 1) % options.every < near]
    saves = sum((row["step"] - 1) % options.every == 0 for row in after)
    slowed = sum(row["step_seconds"] - usual for row in after) / saves
    waited = sum(row["save_seconds"] for row in looked_at) / saves
    steps = (waited + slowed) / usual
    return {
        "saves": saves,
        "step_seconds": usual,
        "waited_seconds": waited,
        "slowed_seconds": slowed,
        "steps_a_save": steps,
        "share": steps / CheckpointConfig().every,
    }


def write(path: Path, row: dict[str, Any]) -> None:
    """Put the row into the file; those of other configurations stay."""
    row = {**row, **environment("cpu", torch.get_num_threads())}
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [old for old in rows if old["config"] != row["config"]] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
