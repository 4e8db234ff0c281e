"""Which rank has stopped answering: every rank tells the first one every second that it lives, and where it is.

A process that is frozen, or whose machine is gone, says nothing and closes no connection; its peers wait in an
exchange. The first rank watches all others, the second one watches the first. They tell it in datagrams, for which
nobody ever waits; these also tell where a rank is in the program, and in which exchanges it has been, so that one
that falls silent is named with its last stack, and ranks that disagree on an exchange are named with what each was in.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from . import flight_recorder
from .mesh import Axis, ExchangeFailed, RanksDisagree, gather_values, is_lost

SECONDS = 1.0  # between two beats
FRAMES = 5  # of a rank's stack that it tells
PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
WATCHER, DEPUTY = 0, 1
LIVES, WAITS, FAILED = "lives", "waits", "failed"  # WAITS: an exchange of this rank failed; FAILED: something else did


@dataclass
class _Heard:
    """The last word of a rank: when, where it was, how it was, and in which exchanges it had been."""

    when: float
    said: str = "it never answered"
    mood: str = LIVES
    trail: flight_recorder.Trail = field(default_factory=dict)


class Heartbeat:
    """A thread that tells and watches, as a context; collective on the way in.

    Args:
        world: all ranks.
        timeout: seconds of silence after which a rank is lost.
        lost: called with one line that names it, from that thread, on the rank that watched it.
    """

    def __init__(self, world: Axis, timeout: float, lost: Callable[[str], None]) -> None:
        self._world, self._timeout, self._lost = world, timeout, lost
        self._place, self._mood = "starting", LIVES
        self._thread = threading.get_ident()  # whose doings are told
        self._heard: dict[int, _Heard] = {}
        self._left = threading.Event()

    def set_phase(self, place: str) -> None:
        """Say where this rank is, for the line that names it."""
        self._place = place

    def __enter__(self) -> Heartbeat:
        if self._world.size > 1:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.bind((_own_address(), 0))
            host, port = self._socket.getsockname()
            own = [float(int.from_bytes(socket.inet_aton(host), "big")), float(port), float(secrets.randbits(48))]
            rows = gather_values(own, self._world)
            self._ends = [(socket.inet_ntoa(int(row[0]).to_bytes(4, "big")), int(row[1])) for row in rows]
            self._token = int(rows[WATCHER][2])  # a datagram of this run, and of no other
            others = {WATCHER: range(1, self._world.size), DEPUTY: range(1)}.get(self._world.rank, range(0))
            self._heard = {other: _Heard(time.monotonic()) for other in others}
            threading.Thread(target=self._beat, name="pulse", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._left.set()
        elif self._world.size > 1:  # somebody may be lost, and is still to be named
            self._mood = WAITS if error is not None and is_lost(error) else FAILED
            with suppress(OSError):
                self._tell()
            if self._mood == WAITS:
                why = self._why(str(error))
                if "imed out" not in str(error):  # a connection was closed: nobody is silent
                    self._left.set()
                raise why from error
            self._left.set()

    def _why(self, error: str) -> RuntimeError:
        """What is known of an exchange that failed: which ranks disagree on it, else what torch says."""
        rank, own = self._world.ranks[self._world.rank], flight_recorder.recent()
        until = time.monotonic() + 2 * SECONDS
        while self._heard and time.monotonic() < until:
            for other, heard in self._heard.items():
                line = (
                    flight_recorder.first_mismatch(rank, own, self._world.ranks[other], heard.trail)
                    if heard.mood == WAITS
                    else ""
                )
                if line:
                    return RanksDisagree(f"ranks disagree {self._place}: {line}")
            time.sleep(0.05)
        last = f" in {list(own.values())[-1]}" if own else ""
        return ExchangeFailed(f"an exchange failed {self._place}{last}: {error}")

    def _tell(self) -> None:
        rank = self._world.rank
        said = f"process {os.getpid()} on {socket.gethostname()}, {self._place}{_stack(self._thread)}"
        words = [self._token, rank, said, self._mood, flight_recorder.recent()]
        self._socket.sendto(json.dumps(words).encode(), self._ends[DEPUTY if rank == WATCHER else WATCHER])

    def _listen(self) -> None:
        try:
            token, rank, said, mood, trail = json.loads(self._socket.recv(1 << 14))
        except (OSError, ValueError, TypeError, RecursionError):
            return
        if token == self._token and rank in self._heard and isinstance(trail, dict):
            self._heard[rank] = _Heard(time.monotonic(), said, mood, trail)

    def _beat(self) -> None:
        while not self._left.is_set():
            with suppress(OSError):  # silence is what the other side notices
                self._tell()
            until = time.monotonic() + SECONDS
            while (left := until - time.monotonic()) > 0:
                self._socket.settimeout(left)
                self._listen()
            for other, heard in self._heard.items():
                if time.monotonic() - heard.when > self._timeout:
                    rank = self._world.ranks[other]
                    silent = f"has not answered for {self._timeout:g} s" if heard.mood != FAILED else "failed"
                    return self._lost(f"rank {rank} {silent}: {heard.said}")
        return None


def _stack(thread: int) -> str:
    """Where a thread is, in a line: this package's functions, the innermost first."""
    frame = sys._current_frames().get(thread)
    found: list[str] = []
    while frame is not None and len(found) < FRAMES:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and "site-packages" not in file:
            found.append(f"{frame.f_code.co_name} ({file.removeprefix(PACKAGE)}:{frame.f_lineno})")
        frame = frame.f_back
    return ", in " + " of ".join(found) if found else ""


def _own_address() -> str:
    """The address from which this machine reaches the first rank; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
