"""The checks of `longreach doctor --peer`: what a job on two hosts would meet between them.

The same command runs on both: HOST is one of them, as in torchrun's ``--rdzv-endpoint``, or each names the other. They
meet at the port of the rendezvous, by whichever direction is open, and go through the checks together; each tells the
other what it found, so that both report the same.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ... import __version__
from ...errors import InputError
from ..endpoint import interfaces, is_local, resolve, set_interface
from .checks import PORT, Finding

CONNECT_SECONDS = 3.0  # for a connection, or for the first line over it
ANSWER_SECONDS = 200.0  # for the other host's part of a check
LINK_SECONDS = 150.0  # for the measurement of the link
STORAGE_SECONDS = 20.0  # that a file may take to appear on the other host
PAUSE = 0.3  # seconds between two attempts to reach the other host
PROBES = 5  # ports that are tried, of the range from which the system assigns them
DATAGRAMS = 5
APART = 2.0  # seconds, from which on clocks are noted
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LINE_BYTES = 1 << 16


class _Gone(Exception):
    """The other host does not answer, or answers what is not of this program."""


class Peer:
    """A connection to this program on the other host, over which lines of JSON pass.

    Attributes:
        called: whether this host made the connection.
        own, other: the addresses of both hosts.
    """

    def __init__(self, connection: socket.socket, called: bool) -> None:
        self._connection, self.called = connection, called
        self._lines = connection.makefile("rb")
        self.own, self.other = connection.getsockname()[0], connection.getpeername()[0]

    def send(self, value: Any) -> None:
        """Send a value that JSON can hold."""
        try:
            self._connection.sendall(json.dumps(value).encode() + b"\n")
        except OSError as error:
            raise _Gone(error.strerror or str(error)) from None

    def receive(self, seconds: float = ANSWER_SECONDS) -> Any:
        """What the other host sent; waits for it."""
        try:
            self._connection.settimeout(seconds)
            line = self._lines.readline(LINE_BYTES)
            if not line:
                raise _Gone("it closed the connection")
            return json.loads(line)
        except OSError as error:
            raise _Gone(error.strerror or str(error)) from None
        except (ValueError, RecursionError):
            raise _Gone("what it sends is not of longreach doctor --peer") from None

    def swap(self, value: Any) -> Any:
        """Send a value, and return the one that the other host sends at this place."""
        self.send(value)
        return self.receive()

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self._connection.close()


def findings_between(peer: str, directory: str | None, seconds: float) -> Iterator[Finding]:
    """What every check between this host and another one finds, in the order of the report.

    Args:
        peer: ``HOST[:PORT]``, as given; HOST is the other host or, on the other host, this one.
        directory: where runs will be written; None for the current one, of which less is expected.
        seconds: to wait for the other host.

    Raises:
        InputError: ``peer`` is no endpoint that two hosts could share.
    """
    host, port = _endpoint(peer)
    found: list[Finding] = []
    connection = _meet(host, port, seconds, found)
    yield from map(_printable, found)
    if connection is None:
        return
    try:
        for finding in _findings(connection, port, directory):
            yield _printable(finding)
    except (_Gone, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, _Gone) else "what it sends is not of this version of longreach"
        text = f"{connection.other} ended before all checks were made ({reason}); see what it says"
        yield _printable(Finding("bad", "peer", text))
    finally:
        connection.close()


def _printable(finding: Finding) -> Finding:
    """Without what would steer the terminal: some of the text comes from the other host."""
    text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in finding.text)
    return Finding(finding.level, finding.topic, text)


def _endpoint(text: str) -> tuple[str, int]:
    fix = "give HOST or HOST:PORT, as to torchrun --rdzv-endpoint"
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname or "", parts.port or PORT
    except ValueError:
        host, port = "", 0
    if not host:
        raise InputError("--peer", text, "must be a host, and a port if it is not 29500", fix)
    if is_local(host):
        raise InputError("--peer", text, "must be a host that both know by this name or address", fix)
    return host, port


def _meet(host: str, port: int, seconds: float, found: list[Finding]) -> Peer | None:
    """The connection that both hosts use from now on; None, with the reason in ``found``, where there is none."""
    deadline, own_id = time.monotonic() + seconds, secrets.randbits(63)
    try:
        address, is_own = resolve(host, port)
    except OSError as error:
        fix = "give a name or address that this host knows"
        found.append(Finding("bad", "peer", f"{host}: {error.strerror or error}; {fix}"))
        return None
    ready: queue.Queue[tuple[Peer, bool]] = queue.Queue()
    stop, why = threading.Event(), [""]

    def greet(connection: socket.socket, called: bool) -> None:
        """Let the host with the smaller number choose the connection: with two firewalls, there may be but one."""
        peer = Peer(connection, called)
        peer.send({"longreach": __version__, "id": own_id})
        hello = peer.receive(CONNECT_SECONDS)
        if not isinstance(hello, dict) or not isinstance(hello.get("id"), int):
            raise _Gone("what it sends is not of longreach doctor --peer")
        if not (chooses := own_id < hello["id"]) and peer.receive(seconds) != "go":
            raise _Gone("it took another connection")
        ready.put((peer, chooses))

    def call() -> None:
        while not stop.is_set():
            try:
                return greet(socket.create_connection((address, port), timeout=CONNECT_SECONDS), True)
            except _Gone as error:
                why[0] = f"a program answers there, but not this one: {error}"
            except OSError as error:
                why[0] = error.strerror or str(error)
            stop.wait(PAUSE)

    def answer(listener: socket.socket) -> None:
        listener.settimeout(PAUSE)
        while not stop.is_set():
            with suppress(TimeoutError, _Gone, OSError):
                greet(listener.accept()[0], False)

    with ExitStack() as stack:
        stack.callback(stop.set)
        threads = [] if is_own else [threading.Thread(target=call, daemon=True)]
        try:
            listener = stack.enter_context(closing(_listen(address, port)))
            threads.append(threading.Thread(target=answer, args=[listener], daemon=True))
        except OSError as error:
            fix = "end the process that holds it, or give --peer and --rdzv-endpoint another port on all hosts"
            found.append(Finding("bad", "port", f"{port} of this host: {os.strerror(error.errno or 0)}; {fix}"))
        for thread in threads:
            thread.start()
        while threads and (left := deadline - time.monotonic()) > 0:
            with suppress(queue.Empty, _Gone):
                peer, chooses = ready.get(timeout=left)
                if chooses:
                    peer.send("go")
                return peer
    if is_own and threads:
        text = f"no host called {address}:{port} within {seconds:g} s: give the same command on the other one; if it "
        text += "was given, a firewall blocks the way from there to this port: let it through"
        found.append(Finding("bad", "peer", text))
    elif threads:
        found.append(Finding("bad", "peer", _not_reached(address, port, why[0], seconds)))
    return None


def _listen(address: str, port: int) -> socket.socket:
    """A socket that listens on a port of this host, on all of its addresses of the family of ``address``."""
    return socket.create_server(("", port), family=_family(address))


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _not_reached(address: str, port: int, why: str, seconds: float) -> str:
    """That neither host reached the other, and what to do, by the reason of the last attempt."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
            own = str(probe.getsockname()[0])
        except OSError:
            own = "this host"
    text = f"{own} -> {address}: port {port} not reached within {seconds:g} s ({why}), and no call came from there; "
    if "refused" in why:
        return text + "give the same command there"
    return text + f"a firewall, or no route: let {own} connect to port {port} of {address}"


