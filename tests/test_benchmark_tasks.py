"""benchmarks/tasks.py as a program: tiny trainings, a sweep that is stopped and goes on, tables and figures."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from programs import finish, start

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "tasks.py"
TINY = ["data.seq_len=16", "data.batch_size=2", "train.micro_batch_size=2", "task.test_examples=4", "model.width=16"]
DEADLINE = 120.0  # seconds for a training to begin


def words_of(directory: Path, steps: int, *more: str) -> list[str]:
    """A sweep of the adding problem with softmax attention, two seeds, one after the other."""
    sizes = [word for size in (*TINY, "model.softmax.heads=2", f"train.steps={steps}") for word in ("--set", size)]
    places = ["--directory", str(directory / "runs"), "--out", str(directory / "tasks.json")]
    return [str(PROGRAM), "adding / softmax", "--seeds", "2", "--jobs", "1", *sizes, *places, *more]


def row_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "tasks.json").read_text())
    assert list(found) == ["adding / softmax"]
    row: dict[str, Any] = found["adding / softmax"]
    return row


def steps_of(directory: Path, seed: int) -> list[int]:
    files = list((directory / "runs").glob(f"adding-softmax-*-seed-{seed}/metrics.jsonl"))
    return [json.loads(line)["step"] for file in files for line in file.read_text().splitlines()]


def test_a_sweep_that_is_stopped_goes_on(tmp_path: Path) -> None:
    """What was found stays as it is, the interrupted training goes on from its checkpoint, and then nothing is left to
    do. A training that fails leaves the others alone; other words are trained anew.
    """
    words = words_of(tmp_path, 400, "--set", "train.validate_every=200", "--set", "train.validate_batches=1")
    sweep = start(*words, cwd=tmp_path)
    deadline = time.monotonic() + 2 * DEADLINE
    while not any(step >= 20 for step in steps_of(tmp_path, 1)):
        assert sweep.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    sweep.send_signal(signal.SIGTERM)
    done = finish(sweep)
    assert done.returncode == 75 and "--resume" in done.stderr, done.stderr
    row, stopped_at = row_of(tmp_path), steps_of(tmp_path, 1)[-1]
    assert list(row["seeds"]) == ["0"] and row["steps"] == 400 and stopped_at < 400
    first = row["seeds"]["0"]
    assert first["seconds"] > 0 and [step for step, _ in first["curve"]] == [200, 400]
    assert set(first["metrics"]) == {"rmse", "mae"} and first["environment"]["commit"]

    done = finish(start(*words, "--resume", "--figures", str(tmp_path / "figures"), cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["adding / softmax, seed 1"]
    row = row_of(tmp_path)
    assert row["seeds"]["0"] == first and list(row["seeds"]) == ["0", "1"]
    assert steps_of(tmp_path, 1) == [*range(1, 401)]
    assert f"| {row['num_parameters']:,} | 400 | 2 | rmse " in done.stdout and "±" in done.stdout
    assert "'model.mixers=[softmax]'" in done.stdout and "train.steps=400" in done.stdout
    for name in ("needle.png", "learning.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")

    done = finish(start(*words, "--resume", cwd=tmp_path))
    assert done.returncode == 0 and not done.stderr and row_of(tmp_path) == row

    (one,) = (tmp_path / "runs").glob("*-seed-0")
    one.rename(tmp_path / "away")
    one.write_text("")
    (tmp_path / "tasks.json").write_text("{}")
    done = finish(start(*words, "--resume", cwd=tmp_path))  # what fails is told, and the others go on
    failed, passed = done.stderr.splitlines()
    assert done.returncode == 1 and "run.dir" in failed and "run.seed=0" in failed
    assert passed.startswith("adding / softmax, seed 1: rmse ")
    assert row_of(tmp_path)["seeds"] == {"1": row["seeds"]["1"] | {"environment": first["environment"]}}

    done = finish(start(*words_of(tmp_path, 3, "--resume", "--seeds", "1"), cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    row = row_of(tmp_path)
    assert row["steps"] == 3 and "train.steps=3" in row["words"] and list(row["seeds"]) == ["0"]
