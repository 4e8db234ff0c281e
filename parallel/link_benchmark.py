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
SECONDS = 10.0  # of messages of one size, after which a slow link gets no more of them


def measure(mesh: Mesh, sizes: tuple[int, int] = SIZES, repeats: int = REPEATS) -> Link:
    """Measure the link between neighbouring ranks of the sequence, which all send at once (a ring); a collective.

    Args:
        mesh: of the joined world.
        sizes: bytes of a small and of a large message.
        repeats: at most how many messages of either size.

    Returns:
        The link fitted to the median of the messages of either size, on the slowest rank.

    Raises:
        ValueError: there is only one rank.
    """
    axis = mesh.sequence
    if axis.size == 1:
        raise ValueError("a link lies between two ranks: start at least two")
    small, large = ((size, _seconds(axis, mesh.device, size, repeats)) for size in sizes)
    return fit_link(small, large)


def _seconds(axis: Axis, device: torch.device, num_bytes: int, repeats: int) -> float:
    """Median seconds of a message to the next rank while one arrives from the previous rank."""
    sent, received = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    target, source = (axis.ranks[(axis.rank + step) % axis.size] for step in (1, -1))
    seconds = list[float]()
    for number in range(repeats + 2):  # the first ones set up connections
        spent = max(row[0] for row in gather_values([sum(seconds)], axis))  # all start together
        if number > 2 and spent > SECONDS:
            break
        started = time.perf_counter()
        operations = [
            dist.P2POp(dist.irecv, received, source, group=axis.group),
            dist.P2POp(dist.isend, sent, target, group=axis.group),
        ]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return max(row[0] for row in gather_values([median(seconds[2:])], axis))
