"""Hosts that are network namespaces of this machine, each with an address of its own, joined by a bridge."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest
from fault_helpers import JobDirectory, make_job_directory
from programs import start

NETWORK = "10.213.8"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _cannot() -> str:
    """Why no namespaces with cables can be made here; "" if they can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    name = f"probe-{uuid.uuid4().hex[:6]}"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "c0", "type", "veth", "peer", "name", "c1")
        finally:
            _ip("netns", "delete", name)
    except OSError as error:
        return str(error)
    return ""


@dataclass
class Host:
    """A namespace, with one interface, ``lr0``, beside its loopback."""

    name: str
    address: str

    def start(self, *words: str, cwd: Path) -> Popen[str]:
        """Start ``python WORDS...`` there."""
        enter = "import os, sys; os.execvp('ip', sys.argv[1:])"
        return start("-c", enter, "ip", "netns", "exec", self.name, sys.executable, *words, cwd=cwd)


@pytest.fixture(scope="session")
def hosts() -> Iterator[Sequence[Host]]:
    """Two hosts; the name of this machine, which is theirs too, stands for none of their addresses."""
    if why := _cannot():
        pytest.skip(why)
    key = uuid.uuid4().hex[:6]
    made = [Host(f"host{number}-{key}", f"{NETWORK}.{number}") for number in (1, 2)]
    ends = [f"c{number}{key}" for number in (1, 2)]
    try:
        for host in made:
            _ip("netns", "add", host.name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end in zip(made, ends, strict=True):
            _ip("link", "set", end, "netns", host.name, "name", "lr0")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "lr0")
            _ip("-n", host.name, "link", "set", "lr0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


@pytest.fixture(scope="session")
def job_dir(tmp_path_factory: pytest.TempPathFactory) -> JobDirectory:
    return make_job_directory(tmp_path_factory.mktemp("cluster"))
