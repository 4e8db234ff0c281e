"""Heartbeats: which rank has stopped answering, and which ranks disagree on an exchange.

A process that is frozen, or whose machine is gone, closes no connection, and its peers wait in an exchange. So every
rank sends a datagram each second: to the first rank, which monitors all others, or, from the first rank, to its
deputies, which monitor the first: the second rank, and the first one on every other host. Where a link is cut, each
side then has a rank that names the other one. What the first rank finds it tells its deputies before it ends, so that
every host reports the same cause. Sending never blocks. A datagram holds the rank's place in the program, its stack
and its last collectives: a rank that falls silent is named with its last stack, and ranks in different collectives are
named with both. gloo raises an error in a rank whose exchange takes too long; NCCL does not, so the monitor looks for
different collectives by itself where no rank has started one for longer than the time-out.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from . import flight_recorder
from .mesh import Axis, ExchangeFailed, PeerFailed, RanksDisagree, gather_values, is_lost

INTERVAL = 1.0  # seconds between two heartbeats
FRAMES = 4  # innermost and outermost functions of a rank's stack in a heartbeat
PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
MONITOR = 0  # the rank that monitors all others
STARTING = "starting"  # the place of a rank that has told none
ALIVE, EXCHANGE_FAILED, FAILED, ENDS = "alive", "exchange failed", "failed", "ends"


@dataclass
class _Report:
    """The last heartbeat of a rank: when it came, its place and stack, its status, and its last collectives.

    The note is, with the status `ENDS`, why the first rank ends; with `EXCHANGE_FAILED`, which connection was closed.
    """

    when: float
    place: str = "it never answered"
    status: str = ALIVE
    trace: flight_recorder.Trace = field(default_factory=dict)
    since: float = 0.0  # when the trace last changed
    note: str = ""


class Heartbeat:
    """A thread that sends heartbeats and monitors those of others, as a context; entering it is a collective.

    Args:
        world: all ranks.
        timeout: seconds without a heartbeat after which a rank is lost.
        on_lost: called from that thread, on the ranks that monitor it, with one line that names the lost rank.
    """

    def __init__(self, world: Axis, timeout: float, on_lost: Callable[[str], None]) -> None:
        self._world, self._timeout, self._on_lost = world, timeout, on_lost
        self._place, self._status, self._note = STARTING, ALIVE, ""
        self._receivers: list[int] = []  # none before it is entered
        self._host = socket.gethostname()
        self._thread = threading.get_ident()  # whose stack is sent
        self._reports: dict[int, _Report] = {}
        self._own: tuple[flight_recorder.Trace, float] = {}, time.monotonic()  # this rank's trace, and since when
        self._left = threading.Event()

    def set_phase(self, place: str) -> None:
        """Set this rank's place in the program, for the line that names it; the first one is told at once."""
        is_first, self._place = self._place == STARTING, place
        if is_first and self._receivers:
            self._send()

    def __enter__(self) -> Heartbeat:
        if self._world.size > 1:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.bind((_own_address(), 0))
            host, port = self._socket.getsockname()
            own = [float(int.from_bytes(socket.inet_aton(host), "big")), float(port), float(secrets.randbits(48))]
            rows = gather_values(own, self._world)
            self._ends = [(socket.inet_ntoa(int(row[0]).to_bytes(4, "big")), int(row[1])) for row in rows]
            self._token = int(rows[MONITOR][2])  # a datagram of this run, and of no other
            self._hosts, rank = [address for address, _ in self._ends], self._world.rank
            if len(set(self._hosts)) > 1:
                self._host = f"{self._host} ({self._hosts[rank]})"
            deputies = _deputies(self._hosts)
            self._receivers = deputies if rank == MONITOR else [MONITOR]
            others = range(1, self._world.size) if rank == MONITOR else [MONITOR] * (rank in deputies)
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
            if self._status == EXCHANGE_FAILED:
                closed = "imed out" not in str(error)  # a connection: no rank is silent
                why = self._why(str(error), closed)
                if self._world.rank == MONITOR and (closed or isinstance(why, RanksDisagree)):
                    self._tell(str(why))
                if closed:
                    self._left.set()
                raise why from error
            self._send()
            self._left.set()

    def _why(self, error: str, closed: bool) -> RuntimeError:
        """The cause of a failed exchange: which ranks disagree on it, else torch's message.

        A rank that waits for one that waits for a lost one sees only the end of the former, which has said why before.
        """
        rank, own = self._world.ranks[self._world.rank], flight_recorder.recent_collectives()
        last = f" in {list(own.values())[-1]}" if own else ""
        why = f"an exchange failed {self._place}{last}: {error}"
        for other, report in self._reports.items():
            if closed and report.note:
                return PeerFailed(f"rank {self._world.ranks[other]}: {report.note}")
        self._note = why if closed else ""
        self._send()
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
        return ExchangeFailed(why)

    def _send(self) -> None:
        trace = flight_recorder.recent_collectives()  # the first call takes long: the place is that of after it
        place = f"process {os.getpid()} on {self._host}, {self._place}{_stack(self._thread)}"
        words = [self._token, self._world.rank, place, self._status, trace, self._note]
        for receiver in self._receivers:
            with suppress(OSError):  # who monitors this rank notices the silence
                self._socket.sendto(json.dumps(words).encode(), self._ends[receiver])

    def _tell(self, line: str) -> None:
        """Send the deputies the reason why this rank, the first, ends."""
        self._status, self._note = ENDS, line
        self._send()

    def _receive(self) -> None:
        try:
            token, rank, place, status, trace, note = json.loads(self._socket.recv(1 << 14))
        except (OSError, ValueError, TypeError, RecursionError):
            return
        if token == self._token and rank in self._reports and isinstance(trace, dict):
            before, now = self._reports[rank], time.monotonic()
            since = before.since if before.trace == trace else now
            self._reports[rank] = _Report(now, place, status, trace, since, note)

    def _run(self) -> None:
        while not self._left.is_set():
            self._send()
            until = time.monotonic() + INTERVAL
            while (left := until - time.monotonic()) > 0:
                self._socket.settimeout(left)
                self._receive()
            if self._left.is_set():
                return None
            if (monitor := self._reports.get(MONITOR)) is not None and monitor.status == ENDS:
                return self._on_lost(monitor.note)
            stalled = self._stalled()
            if line := self._silent() or (f"ranks disagree {self._place}: {stalled}" if stalled else ""):
                if self._world.rank == MONITOR:
                    self._tell(line)
                return self._on_lost(line)
        return None

    def _silent(self) -> str:
        """Which ranks have sent nothing for longer than the time-out, in one line; "" if all have."""
        now, ranks = time.monotonic(), self._world.ranks
        ages = {other: now - report.when for other, report in self._reports.items()}
        over = [other for other, age in ages.items() if age > self._timeout]
        if not over:
            return ""
        for other in over:
            if self._reports[other].status == FAILED:
                return f"rank {ranks[other]} failed: {self._reports[other].place}"
        lost = {other for other, age in ages.items() if age > self._timeout / 2}  # the others of a host are soon over
        first = min(over)
        who = f"rank {ranks[first]} and {len(lost) - 1} more have" if len(lost) > 1 else f"rank {ranks[first]} has"
        line = f"{who} not answered for {self._timeout:g} s: {self._reports[first].place}"
        elsewhere = {other for other, host in enumerate(self._hosts) if host != self._hosts[self._world.rank]}
        if lost == elsewhere and len({self._hosts[other] for other in elsewhere}) > 1:
            line += "; no other host answers: check the network of this one"
        return line

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


def _deputies(hosts: Sequence[str]) -> list[int]:
    """The ranks that monitor the first one: the second, and the first of every other host, by each rank's host."""
    first_of = {host: rank for rank, host in reversed([*enumerate(hosts)])}
    return sorted({1, *first_of.values()} - {MONITOR})


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
