"""Two nodes, each a network namespace with an address of its own: the main job over a real network between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from programs import Job, finish, start

ADDRESSES = ["10.213.7.1", "10.213.7.2"]
PORT = "29611"  # nobody else is in these namespaces


def _ip(*words: str) -> CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)


def _cannot() -> str:
    """Why two namespaces cannot be made here; "" if they can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    name = f"probe-{uuid.uuid4().hex[:8]}"
    made = _ip("netns", "add", name)
    _ip("netns", "delete", name)
    return made.stderr.strip()


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Names of two namespaces, joined by a cable, with `ADDRESSES`."""
    if why := _cannot():
        pytest.skip(why)
    key = uuid.uuid4().hex[:6]
    names = [f"node{number}-{key}" for number in (0, 1)]
    try:
        for name in names:
            assert _ip("netns", "add", name).returncode == 0
        cable = [f"v{number}{key}" for number in (0, 1)]
        made = _ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        if made.returncode:
            pytest.skip(f"no virtual cable: {made.stderr.strip()}")
        for name, end, address in zip(names, cable, ADDRESSES, strict=True):
            for words in (
                ["link", "set", end, "netns", name, "name", "lr0"],
                ["-n", name, "address", "add", f"{address}/24", "dev", "lr0"],
                ["-n", name, "link", "set", "lr0", "up"],
                ["-n", name, "link", "set", "lo", "up"],
            ):
                done = _ip(*words)
                assert done.returncode == 0, done.stderr
        yield names
    finally:
        for name in names:
            _ip("netns", "delete", name)


def on_each(nodes: list[str], cwd: Path, *commands: list[str]) -> list[CompletedProcess[str]]:
    """Run one Python command line in each namespace at the same time."""
    # Gloo would take the address that the host's name stands for, which is not that of the cable.
    prefix = "import os, sys; os.environ['GLOO_SOCKET_IFNAME'] = 'lr0'; os.execvp('ip', sys.argv[1:])"
    processes = [
        start("-c", prefix, "ip", "netns", "exec", node, sys.executable, *command, cwd=cwd)
        for node, command in zip(nodes, commands, strict=True)
    ]
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(finish, processes))


def assert_same_training(job: Job, run: str) -> None:
    rows = [(row["step"], row["loss"], row["grad_norm"]) for row in job.rows(run)]
    assert rows == [(row["step"], row["loss"], row["grad_norm"]) for row in job.rows()] and len(rows) == 2


def test_the_nodes_reach_each_other_and_nobody_else(nodes: list[str]) -> None:
    """Else the tests below would show nothing of a network."""
    code = "import socket, sys; socket.create_connection((sys.argv[1], 1), 2)"
    for target, refused in ((ADDRESSES[1], True), ("192.0.2.1", False)):
        words = ["ip", "netns", "exec", nodes[0], "python3", "-c", code, target]
        said = subprocess.run(words, capture_output=True, text=True, timeout=20).stderr
        assert ("ConnectionRefusedError" in said) == refused, said


def test_torchrun_over_two_nodes(job: Job, nodes: list[str]) -> None:
    """The same losses, bit for bit, as two ranks of one machine."""
    options = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "nodes"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}"]
    ours = ["-m", "longreach.launch.train", "tiny.yaml", "run.dir=runs/nodes"]
    commands = [
        # A host does not know the addresses of its namespace by name.
        [*options, "--local-addr", address, "--rdzv-conf", f"is_host={int(number == 0)}", *ours]
        for number, address in enumerate(ADDRESSES)
    ]
    for done in on_each(nodes, job.directory, *commands):
        assert done.returncode == 0, done.stderr
    assert_same_training(job, "nodes")


def test_the_deepspeed_launcher_over_two_nodes(job: Job, nodes: list[str]) -> None:
    """Its form without ssh: the same command on every node, with the node's number."""
    (job.directory / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    (job.directory / "nodes.json").write_text('{"train_batch_size": "auto", "zero_optimization": {"stage": 1}}')
    options = ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh", "--master_addr", ADDRESSES[0]]
    options += ["--master_port", PORT]
    ours = ["--module", "longreach.launch.train", "tiny.yaml", "--deepspeed", "--deepspeed_config", "nodes.json"]
    commands = [[*options, "--node_rank", str(number), *ours, "run.dir=runs/hostfile"] for number in (0, 1)]
    for done in on_each(nodes, job.directory, *commands):
        assert done.returncode == 0, done.stderr
    assert_same_training(job, "hostfile")
