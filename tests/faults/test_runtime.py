"""Faults of a running training, numbered as in the list of faults: what ends it, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import select
import signal
import socket
import subprocess
import time
from subprocess import CompletedProcess
from unittest import mock

import psutil
import pytest
from fault_helpers import FAILED, MISTAKE, JobDirectory, error_line, free_port, ranks_of, world
from programs import finish, longreach, python, start
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longreach.framework.config import TrainConfig
from longreach.framework.runtime.loss_guard import MAX_SKIPPED, RECENT, Diverged, LossGuard

STOPPED = 75
HUGE = "optim.lr=2e37"  # the weights after a step with it are finite, what comes of them is not


def steps(job_dir: JobDirectory, run: str) -> list[int]:
    return [row["step"] for row in job_dir.rows(run)]


def same_rows(job_dir: JobDirectory, run: str, other: str) -> None:
    keys = ("step", "loss", "grad_norm", "lr")
    left, right = ([[row[key] for key in keys] for row in job_dir.rows(name)] for name in (run, other))
    assert left == right


def join(job_dir: JobDirectory, run: str, overrides: list[list[str]]) -> list[CompletedProcess[str]]:
    """A world of one process for each list of overrides, as a launcher would make it."""
    port, processes = free_port(), []
    for rank, words in enumerate(overrides):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(overrides), "LOCAL_WORLD_SIZE": len(overrides)}
        code = (
            f"import os; os.environ.update({ {key: str(value) for key, value in world.items()}!r}, "
            f"MASTER_ADDR='127.0.0.1', MASTER_PORT='{port}'); from longreach.launch.train import main; "
            f"main({['endless.yaml', f'run.dir={run}', *words]!r})"
        )
        processes.append(start("-c", code, cwd=job_dir.directory))
    return [finish(process, 120) for process in processes]


def test_22_ranks_with_another_configuration(job_dir: JobDirectory) -> None:
    """Before the first step, and before anything is written."""
    for done in join(job_dir, "alike", [["train.steps=2"], ["train.steps=2", "optim.lr=0.5"]]):
        assert done.returncode == MISTAKE
        host = socket.gethostname()
        assert f"rank 1 on {host} = 'another configuration': must be that of rank 0 on {host}" in done.stderr
    assert not (job_dir.directory / "alike").exists()


def test_36_data_that_changed(job_dir: JobDirectory) -> None:
    """A run does not go on with other data, unless it is told to."""
    assert job_dir.train("changed", "train.steps=2").returncode == 0
    source = job_dir.directory / "other"
    source.mkdir()
    (source / "a.txt").write_text("another text " * 400)
    assert longreach("pack", "other", "repacked", "--valid-fraction", "0", cwd=job_dir.directory).returncode == 0
    done = job_dir.train("changed", "train.steps=4", "data.source=repacked")
    assert done.returncode == MISTAKE
    error_line(
        done, "data.source = 'repacked'", "is not the corpus that this run began with", "data.accept_change=true"
    )
    assert steps(job_dir, "changed") == [1, 2]
    done = job_dir.train("changed", "train.steps=4", "data.source=repacked", "data.accept_change=true")
    assert done.returncode == 0 and steps(job_dir, "changed") == [1, 2, 3, 4]


def test_41_a_rank_that_is_killed_restarts_from_the_last_checkpoint(job_dir: JobDirectory) -> None:
    options = ["--nproc-per-node", "2", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    words = ["-m", "longreach.launch.train", "endless.yaml", "run.dir=restarted", "checkpoint.every=5"]
    job = [*options, "--log-dir", str(job_dir.directory / "logs"), *words, "train.steps=60"]
    # Else torchrun hands the addresses of the dead ranks to the new ones.
    with mock.patch.dict(os.environ, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}):
        process = start("-m", "torch.distributed.run", *job, cwd=job_dir.directory)
    try:
        job_dir.wait(process, lambda: len(job_dir.checkpoints("restarted")) >= 1)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        done = finish(process, 120)
    finally:
        process.kill()
    assert done.returncode == 0, done.stderr
    assert "resuming from restarted/checkpoints/step-" in done.stderr
    assert steps(job_dir, "restarted") == list(range(1, 61))
    assert job_dir.train("whole", "parallel.ranks=2", "train.steps=60").returncode == 0
    same_rows(job_dir, "restarted", "whole")


@pytest.mark.parametrize("child", [0, 1])
def test_42_a_frozen_rank_is_named(job_dir: JobDirectory, child: int) -> None:
    """Within the time-out and five seconds, although its connections stay open, and with its last stack."""
    run = f"frozen-{child}"
    with job_dir.training(run, "parallel.ranks=2", "parallel.timeout=6") as process:
        frozen, began = ranks_of(process)[child], time.monotonic()
        os.kill(frozen, signal.SIGSTOP)
        assert process.stderr is not None
        said, pipe = "", process.stderr.fileno()
        while not re.search(r"longreach: .*\n", said):
            assert time.monotonic() - began < 6 + 5, "nobody named it"
            if select.select([pipe], [], [], 0.1)[0]:
                said += os.read(pipe, 1 << 16).decode()
        line = (
            rf"longreach: rank [01] has not answered for 6 s: process {frozen} on \S+, (starting|(in|after) step \d+), "
            r"in \w+ \(\w+/\S+\.py:\d+\) of .*\(framework/trainer\.py:\d+\).*\n"
        )
        assert re.search(line, said), said
        done = finish(process, 90)
    assert done.returncode == FAILED
    with pytest.raises(ProcessLookupError):
        os.kill(frozen, 0)
    status = json.loads((job_dir.directory / run / "status.json").read_text())
    assert status["state"] == "failed" and f"has not answered for 6 s: process {frozen} on " in status["reason"]


def test_45_a_loss_that_is_not_finite_stops_before_the_update(job_dir: JobDirectory) -> None:
    assert job_dir.train("diverged", "train.steps=3").returncode == 0
    (saved,) = job_dir.checkpoints("diverged")
    done = job_dir.train("diverged", HUGE, "checkpoint.every=1", "checkpoint.keep_last=1", "train.steps=9")
    assert done.returncode == FAILED
    error_line(done, "step 5: loss", "in the sequences [", "no weight was changed", "train.nonfinite=skip")
    assert job_dir.checkpoints("diverged") == ["step-00000004"] and saved == "step-00000003"
    for file in (job_dir.directory / "diverged/checkpoints/step-00000004").glob("*.safetensors"):
        tensors = load_file(file)
        assert all(
            abs(float(value)) < math.inf for tensor in tensors.values() for value in (tensor.min(), tensor.max())
        )


def test_45_steps_that_are_not_finite_can_be_skipped(job_dir: JobDirectory) -> None:
    """On two ranks, which must agree; and not for ever."""
    done = job_dir.train("skipping", HUGE, "train.nonfinite=skip", "parallel.ranks=2", "train.steps=40")
    assert done.returncode == FAILED
    assert done.stderr.count(": skipped") == MAX_SKIPPED
    assert f"the {MAX_SKIPPED} steps before were skipped too" in done.stderr
    rows = [json.loads(line) for line in (job_dir.directory / "skipping/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] > 0 and rows[-1]["loss"] is None  # JSON knows no NaN


def test_46_a_loss_far_above_the_usual_is_told_with_its_sequences() -> None:
    loss_guard = LossGuard(TrainConfig(steps=1))
    usual = [loss_guard.check(step, {"loss": 2.0, "grad_norm": 1.0}, lambda: [7]) for step in range(RECENT)]
    assert usual == [""] * RECENT
    assert loss_guard.check(99, {"loss": 3.9, "grad_norm": 1.0}, lambda: [7]) == ""
    said = loss_guard.check(100, {"loss": 4.5, "grad_norm": 1.0}, lambda: [7, 8])
    assert said == "step 100: loss spike, 4.5000 over a running median of 2.0000, in the sequences [7, 8]"
    with pytest.raises(Diverged, match=r"step 101: loss 2, gradient norm inf, in the sequences \[9\]"):
        loss_guard.check(101, {"loss": 2.0, "grad_norm": math.inf}, lambda: [9])


def test_47_too_little_memory_is_refused_before_the_first_step(job_dir: JobDirectory) -> None:
    done = job_dir.train("large", f"data.seq_len={1 << 42}")
    assert done.returncode == MISTAKE
    error_line(done, "does not fit into memory", "parallel.block_len=", "train.recompute=true", "--dry-run")
    assert not job_dir.checkpoints("large")


def test_47_out_of_memory_says_which_knobs_to_turn(job_dir: JobDirectory) -> None:
    """Where the sum did not refuse it: what is compiled may need less."""
    done = job_dir.train("larger", f"data.seq_len={1 << 42}", "train.compile=true")
    assert done.returncode == FAILED and "warning: memory may not suffice" in done.stderr
    error_line(done, "out of memory", f"data.seq_len = {1 << 42}", "parallel.block_len=", "train.recompute=true")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_48_a_signal_saves_at_an_agreed_step(job_dir: JobDirectory, number: signal.Signals) -> None:
    """To one of two ranks; the same command then goes on, and gives what an uninterrupted run gives."""
    run = f"asked-{number.name}"
    with job_dir.training(run, "parallel.ranks=2") as process:
        os.kill(ranks_of(process)[1], number)
        done = finish(process, 60)
    assert done.returncode == STOPPED
    last = steps(job_dir, run)[-1]
    error_line(done, f"stopped after step {last}, on {number.name}", "run the same command again to resume")
    assert job_dir.checkpoints(run) == [f"step-{last:08d}"]
    assert job_dir.train(run, "parallel.ranks=2", f"train.steps={last + 3}").returncode == 0
    assert job_dir.train(f"{run}-whole", "parallel.ranks=2", f"train.steps={last + 3}").returncode == 0
    same_rows(job_dir, run, f"{run}-whole")


def test_48_the_launcher_hands_a_signal_on(job_dir: JobDirectory) -> None:
    with job_dir.training("handed", "parallel.ranks=2") as process:
        process.send_signal(signal.SIGTERM)
        done = finish(process, 60)
    assert done.returncode == STOPPED
    last = steps(job_dir, "handed")[-1]
    error_line(done, f"stopped after step {last}, on SIGTERM")
    assert job_dir.checkpoints("handed") == [f"step-{last:08d}"]


def everyone(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process, and all that it and its children started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        return [launcher, *launcher.children(recursive=True)]
    return []


def ask(process: subprocess.Popen[str], *numbers: signal.Signals) -> None:
    """Send signals to every process of a job, as a scheduler does."""
    for one in everyone(process):
        for number in numbers:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)


def test_49_repeated_signals_are_one_request(job_dir: JobDirectory) -> None:
    """To the launcher, the ranks and their data workers, for seconds, saves among them; the launcher adds its own."""
    words = ("parallel.ranks=2", "checkpoint.every=1", "data.workers=1")
    with job_dir.training("repeated", *words) as process:
        for _ in range(40):
            ask(process, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM)
            time.sleep(0.05)
        done = finish(process, 60)
    assert done.returncode == STOPPED, done.stderr
    last = steps(job_dir, "repeated")[-1]
    error_line(done, f"stopped after step {last}, on SIG", "run the same command again to resume")
    assert job_dir.checkpoints("repeated")[-1] == f"step-{last:08d}"
    assert job_dir.train("repeated", *words, f"train.steps={last + 2}").returncode == 0
    assert steps(job_dir, "repeated") == list(range(1, last + 3))


ENDS = """
import os, signal, sys, time
from longreach.framework.runtime import preemption
from longreach.parallel.mesh import Axis

