"""Exclusive scans of states over the ranks of a sequence: four algorithms, all exact.

They implement `kernels.scan.StateExchange`:

- gather: every rank gets every shard's affine map and composes those before it. One collective, no dependency between
  ranks; what a rank receives grows with the number of ranks.
- hierarchical: ranks of a node gather, then nodes do. What nodes exchange does not grow with the ranks in a node.
- pipeline: each rank applies its map to the state from its neighbour and sends the result on, slice by slice. Only
  states travel; what a rank sends does not depend on the number of ranks; latency is linear in it.
- recursive_doubling: ranks at distances 1, 2, 4, ... compose their maps (Hillis and Steele 1986): log2(ranks) steps,
  each of one map.

`parallel.cost` says which is the fastest for a state of so many bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _aliases
from ..kernels.scan import DirectionalScan
from ..kernels.transition import AffineMap, Transition
from . import cost
from .mesh import Axis, all_gather, as_bytes
from .traffic import ByteCounter, CollectiveCache, uncached, uncounted

log = logging.getLogger("longreach.parallel")
RELAYS = ("auto", "gather", "hierarchical", "pipeline", "recursive_doubling")
SLICES = 4  # of a state in the pipeline, at most
T = TypeVar("T")
Found = list[tuple[Tensor, "Tensor | None"]]
"""Of each directional scan: the state that enters this shard, and the final state (None where it is not known)."""


class AxisStateExchange:
    """The `StateExchange` of a sequence whose shards lie on the ranks of an axis, by the algorithm ``axis.relay``.

    Args:
        axis: the ranks that share the sequence.
        count: counts the bytes of states.
        cached: keeps the results of forward exchanges for recomputation.
        count_ids: counts the bytes of document ids.
        cached_ids: keeps the ids of the shards' boundaries, which are the same for all layers.
        need_final_state: see `StateExchange`.
    """

    def __init__(
        self,
        axis: Axis,
        count: ByteCounter = uncounted,
        cached: CollectiveCache = uncached,
        count_ids: ByteCounter = uncounted,
        cached_ids: CollectiveCache = uncached,
        need_final_state: bool = True,
    ) -> None:
        self.rank, self.size, self.need_final_state = axis.rank, axis.size, need_final_state
        self._axis, self._count, self._cached = axis, count, cached
        self._count_ids, self._cached_ids = count_ids, cached_ids

    def run_cached(self, collective: Callable[[], T]) -> T:
        found: T = self._cached(collective)
        return found

    def detached(self) -> AxisStateExchange:
        return AxisStateExchange(self._axis, self._count)

    def gather_boundary_ids(self, first: Tensor, last: Tensor) -> list[tuple[Tensor, Tensor]]:
        found: list[Any] = self._cached_ids(lambda: gather([first, last], self._axis, self._count_ids))
        return found

    def exclusive_scan(
        self, transition: Transition, scans: Sequence[DirectionalScan], saved: Sequence[Transition] | None = None
    ) -> tuple[Found, Sequence[Transition]]:
        relay = self._axis.relay
        if relay == "auto":
            num_bytes, wanted = sum(x.nbytes for x in _distinct(scans)), any(one.need_final_state for one in scans)
            # An adjoint that knows the transitions of all ranks gathers again, as it sends none.
            relay = "gather" if saved else _fastest(self._axis, num_bytes, wanted, transition.tensor.nbytes)
        if relay == "gather":
            return self._gather(transition, scans, saved)
        run = {
            "hierarchical": self._hierarchical,
            "pipeline": self._pipeline,
            "recursive_doubling": self._recursive_doubling,
        }[relay]
        return run(transition, scans), ()

    def _gather(
        self, transition: Transition, scans: Sequence[DirectionalScan], saved: Sequence[Transition] | None
    ) -> tuple[Found, Sequence[Transition]]:
        # The adjoint of a gather knows the other ranks' transitions and does not send its own.
        own = [] if saved else [transition.tensor]
        rows = gather([*own, *_distinct(scans)], self._axis, self._count)
        transitions = [a.adjoint() for a in saved] if saved else [type(transition)(row[0]) for row in rows]
        found: Found = []
        for one, column in zip(scans, _columns(scans), strict=True):
            maps = [AffineMap(a, row[len(own) + column]) for a, row in zip(transitions, rows, strict=True)]
            found.append(_scan_maps(maps, one, self.rank))
        return found, transitions

    def _hierarchical(self, transition: Transition, scans: Sequence[DirectionalScan]) -> Found:
        node, peers = self._axis.node, self._axis.peers
        assert node is not None and peers is not None
        kind = type(transition)
        near = gather([transition.tensor, *_distinct(scans)], node, self._count)
        before: list[AffineMap | None] = []  # of the ranks of this node that come before this one
        totals: list[AffineMap] = []
        for one, column in zip(scans, _columns(scans), strict=True):
            maps, place = [AffineMap(kind(row[0]), row[1 + column]) for row in near], node.rank
            if one.reverse:
                maps, place = maps[::-1], node.size - 1 - place
            before.append(reduce(AffineMap.then, maps[:place]) if place else None)
            totals.append(reduce(AffineMap.then, maps))
        # Two directions have one product of transitions, as only diagonal ones serve non-causal operators.
        assert len(totals) == 1 or transition.commutes
        far = gather([totals[0].transition.tensor, *(total.state for total in totals)], peers, self._count)
        found: Found = []
        for number, (one, inside) in enumerate(zip(scans, before, strict=True)):
            maps = [AffineMap(kind(row[0]), row[1 + number]) for row in far]
            entering, final = _scan_maps(maps, one, peers.rank)
            found.append((entering if inside is None else inside.apply(entering), final))
        return found

    def _pipeline(self, transition: Transition, scans: Sequence[DirectionalScan]) -> Found:
        # One direction after the other: at the same time, each would wait for the other's receiver.
        passed = [self._pass_on(transition, one) for one in scans]
        return [(entering, self._from_last(out, one)) for (entering, out), one in zip(passed, scans, strict=True)]

    def _pass_on(self, transition: Transition, one: DirectionalScan) -> tuple[Tensor, Tensor]:
        """The state that enters this shard and the one behind it; a slice is sent while the next one arrives.

        Sends are waited for before the axis' next pipeline, so that this rank does not wait for its neighbour.
        """
        step = -1 if one.reverse else 1
        source, target = self.rank - step, self.rank + step
        state = one.state.contiguous()
        entering = torch.zeros_like(state) if one.initial is None else one.initial.contiguous().clone()
        leaving = torch.empty_like(state)
        number = cost.num_slices(state.numel() * state.element_size(), self.size, SLICES, self._axis.near)
        bias, entering_line, leaving_line = state.view(-1), entering.view(-1), leaving.view(-1)
        slices = [
            (a, bias[part], entering_line[part], leaving_line[part]) for part, a in transition.sections(state, number)
        ]
        pending = self._axis.pending_sends
        with self._count(0):
            for request, _ in pending:
                request.wait()
        pending.clear()
        arriving = [self._post(dist.irecv, x, source) for _, _, x, _ in slices] if 0 <= source < self.size else []
        for index, (a, b, x, y) in enumerate(slices):
            if arriving:
                with self._count(0):
                    arriving[index].wait()
            a.affine(x, b, out=y)
            if 0 <= target < self.size:
                with self._count(y.numel() * y.element_size()):
                    pending.append((self._post(dist.isend, y, target), y))
        return entering, leaving

    def _recursive_doubling(self, transition: Transition, scans: Sequence[DirectionalScan]) -> Found:
        maps = [AffineMap(transition, one.state) for one in scans]
        distance = 1
        while distance < self.size:
            arrived = self._shift(maps, scans, distance)
            maps = [mine if got is None else got.then(mine) for got, mine in zip(arrived, maps, strict=True)]
            distance *= 2
        found: Found = []
        for one, before, inclusive in zip(scans, self._shift(maps, scans, 1), maps, strict=True):
            initial = torch.zeros_like(one.state) if one.initial is None else one.initial
            leaving = inclusive.apply(initial)
            entering = initial if before is None else before.apply(initial)
            found.append((entering, self._from_last(leaving.contiguous(), one)))
        return found

    def _shift(self, maps: list[AffineMap], scans: Sequence[DirectionalScan], distance: int) -> list[AffineMap | None]:
        """The maps of the ranks ``distance`` before this one, in each scan's direction; None where there is none."""
        sends, receives, arriving, num_bytes = [], [], [], 0
        for (a, b), one in zip(maps, scans, strict=True):
            step = -distance if one.reverse else distance
            payload = torch.cat([as_bytes(a.tensor), as_bytes(b)])
            into = torch.zeros_like(payload) if 0 <= self.rank - step < self.size else None
            arriving.append(into)
            if 0 <= self.rank + step < self.size:
                num_bytes += payload.numel()
                sends.append(self._peer(dist.isend, payload, self.rank + step))
            if into is not None:
                receives.append(self._peer(dist.irecv, into, self.rank - step))
        operations = receives + sends  # in this order, see `halo.P2PBatch`
        with self._count(num_bytes):
            for request in dist.batch_isend_irecv(operations) if operations else []:
                request.wait()
        found: list[AffineMap | None] = []
        for into, (a, b) in zip(arriving, maps, strict=True):
            parts = None if into is None else unpack(into, (a.tensor, b))
            found.append(None if parts is None else AffineMap(type(a)(parts[0]), parts[1]))
        return found

    def _peer(self, operation: Any, x: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(operation, x, self._axis.ranks[rank], group=self._axis.group)

    def _from_last(self, leaving: Tensor, one: DirectionalScan) -> Tensor | None:
        """The final state of a scan, broadcast by the last rank of its direction, if it is needed."""
        if not one.need_final_state:
            return None
        last = 0 if one.reverse else self.size - 1
        leaving = leaving.clone()  # a send of it may be pending
        with self._count(leaving.numel() * leaving.element_size() if self.rank == last else 0):
            dist.broadcast(_real(leaving), self._axis.ranks[last], group=self._axis.group)
        return leaving

    def _post(self, operation: Any, x: Tensor, rank: int) -> Any:
        return operation(_real(x), self._axis.ranks[rank], group=self._axis.group)


@cache
def _fastest(axis: Axis, num_bytes: int, need_final_state: bool, transition_bytes: int = 0) -> str:
    """By the cost model; logged once for each size of states."""
    node_size = None if axis.node is None else axis.node.size
    relay = cost.fastest(
        num_bytes, axis.size, SLICES, axis.near, axis.far, node_size, need_final_state, transition_bytes
    )
    if axis.rank == 0:
        log.info("states of %s bytes are scanned over %d ranks by %s", f"{num_bytes:,}", axis.size, relay)
    return relay


def gather(tensors: Sequence[Tensor], axis: Axis, count: ByteCounter = uncounted) -> list[tuple[Tensor, ...]]:
    """Every rank's ``tensors``, in rank order, in one all-gather of bytes; shapes and dtypes agree between ranks."""
    if axis.size == 1:
        return [tuple(tensors)]
    payload = torch.cat([as_bytes(t) for t in tensors])
    with count(payload.numel()):
        rows = all_gather(payload, axis)
    return [unpack(row, tensors) for row in rows]


def unpack(row: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors of the shapes and dtypes of ``like``, from their concatenated bytes ``row`` (uint8, one dimension)."""
    sizes = [t.numel() * t.element_size() for t in like]
    # A clone, because a slice of bytes need not be aligned for its dtype.
    return tuple(part.clone().view(t.dtype).view(t.shape) for part, t in zip(row.split(sizes), like, strict=True))


def _distinct(scans: Sequence[DirectionalScan]) -> list[Tensor]:
    """The B of the scans, once where two scans have the same."""
    return list({id(one.state): one.state for one in scans}.values())


def _columns(scans: Sequence[DirectionalScan]) -> list[int]:
    """The index in `_distinct` of each scan's B."""
    keys = list({id(one.state): None for one in scans})
    return [keys.index(id(one.state)) for one in scans]


def _scan_maps(maps: list[AffineMap], one: DirectionalScan, rank: int) -> tuple[Tensor, Tensor]:
    """The state that enters the shard of ``rank``, and the final state, given all shards' maps in rank order."""
    state = torch.zeros_like(one.state) if one.initial is None else one.initial
    entering = state
    order = range(len(maps))
    for place in reversed(order) if one.reverse else order:
        if place == rank:
            entering = state
        state = maps[place].apply(state)
    return entering, state


def _real(x: Tensor) -> Tensor:
    """A view that can be sent: complex numbers as pairs of real ones."""
    return torch.view_as_real(x) if x.is_complex() else x


def __getattr__(name: str) -> Any:
    return _aliases.attribute(__name__, name)
