"""SLURM's commands as far as launch/slurm.sbatch needs them, with all nodes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def scontrol(words: list[str]) -> int:
    """``show hostnames LIST`` has one host; what else is asked is written down."""
    if words[:2] == ["show", "hostnames"]:
        print("localhost\nlocalhost")
    else:
        with open("scontrol.log", "a") as log:
            log.write(" ".join(words) + "\n")
    return 0


def scancel(words: list[str]) -> int:
    """``--signal=USR1 JOB`` sends it to the tasks of the job."""
    assert words == ["--signal=USR1", os.environ["SLURM_JOB_ID"]], words
    tasks = Path("tasks")
    for task in tasks.read_text().split() if tasks.exists() else []:
        with suppress(ProcessLookupError):
            os.kill(int(task), signal.SIGUSR1)
    return 0


def srun(words: list[str]) -> int:
    """One task for each node; ends with the highest code of them, as srun.

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

    Path("tasks").write_text(" ".join(str(task.pid) for task in tasks))
    codes = [task.wait() for task in tasks]
    Path("tasks").unlink()
    return max(code if code >= 0 else 128 - code for code in codes)


COMMANDS = {"scancel": scancel, "scontrol": scontrol, "srun": srun}


def install(directory: Path) -> None:
    """Make commands of these functions."""
    directory.mkdir()
    for name in COMMANDS:
        (directory / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        (directory / name).chmod(0o755)


if __name__ == "__main__":
    sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