def _findings(peer: Peer, port: int, directory: str | None) -> Iterator[Finding]:
    """What the checks find, once both hosts have met."""
    names = interfaces()
    own = _facts()
    other = peer.swap(own)
    where = f"{other['host']}, {peer.other}; this host is {own['host']}, {peer.own} on {names.get(peer.own, '?')}"
    yield Finding("ok", "peer", where)
    yield _versions(peer, own, other)
    yield _clocks(peer)
    ways = [*_ways(peer, port)]
    yield from ways
    yield from _storage(peer, directory)
    if any(finding.level == "bad" for finding in ways):
        yield Finding("note", "links", "not measured, before each host reaches the other")
    elif own["backend"] != other["backend"]:
        text = f"{own['backend']} here, {other['backend']} on {peer.other}; use GPUs on both hosts, or on none"
        yield Finding("bad", "links", text)
    else:
        yield _link(peer, port, names.get(peer.own))


def _facts() -> dict[str, str]:
    """What must be the same on both hosts, but for its name."""
    import torch

    from ...framework.runtime.rank_consistency import source_digest

    return {
        "host": socket.gethostname(),
        "backend": "NCCL" if torch.cuda.is_available() else "gloo",
        "longreach": __version__,
        "code": source_digest()[:12],
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }


def _versions(peer: Peer, own: dict[str, str], other: dict[str, str]) -> Finding:
    names = ("longreach", "code", "Python", "torch", "deepspeed")
    if differing := [name for name in names if own[name] != other[name]]:
        texts = [f"{name} {own[name]} here, {other[name]} on {peer.other}" for name in differing]
        return Finding("bad", "versions", f"{'; '.join(texts)}; install the same on both hosts")
    return Finding("ok", "versions", f"the same: {', '.join(f'{name} {own[name]}' for name in names)}")


