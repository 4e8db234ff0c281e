"""What the files of runs say about them; see `launch.commands.runs`."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.cells import cell_len, set_cell_size

from ..framework.runtime import lock, status

DEAD, SILENT, UNKNOWN = "dead", "silent", "unknown"  # beside the states of `framework.runtime.status`
ORDER = (status.RUNNING, SILENT, status.FAILED, DEAD, status.STOPPED, UNKNOWN, status.FINISHED)
OF_A_RUN = ("metrics.jsonl", status.NAME)  # files of which a run has one at least
PARTS = frozenset(("checkpoints", "tensorboard", "plots", "exchanges", "profile"))  # of a run, that hold no other runs
SILENT_STEPS, SILENT_SECONDS = 20, 300.0  # without news, after which a run counts as silent: the longer of the two ...
STARTING_SECONDS = 1800.0  # ... and before its first step, which compiles
TAILS = (1 << 14, 1 << 20)  # bytes at the end of a file of rows, read until they hold a row
RECENT = 20  # last steps whose median speed is shown
HEADERS = ("run", "step", "loss", "valid", "tok/s", "size", "for", "state")


@dataclass
class FoundRun:
    """A run, as its files describe it; None is what they do not say.

    Attributes:
        name: its path below the directory that was searched.
        directory: its path.
        state: "running", "finished", "stopped", "failed"; "dead" where the process is gone without a word, "silent"
            where it gives no news for much longer than a step takes, "unknown" where an earlier version kept no status.
        reason: why it was stopped or failed, in short.
        since: when that state began, in seconds since 1970.
        news: when its files last changed.
        step, steps: done, and to do.
        loss, held_out: of the last step, and of the last validation.
        tokens_per_second: median of the last steps.
        num_bytes: on disk.
        host, pid: of its first rank.
    """

    name: str
    directory: str
    state: str
    reason: str
    since: float | None
    news: float | None
    step: int | None
    steps: int | None
    loss: float | None
    held_out: float | None
    tokens_per_second: float | None
    num_bytes: int
    host: str | None
    pid: int | None

    def as_row(self) -> dict[str, Any]:
        """Its attributes, for JSON."""
        return asdict(self)


def find_runs(directory: Path) -> list[FoundRun]:
    """The runs in and below a directory, ordered by state, then by the latest change; links are not followed."""
    here, now = status.machine(), time.time()
    found = [_read_run(path, directory, here, now) for path in _run_directories(directory)]
    return sorted(found, key=lambda run: (ORDER.index(run.state), -(run.since or 0.0), run.name))


def _run_directories(directory: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(directory):
        is_run = any(name in files for name in OF_A_RUN)
        folders[:] = sorted(name for name in folders if not (is_run and name in PARTS))
        if is_run:
            yield Path(place)


def _read_run(path: Path, root: Path, here: str, now: float) -> FoundRun:
    kept = status.read(path / status.NAME)
    rows, validations = _last_rows(path / "metrics.jsonl"), _last_rows(path / "validation.jsonl")
    last = rows[-1] if rows else {}
    changes = [_changed(path / name) for name in (*OF_A_RUN, "validation.jsonl")]
    news = max((when for when in changes if when is not None), default=None)
    steps = kept.get("steps") or _configured_steps(path / "config.yaml")
    step = max((number for number in (kept.get("step"), last.get("step")) if isinstance(number, int)), default=None)
    speeds = [speed for row in rows if (speed := _number(row, "tokens_per_second")) is not None]
    kept = kept or _without_status(path, step, steps)
    state, since = _state(kept, here, now, news, _number(last, "step_seconds"))
    return FoundRun(
        name=str(path.relative_to(root)) if path != root else path.resolve().name,
        directory=str(path),
        state=state,
        reason=kept.get("reason", ""),
        since=since,
        news=news,
        step=step,
        steps=steps,
        loss=_number(last, "loss"),
        held_out=_number(validations[-1], "loss") if validations else None,
        tokens_per_second=median(speeds) if speeds else None,
        num_bytes=_size(path),
        host=kept.get("host"),
        pid=kept.get("pid"),
    )


def _state(
    kept: dict[str, Any], here: str, now: float, news: float | None, step_seconds: float | None
) -> tuple[str, float | None]:
    """The state of a run, and since when."""
    state, since = kept.get("state", UNKNOWN), kept.get("since")
    if state != status.RUNNING:
        return state, since if since is not None else news
    is_here = kept.get("host") == socket.gethostname() and kept.get("machine", here) == here
    if is_here and "pid" in kept and not _is_alive(kept["pid"], kept.get("ticks", -1)):
        return DEAD, news
    usual = STARTING_SECONDS if step_seconds is None else SILENT_STEPS * step_seconds
    if news is not None and now - news > max(SILENT_SECONDS, usual):
        return SILENT, news
    return state, since


def _is_alive(pid: int, ticks: int) -> bool:
    """Whether the process of this machine that started then is there; ``ticks`` of -1: any one of that number."""
    started = status.start_ticks(pid)
    if started >= 0:
        return started > 0 and ticks in (-1, started)
    try:
        os.kill(pid, 0)
    except OverflowError:
        return False
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _without_status(path: Path, step: int | None, steps: int | None) -> dict[str, Any]:
    """What can be said of a run that has no status: the lock names its process."""
    if step is not None and steps is not None and step >= steps:
        return {"state": status.FINISHED}
    owner = re.match(r"process (\d+) on (\S+)", _text(path / lock.NAME, 1000))
    if owner is None:
        return {}
    host, pid = owner[2], int(owner[1])
    is_running = host != socket.gethostname() or _is_alive(pid, -1)
    return {"host": host, "pid": pid, "state": status.RUNNING if is_running else UNKNOWN}


def _last_rows(file: Path) -> list[dict[str, Any]]:
    """The last rows of a JSONL file, `RECENT` at most; what is none, such as a half-written line, is left out."""
    for num_bytes in TAILS:
        rows = []
        for line in reversed(_text(file, num_bytes).splitlines()):
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int) and abs(row["step"]) < status.LARGEST:
                    rows.append(row)
            if len(rows) == RECENT:
                break
        if rows:
            break
    return rows[::-1]


def _text(file: Path, num_bytes: int) -> str:
    """The end of a file, in so many bytes at most; nothing where it cannot be read."""
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - num_bytes))
            return opened.read(num_bytes).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _configured_steps(file: Path) -> int | None:
    """``train.steps`` of a ``config.yaml`` of a run, which is written one key a line."""
    found = re.search(r"^train:\n(?:  .*\n)*?  steps: (\d{1,18})$", _text(file, 1 << 18), re.MULTILINE)
    return int(found[1]) if found else None


def _number(row: dict[str, Any], name: str) -> float | None:
    value: Any = row.get(name)
    with suppress(OverflowError, TypeError):
        return float(value) if math.isfinite(value) else None
    return None


def _changed(file: Path) -> float | None:
    with suppress(OSError):
        return file.stat().st_mtime
    return None


def _size(directory: Path) -> int:
    """Bytes that the files below a directory take on the disk; of several names of one file, each counts."""
    total, folders = 0, [str(directory)]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def table(runs: Sequence[FoundRun], columns: int) -> list[str]:
    """A line for each run below one of titles, no wider than ``columns``; nothing without runs."""
    if not runs:
        return []
    now = time.time()
    rows = [HEADERS, *(_cells(run, now) for run in runs)]
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(HEADERS))]
    left = max(8, columns - sum(widths[1:-1]) - 2 * (len(HEADERS) - 1))
    widths[0] = min(widths[0], max(left // 2, left - widths[-1]))
    widths[-1] = min(widths[-1], left - widths[0])
    lines = []
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        lines.append("  ".join([_fit(row[0], widths[0]), *numbers, _fit(row[-1], widths[-1])]).rstrip())
    return lines


def _fit(text: str, width: int) -> str:
    """A text of exactly so many columns; of one that is too long, the beginning."""
    return (
        set_cell_size(text, width)
        if cell_len(text) <= width
        else set_cell_size(text, width - 1) + "\N{HORIZONTAL ELLIPSIS}"
    )


def _cells(run: FoundRun, now: float) -> tuple[str, ...]:
    state = f"no news, {run.host}" if run.state == SILENT else run.state
    why = {DEAD: "its process is gone", UNKNOWN: "it left no status"}.get(run.state, run.reason)
    if run.state == status.STOPPED:
        state, why = f"{state} {why}", ""
    step = "-" if run.step is None else str(run.step)
    return (
        _printable(run.name),
        step if run.steps is None else f"{step}/{run.steps}",
        _short(run.loss),
        _short(run.held_out),
        "-" if run.tokens_per_second is None else _in_units(run.tokens_per_second, 1000, ("", "k", "M", "G", "T")),
        _in_units(run.num_bytes, 1024, ("", "K", "M", "G", "T", "P")),
        "-" if run.since is None else duration(now - run.since),
        _printable(f"{state}: {why}" if why else state),
    )


def _printable(text: str) -> str:
    """A text without characters that steer a terminal."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _short(value: float | None) -> str:
    """Four digits."""
    return "-" if value is None else f"{value:.4g}"


def _in_units(value: float, base: int, units: Sequence[str]) -> str:
    """Three digits and a unit."""
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value, place = value / base, place + 1
    return f"{value:.{1 if value < 9.95 and place else 0}f}{units[place]}"


def duration(seconds: float) -> str:
    """A time in its largest unit, as in ``35 s``, ``2 h`` and ``12 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
