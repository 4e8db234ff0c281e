"""The best validation so far, and early stopping: a run ends once its held-out loss has not improved for a while.

The counts are part of the ``state`` of a run, so a checkpoint has them, and they are the same on all ranks.
"""

from __future__ import annotations

import math
from typing import Any

from ..config import RunConfig

KEYS = ("best_step", "best_held_out", "validations_since_best")  # in ``state``


def count_validation(state: dict[str, Any]) -> bool:
    """Count the validation that has just set ``state["held_out"]``; returns whether its loss is the lowest so far."""
    loss = state["held_out"]
    if loss is not None and loss < state.get("best_held_out", math.inf):  # NaN is not
        state.update(best_step=state["step"], best_held_out=loss, validations_since_best=0)
        return True
    state["validations_since_best"] = state.get("validations_since_best", 0) + 1
    return False


def is_exhausted(state: dict[str, Any], patience: int) -> bool:
    """Whether the last ``patience`` validations (0 for any number) were no better than one before them."""
    return 0 < patience <= state.get("validations_since_best", 0)


def reason(state: dict[str, Any]) -> str:
    """Why a run whose patience is exhausted ends, in one line."""
    count = state["validations_since_best"]
    since = "1 validation" if count == 1 else f"{count} validations"
    if "best_step" not in state:
        return f"no finite held-out loss in {since} (train.patience)"
    best = f"best at step {state['best_step']}: held-out {state['best_held_out']:.4f}"
    return f"no better held-out loss in {since} (train.patience); {best}"


def has_ended(config: RunConfig, state: dict[str, Any]) -> bool:
    """Whether a run whose ``state`` this is has nothing more to train."""
    return state["step"] >= config.train.steps or is_exhausted(state, config.train.patience)
