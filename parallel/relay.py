"""States across ranks: four ways to send them past all pieces of a sequence, all exact (see `kernels.scan.Relay`).

- gather: every rank gets every summary and folds what lies before it. One exchange, no rank waits for another's result;
  what a rank receives grows with the number of ranks.
- hierarchical: ranks of a node gather, then nodes do. What crosses between nodes does not grow with the ranks in a node.
- pipeline: each rank maps what it gets from its neighbour and sends it on, slice by slice. What a rank sends and
  receives does not depend on the number of ranks; the last slice arrives after a walk along all of them.
- recursive_doubling: ranks at distances 1, 2, 4 and so on merge what they know (Hillis and Steele 1986), in as many steps as the
  number of ranks has binary digits, each of one summary.

`parallel.cost` says which is the fastest for so many bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.scan import Flow
from . import cost
from .mesh import Axis, all_gather, as_bytes
from .traffic import Note, Once, every_time, unnoted

log = logging.getLogger("longreach.parallel")
WAYS = ("auto", "gather", "hierarchical", "pipeline", "recursive_doubling")
SLICES = 4  # of a state that goes from neighbour to neighbour
Map = tuple[Tensor, Tensor]
"""(A, B) of ``x -> A x + B``."""


class AxisRelay:
    """The relay of one sequence split over the ranks of an axis; ``axis.relay`` says by which way.

    Args:
        axis: the ranks that share the sequence.
        note: counts the bytes of states.
        once: see `kernels.scan.Relay.once`.
        note_ends: counts the bytes of document ids.
        ends_once: remembers them, which are the same for all layers.
        leaves: see `kernels.scan.Relay`.
    """

    def __init__(
        self,
        axis: Axis,
        note: Note = unnoted,
        once: Once = every_time,
        note_ends: Note = unnoted,
        ends_once: Once = every_time,
        leaves: bool = True,
    ) -> None:
        self.rank, self.size, self.once, self.leaves = axis.rank, axis.size, once, leaves
        self._axis, self._note = axis, note
        self._note_ends, self._ends_once = note_ends, ends_once

    def ends(self, first: Tensor, last: Tensor) -> list[tuple[Tensor, Tensor]]:
        found: list[Any] = self._ends_once(lambda: gather([first, last], self._axis, self._note_ends))
        return found

    def sweep(
        self, decay: Tensor, flows: Sequence[Flow], known: Sequence[Tensor] | None = None
    ) -> tuple[list[tuple[Tensor, Tensor | None]], Sequence[Tensor]]:
        way = self._axis.relay
        if way == "auto":
            num_bytes = sum(x.numel() * x.element_size() for x in _distinct(flows))
            way = _fastest(self._axis, num_bytes, any(flow.wanted for flow in flows))
        if way == "gather":
            return self._gather(decay, flows, known)
        ways = {
            "hierarchical": self._hierarchical,
            "pipeline": self._pipeline,
            "recursive_doubling": self._recursive_doubling,
        }
        return ways[way](decay, flows), ()

    def _gather(
        self, decay: Tensor, flows: Sequence[Flow], known: Sequence[Tensor] | None
    ) -> tuple[list[tuple[Tensor, Tensor | None]], Sequence[Tensor]]:
        own = [] if known else [decay]  # backward, the others' decays are known, if forward was a gather too
        rows = gather([*own, *_distinct(flows)], self._axis, self._note)
        decays = [a.conj() for a in known] if known else [row[0] for row in rows]
        found: list[tuple[Tensor, Tensor | None]] = [
            _walk([(a, row[len(own) + column]) for a, row in zip(decays, rows, strict=True)], flow, self.rank)
            for flow, column in zip(flows, _columns(flows), strict=True)
        ]
        return found, decays

    def _hierarchical(self, decay: Tensor, flows: Sequence[Flow]) -> list[tuple[Tensor, Tensor | None]]:
        node, peers = self._axis.node, self._axis.peers
        assert node is not None and peers is not None
        near = gather([decay, *_distinct(flows)], node, self._note)
        before: list[Map | None] = []
        totals: list[Map] = []
        for flow, column in zip(flows, _columns(flows), strict=True):
            maps = [(row[0], row[1 + column]) for row in near]
            place = node.rank
            if flow.reverse:
                maps, place = maps[::-1], node.size - 1 - place
            before.append(reduce(_then, maps[:place]) if place else None)
            totals.append(reduce(_then, maps))
        # The product of a node's decays is the same whichever way it is taken.
        far = gather([totals[0][0], *(b for _, b in totals)], peers, self._note)
        found: list[tuple[Tensor, Tensor | None]] = []
        for number, (flow, inside) in enumerate(zip(flows, before, strict=True)):
            start, end = _walk([(row[0], row[1 + number]) for row in far], flow, peers.rank)
            found.append((start if inside is None else inside[0] * start + inside[1], end))
        return found

    def _pipeline(self, decay: Tensor, flows: Sequence[Flow]) -> list[tuple[Tensor, Tensor | None]]:
        # One flow after the other: two against each other would each wait for the other's receiver.
        passed = [self._pass_on(decay, flow) for flow in flows]
        return [(before, self._from_last(leaving, flow)) for (before, leaving), flow in zip(passed, flows, strict=True)]

    def _pass_on(self, decay: Tensor, flow: Flow) -> tuple[Tensor, Tensor]:
        """What reaches this rank and what leaves it, slice by slice: one is sent while the next one arrives.

        What was sent is waited for at the next sweep: until then the neighbour may take its time.
        """
        step = -1 if flow.reverse else 1
        source, target = self.rank - step, self.rank + step
        state = flow.state.contiguous()
        before = torch.zeros_like(state) if flow.start is None else flow.start.contiguous().clone()
        leaving = torch.empty_like(state)
        lines = decay.expand_as(state).reshape(-1), state.view(-1), before.view(-1), leaving.view(-1)
        number = cost.num_slices(state.numel() * state.element_size(), self.size, SLICES, self._axis.near)
        slices = list(zip(*(line.chunk(number) for line in lines), strict=True))
        arriving, sending = [], _sent_last.setdefault(self._axis, [])
        with self._note(0):
            for request, _ in sending:
                request.wait()
        sending.clear()
        if 0 <= source < self.size:
            arriving = [self._post(dist.irecv, one[2], source) for one in slices]
        for number, (a, b, x, y) in enumerate(slices):
            if arriving:
                with self._note(0):
                    arriving[number].wait()
            torch.addcmul(b, a, x, out=y)
            if 0 <= target < self.size:
                with self._note(y.numel() * y.element_size()):
                    sending.append((self._post(dist.isend, y, target), y))
        return before, leaving

    def _recursive_doubling(self, decay: Tensor, flows: Sequence[Flow]) -> list[tuple[Tensor, Tensor | None]]:
        maps: list[Map] = [(decay, flow.state) for flow in flows]
        distance = 1
        while distance < self.size:
            arrived = self._shift(maps, flows, distance)
            maps = [mine if got is None else _then(got, mine) for got, mine in zip(arrived, maps, strict=True)]
            distance *= 2
        found = []
        for flow, before, through in zip(flows, self._shift(maps, flows, 1), maps, strict=True):
            start = torch.zeros_like(flow.state) if flow.start is None else flow.start
            leaving = through[0] * start + through[1]
            reached = start if before is None else before[0] * start + before[1]
            found.append((reached, self._from_last(leaving.contiguous(), flow)))
        return found

    def _shift(self, maps: list[Map], flows: Sequence[Flow], distance: int) -> list[Map | None]:
        """The maps of the ranks so far before this one in the direction of each flow; None where there is none."""
        operations, arriving, num_bytes = [], [], 0
        for (a, b), flow in zip(maps, flows, strict=True):
            step = -distance if flow.reverse else distance
            payload = torch.cat([as_bytes(a), as_bytes(b)])
            into = torch.zeros_like(payload) if 0 <= self.rank - step < self.size else None
            arriving.append(into)
            if 0 <= self.rank + step < self.size:
                num_bytes += payload.numel()
                operations.append(self._peer(dist.isend, payload, self.rank + step))
            if into is not None:
                operations.append(self._peer(dist.irecv, into, self.rank - step))
        with self._note(num_bytes):
            for request in dist.batch_isend_irecv(operations) if operations else []:
                request.wait()
        return [None if into is None else _unpack(into, like) for into, like in zip(arriving, maps, strict=True)]

    def _peer(self, operation: Any, x: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(operation, x, self._axis.ranks[rank], group=self._axis.group)

    def _from_last(self, leaving: Tensor, flow: Flow) -> Tensor | None:
        """What leaves the last rank of a flow, if it is wanted."""
        if not flow.wanted:
            return None
        last = 0 if flow.reverse else self.size - 1
        leaving = leaving.clone()  # which may still be on its way to the neighbour
        with self._note(leaving.numel() * leaving.element_size() if self.rank == last else 0):
            dist.broadcast(_real(leaving), self._axis.ranks[last], group=self._axis.group)
        return leaving

    def _post(self, operation: Any, x: Tensor, rank: int) -> Any:
        return operation(_real(x), self._axis.ranks[rank], group=self._axis.group)


_sent_last: dict[Axis, list[tuple[Any, Tensor]]] = {}
"""By axis, what its last sweep by pipeline sent: the requests, and what they send."""


@cache
def _fastest(axis: Axis, num_bytes: int, wanted: bool) -> str:
    """By the cost model; said once for each size of states."""
    node_size = None if axis.node is None else axis.node.size
    way = cost.fastest(num_bytes, axis.size, SLICES, axis.near, axis.far, node_size, wanted)
    if axis.rank == 0:
        log.info("states of %s bytes travel along %d ranks by %s", f"{num_bytes:,}", axis.size, way)
    return way


def gather(tensors: Sequence[Tensor], axis: Axis, note: Note = unnoted) -> list[tuple[Tensor, ...]]:
    """Every rank's ``tensors``, in rank order, in one exchange of bytes; shapes and dtypes agree between ranks."""
    if axis.size == 1:
        return [tuple(tensors)]
    payload = torch.cat([as_bytes(t) for t in tensors])
    with note(payload.numel()):
        rows = all_gather(payload, axis)
    return [_unpack(row, tensors) for row in rows]


