"""A lock on the run directory: one run at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from ...errors import InputError

NAME = ".lock"
log = logging.getLogger(__name__)


class RunLock:
    """Holds a directory until `release`, or until the process ends, however it ends."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def acquire(self, directory: Path) -> None:
        """Raise `InputError` if another process holds it."""
        file = open(directory / NAME, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as it is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            allowed = f"is in use by {owner}"
            raise InputError("run.dir", str(directory), allowed, "wait for it, or give another run.dir") from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): do not start a second run there", directory, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let others have the directory."""
        if self._file is not None:
            self._file.close()
            self._file = None
