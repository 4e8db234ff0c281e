"""Trainings under faults at random, for as long as one likes.

    python tests/soak.py --seconds 7200 --directory soaked --out benchmarks/results/soak.json

One training after the other is made to reach its last step, in an endless change of ranks, splits and ZeRO stages,
while it is killed, frozen, stopped, and its files are damaged. After each fault: it ended in time, said why in one
line, and a checkpoint is left from which it goes on. At the end of each training: every step's loss is that of a
training to which nothing happened.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_helpers import JobDirectory, make_job_directory, ranks_of
from programs import finish, start

from longreach.framework import checkpoint
from longreach.launch.bench import environment

STEPS, EVERY = 40, 4
TIMEOUT = 20  # parallel.timeout, seconds
PATIENCE = 90  # seconds in which a training ends after a fault, beside the time-out
TOLERANCE = 1e-4  # of a loss, relative: other ranks add up in another order
LAYOUTS = [
    ["parallel.ranks=1", "deepspeed=zero0"],
    ["parallel.ranks=1", "deepspeed=zero1"],
    ["parallel.ranks=2", "deepspeed=zero1"],
    ["parallel.ranks=2", "deepspeed=zero2", "parallel.sequence=1"],
    ["parallel.ranks=2", "deepspeed=zero3"],
]
QUIET = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1}  # how a process ends that could say nothing


@dataclass
class Soak:
    """What happened so far, and what must not have happened."""

    job_dir: JobDirectory
    draw: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    trainings: int = 0
    worst: float = 0.0  # relative difference of a loss

    def training(self, reference: list[float]) -> None:
        """Bring one training to its end."""
        run = f"run-{self.trainings}"
        while not self.done(run):
            before = self.saved(run)
            fault = self.draw.choice(FAULTS if before else FAULTS_BEFORE_A_SAVE)
            self.faults[fault.__name__] += 1
            least = fault(self, run)
            after = self.saved(run)
            assert after >= (before if least is None else least), (fault.__name__, before, after)
        rows = self.job_dir.rows(run)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), rows
        for row, expected in zip(rows, reference):
            self.worst = max(self.worst, abs(row["loss"] - expected) / expected)
        assert self.worst < TOLERANCE, self.worst
        shutil.rmtree(self.job_dir.directory / run)
        self.trainings += 1

    def saved(self, run: str) -> int:
        """The step from which a training would go on; 0 if it has saved nothing."""
        newest = checkpoint.newest(self.job_dir.directory / run / "checkpoints")
        return 0 if newest is None else int(newest.name.removesuffix(".replaced").removeprefix("step-"))

    def done(self, run: str) -> bool:
        return self.saved(run) == STEPS

    def start(self, run: str, *words: str) -> subprocess.Popen[str]:
        """Start a training, or go on with it, in a layout drawn at random."""
        layout = self.draw.choice(LAYOUTS)
        common = [f"run.dir={run}", f"train.steps={STEPS}", f"checkpoint.every={EVERY}", f"parallel.timeout={TIMEOUT}"]
        return start("-m", "longreach", "train", "endless.yaml", *common, *layout, *words, cwd=self.job_dir.directory)

    def running(self, run: str) -> subprocess.Popen[str]:
        """A training that has made a few steps, or has ended."""
        process, rows = self.start(run), len(self.job_dir.rows(run))
        wanted = rows + self.draw.randint(0, 10)
        deadline = time.monotonic() + 300
        while process.poll() is None and len(self.job_dir.rows(run)) <= wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(self.draw.random() * 0.2)
        return process

    def end(self, process: subprocess.Popen[str], patience: float = PATIENCE) -> None:
        """Wait for a training; it says why it ended, if it could."""
        done = finish(process, patience)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in {0, *QUIET} or "longreach: " in done.stderr, (done.returncode, done.stderr)

    def newest(self, run: str) -> Path:
        newest = checkpoint.newest(self.job_dir.directory / run / "checkpoints")
        assert newest is not None
        return newest

    def older(self, run: str) -> int:
        """The step of the checkpoint before the newest; -1 if there is none."""
        return sorted([-1, *(int(name.removeprefix("step-")) for name in self.job_dir.checkpoints(run))])[-2]

    def damage(self, run: str, change: Callable[[Path], None]) -> int:
        """Damage a file of the newest checkpoint, if there is an older one, then train on from that."""
        older = self.older(run)
        if older >= 0:
            change(self.draw.choice(sorted(path for path in self.newest(run).iterdir() if path.is_file())))
        process = self.start(run, "train.time_limit=3")
        self.end(process, 300)
        return max(older, 0)


def a_rank_is_killed(soak: Soak, run: str) -> None:
    process = soak.running(run)
    ranks = ranks_of(process) or [process.pid]
    signal_to(soak.draw.choice(ranks), signal.SIGKILL)
    soak.end(process)


def all_are_killed(soak: Soak, run: str) -> None:
    process = soak.running(run)
    for number in [*ranks_of(process), process.pid]:
        signal_to(number, signal.SIGKILL)
    soak.end(process)


def a_rank_is_frozen(soak: Soak, run: str) -> None:
    process = soak.running(run)
    frozen = ranks_of(process)
    if len(frozen) > 1:
        signal_to(soak.draw.choice(frozen), signal.SIGSTOP)
    else:
        process.send_signal(signal.SIGTERM)
    soak.end(process, TIMEOUT + PATIENCE)


def a_signal_asks(soak: Soak, run: str) -> None:
    process = soak.running(run)
    target = soak.draw.choice([process.pid, *ranks_of(process)])
    signal_to(target, soak.draw.choice([signal.SIGTERM, signal.SIGUSR1]))
    soak.end(process)


def the_time_is_over(soak: Soak, run: str) -> None:
    soak.end(soak.start(run, "train.time_limit=2"), 300)


def a_second_run_is_started(soak: Soak, run: str) -> None:
    process = soak.running(run)
    other = finish(soak.start(run), 300)
    assert other.returncode in (0, 2), other.stderr  # the first one may have ended before
    soak.end(process, 300)


def a_bit_is_flipped(soak: Soak, run: str) -> int:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[soak.draw.randrange(len(content))] ^= 1 << soak.draw.randrange(8)
        file.write_bytes(content)

    return soak.damage(run, flip)


def a_file_is_cut(soak: Soak, run: str) -> int:
    return soak.damage(run, lambda file: os.truncate(file, soak.draw.randrange(file.stat().st_size)))


def a_file_is_lost(soak: Soak, run: str) -> int:
    return soak.damage(run, Path.unlink)


def the_pointer_is_damaged(soak: Soak, run: str) -> None:
    pointer = soak.job_dir.directory / run / "checkpoints" / checkpoint.LATEST
    pointer.write_bytes(soak.draw.choice([b"", b"\xff\xfe", b"step-99999999\n", b"../../packed\n"]))
    soak.end(soak.start(run, "train.time_limit=2"), 300)


def a_shard_is_cut(soak: Soak, run: str) -> None:
    shard = soak.job_dir.directory / "packed" / "train-00000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: soak.draw.randrange(len(content))])
    try:
        done = finish(soak.start(run), 300)
        assert done.returncode == 2 and "train-00000.tar" in done.stderr, done.stderr
    finally:
        shard.write_bytes(content)


def signal_to(number: int, what: signal.Signals) -> None:
    """Signal a process that may have gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, what)


