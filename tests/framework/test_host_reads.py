"""How often a training step makes the host wait for the device: where there is a GPU, each read of a value does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from host_reads import HostReads

from longreach.framework import trainer
from longreach.framework.config import load

CONFIG = """
model:
  width: 16
  depth: 6
  dropout: 0.1
  mixers: [elementwise, chela, feedforward_kernel, mamba2, gated_deltanet, softmax]
  chela: {heads: 2, modes: 2}
  feedforward_kernel: {heads: 2, dropout: 0.2}
  mamba2: {head_width: 8, state_size: 5}
  softmax: {heads: 2}
data: {seq_len: 61, batch_size: 4, packing: documents}
optim: {lr: 1.0e-2, warmup_steps: 1, clip: 0.5}
train: {steps: 3, threads: 1, micro_batch_size: 2, validate_batches: 1}
monitor: {tensorboard: false, plot: false}
"""
MOST = 2  # reads of a step: the gradient's norm, on which the update depends, and the losses


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_reads_twice_and_never_before_its_update(
    stage: int, precision: str, streamed: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a loss, a count or a norm that is read in the middle of a step, by us or by DeepSpeed."""
    places: list[list[str]] = []
    step = trainer.train_step

    def counted(*args: Any) -> dict[str, float]:
        with HostReads() as reads:
            metrics = step(*args)
        places.append(reads.places)
        return metrics

    monkeypatch.setattr(trainer, "train_step", counted)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("data: {", f"data: {{source: {corpus}, "), encoding="utf-8")
    changes = [f"run.dir={tmp_path}/run", f"deepspeed=zero{stage}", f"train.precision={precision}"]
    if stage:  # what a mixer reads does not depend on it
        changes.append("model.depth=2")
    if streamed:
        changes += ["parallel.block_len=24", "parallel.park_carries=true", "train.recompute=true"]
    trainer.train(load(str(path), changes))
    assert len(places) == 3
    for found in places[1:]:  # DeepSpeed prepares some things in the first step
        assert not [place for place in found if "accumulate_gradients" in place]
        assert 1 <= len(found) <= MOST, "\n".join(found)
