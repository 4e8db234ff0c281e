"""Whether all hosts of a run see the same storage."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path

from ...errors import InputError
from ...parallel.mesh import Axis, gather_texts, gather_values, is_one_host, local_rank
from .files import remove, write_text

MARKER = ".longreach-storage-"
SECONDS, PAUSE = 20.0, 0.2  # that a file may take to appear on other hosts, and between two looks for it


def check_shared_storage(run_dir: Path, world: Axis, timeout: float) -> None:
    """Whether every host sees what the first rank writes at ``run_dir``, or above it as long as it does not exist.

    A collective. It does nothing where the launcher says that all ranks are on one host; nothing is left behind.

    Args:
        run_dir: of the run.
        world: all ranks.
        timeout: seconds that an exchange may take, of which at most half are waited for the file to appear.

    Raises:
        InputError: a host does not; the same on all ranks.
    """
    if is_one_host(world):
        return
    levels, token = missing_levels(run_dir), secrets.randbits(48)
    written = write_marker(run_dir, levels, token) if world.rank == 0 else None
    try:
        can_write, *first = gather_values([float(written is not None), float(levels), float(token)], world)[0]
        if not can_write:
            return  # opening the run says so
        seconds = min(SECONDS, timeout / 2)
        is_blind = local_rank() == 0 and not sees_marker(run_dir, int(first[0]), int(first[1]), seconds)
        blind = sorted(set(gather_texts(socket.gethostname() if is_blind else "", world)) - {""})
    finally:
        if written is not None:
            remove(written)
    if blind:
        lead = gather_texts(socket.gethostname(), world)[0]
        allowed = f"on {', '.join(blind)} is not the storage that rank 0 on {lead} sees"
        fix = "put run.dir on storage that all hosts share, at the same path on each"
        raise InputError("run.dir", str(run_dir), allowed, fix)


def missing_levels(directory: Path) -> int:
    """How many of the last components of a path do not exist yet."""
    path = directory.expanduser().absolute()
    return next(level for level, place in enumerate([path, *path.parents]) if place.is_dir())


def write_marker(directory: Path, levels: int, token: int) -> Path | None:
    """Write a marker in ``directory``, or so many levels above it; returns its path, or None where it cannot be."""
    path = _marker(directory, levels, token)
    try:
        write_text(path, "")
    except OSError:
        return None
    return path


def sees_marker(directory: Path, levels: int, token: int, seconds: float) -> bool:
    """Whether the marker that another host has written is there, or appears within so many seconds."""
    path, deadline = _marker(directory, levels, token), time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    return True


def _marker(directory: Path, levels: int, token: int) -> Path:
    path = directory.expanduser().absolute()
    places = [path, *path.parents]
    return places[min(levels, len(places) - 1)] / f"{MARKER}{token:012x}"
