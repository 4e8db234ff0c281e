"""`longreach train --dry-run`: one rank without the others does and exchanges what it would do among them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist
from deepspeed_world import run_world
from programs import longreach

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.trainer import train
from longreach.launch.dry_run import Plan, plan

SMALL = [
    "model.width=16",
    "model.depth=6",
    "model.mixers=[elementwise, chela, feedforward_kernel, mamba2, gated_deltanet, softmax]",
    "model.chela={heads: 2, modes: 2}",
    "model.feedforward_kernel.heads=2",
    "model.mamba2={head_width: 8, state_size: 5}",
    "model.softmax.heads=2",
    "data.seq_len=60",
    "train.threads=1",
    "optim.warmup_steps=0",
]


def record(rank: int, corpus: str, run_dir: str, stage: int) -> None:
    words = [*SMALL, f"data.source={corpus}", f"run.dir={run_dir}", "parallel.ranks=2", f"deepspeed=zero{stage}"]
    words += ["train.steps=3", "train.validate_every=0", "monitor.record_exchanges=3", "monitor.sample_len=0"]
    train(load("quickstart", words))


def plan_each(rank: int, stages: list[int], words: list[str]) -> list[Plan]:
    return [plan(load("quickstart", [*SMALL, f"deepspeed=zero{stage}", *words])) for stage in stages]


def test_a_plan_exchanges_what_a_run_does(corpus: Path, tmp_path: Path) -> None:
    """Kinds, numbers and bytes of rank 1 of 2, in two ZeRO stages, against the recorder of a real run."""
    stages = [1, 3]
    for stage, found in zip(stages, run_world(plan_each, 1, stages, ["parallel.ranks=2"])[0], strict=True):
        run_world(record, 2, str(corpus), str(tmp_path / str(stage)), stage)
        lines = (tmp_path / str(stage) / "exchanges" / "rank-1.jsonl").read_text().splitlines()
        events = [row for row in map(json.loads, lines) if row["step"] == 3]  # the first ones set up more
        number = Counter((row["verb"] or "ZeRO", row["kind"], len(row["ranks"])) for row in events)
        size: Counter[tuple[str, str, int]] = Counter()
        for row in events:
            size[row["verb"] or "ZeRO", row["kind"], len(row["ranks"])] += row["num_bytes"]
        assert {(x.purpose, x.kind, x.ranks): (x.number, x.num_bytes) for x in found.exchanges} == {
            key: (number[key], size[key]) for key in number
        }
        assert (found.rank, found.world, found.sequence, found.num_tokens) == (1, 2, 2, 30)
        assert found.memory_bytes > 1e8 and found.compute_seconds > 0 and found.exchange_seconds > 0


def test_more_ranks_take_less_each() -> None:
    """Tokens, matrix products and the states' bytes of a rank in the middle of 4, of 64 and of 2 x 32."""
    worlds = [["parallel.ranks=4", "parallel.sequence=4"], ["parallel.ranks=64", "parallel.sequence=64"]]
    worlds.append(["parallel.ranks=64", "parallel.sequence=32", "data.batch_size=2"])
    linear = ["data.seq_len=6400", "model.mixers=[elementwise, chela]", "parallel.relay=gather"]
    few, many, grid = (run_world(plan_each, 1, [1], [*world, *linear])[0][0] for world in worlds)
    assert (few.num_tokens, many.num_tokens, grid.num_tokens) == (1600, 100, 200)
    assert few.rank == 2 and many.rank == 32 and grid.rank == 16
    assert 15 * many.flops < few.flops < 17 * many.flops
    states = [sum(x.num_bytes for x in p.exchanges if x.purpose == "scan") for p in (few, many)]
    assert states[0] == states[1] > 0
    assert many.num_parameters == few.num_parameters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "3"], "only with --dry-run"),
        (["--dry-run", "--world", "3", "parallel.sequence=2"], "parallel.sequence = 2: must divide parallel.ranks = 3"),
        (["--dry-run", "--per-node", "0"], "--per-node = 0: at least 1"),
    ],
)
def test_a_mistake_is_told_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    done = longreach("train", "quickstart", *words, cwd=tmp_path)
    *before, told = done.stderr.splitlines()
    assert done.returncode == 2 and message in told and not any("longreach: " in line for line in before)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    words = ["train", "quickstart", "--dry-run", "--world", "16", "parallel.sequence=16", "data.seq_len=1024"]
    done = longreach(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank 8 of 16, 16 ranks per sequence" in done.stdout and "peak memory" in done.stdout
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


def test_a_task_is_planned_with_its_examples(tmp_path: Path) -> None:
    """Which also say what the model needs: the vocabulary or the channels, and the head."""
    words = ["--dry-run", "parallel.ranks=2", "model.width=16", "model.depth=1", "train.micro_batch_size=1"]
    for name in ("listops", "adding"):
        done = longreach("train", name, *words, "data.seq_len=64", "data.batch_size=1", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "rank 1 of 2" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "vocab"), [(["data.vocab=400"], 400), (["model.vocab=300"], 300), ([], 256)])
def test_a_plan_has_the_runs_vocabulary(words: list[str], vocab: int) -> None:
    with_bytes, found = (run_world(plan_each, 1, [1], words)[0][0].num_parameters for words in ([], words))
    width = load("quickstart", SMALL).model.width
    assert found - with_bytes == (vocab - 256) * width


def test_more_ranks_than_heads_of_attention() -> None:
    """A plan is of a rank that has a head, by default the last one of these."""
    words = ["parallel.ranks=8", "parallel.sequence=8", "model.mixers=[softmax]", "model.softmax.heads=3"]
    words.append("data.seq_len=80")
    found = run_world(plan_each, 1, [1], ["model.width=24", *words])[0][0]
    assert (found.rank, found.sequence) == (2, 8) and found.flops > 0
    with pytest.raises(InputError, match="rank = 5: a rank that has a head of softmax attention"):
        plan(load("quickstart", [*SMALL, "model.width=24", *words]), rank=5)


def test_a_process_that_is_in_a_world_already() -> None:
    """As after `train`, whose engine makes one of this rank alone, and does not leave it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(InputError, match="is in a world of ranks already, and a dry run"):
        plan(load("quickstart", SMALL))
    assert dist.get_backend() == "gloo"


def test_a_rank_that_is_none_of_the_world() -> None:
    with pytest.raises(InputError, match="rank = 2: one of the 2 ranks"):
        plan(load("quickstart", SMALL), rank=2)
