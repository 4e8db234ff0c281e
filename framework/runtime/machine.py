"""What the machine, or the container in which this process runs, gives it: cores and memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """This machine, as the kernel describes it; limits of control groups of both versions count.

    Args:
        proc, cgroups: where the kernel's file systems are mounted.
    """

    proc: Path = Path("/proc")
    cgroups: Path = Path("/sys/fs/cgroup")

    def num_cores(self) -> int:
        """Cores that this process may use, at least 1: of its affinity, and of a quota of processor time."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        quotas = [float(cores)]
        for group in self._groups("cpu"):
            quota, _, period = _text(group / "cpu.max").partition(" ")
            quota, period = quota or _text(group / "cpu.cfs_quota_us"), period or _text(group / "cpu.cfs_period_us")
            if quota.isdecimal() and period.isdecimal():
                quotas.append(int(quota) / int(period))
        return max(1, math.floor(min(quotas)))

    def available_memory(self) -> int | None:
        """Bytes that this process and others of its group can still allocate without swapping; None if unknown."""
        left = []
        if (available := _fields(self.proc / "meminfo").get("MemAvailable:")) is not None:
            left.append(available * 1024)
        for group in self._groups("memory"):
            limit = _text(group / "memory.max") or _text(group / "memory.limit_in_bytes")
            used = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
            if limit.isdecimal() and used.isdecimal():
                stat = _fields(group / "memory.stat")
                kinds = ("inactive_file", "active_file")  # what is cached of files makes room for others
                cached = sum(stat.get(f"total_{kind}", stat.get(kind, 0)) for kind in kinds)
                left.append(max(0, int(limit) - max(0, int(used) - cached)))
        return min(left, default=None)

    def resident_memory(self, process: int | str = "self", *, peak: bool = False) -> int | None:
        """Resident bytes of a process, now or at its peak so far; None if unknown.

        Not ``getrusage``, whose peak of a new process begins with that of the one that started it.
        """
        found = _fields(self.proc / str(process) / "status").get("VmHWM:" if peak else "VmRSS:")
        return None if found is None else found * 1024

    def oom_kills(self) -> int:
        """Processes that the kernel has ended for want of memory: of this control group, else of the machine."""
        for group in self._groups("memory"):
            for name in ("memory.events", "memory.oom_control"):
                if (count := _fields(group / name).get("oom_kill")) is not None:
                    return count
        return _fields(self.proc / "vmstat").get("oom_kill", 0)

    def _groups(self, controller: str) -> Iterator[Path]:
        """The directories of this process's control group and of those around it, innermost first."""
        for line in _text(self.proc / "self" / "cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                root = self.cgroups / controller if controllers else self.cgroups
                group = root / path.lstrip("/")
                yield from (place for place in (group, *group.parents) if place.is_relative_to(root))


def _text(file: Path) -> str:
    """The text of a file of the kernel's; nothing where there is none."""
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _fields(file: Path) -> dict[str, int]:
    """The lines ``name number ...`` of a file."""
    words = [line.split() for line in _text(file).splitlines()]
    return {name: int(number) for name, number, *_ in (row for row in words if len(row) > 1) if number.isdecimal()}
