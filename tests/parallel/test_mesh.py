"""The mesh: first exchanges, time-outs, ranks that disagree, and work of one rank that the others wait for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import run_distributed
from torch._C import _distributed_c10d
from torch._subclasses.fake_tensor import FakeTensorMode

from longreach.parallel import flight_recorder, mesh
from longreach.parallel.cost import LINKS
from longreach.parallel.halo import halo
from longreach.parallel.mesh import Axis, PeerFailed, first_rank_only, to_device
from longreach.parallel.recorder import Recorder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for_the_first(axis: Axis, seconds: float, fails: bool) -> tuple[bool, str]:
    """Whether this rank did the work, and how it ended, in a group whose exchanges may take two seconds."""
    set_timeout = dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=2), axis.group)
    mesh.BEAT_SECONDS = 0.1
    worked = False

    def work() -> None:
        nonlocal worked
        worked = True
        time.sleep(seconds)
        if fails:
            raise OSError("no space")

    try:
        first_rank_only(work, axis)
    except (OSError, PeerFailed) as error:
        return worked, type(error).__name__
    finally:
        set_timeout(timedelta(seconds=120), axis.group)
    return worked, ""


def test_work_may_take_longer_than_an_exchange() -> None:
    assert run_distributed(wait_for_the_first, 3, 4.0, False, timeout=90) == [(True, ""), (False, ""), (False, "")]


def test_all_are_told_that_it_failed() -> None:
    assert run_distributed(wait_for_the_first, 2, 0.3, True) == [(True, "OSError"), (False, "PeerFailed")]


def first_exchanges(axis: Axis, sequence: int, lengths: list[int]) -> list[tuple[tuple[int, ...], str]]:
    """The first exchange of every group of a mesh that this rank is in, up to a halo exchange in which ranks without
    tokens take no part.
    """
    seen: dict[tuple[int, ...], str] = {}
    with Recorder() as recorder:
        laid_out = mesh.init_mesh(sequence, node_size=2)
        own = laid_out.sequence
        x = torch.ones(1, lengths[own.rank], 3)
        halo(x, own, lengths, 2)
    for event in recorder.events:
        ranks = own.ranks if event.kind in ("send", "receive") else event.ranks
        seen.setdefault(ranks, event.kind)
    return sorted(seen.items())


def test_every_rank_joins_the_first_exchange_of_every_group() -> None:
    """NCCL hangs where a group begins with a batch of sends and receives in which only some ranks take part."""
    world, rows, columns = (0, 1, 2, 3), [(0, 1), (2, 3)], [(0, 2), (1, 3)]
    for rank, found in enumerate(run_distributed(first_exchanges, 4, 4, [5, 0, 0, 4])):
        # One sequence over two nodes: the world, the sequence (the same ranks), this node, and its peers.
        assert found == sorted((ranks, "all_reduce") for ranks in (world, *rows, *columns) if rank in ranks)
    for rank, found in enumerate(run_distributed(first_exchanges, 4, 2, [5, 0])):
        assert found == sorted((ranks, "all_reduce") for ranks in (world, *rows, *columns) if rank in ranks)


def test_nccl_has_the_longer_time_out() -> None:
    """The heartbeat speaks at ``parallel.timeout``; NCCL's watchdog would abort at the same moment, without a cause."""
    given: dict[str, timedelta] = {}

    class Backend:
        def __init__(self, name: str) -> None:
            self.name = name

        def _set_default_timeout(self, timeout: timedelta) -> None:
            given[self.name] = timeout

    class Group:
        _device_types = (torch.device("cpu"), torch.device("cuda"))

        def _get_backend(self, device: torch.device) -> Backend:
            return Backend(device.type)

    mesh.extend_nccl_timeout(Group(), 600.0)
    assert given == {"cuda": timedelta(seconds=1230)}


DISAGREE = """
import os, threading
import torch, torch.distributed as dist
from longreach.parallel.heartbeat import Heartbeat
from longreach.parallel.mesh import init_mesh, join_world

def name(line):
    print(line, flush=True)
    os._exit(3)

join_world(600.0)
mesh = init_mesh()
with Heartbeat(mesh.world, 5.0, name) as heartbeat:
    heartbeat.set_phase("in step 3")
    x = torch.ones(4)
    dist.all_reduce(x) if mesh.world.rank else dist.broadcast(x, 1)
    threading.Event().wait()
"""


def test_ranks_in_different_collectives_are_named_where_nothing_raises() -> None:
    """As with NCCL, whose exchanges wait without an error: here by gloo's time-out of ten minutes."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DISAGREE], env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said, _ = ranks[0].communicate(timeout=90)
        assert ranks[0].returncode == 3
        assert "ranks disagree in step 3: exchange" in said and "broadcast" in said and "all_reduce" in said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_the_flight_recorders_of_gloo_and_nccl_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of time; NCCL numbers the exchanges of a group by itself."""

    def entry(number: int, kind: str, created: int) -> dict[str, Any]:
        shape = {"input_sizes": [[3]], "input_dtypes": ["Float"]}
        named = {"process_group": ["0", "default"], "profiling_name": kind, "collective_seq_id": number}
        return {**shape, **named, "record_id": number, "time_created_ns": created, "is_p2p": False}

    dumps = {
        "_dump_fr_trace_json": [entry(1, "gloo:all_reduce", 5), entry(2, "gloo:barrier", 30)],
        "_dump_nccl_trace_json": [entry(1, "nccl:broadcast", 20), entry(2, "nccl:all_reduce", 40)],
    }
    for name, entries in dumps.items():
        monkeypatch.setattr(_distributed_c10d, name, partial(json.dumps, {"entries": entries}), raising=False)
    assert flight_recorder.recent_collectives() == {
        "0.1": "all_reduce of 3 Float",
        "0 (NCCL).1": "broadcast of 3 Float",
        "0.2": "barrier",
        "0 (NCCL).2": "all_reduce of 3 Float",
    }


@pytest.mark.parametrize(
    ("relay", "sequence", "device", "measured", "expected"),
    [
        ("auto", 8, "cuda", False, "gather"),
        ("auto", 16, "cuda", False, "auto"),
        ("auto", 8, "cuda", True, "auto"),
        ("auto", 8, "cpu", False, "auto"),
        ("pipeline", 8, "cuda", False, "pipeline"),
    ],
)
def test_few_gpus_gather_until_their_link_is_measured(
    relay: str, sequence: int, device: str, measured: bool, expected: str
) -> None:
    near = LINKS["nvlink"] if measured else None
    assert mesh.default_relay(relay, sequence, torch.device(device), near) == expected


def test_what_is_on_a_gpu_is_not_pinned() -> None:
    """On a GPU without data: its memory cannot be pinned, and decoding passes the token that it has sampled there."""
    with FakeTensorMode():
        x = torch.empty(2, 1, dtype=torch.int64, device="cuda")
        with mock.patch.object(torch.Tensor, "pin_memory", side_effect=RuntimeError("cannot pin")):
            assert to_device(x, torch.device("cuda", 0)).device.type == "cuda"
