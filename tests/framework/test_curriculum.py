"""A curriculum: lengths by step, constant tokens, every token once, the same losses on every layout and resumed."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import run_world
from torch import Tensor

from longreach.errors import InputError
from longreach.framework.config import RunConfig, load, save
from longreach.framework.inference.loading import load_config
from longreach.framework.runtime.curriculum import StepInput, epochs_of, read_steps, stages_of
from longreach.framework.runtime.resume import check_resume
from longreach.framework.tasks import Task, open_task
from longreach.framework.tasks.language import Language
from longreach.framework.trainer import train
from longreach.launch.sweep import split
from longreach.parallel.mesh import Axis, Mesh

CONFIG = """
model: {width: 16, depth: 2, mixers: [elementwise, chela], chela: {heads: 2, modes: 2}}
data: {seq_len: 64, batch_size: 2, curriculum: [[8, 3], [32, 3]]}
optim: {lr: 1.0e-2, warmup_steps: 2}
train: {steps: 9, threads: 1, validate_batches: 2}
checkpoint: {every: 1, keep_last: 0}
monitor: {tensorboard: false, plot: false}
"""
LENGTHS = [8, 8, 8, 32, 32, 32, 64, 64, 64]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> str:
    """Path of the config that the tests here train, with overrides of their own."""
    path = tmp_path_factory.mktemp("config") / "growing.yaml"
    path.write_text(CONFIG.replace("data: {", f"data: {{source: {corpus}, "), encoding="utf-8")
    return str(path)


def mesh_of(config: RunConfig, rank: int = 0) -> Mesh:
    ranks = config.parallel.num_data_ranks
    return Mesh(data=Axis(rank=rank, size=ranks, ranks=tuple(range(ranks))))


def all_steps(config: RunConfig, task: Task | None = None, rank: int = 0) -> list[StepInput]:
    task = open_task(config.task, config.data) if task is None else task
    return list(read_steps(config, mesh_of(config, rank), task, 0, 0))


def flat(steps: list[StepInput]) -> list[tuple[Tensor, Tensor]]:
    """The tokens and labels of each step, one after the other, whatever the lengths of its sequences are."""
    return [
        (
            torch.cat([one.tokens.flatten() for one in step.batch]),
            torch.cat([one.labels.flatten() for one in step.batch]),
        )
        for step in steps
    ]


@pytest.mark.parametrize(
    ("words", "micro_batches"),
    [
        ([], [8, 2, 1]),
        (["data.batch_size=4", "train.micro_batch_size=2"], [16, 4, 2]),
        (["parallel.ranks=2", "parallel.sequence=1"], [8, 2, 1]),
        (["parallel.ranks=2"], [8, 2, 1]),
        (["parallel.block_len=16"], [2, 1, 1]),
        (["parallel.block_len=8", "parallel.ranks=2"], [2, 1, 1]),
        (["data.seq_len=96", "data.batch_size=1", "parallel.block_len=20", "data.curriculum=[[4,1],[8,2]]"], [4, 2, 1]),
    ],
)
def test_stages_have_as_many_tokens_and_no_larger_micro_batches(
    config: str, words: list[str], micro_batches: list[int]
) -> None:
    """With streaming, of 16 tokens a rank at a time: catches a stage of short sequences that takes them all at once."""
    whole = load(config, words)
    stages = stages_of(whole)
    assert [stage.config.train.micro_batch_size for stage in stages] == micro_batches
    assert stages[-1].config is whole and stages[-1].steps.stop == 9
    for before, stage in pairwise(stages):
        assert before.steps.stop == stage.steps.start and before.config.data.seq_len < stage.config.data.seq_len
    for stage in stages:
        data = stage.config.data
        assert data.seq_len * stage.parts == whole.data.seq_len
        assert data.seq_len * data.batch_size == whole.data.seq_len * whole.data.batch_size
        assert data.batch_size // whole.parallel.num_data_ranks % stage.config.train.micro_batch_size == 0


@pytest.mark.parametrize("kind", ["stream", "documents", "workers", "mixture"])
def test_every_token_is_read_once_and_in_the_order_of_a_run_without(config: str, corpus: Path, kind: str) -> None:
    words = {
        "stream": [],
        "documents": ["data.packing=documents", "parallel.block_len=64"],
        "workers": ["data.workers=2", "parallel.block_len=64"],
        "mixture": [f"data.sources={{one: {{source: {corpus}}}, two: {{source: {corpus}, weight: 2}}}}"],
    }[kind]
    words += ["data.seq_len=512", "data.batch_size=1", "data.curriculum=[[64,7],[256,9]]", "train.steps=1000"]
    growing, plain = load(config, words), load(config, [*words, "data.curriculum=[]"])
    task = open_task(growing.task, growing.data)
    windows = len(task.sequences("train", None))
    growing.train.steps = plain.train.steps = windows
    steps = all_steps(growing, task)
    assert [step.config.data.seq_len for step in steps] == [64] * 7 + [256] * 9 + [512] * (windows - 16)
    for step in steps:
        assert {one.tokens.shape[1] for one in step.batch} == {step.config.data.seq_len}
        assert sum(one.tokens.numel() for one in step.batch) == 512
        numbers = [number for one in step.batch for number in one.indices.tolist()]
        assert numbers == step.windows() and len(set(numbers)) == len(numbers)
    for found, wanted in zip(flat(steps), flat(all_steps(plain, task)), strict=True):
        assert all(map(torch.equal, found, wanted))
    assert isinstance(task, Language)
    if kind != "mixture":
        num_tokens = task.streams["", "train"].num_tokens
        labels = sum(int((labels >= 0).sum()) for _, labels in flat(steps))
        documents = task.streams["", "train"].num_documents if kind == "documents" else 1
        assert labels == num_tokens - documents
    assert epochs_of(growing, task) == pytest.approx(epochs_of(plain, task))
    if kind == "documents":
        assert all(one.segments is not None for step in steps for one in step.batch)


def test_data_ranks_share_each_step(config: str) -> None:
    words = ["parallel.ranks=2", "parallel.sequence=1"]
    task = open_task(load(config).task, load(config).data)
    shares = [flat(all_steps(load(config, words), task, rank)) for rank in (0, 1)]
    for (one, _), *others in zip(flat(all_steps(load(config), task)), *shares, strict=True):
        assert torch.equal(one, torch.cat([tokens for tokens, _ in others]))


def test_steps_begin_anywhere(config: str) -> None:
    """Catches a stage that begins from its start, or from its end, when a run resumes within it."""
    growing = load(config)
    task = open_task(growing.task, growing.data)
    steps = all_steps(growing, task)
    for first in range(9):
        rest = list(read_steps(growing, mesh_of(growing), task, first, 2 * first))
        assert [step.position for step in rest] == [step.position for step in steps[first:]]
        assert [step.windows() for step in rest] == [step.windows() for step in steps[first:]]
        for found, wanted in zip(flat(rest), flat(steps[first:]), strict=True):
            assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", ["needle", "recall", "listops", "adding"])
def test_generated_examples_of_each_length(config: str, name: str) -> None:
    words = [f"task.name={name}", "task.pairs=4", "data.curriculum=[[16, 3], [32, 3]]", "task.examples=200"]
    seen = set()
    for step, length in zip(all_steps(load(config, words)), [16] * 3 + [32] * 3 + [64] * 3, strict=True):
        assert sum(one.tokens[..., 0].numel() if name == "adding" else one.tokens.numel() for one in step.batch) == 128
        for one in step.batch:
            assert one.tokens.shape[1] == length
            labels = one.labels[..., 0].isfinite() if name == "adding" else one.labels >= 0
            assert labels.any(1).all(), "whole examples"
            seen |= {(length, number) for number in one.indices.tolist()}
    assert len(seen) == 3 * (8 + 4 + 2), "no example is read twice"


def rows_of(run_dir: str | Path) -> Rows:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def train_each(rank: int, config: str, runs: list[list[str]]) -> list[tuple[Rows, float | None, str]]:
    """Train once with each list of overrides; returns each run's rows, its held-out loss and what it said."""
    results = []
    for overrides in runs:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            result = train(load(config, overrides))
        results.append((rows_of(result.run_dir), result.held_out, said.getvalue()))
    return results


