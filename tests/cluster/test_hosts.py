"""`longreach.launch.node` on two hosts, as docs/launch/torchrun.md has it: nothing but the endpoint is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fault_helpers import FAILED, JobDirectory, error_line
from programs import finish

STEPS = "train.steps=2"
KEYS = ("step", "loss", "grad_norm", "lr")


def node(endpoint: str, *more: str, ranks: int = 1) -> list[str]:
    options = ["--nnodes", "2", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    return ["-m", "longreach.launch.node", *options, *more, "endless.yaml", STEPS]


def losses(job_dir: JobDirectory, run: str) -> list[list[Any]]:
    return [[row[key] for key in KEYS] for row in job_dir.rows(run)]


@pytest.mark.timeout(400)
def test_67_two_hosts_train_as_one_does(hosts: Sequence[Any], job_dir: JobDirectory) -> None:
    """By the address alone: who leads, and by which interface they talk, they find out; the losses are bit for bit one
    host's with as many ranks.
    """
    words = node(f"{hosts[0].address}:29500")
    processes = [host.start(*words, "run.dir=two", cwd=job_dir.directory) for host in hosts]
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda process: finish(process, 300), processes):
            assert done.returncode == 0, done.stderr
    one = job_dir.train("one", "parallel.ranks=2", STEPS, timeout=300)
    assert one.returncode == 0, one.stderr
    assert losses(job_dir, "two") == losses(job_dir, "one") and len(losses(job_dir, "one")) == 2


def test_67_a_host_that_nobody_answers_says_so(hosts: Sequence[Any], job_dir: JobDirectory) -> None:
    """The leading host is there, and its launcher is not."""
    endpoint = f"{hosts[0].address}:29500"
    done = finish(hosts[1].start(*node(endpoint, "--rdzv-conf", "join_timeout=2"), cwd=job_dir.directory), 120)
    assert done.returncode == FAILED
    line = error_line(done, f"did not meet at {endpoint}: nobody answered within 2 s (Connection refused)")
    assert hosts[1].address in line and "start the same command on the host that has this address" in line


ROUTES = """
import json, sys
from longreach.launch.endpoint import route_to
for host in sys.argv[1:]:
    route = route_to(host, 29400, 0.0)
    print(json.dumps([route.leads, route.address, route.interface]))
"""


def test_67_a_host_knows_its_route(hosts: Sequence[Any], job_dir: JobDirectory) -> None:
    """Where it leads: by its address, and by a name that stands for its loopback."""
    process = hosts[1].start("-c", ROUTES, hosts[1].address, "localhost", cwd=job_dir.directory)
    done = finish(process, 60)
    assert done.returncode == 0, done.stderr
    expected = [True, hosts[1].address, "lr0"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected, expected]
