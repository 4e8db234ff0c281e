"""Training: the same numbers on every layout and ZeRO stage, exact resumption, and what a run directory holds."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import socket
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed_world import run_world
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.trainer import train

CONFIG = """
model:
  width: 16
  depth: 4
  mixers: [elementwise, chela, feedforward_kernel, softmax]
  chela: {heads: 2, modes: 2}
  feedforward_kernel: {heads: 2, dropout: 0.2}
  softmax: {heads: 2}
data: {seq_len: 61, batch_size: 4}
optim: {lr: 1.0e-2, warmup_steps: 4, clip: 0.5}
train: {steps: 10, threads: 1, validate_batches: 2}
monitor: {tensorboard: false, plot: false}
"""
LAYOUTS = {  # ranks, and how many of them share a sequence
    "1": (1, 1),
    "2 of a sequence": (2, 2),
    "4 of a sequence": (4, 4),
    "2 x 1": (2, 1),
    "2 x 2": (4, 2),
}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> str:
    """Path of the config that the tests here train, with overrides of their own."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG.replace("data: {", f"data: {{source: {corpus}, "), encoding="utf-8")
    return str(path)


def rows_of(run_dir: str | Path, name: str = "metrics.jsonl") -> Rows:
    return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]


def train_each(rank: int, config: str, runs: list[list[str]]) -> list[tuple[Rows, float | None]]:
    """Train once with each list of overrides; returns each run's rows of ``metrics.jsonl`` and its held-out loss."""
    results = []
    for overrides in runs:
        result = train(load(config, overrides))
        results.append((rows_of(result.run_dir), result.held_out))
    return results


def close(rows: Rows, expected: Rows, keys: tuple[str, ...] = ("loss", "grad_norm")) -> None:
    """Step by step, to a relative 1e-5."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for key in keys:
            assert row[key] == pytest.approx(wanted[key], rel=1e-5, abs=0), f"step {row['step']}: {key}"


@pytest.fixture(scope="module")
def everywhere(config: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Rows, float | None]]]:
    """What `train_each` gives on each layout: for the four ZeRO stages, for packed documents in one of them, then
    streamed in the four stages.
    """
    all_runs: dict[int, list[list[str]]] = {}  # by ranks: one world for all layouts of as many
    for ranks, sequence in LAYOUTS.values():
        directory = tmp_path_factory.mktemp("runs")
        layout = [f"parallel.ranks={ranks}", f"parallel.sequence={sequence}"]
        half = 2 * sequence // ranks  # sequences of a data rank
        runs = []
        for stage in range(4):
            runs.append([*layout, f"deepspeed=zero{stage}", f"run.dir={directory}/{stage}"])
            runs[-1] += [f"train.micro_batch_size={half * (1 + stage % 2)}", "train.steps=7", "optim.schedule_steps=10"]
        runs.append([*layout, "deepspeed=zero2", f"run.dir={directory}/documents", "data.packing=documents"])
        runs[-1] += ["train.steps=3", "optim.schedule_steps=10"]
        for stage in range(4):
            runs.append([*layout, f"deepspeed=zero{stage}", f"run.dir={directory}/streamed-{stage}"])
            runs[-1] += ["train.steps=3", "optim.schedule_steps=10", "data.packing=documents"]
            runs[-1] += [f"train.micro_batch_size={half * (1 + stage % 2)}", f"parallel.block_len={40 // sequence}"]
            runs[-1] += [f"parallel.park_carries={stage > 0}", f"train.recompute={stage % 2 == 1}"]
        all_runs.setdefault(ranks, []).extend(runs)
    found = {
        ranks: iter(run_world(train_each, ranks, config, runs, timeout=560)[0]) for ranks, runs in all_runs.items()
    }
    return {name: [*islice(found[ranks], 9)] for name, (ranks, _) in LAYOUTS.items()}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seven_steps_are_the_same_on_every_layout_and_stage(
    everywhere: dict[str, list[tuple[Rows, float | None]]], layout: str
) -> None:
    """With dropout, clipping, warm-up, accumulation of two sizes of micro-batches, and 61 tokens: no number of ranks
    divides them.
    """
    (rows, held_out), (document_rows, held_out_documents) = everywhere["1"][0], everywhere["1"][4]
    assert len(rows) == 7 and len(document_rows) == 3 and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert min(row["grad_norm"] for row in rows) > 0.5, "clipping must have something to do"
    apart = [abs(row["loss"] / other["loss"] - 1) for row, other in zip(document_rows, rows)]
    assert max(apart) > 1e-3, "documents must make a difference"
    assert held_out is not None and held_out_documents is not None
    for found, found_held_out in everywhere[layout][:4]:
        close(found, rows, ("loss", "grad_norm", "lr", "penalty"))
        assert found_held_out == pytest.approx(held_out, rel=1e-5)
    close(everywhere[layout][4][0], document_rows)
    assert everywhere[layout][4][1] == pytest.approx(held_out_documents, rel=1e-5)
    for streamed, _ in everywhere[layout][5:]:
        close(streamed, document_rows, ("loss", "grad_norm", "penalty"))


def train_in_two_halves(rank: int, config: str, directory: str) -> None:
    train(load(config, [f"run.dir={directory}/whole"]))
    for steps in (10, 20):
        train(load(config, [f"run.dir={directory}/halves", f"train.steps={steps}"]))
        if rank == 0 and steps == 10:
            for name in ("alone", "four"):
                shutil.copytree(f"{directory}/halves", f"{directory}/{name}")


@pytest.mark.timeout(900)
def test_a_run_that_is_stopped_and_continued_equals_one_that_is_not(config: str, tmp_path: Path) -> None:
    """Bit for bit on the same layout; to rounding on another number of ranks and in another ZeRO stage."""
    text = Path(config).read_text().replace("steps: 10", "steps: 20").replace("batch_size: 4", "batch_size: 2")
    longer = tmp_path / "longer.yaml"
    longer.write_text(f"{text.replace('clip: 0.5', 'clip: 0.5, schedule_steps: 20')}\ndeepspeed: zero2\n")
    run_world(train_in_two_halves, 2, str(longer), str(tmp_path), timeout=280)
    whole, halves = rows_of(tmp_path / "whole"), rows_of(tmp_path / "halves")
    for row, wanted in zip(halves, whole, strict=True):
        for key in ("step", "loss", "grad_norm", "lr", "tokens"):
            assert row[key] == wanted[key], f"step {wanted['step']}: {key}"
    last = "checkpoints/step-00000020"
    files = sorted(path.name for path in (tmp_path / "whole" / last).glob("*.safetensors"))
    assert files
    for file in files:
        left, right = (load_file(tmp_path / name / last / file) for name in ("whole", "halves"))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    for name, ranks, stage in (("alone", 1, 3), ("four", 4, 0)):
        overrides = [f"run.dir={tmp_path / name}", f"parallel.ranks={ranks}", f"deepspeed=zero{stage}"]
        ((rows, _),) = run_world(train_each, ranks, str(longer), [overrides], timeout=280)[0]
        close(rows, whole)


def train_aloud(rank: int, config: str, runs: list[list[str]]) -> list[tuple[Rows, str]]:
    """Train once with each list of overrides; returns each run's rows, and what it said."""
    results = []
    for overrides in runs:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            result = train(load(config, overrides))
        results.append((rows_of(result.run_dir), said.getvalue()))
    return results


def test_a_run_shorter_than_its_warm_up_works(config: str, tmp_path: Path) -> None:
    """The warm-up takes half of it, and one line says so."""
    rates = {1: [1e-2], 2: [1e-2, 1e-2], 5: [5e-3, 1e-2, 1e-2, 7.75e-3, 3.25e-3]}
    warm_up = ["optim.warmup_steps=10", "optim.lr=1e-2"]
    runs = [[f"run.dir={tmp_path}/{steps}", f"train.steps={steps}", *warm_up] for steps in rates]
    for steps, (rows, said) in zip(rates, run_world(train_aloud, 1, config, runs)[0], strict=True):
        assert [row["lr"] for row in rows] == pytest.approx(rates[steps])
        lines = [line for line in said.splitlines() if "warmup_steps" in line]
        assert lines == [f"the schedule has {steps} steps: optim.warmup_steps = 10 is shortened to {steps // 2}"]


def test_a_run_says_how_often_it_reads_the_data(config: str, tmp_path: Path) -> None:
    """Catches a small corpus that is read a hundred times, without a word."""
    often = {0.01: False, 2: False, 12.5: True}
    small = ["data.seq_len=4096", "model.depth=1"]
    runs = [[f"run.dir={tmp_path}/{epochs}", f"data.epochs={epochs}", *small] for epochs in often]
    for epochs, (rows, said) in zip(often, run_world(train_aloud, 1, config, runs)[0], strict=True):
        found = re.search(r"([\d,]+) training tokens .* ([\d,]+) steps or ([\d.]+) epochs", said)
        assert found is not None, said
        sequences = -(-(int(found[1].replace(",", "")) - 1) // 4096)
        assert sequences < 100, "a small corpus"
        assert rows[-1]["step"] == int(found[2]) == max(1, math.ceil(epochs * sequences / 4))
        assert float(found[3]) == pytest.approx(rows[-1]["step"] * 4 / sequences, rel=5e-3)
        assert ("times: give more data, or fewer steps" in said) == often[epochs]


RESUMED = {  # another setting, and the tokens and sequences after step 4 where steps 1 and 2 read 2 of 24 tokens each
    "data.seq_len=36": (2 * 2 * 24 + 2 * 2 * 36, 2 * 2 * 24 // 36 + 2 * 2),
    "data.batch_size=4": (2 * 2 * 24 + 2 * 4 * 24, 2 * 2 + 2 * 4),
    "data.packing=documents": (4 * 2 * 24, 4 * 2),
    "run.seed=5": (4 * 2 * 24, 4 * 2),
    "train.micro_batch_size=2": (4 * 2 * 24, 4 * 2),
}


def resume_with(rank: int, config: str, directory: str) -> list[tuple[Rows, str]]:
    """Two steps, then two more with each change."""
    settings = ["optim.warmup_steps=0", "optim.schedule_steps=4", "data.batch_size=2", "data.seq_len=24"]
    train(load(config, [*settings, f"run.dir={directory}/first", "train.steps=2"]))
    for change in RESUMED:
        shutil.copytree(f"{directory}/first", f"{directory}/{change}")
    runs = [[*settings, f"run.dir={directory}/{change}", change, "train.steps=4"] for change in RESUMED]
    return train_aloud(rank, config, runs)


def test_a_run_resumed_with_other_data_settings_counts_on_and_says_so(config: str, tmp_path: Path) -> None:
    """Catches tokens that are steps times the new size, and a position that silently means another one."""
    found = run_world(resume_with, 1, config, str(tmp_path))[0]
    for (change, (tokens, consumed)), (rows, said) in zip(RESUMED.items(), found, strict=True):
        assert [row["tokens"] for row in rows][:2] == [48, 96] and rows[-1]["tokens"] == tokens
        (state_file,) = (tmp_path / change / "checkpoints").glob("step-*4/state.json")
        state = json.loads(state_file.read_text())["state"]
        assert state["tokens"] == tokens and state["consumed"] == consumed
        name = change.split("=")[0]
        assert (f"not an exact resume: {name} was " in said) == (not name.startswith("train."))
        assert said.count("not an exact resume") == (not name.startswith("train."))


def lose_a_checkpoint(rank: int, config: str, run_dir: str) -> tuple[Rows, Rows, Rows, Rows]:
    """Steps 1 to 6, of which only 4 are in a checkpoint then, and on to 8: both files' rows before and after."""
    settings = [f"run.dir={run_dir}", "train.validate_every=2", "checkpoint.every=4", "optim.schedule_steps=8"]
    train(load(config, [*settings, "train.steps=6"]))
    before = rows_of(run_dir), rows_of(run_dir, "validation.jsonl")
    shutil.rmtree(f"{run_dir}/checkpoints/step-00000006")
    with open(f"{run_dir}/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a killed process leaves it
    train(load(config, [*settings, "train.steps=8"]))
    return *before, rows_of(run_dir), rows_of(run_dir, "validation.jsonl")


def test_steps_that_are_done_again_are_shown_once(config: str, tmp_path: Path) -> None:
    rows, held_out, rows_after, held_out_after = run_world(lose_a_checkpoint, 1, config, str(tmp_path / "run"))[0]
    assert [row["step"] for row in rows_after] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["loss"] for row in rows_after[:6]] == [row["loss"] for row in rows]
    assert [row["step"] for row in held_out_after] == [2, 4, 6, 8]
    assert [row["loss"] for row in held_out_after[:3]] == [row["loss"] for row in held_out]


def train_again(rank: int, config: str, directory: str) -> tuple[str, str, list[str]]:
    """What a finished run says when it is started again, with another setting, where its directory cannot be made, and
    what is there.
    """
    settings = ["train.steps=1", "data.batch_size=1", "optim.warmup_steps=0"]
    train(load(config, [*settings, f"run.dir={directory}/run"]))
    said, kept = io.StringIO(), Path(directory, "run", "config.yaml")
    before = kept.read_text()
    with contextlib.redirect_stderr(said):
        train(load(config, [*settings, f"run.dir={directory}/run", "data.seq_len=33"]))
    assert kept.read_text() == before, "nothing was trained by the other setting"
    try:
        train(load(config, [*settings, f"run.dir={config}"]))
    except InputError as error:
        return said.getvalue(), str(error), os.listdir(directory)
    raise AssertionError("a run began in a file")


def test_a_finished_run_says_so_and_a_file_is_no_run_directory(config: str, tmp_path: Path) -> None:
    said, mistake, made = run_world(train_again, 1, config, str(tmp_path))[0]
    assert "finished: " in said.splitlines()[-1] and "step 1 of 1; nothing is trained" in said.splitlines()[-1]
    assert mistake.startswith(f"run.dir = {config!r}: ")
    assert made == ["run"]


def test_a_run_directory_holds_what_it_promises(config: str, tmp_path: Path) -> None:
    """A run in bf16 over two ranks, with everything switched on."""
    overrides = ["parallel.ranks=2", "train.precision=bf16", "train.validate_every=5", "train.steps=12"]
    overrides += [f"run.dir={tmp_path / 'run'}", "monitor.tensorboard=true", "monitor.plot=true"]
    overrides += ["monitor.record_exchanges=2"]
    ((rows, held_out),) = run_world(train_each, 2, config, [overrides])[0]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    for row in rows:
        assert row["bits_per_token"] == pytest.approx(row["loss"] / math.log(2))
        assert row["tokens"] == row["step"] * 4 * 61
        (host,), slowest = row.pop("hosts").values(), row.pop("slowest_host")
        assert slowest == socket.gethostname() and host["ranks"] == [0, 1] and row["slowest_rank"] in host["ranks"]
        assert all(math.isfinite(value) for value in [*row.values(), *host["wait_seconds"], *host["peak_memory_bytes"]])
        assert 0 <= row["waited_for_slowest_seconds"] <= 2 * row["wait_seconds"] <= 4 * row["step_seconds"]

    run_dir = tmp_path / "run"
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.yaml", "vocabulary.json", "metrics.jsonl", "validation.jsonl", "tensorboard", "checkpoints", "plots",
        "exchanges", "status.json", ".lock",
    }  # fmt: skip
    ours, theirs = (rows_of(run_dir / "exchanges", f"rank-{rank}.jsonl") for rank in (0, 1))
    assert {row["step"] for row in ours} == {1, 2}
    for step in (1, 2):  # what the recorder saw of a verb is what `metrics.jsonl` counts
        for verb in ("scan", "halo", "by_channel"):
            seen = sum(row["num_bytes"] for row in ours if row["step"] == step and row["verb"] == verb)
            assert seen == rows[step - 1][f"bytes_{verb}"] > 0
    collectives = [[row["kind"] for row in x if row["kind"] not in ("send", "receive")] for x in (ours, theirs)]
    assert collectives[0] == collectives[1] and "all_reduce" in collectives[0]  # DeepSpeed's too
    assert load(run_dir / "config.yaml").model.vocab == 256
    assert (run_dir / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step-00000012"
    validations = rows_of(run_dir, "validation.jsonl")
    assert [row["step"] for row in validations] == [5, 10, 12] and validations[-1]["loss"] == held_out

    events = EventAccumulator(str(run_dir / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    promised = {
        "train/loss": "loss",
        "train/bits_per_token": "bits_per_token",
        "train/lr": "lr",
        "train/grad_norm": "grad_norm",
        "speed/tokens_per_second": "tokens_per_second",
        "speed/data_wait_seconds": "data_wait_seconds",
        "speed/save_seconds": "save_seconds",
        "memory/peak_bytes": "peak_memory_bytes",
        "exchange/scan_bytes": "bytes_scan",
        "exchange/halo_bytes": "bytes_halo",
        "exchange/by_channel_bytes": "bytes_by_channel",
    }
    for tag, key in promised.items():
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx({row["step"]: row[key] for row in rows}, rel=1e-6), tag
    held_out_events = EventAccumulator(str(run_dir / "tensorboard/held-out"), {"scalars": 0}).Reload()
    assert {event.step for event in held_out_events.Scalars("validation/loss")} == {5, 10, 12}
    assert [event.step for event in events.Images("validation/by_position")] == [5, 10, 12]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text.strip("`\n").removeprefix("yaml"))["model"]["width"] == 16
    assert set(tags["scalars"]) >= promised.keys()


def test_a_pattern_is_learned(config: str, tmp_path: Path) -> None:
    """40 steps on one line that repeats: what is left of the loss is a tenth."""
    source = tmp_path / "pattern"
    source.mkdir()
    for name in "ab":
        (source / name).write_text("to be or not to be. " * 200)
    overrides = [f"data.source={source}", f"data.cache={tmp_path / 'packed'}", f"run.dir={tmp_path / 'run'}"]
    overrides += ["data.seq_len=80", "train.steps=40", "optim.lr=2e-2", "data.valid_fraction=0.5"]
    ((rows, held_out),) = run_world(train_each, 1, config, [overrides])[0]
    assert rows[0]["loss"] > 5 and held_out is not None
    assert held_out < 0.1 * rows[0]["loss"]
