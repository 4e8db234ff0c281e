"""The (data, sequence) process mesh, its groups and time-outs."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from . import cost, flight_recorder

GATHER_RANKS = 8  # on GPUs, ranks of a sequence up to which `auto` gathers where the link was not measured
BEAT_SECONDS, RUNNING = 1.0, -1.0  # how often the first rank reports that it is running, and the value it sends


@dataclass(frozen=True)
class Axis:
    """This rank's group along one axis of the mesh.

    Attributes:
        rank, size: this process's rank in the group, and the number of ranks.
        ranks: the global ranks of the group, in order.
        group: the process group; None for one rank.
        node: the ranks of the group on this rank's node, where the group takes several nodes, with as many ranks on
            each; else None.
        peers: the ranks with the same place on each of these nodes; else None.
        relay: the algorithm of state exchanges: one of `parallel.relay.RELAYS`.
        near, far: the links between ranks of a node, and between nodes.
        pending_sends: (request, tensor) of sends that are waited for before the next pipeline of states.
    """

    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    node: Axis | None = None
    peers: Axis | None = None
    relay: str = "gather"
    near: cost.Link = cost.LINKS["loopback"]
    far: cost.Link = cost.LINKS["loopback"]
    pending_sends: list[tuple[Any, Tensor]] = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True)
class Mesh:
    """The world as data-parallel x sequence-parallel ranks; the ranks of one sequence are consecutive.

    Attributes:
        data: the ranks that hold the same shard of different sequences.
        sequence: the ranks that hold the shards of one sequence, in order.
        world: all ranks.
        device: where this rank computes.
    """

    data: Axis = field(default_factory=Axis)
    sequence: Axis = field(default_factory=Axis)
    world: Axis = field(default_factory=Axis)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def world_size() -> int:
    """Ranks of this job: of the joined world, else as the launcher's environment says, else 1."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its node, as the launcher's environment says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_mesh(ranks: int, sequence: int) -> None:
    """Raise `InputError` unless ``ranks`` ranks can be laid out as data x ``sequence``."""
    if sequence < 1 or ranks % sequence:
        raise InputError(
            "parallel.sequence",
            sequence,
            f"ranks = data x sequence, so it must divide the {ranks} ranks of this job",
            "start another number of ranks or change parallel.sequence",
        )


