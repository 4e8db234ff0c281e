"""A cost model of exchanges, by latency and bandwidth, to choose a relay and to plan a run.

A message of n bytes takes ``latency + n / bandwidth`` seconds. Groups exchange as rings do: P ranks gather in P - 1
such steps, each of one rank's payload.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """The link between two ranks.

    Attributes:
        latency: seconds.
        bandwidth: bytes a second.
    """

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: float) -> float:
        """Of one message."""
        return self.latency + num_bytes / self.bandwidth


# Rough figures: an NVLink, a network adapter of 400 Gbit/s, gloo over loopback.
LINKS = {
    "nvlink": Link(5e-6, 200e9),
    "network": Link(15e-6, 40e9),
    "loopback": Link(100e-6, 2e9),
}


def links(device: str) -> tuple[Link, Link]:
    """Default links within a node and between nodes, for tensors on such a device."""
    return (LINKS["nvlink"], LINKS["network"]) if device == "cuda" else (LINKS["loopback"], LINKS["loopback"])


def fit_link(small: tuple[float, float], large: tuple[float, float]) -> Link:
    """The link that explains the times of two messages, (bytes, seconds) each."""
    (few, soon), (many, late) = small, large
    # A large message that is not slower than a small one says that latency is all that was seen.
    bandwidth = (many - few) / max(late - soon, 1e-9)
    return Link(max(soon - few / bandwidth, 0.0), bandwidth)


def gather_seconds(num_bytes: float, ranks: int, link: Link) -> float:
    """All-gather of ``num_bytes`` per rank, as a ring."""
    return (ranks - 1) * link.seconds(num_bytes)


def hierarchical_seconds(num_bytes: float, ranks: int, node_size: int, near: Link, far: Link) -> float:
    """All-gather within nodes of ``node_size`` ranks, then between nodes, whose ranks share a link."""
    shared = Link(far.latency, far.bandwidth / node_size)
    return gather_seconds(num_bytes, node_size, near) + gather_seconds(num_bytes, ranks // node_size, shared)


def num_slices(num_bytes: float, ranks: int, most: int, link: Link) -> int:
    """The number of slices, up to ``most``, with which a pipeline over all ranks is the fastest."""
    return min(range(1, most + 1), key=lambda slices: _pass_seconds(num_bytes, ranks, slices, link))


def _pass_seconds(num_bytes: float, ranks: int, slices: int, link: Link) -> float:
    return (ranks - 2 + slices) * link.seconds(num_bytes / slices)


def pipeline_seconds(num_bytes: float, ranks: int, slices: int, link: Link, need_final_state: bool = True) -> float:
    """From rank to rank in at most so many slices, then the broadcast of the final state (as a tree), if needed."""
    passing = _pass_seconds(num_bytes, ranks, num_slices(num_bytes, ranks, slices, link), link)
    return passing + need_final_state * math.ceil(math.log2(ranks)) * link.seconds(num_bytes)


def recursive_doubling_seconds(
    num_bytes: float, ranks: int, link: Link, need_final_state: bool = True, transition_bytes: float = 0.0
) -> float:
    """Steps at distances 1, 2, 4, ..., a shift by one, then the broadcast of the final state (as a tree), if needed."""
    doublings = math.ceil(math.log2(ranks))
    shifts = (doublings + 1) * link.seconds(num_bytes + transition_bytes)
    return shifts + need_final_state * doublings * link.seconds(num_bytes)


def seconds(kind: str, num_bytes: float, ranks: int, link: Link) -> float:
    """Of an exchange as `parallel.recorder.Event` describes it, between so many ranks."""
    if ranks == 1 or kind == "receive":  # the time of the matching send
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


def exposed_seconds(exchanges: Sequence[float], beside: float) -> float:
    """Seconds that exchanges take beyond a computation of ``beside`` seconds that goes on meanwhile.

    Args:
        exchanges: seconds of each, one after the other; the last begins when the computation is over.
        beside: seconds of the computation.
    """
    return max(sum(exchanges) - beside, exchanges[-1]) if exchanges else 0.0


def fastest(
    num_bytes: float,
    ranks: int,
    slices: int,
    near: Link,
    far: Link,
    node_size: int | None,
    need_final_state: bool = True,
    transition_bytes: float = 0.0,
) -> str:
    """The fastest relay for states of so many bytes; hierarchical only where ``node_size`` ranks share a node.

    ``transition_bytes``: of A, which all but a pipeline send beside the states.

    Of two that are equal, the first: a send to a neighbour does not wait for it, an all-gather waits for all ranks.
    """
    link = near if node_size is None else far
    found = {
        "pipeline": pipeline_seconds(num_bytes, ranks, slices, link, need_final_state),
        "gather": gather_seconds(num_bytes + transition_bytes, ranks, link),
        "recursive_doubling": recursive_doubling_seconds(num_bytes, ranks, link, need_final_state, transition_bytes),
    }
    if node_size is not None:
        found["hierarchical"] = hierarchical_seconds(num_bytes + transition_bytes, ranks, node_size, near, far)
    return min(found, key=lambda name: found[name])
