"""Faults of checkpoints, numbered as in the list of faults: what is found again, and what is said."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import run_world
from fault_helpers import MISTAKE, JobDirectory, error_line, files_below, mounted
from programs import finish, longreach

from longreach.errors import InputError
from longreach.framework import checkpoint, trainer
from longreach.framework.checkpoint.directory import digest_of
from longreach.framework.config import load
from longreach.framework.data import Index, sequences_of
from longreach.framework.model import build_model
from longreach.framework.trainer import train
from longreach.launch.cli import main

FLIPS = 1000
MODEL, OPTIMIZER = (checkpoint.file_name(kind, 0, 1) for kind in (checkpoint.MODEL, checkpoint.OPTIMIZER))
FILES = (MODEL, OPTIMIZER, checkpoint.STATE)


def configured(job_dir: JobDirectory, run: Path | str, *words: str) -> list[str]:
    return [f"data.source={job_dir.directory / 'packed'}", f"run.dir={run}", *words]


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
def test_53_a_rank_that_is_killed_anywhere_in_a_save(job_dir: JobDirectory, tmp_path: Path, victim: int) -> None:
    """At every file that a save touches: a checkpoint loads, the run goes on as if nothing was, and no leavings."""
    config = str(job_dir.directory / "endless.yaml")
    words = ["parallel.ranks=2", "checkpoint.every=2", "checkpoint.keep_last=1"]
    whole = tmp_path / "whole"
    run_world(train_quietly, 2, config, configured(job_dir, whole, *words, "train.steps=6"))
    start = tmp_path / "start"
    run_world(train_quietly, 2, config, configured(job_dir, start, *words, "train.steps=2"))

    def go_on(run: Path, point: int) -> int:
        shutil.copytree(start, run)
        found = run_world(
            train_and_kill, 2, config, configured(job_dir, run, *words, "train.steps=4"), str(tmp_path), point, victim
        )
        return int(found[0])

    points = go_on(tmp_path / "counted", 0)
    assert points >= 20
    expected = [(row["step"], row["loss"], row["grad_norm"]) for row in job_dir.rows(str(whole))]
    lost = 0
    for point in range(1, points + 1):
        run = tmp_path / f"killed-{point}"
        with contextlib.suppress(RuntimeError):  # a rank died, or the other one lost it
            go_on(run, point)
        saved = checkpoint.newest(run / "checkpoints")
        assert saved is not None and saved.name.removesuffix(".replaced") in ("step-00000002", "step-00000004"), point
        lost += saved.name == "step-00000002"
        run_world(train_quietly, 2, config, configured(job_dir, run, *words, "train.steps=6"))
        rows = [(row["step"], row["loss"], row["grad_norm"]) for row in job_dir.rows(str(run))]
        assert rows == expected, point
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000006"], point
        shutil.rmtree(run)
    assert 0 < lost < points if victim == 0 else lost < points


@pytest.fixture(scope="module")
def trained(job_dir: JobDirectory) -> Path:
    """A run with two checkpoints."""
    run = "damaged"
    assert job_dir.train(run, "train.steps=2").returncode == 0
    assert job_dir.train(run, "train.steps=4").returncode == 0
    assert job_dir.checkpoints(run) == ["step-00000002", "step-00000004"]
    return job_dir.directory / run


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
    files = [newest / name for name in FILES]
    draw, found = random.Random(0), 0
    for number in range(FLIPS):
        file = files[number % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        place = draw.randrange(len(bad))
        bad[place] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        try:
            checkpoint.verify(newest)
            assert checkpoint.load_model(model, newest) == state, (file, place)
            for name, value in model.state_dict().items():
                assert torch.equal(value, tensors[name]), (file, place, name)
        except InputError as error:
            assert file.name in str(error) or newest.name in str(error)
            found += 1
        file.write_bytes(good)
    assert found > 0.99 * FLIPS


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["flipped", "cut", "missing"])
def test_54_a_damaged_or_missing_file_falls_back_loudly(job_dir: JobDirectory, run: Path, name: str, kind: str) -> None:
    file = run / "checkpoints/step-00000004" / name
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    done = job_dir.train(run.name, "train.steps=5")
    assert done.returncode == 0, done.stderr
    assert f"{name}" in done.stderr and "resuming from copy/checkpoints/step-00000002" in done.stderr
    assert [row["step"] for row in job_dir.rows(run.name)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("text", ["", "step-00000002\n", "step-00000009\n", "../../packed\n", "\xff"])
def test_55_a_stale_or_empty_latest(job_dir: JobDirectory, run: Path, text: str) -> None:
    (run / "checkpoints/latest").write_bytes(text.encode("latin-1"))
    found = checkpoint.newest(run / "checkpoints")
    assert found == run / "checkpoints" / ("step-00000002" if "2" in text else "step-00000004")


def test_56_only_broken_ones_are_left(job_dir: JobDirectory, run: Path) -> None:
    """The run does not begin again at 0 as if it were new."""
    for file in run.glob(f"checkpoints/*/{MODEL}"):
        file.write_bytes(b"")
    before = (run / "metrics.jsonl").read_bytes()
    done = job_dir.train(run.name, "train.steps=5")
    assert done.returncode == MISTAKE
    assert "holds no complete checkpoint" in done.stderr and "another run.dir" in done.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def free_bytes(place: Path) -> int:
    return os.statvfs(place).f_bavail * os.statvfs(place).f_frsize


def test_51_a_full_disk_is_seen_before_anything_is_written(job_dir: JobDirectory, small_disk: Path) -> None:
    """Before training, where a checkpoint has no room; the old ones stay."""
    run = small_disk / "run"
    assert job_dir.train(str(run), "train.steps=2").returncode == 0
    (small_disk / "filler").write_bytes(bytes(free_bytes(small_disk) - 40_000))
    done = job_dir.train(str(run), "train.steps=4")
    assert done.returncode == MISTAKE
    assert "bytes free, and a checkpoint needs" in done.stderr and "step 3/4" not in done.stderr
    assert job_dir.checkpoints(str(run)) == ["step-00000002"]
    (small_disk / "filler").unlink()
    assert job_dir.train(str(run), "train.steps=4").returncode == 0
    assert [row["step"] for row in job_dir.rows(str(run))] == [1, 2, 3, 4]


def test_51_a_disk_that_fills_while_a_checkpoint_is_saved(job_dir: JobDirectory, tmp_path: Path) -> None:
    """There is space, but no room for a file: the old checkpoint stays, what was written goes, in plain words."""
    with mounted(tmp_path / "disk", "size=4m,nr_inodes=40") as disk:
        run = disk / "run"
        assert job_dir.train(str(run), "train.steps=2").returncode == 0
        fillers = []
        with contextlib.suppress(OSError):
            while True:
                fillers.append(disk / f"filler-{len(fillers)}")
                fillers[-1].write_bytes(b"")
        fillers[0].unlink()  # room for the new directory, and for no file in it
        done = job_dir.train(str(run), "train.steps=4")
        assert done.returncode == MISTAKE
        assert "No space left on device" in done.stderr and "earlier checkpoints are untouched" in done.stderr
        assert job_dir.checkpoints(str(run)) == ["step-00000002"]
        assert not list((run / "checkpoints").glob(".*partial"))
        for filler in fillers[1:]:
            filler.unlink(missing_ok=True)
        assert job_dir.train(str(run), "train.steps=4").returncode == 0
        assert [row["step"] for row in job_dir.rows(str(run))] == [1, 2, 3, 4]


def test_52_a_directory_that_cannot_be_written(job_dir: JobDirectory, small_disk: Path) -> None:
    """Before training."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = job_dir.train(str(small_disk / "run"), "train.steps=2")
    assert done.returncode == MISTAKE and "Read-only file system" in done.stderr
    assert "step 1/" not in done.stderr


