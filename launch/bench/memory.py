"""`longreach bench memory`: peak memory of a training step against the length of its sequence, by three methods.

``softmax`` is softmax attention over the whole sequence, ``whole`` the quickstart's model over the whole sequence, and
``streamed`` the same model block by block. Each trial is a real `longreach train` of one step in a process of its own.
Then `longreach evaluate` reads a file of the greatest length, and `longreach generate` a prompt of that length.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from ...framework.runtime.machine import Machine
from . import Bound, check_out, cpu_only, environment, last_line, report_bounds, table_header, table_line, write_report

if TYPE_CHECKING:
    import torch

SHORTEST = 8192  # tokens of the first trial; each further one has twice as many
LONGEST = 2**20
BLOCK_LEN = 16_384  # tokens of a streamed block
FITTED_FROM = 8  # blocks: from here on, the allocator has reached its steady state
REPEATS = 3  # of the trials to which growth is fitted: the peak of the same step varies by some percent
METHODS = {
    "softmax": ["model.mixers=[softmax]"],
    "whole": [],
    "streamed": ["parallel.block_len={block_len}"],
}
START_SECONDS = 60.0  # that a trial may take beside its step
STREAMED_SECONDS = 3600.0  # that a streamed trial may take
COMPARED = (16_384, 4096)  # for the comparison of gradients: tokens of the sequence, and of a block
DATA_BYTES = 16  # per token: its id and its label, int64 each, which every method holds
GROWTH_LIMIT = 64.0  # bytes per token and layer
PEAK_LIMIT = 3 * 2**30  # bytes, at LONGEST tokens
AGREEMENT = 1e-5  # of loss and gradient norm, relative
READ_SECONDS = 3600.0  # that reading a file or a prompt may take
READING_HEADER = table_header(["command", "tokens read", "peak memory", "seconds", "lines of progress"])
HEADER = table_header(["way", "tokens", "peak memory", "seconds of the step", "loss", "gradient norm"])


@dataclass(frozen=True)
class Trial:
    """One training step over one sequence.

    Attributes:
        way: a name in `METHODS`.
        tokens: length of the sequence.
        memory_bytes: peak resident memory of the process.
        seconds: of the step.
        loss, grad_norm: of the step.
    """

    way: str
    tokens: int
    memory_bytes: float
    seconds: float
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Reading:
    """A trained model reads one long file.

    Attributes:
        command: "evaluate", or "generate", whose prompt it is.
        tokens: bytes of the file.
        memory_bytes: peak resident memory of the process.
        seconds: of the process.
        progress: lines of progress that it printed.
    """

    command: str
    tokens: int
    memory_bytes: float
    seconds: float
    progress: int


@dataclass(frozen=True)
class Limits:
    """What a trial may take: seconds of its step, and bytes of resident memory."""

    seconds: float
    memory_bytes: float


def overrides(way: str, tokens: int, packed: Path, threads: int) -> list[str]:
    """The overrides that make the config ``quickstart`` a trial."""
    return [
        f"data.source={packed}",
        f"data.seq_len={tokens}",
        "data.valid_fraction=0",
        "parallel.ranks=1",
        "parallel.sequence=1",
        "optim.warmup_steps=0",
        "train.steps=1",
        f"train.threads={threads}",
        "train.validate_every=0",
        "monitor.sample_len=0",
        "monitor.plot=false",
        "monitor.tensorboard=false",
        *(word.format(block_len=BLOCK_LEN) for word in METHODS[way]),
    ]


def trial(way: str, tokens: int, packed: Path, threads: int, limits: Limits) -> Trial | str:
    """Train one step; returns what it ran out of, "time" or "memory", if it did.

    Raises:
        InputError: it failed in another way.
    """
    with tempfile.TemporaryDirectory() as directory:
        run_dir, log = Path(directory) / "run", Path(directory) / "log"
        words = ["train", "quickstart", f"run.dir={run_dir}", *overrides(way, tokens, packed, threads)]
        with open(log, "wb") as file:
            command = [sys.executable, "-m", "longreach", *words]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=cpu_only())
        exceeded = watch(process, limits)
        if exceeded:
            return exceeded
        if process.returncode == -signal.SIGKILL:
            return "memory"  # the kernel kills a process that takes too much
        if process.returncode:
            what = f"exit code of the trial {way}, {tokens} tokens"
            raise InputError(what, process.returncode, f"must be 0; it said: {last_line(log)}")
        row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    if row["step_seconds"] > limits.seconds:
        return "time"
    if row["peak_memory_bytes"] > limits.memory_bytes:
        return "memory"
    return Trial(way, tokens, row["peak_memory_bytes"], row["step_seconds"], row["loss"], row["grad_norm"])


def readings(source: Path, packed: Path, threads: int) -> Iterator[Reading]:
    """``longreach evaluate`` of a file and ``longreach generate`` with it as the prompt, by a model after one step.

    Raises:
        InputError: one of them failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        run_dir, log = Path(directory) / "run", Path(directory) / "log"
        commands = {
            "train": ["quickstart", f"run.dir={run_dir}", *overrides("whole", SHORTEST, packed, threads)],
            "evaluate": [str(run_dir), "--source", str(source)],
            "generate": [str(run_dir), "--prompt", f"@{source}", "--tokens", "8"],
        }
        for command, words in commands.items():
            started = time.monotonic()
            with open(log, "wb") as file:
                whole = [sys.executable, "-m", "longreach", command, *words]
                process = subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=file, env=cpu_only())
                peak = _peak(process)
            if process.returncode:
                raise InputError(f"exit code of {command}", process.returncode, f"must be 0; it said: {last_line(log)}")
            if command != "train":
                lines = sum(line.startswith("reading ") for line in log.read_text().splitlines())
                yield Reading(command, source.stat().st_size, peak, time.monotonic() - started, lines)


