"""`longreach bench parallel`: training speed and communication of several ranks, on CPUs over gloo.

First the quickstart's training on two ranks of one thread against one rank of two threads, in turns. Then, on 2, 4 and
8 ranks of one thread, what each kind of layer exchanges over one long sequence, beside DeepSpeed's Ulysses and ring
attention. All of it runs in real processes on this machine; ranks that are more than its cores are marked as
emulated.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from ...parallel.cost import Link
from . import (
    Bound,
    check_out,
    cpu_only,
    environment,
    last_line,
    median,
    report_bounds,
    table_header,
    table_line,
    write_report,
)
from .exchange import BY_PIPELINE, PEERS, STATES, Found, Job

RANKS = (2, 4, 8)
JOB = Job()
SOURCE = "cpython"  # what is trained on, as in the quickstart
TRAIN = ["data.seq_len=8192"]  # further settings of the training
LAYOUTS = {
    "2 ranks of 1 thread": ["parallel.ranks=2", "parallel.sequence=2", "train.threads=1"],
    "1 rank of 2 threads": ["parallel.ranks=1", "parallel.sequence=1", "train.threads=2"],
}
THREADS = 2  # of all ranks together
TURNS = 5
STEPS, WARM_UP = 40, 10  # steps of a run, and how many of them are not counted
RUN_SECONDS = 900.0  # that a run of training may take
RANKS_SECONDS = 3600.0  # that all layers together may take on some ranks
SPEED_LIMIT = 0.95
BYTES_LIMIT = 1 / 100
LARGER = {"linear_attention, mamba2": 2}  # times that limit: a state of 256 numbers a channel at its default sizes
ERROR_LIMIT = 1e-5  # of any layer against one rank: relative RMS
MATRIX = 2048  # rows and columns of the product whose rate a training step is compared with
SPEED_HEADER = table_header(
    ["training", "tokens/s, median of runs", "slowest", "fastest", "GFLOP/s", "of a matrix product's"]
)
HEADER = table_header(
    [
        "layer",
        "ranks",
        "forward + backward",
        "its exchanges alone",
        "predicted",
        "bytes forward",
        "bytes backward",
        "bytes received",
        "of Ulysses",
        "of the ring",
    ]
)


class Speeds(NamedTuple):
    """What was found of training.

    Attributes:
        tokens: per second of each run, by layout.
        num_parameters: of the model.
        matrix_flops: floating-point operations per second of an fp32 matrix product, with as many threads in all.
    """

    tokens: dict[str, list[float]]
    num_parameters: int
    matrix_flops: float

    def flops(self, layout: str) -> float:
        """Floating-point operations per second, 6 for each token and parameter."""
        return 6 * self.num_parameters * median(self.tokens[layout])


def matrix_flops(threads: int) -> float:
    """Floating-point operations per second of an fp32 matrix product, the best of a few."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, seconds = torch.rand(MATRIX, MATRIX), []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(x, x)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2 * MATRIX**3 / min(seconds)


def training_speeds(turns: int, steps: int) -> Speeds:
    """Speeds of training; the layouts take turns, so that other load slows both alike."""
    speeds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as directory:
        packed = Path(directory) / "packed"
        _run(["pack", SOURCE, str(packed), "--valid-fraction", "0"], Path(directory))
        for turn in range(turns):
            order = list(LAYOUTS) if turn % 2 == 0 else list(LAYOUTS)[::-1]
            for name in order:
                run_dir = Path(directory) / f"{name} {turn}"
                words = [
                    f"run.dir={run_dir}",
                    f"data.source={packed}",
                    "data.valid_fraction=0",
                    f"train.steps={steps}",
                    "train.validate_every=0",
                    "monitor.sample_len=0",
                    "monitor.plot=false",
                    "monitor.tensorboard=false",
                    *TRAIN,
                    *LAYOUTS[name],
                ]
                _run(["train", "quickstart", *words], Path(directory))
                rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
                speeds[name].append(median([row["tokens_per_second"] for row in rows[WARM_UP:]]))
        return Speeds(speeds, _num_parameters(Path(directory) / f"{next(iter(LAYOUTS))} 0"), matrix_flops(THREADS))


