"""Trainings that are measured: ``longreach`` in processes of their own, each on one thread of a processor.

Shared by tasks.py, needle.py and quickstart.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longreach.framework.config import load
from longreach.framework.model import build_model
from longreach.launch import process
from longreach.launch.bench import cpu_only, last_line
from longreach.launch.sweep import STOPS

EA6, EA2 = "elementwise, order 6", "elementwise, order 2"
PAPER = "elementwise, norm_group=0, conv_len=0"  # as published
TAPS = "chela, taps"  # as published
PATTERNS = ["elementwise, gated_deltanet", "chela, gated_deltanet", "gated_deltanet, softmax"]  # of two layers
NO_DECAY = "model.gated_deltanet.decay=none"  # DeltaNet: the delta rule alone
MIXERS = {
    EA6: ["model.mixers=[elementwise]"],
    EA2: ["model.mixers=[elementwise]", "model.elementwise.order=2"],
    "elementwise, norm_group=0": ["model.mixers=[elementwise]", "model.elementwise.norm_group=0"],
    "elementwise, conv_len=0": ["model.mixers=[elementwise]", "model.elementwise.conv_len=0"],
    PAPER: ["model.mixers=[elementwise]", "model.elementwise.norm_group=0", "model.elementwise.conv_len=0"],
    "chela": ["model.mixers=[chela]"],
    TAPS: ["model.mixers=[chela]", "model.chela.long_kernel=decaying", "model.chela.long_len=1024"],
    "feedforward_kernel": ["model.mixers=[feedforward_kernel]"],
    "mamba2": ["model.mixers=[mamba2]"],
    "gated_deltanet": ["model.mixers=[gated_deltanet]"],
    "deltanet": ["model.mixers=[gated_deltanet]", NO_DECAY],
    "softmax": ["model.mixers=[softmax]"],
    **{pattern: [f"model.mixers=[{pattern}]"] for pattern in PATTERNS},
    "elementwise, deltanet": ["model.mixers=[elementwise, gated_deltanet]", NO_DECAY],
    "chela, deltanet": ["model.mixers=[chela, gated_deltanet]", NO_DECAY],
}


class Failed(SystemExit):
    """A process ended with another exit code than 0; the message is its command and its last line."""


class Stopped(SystemExit):
    """A process was asked to end, and has saved."""


def longreach(*words: str, run: Path | None = None, save_every: int = 0) -> None:
    """``longreach WORDS...`` on one thread of a processor; a training into the directory ``run``, with no more than it
    needs there and a checkpoint every so many steps, from which it goes on.

    Raises:
        Failed: it did not succeed.
        Stopped: it was ended by a signal.
    """
    quiet = ["train.threads=1", "monitor.tensorboard=false", "monitor.plot=false"]
    saved = [f"checkpoint.every={save_every}", "checkpoint.keep_last=1"]
    command = [sys.executable, "-m", "longreach", *words, *([*quiet, *saved, f"run.dir={run}"] if run else [])]
    with tempfile.NamedTemporaryFile("w") as log:
        if process.forwarded:
            raise Stopped("stopped")
        code = subprocess.run(command, stdout=log, stderr=log, env=cpu_only(OMP_NUM_THREADS="1")).returncode
        if code:
            kind = Stopped if code in STOPS else Failed
            raise kind(f"{' '.join(command)}: {last_line(Path(log.name))}")


def num_parameters(config: str, words: Sequence[str]) -> int:
    """Parameters of a model of bytes, which is not made."""
    with torch.device("meta"):
        model = build_model(load(config, [*words, "model.vocab=256"]).model)
    return sum(parameter.numel() for parameter in model.parameters())


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none if there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def training_seconds(run: Path) -> float:
    """Seconds of all steps of a run, without its start, validations and checkpoints."""
    return round(sum(row["step_seconds"] for row in rows_of(run / "metrics.jsonl")), 1)


def hardware(environments: Sequence[dict[str, str]]) -> str:
    """The processors and commits of some results, for a table."""
    return "; ".join(dict.fromkeys(f"{one['device']}, {one['commit']}" for one in environments))
