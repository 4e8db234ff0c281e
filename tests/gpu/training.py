"""Training on one rank: lm-125m's steps, resuming, ZeRO's stages, torch.compile, and a rank that torchrun starts."""

from __future__ import annotations

import gc
import gzip
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from findings import Findings
from host_reads import HostReads
from torch import nn

from longreach.framework import trainer
from longreach.framework.config import load
from longreach.framework.data import pack
from longreach.launch.bench import median

ROOT = Path(__file__).resolve().parents[2]
PEAK = 989e12  # bf16 FLOP/s of an H100 or H200 (SXM) without sparsity, by NVIDIA's data sheet
RANKS_SECONDS = 45.0  # after which torchrun is ended
WARM_UP, TIMED = 2, 5  # steps; one more is traced
SMALL = ("model.width=32", "model.depth=2", "model.elementwise.norm_group=8", "model.chela.heads=1", "data.seq_len=256")
QUIET = ("monitor.tensorboard=false", "monitor.plot=false", "monitor.sample_len=0", "train.log_every=1000")
BRIEF = ("train.validate_every=0", "train.validate_batches=1", "checkpoint.every=0", "optim.warmup_steps=1")


def run_steps(findings: Findings) -> None:
    """Steps of lm-125m over 131,072 tokens: tokens a second, memory, waits for the device, and a trace."""
    changes = ["train.recompute=false"]
    with tempfile.TemporaryDirectory() as directory:
        while True:
            try:
                _steps(findings, Path(directory), changes)
                return
            except torch.OutOfMemoryError as error:
                if findings.data.get("out_of_memory"):
                    raise
                findings.data["out_of_memory"] = str(error)[:300]
            gc.collect()
            torch.cuda.empty_cache()
            changes = ["train.recompute=true"]  # a further try, with less memory
            shutil.rmtree(f"{directory}/run", ignore_errors=True)


def _steps(findings: Findings, directory: Path, changes: list[str]) -> None:
    steps, parameters = WARM_UP + TIMED + 1, 0
    waits: list[Counter[str]] = []
    step = trainer.train_step

    def watched(*args: Any) -> dict[str, float]:
        nonlocal parameters
        parameters = sum(p.numel() for p in args[1].module.parameters())
        if not WARM_UP <= len(waits) < WARM_UP + TIMED:
            waits.append(Counter())
            return step(*args)
        with host_waits(findings.device) as places:
            metrics = step(*args)
        waits.append(places)
        return metrics

    changes = [*changes, f"monitor.profile_steps=[{steps},{steps}]"]
    with mock.patch.object(trainer, "train_step", watched):
        rows = train(findings, directory, "run", steps, *changes)
    timed = rows[WARM_UP : WARM_UP + TIMED]
    tokens_per_second = median([row["tokens_per_second"] for row in timed])
    counts = [sum(places.values()) for places in waits[WARM_UP : WARM_UP + TIMED]]
    findings.data |= {
        "config": "lm-125m",
        "changes": changes,
        "parameters": parameters,
        "tokens": 256 if findings.small else 131_072,
        "losses": [row["loss"] for row in rows],
        "step_seconds": [row["step_seconds"] for row in rows],
        "parts": {
            name: median([row[name] for row in timed])
            for name in ("compute_seconds", "exchange_seconds", "zero_seconds", "optimizer_seconds")
        },
        "tokens_per_second": tokens_per_second,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
        "flops_per_second": 6 * parameters * tokens_per_second,
        "peak_flops_per_second": PEAK,
        "share_of_peak": 6 * parameters * tokens_per_second / PEAK,
        "share_of_peak_counts": "6 operations per parameter and token; the mixers' own are not counted",
        "waits": counts,
        "places": dict(sum(waits, Counter()).most_common()),
    }
    findings.check(all(map(math.isfinite, findings.data["losses"])), f"losses {findings.data['losses']}")
    findings.check(max(counts) <= 2, f"a step waits for the device {max(counts)} times; wanted at most 2")
    _keep_trace(findings, directory / "run")


