"""Which rank has stopped answering: every rank tells the first one every second that it lives, and where it is.

A process that is frozen, or whose machine is gone, says nothing and closes no connection; its peers wait in an
exchange. The first rank watches all others, the second one watches the first.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .mesh import Axis, gather_values

SECONDS = 1.0  # between two beats


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
        self._thread: threading.Thread | None = None

    def at(self, place: str) -> None:
        """Say where this rank is, for the line that names it."""
        self._place = place

    def __enter__(self) -> Pulse:
        if self._world.size > 1:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            patience = timedelta(seconds=self._timeout)
            store = None
            if self._world.rank == 0:
                store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            port = int(gather_values([float(store.port if store else 0)], self._world)[0][0])
            if store is None:
                store = TCPStore(host, port, is_master=False, timeout=patience)
            self._store = store
            self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()

    def _beat(self) -> None:
        rank, size = self._world.rank, self._world.size
        watched = {0: range(1, size), 1: range(1)}.get(rank, range(0))
        heard = {other: ("", time.monotonic()) for other in watched}
        number = 0
        while not self._left.wait(SECONDS):
            number += 1
            try:
                told = f"{number} process {os.getpid()} on {socket.gethostname()}, {self._place}"
                self._store.set(f"rank {rank}", told)
                for other, (last, since) in heard.items():
                    said = self._store.get(f"rank {other}").decode() if self._store.check([f"rank {other}"]) else ""
                    if said != last:
                        heard[other] = (said, time.monotonic())
                    elif time.monotonic() - since > self._timeout:
                        return self._name(other, last)
            except RuntimeError:  # the store is the first rank's
                if not self._left.is_set() and rank == 1:
                    self._name(0, heard[0][0])
                return
        return

    def _name(self, rank: int, last: str) -> None:
        where = last.partition(" ")[2] or "it never answered"
        self._lost(f"rank {self._world.ranks[rank]} has not answered for {self._timeout:g} s: {where}")
