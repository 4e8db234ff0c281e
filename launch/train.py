"""`longreach train`, and what torchrun and deepspeed start: ``torchrun ... -m longreach.launch.train CONFIG
[key=value ...]``.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import InputError

if TYPE_CHECKING:
    from ..framework.config import RunConfig

# Exit codes; stopped: before the last step, as a signal or the clock asked; the same command goes on. Unread: whoever
# read the output has left.
MISTAKE, FAILED, INTERRUPTED, STOPPED, UNREAD = 2, 1, 130, 75, 141
PATIENCE_SECONDS = 3.0


class Parser(argparse.ArgumentParser):
    """An argument parser that tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(tell(f"{message}; see {self.prog} --help"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``train``."""
    names = ", ".join(sorted(file.stem for file in (Path(__file__).parent.parent / "configs").glob("*.yaml")))
    parser.add_argument("config", metavar="CONFIG", help=f"path of a YAML file, or one of {names}")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="replaces a value of CONFIG")
    parser.add_argument("--deepspeed_config", metavar="F", help="a DeepSpeed JSON; the same as deepspeed=F")
    plan_help = "train nothing: measure one rank's memory and work, and predict the exchanges, "
    plan_help += "as if --world ranks were there"
    parser.add_argument("--dry-run", action="store_true", help=plan_help)
    parser.add_argument("--world", type=int, metavar="N", help="with --dry-run: ranks in all (default parallel.ranks)")
    parser.add_argument("--per-node", type=int, metavar="N", default=8, help="with --dry-run: ranks of a node (8)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; ``key=value`` may also follow an option, where argparse takes no list up again."""
    arguments, rest = parser.parse_known_args(words)
    foreign = [word for word in rest if word.startswith("-") or "overrides" not in arguments]
    if foreign:
        settings = " (settings are key=value, as in train.steps=3)" if "overrides" in arguments else ""
        command: argparse.ArgumentParser = getattr(arguments, "parser", parser)
        command.error(f"unrecognized arguments: {' '.join(foreign)}{settings}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Train in the world this process is part of; without one, start ``parallel.ranks`` local ranks. Returns the
    exit code.
    """
    from ..framework.config import load, without_secrets

    overrides = list(arguments.overrides)
    if arguments.deepspeed_config:
        overrides.append(f"deepspeed={json.dumps(arguments.deepspeed_config)}")
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if started:
        overrides.append(f"parallel.ranks={os.environ['WORLD_SIZE']}")
    if arguments.world is not None:
        if not arguments.dry_run:
            raise InputError("--world", arguments.world, "only with --dry-run", "set parallel.ranks instead")
        overrides.append(f"parallel.ranks={arguments.world}")
    config = load(arguments.config, overrides)
    try:
        if arguments.dry_run:
            return _plan(config, arguments.per_node)
        if not started and config.parallel.ranks > 1:
            return _start_ranks(config, [arguments.config, *overrides])
        return _train(config)
    except InputError as error:
        raise without_secrets(error, config) from None


def _plan(config: RunConfig, node_size: int) -> int:
    from .dry_run import plan, tell

    print(tell(plan(config, node_size=node_size, say=partial(print, file=sys.stderr, flush=True))))
    return 0


def _train(config: RunConfig) -> int:
    # Imported here, so that a wrong config is told at once and not after seconds of imports.
    from ..framework.monitoring.monitor import say_plainly
    from ..framework.trainer import train
    from ..parallel.mesh import leave_world
    from .report import report

    first = os.environ.get("RANK", "0") == "0"
    say_plainly(logging.INFO if first else logging.ERROR)  # what all ranks find out is said once
    try:
        result = train(config)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return tell(_memory_advice(config), FAILED)
    if first and result.stopped:
        tell(f"stopped after step {result.step}, {result.stopped}; it was saved: the same command goes on", STOPPED)
    elif first:
        report(config, result)
    leave_world()  # only after success: a rank that fails must not wait for the others
    if result.stopped and not first:
        time.sleep(PATIENCE_SECONDS)  # the launcher ends all when one ends like this
    return STOPPED if result.stopped else 0


def _is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _memory_advice(config: RunConfig) -> str:
    """What a run that ran out of memory could change."""
    data, parallel, train = config.data, config.parallel, config.train
    knobs = [
        "" if train.micro_batch_size == 1 else "train.micro_batch_size=1",
        "" if train.recompute else "train.recompute=true",
        f"parallel.block_len={parallel.block_len // 2 or max(1, data.seq_len // parallel.num_sequence_ranks // 8)}",
        "more parallel.ranks",
        "a further stage of ZeRO (deepspeed=zero3)",
    ]
    return (
        f"out of memory: data.seq_len = {data.seq_len} on {parallel.num_sequence_ranks} ranks of a sequence, "
        f"parallel.block_len = {parallel.block_len}; try {', '.join(filter(None, knobs))}"
    )


def _start_ranks(config: RunConfig, words: list[str]) -> int:
    """Start the ranks on this machine through torchrun's Python interface."""
    what = (sys.executable, "-m", "longreach.launch.train", *words)
    return launched(lambda: start_ranks(config.parallel.ranks, *what))


def launched(start: Callable[[], object]) -> int:
    """The exit code of ranks that torchrun's Python interface starts: of the first that ended early, else 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        start()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            return tell(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", FAILED)
        return failure.exitcode
    except SignalException as error:
        interrupted = error.sigval == signal.SIGINT
        return tell("interrupted" if interrupted else f"ended by {error.sigval.name}", 128 + error.sigval)
    return 0


def start_ranks(number: int, what: Callable[[], Any] | str, *words: str) -> Any:
    """Run a program with its words, or a function, as so many ranks on this machine; what each rank's function returns,
    by rank.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # torchrun's remarks: the ranks tell what went wrong
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id="longreach",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    return elastic_launch(settings, what)(*words)


def tell(why: object, code: int = MISTAKE) -> int:
    """Say in one line why this process ends; returns its exit code.

    Where every rank finds the same mistake, one line is enough, and where one rank fails, the others have nothing to
    add. So all but the first rank wait: the launcher, which sees the one that failed go, ends them meanwhile.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(PATIENCE_SECONDS + int(os.environ.get("LOCAL_RANK", "0")))
    line = " ".join(str(why).splitlines())
    print(f"longreach: {f'rank {rank}: ' if rank != '0' else ''}{line}", file=sys.stderr, flush=True)
    return code


def guarded(command: Callable[[], int]) -> int:
    """Run a command; returns the exit code. A user's mistake, or the loss of another rank, is told in one line."""
    # Torch asks for huge pages: on a CPU, the page faults of a large new tensor cost more than filling it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        return command()
    except InputError as error:
        return tell(error)
    except RuntimeError as error:
        from ..framework.data import KILLED, WorkerFailed, worker_failure
        from ..framework.runtime.loss_guard import Diverged
        from ..parallel.mesh import ExchangeFailed, PeerFailed, RanksDisagree, is_lost

        if str(error).startswith(KILLED):
            error = worker_failure(error)
        if isinstance(error, (Diverged, RanksDisagree, WorkerFailed)):
            return tell(error, FAILED)
        if not isinstance(error, (ExchangeFailed, PeerFailed)) and not is_lost(error):
            raise
        time.sleep(PATIENCE_SECONDS)  # the one that failed says why
        return tell(error, FAILED)


def main(words: Sequence[str] | None = None) -> None:
    """Entry point of every rank."""
    from torch.distributed.elastic.multiprocessing.errors import record

    parser = Parser(prog="python -m longreach.launch.train", description=__doc__)
    add_arguments(parser)
    arguments = parse(parser, words)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        code = record(lambda: guarded(lambda: run(arguments)))()
    except KeyboardInterrupt:
        code = INTERRUPTED  # whoever started the ranks says so
    leave(code or 0)


def leave(code: int) -> NoReturn:
    """End this process without taking Python down, which threads that are left behind would not survive; ``code`` is
    its exit code, or another where that was 0 and its output cannot be written.

    One of gloo's that drops the tensors of the last exchange asks for Python's lock, and where Python is on its way
    out, torch aborts (https://github.com/pytorch/pytorch/pull/179291); one of a failed exchange waits for what never
    comes; one of another library is not done where Ctrl-C was pressed.
    """
    if not code or "RANK" not in os.environ:
        atexit._run_exitfuncs()  # those of a rank that failed could wait for ever
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        code = code or UNREAD
    except OSError as error:
        code = code or tell(f"standard output cannot be written: {error.strerror}", FAILED)
    with suppress(OSError):
        print(end="", file=sys.stderr, flush=True)
    os._exit(code)


def _interrupt(number: int, frame: object) -> NoReturn:
    """Stop at the first of several signals: the terminal sends one to every process, and the launcher another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
