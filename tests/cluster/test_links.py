"""Faults between hosts, numbered as in the list: links that are cut, come back or slow down; hosts that go and come."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from subprocess import CompletedProcess, Popen
from typing import Any

import pytest
from fault_helpers import FAILED, JobDirectory, error_line, ranks_of
from namespaces import Host
from programs import finish

from longreach.parallel.heartbeat import INTERVAL

STOPPED = 75
TIMEOUT = 6  # parallel.timeout, seconds
pytestmark = pytest.mark.timeout(900)  # each trains several times
ENDS = TIMEOUT + 20  # within which a launcher ends after a fault, on a busy machine
KEYS = ("step", "loss", "grad_norm", "lr")
PORT = 29500
COMMON = ("train.log_every=100", "optim.lr=1e-4")  # at a larger rate, differences by rounding grow from step to step
NAMED = r"process \d+ on \S+ \({address}\), (in|after) step \d+"


def launch(host: Host, leader: Host, job_dir: JobDirectory, run: str, *words: str, nodes: str, conf: str = "") -> Any:
    """Start the rank of one host."""
    options = ["--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"{leader.address}:{PORT}", "--rdzv-conf", conf]
    command = ["-m", "longreach.launch.node", *options, "endless.yaml", f"run.dir={run}", *COMMON, *words]
    return host.start(*command, cwd=job_dir.directory)


def start_all(hosts: Sequence[Host], job_dir: JobDirectory, run: str, *words: str) -> list[Popen[str]]:
    nodes = str(len(hosts))
    return [launch(host, hosts[0], job_dir, run, *words, nodes=nodes) for host in hosts]


@contextmanager
def training(hosts: Sequence[Host], job_dir: JobDirectory, run: str, *words: str) -> Iterator[list[Popen[str]]]:
    """A training on all of these hosts that makes steps."""
    seen = len(job_dir.rows(run))
    processes = start_all(hosts, job_dir, run, *words)
    try:
        wait_for_steps(job_dir, run, processes, seen + 5)
        time.sleep(2 * INTERVAL)  # now each rank has told the others so
        yield processes
    finally:
        for host in hosts:
            host.kill()
        for process in processes:
            finish(process, 30)


def wait_for_steps(job_dir: JobDirectory, run: str, processes: list[Popen[str]], number: int) -> None:
    job_dir.wait(processes[0], lambda: len(job_dir.rows(run)) >= number, 180)


def end(processes: Sequence[Popen[str]], seconds: float) -> list[CompletedProcess[str]]:
    """What each has said when all have ended, within so many seconds."""
    deadline = time.monotonic() + seconds
    return [finish(process, max(0.1, deadline - time.monotonic())) for process in processes]


def stop(processes: Sequence[Popen[str]]) -> None:
    """End a training at an agreed step."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for done in end(processes, ENDS):
        assert done.returncode == STOPPED, done.stderr


def losses(job_dir: JobDirectory, run: str) -> list[list[Any]]:
    return [[row[key] for key in KEYS] for row in job_dir.rows(run)]


Undisturbed = Callable[[int], list[list[Any]]]


@pytest.fixture(scope="session")
def undisturbed(job_dir: JobDirectory) -> Undisturbed:
    """The rows of so many steps of two ranks on one host to which nothing happened."""

    def rows(steps: int) -> list[list[Any]]:
        while len(job_dir.rows("whole")) < steps:
            done = job_dir.train("whole", "parallel.ranks=2", f"train.steps={2 * steps}", COMMON[1], timeout=300)
            assert done.returncode == 0, done.stderr
        return losses(job_dir, "whole")[:steps]

    return rows


def same(job_dir: JobDirectory, run: str, undisturbed: Undisturbed) -> None:
    """Bit for bit those of a run to which nothing happened."""
    found = losses(job_dir, run)
    assert found == undisturbed(len(found))


def as_good(job_dir: JobDirectory, run: str, undisturbed: Undisturbed) -> None:
    """Those of a run to which nothing happened, on another number of ranks, whose sums are rounded otherwise."""
    found = losses(job_dir, run)
    expected = undisturbed(len(found))
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=1e-5)


