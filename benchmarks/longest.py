"""The longest sequence that one training step takes in a given resident memory per rank.

    python benchmarks/longest.py --memory-gib 4

Each trial is a real ``longreach train`` of one step in processes of its own; the next length is where the memory of the
last two would reach the limit. Prints a table and writes it, with machine and commit, as JSON; rows that are there
already, under the same limits, stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

GRAIN = 4096  # tokens; lengths are multiples of it


@dataclass
class Trial:
    """One step: peak resident memory of the largest rank, and the seconds of the step."""

    mixer: str
    ranks: int
    seq_len: int
    memory_bytes: float
    seconds: float


def trial(mixer: str, ranks: int, seq_len: int, corpus: Path, seconds: float) -> Trial | None:
    """Train one step; None if it took longer than ``seconds`` or failed."""
    with tempfile.TemporaryDirectory() as run_dir:
        words = [
            "quickstart",
            f"run.dir={run_dir}",
            f"model.mixers=[{mixer}]",
            f"data.source={corpus}",
            f"data.seq_len={seq_len}",
            f"data.cache={corpus.parent / 'packed'}",
            "data.valid_fraction=0",
            f"parallel.ranks={ranks}",
            f"parallel.sequence={ranks}",
            "train.steps=1",
            "optim.warmup_steps=0",
            "train.validate_every=0",
            "monitor.sample_len=0",
        ]
        command = [sys.executable, "-m", "longreach", "train", *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode:
            print(done.stderr[-500:], file=sys.stderr)
            return None
        row = json.loads((Path(run_dir) / "metrics.jsonl").read_text().splitlines()[0])
        return Trial(mixer, ranks, seq_len, row["peak_memory_bytes"], row["step_seconds"])


def longest(
    mixer: str, ranks: int, corpus: Path, memory: float, seconds: float, start: int
) -> tuple[Trial | None, str]:
    """The longest good trial, and what the next longer one ran out of, or would by the growth of the last two."""
    done: list[Trial] = []
    length, low, high, reason = start, 0, 0, "memory"
    while True:
        result = trial(mixer, ranks, length, corpus, seconds)
        print(f"  {mixer}, {ranks} ranks, {length:,} tokens: {result}", file=sys.stderr)
        if result is not None:
            done.append(result)
        if result is not None and result.memory_bytes <= memory and result.seconds <= seconds:
            low = length
        else:
            high = length
            reason = "memory" if result is not None and result.memory_bytes > memory else "time"
        length = 2 * low if not high else (low + high) // 2
        if len(done) > 1 and reason == "memory":
            a, b = sorted(done, key=lambda one: abs(one.memory_bytes - memory))[:2]
            growth = (b.memory_bytes - a.memory_bytes) / (b.seq_len - a.seq_len)
            length = int(a.seq_len + (memory - a.memory_bytes) / max(growth, 1.0))
        length = min(length, high - GRAIN) if high else length
        length = length // GRAIN * GRAIN
        if length - low < max(GRAIN, low // 16):
            return next((one for one in done if one.seq_len == low), None), reason


def _kept(path: Path, limits: dict[str, float], mixers: list[str], ranks: list[int]) -> list[dict[str, object]]:
    """Rows of an earlier run under the same limits that this one does not measure again."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    if {key: report.get(key) for key in limits} != limits:
        return []
    return [row for row in report["rows"] if row["mixer"] not in mixers or row["ranks"] not in ranks]


def _commit() -> str:
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-gib", type=float, default=4.0, help="resident memory that a rank may use")
    parser.add_argument("--seconds", type=float, default=300.0, help="time that the step may take")
    parser.add_argument("--start", type=int, default=32768, help="tokens of the first trial")
    parser.add_argument("--mixers", nargs="+", default=["softmax", "elementwise"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/longest.json"))
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {torch.get_num_threads()} cores, torch {torch.__version__}"
    limits = {"memory_gib": arguments.memory_gib, "seconds": arguments.seconds}
    rows = _kept(arguments.out, limits, arguments.mixers, arguments.ranks)
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus.bin"
        generator = torch.Generator().manual_seed(0)
        corpus.write_bytes(bytes(torch.randint(0, 256, (2**23,), generator=generator, dtype=torch.uint8).tolist()))
        for mixer in arguments.mixers:
            for ranks in arguments.ranks:
                found, reason = longest(
                    mixer, ranks, corpus, arguments.memory_gib * 2**30, arguments.seconds, arguments.start
                )
                where = {
                    "commit": _commit(),
                    "machine": machine,
                    "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                }
                rows.append(
                    {**(asdict(found) if found else {"mixer": mixer, "ranks": ranks}), "limit": reason, **where}
                )
    print("| mixer | ranks | longest sequence | peak memory of a rank | seconds of the step | limit |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['mixer']} | {row['ranks']} | {row['seq_len']:,} | {row['memory_bytes'] / 2**30:.2f} GiB "
            f"| {row['seconds']:.1f} | {row['limit']} |"
            if "seq_len" in row
            else f"| {row['mixer']} | {row['ranks']} | none | | | {row['limit']} |"
        )
    command = f"python benchmarks/longest.py --memory-gib {arguments.memory_gib} --seconds {arguments.seconds}"
    report = {"command": command, **limits, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
