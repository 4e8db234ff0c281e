"""Faults of checkpoints, numbered as in the list of faults: what is found again, and what is said."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import Place
from worlds import run_world

from longreach.framework import checkpoint
from longreach.framework.config import load
from longreach.framework.model import build_model
from longreach.framework.trainer import train
from longreach.kernels.errors import InputError

MISTAKE = 2
FLIPS = 1000


def configured(place: Place, run: Path | str, *words: str) -> list[str]:
    return [f"data.source={place.directory / 'packed'}", f"run.dir={run}", *words]


def train_and_kill(rank: int, config: str, words: list[str], directory: str, point: int, victim: int) -> int:
    """Train; where the first rank reaches so many events among the files of checkpoints, kill a rank.

    Returns:
        How many such events there were, on the first rank.
    """
    count = 0
    (Path(directory) / f"process-{rank}").write_text(str(os.getpid()))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if any(isinstance(one, (str, os.PathLike)) and "checkpoints" in os.fspath(one) for one in arguments):
            count += 1
            if count == point:
                os.kill(int((Path(directory) / f"process-{victim}").read_text()), signal.SIGKILL)

    if rank == 0:
        sys.addaudithook(hook)
    train(load(config, words))
    return count


def train_quietly(rank: int, config: str, words: list[str]) -> None:
    train(load(config, words))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", [0, 1])
def test_53_a_rank_that_is_killed_anywhere_in_a_save(place: Place, tmp_path: Path, victim: int) -> None:
    """At every file that a save touches: a checkpoint loads, the run goes on as if nothing was, and no leavings."""
    config = str(place.directory / "endless.yaml")
    words = ["parallel.ranks=2", "checkpoint.every=2", "checkpoint.keep_last=1"]
    whole = tmp_path / "whole"
    run_world(train_quietly, 2, config, configured(place, whole, *words, "train.steps=6"))
    start = tmp_path / "start"
    run_world(train_quietly, 2, config, configured(place, start, *words, "train.steps=2"))

    def go_on(run: Path, point: int) -> int:
        shutil.copytree(start, run)
        found = run_world(
            train_and_kill, 2, config, configured(place, run, *words, "train.steps=4"), str(tmp_path), point, victim
        )
        return int(found[0])

    points = go_on(tmp_path / "counted", 0)
    assert points >= 20
    expected = [(row["step"], row["loss"], row["grad_norm"]) for row in place.rows(str(whole))]
    lost = 0
    for point in range(1, points + 1):
        run = tmp_path / f"killed-{point}"
        with contextlib.suppress(RuntimeError):  # a rank died, or the other one lost it
            go_on(run, point)
        saved = checkpoint.newest(run / "checkpoints")
        assert saved is not None and saved.name.removesuffix(".replaced") in ("step-00000002", "step-00000004"), point
        lost += saved.name == "step-00000002"
        run_world(train_quietly, 2, config, configured(place, run, *words, "train.steps=6"))
        rows = [(row["step"], row["loss"], row["grad_norm"]) for row in place.rows(str(run))]
        assert rows == expected, point
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000006"], point
        shutil.rmtree(run)
    assert 0 < lost < points if victim == 0 else lost < points


@pytest.fixture(scope="module")
def trained(place: Place) -> Path:
    """A run with two checkpoints."""
    run = "damaged"
    assert place.train(run, "train.steps=2").returncode == 0
    assert place.train(run, "train.steps=4").returncode == 0
    assert place.checkpoints(run) == ["step-00000002", "step-00000004"]
    return place.directory / run


@pytest.fixture
def run(trained: Path) -> Iterator[Path]:
    """A copy of it, in the same directory."""
    copy = trained.parent / "copy"
    shutil.copytree(trained, copy)
    yield copy
    shutil.rmtree(copy)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def test_54_any_flipped_bit_is_found_or_harmless(run: Path) -> None:
    """In every file of a checkpoint, the JSON included: an error, or tensors that are equal."""
    config = load(run / "config.yaml")
    newest = run / "checkpoints/step-00000004"
    model = build_model(config.model)
    state = checkpoint.load_model(model, newest)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    files = [newest / name for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)]
    draw, found = random.Random(0), 0
    for number in range(FLIPS):
        file = files[number % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        place = draw.randrange(len(bad))
        bad[place] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        try:
            assert checkpoint.load_model(model, newest) == state, (file, place)
            for name, value in model.state_dict().items():
                assert torch.equal(value, tensors[name]), (file, place, name)
        except InputError as error:
            assert file.name in str(error) or newest.name in str(error)
            found += 1
        file.write_bytes(good)
    assert found > 0.99 * FLIPS


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
@pytest.mark.parametrize("kind", ["cut", "missing"])
def test_54_a_cut_or_missing_file_falls_back_loudly(place: Place, run: Path, name: str, kind: str) -> None:
    file = run / "checkpoints/step-00000004" / name
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7])
    done = place.train(run.name, "train.steps=5")
    assert done.returncode == 0, done.stderr
    assert f"{name}" in done.stderr and "continuing from copy/checkpoints/step-00000002" in done.stderr
    assert [row["step"] for row in place.rows(run.name)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("text", ["", "step-00000002\n", "step-00000009\n", "../../packed\n", "\xff"])
def test_55_a_stale_or_empty_latest(place: Place, run: Path, text: str) -> None:
    (run / "checkpoints/latest").write_bytes(text.encode("latin-1"))
    found = checkpoint.newest(run / "checkpoints")
    assert found == run / "checkpoints" / ("step-00000002" if "2" in text else "step-00000004")


def test_56_only_broken_ones_are_left(place: Place, run: Path) -> None:
    """The run does not begin again at 0 as if it were new."""
    for file in run.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    before = (run / "metrics.jsonl").read_bytes()
    done = place.train(run.name, "train.steps=5")
    assert done.returncode == MISTAKE
    assert "holds no complete checkpoint" in done.stderr and "another run.dir" in done.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted = tmp_path / "disk"
    mounted.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mounted)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_51_a_full_disk(place: Place, small_disk: Path) -> None:
    """While a checkpoint is saved: the old one stays, what was written of the new one goes, in plain words."""
    run = small_disk / "run"
    assert place.train(str(run), "train.steps=2").returncode == 0
    left = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(bytes(max(0, left - 40_000)))
    done = place.train(str(run), "train.steps=4")
    assert done.returncode == MISTAKE
    assert "No space left on device" in done.stderr and "earlier checkpoints are untouched" in done.stderr
    assert place.checkpoints(str(run)) == ["step-00000002"]
    assert not list((run / "checkpoints").glob(".*partial"))
    (small_disk / "filler").unlink()
    assert place.train(str(run), "train.steps=4").returncode == 0
    assert [row["step"] for row in place.rows(str(run))] == [1, 2, 3, 4]


def test_52_a_directory_that_cannot_be_written(place: Place, small_disk: Path) -> None:
    """Before training."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = place.train(str(small_disk / "run"), "train.steps=2")
    assert done.returncode == MISTAKE and "Read-only file system" in done.stderr
    assert "step 1/" not in done.stderr
