"""Runs programs as a user does: real processes, each in a directory of its choice and with a time-out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Job:
    """A directory with ``source/``, ``packed/``, ``tiny.yaml`` and ``runs/tiny``, and what the programs said."""

    directory: Path
    packed: CompletedProcess[str]
    trained: CompletedProcess[str]

    def rows(self, run: str = "tiny") -> list[dict[str, Any]]:
        path = self.directory / "runs" / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


def start(*words: str, cwd: Path) -> Popen[str]:
    """Start ``python WORDS...`` on CPUs, as if nothing had launched the tests."""
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return Popen(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: Popen[str], timeout: float = 150.0) -> CompletedProcess[str]:
    """Wait for a program that `start` started.

    Raises:
        TimeoutError: it did not end; it and what it started have been ended, and what it said is in the message.
    """
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        process.terminate()  # launchers then end their ranks, which are in other process groups
        try:
            out, err = process.communicate(timeout=45)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"{process.args!r} did not end in {timeout} s:\n{out}\n{err}") from None
        raise
    return CompletedProcess(process.args, process.returncode, out, err)


def python(*words: str, cwd: Path, timeout: float = 150.0) -> CompletedProcess[str]:
    """Run ``python WORDS...`` to its end."""
    return finish(start(*words, cwd=cwd), timeout)


def longreach(*words: str, cwd: Path, timeout: float = 150.0) -> CompletedProcess[str]:
    """Run ``python -m longreach WORDS...`` to its end."""
    return python("-m", "longreach", *words, cwd=cwd, timeout=timeout)