def same_losses(job_dir: JobDirectory, run: Path | str, other: Path | str, tolerance: float = 1e-5) -> None:
    left, right = (job_dir.rows(str(name)) for name in (run, other))
    assert [row["step"] for row in left] == [row["step"] for row in right]
    assert [row["loss"] for row in left] == pytest.approx([row["loss"] for row in right], rel=tolerance)


def test_57_on_other_ranks_another_split_and_stage(job_dir: JobDirectory) -> None:
    """Each leg in another layout; the losses are those of a run in one."""
    legs = [
        ("parallel.ranks=2", "deepspeed=zero1"),
        ("parallel.ranks=1", "deepspeed=zero3"),
        ("parallel.ranks=2", "parallel.sequence=1", "deepspeed=zero2"),
        ("parallel.ranks=2", "deepspeed=zero3"),
        ("parallel.ranks=1", "deepspeed=zero0"),
    ]
    for number, leg in enumerate(legs, 1):
        done = job_dir.train("moved", *leg, f"train.steps={2 * number}")
        assert done.returncode == 0, done.stderr
    assert job_dir.train("still", f"train.steps={2 * len(legs)}").returncode == 0
    same_losses(job_dir, "moved", "still")


def test_59_another_shape_lists_the_tensors(job_dir: JobDirectory, run: Path) -> None:
    done = job_dir.train(run.name, "train.steps=5", "model.width=32")
    assert done.returncode == MISTAKE and "Traceback" not in done.stderr
    assert re.search(r"does not fit the model: \S+ is \[[0-9, ]+\], not \[[0-9, ]+\], .*check model\.", done.stderr)
    assert job_dir.checkpoints(run.name) == ["step-00000002", "step-00000004"]


