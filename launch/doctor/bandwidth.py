"""Bandwidth of a machine's memory, disk and GPUs, measured."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COPY_BYTES = 1 << 28  # more than caches hold
WRITE_BYTES = 1 << 26
REPEATS = 3


def copy_bandwidth(source: torch.device, target: torch.device) -> float:
    """Bytes per second that a copy from device to device moves, the best of `REPEATS`."""
    import torch

    pinned = source.type == "cpu" and target.type == "cuda"
    x = torch.ones(COPY_BYTES, dtype=torch.uint8, device=source, pin_memory=pinned)
    y = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=target)  # written once, so that its pages are mapped

    def copy() -> None:
        y.copy_(x)
        if target.type == "cuda":
            torch.cuda.synchronize(target)

    return COPY_BYTES / min(_seconds(copy) for _ in range(REPEATS))


def write_bandwidth(directory: Path) -> float:
    """Bytes per second that a file is written at, ``fsync`` included.

    Raises:
        OSError: nothing can be written there.
    """
    content = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=directory) as file:

        def write() -> None:
            for _ in range(WRITE_BYTES // len(content)):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())

        return WRITE_BYTES / _seconds(write)


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
