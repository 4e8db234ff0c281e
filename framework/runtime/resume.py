"""What a resumed run must have in common with the run that wrote the checkpoint."""

from __future__ import annotations

from typing import Any

from ...errors import InputError
from ..checkpoint import is_count
from ..config import RunConfig
from ..tasks import Task


def run_identity(config: RunConfig, task: Task) -> dict[str, Any]:
    """What the order of the training data depends on; it is saved in every checkpoint."""
    return {"seed": config.run.seed, "batch_size": config.data.batch_size, "data": task.fingerprint}


def check_resume(config: RunConfig, task: Task, state: dict[str, Any]) -> list[str]:
    """Compare a run with the ``state`` of the checkpoint that it resumes from.

    Returns:
        One line for each setting with which the resumed run is not exact.

    Raises:
        InputError: the corpus is another one, or the checkpoint is not of a training.
    """
    now = run_identity(config, task)
    if not is_count(state.get("consumed")):
        raise InputError("checkpoints", config.run.dir, "do not say how far the data was read: no training wrote them")
    if state.get("data") != now["data"] and not config.data.accept_change:
        allowed = "is not the corpus that this run began with: its position there means nothing"
        fix = "give another run.dir, or data.accept_change=true to go on all the same"
        raise InputError("data.source", config.data.source, allowed, fix)
    affected = {"seed": "the order of the data", "batch_size": "the order of the data in steps, and the schedule"}
    return [
        f"not an exact resume: {key} was {state.get(key)} and is {now[key]}, which changes {what}"
        for key, what in affected.items()
        if state.get(key) != now[key]
    ]
