"""Work of one rank that the others wait for."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from helpers import run_distributed

from longreach.parallel import mesh
from longreach.parallel.mesh import Axis, PeerFailed, first_rank_only


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
    assert run_distributed(wait_for_the_first, 3, 4.0, False, timeout=30) == [(True, ""), (False, ""), (False, "")]


def test_all_are_told_that_it_failed() -> None:
    assert run_distributed(wait_for_the_first, 2, 0.3, True) == [(True, "OSError"), (False, "PeerFailed")]
