"""SLURM's commands as far as launch/slurm.sbatch needs them, with all nodes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType


def scontrol(words: list[str]) -> int:
    """``show hostnames LIST`` has one host; what else is asked is written down."""
    if words[:2] == ["show", "hostnames"]:
        print("localhost\nlocalhost")
    else:
        with open("scontrol.log", "a") as log:
            log.write(" ".join(words) + "\n")
    return 0


def srun(words: list[str]) -> int:
    """One task for each node; hands signals on to the tasks alone, and ends with the highest code of them, as srun.

    Where there is a file ``no-step``, it is removed and no task started, as where SLURM cannot start a step.
    """
    with open("srun.log", "a") as log:
        log.write(" ".join(words) + "\n")
    if os.path.exists("no-step"):
        os.remove("no-step")
        return 1
    command = words[words.index("python") :]
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)})
        for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
    ]

    def hand_on(number: int, frame: FrameType | None) -> None:
        for task in tasks:
            task.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def install(directory: Path) -> None:
    """Make commands of these functions."""
    directory.mkdir()
    for name in ("scontrol", "srun"):
        (directory / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        (directory / name).chmod(0o755)


if __name__ == "__main__":
    sys.exit({"scontrol": scontrol, "srun": srun}[sys.argv[1]](sys.argv[2:]))