def _unpack(row: Tensor, like: Sequence[Tensor]) -> Any:
    """Tensors of the shapes and dtypes of ``like``, from their bytes laid end to end."""
    sizes = [t.numel() * t.element_size() for t in like]
    # A clone, because a slice of bytes need not lie where its dtype may start.
    return tuple(part.clone().view(t.dtype).view(t.shape) for part, t in zip(row.split(sizes), like, strict=True))


def _distinct(flows: Sequence[Flow]) -> list[Tensor]:
    """What the flows add, once where they add the same."""
    return list({id(flow.state): flow.state for flow in flows}.values())


def _columns(flows: Sequence[Flow]) -> list[int]:
    """Which of `_distinct` each flow adds."""
    keys = list({id(flow.state): None for flow in flows})
    return [keys.index(id(flow.state)) for flow in flows]


def _then(first: Map, second: Map) -> Map:
    """The map of two neighbouring pieces."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def _walk(maps: list[Map], flow: Flow, rank: int) -> tuple[Tensor, Tensor]:
    """What reaches the piece of ``rank``, and what leaves the last one."""
    x = torch.zeros_like(flow.state) if flow.start is None else flow.start
    found = x
    order = range(len(maps))
    for place in reversed(order) if flow.reverse else order:
        if place == rank:
            found = x
        x = maps[place][0] * x + maps[place][1]
    return found, x


def _real(x: Tensor) -> Tensor:
    """What can be sent: complex numbers as pairs of real ones."""
    return torch.view_as_real(x) if x.is_complex() else x
