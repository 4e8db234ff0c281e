"""What a run says on a terminal: every message has a line of its own, whatever the progress bar does."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

SHOW = """
import logging, os, sys, time
from pathlib import Path
from longreach.framework.config import load
from longreach.framework.monitoring.monitor import Monitor, configure_logging
from longreach.framework.runtime.preemption import Preemption

configure_logging()
config = load("quickstart", ["monitor.tensorboard=false", "train.steps=3"])
monitor = Monitor(Path(sys.argv[1]), config, 0)
with Preemption():
    for step in (1, 2, 3):
        monitor.step({"step": step, "loss": 2.0, "grad_norm": 1.0, "tokens_per_second": 10.0})
        time.sleep(0.2)
        if step == 1:
            logging.getLogger("longreach.some").warning("a message of the log")
            monitor.print_line("a message of the run")
        if step == 2:
            os.kill(os.getpid(), 2)
monitor.close()
"""
BAR = re.compile(r"training .* [0-3]/3 .*")


def on_a_terminal(directory: Path, *words: str) -> list[str]:
    """The lines that a terminal shows of ``python WORDS...`` in the end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.environ |= {"TERM": "xterm", "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        os.execv(sys.executable, [sys.executable, *words])
    said, until = b"", time.monotonic() + 120
    while time.monotonic() < until:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                part = os.read(terminal, 1 << 16)
            except OSError:  # the program has ended
                break
            if not part:
                break
            said += part
    else:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(terminal)
    return screen(said.decode(errors="replace"))


def screen(text: str) -> list[str]:
    """The lines of a terminal to which a text was written; carriage returns, upward moves and erasures are followed."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+|\x1b", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b["):
            row = max(0, row - int(part[2:-1] or "1"))
        elif part.startswith("\x1b["):
            lines[row] = "" if part == "\x1b[2K" else lines[row]
        else:
            before = lines[row].ljust(column)
            lines[row] = before[:column] + part + before[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_a_screen_is_what_a_terminal_shows() -> None:
    assert screen("one\r\ntwo\rT\x1b[31mW\x1b[0m\r\nbar\r\x1b[2Kthree\r\n\x1b[1Aagain") == ["one", "TWo", "again", ""]


def test_a_message_never_shares_a_line_with_the_progress_bar(tmp_path: Path) -> None:
    lines = on_a_terminal(tmp_path, "-c", SHOW, str(tmp_path))
    stopping = "longreach: saving after this step; Ctrl-C again ends at once, without saving"
    for message in ("a message of the log", "a message of the run", stopping):
        assert lines.count(message) == 1, lines
    assert [line for line in lines if line and not BAR.fullmatch(line)] == [
        "a message of the log",
        "a message of the run",
        stopping,
    ], lines


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SHOW, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("step ")] == [
        "a message of the log",
        "a message of the run",
        "longreach: saving after this step; Ctrl-C again ends at once, without saving",
    ]
    assert done.stdout == "" and "\x1b" not in done.stderr
