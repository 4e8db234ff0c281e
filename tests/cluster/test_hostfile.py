"""`deepspeed --hostfile` on two hosts, as docs/launch/deepspeed.md has it, through a real sshd on each, and pdsh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

import pytest
from fault_helpers import JobDirectory
from programs import finish

PROGRAMS = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
SBIN = "/usr/sbin:/sbin"  # where sshd is, which wants to be started by its whole path
STEPS = "train.steps=2"
KEYS = ("step", "loss", "grad_norm", "lr")
SERVER = """
ListenAddress {address}:22
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
PidFile none
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
"""
CLIENT = """
IdentityFile {directory}/key
IdentitiesOnly yes
UserKnownHostsFile {directory}/known_hosts
GlobalKnownHostsFile none
BatchMode yes
"""
# As a host of its own: with its name, with an /etc/hosts that knows all, and with processes that end with the first.
ENTER = """
mount --bind "$0" /etc/hosts && mount -t tmpfs tmpfs /run && mkdir /run/sshd && hostname "$1" && shift && exec "$@"
"""
UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", ENTER)


@dataclass
class Hosts:
    """Two hosts that ssh reaches by their names."""

    names: list[str]
    directory: Path

    def enter(self, name: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", name, *UNSHARE, str(self.directory / "hosts"), name, *words]

    def start(self, *words: str, cwd: Path) -> Popen[str]:
        """Start a command on the first host, by whose PATH ``ssh`` is one with the keys of the tests."""
        bin_dir = Path(sys.executable).parent
        environment = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
        environment |= {"PATH": os.pathsep.join([str(self.directory), str(bin_dir), os.environ["PATH"]])}
        environment |= {"DS_ACCELERATOR": "cpu"}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = self.enter(self.names[0], *words)
        return Popen(command, cwd=cwd, env=environment, text=True, start_new_session=True, **pipes)


@pytest.fixture
def ssh_hosts(hosts: Sequence[Any], tmp_path: Path) -> Iterator[Hosts]:
    path = os.pathsep.join([os.environ["PATH"], SBIN])
    found = {name: shutil.which(name, path=path) for name in PROGRAMS}
    if missing := sorted({package for name, package in PROGRAMS.items() if found[name] is None}):
        pytest.skip(f"{', '.join(missing)} not installed (Debian: apt-get install openssh-server pdsh)")
    made = Hosts([host.name for host in hosts], tmp_path)
    lines = [f"{host.address} {host.name}\n" for host in hosts]
    (tmp_path / "hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))
    for key in ("host_key", "key"):
        command = [str(found["ssh-keygen"]), "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)]
        subprocess.run(command, check=True, timeout=60)
    host_key = (tmp_path / "host_key.pub").read_text()
    (tmp_path / "known_hosts").write_text("".join(f"{host.name},{host.address} {host_key}" for host in hosts))
    (tmp_path / "ssh_config").write_text(CLIENT.format(directory=tmp_path))
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nexec {found["ssh"]} -F {tmp_path}/ssh_config "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    daemons = []
    try:
        for host in hosts:
            config, log = tmp_path / f"sshd-{host.name}", (tmp_path / f"{host.name}.log").open("w")
            config.write_text(SERVER.format(address=host.address, directory=tmp_path))
            command = made.enter(host.name, str(found["sshd"]), "-D", "-e", "-f", str(config))
            with log:
                daemons.append(Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        wait_until_listening(hosts, daemons, tmp_path)
        yield made
    finally:
        for daemon in daemons:
            daemon.kill()  # and with it all on its host
            daemon.wait(30)


def wait_until_listening(hosts: Sequence[Any], daemons: list[Popen[bytes]], directory: Path) -> None:
    deadline = time.monotonic() + 60
    while any("listening on" not in (directory / f"{host.name}.log").read_text() for host in hosts):
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
            raise AssertionError("".join(path.read_text() for path in directory.glob("*.log")))
        time.sleep(0.05)


def deepspeed(hosts: Hosts, job_dir: JobDirectory, run: str, *words: str) -> CompletedProcess[str]:
    """The command of the page, from the first host."""
    slots = "".join(f"{name} slots=1\n" for name in hosts.names)
    (job_dir.directory / "nodes").write_text(slots)
    (job_dir.directory / ".deepspeed_env").write_text("CUDA_VISIBLE_DEVICES=\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    options = ("--hostfile", "nodes", "--module", "longreach.launch.train", "endless.yaml", f"run.dir={run}")
    return finish(hosts.start("deepspeed", *options, *words, cwd=job_dir.directory), 300)


@pytest.mark.timeout(500)
def test_deepspeed_by_ssh_trains_as_one_host_does(ssh_hosts: Hosts, job_dir: JobDirectory) -> None:
    """The losses are bit for bit one host's with as many ranks; a mistake comes back as exit code 2 and one line."""
    done = deepspeed(ssh_hosts, job_dir, "by-ssh", STEPS)
    assert done.returncode == 0, (done.stdout, done.stderr)
    one = job_dir.train("by-hand", "parallel.ranks=2", STEPS, timeout=300)
    assert one.returncode == 0, one.stderr
    rows = [[[row[key] for key in KEYS] for row in job_dir.rows(run)] for run in ("by-ssh", "by-hand")]
    assert rows[0] == rows[1] and len(rows[1]) == 2

    done = deepspeed(ssh_hosts, job_dir, "mistaken", "train.step=2")
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "longreach: " in done.stdout + done.stderr