def forge(path: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint as one would who can write all of it."""
    (path / name).write_bytes(content)
    document = json.loads((path / checkpoint.STATE).read_text())
    document["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / checkpoint.STATE).write_text(json.dumps({**document, "sha256": digest_of(document)}))


class Executed:
    """Makes a file where a pickle of it is opened."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_60_a_pickle_in_a_checkpoint_does_not_execute(job_dir: JobDirectory, run: Path, name: str, write: Any) -> None:
    """Although size and digest are right, in every checkpoint that there is."""
    content = io.BytesIO()
    write(Executed(), content)
    for number in job_dir.checkpoints(run.name):
        forge(run / "checkpoints" / number, name, content.getvalue())
    done = job_dir.train(run.name, "train.steps=5")
    assert done.returncode == MISTAKE and "Traceback" not in done.stderr
    assert f"{name}': is damaged" in done.stderr
    if name == MODEL:
        done = longreach("generate", run.name, "--prompt", "span", "--tokens", "1", cwd=job_dir.directory)
        assert done.returncode == MISTAKE and "is damaged" in done.stderr and "Traceback" not in done.stderr
    assert not list(job_dir.directory.rglob("executed"))


HOSTILE = Path(__file__).parents[1] / "data/hostile/checkpoints"


def test_60_hostile_checkpoints(
    job_dir: JobDirectory, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed ones, each digest of which is right: one line, nothing executed, nothing written."""
    monkeypatch.chdir(job_dir.directory)
    (job_dir.directory / "secret").write_text("secret")
    names = sorted(path.name for path in HOSTILE.iterdir())
    assert len(names) > 25
    for name in names:
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(HOSTILE / name, run / "checkpoints/step-00000001")
        before = files_below(job_dir.directory)
        code = main(["generate", run.name, "--prompt", "span", "--tokens", "1"])
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert code == MISTAKE and said.out == "", (name, said)
        assert len(lines) == 1 and lines[0].startswith("longreach: ") and lines[0].isprintable(), (name, lines)
        words = {"another-model": "does not fit the model", "newer": "install a newer longreach"}
        assert words.get(name, "damaged") in lines[0], (name, lines)
        assert files_below(job_dir.directory) == before, name


@pytest.mark.parametrize("name", ["header-huge", "starts-negative", "traversal-name"])
def test_60_a_hostile_checkpoint_is_not_resumed(job_dir: JobDirectory, run: Path, name: str) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(HOSTILE / name, run / "checkpoints/step-00000001")
    done = job_dir.train(run.name, "train.steps=5")
    assert done.returncode == MISTAKE and "Traceback" not in done.stderr
    assert "damaged" in error_line(done, "checkpoint")


def test_61_a_newer_format(job_dir: JobDirectory, run: Path) -> None:
    """It is not taken for a damaged one: nothing older is trained on instead."""
    state = run / "checkpoints/step-00000004" / checkpoint.STATE
    document = {**json.loads(state.read_text()), "format": 99}
    state.write_text(json.dumps({**document, "sha256": digest_of(document)}))
    done = job_dir.train(run.name, "train.steps=5")
    assert done.returncode == MISTAKE
    assert "is of format 99; this version reads 2; install a newer longreach" in done.stderr


def test_63_a_save_that_fails_beside_the_training_surfaces_at_the_next_step(
    job_dir: JobDirectory, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=4m,nr_inodes=40") as disk:
        run = disk / "run"
        with job_dir.training(str(run), "checkpoint.every=5") as process:
            job_dir.wait(process, lambda: bool(job_dir.checkpoints(str(run))))
            (disk / "fillers").mkdir()
            for number in itertools.count():
                with contextlib.suppress(OSError):  # until nothing can be made, whatever a save frees meanwhile
                    (disk / "fillers" / str(number)).write_bytes(b"")
                if process.poll() is not None:
                    break
                time.sleep(0.001)
            done = finish(process, 30)
        assert done.returncode == MISTAKE
        assert "No space left on device" in done.stderr and "earlier checkpoints are untouched" in done.stderr
        last, saved = job_dir.rows(str(run))[-1]["step"], job_dir.checkpoints(str(run))
        assert saved and int(saved[-1].removeprefix("step-")) < last
        assert f"checkpoints/step-{last - last % 5:08d}" in done.stderr  # the one that was begun last, not a later one
        shutil.rmtree(disk / "fillers")
        assert job_dir.train(str(run), f"train.steps={last + 1}").returncode == 0
        assert [row["step"] for row in job_dir.rows(str(run))] == list(range(1, last + 2))


def test_64_at_an_epochs_end(job_dir: JobDirectory) -> None:
    """A run that stops where an epoch ends, and one sequence before and after, goes on as if it had not stopped."""
    words = ["data.seq_len=1000", "data.batch_size=1"]
    config = load(job_dir.directory / "endless.yaml", [f"data.source={job_dir.directory / 'packed'}", *words])
    epoch = len(sequences_of(Index.load(job_dir.directory / "packed"), config.data, "train"))
    for stop in (epoch - 1, epoch, epoch + 1, 2 * epoch + 2):
        done = job_dir.train("epochs", *words, f"train.steps={stop}")
        assert done.returncode == 0, done.stderr
    assert job_dir.train("epochs-whole", *words, f"train.steps={2 * epoch + 2}").returncode == 0
    same_losses(job_dir, "epochs", "epochs-whole", 0.0)


def train_and_tell(rank: int, config: str, words: list[str], file: str, last: int) -> None:
    """Train, write down which windows each step was given, and be killed with the last of so many steps behind."""
    step_of, done = trainer.train_step, 0

    def train_step(config: Any, engine: Any, mesh: Any, batch: Any, consumed: int, *rest: Any) -> Any:
        nonlocal done
        row = step_of(config, engine, mesh, batch, consumed, *rest)
        if mesh.sequence.rank == 0:
            windows = [int(window) for micro in batch for window in micro.indices]
            with open(f"{file}-{rank}", "a") as out:
                out.write(json.dumps({"consumed": consumed, "part": mesh.data.rank, "windows": windows}) + "\n")
        done += 1
        if done == last and rank == mesh.world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    trainer.train_step = train_step
    train(load(config, words))


def test_57_every_sample_is_trained_on_as_planned(job_dir: JobDirectory, tmp_path: Path) -> None:
    """Over kills, resumes and other numbers of ranks: in two epochs every window twice, each once before any again."""
    config, run, told = str(job_dir.directory / "endless.yaml"), tmp_path / "run", str(tmp_path / "told")
    words = configured(job_dir, run, "data.seq_len=250", "data.batch_size=4", "checkpoint.every=3")
    dataset = sequences_of(Index.load(job_dir.directory / "packed"), load(config, words).data, "train", seed=0)
    steps = -(-2 * len(dataset) // 4)
    assert steps > 12
    for kill, ranks, sequence in ((4, 2, 2), (5, 2, 1), (2, 1, 1), (6, 2, 2), (0, 2, 1)):
        layout = [f"parallel.ranks={ranks}", f"parallel.sequence={sequence}", f"train.steps={steps}"]
        with contextlib.suppress(RuntimeError) if kill else contextlib.nullcontext():
            run_world(train_and_tell, ranks, config, [*words, *layout], told, kill)
    trained: dict[int, dict[tuple[int, int], list[int]]] = {}
    for file in sorted(tmp_path.glob("told-*")):
        for row in map(json.loads, file.read_text().splitlines()):
            trained.setdefault(row["consumed"], {})[row["part"], len(row["windows"])] = row["windows"]
    assert sorted(trained) == list(range(0, 4 * steps, 4))
    for consumed, parts in trained.items():
        planned = [dataset.window(consumed + number) for number in range(4)]
        for (part, count), windows in parts.items():  # also what was trained on again, on other ranks
            assert windows == planned[part * count :][:count], consumed
    seen = Counter(dataset.window(position) for position in range(2 * len(dataset)))
    assert seen == Counter(dict.fromkeys(range(len(dataset)), 2))
