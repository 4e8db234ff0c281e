"""A training on two hosts whose link is cut at random.

    python tests/link_cuts.py --cuts 50 --directory cuts --out benchmarks/results/link-cuts.json

The hosts are network namespaces of this machine, so it needs root. One training after the other is made to reach its
last step. Meanwhile a cable is pulled: at any moment, of either host, at either end, for seconds or until all have
ended. After each cut the training went on, or every process ended in time and said why in one line; then the same
commands go on with it. At the end of each training every step's loss is, bit for bit, that of a training to which
nothing happened. Exit code 1 where one of this is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from subprocess import Popen, TimeoutExpired
from typing import Any

from fault_helpers import JobDirectory, make_job_directory
from namespaces import Host, network, why_not

from longreach.framework import checkpoint
from longreach.launch.bench import environment

STEPS, EVERY = 80, 4
TIMEOUT = 10  # parallel.timeout, and that of the rendezvous, seconds
PATIENCE = 120  # seconds in which all has ended or gone on after a cut, beside the time-out
STARTING, SHORT = 1 / 3, 1 / 2  # the shares of cuts before the next step, and of those for seconds
LONGEST = 6.0  # seconds of a short cut
UNDISTURBED = 600  # seconds in which a training without cuts ends
PORT = 29500
KEYS = ("step", "loss", "grad_norm", "lr")
HUNG, ENDED, WENT_ON = "hung", "ended", "went on"


@dataclass
class Cut:
    """One cut: where, when and for how long (None: until all had ended), and what came of it."""

    host: int
    end: str
    step: int
    while_starting: bool
    seconds: float | None
    outcome: str = HUNG
    seconds_to_end: float | None = None
    said: list[str] = field(default_factory=list)
    lost_checkpoint: bool = False


@dataclass
class Cuts:
    """What happened so far."""

    hosts: Sequence[Host]
    job_dir: JobDirectory
    draw: random.Random
    found: list[Cut] = field(default_factory=list)
    finished: int = 0
    wrong: int = 0  # trainings with another loss than that to which nothing happened

    def start(self, run: str) -> list[Popen[str]]:
        words = ["-m", "longreach.launch.node", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", f"{self.hosts[0].address}:{PORT}", "--rdzv-conf", f"join_timeout={TIMEOUT}"]
        words += ["endless.yaml", f"run.dir={run}", f"train.steps={STEPS}", f"checkpoint.every={EVERY}"]
        words += [f"parallel.timeout={TIMEOUT}", "train.log_every=100"]
        return [host.start(*words, cwd=self.job_dir.directory) for host in self.hosts]

    def saved(self, run: str) -> int:
        newest = checkpoint.newest(self.job_dir.directory / run / "checkpoints")
        return 0 if newest is None else int(newest.name.removesuffix(".replaced").removeprefix("step-"))

    def training(self, run: str, reference: list[list[Any]], more: Callable[[], bool]) -> None:
        """Bring a training to its end, with cuts as long as there are to be more."""
        processes: list[Popen[str]] = []
        while self.saved(run) < STEPS:
            processes = processes or self.start(run)
            if more():
                self.cut(run, processes)
            ended, said = self.wait(processes, 0.0 if more() else UNDISTURBED)
            if ended:
                processes = []
            elif not more():
                raise TimeoutError(f"a training did not end without a cut: {said}")
        self.wait(processes, PATIENCE)
        rows = [[row[key] for key in KEYS] for row in self.job_dir.rows(run)]
        self.wrong += rows != reference
        self.finished += 1
        shutil.rmtree(self.job_dir.directory / run)

    def cut(self, run: str, processes: list[Popen[str]]) -> None:
        """Cut a link, at a moment drawn at random, and see what comes of it."""
        rows = len(self.job_dir.rows(run))
        starting = self.draw.random() < STARTING
        wanted, deadline = rows + (0 if starting else self.draw.randint(1, 12)), time.monotonic() + 120
        while len(self.job_dir.rows(run)) < wanted and time.monotonic() < deadline and not self.ended(processes):
            time.sleep(0.005)
        time.sleep(self.draw.random() * (20.0 if starting else 0.2))
        if self.ended(processes):
            return
        number, at = self.draw.randrange(2), self.draw.choice(["switch", "host"])
        seconds = self.draw.uniform(0.2, LONGEST) if self.draw.random() < SHORT else None
        one = Cut(number, at, len(self.job_dir.rows(run)), starting, None if seconds is None else round(seconds, 2))
        before, began = self.saved(run), time.monotonic()
        self.hosts[number].cut(at == "host")
        if seconds is not None:
            time.sleep(seconds)
            self.hosts[number].plug(at == "host")
        deadline, rows = time.monotonic() + TIMEOUT + PATIENCE, len(self.job_dir.rows(run))
        while time.monotonic() < deadline:
            ended, one.said = self.wait(processes, 0.2)
            if ended:
                one.outcome, one.seconds_to_end = ENDED, round(time.monotonic() - began, 1)
                break
            if seconds is not None and len(self.job_dir.rows(run)) > rows + 2:
                one.outcome = WENT_ON
                break
        self.hosts[number].plug(at == "host")
        if one.outcome == HUNG:
            for host in self.hosts:
                host.kill()
            one.said = self.wait(processes, PATIENCE)[1]
        one.lost_checkpoint = self.saved(run) < before
        self.found.append(one)
        print(json.dumps(asdict(one)), flush=True)

    def ended(self, processes: list[Popen[str]]) -> bool:
        return all(process.poll() is not None for process in processes)

    def wait(self, processes: list[Popen[str]], seconds: float) -> tuple[bool, list[str]]:
        """Whether all ended in time; and then the first line in which each said why it did."""
        deadline = time.monotonic() + seconds
        while not self.ended(processes):
            if time.monotonic() > deadline:
                return False, []
            time.sleep(0.02)
        said = []
        for process in processes:
            try:
                _, err = process.communicate(timeout=10)
            except (TimeoutExpired, ValueError):  # read before
                continue
            lines = [line for line in err.splitlines() if line.startswith("longreach: ")]
            said.append(lines[0] if lines else "" if process.returncode == 0 else f"no line: {err[-400:]}")
        return True, said


def is_named(line: str) -> bool:
    """Whether a line that ends a process says who was not reached, by rank or address."""
    return bool(re.search(r"rank \d|did not meet at|rendezvous = ", line)) or not line


def cut_links(hosts: Sequence[Host], directory: Path, cuts: int, seconds: float, seed: int) -> dict[str, Any]:
    """Cut links until there have been so many cuts, or so many seconds are over; what happened."""
    job_dir, began = make_job_directory(directory), time.monotonic()
    done = job_dir.train("reference", "parallel.ranks=2", f"train.steps={STEPS}", timeout=600)
    assert done.returncode == 0, done.stderr
    reference = [[row[key] for key in KEYS] for row in job_dir.rows("reference")]
    all_cuts = Cuts(hosts, job_dir, random.Random(seed))

    def more() -> bool:
        return len(all_cuts.found) < cuts and time.monotonic() - began < seconds

    while more():
        all_cuts.training(f"run-{all_cuts.finished}", reference, more)
    found = all_cuts.found
    to_end = [cut.seconds_to_end for cut in found if cut.seconds_to_end is not None]
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "timeout": TIMEOUT,
        "cuts": len(found),
        "for_seconds": sum(cut.seconds is not None for cut in found),
        "for_good": sum(cut.seconds is None for cut in found),
        "while_starting": sum(cut.while_starting for cut in found),
        "outcomes": dict(Counter(cut.outcome for cut in found)),
        "seconds_to_end": {"median": median(to_end), "largest": max(to_end)} if to_end else {},
        "trainings": all_cuts.finished,
        "steps_each": STEPS,
        "hangs": sum(cut.outcome == HUNG for cut in found),
        "lost_checkpoints": sum(cut.lost_checkpoint for cut in found),
        "wrong_losses": all_cuts.wrong,
        "not_named": sum(not is_named(line) for cut in found for line in cut.said),
        "each": [asdict(cut) for cut in found],
    }


def main() -> int:
    """Cut, print a table, and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=7200, help="cut nothing after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, required=True, help="where to work; must not exist")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/link-cuts.json"))
    options = parser.parse_args()
    if why := why_not():
        print(why, file=sys.stderr)
        return 2
    about = environment("cpu", os.cpu_count() or 1)
    options.directory.mkdir(parents=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends, too
    with network(2) as hosts:
        result = cut_links(hosts, options.directory, options.cuts, options.seconds, options.seed)
    options.out.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    for name, value in result.items():
        if name != "each":
            print(f"{name:18} {value}")
    return int(any(result[name] for name in ("hangs", "lost_checkpoints", "wrong_losses", "not_named")))


if __name__ == "__main__":
    sys.exit(main())
