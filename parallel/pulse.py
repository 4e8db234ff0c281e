"""Which rank has stopped answering: every rank tells the first one every second that it lives, and where it is.

A process that is frozen, or whose machine is gone, says nothing and closes no connection; its peers wait in an
exchange. The first rank watches all others, the second one watches the first. They tell it in datagrams, for which
nobody ever waits.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from .mesh import Axis, gather_values

SECONDS = 1.0  # between two beats
WATCHER, DEPUTY = 0, 1


class Pulse:
    """A thread that tells and watches, as a context; collective on the way in.

    Args:
        world: all ranks.
        timeout: seconds of silence after which a rank is lost.
        lost: called with one line that names it, from that thread, on the rank that watched it.
    """

    def __init__(self, world: Axis, timeout: float, lost: Callable[[str], None]) -> None:
        self._world, self._timeout, self._lost = world, timeout, lost
        self._place = "starting"
        self._left = threading.Event()

    def at(self, place: str) -> None:
        """Say where this rank is, for the line that names it."""
        self._place = place

    def __enter__(self) -> Pulse:
        if self._world.size > 1:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.bind((_own_address(), 0))
            host, port = self._socket.getsockname()
            own = [float(int.from_bytes(socket.inet_aton(host), "big")), float(port), float(secrets.randbits(48))]
            rows = gather_values(own, self._world)
            self._ends = [(socket.inet_ntoa(int(row[0]).to_bytes(4, "big")), int(row[1])) for row in rows]
            self._token = f"{int(rows[WATCHER][2])}"  # a datagram of this run, and of no other
            threading.Thread(target=self._beat, name="pulse", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:  # else somebody may be lost, and is still to be named
            self._left.set()

    def _beat(self) -> None:
        rank = self._world.rank
        watched = {WATCHER: range(1, self._world.size), DEPUTY: range(1)}.get(rank, range(0))
        heard = {other: ("it never answered", time.monotonic()) for other in watched}
        listener = self._ends[DEPUTY if rank == WATCHER else WATCHER]
        name = f"process {os.getpid()} on {socket.gethostname()}"
        while not self._left.is_set():
            with suppress(OSError):  # silence is what the other side notices
                self._socket.sendto(f"{self._token} {rank} {name}, {self._place}".encode(), listener)
            until = time.monotonic() + SECONDS
            while (left := until - time.monotonic()) > 0:
                self._socket.settimeout(left)
                try:
                    token, sender, said = self._socket.recv(1024).decode(errors="replace").split(" ", 2)
                except (OSError, ValueError):
                    continue
                if token == self._token and sender.isdigit() and int(sender) in heard:
                    heard[int(sender)] = (said, time.monotonic())
            for other, (said, when) in heard.items():
                if time.monotonic() - when > self._timeout:
                    line = f"rank {self._world.ranks[other]} has not answered for {self._timeout:g} s: {said}"
                    return self._lost(line)
        return None


def _own_address() -> str:
    """The address from which this machine reaches the first rank; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
