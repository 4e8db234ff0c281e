"""What an exchange costs, by a latency and a bandwidth; enough to choose between the ways and to plan a run.

A message of n bytes takes ``latency + n / bandwidth`` seconds. Groups exchange as rings do: P ranks gather in P - 1
such steps, each of one rank's payload.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What lies between two ranks.

    Attributes:
        latency: seconds.
        bandwidth: bytes a second.
    """

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: float) -> float:
        """For one message."""
        return self.latency + num_bytes / self.bandwidth


# Rough figures: an NVLink, a network adapter of 400 Gbit/s, gloo over loopback.
LINKS = {
    "nvlink": Link(5e-6, 200e9),
    "network": Link(15e-6, 40e9),
    "loopback": Link(100e-6, 2e9),
}


def links(device: str) -> tuple[Link, Link]:
    """Within a node and between nodes, for tensors on such a device, where nothing was measured."""
    return (LINKS["nvlink"], LINKS["network"]) if device == "cuda" else (LINKS["loopback"], LINKS["loopback"])


def fit_link(small: tuple[float, float], large: tuple[float, float]) -> Link:
    """The link on which messages of two sizes, (bytes, seconds), take so long."""
    (few, soon), (many, late) = small, large
    # A large message that is not slower than a small one says that latency is all that was seen.
    bandwidth = (many - few) / max(late - soon, 1e-9)
    return Link(max(soon - few / bandwidth, 0.0), bandwidth)


def gather_seconds(num_bytes: float, ranks: int, link: Link) -> float:
    """Every rank gets the ``num_bytes`` of every other one."""
    return (ranks - 1) * link.seconds(num_bytes)


def hierarchical_seconds(num_bytes: float, ranks: int, node_size: int, near: Link, far: Link) -> float:
    """Within nodes of ``node_size`` ranks, then between them; the ranks of a node share its way out."""
    shared = Link(far.latency, far.bandwidth / node_size)
    return gather_seconds(num_bytes, node_size, near) + gather_seconds(num_bytes, ranks // node_size, shared)


def num_slices(num_bytes: float, ranks: int, most: int, link: Link) -> int:
    """How many slices, up to ``most``, take a state along all ranks the fastest."""
    return min(range(1, most + 1), key=lambda slices: _walk_seconds(num_bytes, ranks, slices, link))


def _walk_seconds(num_bytes: float, ranks: int, slices: int, link: Link) -> float:
    return (ranks - 2 + slices) * link.seconds(num_bytes / slices)


def pipeline_seconds(num_bytes: float, ranks: int, slices: int, link: Link, wanted: bool = True) -> float:
    """From rank to rank in at most so many slices, then, if it is wanted, a broadcast of the end (as a tree)."""
    walk = _walk_seconds(num_bytes, ranks, num_slices(num_bytes, ranks, slices, link), link)
    return walk + wanted * math.ceil(math.log2(ranks)) * link.seconds(num_bytes)


def recursive_doubling_seconds(num_bytes: float, ranks: int, link: Link, wanted: bool = True) -> float:
    """Merging at distances 1, 2, 4, ..., a shift by one, then, if it is wanted, a broadcast of the end (as a tree)."""
    return ((1 + wanted) * math.ceil(math.log2(ranks)) + 1) * link.seconds(num_bytes)


def seconds(kind: str, num_bytes: float, ranks: int, link: Link) -> float:
    """Of an exchange as `parallel.recorder.Event` describes it, between so many ranks."""
    if ranks == 1 or kind == "receive":  # who receives waits while the sender sends
        return 0.0
    steps = {
        "all_gather": (ranks - 1, num_bytes),
        "all_to_all": (ranks - 1, num_bytes / (ranks - 1)),
        "all_reduce": (2 * (ranks - 1), num_bytes / ranks),
        "reduce_scatter": (ranks - 1, num_bytes / ranks),
        "broadcast": (math.ceil(math.log2(ranks)), num_bytes),
    }
    number, size = steps.get(kind, (1, num_bytes))
    return number * link.seconds(size)


def fastest(
    num_bytes: float, ranks: int, slices: int, near: Link, far: Link, node_size: int | None, wanted: bool = True
) -> str:
    """The relay for so many bytes: gather, pipeline, recursive_doubling, or hierarchical where ``node_size`` ranks share a node.

    Where two are equal, the first of them: who sends to a neighbour need not wait for it, who gathers waits for all.
    """
    link = near if node_size is None else far
    found = {
        "pipeline": pipeline_seconds(num_bytes, ranks, slices, link, wanted),
        "gather": gather_seconds(num_bytes, ranks, link),
        "recursive_doubling": recursive_doubling_seconds(num_bytes, ranks, link, wanted),
    }
    if node_size is not None:
        found["hierarchical"] = hierarchical_seconds(num_bytes, ranks, node_size, near, far)
    return min(found, key=lambda name: found[name])
