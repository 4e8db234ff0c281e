"""``status.json`` of a run: whether it is running, or how it ended, for those who look after many.

Nothing depends on it: where it cannot be written, training goes on. This module does not import torch, so that a
command that only reads is quick.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ...parallel.mesh import Axis
    from ..config import RunConfig

NAME = "status.json"
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
STATES = (RUNNING, FINISHED, STOPPED, FAILED)
WRITE_SECONDS = 5.0  # at least, from one note that the run is running to the next
ABORT_SECONDS = 2.0  # at most, for which a process that has to end waits until it is noted why
REASON_LEN = 600
LARGEST = 1 << 62  # numbers beyond it are none of ours
log = logging.getLogger("longreach.status")


class RunStatus:
    """Keeps `NAME` in a run's directory, as a context from its first step to its end: an error in it is a failure.

    The first rank writes it. Another one does where it fails, with its own reason, which replaces what a rank says that
    lost the connection to it.

    Args:
        config: of the run.
        world: all ranks.
        state: of the run's loop; its ``step`` is noted.
    """

    def __init__(self, config: RunConfig, world: Axis, state: dict[str, Any]) -> None:
        self._config, self._rank, self._state = config, world.ranks[world.rank], state
        self._path = Path(config.run.dir) / NAME
        self._began, self._written, self._warned = time.time(), 0.0, False

    def __enter__(self) -> RunStatus:
        from .patience import has_ended  # the configuration imports torch

        self._trains = not has_ended(self._config, self._state)
        if self._rank == 0 and self._trains:
            self._write(RUNNING, began=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._write(STOPPED, "on Ctrl-C, without saving")
        elif error is not None:
            self._fail(*_reason(error))

    def running(self) -> None:
        """Note on the first rank that the run is running, unless that was done a moment ago."""
        if self._rank == 0 and time.monotonic() - self._written >= WRITE_SECONDS:
            found = read(self._path)
            if found.get("state") != FAILED or found.get("since", 0.0) < self._began:  # another rank has failed
                self._write(RUNNING)

    def end(self, stopped: str = "") -> None:
        """Note on the first rank that the run has ended.

        Args:
            stopped: why, if it was before its last step.
        """
        if self._rank == 0 and (self._trains or read(self._path).get("state") != FINISHED):
            self._write(STOPPED if stopped else FINISHED, stopped)

    def abort(self, reason: str) -> NoReturn:
        """`process.abort`, after it was noted why; storage that does not answer does not keep the process."""
        from .process import abort

        note = threading.Thread(target=self._fail, args=(reason, False), daemon=True)
        note.start()
        note.join(ABORT_SECONDS)
        abort(reason)

    def _fail(self, reason: str, is_consequence: bool) -> None:
        """Note a failure; one that is a consequence of another rank's does not replace it."""
        from ..config import hide_secrets

        found = read(self._path)
        was_noted = found.get("state") == FAILED and found.get("since", 0.0) >= self._began
        if not (is_consequence and was_noted):
            text = " ".join(hide_secrets(reason, self._config).split())[:REASON_LEN]
            self._write(FAILED, f"rank {self._rank}: {text}" if self._rank else text)

    def _write(self, state: str, reason: str = "", began: bool = False) -> None:
        self._written, now = time.monotonic(), time.time()
        row = {} if began else read(self._path)
        if began or (self._rank == 0 and row.get("pid") != os.getpid()):
            row = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid(), "ticks": start_ticks()}
            row["began"] = self._began
        row |= {"state": state, "reason": reason, "step": self._state["step"], "steps": self._config.train.steps}
        row |= {"since": row.get("began", now) if state == RUNNING else now, "written": now}
        text = json.dumps(row) + "\n"
        partial = self._path.with_name(f".{NAME}.{self._rank}.partial")
        try:
            try:
                partial.write_text(text, encoding="ascii")
                os.replace(partial, self._path)
            except OSError:
                with suppress(OSError):
                    partial.unlink()
                if state == RUNNING:
                    raise
                self._path.write_text(text, encoding="ascii")  # a full disk has room for what replaces as much
        except OSError as error:
            if not self._warned:
                why = error.strerror or str(error)
                log.warning(
                    "warning: %s cannot be written (%s): longreach runs knows less of this run", self._path, why
                )
            self._warned = True


def _reason(error: BaseException) -> tuple[str, bool]:
    """Why a run failed, and whether that is only the loss of another rank."""
    from ...errors import InputError
    from ...parallel.mesh import ExchangeFailed, PeerFailed, is_lost
    from ..data import WORKER_DIED, worker_failure

    if isinstance(error, RuntimeError) and str(error).startswith(WORKER_DIED):
        error = worker_failure(error)
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # of rich
        return "its output was closed, as with its terminal", False
    is_ours = isinstance(error, InputError) or type(error).__module__.startswith("longreach")
    reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
    return reason, isinstance(error, (ExchangeFailed, PeerFailed)) or is_lost(error)


def read(path: Path) -> dict[str, Any]:
    """What a `NAME` says: only values of the types that they should have; nothing of a file that is none or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")[: 1 << 16])
    except (OSError, ValueError, RecursionError):
        return {}
    kinds: dict[str, Any] = {
        "state": str,
        "reason": str,
        "host": str,
        "machine": str,
        "pid": int,
        "ticks": int,
        "step": int,
    }
    kinds |= {"steps": int, "since": (int, float), "began": (int, float), "written": (int, float)}
    if not isinstance(found, dict) or found.get("state") not in STATES:
        return {}
    return {name: found[name] for name, kind in kinds.items() if _has_type(found.get(name), kind)}


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(value, (int, float)) and (isinstance(value, bool) or not -LARGEST < value < LARGEST):
        return False
    return isinstance(value, kind)


def machine() -> str:
    """What is the same for two processes that see each other: the kernel's start and the process ids' namespace."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def start_ticks(pid: int | str = "self") -> int:
    """When a process of this machine started, in the kernel's ticks; 0 if it is gone, -1 where that is not known."""
    if not Path("/proc/self/stat").exists():
        return -1
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    state, *fields = text.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(fields[18])
