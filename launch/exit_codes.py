"""Exit codes of the programs of this package, and the one line with which a program that fails says why."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import InputError
from ..framework.monitoring.terminal import line_start

FAILED = 1  # a fault: a rank, a data worker or an exchange failed or did not come, a loss is not finite, out of memory
INPUT_ERROR = 2  # what the user gave is wrong
STOPPED = 75  # a signal or train.time_limit ended the run early; a checkpoint was saved (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT
BROKEN_PIPE = 141  # the reader of the output closed it: 128 + SIGPIPE
GRACE_SECONDS = 3.0  # for which a rank waits before it ends, while the launcher ends all ranks because of another one


class CommandFailed(Exception):
    """A fault that is reported in one line and not by a traceback; the exit code is `FAILED`."""


@dataclass
class Outcome:
    """How a command ended: ``exit_code`` is set by the command, or by the error that ended it."""

    exit_code: int = 0


@contextmanager
def report_errors() -> Iterator[Outcome]:
    """Turn the errors that are no bugs into one line on standard error and an exit code.

    Those are a user's mistake (`InputError`), faults that the package reports itself, and the loss of another rank.
    Any other exception passes through. A context and not a decorator, so that tracebacks have no frame of it.

    Yields:
        the outcome; its exit code is that of the error, if there was one.
    """
    outcome = Outcome()
    try:
        yield outcome
    except InputError as error:
        from ..parallel.mesh import NotMet

        outcome.exit_code = report_error(error, FAILED if isinstance(error, NotMet) else INPUT_ERROR)
    except CommandFailed as error:
        outcome.exit_code = report_error(error, FAILED)
    except RuntimeError as error:
        from ..framework.data import WORKER_DIED, WorkerFailed, worker_failure
        from ..framework.runtime.loss_guard import Diverged
        from ..parallel.mesh import ExchangeFailed, PeerFailed, RanksDisagree, is_lost

        if str(error).startswith(WORKER_DIED):
            error = worker_failure(error)
        if not isinstance(error, (Diverged, RanksDisagree, WorkerFailed)):
            if not isinstance(error, (ExchangeFailed, PeerFailed)) and not is_lost(error):
                raise
            time.sleep(GRACE_SECONDS)  # the rank that failed first says why
        outcome.exit_code = report_error(error, FAILED)


def report_error(reason: object, exit_code: int) -> int:
    """Print in one line on standard error why this process ends; returns ``exit_code``.

    Every rank but the first waits before it prints: where all ranks find the same mistake, one line is enough, and
    where one rank fails, the launcher ends the others while they wait.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(GRACE_SECONDS + int(os.environ.get("LOCAL_RANK", "0")))
    line = " ".join(str(reason).splitlines())
    start = line_start() if "RANK" in os.environ else ""  # the first rank may show a progress bar
    print(f"{start}longreach: {f'rank {rank}: ' if rank != '0' else ''}{line}", file=sys.stderr, flush=True)
    return exit_code
