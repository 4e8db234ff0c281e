"""Measures the latency and bandwidth between ranks, for `parallel.cost`."""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist

from .cost import Link, fit_link
from .mesh import Axis, Mesh, gather_values

SIZES = (1 << 10, 1 << 24)  # bytes: one message dominated by latency, one by bandwidth
REPEATS = 20


def measure(mesh: Mesh) -> Link:
    """Measure the link between neighbouring ranks of the sequence, which all send at once (a ring); a collective.

    Returns:
        The link fitted to the median of `REPEATS` messages of either size, on the slowest rank.

    Raises:
        ValueError: there is only one rank.
    """
    axis = mesh.sequence
    if axis.size == 1:
        raise ValueError("a link lies between two ranks: start at least two")
    small, large = ((size, _seconds(axis, mesh.device, size)) for size in SIZES)
    return fit_link(small, large)


def _seconds(axis: Axis, device: torch.device, num_bytes: int) -> float:
    """Median seconds of a message to the next rank while one arrives from the previous rank."""
    sent, received = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    target, source = (axis.ranks[(axis.rank + step) % axis.size] for step in (1, -1))
    seconds = []
    for _ in range(REPEATS + 2):  # the first ones set up connections
        gather_values([0.0], axis)  # so that all start together
        started = time.perf_counter()
        operations = [
            dist.P2POp(dist.isend, sent, target, group=axis.group),
            dist.P2POp(dist.irecv, received, source, group=axis.group),
        ]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return max(row[0] for row in gather_values([median(seconds[2:])], axis))
