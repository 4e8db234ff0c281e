"""What a resumed run must have in common with the run that wrote the checkpoint."""

from __future__ import annotations

from typing import Any

from ...errors import InputError
from ..checkpoint import is_count
from ..config import RunConfig
from ..tasks import Task
from .patience import KEYS


def run_identity(config: RunConfig, task: Task) -> dict[str, Any]:
    """What a position in the training data depends on; it is saved in every checkpoint."""
    data = config.data
    settings = {"seed": config.run.seed, "batch_size": data.batch_size, "seq_len": data.seq_len}
    weights = {name: one.weight for name, one in data.sources.items()}
    strands = data.reverse_complement
    return settings | {
        "packing": data.packing,
        "sources": weights,
        "reverse_complement": strands,
        "curriculum": data.curriculum,
        "data": task.fingerprint,
    }


EFFECTS = {  # of another value, on what a resumed run reads
    "run.seed": "the order of the data: what is left of this epoch is read in another order, some of it again",
    "data.batch_size": "the sequences of a step, and the schedule",
    "data.seq_len": "the sequences: reading goes on after as many tokens, in another order; some of this epoch are "
    "read twice, some not at all",
    "data.curriculum": "the lengths of the sequences; reading goes on where it was",
    "data.packing": "the labels and the documents that a token sees",
    "data.reverse_complement": "the strand of a sequence",
    "data.sources": "the weights: each source is read on from where it would be with the new ones; some sequences of "
    "this epoch are read twice, some not at all",
}


def check_resume(config: RunConfig, task: Task, state: dict[str, Any]) -> list[str]:
    """Compare a run with the ``state`` of the checkpoint that it resumes from, and count ``consumed`` in its sequences.

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
    state.setdefault("curriculum", [])  # of earlier versions
    before = {name: state.get(name.split(".")[1]) for name in EFFECTS}
    changed = {name: now[name.split(".")[1]] for name in EFFECTS}
    if any(state.get(name) != now[name] for name in ("data", "seq_len", "packing")):
        for name in KEYS:  # held-out losses of other sequences do not compare
            state.pop(name, None)
    if (seq_len := before["data.seq_len"]) is not None:
        state["consumed"] = state["consumed"] * seq_len // config.data.seq_len
    return [
        f"not an exact resume: {name} was {before[name]} and is {value}, which changes {EFFECTS[name]}"
        for name, value in changed.items()
        if before[name] not in (None, value)  # checkpoints of earlier versions do not hold all
    ]