def _keep_trace(findings: Findings, run_dir: Path) -> None:
    """Copy the trace to the results, and sum up its kernels."""
    (trace,) = (run_dir / "profile").glob("*.json.gz")
    kept = findings.path.parent / "trace.json.gz"
    shutil.copyfile(trace, kept)
    events = json.loads(gzip.decompress(kept.read_bytes()))["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    seconds: Counter[str] = Counter()
    for event in kernels:
        seconds[event["name"][:120]] += event["dur"] / 1e6
    findings.data["trace"] = {
        "file": kept.name,
        "bytes": kept.stat().st_size,
        "launches": len(kernels),
        "kernel_seconds": sum(seconds.values()),
        "longest": dict(seconds.most_common(25)),
    }


def run_variants(findings: Findings) -> None:
    """Two blocks: the same losses after an interruption and by every ZeRO stage, close ones by torch.compile."""
    exact, close = (1e-6, 1e-4) if findings.small else (1e-3, 1e-2)  # bf16 on a GPU, whose sums are of no fixed order
    changes = ["model.depth=2", *_shorter(findings)]
    if findings.small:  # a GPU's code takes minutes of a CPU; what the graphs compute is the same
        nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as directory:

        def losses(name: str, steps: int, *more: str) -> list[float]:
            started = time.monotonic()
            schedule = "optim.schedule_steps=4"
            found = [row["loss"] for row in train(findings, Path(directory), name, steps, schedule, *changes, *more)]
            findings.add({"run": name, "steps": steps, "losses": found, "seconds": time.monotonic() - started})
            return found

        def compare(name: str, found: Callable[[], list[float]], limit: float) -> None:
            try:
                difference = max(abs(a - b) / abs(b) for a, b in zip(found(), whole))
            except Exception as error:
                findings.check(False, f"{name}: {type(error).__name__}: {error}"[:2000])
                return
            row = {"comparison": name, "largest_difference": difference, "limit": limit}
            findings.add(row, "comparisons")
            findings.check(difference <= limit, f"{name}: losses differ by {difference:.1e}, wanted <= {limit:g}")

        def resumed() -> list[float]:
            losses("saved", 2)
            return losses("saved", 4)

        whole = losses("whole", 4)
        compare("saved and resumed", resumed, exact)
        for stage in (2, 3):
            compare(f"zero{stage}", lambda stage=stage: losses(f"zero{stage}", 2, f"deepspeed=zero{stage}"), exact)
        compare("compiled", lambda: losses("compiled", 2, "train.compile=true"), close)


def run_ranks(findings: Findings) -> None:
    """Collectives of a group of one rank (NCCL on a GPU), and two steps of a rank that torchrun starts."""
    backend = "nccl" if findings.device == "cuda" else "gloo"
    findings.data = {"backend": backend}
    if backend == "nccl":
        findings.data["version"] = ".".join(map(str, torch.cuda.nccl.version()))
    with tempfile.TemporaryDirectory() as directory:
        method, timeout = f"file://{directory}/store", timedelta(seconds=30)
        dist.init_process_group(backend, init_method=method, rank=0, world_size=1, timeout=timeout)
        try:
            _collectives(findings)
        finally:
            dist.destroy_process_group()
        changes = config(findings, Path(directory), "ranks", 2, "model.depth=2", *_shorter(findings))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        words = [*launcher, "--nproc-per-node", "1", "-m", "longreach.launch.train", "lm-125m", *changes]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                said = process.communicate(timeout=RANKS_SECONDS)[1]
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun then ends its rank, which is in another session
                said = process.communicate()[1]
        findings.check(process.returncode == 0, f"torchrun ended with {process.returncode}: {said.strip()[-1500:]}")
        if process.returncode == 0:
            findings.data["losses"] = [row["loss"] for row in metrics_of(Path(directory) / "ranks")]
            findings.check(len(findings.data["losses"]) == 2, "two steps were wanted")


def _shorter(findings: Findings) -> list[str]:
    return [] if findings.small else ["data.seq_len=16384"]


def _collectives(findings: Findings) -> None:
    x = torch.arange(1024.0, device=findings.device)
    runs: dict[str, Callable[[torch.Tensor], Any]] = {
        "all_reduce": dist.all_reduce,
        "broadcast": lambda y: dist.broadcast(y, 0),
        "all_gather": lambda y: dist.all_gather([y], y.clone()),
        "barrier": lambda y: dist.barrier(),
    }
    if findings.device == "cuda":
        runs["reduce_scatter"] = lambda y: dist.reduce_scatter(y, [y.clone()])
    for name, run in runs.items():
        y = x.clone()
        started = time.monotonic()
        run(y)
        equal = y.equal(x)  # here the host waits
        findings.add({"collective": name, "seconds": time.monotonic() - started, "equal": equal}, "collectives")
        findings.check(equal, f"{name} of one rank changes what it is given")


def train(findings: Findings, directory: Path, name: str, steps: int, *changes: str) -> list[dict[str, Any]]:
    """Train in this process; returns the rows of the run's metrics."""
    trainer.train(load("lm-125m", config(findings, directory, name, steps, *changes)))
    return metrics_of(directory / name)


def config(findings: Findings, directory: Path, name: str, steps: int, *changes: str) -> list[str]:
    """What a run changes of lm-125m: one rank, generated texts, nothing but the steps."""
    source = directory / "words"
    if not source.exists():
        (directory / "texts").mkdir()
        for number, text in enumerate(_texts(1 << 15 if findings.small else 1 << 22)):
            (directory / "texts" / f"{number:03}.txt").write_text(text, encoding="ascii")
        pack(str(directory / "texts"), source, name="words", valid_fraction=0.1)
    paths = f"data.source={source}", f"run.dir={directory / name}"
    size = (*SMALL, "train.threads=1", "train.precision=fp32") if findings.small else ()
    one = ("parallel.ranks=1", "data.batch_size=1", "data.workers=0", f"train.steps={steps}")
    return [*paths, *size, *one, *QUIET, *BRIEF, *changes]


def _texts(num_bytes: int) -> Iterator[str]:
    """16 documents of few words."""
    draw, words = random.Random(0), ["span", "carry", "halo", "scan", "relay", "past", "future", "piece"]
    for _ in range(16):
        yield " ".join(draw.choices(words, k=num_bytes // 16 // 6))


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def host_waits(device: str) -> Iterator[Counter[str]]:
    """Counts the places within it at which the host waits for the device; on a CPU, where it would by `HostReads`."""
    places: Counter[str] = Counter()
    if device == "cpu":
        with HostReads() as reads:
            yield places
        places.update(reads.places)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        show = warnings.showwarning

        def note(message: Any, category: Any, filename: str, line: int, *rest: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                places[_place(traceback.extract_stack()[:-1]) or f"{filename}:{line}"] += 1
            else:
                show(message, category, filename, line, *rest)

        with mock.patch.object(warnings, "showwarning", note):
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode("default")


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frames of this project and of DeepSpeed."""
    here = Path(__file__).name
    folders = (str(ROOT), "/longreach/", "/deepspeed/")
    frames = [f for f in reversed(stack) if any(x in f.filename for x in folders) and "/torch/" not in f.filename]
    return " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in frames if here not in f.filename)
