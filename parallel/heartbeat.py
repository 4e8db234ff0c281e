"""Heartbeats: which rank has stopped answering, and which ranks disagree on an exchange.

A process that is frozen, or whose machine is gone, closes no connection, and its peers wait in an exchange. So every
rank sends a datagram each second: to the first rank, which monitors all others, or, from the first rank, to the second,
which monitors the first. Sending never blocks. A datagram holds the rank's place in the program, its stack and its last
collectives: a rank that falls silent is named with its last stack, and ranks in different collectives are named with
both. gloo raises an error in a rank whose exchange takes too long; NCCL does not, so the monitor looks for different
collectives by itself where no rank has started one for longer than the time-out.
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

INTERVAL = 1.0  # seconds between two heartbeats
FRAMES = 4  # innermost and outermost functions of a rank's stack in a heartbeat
PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
MONITOR, DEPUTY = 0, 1  # the rank that monitors all others, and the one that monitors it
ALIVE, EXCHANGE_FAILED, FAILED = "alive", "exchange failed", "failed"


@dataclass
class _Report:
    """The last heartbeat of a rank: when it came, its place and stack, its status, and its last collectives."""

    when: float
    place: str = "it never answered"
    status: str = ALIVE
    trace: flight_recorder.Trace = field(default_factory=dict)
    since: float = 0.0  # when the trace last changed


class Heartbeat:
    """A thread that sends heartbeats and monitors those of others, as a context; entering it is a collective.

    Args:
        world: all ranks.
        timeout: seconds without a heartbeat after which a rank is lost.
        on_lost: called from that thread, on the rank that monitors it, with one line that names the lost rank.
    """

    def __init__(self, world: Axis, timeout: float, on_lost: Callable[[str], None]) -> None:
        self._world, self._timeout, self._on_lost = world, timeout, on_lost
        self._place, self._status = "starting", ALIVE
        self._thread = threading.get_ident()  # whose stack is sent
        self._reports: dict[int, _Report] = {}
        self._own: tuple[flight_recorder.Trace, float] = {}, time.monotonic()  # this rank's trace, and since when
        self._left = threading.Event()

    def set_phase(self, place: str) -> None:
        """Set this rank's place in the program, for the line that names it."""
        self._place = place

    def __enter__(self) -> Heartbeat:
        if self._world.size > 1:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.bind((_own_address(), 0))
            host, port = self._socket.getsockname()
            own = [float(int.from_bytes(socket.inet_aton(host), "big")), float(port), float(secrets.randbits(48))]
            rows = gather_values(own, self._world)
            self._ends = [(socket.inet_ntoa(int(row[0]).to_bytes(4, "big")), int(row[1])) for row in rows]
            self._token = int(rows[MONITOR][2])  # a datagram of this run, and of no other
            others = {MONITOR: range(1, self._world.size), DEPUTY: range(1)}.get(self._world.rank, range(0))
            self._reports = {other: _Report(time.monotonic()) for other in others}
            threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._left.set()
        elif self._world.size > 1:  # a rank may be lost, which the monitor has still to name
            self._status = EXCHANGE_FAILED if error is not None and is_lost(error) else FAILED
            with suppress(OSError):
                self._send()
            if self._status == EXCHANGE_FAILED:
                why = self._why(str(error))
                if "imed out" not in str(error):  # a connection was closed: no rank is silent
                    self._left.set()
                raise why from error
            self._left.set()

    def _why(self, error: str) -> RuntimeError:
        """The cause of a failed exchange: which ranks disagree on it, else torch's message."""
        rank, own = self._world.ranks[self._world.rank], flight_recorder.recent_collectives()
        until = time.monotonic() + 2 * INTERVAL
        while self._reports and time.monotonic() < until:
            for other, report in self._reports.items():
                line = (
                    flight_recorder.first_mismatch(rank, own, self._world.ranks[other], report.trace)
                    if report.status == EXCHANGE_FAILED
                    else ""
                )
                if line:
                    return RanksDisagree(f"ranks disagree {self._place}: {line}")
            time.sleep(0.05)
        last = f" in {list(own.values())[-1]}" if own else ""
        return ExchangeFailed(f"an exchange failed {self._place}{last}: {error}")

    def _send(self) -> None:
        rank = self._world.rank
        place = f"process {os.getpid()} on {socket.gethostname()}, {self._place}{_stack(self._thread)}"
        words = [self._token, rank, place, self._status, flight_recorder.recent_collectives()]
        self._socket.sendto(json.dumps(words).encode(), self._ends[DEPUTY if rank == MONITOR else MONITOR])

    def _receive(self) -> None:
        try:
            token, rank, place, status, trace = json.loads(self._socket.recv(1 << 14))
        except (OSError, ValueError, TypeError, RecursionError):
            return
        if token == self._token and rank in self._reports and isinstance(trace, dict):
            before, now = self._reports[rank], time.monotonic()
            self._reports[rank] = _Report(now, place, status, trace, before.since if before.trace == trace else now)

    def _run(self) -> None:
        while not self._left.is_set():
            with suppress(OSError):  # the monitor notices the silence
                self._send()
            until = time.monotonic() + INTERVAL
            while (left := until - time.monotonic()) > 0:
                self._socket.settimeout(left)
                self._receive()
            for other, report in self._reports.items():
                if time.monotonic() - report.when > self._timeout:
                    rank = self._world.ranks[other]
                    silent = f"has not answered for {self._timeout:g} s" if report.status != FAILED else "failed"
                    return self._on_lost(f"rank {rank} {silent}: {report.place}")
            if line := self._stalled():
                return self._on_lost(f"ranks disagree {self._place}: {line}")
        return None

    def _stalled(self) -> str:
        """Which ranks are in different collectives, where none has started another for longer than the time-out."""
        trace, now = flight_recorder.recent_collectives(), time.monotonic()
        if trace != self._own[0]:
            self._own = trace, now
        limit = self._timeout + 3 * INTERVAL  # gloo raises at the time-out, and the ranks say why
        started = [self._own[1], *(report.since for report in self._reports.values())]
        if not self._reports or any(now - one < limit for one in started):
            return ""
        rank = self._world.ranks[self._world.rank]
        for other, report in self._reports.items():
            if line := flight_recorder.first_mismatch(rank, trace, self._world.ranks[other], report.trace):
                return line
        return ""


def _stack(thread: int) -> str:
    """A thread's stack in one line: this package's functions, the innermost first; those in the middle are left out."""
    frame = sys._current_frames().get(thread)
    found: list[str] = []
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and "site-packages" not in file and frame.f_code.co_name != "<module>":
            found.append(f"{frame.f_code.co_name} ({file.removeprefix(PACKAGE)}:{frame.f_lineno})")
        frame = frame.f_back
    if len(found) > 2 * FRAMES:
        found[FRAMES:-FRAMES] = ["..."]
    return ", in " + " of ".join(found) if found else ""


def _own_address() -> str:
    """The address from which this machine reaches the first rank; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
