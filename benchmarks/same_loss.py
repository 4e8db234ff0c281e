"""The same loss however one sequence is split, and what a rank keeps and sends as the sequence grows.

    python benchmarks/same_loss.py

Each row is a real ``longreach train quickstart`` in fp32, on the processor, in processes of its own, with one seed and
a generated corpus. The first table splits one sequence over ranks and into streamed blocks; the second one has longer
and longer sequences, in whole shards and streamed. Prints both and writes them, with machine and commit, as JSON. The
longest run takes about 10 GiB of memory in all; ``--lengths`` sets others.

What is sent are bytes that a rank hands over in a training step, forward and backward, in exclusive scans of states
and in halo exchanges ("scan / halo"): those of the rank and layer with the most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from losses import corpus

STEPS, WARMUP_STEPS, SEQ_LEN = 10, 3, 32768  # without a warm-up, Adam makes more of what fp32 rounds
SPLITS = [(1, 0), (2, 0), (4, 0), (1, 4096), (2, 2048)]  # ranks, tokens of a streamed block on each of them
LENGTHS = [16384, 65536, 262144]
BLOCK_LEN = 1024  # of the second table
VERBS = ("scan", "halo")


@dataclass
class Run:
    """One training.

    Attributes:
        block_len: tokens of a streamed block on each rank; 0 for one block of everything.
        losses: of each step, nats a token.
        memory_bytes: peak resident memory of the largest rank.
        sent: bytes by verb that a rank hands over in a layer in the first step; the most of any rank and layer.
    """

    ranks: int
    block_len: int
    seq_len: int
    losses: list[float]
    memory_bytes: float
    sent: dict[str, int]

    @property
    def num_blocks(self) -> int:
        return -(-self.seq_len // (self.block_len * self.ranks)) if self.block_len else 1

    @property
    def name(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{ranks}, streamed in {self.num_blocks} blocks" if self.block_len else ranks

    @property
    def sent_a_block(self) -> str:
        """Bytes of a block, on average, in the order of `VERBS`."""
        return " / ".join(f"{self.sent[verb] / self.num_blocks:,.0f}" for verb in VERBS)

    @property
    def memory(self) -> str:
        return f"{self.memory_bytes / 2**30:.2f} GiB"


def train(ranks: int, block_len: int, seq_len: int, steps: int, texts: Path) -> Run:
    """Train the quickstart's model from its first step on."""
    with tempfile.TemporaryDirectory() as directory:
        words = [
            "quickstart",
            f"run.dir={directory}",
            "run.seed=0",
            f"data.source={texts}",
            f"data.cache={texts.parent / 'packed'}",
            "data.valid_fraction=0",
            f"data.seq_len={seq_len}",
            f"parallel.ranks={ranks}",
            f"parallel.sequence={ranks}",
            f"parallel.block_len={block_len}",
            f"train.steps={steps}",
            "train.precision=fp32",
            "train.threads=1",
            "train.validate_every=0",
            f"optim.warmup_steps={min(WARMUP_STEPS, steps - 1)}",
            "monitor.record_exchanges=1",
            "monitor.sample_len=0",
            "monitor.plot=false",
            "monitor.tensorboard=false",
        ]
        command = [sys.executable, "-m", "longreach", "train", *words]
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr.strip()[-1000:]}")
        rows = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
        losses, memory = [row["loss"] for row in rows], max(row["peak_memory_bytes"] for row in rows)
        run = Run(ranks, block_len, seq_len, losses, memory, sent(Path(directory)))
    print(f"  {seq_len:,} tokens, {run.name}: {run.losses[-1]:.8f}, {run.memory}", file=sys.stderr)
    return run


def sent(run_dir: Path) -> dict[str, int]:
    """Bytes by verb that a rank hands over in a layer in the recorded step: the most of any rank and layer."""
    most = dict.fromkeys(VERBS, 0)
    for path in run_dir.glob("exchanges/rank-*.jsonl"):
        total: Counter[tuple[str, str]] = Counter()
        for row in map(json.loads, path.read_text().splitlines()):
            total[row["layer"], row["verb"]] += row["num_bytes"]
        for (_, verb), num_bytes in total.items():
            if verb in most:
                most[verb] = max(most[verb], num_bytes)
    return most


def table_of_splits(runs: list[Run]) -> str:
    """What one sequence gives, however it is split; the first run is what the others are compared with."""
    first = runs[0]
    lines = [
        f"| {first.seq_len:,} tokens on | loss after {len(first.losses)} steps | difference, first step / largest "
        "| peak memory of a rank | sent per layer and block |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        off = [abs(a - b) for a, b in zip(run.losses, first.losses, strict=True)]
        difference = "" if run is first else f"{off[0]:.0e} / {max(off):.0e}"
        lines.append(f"| {run.name} | {run.losses[-1]:.8f} | {difference} | {run.memory} | {run.sent_a_block} |")
    return "\n".join(lines)


def table_of_lengths(pairs: list[tuple[Run, Run]]) -> str:
    """What grows with the length and what does not: (whole shards, streamed) of each."""
    lines = [
        "| tokens | whole shards: peak memory of a rank | sent per layer "
        "| streamed: peak memory of a rank | blocks | sent per layer and block |",
        "|---|---|---|---|---|---|",
    ]
    for whole, streamed in pairs:
        lines.append(
            f"| {whole.seq_len:,} | {whole.memory} | {whole.sent_a_block} "
            f"| {streamed.memory} | {streamed.num_blocks} | {streamed.sent_a_block} |"
        )
    return "\n".join(lines)


def _commit() -> str:
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of the second table's rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/same-loss.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        texts = corpus(Path(directory) / "texts")
        splits = [train(ranks, block_len, SEQ_LEN, STEPS, texts) for ranks, block_len in SPLITS]
        pairs = [(train(2, 0, length, 1, texts), train(2, BLOCK_LEN, length, 1, texts)) for length in arguments.lengths]
    print(f"{table_of_splits(splits)}\n\n{table_of_lengths(pairs)}")
    report = {
        "command": f"python benchmarks/same_loss.py --lengths {' '.join(map(str, arguments.lengths))}",
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "splits": [asdict(run) for run in splits],
        "lengths": [asdict(run) for pair in pairs for run in pair],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
