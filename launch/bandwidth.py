"""How fast a machine's memory, disk and GPUs are."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COPIED = 1 << 28  # bytes: more than caches hold
WRITTEN = 1 << 26
REPEATS = 3


def copy_bandwidth(source: torch.device, target: torch.device) -> float:
    """Bytes per second that a copy from device to device moves, the best of `REPEATS`."""
    import torch

    pinned = source.type == "cpu" and target.type == "cuda"
    given = torch.ones(COPIED, dtype=torch.uint8, device=source, pin_memory=pinned)
    taken = torch.zeros(COPIED, dtype=torch.uint8, device=target)  # written once, so that its pages are there

    def copy() -> None:
        taken.copy_(given)
        if target.type == "cuda":
            torch.cuda.synchronize(target)

    return COPIED / min(_seconds(copy) for _ in range(REPEATS))


def write_bandwidth(directory: Path) -> float:
    """Bytes per second that reach the disk, the file system's own cache emptied.

    Raises:
        OSError: nothing can be written there.
    """
    content = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=directory) as file:

        def write() -> None:
            for _ in range(WRITTEN // len(content)):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())

        return WRITTEN / _seconds(write)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
