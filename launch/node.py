"""The ranks of one node of several: torchrun's options, then those of `longreach train`, and its exit codes.

``python -m longreach.launch.node --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 CONFIG
[key=value ...]``

torchrun itself ends with 1 whatever its ranks end with, and takes a run that stopped because it was asked to for one
that failed. What starts this (SLURM, Kubernetes) can tell the cases apart: go on, give up, or start again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

from ..kernels.errors import InputError
from .train import FAILED, guarded, launched, tell


def main(words: Sequence[str] | None = None) -> int:
    """Run this node's ranks to their end; returns the exit code of the first that ended early, else 0."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _hand_on)
    return guarded(lambda: _run(words))


def _run(words: Sequence[str] | None) -> int:
    from torch.distributed import DistError, run
    from torch.distributed.elastic.rendezvous import RendezvousError

    parser = run.get_args_parser()
    parser.prog = "python -m longreach.launch.node"
    arguments = parser.parse_args(words)
    if arguments.max_restarts:
        allowed = "only 0: a rank that stopped as it was asked to would be started again"
        raise InputError("--max-restarts", arguments.max_restarts, allowed, "start this again where it ends with 1")
    arguments.training_script_args.insert(0, arguments.training_script)
    arguments.training_script, arguments.module = "longreach.launch.train", True
    arguments.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # of the others, `_hand_on` leaves the ranks time to save
    try:
        return launched(lambda: run.run(arguments))
    except (RendezvousError, DistError) as error:
        place = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
        why = str(error) or type(error).__name__
        return tell(f"the nodes did not meet at {place}: {why}", FAILED)


def _hand_on(number: int, frame: FrameType | None) -> None:
    """To the ranks, which save and end; where there are none yet, this process ends."""
    ranks = psutil.Process().children()
    for rank in ranks:
        rank.send_signal(number)
    if not ranks:
        os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
