"""Faults of starting and of exchanging, numbered as in the list of faults: who is named, and how soon."""

from __future__ import annotations

import re
import signal
import socket
import time
from subprocess import CompletedProcess

import pytest
from fault_helpers import JobDirectory, error_line, free_port, world
from programs import finish

MISTAKE, FAILED = 2, 1
TIMEOUT = 6  # parallel.timeout
CONFIG = ["endless.yaml", "train.steps=5", f"parallel.timeout={TIMEOUT}"]
START = 60  # seconds that a process may need to come up on a busy machine

# A real training, in which rank 1 does in step 2 what no other rank does.
ELSEWHERE = """
import os, sys
import torch
import torch.distributed as dist
from longreach.framework import trainer
from longreach.launch.train import main

kind, real_step, real_values, steps = sys.argv.pop(1), trainer.train_step, trainer.gather_values, []

def step(*arguments):
    steps.append(1)
    if len(steps) == 2 and os.environ["RANK"] == "1":
        if kind == "raise":
            raise ZeroDivisionError("a bug on one rank")
        if kind == "size":
            trainer.gather_values = lambda values, axis: real_values([*values, 0.0], axis)
        if kind == "order":
            dist.all_reduce(torch.ones(5))
    return real_step(*arguments)

trainer.train_step = step
main()
"""


def elsewhere(job_dir: JobDirectory, kind: str) -> tuple[list[CompletedProcess[str]], float]:
    """What two ranks said, and the seconds from the last good step to the end of the first rank."""
    (job_dir.directory / "elsewhere.py").write_text(ELSEWHERE)
    processes = world(job_dir, [kind, *CONFIG, f"run.dir={kind}"], program="elsewhere.py")
    first = finish(processes[0], 2 * START)
    seconds = time.time() - (job_dir.directory / kind / "metrics.jsonl").stat().st_mtime
    return [first, finish(processes[1], START)], seconds


def test_39_a_port_in_use(job_dir: JobDirectory) -> None:
    """Host, port and why, on the first rank; at once, and not after the time-out."""
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        (process,) = world(job_dir, ["endless.yaml", "run.dir=taken"], port=port, RANK="0")
        done = finish(process, START)
    assert done.returncode == MISTAKE
    error_line(done, f"rendezvous = '127.0.0.1:{port}'", "cannot listen", "Address already in use", "--master-port")
    assert done.stderr.count("\n") == 1 and not (job_dir.directory / "taken").exists()


@pytest.mark.parametrize(("host", "why"), [("127.0.0.1", "Connection refused"), ("no-such-host.invalid", "")])
def test_40_a_rendezvous_that_does_not_answer(job_dir: JobDirectory, host: str, why: str) -> None:
    """Host, port and seconds, on a rank that is not the first; within the time-out."""
    port, began = free_port(), time.monotonic()
    words = ["endless.yaml", "run.dir=unreached", f"parallel.timeout={TIMEOUT}"]
    (process,) = world(job_dir, words, port=port, RANK="1", MASTER_ADDR=host)
    done = finish(process, START)
    assert done.returncode == FAILED and time.monotonic() - began < START
    error_line(
        done, f"rank 1: rendezvous = '{host}:{port}'", f"did not answer within {TIMEOUT} s", why, "parallel.timeout"
    )
    assert done.stderr.count("\n") == 1


def test_40_a_rank_that_does_not_come(job_dir: JobDirectory) -> None:
    port = free_port()
    (process,) = world(job_dir, ["endless.yaml", "run.dir=alone", "parallel.timeout=3"], port=port, RANK="0")
    done = finish(process, START)
    assert done.returncode == FAILED
    error_line(done, f"rendezvous = '127.0.0.1:{port}'", "the 2 ranks did not find each other within 3 s")
    assert done.stderr.count("\n") == 1 and not (job_dir.directory / "alone").exists()


@pytest.mark.parametrize(("name", "value"), [("MASTER_PORT", "http"), ("MASTER_PORT", "99999"), ("RANK", "2")])
def test_40_an_environment_that_is_none(job_dir: JobDirectory, name: str, value: str) -> None:
    (process,) = world(job_dir, ["endless.yaml", "run.dir=none"], **{"RANK": "0", name: value})
    done = finish(process, START)
    assert done.returncode == MISTAKE
    error_line(done, name, value, "launcher's environment")


def test_43_ranks_that_disagree_on_an_exchange(job_dir: JobDirectory) -> None:
    """Both ranks are named, and what each of them was in, within the time-out and five seconds."""
    (first, second), seconds = elsewhere(job_dir, "order")
    assert first.returncode == second.returncode == FAILED
    line = error_line(first, "ranks disagree in step 2: ")
    assert re.search(r"rank 0 .*all_gather of \d Double.* rank 1 .*all_reduce of 5 Float", line), line
    assert "in all_reduce of 5 Float" in error_line(second)
    assert [row["step"] for row in job_dir.rows("order")] == [1]
    assert seconds < TIMEOUT + 5 + 4, "and some for a busy machine"


def test_43_ranks_that_exchange_different_sizes(job_dir: JobDirectory) -> None:
    """Gloo ends the process of a rank that is sent too much; the other one says what it was in, at once."""
    done, _ = elsewhere(job_dir, "size")
    assert {one.returncode for one in done} == {-signal.SIGABRT, FAILED}
    aborted, other = sorted(done, key=lambda one: one.returncode)
    assert "gloo::EnforceNotMet" in aborted.stderr
    error_line(other, "an exchange failed in step 2 in all_gather of")
    assert [row["step"] for row in job_dir.rows("size")] == [1]


def test_44_an_exception_on_one_rank_comes_first(job_dir: JobDirectory) -> None:
    """Its own traceback, and none of a rank that lost it."""
    (first, second), _ = elsewhere(job_dir, "raise")
    assert first.returncode == second.returncode == FAILED
    assert "ZeroDivisionError: a bug on one rank" in second.stderr
    assert "disagree" not in first.stderr
    error_line(first, "")
    assert re.search("longreach: (an exchange failed in step 2|rank 1 failed: )", first.stderr), first.stderr