preemption.SAME_SECONDS, preemption.REPEAT_SECONDS = 0.2, 0.6
for numbers in (n.split() for n in sys.argv[1:]):  # of signals; or a pause, or `step` for the end of one
    child = os.fork()
    if not child:
        with preemption.Preemption() as stop:
            stop.reason(Axis())  # the first step is over
            for number in numbers:
                if number == "pause":
                    time.sleep(0.3)
                elif number == "step":
                    stop.reason(Axis())
                else:
                    os.kill(os.getpid(), int(getattr(signal, number)))
                    while getattr(signal, number) not in stop._received:  # another thread takes it
                        time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status))
"""
TERM, INT, USR1, AGREED = "SIGTERM", "SIGINT", "SIGUSR1", "step"
CASES = {  # what comes, and what ends the process, if anything; afterwards comes SIGTERM
    f"{TERM} {TERM} {TERM} {AGREED}": 0,
    f"{TERM} pause {TERM} {AGREED}": 0,
    f"{INT} {INT} {AGREED}": 0,
    f"{USR1} pause pause pause {TERM} {AGREED}": 0,  # the warning, minutes before the end
    f"{USR1} {TERM} pause pause pause {USR1} {AGREED}": 0,
    f"{TERM} {AGREED} pause pause pause {TERM}": 0,  # it saves
    f"{TERM} {INT} {AGREED}": 0,
    f"{INT} pause {INT} {AGREED}": -signal.SIGINT,
    f"{INT} {AGREED} pause {INT}": -signal.SIGINT,
    f"{TERM} pause pause pause {INT}": -signal.SIGINT,
    f"{TERM} pause pause pause {TERM}": -signal.SIGTERM,
    f"{INT} pause pause pause {TERM}": -signal.SIGTERM,
    "pause": -signal.SIGTERM,  # without a request, the context leaves all as it was
}


def test_49_what_still_ends_at_once(job_dir: JobDirectory) -> None:
    """A person's second Ctrl-C, and what comes long after the first, unless the ranks have agreed to end."""
    done = python("-c", ENDS, *CASES, cwd=job_dir.directory)
    assert done.returncode == 0, done.stderr
    assert dict(zip(CASES, map(int, done.stdout.split()), strict=True)) == {k: int(v) for k, v in CASES.items()}


