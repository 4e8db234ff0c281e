"""Records every exchange of torch.distributed: those of this package, of DeepSpeed and of other code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .traffic import Traffic


@dataclass(frozen=True)
class Event:
    """One exchange of this rank.

    Attributes:
        kind: "all_gather", "all_to_all", "all_reduce", "reduce_scatter", "broadcast", "send", "receive" or "barrier";
            the operator's own name where it is another one.
        ranks: global ranks of the group; of a send or receive, the two of them.
        num_bytes: payload of this rank: of a collective, whatever the number of ranks; of an all-to-all what goes to
            other ranks; 0 for a receive.
        layer, verb: of `Span`, where one of its verbs made it; else "".
    """

    kind: str
    ranks: tuple[int, ...]
    num_bytes: int
    layer: str = ""
    verb: str = ""


class Recorder(TorchDispatchMode):
    """Records the exchanges that run within it, forward and backward.

        with Recorder(span.traffic) as recorder:
            model(tokens, span).sum().backward()
        recorder.events

    Args:
        traffic: of the spans whose layers and verbs are recorded.
    """

    def __init__(self, traffic: Traffic | None = None) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._record(func, args)
        return func(*args, **(kwargs or {}))

    def _record(self, func: Any, args: tuple[Any, ...]) -> None:
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
        group = dist.ProcessGroup.unbox(named["process_group"])
        ranks = tuple(dist.get_process_group_ranks(group))
        kind, size = _KINDS.get(func._opname, (func._opname, lambda named, rank: _bytes(named)))
        if kind in ("send", "receive"):
            ranks = tuple(sorted((dist.get_rank(), ranks[named["dst" if kind == "send" else "src"]])))
        layer, verb = self._traffic.label if self._traffic is not None else ("", "")
        self.events.append(Event(kind, ranks, size(named, dist.get_rank(group)), layer, verb))


def _size(tensors: Any) -> int:
    """Bytes of a tensor or of nested lists of them."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(one) for one in tensors) if isinstance(tensors, (list, tuple)) else 0


def _bytes(named: Mapping[str, Any]) -> int:
    """Bytes of a collective's input, by the names that the argument may have."""
    names = ("input_tensors", "input_tensor", "input", "tensors")
    return next((_size(named[name]) for name in names if name in named), 0)


def _to_others(named: Mapping[str, Any], rank: int) -> int:
    """Bytes of an all-to-all's input without this rank's own part."""
    sent: Tensor = named["input"]
    splits = named["input_split_sizes"]
    if not splits:
        return _size(sent) - _size(sent) // dist.ProcessGroup.unbox(named["process_group"]).size()
    return (sum(splits) - splits[rank]) * (_size(sent) // max(1, sum(splits)))


def _of_root(named: Mapping[str, Any], rank: int) -> int:
    return _bytes(named) if rank == named["root_rank"] else 0


_KINDS: dict[str, tuple[str, Callable[[Mapping[str, Any], int], int]]] = {
    "_allgather_base_": ("all_gather", lambda named, rank: _bytes(named)),
    "allgather_": ("all_gather", lambda named, rank: _bytes(named)),
    "allgather_into_tensor_coalesced_": ("all_gather", lambda named, rank: _size(named["inputs"])),
    "alltoall_base_": ("all_to_all", _to_others),
    "alltoall_": ("all_to_all", lambda named, rank: _bytes(named) - _size(named["input_tensors"][rank])),
    "allreduce_": ("all_reduce", lambda named, rank: _bytes(named)),
    "_reduce_scatter_base_": ("reduce_scatter", lambda named, rank: _bytes(named)),
    "broadcast_": ("broadcast", _of_root),
    "send": ("send", lambda named, rank: _bytes(named)),
    "recv_": ("receive", lambda named, rank: 0),
    "barrier": ("barrier", lambda named, rank: 0),
}