def join_world(timeout_seconds: float = 1800.0) -> None:
    """Join the world that torchrun or deepspeed started (NCCL on GPUs, gloo on CPUs). Does nothing for one process.

    Args:
        timeout_seconds: how long to look for the other ranks, and how long an exchange may take later.

    Raises:
        InputError: the launcher's environment is not one, or the first rank's port is taken.
        NotMet: the first rank was not reached in time, or not all ranks came.
    """
    if dist.is_initialized() or (world_size() == 1 and "MASTER_ADDR" not in os.environ):
        return
    flight_recorder.enable()
    rank, ranks, port = (_from_launcher(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    host = os.environ.get("MASTER_ADDR", "")
    if not host or not 0 < port < 1 << 16 or not 0 <= rank < ranks:
        allowed = "must be a host, a port, and a rank below the number of ranks, from the launcher's environment"
        raise InputError("MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE", (host, port, rank, ranks), allowed, _START)
    if torch.cuda.is_available() and local_rank() >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        allowed = f"must be at most {count}, one for each GPU of this machine"
        fix = f"set parallel.ranks={count}, or put CUDA_VISIBLE_DEVICES= before the command to compute on processors"
        raise InputError("ranks of a machine", local_size() or local_rank() + 1, allowed, fix)
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_port(host, port)
    else:
        _reach(host, port, timeout_seconds)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    timeout, c10d = timedelta(seconds=timeout_seconds), cast(Any, dist.distributed_c10d)
    # Torch would let exchanges of groups that are made later, DeepSpeed's among them, hang for half an hour.
    c10d.default_pg_timeout, c10d.default_pg_nccl_timeout = timeout, nccl_timeout(timeout_seconds)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
        extend_nccl_timeout(dist.group.WORLD, timeout_seconds)
    except RuntimeError as error:
        allowed = f"the {ranks} ranks did not find each other within {timeout_seconds:g} s ({error})"
        fix = "start all ranks at about the same time, in a network where each reaches each, or raise parallel.timeout"
        raise NotMet("rendezvous", f"{host}:{port}", allowed, fix + _hint()) from None


def nccl_timeout(timeout_seconds: float) -> timedelta:
    """How long NCCL may take where an exchange may take ``timeout_seconds``: long enough for the heartbeat to name the
    cause, before NCCL's watchdog aborts the process without one.
    """
    return timedelta(seconds=2 * timeout_seconds + 30)


def extend_nccl_timeout(group: Any, timeout_seconds: float) -> None:
    """Set `nccl_timeout` for the NCCL backend of a group, if it has one; its gloo backend keeps its time-out."""
    for device in group._device_types:
        if device.type == "cuda":
            group._get_backend(device)._set_default_timeout(nccl_timeout(timeout_seconds))


_START = "start the ranks with torchrun or deepspeed, or let longreach train start them (parallel.ranks)"


def _from_launcher(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise InputError(name, text, "must be a whole number in the launcher's environment", _START)
    return int(text)


def _check_port(host: str, port: int) -> None:
    """Raise `InputError` unless this process, the first rank, can listen on the port."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        allowed = f"the first rank cannot listen there: {error.strerror}"
        fix = "end what holds the port, or choose another (torchrun --master-port, deepspeed --master_port)"
        raise InputError("rendezvous", f"{host}:{port}", allowed, fix) from None


def _reach(host: str, port: int, seconds: float) -> None:
    """Wait until a process listens there, and raise `NotMet` if none does for so many seconds."""
    deadline, why = time.monotonic() + seconds, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            return socket.create_connection((host, port), timeout=left).close()
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    allowed = f"the first rank did not answer within {seconds:g} s: {why}"
    fix = "start it there, and let this machine reach that port, or raise parallel.timeout"
    raise NotMet("rendezvous", f"{host}:{port}", allowed, fix + _hint())


def _hint() -> str:
    """What else may help where torchrun took addresses from the names that the hosts have for themselves."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or "GLOO_SOCKET_IFNAME" in os.environ or local_size() == world_size():
        return ""
    ways = "start with python -m longreach.launch.node, or give --local-addr and GLOO_SOCKET_IFNAME on each host"
    return f"; torchrun goes by the hosts' own names: {ways}"


def fake_world(ranks: int, rank: int, node_size: int) -> None:
    """Join a world of which only this rank exists; collectives return without data. For dry runs.

    Raises:
        InputError: this process is in a world already, e.g. after `train` without `leave_world`.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        found = f"rank {dist.get_rank()} of {dist.get_world_size()}"
        allowed = "is in a world of ranks already, and a dry run makes one of its own"
        raise InputError("this process", found, allowed, "call leave_world()")
    os.environ |= {"LOCAL_WORLD_SIZE": str(node_size), "LOCAL_RANK": str(rank % node_size)}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


def leave_world() -> None:
    """Leave the world, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def default_device() -> torch.device:
    """Where this process computes: its GPU, if torch sees one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``. A GPU copies from pinned memory, and the host does not wait for it."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)


def init_mesh(
    sequence: int = 1,
    *,
    relay: str = "auto",
    node_size: int | None = None,
    near: cost.Link | None = None,
    far: cost.Link | None = None,
) -> Mesh:
    """Lay the joined world out as data x sequence.

    Args:
        sequence: ranks that share one sequence; rank ``d * sequence + s`` is part s of data rank d.
        relay: the algorithm of state exchanges: one of `parallel.relay.RELAYS`.
        node_size: ranks of a node; None to take it from the launcher.
        near, far: links within a node and between nodes; None for the defaults of `cost.links`.

    Raises:
        InputError: ``sequence`` does not divide the number of ranks.
    """
    ranks = world_size()
    check_mesh(ranks, sequence)
    device = default_device()
    if not dist.is_initialized():
        return Mesh(device=device)
    rows = [tuple(range(start, start + sequence)) for start in range(0, ranks, sequence)]
    columns = [tuple(range(part, ranks, sequence)) for part in range(sequence)]
    world = Axis(dist.get_rank(), ranks, tuple(range(ranks)), dist.group.WORLD)
    node, peers = node_axes(rows, node_size or local_size() or ranks)
    if relay == "hierarchical" and node is None:
        allowed = f"needs a sequence over several nodes; its {sequence} ranks lie on one, or unevenly on several"
        raise InputError("parallel.relay", relay, allowed, "choose auto, gather, pipeline or recursive_doubling")
    relay = default_relay(relay, sequence, device, near)
    supposed = cost.links(device.type)
    axis = replace(_join(rows), relay=relay, node=node, peers=peers, near=near or supposed[0], far=far or supposed[1])
    mesh = Mesh(data=_join(columns), sequence=axis, world=world, device=device)
    for one in (world, mesh.data, axis, node, peers):
        warm_up(one, device)
    return mesh


def default_relay(relay: str, sequence: int, device: torch.device, near: cost.Link | None) -> str:
    """``gather`` for ``auto`` between few GPUs whose link was not measured, else ``relay``.

    The cost model would choose by a supposed latency. An all-gather has one, the other algorithms have several in
    sequence; `longreach doctor` measures it.
    """
    unmeasured = relay == "auto" and device.type == "cuda" and near is None and sequence <= GATHER_RANKS
    return "gather" if unmeasured else relay


def warm_up(axis: Axis | None, device: torch.device) -> None:
    """A first exchange with all ranks of a group; a collective.

    NCCL makes a group's communicator at its first exchange. If that were a batch of sends and receives, all ranks of
    the group would have to take part, but ranks without tokens have nothing to exchange.
    """
    if axis is not None and axis.group is not None:
        dist.all_reduce(torch.zeros(1, device=device), group=axis.group)


def local_size() -> int:
    """Ranks of this node, as the launcher's environment says (torchrun and deepspeed by different names); 0 if not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "0")


def is_one_host(world: Axis) -> bool:
    """Whether the launcher's environment says that all ranks are on this node."""
    return local_size() == world.size or world.size == 1


def node_axes(rows: list[tuple[int, ...]], node_size: int) -> tuple[Axis | None, Axis | None]:
    """`Axis.node` and `Axis.peers` for ``rows`` of ranks, if each row takes several whole nodes; a collective."""
    sequence = len(rows[0])
    if sequence <= node_size or sequence % node_size or node_size == 1:
        return None, None
    nodes = [row[first : first + node_size] for row in rows for first in range(0, sequence, node_size)]
    peers = [row[place::node_size] for row in rows for place in range(node_size)]
    return _join(nodes), _join(peers)


def _join(layout: list[tuple[int, ...]]) -> Axis:
    """Make every group of ``layout`` (a collective: all ranks make all groups) and return the one this rank is in."""
    mine = Axis()
    for ranks in layout:
        group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
        if group is not None and dist.get_rank() in ranks and torch.cuda.is_available():
            extend_nccl_timeout(group, cast(Any, dist.distributed_c10d).default_pg_timeout.total_seconds())
        if dist.get_rank() in ranks:
            mine = Axis(ranks.index(dist.get_rank()), len(ranks), ranks, group)
    return mine


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's ``x`` (one dimension, the same size everywhere), as rows; a collective."""
    rows = x.new_empty(axis.size, x.numel())
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    collective(rows.view(-1), x, group=axis.group)
    return rows


def as_bytes(x: Tensor) -> Tensor:
    """The elements of ``x`` in a row, as bytes: so every dtype travels on every backend."""
    row = x.resolve_conj().contiguous().view(-1)
    # A single element is contiguous whatever its stride says, but bytes are only seen where the stride is 1.
    return row.as_strided(row.shape, (1,)).view(torch.uint8)


def gather_values(values: list[float], axis: Axis) -> list[list[float]]:
    """Every rank's ``values`` (fp64), in rank order; a collective over an axis."""
    if axis.group is None:
        return [list(values)]
    gathered: list[list[float]] = all_gather(torch.tensor(values, dtype=torch.float64), axis).numpy().tolist()
    return gathered


def gather_texts(text: str, axis: Axis) -> list[str]:
    """Every rank's ``text``, of any length, in rank order; a collective over an axis."""
    content = text.encode()
    sizes = [int(size) for (size,) in gather_values([float(len(content))], axis)]
    if axis.group is None or not any(sizes):
        return [text] * axis.size
    padded = content.ljust(max(sizes), b"\0")
    rows = all_gather(torch.frombuffer(bytearray(padded), dtype=torch.uint8), axis).numpy()
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


class NotMet(InputError):
    """Ranks did not find each other in time: perhaps a mistake, perhaps a fault of the network, which passes."""


class PeerFailed(RuntimeError):
    """Another rank failed and has said why."""


class ExchangeFailed(RuntimeError):
    """An exchange between ranks failed, as one of them is lost."""


class RanksDisagree(RuntimeError):
    """Ranks made different exchanges where they had to make the same."""


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of an exchange, by the messages of gloo and NCCL."""
    words = ("gloo", "NCCL", "by peer", "remote process exited", "Timed out", "Timeout")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def on_all_ranks(work: Callable[[], None], axis: Axis) -> None:
    """Run ``work`` on every rank of the axis and wait for all; a collective.

    Raises:
        PeerFailed: on the ranks where it succeeded, if it raised on another one.
    """
    failure: Exception | None = None
    try:
        work()
    except Exception as error:  # the other ranks are informed first; raised again below
        failure = error
    failed = [rank for rank, (bad,) in enumerate(gather_values([float(failure is not None)], axis)) if bad]
    if failure is not None:
        raise failure
    if failed:
        raise PeerFailed(f"rank {axis.ranks[failed[0]]} failed")


def first_rank_only(work: Callable[[], None], axis: Axis) -> None:
    """Run ``work`` on the first rank of the axis while the others wait, without a time-out; a collective.

    Raises:
        PeerFailed: on the other ranks, if it raised.
    """
    over = threading.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # another rank is gone: the next exchange fails as well
            while not over.wait(BEAT_SECONDS):
                gather_values([RUNNING], axis)
            gather_values([0.0], axis)

    def lead() -> None:
        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        try:
            work()
        finally:
            over.set()
            telling.join()

    def wait() -> None:
        while gather_values([0.0], axis)[0][0] == RUNNING:
            pass

    on_all_ranks(work if axis.size == 1 else wait if axis.rank else lead, axis)