def test_68_a_link_that_is_down_for_seconds(
    hosts: Sequence[Host], job_dir: JobDirectory, undisturbed: Undisturbed
) -> None:
    """In a step: TCP sends again what was lost, and the run goes on as if nothing had happened."""
    with training(hosts, job_dir, "seconds", "parallel.timeout=30") as processes:
        hosts[1].cut()
        time.sleep(3)
        before = len(job_dir.rows("seconds"))
        hosts[1].plug()
        wait_for_steps(job_dir, "seconds", processes, before + 5)
        stop(processes)
    same(job_dir, "seconds", undisturbed)


@pytest.mark.parametrize("cut", [0, 1], ids=["of-the-leading-host", "of-another-host"])
def test_68_and_69_a_link_that_is_cut_in_a_step(
    all_hosts: Sequence[Host], job_dir: JobDirectory, undisturbed: Undisturbed, cut: int
) -> None:
    """Each host says in one line who does not answer; where the link is back, the same commands go on."""
    run, words = f"cut-{cut}", ("checkpoint.every=3", f"parallel.timeout={TIMEOUT}")
    with training(all_hosts, job_dir, run, *words) as processes:
        all_hosts[cut].cut()
        ended = end(processes, ENDS)
    for number, done in enumerate(ended):
        assert done.returncode == FAILED, done.stderr
        lost = cut if number != cut else int(cut == 0)
        line = error_line(done, f"rank {lost}", f"not answered for {TIMEOUT} s: process")
        assert re.search(NAMED.format(address=re.escape(all_hosts[lost].address)), line), line
        assert ("check the network of this one" in line) == (number == cut == 0), line
    all_hosts[cut].plug()
    with training(all_hosts, job_dir, run, *words) as processes:
        stop(processes)
    as_good(job_dir, run, undisturbed)


def test_69_a_link_that_is_cut_before_the_hosts_meet(hosts: Sequence[Host], job_dir: JobDirectory) -> None:
    hosts[1].cut()
    words = ("train.steps=2",)
    processes = [launch(host, hosts[0], job_dir, "apart", *words, nodes="2", conf="join_timeout=3") for host in hosts]
    first, second = end(processes, 60)
    assert first.returncode == second.returncode == FAILED
    meet = f"the nodes did not meet at {hosts[0].address}:{PORT}: "
    error_line(first, meet, "fewer than 2 nodes came within 3 s")
    error_line(second, meet, "nobody answered within 3 s")
    assert not (job_dir.directory / "apart").exists()


def test_69_a_link_that_is_cut_before_the_ranks_meet(hosts: Sequence[Host], job_dir: JobDirectory) -> None:
    processes = start_all(hosts, job_dir, "apart", f"parallel.timeout={TIMEOUT}")
    job_dir.wait(processes[1], lambda: bool(ranks_of(processes[1])))
    hosts[1].cut()
    first, second = end(processes, 90)
    assert first.returncode == second.returncode == FAILED, first.stderr + second.stderr
    error_line(first, f"rendezvous = '{hosts[0].address}:", f"the 2 ranks did not find each other within {TIMEOUT} s")
    error_line(second, f"rendezvous = '{hosts[0].address}:", f"the first rank did not answer within {TIMEOUT} s")
    assert not (job_dir.directory / "apart").exists()


def test_69_a_link_that_is_cut_in_a_save(
    hosts: Sequence[Host], job_dir: JobDirectory, undisturbed: Undisturbed
) -> None:
    """What was being written is no checkpoint; the one before is whole, and the same commands go on from it."""
    words = ("checkpoint.every=4", f"parallel.timeout={TIMEOUT}")
    saves = job_dir.directory / "saving" / "checkpoints"
    with training(hosts, job_dir, "saving", *words) as processes:
        ranks = [rank for process in processes for rank in ranks_of(process)]
        while not list(saves.glob(".step-*.partial")):
            assert processes[0].poll() is None
        for rank in ranks:  # so that none gets further while the link is cut
            os.kill(rank, signal.SIGSTOP)
        hosts[1].cut()
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        ended = end(processes, ENDS)
    partial = [path.name for path in saves.glob(".step-*.partial")]
    assert len(partial) == 1, "the cut was not in a save"
    for number, done in enumerate(ended):
        assert done.returncode == FAILED
        error_line(done, f"rank {1 - number} has not answered for {TIMEOUT} s", hosts[1 - number].address)
    hosts[1].plug()
    with training(hosts, job_dir, "saving", *words) as processes:
        stop(processes)
    assert not (saves / partial[0]).exists()
    same(job_dir, "saving", undisturbed)