@pytest.mark.timeout(600)
def test_the_same_losses_on_every_layout_streamed_and_in_every_stage_of_zero(config: str, tmp_path: Path) -> None:
    def run(name: str, *words: str) -> list[str]:
        return [*words, f"run.dir={tmp_path}/{name}"]

    alone = [
        run("1"),
        run("no-curriculum", "data.curriculum=[]"),
        run("streamed", "parallel.block_len=16", "deepspeed=zero3"),
    ]
    (rows, held_out, said), (plain, _, _), *others = run_world(train_each, 1, config, alone, timeout=200)[0]
    assert [row["seq_len"] for row in rows] == LENGTHS
    assert [row["tokens"] for row in rows] == [128 * step for step in range(1, 10)]
    assert "sequences of 8 (3 steps), then 32 (3 steps), then 64 tokens" in said
    assert [row["seq_len"] for row in plain] == [64] * 9
    apart = [abs(row["loss"] / other["loss"] - 1) for row, other in zip(rows, plain, strict=True)]
    assert apart[0] > 1e-6, "the lengths must make a difference"
    layout = ["parallel.ranks=2", "parallel.sequence=1"]
    two = [run(f"zero{stage}", "parallel.ranks=2", f"deepspeed=zero{stage}") for stage in range(4)]
    two += [run("data", *layout), run("data-3", *layout, "deepspeed=zero3", "parallel.block_len=16")]
    two += [run("streamed-2", "parallel.ranks=2", "parallel.block_len=8", "deepspeed=zero2")]
    others += run_world(train_each, 2, config, two, timeout=300)[0]
    assert held_out is not None
    for found, found_held_out, _ in others:
        assert [row["seq_len"] for row in found] == LENGTHS
        for key in ("loss", "grad_norm", "lr", "tokens"):
            assert [row[key] for row in found] == pytest.approx([row[key] for row in rows], rel=1e-5)
        assert found_held_out == pytest.approx(held_out, rel=1e-5)