def test_50_a_limit_of_time(job_dir: JobDirectory) -> None:
    done = job_dir.train("limited", "train.time_limit=2")
    assert done.returncode == STOPPED
    last = steps(job_dir, "limited")[-1]
    error_line(done, f"stopped after step {last}, at train.time_limit")
    assert job_dir.checkpoints("limited")[-1] == f"step-{last:08d}"


def test_58_another_seed_or_batch_size(job_dir: JobDirectory) -> None:
    assert job_dir.train("altered", "train.steps=2").returncode == 0
    done = job_dir.train("altered", "train.steps=3", "run.seed=5", "data.batch_size=4")
    assert done.returncode == 0
    assert "not an exact resume: run.seed was 0 and is 5, which changes the order of the data" in done.stderr
    assert "not an exact resume: data.batch_size was 2 and is 4" in done.stderr
    done = job_dir.train("altered", "train.steps=4", "run.seed=5", "data.batch_size=4")
    assert "not an exact resume" not in done.stderr


def test_62_two_runs_in_one_directory(job_dir: JobDirectory) -> None:
    with job_dir.training("shared") as process:
        before = len(job_dir.rows("shared"))
        done = job_dir.train("shared")
        assert done.returncode == MISTAKE
        error_line(done, "run.dir = 'shared'", f"is in use by process {process.pid} on", "another run.dir")
        job_dir.wait(process, lambda: len(job_dir.rows("shared")) > before)
        process.kill()  # which lets the directory go, too
    assert job_dir.train("shared", "train.steps=2", "checkpoint.resume=false").returncode == 0
    assert steps(job_dir, "shared") == [1, 2]


