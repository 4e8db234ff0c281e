"""Hosts that are network namespaces of this machine, each with an address of its own, joined by a switch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from programs import start

NETWORK = "10.213.8"
SLOW = ("rate", "10mbit", "burst", "5kb", "latency", "1s")


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str:
    """Why no namespaces with cables can be made here; "" if they can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    name = f"probe-{uuid.uuid4().hex[:6]}"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "s0", "type", "bridge")
            _ip("-n", name, "link", "add", "c0", "type", "veth", "peer", "name", "c1")
        finally:
            _ip("netns", "delete", name)
    except OSError as error:
        return str(error)
    return ""


@dataclass
class Host:
    """A namespace, with one interface, ``lr0``, beside its loopback; its cable ends in ``port`` of the switch."""

    name: str
    address: str
    switch: str
    port: str

    def start(self, *words: str, cwd: Path) -> Popen[str]:
        """Start ``python WORDS...`` there."""
        enter = "import os, sys; os.execvp('ip', sys.argv[1:])"
        return start("-c", enter, "ip", "netns", "exec", self.name, sys.executable, *words, cwd=cwd)

    def cut(self, own_end: bool = False) -> None:
        """Pull the cable out of the switch, or switch this host's own end of it off."""
        self._set("down", own_end)

    def plug(self, own_end: bool = False) -> None:
        """Undo `cut`."""
        self._set("up", own_end)

    def _set(self, state: str, own_end: bool) -> None:
        namespace, device = (self.name, "lr0") if own_end else (self.switch, self.port)
        _ip("-n", namespace, "link", "set", device, state)

    def slow(self) -> None:
        """From here on, the cable carries 10 Mbit/s, each way."""
        for name, device in ((self.name, "lr0"), (self.switch, self.port)):
            _run("tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf", *SLOW)

    def kill(self) -> None:
        """End all its processes, as a host ends that loses its power."""
        for number in _ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)

    def repair(self) -> None:
        """As it was at first."""
        self.kill()
        self.plug()
        for name, device in ((self.name, "lr0"), (self.switch, self.port)):
            with suppress(OSError):  # there is none to delete
                _run("tc", "-n", name, "qdisc", "delete", "dev", device, "root")


@contextmanager
def network(number: int = 3) -> Iterator[Sequence[Host]]:
    """So many hosts; the name of this machine, which is theirs too, stands for none of their addresses."""
    key = uuid.uuid4().hex[:6]
    switch = f"switch-{key}"
    hosts = [Host(f"host{n}-{key}", f"{NETWORK}.{n}", switch, f"p{n}") for n in range(1, number + 1)]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # which then leaves nothing behind, either
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "s0", "type", "bridge")
        _ip("-n", switch, "link", "set", "s0", "up")
        for host in hosts:
            _ip("netns", "add", host.name)
            cable = f"c{host.port}{key}"
            _ip("-n", switch, "link", "add", host.port, "type", "veth", "peer", "name", cable)
            _ip("-n", switch, "link", "set", cable, "netns", host.name, "name", "lr0")
            _ip("-n", switch, "link", "set", host.port, "master", "s0", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "lr0")
            _ip("-n", host.name, "link", "set", "lr0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            with suppress(OSError):
                host.kill()
        for name in (*(host.name for host in hosts), switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        signal.signal(signal.SIGTERM, before)
