"""`longreach predict`: from own data to a table, by a run or its export, whose training data are gone."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed_world import run_world
from PIL import Image

from longreach import load_exported
from longreach.framework.inference.export import CONFIG
from longreach.framework.inference.loading import open_predictor
from longreach.launch import cli

SMALL = ["model.width=16", "model.depth=1", "model.mixers=[elementwise]", "optim.warmup_steps=1", "monitor.plot=false"]
SMALL += ["monitor.tensorboard=false", "train.validate_every=0", "optim.lr=1e-2"]
# What README promises: from two folders of pictures, and from a table, to predictions.
TRAININGS = {
    "photos": "digits data.source=photos task.size=8 train.steps=20",
    "prices": "forecast data.source=prices.csv data.seq_len=24 task.horizon=4 train.steps=2",
    "pairs": "retrieval data.source=texts data.name=texts data.seq_len=32 data.valid_fraction=0.3 data.vocab=280 "
    "task.examples=8 task.test_examples=4 train.steps=1",
    "vowels": "japanese-vowels train.steps=1",
    "adding": "adding data.seq_len=16 task.examples=8 task.test_examples=4 train.steps=1",
}


def train(rank: int, place: str) -> list[int]:
    """Train all of `TRAININGS`; returns the exit codes."""
    os.chdir(place)
    words = {name: [*line.split(), f"run.dir=runs/{name}", *SMALL] for name, line in TRAININGS.items()}
    return [cli.main(["train", *found]) for found in words.values()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs and their exports, and new data; the training data are removed."""
    place, random = tmp_path_factory.mktemp("predict"), np.random.default_rng(0)
    for folder, level in (("dark", 60), ("light", 190)):
        (place / "photos" / folder).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(level - 50, level + 50, (12, 10)).astype(np.uint8)
            Image.fromarray(pixels).save(place / "photos" / folder / f"{number:02}.png")
    days = np.datetime64("2025-01-01") + np.arange(200)
    waves = [f"{day},{100 + 5 * np.sin(n / 5):.4f},{3 + np.cos(n / 7):.4f}\n" for n, day in enumerate(days)]
    (place / "prices.csv").write_text("date,open,volume\n" + "".join(waves))
    (place / "texts").mkdir()
    for letter in "abcdefghijklmnop":
        (place / "texts" / f"{letter}.txt").write_text(f"a {letter} and {letter}{letter} " * 30)
    assert run_world(train, 1, str(place), timeout=200) == [[0] * len(TRAININGS)]
    shutil.move(place / "photos", place / "new")
    shutil.move(place / "prices.csv", place / "new.csv")
    shutil.rmtree(place / "texts")
    shutil.rmtree(place / "data")
    for name in TRAININGS:
        assert cli.main(["export", str(place / "runs" / name), str(place / "exports" / name)]) == 0
    return place


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_pictures_of_own_folders(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classes that the folders name; a run, its export and Python say the same."""
    out = tmp_path / "photos.csv"
    for model in ("runs/photos", "exports/photos"):
        words = ["predict", str(place / model), "--source", str(place / "new"), "--out", str(out), "--device", "cpu"]
        assert cli.main(words) == 0
        rows = table(out)
        assert [*rows[0]] == ["input", "class", "probability_dark", "probability_light"] and len(rows) == 40
        for row in rows:
            assert f"/new/{row['class']}/" in row["input"]
            assert float(row["probability_dark"]) + float(row["probability_light"]) == pytest.approx(1, abs=1e-5)
        assert capsys.readouterr().out == f"40 inputs: {out}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.csv"]
    found = load_exported(place / "exports" / "photos").predict([row["input"] for row in rows])
    assert [{key: str(value) for key, value in row.items()} for row in found] == rows


def test_bad_inputs_are_named_and_skipped(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "new" / "dark", tmp_path / "mixed")
    (tmp_path / "mixed" / "notes.txt").write_text("no picture")
    (tmp_path / "mixed" / "cut.png").write_bytes((tmp_path / "mixed" / "00.png").read_bytes()[:60])
    words = ["predict", str(place / "runs/photos"), "--source", str(tmp_path / "mixed"), "--top", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "a.jsonl")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[2].rpartition("/")[2] for line in said[:2]] == ["cut.png:", "notes.txt:"]
    assert said[2:] == ["longreach: 2 of 22 inputs were skipped"]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and [*rows[0]] == ["input", "class", "probability"]
    words[2:] = ["--source", str(tmp_path / "mixed" / "notes.txt"), "--out", str(tmp_path / "none.csv")]
    assert cli.main(words) == 2
    assert "no input that can be read" in capsys.readouterr().err
    assert not (tmp_path / "none.csv").exists() and not [*tmp_path.glob(".*")]


def test_forecasts_of_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the units of the columns, with the dates that follow; printed."""
    said = []
    for model in ("runs/prices", "exports/prices"):
        assert cli.main(["predict", str(place / model), "--source", str(place / "new.csv")]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    rows = list(csv.DictReader(said[0].splitlines()))
    assert [*rows[0]] == ["input", "step", "date", "open", "volume"]
    assert [row["date"] for row in rows] == ["2025-07-20", "2025-07-21", "2025-07-22", "2025-07-23"]
    assert all(80 < float(row["open"]) < 120 and -10 < float(row["volume"]) < 15 for row in rows)
    found = load_exported(place / "exports" / "prices").predict([place / "new.csv"])
    assert [{key: str(value) for key, value in row.items()} for row in found] == rows


def test_pairs_series_and_numbers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer of the corpus and the standardization of a data set stay with the run and the export."""
    from aeon import datasets

    (tmp_path / "pairs.jsonl").write_text('["a b and bb", "a c and cc"]\n["a b and bb", "a b and"]\n')
    (tmp_path / "sum.csv").write_text("number,marked\n0.25,1\n0.5,0\n0.75,1\n")
    vowels = Path(datasets.__file__).parent / "data" / "JapaneseVowels" / "JapaneseVowels_TEST.ts"
    columns = {
        "pairs": (tmp_path / "pairs.jsonl", ["class", "probability_different", "probability_same"], 2),
        "vowels": (vowels, ["class", *(f"probability_{number}" for number in range(1, 10))], 370),
        "adding": (tmp_path / "sum.csv", ["value"], 1),
    }
    for name, (source, names, count) in columns.items():
        said = []
        for model in (f"runs/{name}", f"exports/{name}"):
            assert cli.main(["predict", str(place / model), "--source", str(source)]) == 0, name
            said.append(capsys.readouterr().out)
        rows = list(csv.DictReader(said[0].splitlines()))
        assert said[0] == said[1] and [*rows[0]] == ["input", *names] and len(rows) == count
    assert (place / "exports/pairs/tokenizer.json").is_file()


def test_transformers_loads_the_exports_of_tasks(place: Path) -> None:
    """Classes by their names, hidden states of a forecast; the same answers as `predict`."""
    transformers = pytest.importorskip("transformers")
    import longreach.framework.inference.huggingface  # noqa: F401

    classify = transformers.AutoModelForSequenceClassification.from_pretrained(place / "exports/photos")
    assert classify.config.id2label == {0: "dark", 1: "light"} and classify.config.num_labels == 2
    predictor = open_predictor(place / "exports/photos")
    photo = place / "new/light/03.png"
    (pixels,) = predictor.input_of(photo, "x").documents
    with torch.no_grad():
        chances = classify(input_values=torch.from_numpy(pixels)[None]).logits[0].softmax(-1)
    ((answer,),) = predictor.predict([photo])
    assert answer["probability_light"] == pytest.approx(float(chances[1]), rel=1e-4)
    base = transformers.AutoModel.from_pretrained(place / "exports/prices")
    output = base(input_values=torch.zeros(1, 5, 2), output_hidden_states=True)
    assert output.last_hidden_state.shape == (1, 5, 16) and len(output.hidden_states) == 2
    exported = load_exported(place / "exports/prices")
    expected = exported(torch.zeros(1, 5, 2))
    torch.testing.assert_close(exported.head.answer(output.last_hidden_state), expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["runs/photos", "--source", "new", "nowhere"], "--source = 'nowhere': there is no such file"),
        (["runs/photos", "--source", "empty"], "--source = 'empty': has no input that can be read"),
        (["runs/photos", "--source", "new", "--out", "a.xlsx"], "--out = .*.csv or .jsonl"),
        (["runs/photos", "--source", "new", "--block-len", "8"], "not causal"),
        (["runs/photos", "--source", "new", "--batch-size", "0"], "--batch-size = 0"),
        (["runs/photos", "--source", "new", "--device", "tpu"], "--device = 'tpu': one of cpu"),
        (["runs/nothing", "--source", "new"], "is neither a run nor an export"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], expected: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    Path("empty").mkdir(exist_ok=True)
    assert cli.main(["predict", *words]) == 2
    said = capsys.readouterr()
    assert not said.out and re.fullmatch(rf"longreach: .*{expected}.*\n", said.err)


def test_an_earlier_run_is_described_by_its_data(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One without a description needs them; an export of it has the description."""
    run = shutil.copytree(place / "runs" / "prices", tmp_path / "run")
    (run / "task.json").unlink()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("source: prices.csv", f"source: {tmp_path}/prices.csv"))
    assert cli.main(["predict", str(run), "--source", str(place / "new.csv")]) == 2
    assert "data.source" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(tmp_path / "nameless")]) == 0, "the model is exported, not predicted with"
    assert cli.main(["predict", str(tmp_path / "nameless"), "--source", str(place / "new.csv")]) == 2
    assert "export the run again" in capsys.readouterr().err
    shutil.copy(place / "new.csv", tmp_path / "prices.csv")
    assert cli.main(["export", str(run), str(tmp_path / "export")]) == 0
    described: list[dict[str, Any]] = [
        json.loads((folder / CONFIG).read_text())["task"] for folder in (tmp_path / "export", place / "exports/prices")
    ]
    assert described[0] == described[1]
