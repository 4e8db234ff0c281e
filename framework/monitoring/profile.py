"""Traces of chosen steps, one of each rank, for a trace viewer."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger("longreach.profile")
TOP_OPERATORS = 25
OnTrace = Callable[[int, Path, str], None]
"""Called with the last step of a trace, its file, and a table of the operators that took longest."""


class StepProfile:
    """Traces consecutive steps in ``profile/steps-A-B.rank-N.json.gz``.

    There, steps have their names, and so have the blocks' mixers and feed-forward layers (forward; not those of a
    compiled model). A trace that cannot be written gives a warning, and the run goes on.

    Args:
        steps: the first and the last step to be traced; empty for none.
        run_dir: of the run.
        rank: of this process in the world.
        model: a `Model`.
        on_trace: called when a trace is written; None for nothing.
    """

    def __init__(self, steps: list[int], run_dir: Path, rank: int, model: nn.Module, on_trace: OnTrace | None) -> None:
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._directory, self._rank, self._model, self._on_trace = run_dir / "profile", rank, model, on_trace
        self._profile: profile | None = None
        self._hooks: list[Any] = []
        self._traced: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace a step, if it is one of the chosen."""
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            self._start()
        self._traced.append(number)
        with record_function(f"step {number}"):
            yield
        if number == self._steps[-1]:
            self.finish()

    def finish(self) -> None:
        """Write the trace, unless it is written."""
        if self._profile is None:
            return
        self._profile.stop()
        for hook in self._hooks:
            hook.remove()
        first, last = self._traced[0], self._traced[-1]
        path = self._directory / f"steps-{first}-{last}.rank-{self._rank}.json.gz"
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        table = self._profile.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=TOP_OPERATORS)
        try:
            path.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(path))
        except OSError as error:
            log.warning("warning: %s cannot be written (%s)", path, error.strerror or error)
        else:
            if self._on_trace is not None:
                self._on_trace(last, path, table)
        self._profile = None
        gc.collect()  # it is part of a cycle, and must not outlive the interpreter's torch

    def _start(self) -> None:
        for name, module in self._model.named_modules():
            if name.endswith((".mixer", ".ffn")):
                ranges: list[record_function] = []
                self._hooks.append(module.register_forward_pre_hook(partial(_enter, name, ranges)))
                self._hooks.append(module.register_forward_hook(partial(_leave, ranges), always_call=True))
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()


def _enter(name: str, ranges: list[record_function], *_: Any) -> None:
    ranges.append(record_function(name))
    ranges[-1].__enter__()


def _leave(ranges: list[record_function], *_: Any) -> None:
    ranges.pop().__exit__(None, None, None)