def test_71_a_link_that_slows_down(hosts: Sequence[Host], job_dir: JobDirectory, undisturbed: Undisturbed) -> None:
    """To 10 Mbit/s, in the middle: the run goes on, and its record says that the steps wait for the exchanges."""
    with training(hosts, job_dir, "slowed") as processes:
        for host in hosts:
            host.slow()
        slow = len(job_dir.rows("slowed")) + 1
        wait_for_steps(job_dir, "slowed", processes, slow + 5)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        first, second = end(processes, ENDS)
    assert first.returncode == second.returncode == STOPPED, first.stderr
    same(job_dir, "slowed", undisturbed)
    said = re.search(r"([\d,]+) parameters", first.stdout + first.stderr)
    assert said
    least = 4 * int(said[1].replace(",", "")) * 8 / 10e6  # seconds in which the gradients, in fp32, go over the link
    for row in job_dir.rows("slowed")[slow:]:
        assert row["exchange_seconds"] + row["zero_seconds"] > 0.8 * least


@pytest.mark.parametrize("gone", [0, 1], ids=["the-leading-host", "another-host"])
def test_72_a_host_that_is_gone_and_back(
    hosts: Sequence[Host], job_dir: JobDirectory, undisturbed: Undisturbed, gone: int
) -> None:
    """The other one ends at once and says which connection was closed; the same commands go on."""
    run, words = f"gone-{gone}", ("checkpoint.every=3",)
    with training(hosts, job_dir, run, *words) as processes:
        hosts[gone].kill()
        done = finish(processes[1 - gone], ENDS)
    assert done.returncode == FAILED, done.stderr
    error_line(done, "an exchange failed", hosts[gone].address)
    with training(hosts, job_dir, run, *words) as processes:
        stop(processes)
    same(job_dir, run, undisturbed)


def test_72_other_hosts_and_another_number(
    all_hosts: Sequence[Host], job_dir: JobDirectory, undisturbed: Undisturbed
) -> None:
    """Two hosts, then one that was not among them, then three."""
    for number, some in enumerate((all_hosts[:2], all_hosts[2:], all_hosts), 1):
        for done in end(start_all(some, job_dir, "moving", f"train.steps={3 * number}"), 240):
            assert done.returncode == 0, done.stderr
    assert len(job_dir.rows("moving")) == 9
    as_good(job_dir, "moving", undisturbed)


def test_72_elastic(all_hosts: Sequence[Host], job_dir: JobDirectory, undisturbed: Undisturbed) -> None:
    """One host, which two more join while it trains; one of them is lost, and the two that are left go on."""
    words, options = ("checkpoint.every=3",), {"nodes": "1:3", "conf": "last_call_timeout=3"}

    def add(*some: Host) -> list[Popen[str]]:
        return [launch(host, all_hosts[0], job_dir, "elastic", *words, **options) for host in some]

    def ranks() -> int:
        saved = sorted((job_dir.directory / "elastic" / "checkpoints").glob("step-*"))
        return len(list(saved[-1].glob("model-*"))) if saved else 0

    processes = add(all_hosts[0])
    job_dir.wait(processes[0], lambda: ranks() == 1, 120)
    processes += add(*all_hosts[1:])
    job_dir.wait(processes[0], lambda: ranks() == 3, 180)
    all_hosts[2].kill()
    finish(processes.pop(), 30)
    for done in end(processes, ENDS):
        assert done.returncode == FAILED, done.stderr
        assert re.search(rf"longreach: .*an exchange failed .*{re.escape(all_hosts[2].address)}", done.stderr), done
    processes = add(*all_hosts[:2])
    job_dir.wait(processes[0], lambda: ranks() == 2, 120)
    stop(processes)
    as_good(job_dir, "elastic", undisturbed)
