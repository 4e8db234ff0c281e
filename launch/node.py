"""Starts the ranks of one node of several: options of torchrun, then arguments of `longreach train`.

``python -m longreach.launch.node --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 CONFIG
[key=value ...]``

The exit codes are those of `longreach train`. torchrun itself exits with 1 whatever its ranks exit with, and takes a
run that stopped early and saved a checkpoint for one that failed; from these exit codes, what starts this program
(SLURM, Kubernetes) knows whether to resume, to give up, or to start again.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from datetime import timedelta

from ..errors import InputError
from .endpoint import NotReached, is_local, route_to, set_interface
from .exit_codes import FAILED, STOPPED, report_error, report_errors
from .local import report_rank_errors
from .process import exit_process, forward_signals, forwarded, prepare_libraries

STORE_SECONDS = 10.0  # for the store of another launcher on this host to answer


def main(words: Sequence[str] | None = None) -> int:
    """Run this node's ranks to their end; returns the exit code of the first that ended early, else 0."""
    forward_signals()
    prepare_libraries()  # in the ranks, which inherit the environment
    with report_errors() as outcome:
        outcome.exit_code = _run(words)
    return outcome.exit_code


def _run(words: Sequence[str] | None) -> int:
    from torch.distributed import DistError, run
    from torch.distributed.elastic.rendezvous import RendezvousError

    from . import rendezvous
    from .clocks import ignore_clocks

    parser = run.get_args_parser()
    _describe(parser)
    arguments = parser.parse_args(words)
    if arguments.max_restarts:
        allowed = "only 0: ranks that stopped early and saved a checkpoint would be started again"
        raise InputError("--max-restarts", arguments.max_restarts, allowed, "start this again where it exits with 1")
    arguments.training_script_args.insert(0, arguments.training_script)
    arguments.training_script, arguments.module = "longreach.launch.train", True
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"  # after others, `forward_signals` leaves the ranks time to save
    # Else torchrun keeps the address of a store that it made for the first ranks from nodes that join later.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        _set_route(arguments)
        ignore_clocks()
        if arguments.rdzv_backend == rendezvous.C10D:
            arguments.rdzv_backend = rendezvous.use_rendezvous()
        with report_rank_errors() as outcome:
            run.run(arguments)
    except (RendezvousError, DistError, NotReached) as error:
        if forwarded:  # the leading host, which holds the store, ended a moment before this one
            return STOPPED
        endpoint = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
        reason = str(error.__cause__ or error) or type(error).__name__  # the store's own words, where it failed
        return report_error(f"the nodes did not meet at {endpoint}: {reason.splitlines()[0]}", FAILED)
    return outcome.exit_code


def _set_route(arguments: argparse.Namespace) -> None:
    """Set what torchrun and the ranks' libraries otherwise take from this host's name; what is given is kept."""
    from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

    from .rendezvous import DEFAULT_PORT, JOIN_SECONDS

    if arguments.rdzv_backend != "c10d" or not arguments.rdzv_endpoint:
        return
    host, port = parse_rendezvous_endpoint(arguments.rdzv_endpoint, DEFAULT_PORT)
    if is_local(host):
        return
    matches: bool | None = None
    with suppress(OSError):  # this host's own name is not known, where torchrun would fail
        matches = _matches_machine_hostname(host)
    conf = dict(pair.split("=", 1) for pair in arguments.rdzv_conf.split(",") if "=" in pair)
    seconds = float(conf.get("join_timeout", JOIN_SECONDS))
    route = route_to(host, port, seconds)
    if not route.leads and not _is_launcher(host, port, seconds):
        raise NotReached(
            f"what listens there has not answered for {seconds:g} s as a launcher; see what that host says"
        )
    leads = route.leads and not _is_held(host, port)
    if "is_host" not in conf and leads != matches:  # where it may lead, torchrun tries, and else joins
        arguments.rdzv_conf = ",".join(filter(None, [arguments.rdzv_conf, f"is_host={int(leads)}"]))
    arguments.local_addr = arguments.local_addr or route.address
    set_interface(route.interface)


def _is_held(host: str, port: int) -> bool:
    """Whether another launcher on this host leads already.

    Raises:
        NotReached: what listens on the port is another program.
    """
    try:
        socket.create_server(("", port)).close()
        return False
    except OSError as error:
        why = os.strerror(error.errno or 0)
    if not _is_launcher(host, port, STORE_SECONDS):
        fix = "end what holds it, or give --rdzv-endpoint another port on all hosts"
        raise NotReached(f"this host leads and cannot listen on port {port} ({why}); {fix}")
    return True


def _is_launcher(host: str, port: int, seconds: float) -> bool:
    """Whether what listens there answers as the store of a launcher; torch waits for its answer without a time-out."""
    from torch._C._distributed_c10d import TCPStore

    from ..framework.data.stall import run_in_thread

    timeout = timedelta(seconds=seconds)
    try:
        run_in_thread(lambda: TCPStore(host, port, is_master=False, timeout=timeout)).result(seconds)
    except (FutureTimeoutError, RuntimeError):
        return False
    return True


_USAGE = "python -m longreach.launch.node [option of torchrun ...] CONFIG [key=value ...]"
_DESCRIPTION = """Starts the ranks of one node of several: options of torchrun, then the arguments of `longreach train`.
Run it on every node."""
_EXIT_CODES = """exit codes, those of the first rank that ended early (torchrun itself exits with 1 for all of them):
  0    all steps are done
  75   SIGTERM, SIGUSR1, Ctrl-C or train.time_limit stopped it, with a checkpoint: run the same command to resume
  2    a mistake in the arguments, the config or the data, reported in one line
  1    a fault, or the nodes did not meet: run the same command to resume from the newest checkpoint
  130  Ctrl-C before the first step, or twice"""
_ARGUMENTS = {
    "training_script": ("CONFIG", "path of a YAML file, or a name in configs/; see longreach train --help"),
    "training_script_args": ("key=value", "replaces one value of CONFIG, as in train.steps=1000"),
}
_HIDDEN = ("max_restarts", "module", "no_python", "run_path", "signals_to_handle")  # refused, or set here


def _describe(parser: argparse.ArgumentParser) -> None:
    """Replace the texts of torchrun's ``--help`` by those of this program."""
    parser.prog, parser.usage = "python -m longreach.launch.node", _USAGE
    parser.description, parser.epilog = _DESCRIPTION, _EXIT_CODES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for action in parser._actions:
        if action.dest in _ARGUMENTS:
            action.metavar, action.help = _ARGUMENTS[action.dest]
        elif action.dest in _HIDDEN:
            action.help = argparse.SUPPRESS


if __name__ == "__main__":
    exit_process(main())  # without the moments in which Python has given up its handlers of signals