def _clocks(peer: Peer) -> Finding:
    """How far the clocks are apart. No rank depends on it, but torchrun's rendezvous does."""
    peer.swap("now")
    before = time.time()
    theirs = float(peer.swap(time.time()))
    apart = theirs - (before + time.time()) / 2
    if abs(apart) < APART:
        return Finding("ok", "clock", f"{abs(apart):.1f} s apart")
    text = f"that of {peer.other} is {abs(apart):,.0f} s {'ahead' if apart > 0 else 'behind'}"
    harm = "torchrun trains without a host whose clock is 15 s behind, unless longreach.launch.node starts it"
    return Finding("note", "clock", f"{text}; set both by NTP: {harm}")


def _ways(peer: Peer, port: int) -> Iterator[Finding]:
    """Both directions: the port of the rendezvous, some of those that gloo and NCCL may take, and datagrams."""
    with ExitStack() as stack:
        listening, taken = [], ""
        try:
            listening.append(stack.enter_context(closing(_listen(peer.own, port))))
        except OSError as error:
            taken = f"{port} of {peer.own}: {os.strerror(error.errno or 0)}"
        first, last = _port_range()
        for number in range(PROBES):
            wanted = first + (last - first) * number // (PROBES - 1)
            listening.append(stack.enter_context(closing(_listen_near(peer.own, wanted, last))))
        datagrams = stack.enter_context(socket.socket(_family(peer.own), socket.SOCK_DGRAM))
        datagrams.bind((peer.own, 0))
        ports = sorted({one.getsockname()[1] for one in listening})
        theirs = peer.swap({"ports": ports, "range": [first, last], "udp": datagrams.getsockname()[1], "taken": taken})
        reached = {str(one): _try(peer.other, int(one)) for one in theirs["ports"]}
        for _ in range(DATAGRAMS):
            with suppress(OSError):
                datagrams.sendto(b"longreach", (peer.other, int(theirs["udp"])))
        their_reached = peer.swap(reached)
        has_come = _has_come(datagrams)
        they_got = peer.swap(has_come)
    for text in filter(None, (taken, theirs["taken"])):
        fix = "end the process that holds it, or take another port (--peer, --rdzv-endpoint)"
        yield Finding("bad", "port", f"{text}; {fix}")
    ways = [(peer.own, peer.other, reached, theirs["range"], they_got)]
    ways.append((peer.other, peer.own, their_reached, [first, last], has_come))
    for source, target, result, assigned, is_heard in ways if peer.called else reversed(ways):
        yield _way(source, target, result, assigned, is_heard)


