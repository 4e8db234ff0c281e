"""Early stopping: where a run ends, what it keeps, and that a resumed run ends at the same step."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from deepspeed_world import run_world

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.runtime.patience import count_validation, is_exhausted
from longreach.framework.trainer import train

CONFIG = """
model: {width: 16, depth: 1, mixers: [elementwise]}
data: {source: SOURCE, seq_len: 32, batch_size: 2}
optim: {lr: 1.0e-2, min_lr_ratio: 1.0}
train: {steps: 40, threads: 1, validate_every: 2, validate_batches: 1, patience: 3}
checkpoint: {every: 0, keep_last: 1}
monitor: {tensorboard: false, plot: false}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> str:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG.replace("SOURCE", str(corpus)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("losses", "patience", "ends", "best"),
    [
        ([3.0, 2.0, 2.5, 1.9, 1.9, 2.2, 1.0], 2, 6, (4, 1.9)),  # an equal loss is no new best
        ([3.0, 2.0, 2.5, 2.0, 1.9], 0, None, (5, 1.9)),
        ([3.0, float("nan"), None, 2.0, 2.0], 3, None, (4, 2.0)),
    ],
)
def test_validations_are_counted_from_the_best(
    losses: list[float | None], patience: int, ends: int | None, best: tuple[int, float]
) -> None:
    state: dict[str, Any] = {}
    for step, loss in enumerate(losses, 1):
        state.update(step=step, held_out=loss)
        assert count_validation(state) == (state["best_step"] == step)
        if is_exhausted(state, patience):
            assert step == ends
            break
    else:
        assert ends is None
    assert (state["best_step"], state["best_held_out"]) == best


def train_on(rank: int, config: str, directory: str, halves: bool) -> list[str]:
    """Train until the run ends, of itself or, with ``halves``, once more from a checkpoint in the middle; a learning
    rate that is too large later on makes the held-out loss rise.
    """
    printed = []
    rate = ["optim.warmup_steps=40", "optim.lr=1.0", "optim.schedule_steps=80"]  # rises until the loss does
    for steps in (["train.steps=8"], []) if halves else ([],):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            train(load(config, [f"run.dir={directory}", *rate, *steps]))
        printed.append(said.getvalue())
    return printed


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_ends_early_keeps_the_best_checkpoint_and_resumes_to_the_same_end(
    ranks: int, config: str, tmp_path: Path
) -> None:
    text = Path(config).read_text() + f"parallel: {{ranks: {ranks}}}\n"
    layout = tmp_path / "layout.yaml"
    layout.write_text(text)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    (said,), *_ = run_world(train_on, ranks, str(layout), str(whole), False)
    rows = [json.loads(line) for line in (whole / "validation.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["loss"])
    last = rows[-1]["step"]
    assert 8 < last < 40 and last == best["step"] + 2 * 3, "three validations without a better one"
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir() if path.is_dir())
    assert kept == [f"step-{best['step']:08d}", f"step-{last:08d}"]
    line = (
        f"stopped early at step {last}: no better held-out loss in 3 validations (train.patience); best at step "
        f"{best['step']}: held-out {best['loss']:.4f} in {whole}/checkpoints/step-{best['step']:08d}"
    )
    assert said.splitlines().count(line) == 1
    run_world(train_on, ranks, str(layout), str(halves), True)
    again = [json.loads(line) for line in (halves / "validation.jsonl").read_text().splitlines()]
    assert again == rows
    states = [json.loads((run / f"checkpoints/step-{last:08d}/state.json").read_text()) for run in (whole, halves)]
    assert states[0]["state"] == states[1]["state"] and states[0]["state"]["best_step"] == best["step"]
    (repeated,), *_ = run_world(train_on, ranks, str(layout), str(whole), False)
    assert re.search(r"finished: .*; nothing is trained: raise train\.patience to go on", repeated)
    assert len((whole / "validation.jsonl").read_text().splitlines()) == len(rows)


def go_on(rank: int, config: str, directory: str) -> list[str]:
    train(load(config, [f"run.dir={directory}", "train.steps=4", "optim.schedule_steps=40"]))
    before = json.loads(Path(directory, "checkpoints/step-00000004/state.json").read_text())["state"]
    shutil.copytree(directory, f"{directory}-other")
    train(load(config, [f"run.dir={directory}-other", "train.steps=6", "data.seq_len=16", "optim.schedule_steps=40"]))
    after = json.loads(Path(f"{directory}-other", "checkpoints/step-00000006/state.json").read_text())["state"]
    return [before, after]


def test_held_out_losses_of_other_sequences_are_not_compared(config: str, tmp_path: Path) -> None:
    ((before, after),) = run_world(go_on, 1, config, str(tmp_path / "run"))
    assert before["best_step"] == 4 and after["best_step"] == 6 and after["validations_since_best"] == 0


def train_without_held_out(rank: int, config: str, directory: str) -> str:
    from longreach.framework.data import pack

    source = Path(directory, "text.txt")
    source.write_text("no document is held out " * 40)
    pack(str(source), Path(directory, "packed"), name="text", valid_fraction=0)
    with pytest.raises(InputError) as error:
        train(load(config, [f"run.dir={directory}/run", f"data.source={directory}/packed"]))
    return str(error.value)


def test_patience_needs_validations(config: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^train\.patience = 3: needs validations to count.*validate_every=100$"):
        load(config, ["train.validate_every=0"])
    (message,) = run_world(train_without_held_out, 1, config, str(tmp_path))
    assert message == "train.patience = 3: needs held-out data, and text has none; set data.valid_fraction"