def _peak(process: subprocess.Popen[bytes]) -> float:
    """Wait until a process ends; returns its peak resident memory in bytes."""
    peak, deadline = 0, time.monotonic() + READ_SECONDS
    try:
        while process.poll() is None and time.monotonic() < deadline:
            peak = max(peak, Machine().resident_memory(process.pid, peak=True) or 0)
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    return peak


def watch(process: subprocess.Popen[bytes], limits: Limits) -> str:
    """Wait until a process ends, or end it at a limit; returns what it ran out of, or an empty string."""
    deadline = time.monotonic() + limits.seconds + START_SECONDS
    try:
        while True:
            try:
                process.wait(timeout=0.1)
                return ""
            except subprocess.TimeoutExpired:
                pass
            if time.monotonic() > deadline:
                return "time"
            if (Machine().resident_memory(process.pid) or 0) > limits.memory_bytes:
                return "memory"
    finally:
        process.kill()  # does nothing if the process has ended
        process.wait()


def trials(way: str, lengths: Sequence[int], packed: Path, threads: int, limits: Limits) -> Iterator[Trial | str]:
    """A trial of each length; the first that runs out of time or memory is the last one.

    Of the streamed lengths to which growth is fitted, the trial with the median memory of `REPEATS`.
    """
    for tokens in lengths:
        repeats = REPEATS if way == "streamed" and tokens >= FITTED_FROM * BLOCK_LEN else 1
        several = [trial(way, tokens, packed, threads, limits) for _ in range(repeats)]
        exceeded = [one for one in several if isinstance(one, str)]
        good = sorted((one for one in several if isinstance(one, Trial)), key=lambda one: one.memory_bytes)
        done = exceeded[0] if exceeded else good[len(good) // 2]
        if isinstance(done, Trial):
            print(as_line(done), flush=True)
        else:
            print(table_line([way, f"{tokens:,}", f"out of {done}", "", "", ""]), flush=True)
        yield done
        if not isinstance(done, Trial):
            return


def random_text(seed: int, num_bytes: int) -> bytes:
    """So many random printable ASCII characters."""
    return random.Random(seed).randbytes(num_bytes).translate(bytes(32 + byte % 95 for byte in range(256)))


def pack_corpus(directory: Path, num_bytes: int) -> Path:
    """A packed corpus of random text from a fixed seed, one document."""
    source, packed = directory / "corpus.txt", directory / "packed"
    source.write_bytes(random_text(0, num_bytes))
    # In a process of its own: the peak of this one is where those of its trials would begin.
    command = [sys.executable, "-m", "longreach", "pack", str(source), str(packed), "--valid-fraction", "0"]
    subprocess.run(command, stdout=subprocess.DEVNULL, timeout=600, check=True)
    return packed


def growth(done: Sequence[Trial], depth: int) -> float:
    """Bytes per token and layer by which memory grows, without the data, over the lengths from `FITTED_FROM` blocks on.

    The slope of a least-squares line; NaN for fewer than two lengths.
    """
    points = [(one.tokens, one.memory_bytes) for one in done if one.tokens >= FITTED_FROM * BLOCK_LEN]
    if len(points) < 2:
        return math.nan
    x0, y0 = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)
    return (slope - DATA_BYTES) / depth


