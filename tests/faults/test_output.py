"""Faults of what a run shows, numbered as in the list of faults: charts are no reason to end a training."""

from __future__ import annotations

import os
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from fault_helpers import JobDirectory, error_line
from programs import finish
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MISTAKE = 2
CHARTS = "monitor.tensorboard=true"


def fill(disk: Path, leave: int) -> None:
    """Leave so many bytes of a file system."""
    left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(0, left - leave)))


@pytest.mark.parametrize("fault", ["a file", "full", "read-only"])
def test_65_tensorboard_that_cannot_be_written(job_dir: JobDirectory, small_disk: Path, fault: str) -> None:
    """A warning in one line, and the training goes on; metrics.jsonl has every step."""
    run = f"charts-{fault.replace(' ', '-')}"
    (job_dir.directory / run).mkdir()
    board = job_dir.directory / run / "tensorboard"
    if fault == "a file":
        board.write_text("")
    else:
        board.symlink_to(small_disk)
        fill(small_disk, 0 if fault == "full" else 1 << 20)
    if fault == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = job_dir.train(run, CHARTS, "monitor.plot=true", "train.steps=5")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"warning: {run}/tensorboard cannot be written (" in done.stderr
    assert [row["step"] for row in job_dir.rows(run)] == [1, 2, 3, 4, 5]
    assert job_dir.checkpoints(run) == ["step-00000005"] and (job_dir.directory / run / "plots/loss.png").exists()


def test_65_the_record_of_the_run_that_cannot_be_written(job_dir: JobDirectory, small_disk: Path) -> None:
    """Metrics are the record: the run ends in one line, and goes on from its checkpoint when there is room."""
    run = str(small_disk / "run")
    assert job_dir.train(run, "train.steps=2").returncode == 0
    with job_dir.training(run) as process:
        job_dir.wait(process, lambda: len(job_dir.rows(run)) > 2)
        fill(small_disk, 0)
        done = finish(process, 60)
    assert done.returncode == MISTAKE
    error_line(done, "metrics.jsonl", "cannot be written: No space left on device", "the same command goes on")
    again = job_dir.train(run, "train.steps=4")
    assert again.returncode == MISTAKE, "nor does it start"
    error_line(again, "bytes free, and a checkpoint needs")
    (small_disk / "filler").unlink()
    assert job_dir.train(run, "train.steps=4").returncode == 0
    assert [row["step"] for row in job_dir.rows(run)] == [1, 2, 3, 4]


def test_66_steps_after_a_resume_do_not_double(job_dir: JobDirectory) -> None:
    """Neither in metrics.jsonl nor in what TensorBoard reads, validations included."""
    words = [CHARTS, "checkpoint.every=2", "checkpoint.keep_last=0", "train.validate_every=1"]
    assert job_dir.train("doubled", *words, "train.steps=6").returncode == 0
    for file in (job_dir.directory / "doubled/checkpoints/step-00000006").iterdir():
        file.unlink()  # as if it had been lost: steps 5 and 6 are trained again
    (job_dir.directory / "doubled/checkpoints/step-00000006").rmdir()
    done = job_dir.train("doubled", *words, "train.steps=8")
    assert done.returncode == 0 and "step-00000004" in done.stderr, done.stderr
    assert [row["step"] for row in job_dir.rows("doubled")] == list(range(1, 9))
    board = job_dir.directory / "doubled/tensorboard"
    charts, held_out = (EventAccumulator(str(place), {"scalars": 0}).Reload() for place in (board, board / "held-out"))
    steps = defaultdict(list)
    for run in (charts, held_out):
        for tag in run.Tags()["scalars"]:
            steps[tag] = [event.step for event in run.Scalars(tag)]
    assert steps["train/loss"] == steps["validation/loss"] == list(range(1, 9))
    assert all(found == sorted(set(found)) for found in steps.values()), steps
    rows = {row["step"]: row["loss"] for row in job_dir.rows("doubled")}
    assert all(abs(event.value - rows[event.step]) < 1e-5 for event in charts.Scalars("train/loss"))
