"""torchrun and the deepspeed launcher: the same training as `longreach train` with ranks of its own."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from programs import Job, python

CRASH = """
import os
from longreach.framework import trainer
from longreach.launch.train import main

real_step = trainer.train_step

def step(*arguments):
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("a bug on one rank")
    return real_step(*arguments)

trainer.train_step = step
main()
"""

LEFTOVERS = """
import atexit, os
from longreach.launch.train import main

class Leftover:
    def __del__(self, write=os.write):
        write(1, b"Python was taken down\\n")

kept = Leftover()
atexit.register(print, "an orderly end")
main()
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(*words: str, cwd: Path) -> CompletedProcess[str]:
    options = ["--nproc-per-node", "2", "--master-port", free_port(), "--log-dir", str(cwd / "logs")]
    return python("-m", "torch.distributed.run", *options, *words, cwd=cwd)


def assert_same_training(job: Job, run: str) -> None:
    """Two steps on two ranks, bit for bit as `longreach train parallel.ranks=2` made them."""
    rows = [(row["step"], row["loss"], row["grad_norm"]) for row in job.rows(run)]
    assert rows == [(row["step"], row["loss"], row["grad_norm"]) for row in job.rows()] and len(rows) == 2


def test_torchrun(job: Job) -> None:
    done = torchrun("-m", "longreach.launch.train", "tiny.yaml", "run.dir=runs/torchrun", cwd=job.directory)
    assert done.returncode == 0, done.stderr
    assert_same_training(job, "torchrun")
    assert "step 2/2  loss " in done.stderr and done.stdout.count("this model") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the deepspeed launcher would give the ranks GPUs")
def test_deepspeed(job: Job) -> None:
    """With its own arguments, and ``key=value`` after them."""
    (job.directory / "ds.json").write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 1}}))
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()]
    ours = ["--module", "longreach.launch.train", "tiny.yaml", "--deepspeed", "--deepspeed_config", "ds.json"]
    done = python(*launcher, *ours, "run.dir=runs/deepspeed", "parallel.ranks=1", cwd=job.directory)
    assert done.returncode == 0, done.stderr
    assert_same_training(job, "deepspeed")
    assert "deepspeed: ds.json" in (job.directory / "runs/deepspeed/config.yaml").read_text()
    assert done.stdout.count("this model") == 1


def test_an_exception_on_one_rank_ends_all(job: Job) -> None:
    """With its own traceback, and none of a rank that lost it."""
    (job.directory / "crash.py").write_text(CRASH)
    done = torchrun("crash.py", "tiny.yaml", "run.dir=runs/crash", cwd=job.directory)
    assert done.returncode == 1
    assert "[rank1]: ZeroDivisionError: a bug on one rank" in done.stderr
    assert re.findall(r"^\[rank(\d)\]: Traceback", done.stderr, re.MULTILINE) == ["1"]
    assert not list((job.directory / "runs/crash").glob("checkpoints/*"))


def test_a_rank_ends_with_python_in_place(job: Job) -> None:
    """Threads of gloo may still drop the last exchange's tensors, for which they need it."""
    (job.directory / "leftovers.py").write_text(LEFTOVERS)
    done = torchrun("leftovers.py", "tiny.yaml", "run.dir=runs/leftovers", cwd=job.directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("an orderly end") == 2 and "taken down" not in done.stdout