def agreement(whole: Sequence[Trial], streamed: Sequence[Trial]) -> dict[str, float]:
    """Relative differences of loss and gradient norm at the longest length that both trained.

    Empty if there is none of two blocks or more.
    """
    by_length = {one.tokens: one for one in streamed}
    shared = [(one, by_length[one.tokens]) for one in whole if one.tokens in by_length and one.tokens > BLOCK_LEN]
    if not shared:
        return {}
    a, b = shared[-1]
    return {
        "tokens": a.tokens,
        "loss": abs(a.loss - b.loss) / abs(a.loss),
        "grad_norm": abs(a.grad_norm - b.grad_norm) / a.grad_norm,
    }


def gradient_errors(tokens: int, block_len: int, dtype: torch.dtype) -> dict[str, float]:
    """Relative RMS difference of each parameter's gradient, streamed against whole; the quickstart's model, two
    documents in the sequence.

    Args:
        tokens: length of the sequence.
        block_len: tokens of a block.
        dtype: of the model.
    """
    import torch

    from ...framework.config import load
    from ...framework.model import build_model
    from ...parallel import streaming
    from ...parallel.mesh import Mesh
    from ...parallel.span import Span

    torch.manual_seed(0)
    model = build_model(load("quickstart", ["model.vocab=256"]).model).to(dtype)
    text = torch.randint(0, 256, (1, tokens + 1))
    ids, labels = text[:, :-1], text[:, 1:]
    segments = (torch.arange(tokens).unsqueeze(0) >= tokens * 2 // 5).long()

    def loss(span: Span) -> torch.Tensor:
        nll, _ = model(span.shard(ids), span=span, labels=span.shard(labels))
        return nll.sum() / tokens

    def advance(span: Span) -> None:
        model(span.shard(ids), span=span, head=False)

    found = []
    for size in (0, block_len):
        model.zero_grad()
        spans = streaming.blocks(Mesh(), tokens, size, segments=segments)
        streaming.train(spans, advance, loss, torch.Tensor.backward)
        found.append([p.grad.double() for p in model.parameters() if p.grad is not None])
    names = [name for name, _ in model.named_parameters()]
    return {name: float((a - b).norm() / a.norm()) for name, a, b in zip(names, *found, strict=True)}


def as_line(one: Trial) -> str:
    """A row of the Markdown table."""
    gib = f"{one.memory_bytes / 2**30:.2f} GiB"
    return table_line(
        [one.way, f"{one.tokens:,}", gib, f"{one.seconds:.1f}", f"{one.loss:.6f}", f"{one.grad_norm:.6f}"]
    )


def plot(done: dict[str, list[Trial]], path: Path, title: str) -> None:
    """Plot peak memory against length, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for way, some in done.items():
        axes.loglog([one.tokens for one in some], [one.memory_bytes / 2**30 for one in some], marker="o", label=way)
    axes.axhline(PEAK_LIMIT / 2**30, color="grey", linestyle=":", label=f"wanted below, at {LONGEST:,} tokens")
    axes.set(xlabel="tokens", ylabel="peak memory of a training step, GiB", title=title)
    lengths = sorted({one.tokens for some in done.values() for one in some})
    axes.set_xticks(lengths, [f"{tokens / 1024:g}k" for tokens in lengths])
    axes.set_xticks([], minor=True)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def run(out: Path, threads: int = 0, longest: int = LONGEST, seconds: float = 300.0, memory_gib: float = 12.0) -> int:
    """Train a step at every length; writes ``memory-cpu.json`` and ``.png`` into ``out``.

    Args:
        out: directory of the results.
        threads: number of CPU threads; 0 takes all.
        longest: tokens of the longest streamed trial.
        seconds: limit of a step that is not streamed; a method ends with its first trial that takes more.
        memory_gib: limit of the resident memory of such a trial.

    Returns:
        The exit code: 1 where a bound does not hold.
    """
    least = 2 * FITTED_FROM * BLOCK_LEN
    if longest < least:
        raise InputError(
            "--longest", longest, f"at least {least}: growth is fitted to two lengths of {FITTED_FROM} blocks or more"
        )
    check_out(out)
    threads = threads or len(os.sched_getaffinity(0))
    where = environment("cpu", threads)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    lengths = [SHORTEST << n for n in range((longest // SHORTEST).bit_length())]
    others, streamed = Limits(seconds, memory_gib * 2**30), Limits(STREAMED_SECONDS, math.inf)
    print(HEADER)
    done: dict[str, list[Trial]] = {}
    stopped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        packed = pack_corpus(Path(directory), 2 * longest)
        for way in METHODS:
            done[way] = []
            for one in trials(way, lengths, packed, threads, streamed if way == "streamed" else others):
                if isinstance(one, Trial):
                    done[way].append(one)
                else:
                    stopped[way] = one
        source = Path(directory) / "long.txt"
        source.write_bytes(random_text(1, longest))
        print(READING_HEADER)
        read = []
        for reading in readings(source, packed, threads):
            read.append(reading)
            gib = f"{reading.memory_bytes / 2**30:.2f} GiB"
            words = [reading.command, f"{reading.tokens:,}", gib, f"{reading.seconds:.1f}", reading.progress]
            print(table_line(words), flush=True)
    bounds, found = _bounds(done, longest, threads)
    for reading in read:
        what = f"{reading.command}, bytes at {reading.tokens:,} tokens"
        bounds.append(Bound(what, reading.memory_bytes, "<", float(PEAK_LIMIT)))
    report = {
        "command": f"longreach bench memory --longest {longest} --seconds {seconds:g} --memory-gib {memory_gib:g}",
        "environment": where,
        "block_len": BLOCK_LEN,
        "rows": [asdict(one) for some in done.values() for one in some],
        "ran_out_of": stopped,
        "readings": [asdict(reading) for reading in read],
        **found,
        "bounds": [bound.as_json() for bound in bounds],
    }
    path = out / "memory-cpu.json"
    write_report(report, path)
    plot(done, path.with_suffix(".png"), where["device"])
    print(f"written: {path}, {path.with_suffix('.png')}")
    return report_bounds(bounds)


def _bounds(done: dict[str, list[Trial]], longest: int, threads: int) -> tuple[list[Bound], dict[str, object]]:
    """The limits that the trials should keep, and further figures for the report."""
    import torch

    from ...framework.config import load

    torch.set_num_threads(threads)
    streamed = done["streamed"]
    grown, agreed = growth(streamed, load("quickstart").model.depth), agreement(done["whole"], streamed)
    bounds = [Bound("streamed, bytes a token and layer beyond 16 of data a token", grown, "<", GROWTH_LIMIT)]
    if longest >= LONGEST:
        at = next((one.memory_bytes for one in streamed if one.tokens == LONGEST), math.nan)
        bounds.append(Bound(f"streamed, bytes at {LONGEST:,} tokens", at, "<", float(PEAK_LIMIT)))
    where = f"at {agreed['tokens']:,} tokens" if agreed else f"(none of more than {BLOCK_LEN:,} tokens ran)"
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        what = f"{name}, whole and streamed {where}, relative difference"
        bounds.append(Bound(what, agreed.get(key, math.nan), "<=", AGREEMENT))
    errors = {}
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        name = str(dtype).removeprefix("torch.")
        errors[name] = gradient_errors(*COMPARED, dtype)
        what = f"gradient of any parameter, whole and streamed, {name}, relative difference"
        bounds.append(Bound(what, max(errors[name].values(), key=lambda x: (math.isnan(x), x)), "<=", limit))
    figures = {
        "growth_bytes_per_token_and_layer": grown,
        "whole_against_streamed": agreed,
        "gradient_errors": errors,
    }
    return bounds, figures