def _way(source: str, target: str, reached: dict[str, str], assigned: list[int], is_heard: bool) -> Finding:
    """One direction.

    Args:
        source, target: addresses.
        reached: "" for each port of the target that was reached, else why not.
        assigned: the first and the last port that the target's system assigns.
        is_heard: whether a datagram came.
    """
    closed = [number for number, why in reached.items() if why]
    well = [number for number, why in reached.items() if not why]
    if not closed and is_heard:
        return Finding("ok", "connect", f"{source} -> {target}: TCP ports {', '.join(well)} and UDP")
    failed = [f"TCP ports {', '.join(closed)} not reached ({reached[closed[0]]})"] if closed else []
    failed += [] if is_heard else ["UDP not received"]
    failed += [f"TCP ports {', '.join(well)} reached"] if closed and well else []
    ports = f"the port of the rendezvous and {assigned[0]}-{assigned[1]} of {target}"
    fix = f"a firewall: let TCP and UDP from {source} to {ports} through"
    return Finding("bad", "connect", f"{source} -> {target}: {'; '.join(failed)}; {fix}")


def _port_range() -> tuple[int, int]:
    """The ports that the system assigns, which gloo and NCCL take."""
    try:
        first, last = PORT_RANGE.read_text(encoding="ascii").split()
        return int(first), int(last)
    except (OSError, ValueError):
        return 49152, 65535


def _listen_near(address: str, port: int, last: int) -> socket.socket:
    """A socket that listens on a port, or on the next one above that is free, else on any."""
    for number in [*range(port, min(port + 50, last + 1)), 0]:
        with suppress(OSError):
            return _listen(address, number)
    raise OSError("no port is free")


def _try(address: str, port: int) -> str:
    """Why a port cannot be reached; "" if it can."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _has_come(datagrams: socket.socket) -> bool:
    """Whether a datagram is there, or comes within a second."""
    datagrams.settimeout(1.0)
    try:
        return datagrams.recv(64) == b"longreach"
    except OSError:
        return False


def _storage(peer: Peer, directory: str | None) -> Iterator[Finding]:
    """Whether each host sees what the other one writes where runs will be written."""
    from ...framework.runtime.files import remove
    from ...framework.runtime.storage import missing_levels, sees_marker, write_marker

    place = Path(directory or ".")
    own_levels = missing_levels(place)
    levels = max(own_levels, int(peer.swap(own_levels)))
    token = secrets.randbits(48)
    written = write_marker(place, levels, token)
    try:
        theirs = peer.swap({"token": token, "written": written is not None})
        sees = bool(theirs["written"]) and sees_marker(place, levels, int(theirs["token"]), STORAGE_SECONDS)
        they_see = peer.swap(sees)
    finally:
        if written is not None:
            remove(written)
    path = place.expanduser().absolute()
    level = "bad" if directory else "note"  # the current directory need not be that of the run
    if written is None or not theirs["written"]:
        host = peer.own if written is None else peer.other
        text = f"{path}: nothing can be written there on {host}; give a directory that this user may write to"
        yield Finding(level, "storage", text)
    elif sees and they_see:
        yield Finding("ok", "storage", f"{path} is the same on both hosts")
    else:
        blind = [host for host, saw in ((peer.own, sees), (peer.other, they_see)) if not saw]
        text = f"{path} is not the same on both hosts: {' and '.join(blind)} does not see what the other one writes"
        fix = "put run.dir on storage that both share, at the same path"
        yield Finding(level, "storage", f"{text}; {fix}")


def _link(peer: Peer, port: int, interface: str | None) -> Finding:
    """Latency and bandwidth between a rank on each host, by gloo or NCCL, as `link_benchmark` measures them."""
    from .. import link_benchmark

    if interface is not None:
        set_interface(interface)
    address = peer.other if peer.called else peer.own  # where this port was reached
    world = {"RANK": str(int(peer.called)), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment = {**os.environ, **world, "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    command = [sys.executable, "-m", link_benchmark.__name__]
    peer.swap("measure")
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LINK_SECONDS)
        reasons = [line for line in done.stderr.splitlines() if line.startswith("longreach: ")]
        reasons = reasons or done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        result = {"ok": not done.returncode, "text": reasons[0] if done.returncode else done.stdout.strip()}
    except subprocess.TimeoutExpired:
        result = {"ok": False, "text": f"the ranks had not ended after {LINK_SECONDS:g} s"}
    results = [result, peer.swap(result)]
    if failed := [one["text"] for one in results if not one["ok"]]:
        return Finding("bad", "links", f"a rank on each host: {failed[0]}")
    return Finding("ok", "links", f"between a rank on each host: {''.join(one['text'] for one in results)}")