def test_76_a_signal_before_the_ranks_train(job_dir: JobDirectory) -> None:
    """To all processes, twice, while Python starts in the ranks: no fault, and nothing is begun."""
    words = ("train", "endless.yaml", "run.dir=early", "parallel.ranks=2")
    process = start("-m", "longreach", *words, cwd=job_dir.directory)
    job_dir.wait(process, lambda: len(ranks_of(process)) == 2)
    ask(process, signal.SIGTERM, signal.SIGTERM)
    done = finish(process, 60)
    assert done.returncode == STOPPED, done.stderr
    error_line(done, "stopped on SIGTERM, with no step under way: run the same command again to go on")
    assert not (job_dir.directory / "early").exists()


def test_76_a_signal_in_the_rendezvous(job_dir: JobDirectory) -> None:
    """A rank waits for another one, that does not come."""
    port = free_port()
    (rank,) = world(job_dir, ["endless.yaml", "run.dir=alone"], port=port, RANK="0")

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(port))) == 0

    job_dir.wait(rank, listens)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        rank.send_signal(number)
    done = finish(rank, 30)
    assert done.returncode == STOPPED, done.stderr
    error_line(done, "stopped on SIG", "with no step under way")


ANOTHER_HOST = """
import ctypes, os, socket
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
if os.environ["RANK"] == "1":
    assert ctypes.CDLL(None).unshare(0x04000000) == 0  # CLONE_NEWUTS: a host name of its own
    socket.sethostname("slow-host")
    import time, torch
    torch.nn.modules.module.register_module_forward_hook(lambda *_: time.sleep(0.01))
from longreach.launch.train import main
main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a process a host name of its own")
def test_78_the_slowest_rank_and_its_host_are_named(job_dir: JobDirectory) -> None:
    """A rank on a host that computes slowly; in the console, the record and the charts."""
    (job_dir.directory / "another_host.py").write_text(ANOTHER_HOST)
    words = ["endless.yaml", "run.dir=slowest", "train.steps=30", "train.log_every=5", "monitor.tensorboard=true"]
    ranks = world(job_dir, words, program="another_host.py", GLOO_SOCKET_IFNAME="lo")
    try:
        first, second = (finish(rank, 60) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    line = (
        r"^step \d+: rank 1 on slow-host is the slowest: the other ranks wait for it \d+\.\d\d s of \d+\.\d\d s a step$"
    )
    assert len(re.findall(line, first.stderr, re.MULTILINE)) == 1, first.stderr
    rows = job_dir.rows("slowest")
    assert all({"wait_seconds", "slowest_rank", "waited_for_slowest_seconds"} <= row.keys() for row in rows)
    reported = [row for row in rows if "hosts" in row]
    assert [row["step"] for row in reported] == [5, 10, 15, 20, 25, 30]
    for row in reported[1:-1]:
        fast, slow = row["hosts"][socket.gethostname()], row["hosts"]["slow-host"]
        assert row["slowest_host"] == "slow-host" and (fast["ranks"], slow["ranks"]) == ([0], [1])
        assert fast["wait_seconds"][0] > slow["wait_seconds"][0], row
        for host in (fast, slow):
            assert host["peak_memory_bytes"][0] > 1 << 20 and host["available_memory_bytes"] > 1 << 20
            assert host["free_disk_bytes"] > 0
    events = EventAccumulator(str(job_dir.directory / "slowest/tensorboard"), {"scalars": 0, "images": 0}).Reload()
    waits = events.Scalars("hosts/slow-host/wait_seconds")
    assert [event.step for event in waits] == [row["step"] for row in reported]
    assert [event.step for event in events.Scalars("speed/slowest_rank")] == list(range(1, 31))
    assert events.Images("figures/who_waits")
