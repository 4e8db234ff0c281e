"""What the cost model predicts for one training step, and how near it comes where it can be checked.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --check

Prints Markdown tables for docs/scaling.md. Without a word, predictions for a large model on many GPUs, of which
nothing was measured: the step's time by work, states and ZeRO, for 8 to 4,096 GPUs that share one sequence.

With ``--check``, the quickstart's step of 8,192 tokens on 1, 2 and 4 ranks of one thread on this machine, which
exchange over gloo: predicted by a dry run, in which one rank works alone, and the link that was measured between two
ranks; and measured in a real training. More ranks than processors share them, so their work takes as many times longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from longreach.launch.bench import environment
from longreach.launch.link_benchmark import LOCAL_RANKS, join_and_measure
from longreach.launch.local import start_ranks
from longreach.parallel import cost
from longreach.parallel.relay import SLICES

NODE_SIZE = 8
RANKS = [8, 64, 512, 4096]
TOKENS = [2**17, 2**20, 2**24]


@dataclass(frozen=True)
class Shape:
    """A model of `elementwise` and modal `chela` blocks in turn, as in configs/lm-1b-1m.yaml.

    Attributes:
        width, depth, heads, order, modes: as in the config.
        parameters: of the whole model.
        flops: of a GPU, a second, in matrix products.
        share: of these that a step reaches.
    """

    width: int = 2048
    depth: int = 24
    heads: int = 16
    order: int = 6
    modes: int = 8
    parameters: float = 1.3e9
    flops: float = 989e12
    share: float = 0.4

    @property
    def states(self) -> list[int]:
        """Bytes (fp32) of each state of a pair of blocks, for one sequence."""
        key, value = self.width // 2 // self.heads, 2 * self.width // self.heads
        elementwise = 4 * 2 * (self.order + 1) * self.width
        return [elementwise, 4 * self.heads * key * value, 8 * self.width * self.modes]

    def work(self, tokens: float) -> float:
        """Seconds of one rank's ``tokens``: 6 operations a token and parameter."""
        return 6 * self.parameters * tokens / (self.flops * self.share)

    def travel(self, ranks: int) -> tuple[float, str]:
        """Seconds in which all states go there and back, none beside work; and the ways they take."""
        near, far = cost.links("cuda")
        node_size = NODE_SIZE if ranks > NODE_SIZE else None
        total, ways = 0.0, set()
        for num_bytes in self.states:
            way = cost.fastest(num_bytes, ranks, SLICES, near, far, node_size)
            link = near if node_size is None else far
            seconds = {
                "gather": cost.gather_seconds(num_bytes, ranks, link),
                "pipeline": cost.pipeline_seconds(num_bytes, ranks, SLICES, link),
                "recursive_doubling": cost.recursive_doubling_seconds(num_bytes, ranks, link),
                "hierarchical": cost.hierarchical_seconds(num_bytes, ranks, node_size or 1, near, far),
            }[way]
            ways.add(way)
            total += 2 * seconds * self.depth / 2
        return total, " and ".join(sorted(ways))

    def zero(self, ranks: int) -> float:
        """Seconds in which ZeRO-2 reduces gradients and gathers weights, 16 bits each, none beside work."""
        near, far = cost.links("cuda")
        link = near if ranks <= NODE_SIZE else far
        return cost.seconds("all_reduce", 2 * self.parameters, ranks, link)


@dataclass(frozen=True)
class Step:
    """One step of the quickstart with 8,192 tokens on so many ranks, in seconds.

    Attributes:
        work: of one rank alone, as a dry run measures it.
        exchange: of all its exchanges, as predicted.
        measured: of a real training; the median.
    """

    ranks: int
    work: float
    exchange: float
    measured: float


CHECKED = (1, 2, 4)
STEPS, WARM_UP = 40, 10  # of a real training, and those of them that are not counted
PLAN = """
import json, sys
from longreach.framework.config import load
from longreach.launch.dry_run import plan
found = plan(load("quickstart", sys.argv[1:]), node_size=64)
print(json.dumps([found.compute_seconds, found.exchange_seconds]))
"""


def step(ranks: int, link: cost.Link, directory: Path) -> Step:
    """Predict a step, then measure it."""
    words = [f"parallel.ranks={ranks}", f"parallel.sequence={ranks}", "train.threads=1", "data.seq_len=8192"]
    words += [f"parallel.near=[{link.latency},{link.bandwidth}]"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    plans = []
    for _ in range(3):
        said = subprocess.run([sys.executable, "-c", PLAN, *words], env=environ, stdout=subprocess.PIPE, check=True)
        plans.append(json.loads(said.stdout.splitlines()[-1]))
    work, exchange = (median(values) for values in zip(*plans))
    run = directory / f"run{ranks}"
    words += [f"run.dir={run}", f"data.cache={directory / 'packed'}", f"train.steps={STEPS}", "checkpoint.every=0"]
    words += ["train.validate_every=0", "train.validate_batches=1", "monitor.sample_len=0", "monitor.plot=false"]
    command = [sys.executable, "-m", "longreach", "train", "quickstart", *words]
    subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Step(ranks, work, exchange, median(row["step_seconds"] for row in rows[WARM_UP:]))


def check() -> None:
    """Print the table of predicted and measured steps."""
    cores = len(os.sched_getaffinity(0))
    link = start_ranks(LOCAL_RANKS, join_and_measure)[0]
    print(", ".join(f"{key} {value}" for key, value in environment("cpu", cores).items()))
    print(f"between two ranks: {link.latency * 1e6:,.0f} us, {link.bandwidth / 1e9:.2f} GB/s")
    print("| ranks | work of one | exchanges, predicted | step, predicted | step, measured | measured / predicted |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for ranks in CHECKED:
            one = step(ranks, link, Path(directory))
            predicted = one.work * max(1, ranks / cores) + one.exchange
            print(
                f"| {ranks}{' (emulated)' if ranks > cores else ''} | {one.work * 1e3:,.1f} ms "
                f"| {one.exchange * 1e3:,.1f} ms | {predicted * 1e3:,.1f} ms | {one.measured * 1e3:,.1f} ms "
                f"| {one.measured / predicted:.2f} |",
                flush=True,
            )


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with trainings on this machine")
    if parser.parse_args().check:
        check()
    else:
        predict()


def predict() -> None:
    """Print the table of predictions."""
    shape = Shape()
    near, far = cost.links("cuda")
    print(f"{shape}")
    print(f"links: {near} within nodes of {NODE_SIZE}, {far} between them")
    print("| sequence length | GPUs | shard length | work | state exchange | algorithm | ZeRO | share of work |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in TOKENS:
        for ranks in RANKS:
            work, (travel, ways), zero = shape.work(tokens / ranks), shape.travel(ranks), shape.zero(ranks)
            print(
                f"| {tokens:,} | {ranks:,} | {tokens // ranks:,} | {work * 1e3:,.1f} ms | {travel * 1e3:,.1f} ms "
                f"| {ways} | {zero * 1e3:,.1f} ms | {work / (work + travel + zero):.0%} |"
            )


if __name__ == "__main__":
    main()