def _num_parameters(run_dir: Path) -> int:
    from ...framework.inference.loading import load_run

    return sum(p.numel() for p in load_run(run_dir)[1].parameters())


def _run(words: list[str], directory: Path) -> None:
    """Run ``longreach WORDS...`` to its end.

    Raises:
        InputError: it failed, or took more than `RUN_SECONDS`.
    """
    log = directory / "log"
    with open(log, "wb") as file:
        command = [sys.executable, "-m", "longreach", *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=cpu_only())
    try:
        code: int | str = process.wait(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        code = f"none after {RUN_SECONDS:g} s"
    finally:
        _end([process])
    if code:
        raise InputError(f"exit code of longreach {words[0]}", code, f"must be 0; it said: {last_line(log)}")


def exchanges(ranks: int, job: Job) -> tuple[Link, list[Found]]:
    """The link between so many ranks, each a process of one thread, and what was found of every layer on them.

    Raises:
        InputError: a rank failed, or all took more than `RANKS_SECONDS`.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "job.json").write_text(json.dumps(asdict(job)))
        processes = []
        try:
            for rank in range(ranks):
                command = [sys.executable, "-m", f"{__package__}.exchange", name, str(rank), str(ranks)]
                with open(directory / f"log{rank}", "wb") as file:
                    environ = cpu_only(OMP_NUM_THREADS="1")
                    processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environ))
            failed = _first_failure(processes)
        finally:
            _end(processes)
        if failed is not None:
            rank, code = failed
            said = last_line(directory / f"log{rank}")
            raise InputError(f"exit code of rank {rank} of {ranks}", code, f"must be 0; it said: {said}")
        report = json.loads((directory / "found.json").read_text())
        return Link(**report["link"]), [Found(**one) for one in report["found"]]


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int | str] | None:
    """Wait until all ranks have ended; returns the first that failed, with its exit code, or one that is late."""
    deadline = time.monotonic() + RANKS_SECONDS
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank, code
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None), f"none after {RANKS_SECONDS:g} s"
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes that still run, by SIGTERM first, after which a launcher ends its ranks too."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=45)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def bytes_over_peers(found: Sequence[Found]) -> dict[tuple[str, int], dict[str, float]]:
    """The bytes of each layer, by name and ranks, as a ratio to those of each peer on as many ranks."""
    peers = {(one.layer, one.ranks): one.num_bytes for one in found if one.layer in PEERS}
    return {(one.layer, one.ranks): {peer: one.num_bytes / peers[peer, one.ranks] for peer in PEERS} for one in found}


def as_line(one: Found, over_peers: dict[str, float], cores: int) -> str:
    """A row of the Markdown table."""
    ratios = [f"1/{1 / ratio:,.0f}" if ratio < 0.5 else f"{ratio:.2f}" for ratio in map(over_peers.__getitem__, PEERS)]
    return table_line(
        [
            one.layer,
            f"{one.ranks} (emulated)" if one.ranks > cores else one.ranks,
            f"{one.seconds * 1e3:,.1f} ms",
            f"{one.exchange_seconds * 1e3:,.1f} ms",
            f"{one.predicted_seconds * 1e3:,.1f} ms",
            f"{one.forward_bytes:,}",
            f"{one.backward_bytes:,}",
            f"{one.received_bytes:,}",
            *ratios,
        ]
    )


def plot(found: Sequence[Found], path: Path, title: str, cores: int) -> None:
    """Plot bytes and seconds of the exchanges of each layer against the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for name in dict.fromkeys(one.layer for one in found):
        some = [one for one in found if one.layer == name]
        ranks = [one.ranks for one in some]
        style = "o--" if name in PEERS else "o-"
        panels[0].loglog(ranks, [one.num_bytes for one in some], style, label=name)
        panels[1].loglog(ranks, [one.exchange_seconds for one in some], style, label=name)
    ticks = sorted({one.ranks for one in found})
    for axes, label in zip(panels, ("bytes that a rank sends", "seconds of the exchanges alone"), strict=True):
        axes.set(xlabel=f"ranks (more than {cores} are emulated)", ylabel=f"{label}, forward + backward")
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(True, which="major", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(out: Path) -> int:
    """Train and exchange on several ranks; writes ``parallel-cpu.json`` and ``.png`` into ``out``.

    Args:
        out: directory of the results.

    Returns:
        The exit code: 1 where a bound does not hold.
    """
    check_out(out)
    cores = len(os.sched_getaffinity(0))
    where = environment("cpu", cores)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{JOB.tokens:,} tokens, width {JOB.width}, {JOB.heads} heads, fp32")
    speeds = training_speeds(TURNS, STEPS)
    print(SPEED_HEADER)
    for name, runs in speeds.tokens.items():
        rate = speeds.flops(name)
        rates = f"{rate / 1e9:,.1f}", f"{rate / speeds.matrix_flops:.1%}"
        print(table_line([name, *(f"{f(runs):,.0f}" for f in (median, min, max)), *rates]), flush=True)
    two, one_rank = (median(runs) for runs in speeds.tokens.values())
    print(HEADER)
    found: list[Found] = []
    links: dict[int, Link] = {}
    for ranks in RANKS:
        links[ranks], layers = exchanges(ranks, JOB)
        found += layers
        by_layer = bytes_over_peers(layers)
        for one in layers:
            print(as_line(one, by_layer[one.layer, ranks], cores), flush=True)
    bounds = [Bound("tokens/s on 2 ranks of 1 thread over those on 1 rank of 2", two / one_rank, ">=", SPEED_LIMIT)]
    bounds += _bounds(found)
    path = out / "parallel-cpu.json"
    report = {
        "command": "longreach bench parallel",
        "environment": where,
        "training": {
            "tokens_per_second": speeds.tokens,
            "ratio": two / one_rank,
            "steps": STEPS,
            "not_counted": WARM_UP,
            "num_parameters": speeds.num_parameters,
            "flops": {name: speeds.flops(name) for name in speeds.tokens},
            "matrix_flops": speeds.matrix_flops,
        },
        "sizes": asdict(JOB),
        "links": {str(ranks): asdict(link) for ranks, link in links.items()},
        "rows": [
            {**asdict(one), "emulated": one.ranks > cores, "bytes_over": bytes_over_peers(found)[one.layer, one.ranks]}
            for one in found
        ],
        "bounds": [bound.as_json() for bound in bounds],
    }
    write_report(report, path)
    plot(found, path.with_suffix(".png"), f"{JOB.tokens:,} tokens, {where['device']}", cores)
    print(f"written: {path}, {path.with_suffix('.png')}")
    return report_bounds(bounds)


def _bounds(found: Sequence[Found]) -> list[Bound]:
    by_layer = bytes_over_peers(found)
    bounds = []
    for ranks in dict.fromkeys(one.ranks for one in found):
        errors = [one.error for one in found if one.ranks == ranks]
        worst = max(errors, key=lambda x: (math.isnan(x), x))
        bounds.append(Bound(f"error of any layer on {ranks} ranks against one", worst, "<=", ERROR_LIMIT))
        for name in STATES:
            layer = name + BY_PIPELINE  # the exchange of the fewest bytes; `auto` takes that of the least time
            most = max(by_layer[layer, ranks].values())
            what = f"bytes of {layer} on {ranks} ranks over those of either peer"
            bounds.append(Bound(what, most, "<=", BYTES_LIMIT * LARGER.get(name, 1)))
    return bounds