def train_and_go_back(rank: int, config: str, directory: str, words: list[str]) -> dict[int, Rows]:
    """A whole run, and runs that resume from some of its checkpoints."""
    train(load(config, [*words, f"run.dir={directory}/0"]))
    for step in (2, 3, 5, 7):
        copy = Path(directory, str(step))
        shutil.copytree(f"{directory}/0", copy)
        for later in range(step + 1, 10):
            shutil.rmtree(copy / "checkpoints" / f"step-{later:08}")
        train(load(config, [*words, f"run.dir={copy}"]))
    return {step: rows_of(f"{directory}/{step}") for step in (0, 2, 3, 5, 7)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("task", ["language", "needle"])
def test_a_run_resumes_within_a_stage_bit_for_bit(config: str, tmp_path: Path, task: str) -> None:
    words = [f"task.name={task}"] + (["parallel.block_len=32"] if task == "language" else [])
    found = run_world(train_and_go_back, 1, config, str(tmp_path), words, timeout=250)[0]
    for step, rows in found.items():
        for key in ("step", "seq_len", "loss", "grad_norm", "tokens"):
            assert [row[key] for row in rows] == [row[key] for row in found[0]], f"from step {step}: {key}"


def resume_with_another(rank: int, config: str, run_dir: str) -> tuple[Rows, str]:
    train(load(config, [f"run.dir={run_dir}"]))
    ((rows, _, said),) = train_each(
        rank, config, [[f"run.dir={run_dir}", "train.steps=12", "data.curriculum=[[16,10]]"]]
    )
    return rows, said


def test_a_run_resumed_with_another_curriculum_says_so(config: str, tmp_path: Path) -> None:
    rows, said = run_world(resume_with_another, 1, config, str(tmp_path / "run"))[0]
    assert [row["seq_len"] for row in rows] == [*LENGTHS, 16, 64, 64] and rows[-1]["tokens"] == 12 * 128
    assert said.count("not an exact resume") == 1
    assert "data.curriculum was [[8, 3], [32, 3]] and is [[16, 10]]" in said
    (state_file,) = (tmp_path / "run" / "checkpoints").glob("step-*12/state.json")
    assert json.loads(state_file.read_text())["state"]["consumed"] == 2 * 12


def test_a_checkpoint_of_a_version_without_curricula_resumes(config: str) -> None:
    plain = load(config, ["data.curriculum=[]"])
    task = open_task(plain.task, plain.data)
    old = {"step": 4, "consumed": 8, "tokens": 512, "seed": 0, "seq_len": 64, "batch_size": 2, "packing": "stream"}
    old |= {"data": task.fingerprint, "reverse_complement": False, "sources": {}}
    assert check_resume(plain, task, dict(old)) == []
    (line,) = check_resume(load(config), task, dict(old))
    assert line.startswith("not an exact resume: data.curriculum was [] and is [[8, 3], [32, 3]]")


MISTAKES = {
    "data.curriculum=[[8,3,1]]": "must be pairs of tokens and steps",
    "data.curriculum=[[0,3]]": "must be pairs of tokens and steps",
    "data.curriculum=[[8,0]]": "must be pairs of tokens and steps",
    "data.curriculum=[[32,1],[8,1]]": "lengths must increase up to data.seq_len = 64, and 32 comes before 8",
    "data.curriculum=[[64,3]]": "lengths must increase up to data.seq_len = 64, and 64 comes before 64",
    "data.curriculum=[[24,3]]": "each length must divide data.seq_len = 64, and 24 does not; write 16 in its place",
    "data.curriculum=[[30,3]]": "write 32 in its place",
    "data.curriculum=[[8,5],[16,4]]": "must end before the last step, and has 9 of 9 (train.steps); set ",
    "data.curriculum=[8,3]": "must be a list (the command line)",
    "data.curriculum=[[8,x]]": "must be a whole number (the command line)",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(config: str, mistake: str) -> None:
    with pytest.raises(InputError) as error:
        load(config, [mistake])
    line = str(error.value)
    assert line.startswith("data.curriculum") and MISTAKES[mistake] in line and "\n" not in line


def test_what_reads_a_run_takes_another_length(config: str, tmp_path: Path) -> None:
    """Catches an evaluation at a length that the stages of training do not divide."""
    save(load(config), tmp_path / "config.yaml")
    assert load_config(tmp_path, ["data.seq_len=100"]).data.seq_len == 100


def refused(rank: int, config: str, runs: list[list[str]]) -> list[str]:
    """What each run ends with; none of them makes its directory."""
    found = []
    for words in runs:
        try:
            train(load(config, words))
        except InputError as error:
            found.append(str(error))
    return found


def test_what_only_the_data_know_is_told_before_the_run_directory_is_made(config: str, tmp_path: Path) -> None:
    run_dir = f"run.dir={tmp_path / 'run'}"
    runs = [["task.name=needle", "data.curriculum=[[2,3]]", run_dir], ["data.epochs=0.01", run_dir]]
    short, early = run_world(refused, 1, config, runs)[0]
    assert short.startswith("data.curriculum = [[2, 3]]: 2 tokens are no length for task.name=needle (data.seq_len: at")
    assert re.match(r"data\.curriculum = .*: must end before the last step, and has 6 of [1-6] \(train\.steps\)", early)
    assert not (tmp_path / "run").exists()


def test_a_curriculum_on_the_command_line_is_no_sweep() -> None:
    words = ["data.curriculum=[[8,3],[16,3]]", "optim.lr=1e-3,2e-3"]
    assert split(words) == ([words[0]], {"optim.lr": ["1e-3", "2e-3"]})


def test_the_steps_of_a_run_without_a_curriculum(config: str) -> None:
    """As they were before there were curricula: the batches of one dataset, from the position on."""
    plain = load(config, ["data.curriculum=[]"])
    task = open_task(plain.task, plain.data)
    (stage,) = stages_of(plain)
    assert stage.config is plain and stage.parts == 1 and stage.steps == range(9)
    steps = islice(read_steps(plain, mesh_of(plain), task, 3, 6), 6)
    dataset = task.sequences("train", plain.run.seed)
    for number, step in enumerate(steps, 3):
        assert step.position == 2 * number and step.config is plain
        wanted = [dataset.sequence(dataset.window(step.position + row)) for row in range(2)]
        assert torch.equal(torch.cat([one.tokens for one in step.batch]), torch.stack([row[0] for row in wanted]))
        assert torch.equal(torch.cat([one.labels for one in step.batch]), torch.stack([row[1] for row in wanted]))
