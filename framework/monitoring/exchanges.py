"""The exchanges of each rank in the first steps of a run, one line each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ...parallel.recorder import Recorder
from ...parallel.traffic import Traffic


@contextmanager
def record_exchanges(run_dir: Path, rank: int, traffic: Traffic, step: int, num_steps: int) -> Iterator[None]:
    """Append the exchanges made within to ``exchanges/rank-N.jsonl``, in the first ``num_steps`` steps.

    Args:
        run_dir: of the run.
        rank: of this process in the world.
        traffic: of the step.
        step: counted from 1.
        num_steps: ``monitor.record_exchanges``.
    """
    if step > num_steps:
        yield
        return
    with Recorder(traffic) as recorder:
        yield
    path = run_dir / "exchanges" / f"rank-{rank}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="ascii") as file:
        for event in recorder.events:
            file.write(json.dumps({"step": step, **asdict(event)}) + "\n")
