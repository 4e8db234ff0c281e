"""The first losses of three trainings, exactly: two checkouts that compute the same print the same.

    python benchmarks/losses.py                      # the installed package
    python benchmarks/losses.py --package DIR        # the checkout DIR/longreach

Each row is a real ``longreach train`` of ten steps in processes of its own; loss and gradient norm of each step are
printed as hexadecimal floats, every bit of them. The corpus is generated with a seed, so that it is the same on every
machine; results are equal only on machines whose processors and libraries round alike.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 10
COMMON = [f"train.steps={STEPS}", "train.validate_every=0", "train.log_every=1", "monitor.plot=false"]
RUNS = {
    "quickstart": ["quickstart", "optim.warmup_steps=3", "monitor.sample_len=0"],
    "japanese-vowels": ["japanese-vowels", "optim.warmup_steps=3"],
    "streamed": [
        "quickstart",
        "optim.warmup_steps=3",
        "monitor.sample_len=0",
        "parallel.block_len=512",
        "model.depth=3",
        "model.mixers=[elementwise,chela,feedforward_kernel]",
        "model.dropout=0.1",
    ],
}


def corpus(directory: Path) -> Path:
    """A folder of texts drawn with a fixed seed: words, repeated with changes."""
    draw = random.Random(13)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(2000)]
    directory.mkdir()
    for number in range(24):
        text = " ".join(draw.choices(words, k=4000))
        (directory / f"{number:02}.txt").write_text(text + "\n", encoding="ascii")
    return directory


def losses(words: list[str], directory: Path, environment: dict[str, str]) -> list[tuple[str, str]]:
    """Loss and gradient norm of each step, as hexadecimal floats."""
    command = [sys.executable, "-m", "longreach", "train", *words, *COMMON, f"run.dir={directory}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()[-1000:]}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(float(row["loss"]).hex(), float(row["grad_norm"]).hex()) for row in rows if "grad_norm" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help="directory that holds a checkout named longreach")
    arguments = parser.parse_args()
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if arguments.package is not None:
        environment["PYTHONPATH"] = str(arguments.package.resolve())
    with tempfile.TemporaryDirectory() as directory:
        texts = corpus(Path(directory) / "texts")
        for name, words in RUNS.items():
            place = Path(directory) / name
            own = [] if name == "japanese-vowels" else [f"data.source={texts}", f"data.cache={directory}/packed"]
            for step, (loss, norm) in enumerate(losses([*words, *own], place, environment), 1):
                print(f"{name:16} {step:3} {loss:24} {norm}", flush=True)


if __name__ == "__main__":
    main()
