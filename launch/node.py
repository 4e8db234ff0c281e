"""The ranks of one node of several: torchrun's options, then those of `longreach train`, and its exit codes.

``python -m longreach.launch.node --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 CONFIG
[key=value ...]``

torchrun itself ends with 1 whatever its ranks end with, and takes a run that stopped because it was asked to for one
that failed. What starts this (SLURM, Kubernetes) can tell the cases apart: go on, give up, or start again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

from ..errors import InputError
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
    _describe(parser)
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


_USAGE = "python -m longreach.launch.node [option of torchrun ...] CONFIG [key=value ...]"
_DESCRIPTION = """The ranks of one node of several: options of torchrun, then the words of `longreach train`.
Run it on every node."""
_EXIT_CODES = """exit codes, those of the first rank that ended early (torchrun itself ends with 1 for all of them):
  0    all steps are done
  75   SIGTERM, SIGUSR1 or train.time_limit asked for it, and the run was saved: the same command goes on
  2    a mistake in what was given, told in one line
  1    a fault, or the nodes did not meet: start this again, and it goes on from the newest checkpoint
  130  Ctrl-C"""
_WORDS = {
    "training_script": ("CONFIG", "path of a YAML file, or a name in configs/; see longreach train --help"),
    "training_script_args": ("key=value", "replaces a value of CONFIG"),
}
_NOT_OURS = ("max_restarts", "module", "no_python", "run_path", "signals_to_handle")  # refused, or set here


def _describe(parser: argparse.ArgumentParser) -> None:
    """Make torchrun's page one of this command."""
    parser.prog, parser.usage = "python -m longreach.launch.node", _USAGE
    parser.description, parser.epilog = _DESCRIPTION, _EXIT_CODES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for action in parser._actions:
        if action.dest in _WORDS:
            action.metavar, action.help = _WORDS[action.dest]
        elif action.dest in _NOT_OURS:
            action.help = argparse.SUPPRESS


def _hand_on(number: int, frame: FrameType | None) -> None:
    """To the ranks, which save and end; where there are none yet, this process ends."""
    ranks = psutil.Process().children()
    for rank in ranks:
        rank.send_signal(number)
    if not ranks:
        os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
