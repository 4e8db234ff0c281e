"""Training: the same numbers on every layout and ZeRO stage, exact resumption, and what a run directory holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import run_world

from longreach.framework.config import RunConfig, load
from longreach.framework.trainer import train

CONFIG = """
model:
  width: 16
  depth: 4
  mixers: [elementwise, chela, feedforward_kernel, softmax]
  chela: {heads: 2, modes: 2}
  feedforward_kernel: {heads: 2, dropout: 0.2}
  softmax: {heads: 2}
optim: {lr: 1.0e-2, warmup_steps: 4, clip: 0.5}
train: {steps: 10, threads: 1}
data: {seq_len: 61, batch_size: 4}
monitor: {tensorboard: false, plot: false}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> str:
    """Path of the config that the tests here train, with overrides of their own."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(f"{CONFIG}\n", encoding="utf-8")
    return str(path)


def train_each(rank: int, config: str, runs: list[list[str]]) -> list[tuple[list[dict[str, Any]], float | None]]:
    """Train once with each list of overrides; returns each run's rows of ``metrics.jsonl`` and held-out loss."""
    results = []
    for overrides in runs:
        result = train(load(config, overrides))
        results.append((rows_of(result.run_dir), result.held_out))
    return results


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

def test_x(config, corpus, tmp_path):
    import time
    for ranks, seq in ((1,1),(2,2),(4,4),(4,2)):
        runs=[[f"data.source={corpus}", f"deepspeed=zero{s}", f"parallel.ranks={ranks}", f"parallel.sequence={seq}", f"run.dir={tmp_path}/{ranks}-{seq}-{s}"] for s in range(4)]
        t=time.time()
        got = run_world(train_each, ranks, config, runs, timeout=280)
        print(ranks, seq, time.time()-t)
        base = got[0] if ranks==1 else base
        for s in range(4):
            for k in ("loss","grad_norm","penalty"):
                print(s, k, max(abs(a[k]-b[k])/abs(b[k]) for a,b in zip(got[0][s][0], base[0][0])), abs(got[0][s][1]-base[0][1])/base[0][1])
        print([r["loss"] for r in got[0][0][0]], [r["grad_norm"] for r in got[0][0][0]])
