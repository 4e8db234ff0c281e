"""Where the tests of faults start, watch and end trainings."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from programs import finish, longreach, start

World = list[subprocess.Popen[str]]
MISTAKE, FAILED = 2, 1  # exit codes
CONFIG = """
model: {width: 16, depth: 2, mixers: [elementwise, chela], chela: {heads: 2, modes: 2}}
data: {source: packed, seq_len: 65, batch_size: 2}
optim: {lr: 1.0e-2, warmup_steps: 1, schedule_steps: 1000000}
train: {steps: 1000000, threads: 1}
monitor: {tensorboard: false, plot: false}
"""


def make_job_directory(directory: Path) -> JobDirectory:
    """A small corpus that the program packed, and a config that trains on it for ever."""
    draw = random.Random(0)
    (directory / "source").mkdir()
    for number in range(20):
        text = " ".join(draw.choice(["span", "carry", "halo", "scan", "relay"]) for _ in range(120))
        (directory / "source" / f"{number:02}.txt").write_text(text)
    (directory / "endless.yaml").write_text(CONFIG)
    done = longreach("pack", "source", "packed", "--valid-fraction", "0.1", cwd=directory)
    assert done.returncode == 0, done.stderr
    return JobDirectory(directory)


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A small file system."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@dataclass
class JobDirectory:
    """A directory with ``packed/`` and ``endless.yaml``, in which runs are started."""

    directory: Path

    def train(self, run: str, *words: str, timeout: float = 120.0) -> CompletedProcess[str]:
        """Run ``longreach train`` to its end."""
        return longreach("train", "endless.yaml", f"run.dir={run}", *words, cwd=self.directory, timeout=timeout)

    def pack(self, source: str, out: str, *words: str) -> CompletedProcess[str]:
        """Run ``longreach pack`` to its end."""
        return longreach("pack", source, out, *words, cwd=self.directory)

    @contextmanager
    def training(self, run: str, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A training that has made steps; ended on the way out, if nothing else has."""
        process = start("-m", "longreach", "train", "endless.yaml", f"run.dir={run}", *words, cwd=self.directory)
        try:
            self.wait(process, lambda: len(self.rows(run)) >= 2)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    def wait(self, process: subprocess.Popen[str], until: Callable[[], bool], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(finish(process, 30.0))
            time.sleep(0.02)

    def rows(self, run: str) -> list[dict[str, Any]]:
        path = self.directory / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []

    def checkpoints(self, run: str) -> list[str]:
        return sorted(path.name for path in (self.directory / run / "checkpoints").glob("step-*"))


def world(
    job_dir: JobDirectory, words: Sequence[str], ranks: int = 2, program: str = "", port: str = "", **more: str
) -> World:
    """Processes that a launcher would make: ``ranks`` of them, or those that are named in RANK.

    Args:
        program: a script in the job's directory, in place of ``-m longreach.launch.train``.
        port: of the first rank; a free one if none is given.
        more: of the environment.
    """
    processes, port = [], port or free_port()
    for rank in range(ranks) if "RANK" not in more else [int(more["RANK"])]:
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        given = {key: str(value) for key, value in launcher.items()}
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
        start_it = f"runpy.run_path({program!r}, run_name='__main__')" if program else "main()"
        code = f"import os, sys, runpy; os.environ.update({given!r}); sys.argv[1:] = {list(words)!r}; "
        code += "from longreach.launch.train import main; " + start_it
        processes.append(start("-c", code, cwd=job_dir.directory))
    return processes


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that a process started, from /proc; none if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []


def kill_all(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started, at once."""
    for number in [process.pid, *ranks_of(process)]:
        os.kill(number, signal.SIGKILL)


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def error_line(done: CompletedProcess[str], *words: str) -> str:
    """The one line of the program's own that says why it ended."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("longreach: ")]
    assert lines and "Traceback" not in done.stderr, done.stderr
    assert all(word in lines[0] for word in words), lines
    return lines[0]


def files_below(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by path, with what it holds."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
