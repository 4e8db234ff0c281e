"""`longreach train`, and what torchrun and deepspeed start: ``torchrun ... -m longreach.launch.train CONFIG
[key=value ...]``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from ..framework.config import RunConfig, load
from ..kernels.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``train``."""
    parser.add_argument("config", metavar="CONFIG", help="path of a YAML file, or a name in configs/")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="replaces a value of CONFIG, such as train.steps=10"
    )
    parser.add_argument("--deepspeed_config", metavar="F", help="a DeepSpeed JSON; the same as deepspeed=F")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Train in the world this process is part of; without one, start ``parallel.ranks`` local ranks. Returns the
    exit code.
    """
    overrides = list(arguments.overrides)
    if arguments.deepspeed_config:
        overrides.append(f"deepspeed={arguments.deepspeed_config}")
    config = load(arguments.config, overrides)
    if "RANK" not in os.environ and config.parallel.ranks > 1:
        return _start_ranks(config, [arguments.config, *overrides])
    return _train(config)


def _train(config: RunConfig) -> int:
    # Imported here, so that a wrong config is told at once and not after seconds of imports.
    from ..framework.finish import report
    from ..framework.monitor import say_plainly
    from ..framework.trainer import train
    from ..parallel.mesh import leave_world

    if os.environ.get("RANK", "0") == "0":
        say_plainly()
    try:
        result = train(config)
        if os.environ.get("RANK", "0") == "0":
            report(config, result)
    finally:
        leave_world()
    return 0


def _start_ranks(config: RunConfig, words: list[str]) -> int:
    """Start the ranks on this machine through torchrun's Python interface."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.parallel.ranks,
        run_id="longreach",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "longreach.launch.train", *words)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def fail(error: InputError) -> int:
    """Tell a user's mistake in one line. Where every rank finds the same one, the first of each machine tells it."""
    import torch.distributed as dist

    rank = os.environ.get("RANK", "0")
    joined = dist.is_available() and dist.is_initialized()
    if joined or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"longreach: {f'rank {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr, flush=True)
    return 2


@record
def main(words: Sequence[str] | None = None) -> None:
    """Entry point of every rank."""
    parser = argparse.ArgumentParser(prog="python -m longreach.launch.train", description=__doc__)
    add_arguments(parser)
    try:
        code = run(parser.parse_args(words))
    except InputError as error:
        code = fail(error)
    sys.exit(code)


if __name__ == "__main__":
    main()