FAULTS_BEFORE_A_SAVE: list[Callable[[Soak, str], int | None]] = [
    a_rank_is_killed, all_are_killed, a_rank_is_frozen, a_signal_asks, the_time_is_over, a_second_run_is_started,
    a_shard_is_cut,
]  # fmt: skip
FAULTS = [
    *FAULTS_BEFORE_A_SAVE, a_bit_is_flipped, a_file_is_cut, a_file_is_lost, the_pointer_is_damaged,
]  # fmt: skip


def soak(directory: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Let faults happen for so many seconds; what happened.

    Raises:
        AssertionError, TimeoutError: something was lost, hung, or went wrong in silence.
    """
    job_dir, began = make_job_directory(directory), time.monotonic()
    done = job_dir.train("reference", f"train.steps={STEPS}", timeout=600)
    assert done.returncode == 0, done.stderr
    reference = [row["loss"] for row in job_dir.rows("reference")]
    soaked = Soak(job_dir, random.Random(seed))
    while time.monotonic() - began < seconds:
        soaked.training(reference)
        said = {"seconds": round(time.monotonic() - began), "trainings": soaked.trainings}
        print(json.dumps({**said, "faults": soaked.faults.total()}), flush=True)
    return {
        "seconds": round(time.monotonic() - began),
        "seed": seed,
        "trainings": soaked.trainings,
        "steps_each": STEPS,
        "faults": dict(sorted(soaked.faults.items())),
        "faults_in_all": soaked.faults.total(),
        "largest_relative_difference_of_a_loss": soaked.worst,
    }


def main() -> None:
    """Soak, and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, required=True, help="where to work; must not exist")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak.json"))
    options = parser.parse_args()
    about = environment("cpu", os.cpu_count() or 1)
    options.directory.mkdir(parents=True)
    result = {**soak(options.directory, options.seconds, options.seed), **about}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
