"""What each rank of a run waits for, and what each host has left; gathered with the losses of a step."""

from __future__ import annotations

import hashlib
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...parallel.mesh import Mesh, all_gather, local_rank
from ..runtime.machine import Machine
from ..runtime.status import machine

ROW_BYTES = 84  # of a host's name, at most 64, and of its machine's key
MEASURE_SECONDS = 1.0  # between two measurements of a host's memory and disk


@dataclass
class Host:
    """One host, over the steps since the last report.

    Attributes:
        ranks: the global ranks on it, in order.
        wait_seconds: of each of them in a step, on average; see `Hosts`.
        peak_memory_bytes: of each of them, so far.
        available_memory_bytes: what processes can still allocate on it; NaN if unknown.
        free_disk_bytes: of the file system of the run directory, as this host sees it; NaN if unknown.
    """

    ranks: list[int]
    wait_seconds: list[float]
    peak_memory_bytes: list[float]
    available_memory_bytes: float
    free_disk_bytes: float


@dataclass
class HostReport:
    """All hosts, over the steps since the last report.

    Attributes:
        hosts: by name, in the order of their ranks.
        slowest_rank, slowest_host: the rank that waited least, for which the others wait, and its host.
        waited_for_slowest_seconds: how much longer the other ranks waited in a step, on average.
    """

    hosts: dict[str, Host]
    slowest_rank: int
    slowest_host: str
    waited_for_slowest_seconds: float

    @property
    def num_ranks(self) -> int:
        return sum(len(host.ranks) for host in self.hosts.values())

    def as_row(self) -> dict[str, Any]:
        """What a row of ``metrics.jsonl`` has of it; None is a number that is not known."""
        slowest = {"slowest_host": self.slowest_host} if self.num_ranks > 1 else {}
        return {**slowest, "hosts": {name: _without_nan(asdict(host)) for name, host in self.hosts.items()}}

    def scalars(self) -> dict[str, float]:
        """By TensorBoard's tags: the mean wait and the largest memory of a host's ranks, and what the host has left."""
        found = {}
        for name, host in self.hosts.items():
            if self.num_ranks > 1:
                found[f"hosts/{name}/wait_seconds"] = sum(host.wait_seconds) / len(host.ranks)
            found[f"hosts/{name}/peak_memory_bytes"] = max(host.peak_memory_bytes)
            found[f"hosts/{name}/available_memory_bytes"] = host.available_memory_bytes
            found[f"hosts/{name}/free_disk_bytes"] = host.free_disk_bytes
        return {tag: value for tag, value in found.items() if math.isfinite(value)}


class Hosts:
    """Collects the waits of all ranks, and memory and disk of all hosts; making it is a collective.

    A rank waits while it is in an exchange, transfers included, and at the end of the step until the last rank is
    there. All ranks leave an exchange of the whole world together, so each counts seconds from there, and no clocks are
    compared. The slowest rank is the one that waits least: whatever delays it, its own computation, its data or what it
    writes, the others wait for it in their exchanges.

    Args:
        mesh: of the run.
        directory: of the run.
    """

    def __init__(self, mesh: Mesh, directory: Path) -> None:
        self._directory, self._ranks = directory, mesh.world.ranks
        self._names = _host_names(mesh)
        self._left, self._measured = (math.nan, math.nan), -math.inf
        self._waits, self._num_steps, self._last = [0.0] * len(self._ranks), 0, list[list[float]]()
        self.meet()

    @property
    def names(self) -> list[str]:
        """The hosts, in the order of their ranks."""
        return list(dict.fromkeys(self._names))

    def meet(self) -> None:
        """Note that an exchange of the whole world has just ended."""
        self._met = time.monotonic()

    def own(self, waited: float, peak_memory: float) -> list[float]:
        """What this rank tells the others at the end of a step, for `add`.

        Args:
            waited: seconds in the step's exchanges.
            peak_memory: bytes.
        """
        if local_rank() == 0 and time.monotonic() - self._measured >= MEASURE_SECONDS:
            self._left, self._measured = (_available_memory(), _free_disk(self._directory)), time.monotonic()
        return [waited, time.monotonic() - self._met, peak_memory, *self._left]

    def add(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """Add a step, from what all ranks told.

        Returns:
            ``wait_seconds``, the mean over the ranks, ``slowest_rank``, and ``waited_for_slowest_seconds`` as in
            `HostReport`. Nothing of one rank.
        """
        last = max(row[1] for row in rows)
        waits = [row[0] + last - row[1] for row in rows]
        self._waits = [before + wait for before, wait in zip(self._waits, waits, strict=True)]
        self._num_steps += 1
        self._last = [list(row[2:5]) for row in rows]
        if len(rows) == 1:
            return {}
        slowest, extra = _slowest(waits)
        return {
            "wait_seconds": sum(waits) / len(waits),
            "slowest_rank": self._ranks[slowest],
            "waited_for_slowest_seconds": extra,
        }

    def report(self) -> HostReport:
        """The steps since the last report, at least one."""
        waits = [round(wait / self._num_steps, 6) for wait in self._waits]
        slowest, extra = _slowest(waits)
        found: dict[str, Host] = {}
        for rank, name, wait, (peak, memory, disk) in zip(self._ranks, self._names, waits, self._last, strict=True):
            host = found.setdefault(name, Host([], [], [], math.nan, math.nan))
            host.ranks.append(rank)
            host.wait_seconds.append(wait)
            host.peak_memory_bytes.append(peak)
            if math.isnan(host.available_memory_bytes):
                host.available_memory_bytes = memory
            if math.isnan(host.free_disk_bytes):
                host.free_disk_bytes = disk
        self._waits, self._num_steps = [0.0] * len(self._ranks), 0
        return HostReport(found, self._ranks[slowest], self._names[slowest], extra)


def _slowest(waits: Sequence[float]) -> tuple[int, float]:
    """The place of the least wait, and how much longer the others waited on average."""
    place = min(range(len(waits)), key=waits.__getitem__)
    others = len(waits) - 1
    return place, (sum(waits) - waits[place]) / others - waits[place] if others else 0.0


def _host_names(mesh: Mesh) -> list[str]:
    """The host of each rank, by name; of several machines with one name, also by the first rank there. A collective."""
    key = hashlib.sha256(machine().encode()).hexdigest()[:16]
    own = f"{key} {socket.gethostname()}".encode()[:ROW_BYTES].ljust(ROW_BYTES)
    rows = [own]
    if mesh.world.group is not None:
        gathered = all_gather(torch.tensor(list(own), dtype=torch.uint8), mesh.world)
        rows = [bytes(row) for row in gathered.tolist()]
    firsts: dict[bytes, int] = {}
    for rank, row in zip(mesh.world.ranks, rows, strict=True):
        firsts.setdefault(row, rank)
    names = {row: row.decode(errors="replace").rstrip().partition(" ")[2] for row in firsts}
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    return [f"{names[row]}-rank{firsts[row]}" if names[row] in shared else names[row] for row in rows]


def _available_memory() -> float:
    found = Machine().available_memory()
    return math.nan if found is None else float(found)


def _free_disk(directory: Path) -> float:
    try:
        found = os.statvfs(directory)
    except OSError:
        return math.nan
    return float(found.f_bavail * found.f_frsize)


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
