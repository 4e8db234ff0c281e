"""How far back an answer is: the distances of recall and needle, and their scores by distance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deepspeed_world import run_world
from programs import longreach

from longreach.framework.config import load, save
from longreach.framework.model import IGNORED
from longreach.framework.tasks import open_task
from longreach.framework.trainer import train
from longreach.launch.cli import main

SIZES = ["model.width=16", "model.depth=1", "model.chela.heads=2", "data.batch_size=4", "train.micro_batch_size=4"]


@pytest.mark.parametrize("name", ["recall", "needle"])
def test_a_value_is_where_its_distance_says(name: str) -> None:
    """And follows the token that asks for it."""
    config = load(name)
    task = open_task(config.task, config.data)
    rows = [task.sequences("test", None).sequence(number)[:2] for number in range(20)]
    tokens, labels = (torch.stack(part) for part in zip(*rows))
    distances = task.distances(tokens, labels)
    known = labels != IGNORED
    assert task.has_distances and not distances[~known].any() and len(distances[known].unique()) > 5
    for row, place in known.nonzero().tolist():
        value = place - int(distances[row, place])
        assert 0 < value < place
        assert tokens[row, value] == labels[row, place] and tokens[row, value - 1] == tokens[row, place]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has hardly been trained to recall."""
    directory = tmp_path_factory.mktemp("recall")
    words = ["task.test_examples=6", "train.steps=2", "train.validate_every=0", "monitor.tensorboard=false"]
    done = longreach("train", "recall", *SIZES, *words, "run.dir=run", cwd=directory)
    assert done.returncode == 0, done.stderr
    return str(directory / "run")


def test_recall_is_scored_by_distance(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bins together are the whole score; streamed in blocks they are the same; a table, JSON and a figure."""
    trees = []
    for number, words in enumerate(([], ["parallel.block_len=48"])):
        file, figure = tmp_path / f"{number}.json", tmp_path / f"{number}.png"
        assert main(["evaluate", run, *words, "--json", str(file), "--figure", str(figure)]) == 0
        assert figure.read_bytes().startswith(b"\x89PNG")
        trees.append(json.loads(file.read_text()))
    whole, streamed = trees
    bins = whole["by_distance"]
    assert len(bins) >= 3 and all(one["first"] & (one["first"] - 1) == 0 for one in bins)
    assert [one["first"] for one in bins] == sorted({one["first"] for one in bins})
    assert sum(one["num_labels"] for one in bins) == whole["num_labels"] == 6 * 8
    assert sum(one["num_labels"] * one["loss"] for one in bins) / 48 == pytest.approx(whole["loss"])
    right = sum(one["num_labels"] * one["metrics"]["accuracy"] for one in bins)
    assert right / 48 == pytest.approx(whole["metrics"]["accuracy"])
    for one, other in zip(bins, streamed["by_distance"], strict=True):
        assert (one["first"], one["num_labels"]) == (other["first"], other["num_labels"])
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    out = capsys.readouterr().out.splitlines()
    header = next(number for number, line in enumerate(out) if line.startswith("from distance"))
    assert out[header].split() == ["from", "distance", "answers", "loss", "accuracy"]
    shown = [int(line.split()[0].replace(",", "")) for line in out[header + 1 : header + 1 + len(bins)]]
    assert shown == [one["first"] for one in bins]


def test_the_distances_of_examples_are_those_of_the_bins(run: str, tmp_path: Path) -> None:
    config = load(Path(run) / "config.yaml")
    sequences = open_task(config.task, config.data).sequences("test", None)
    expected: dict[int, int] = {}
    for number in range(len(sequences)):
        tokens, labels, _ = sequences.sequence(number)
        for place in (labels != IGNORED).nonzero().flatten().tolist():
            distance = place - 1 - tokens.tolist().index(int(tokens[place]))
            first = 2 ** (distance.bit_length() - 1)
            expected[first] = expected.get(first, 0) + 1
    assert main(["evaluate", run, "--json", str(tmp_path / "a.json")]) == 0
    bins = json.loads((tmp_path / "a.json").read_text())["by_distance"]
    assert {one["first"]: one["num_labels"] for one in bins} == expected


def bins_of(rank: int, words: list[str]) -> list[tuple[int, int, float, float]]:
    """First distance, labels, loss and accuracy of each bin of the test, after a training."""
    score = train(load("recall", words)).test
    assert score is not None
    return [(one.first, one.num_labels, one.loss, one.metrics["accuracy"]) for one in score.by_distance]


def test_two_ranks_find_the_bins_of_one(tmp_path: Path) -> None:
    words = [*SIZES, "task.test_examples=6", "train.steps=1", "train.validate_every=0", "monitor.tensorboard=false"]
    found = [
        run_world(bins_of, ranks, [*words, f"parallel.ranks={ranks}", f"run.dir={tmp_path / str(ranks)}"], timeout=200)
        for ranks in (1, 2)
    ]
    (alone,), (first, second) = found
    assert first == second and len(alone) >= 3
    for one, other in zip(alone, first, strict=True):
        assert one[:2] == other[:2] and other[2:] == pytest.approx(one[2:], rel=1e-4)


def test_other_tasks_have_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(load("adding", [f"run.dir={tmp_path}"]), tmp_path / "config.yaml")
    assert main(["evaluate", str(tmp_path), "--figure", str(tmp_path / "a.png")]) == 2
    assert "RUN_DIR" in (err := capsys.readouterr().err) and "recall and needle" in err
