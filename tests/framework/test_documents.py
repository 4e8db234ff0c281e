"""Classes of whole documents: how they are found in each form of data, how documents are split, and what is told."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed_world import run_world
from helpers import messages

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.data import DataConfig, pack
from longreach.framework.inference.export import export
from longreach.framework.inference.loading import open_predictor
from longreach.framework.model.heads import IGNORED
from longreach.framework.tasks.documents import Documents
from longreach.framework.tasks.task import TaskConfig
from longreach.framework.trainer import train

Corpus = list[tuple[str, str]]  # text and class of each document


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Sequences of nucleotides of 8 to 60 letters: 20 with few of A and T, 10 with many."""
    draw = random.Random(0)
    kinds = ["cold"] * 20 + ["warm"] * 10
    letters = {"cold": "CCCGGGA", "warm": "AAATTTC"}
    return [("".join(draw.choices(letters[kind], k=draw.randint(8, 60))), kind) for kind in kinds]


def folder_of(corpus: Corpus, place: Path) -> Path:
    for number, (text, kind) in enumerate(corpus):
        (place / kind).mkdir(parents=True, exist_ok=True)
        (place / kind / f"{number:02}.txt").write_text(text)
    return place


def written(form: str, corpus: Corpus, place: Path) -> tuple[Path, dict[str, Any]]:
    """The corpus in one of the forms that are read, and the options that say where the labels are."""
    rows = [{"text": text, "label": kind} for text, kind in corpus]
    options: dict[str, Any] = {}
    if form == "folder":
        return folder_of(corpus, place / "data"), options
    if form == "tar":
        with tarfile.open(place / "data.tar", "w") as tar:
            for number, row in enumerate(rows):
                member = tarfile.TarInfo(f"{row['label']}/{number:02}.txt")
                member.size = len(row["text"])
                tar.addfile(member, io.BytesIO(row["text"].encode()))
        return place / "data.tar", options
    if form == "packed":
        pack(str(folder_of(corpus, place / "data")), place / "packed", name="x", valid_fraction=0.0)
        return place / "packed", options
    if form == "jsonl":
        nested = [{"body": row["text"], "meta": {"kind": row["label"]}} for row in rows]
        (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nested))
        return place / "data.jsonl", {"field": "body", "label": "meta.kind"}
    if form == "csv":
        (place / "data.csv").write_text("label,text\n" + "".join(f"{row['label']},{row['text']}\n" for row in rows))
        return place / "data.csv", options
    if form == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), place / "data.parquet")
        return place / "data.parquet", options
    heads = ["{label}", "of=E.coli label={label}"]
    lines = [f">s{n} {heads[n % 2].format(**row)}\n{row['text'].lower()}\n" for n, row in enumerate(rows)]
    (place / "data.fa").write_text("".join(lines))
    return place / "data.fa", options


def opened(source: Path, cache: Path, label: str = "", seq_len: int = 40, **options: Any) -> Documents:
    data = DataConfig(source=str(source), cache=str(cache), seq_len=seq_len, batch_size=1, **options)
    Documents.prepare(data)
    return Documents(TaskConfig(name="documents", label=label), data)


def examples(task: Documents, split: str) -> list[tuple[str, str]]:
    """The text and the class of each example, as the model gets them."""
    sequences, found = task.sequences(split, None), []
    for number in range(len(sequences)):
        tokens, labels, segments = sequences.sequence(number)
        assert labels[:-1].eq(IGNORED).all() and len(tokens) == task.data.seq_len
        length = len(tokens) if segments is None else int((segments == 0).sum())
        assert not tokens[length:].any()
        found.append((bytes(tokens[:length].tolist()).decode(), task.classes[int(labels[-1])]))
    return found


@pytest.mark.parametrize("form", ["folder", "tar", "packed", "jsonl", "csv", "parquet", "fasta"])
def test_every_form_gives_the_same_examples(form: str, corpus: Corpus, tmp_path: Path) -> None:
    """Cut to 40 tokens; every fifth document of a class is for the test, and no document is in two splits."""
    source, options = written(form, corpus, tmp_path)
    task = opened(source, tmp_path / "cache", valid_fraction=0.2, **options)
    assert task.classes == ["cold", "warm"]
    found = {split: examples(task, split) for split in task.splits}
    assert sorted(itertools.chain(*found.values())) == sorted((text[:40], kind) for text, kind in corpus)
    assert [kind for _, kind in found["test"]] == ["cold"] * 4 + ["warm"] * 2
    assert found["test"] == [(corpus[n][0][:40], corpus[n][1]) for n in (4, 9, 14, 19, 24, 29)]
    assert len(found["valid"]) == 4 and task.baseline_metrics == {"accuracy": pytest.approx(4 / 6)}
    assert opened(source, tmp_path / "cache", valid_fraction=0.2, **options).fingerprint == task.fingerprint


def test_what_was_taken_is_said_once(corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder_of(corpus, tmp_path / "data")
    (source / "README.txt").write_text("a stray file")
    with caplog.at_level("INFO", "longreach"):
        task = opened(source, tmp_path / "cache")
    lengths = [len(text) for text, _ in corpus]
    longer = sum(length > 40 for length in lengths)
    assert task.summary == (
        f"data: 30 documents of 2 classes (cold: 20, warm: 10); {min(lengths)} to {max(lengths)} tokens; "
        f"of {longer} longer than data.seq_len=40 the first tokens are read; not read: 1 outside of the folders"
    )
    assert messages(caplog.records).count(task.summary) == 1


def test_numbers_are_labels_and_records_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {n}", "label": n % 2}) for n in range(12)]
    lines[3] = '{"text": 3, "label": 1}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    task = opened(tmp_path / "a.jsonl", tmp_path / "cache", max_bad_samples=1)
    assert task.classes == ["0", "1"] and np.bincount(task.labels).tolist() == [6, 5]


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"a/1.txt": "x", "b.txt": "y"}, "a/1.txt': has no class; must be a folder with one folder"),
        ({"1.txt": "x"}, "1.txt': has no class; must be a folder with one folder of documents for each class"),
        ({"train/a/1.txt": "x", "test/a/1.txt": "y"}, "has folders of splits (test, train)"),
        ({"a/1.txt": "x", "b/1.txt": "y"}, "must have a class of 5 documents or more, for the test"),
        ({"a.jsonl": '{"text": "x"}'}, "has no class in a field 'label': its fields are 'text'; name the field"),
        ({"a.jsonl": '{"text": "x", "label": "k"}'}, "must have two classes or more, and has only 'k'"),
        ({"a.fa": ">s1\nACGT\n"}, "neither label=CLASS nor a word after the id in its header"),
        ({"a.csv": "text,kind\nx,y\n"}, "has no class in a field 'label': its fields are 'text', 'kind'"),
    ],
)
def test_mistakes_are_told(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(text)
    with pytest.raises(InputError) as error:
        opened(tmp_path / "data", tmp_path / "cache")
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_corpus_with_held_out_documents_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    pack(str(folder_of(corpus, tmp_path / "data")), tmp_path / "packed", name="x", valid_fraction=0.2)
    with pytest.raises(InputError, match="pack it with --valid-fraction 0"):
        opened(tmp_path / "packed", tmp_path / "cache")


def train_one(rank: int, words: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    result = train(load("documents", words))
    assert result.test is not None
    return result.test.metrics, result.baseline_metrics


@pytest.mark.timeout(200)
def test_the_config_trains_and_predicts(corpus: Corpus, tmp_path: Path) -> None:
    """On two ranks that share each document; records of new data need no label, and are cut as those of training."""
    source, _ = written("fasta", corpus, tmp_path)
    words = [f"data.source={source}", f"data.cache={tmp_path}/cache", f"run.dir={tmp_path}/run", "data.seq_len=64"]
    words += ["model.width=32", "train.steps=20", "train.threads=1", "optim.warmup_steps=2", "parallel.ranks=2"]
    words += ["monitor.tensorboard=false", "monitor.plot=false"]
    ((metrics, baseline), _) = run_world(train_one, 2, words, timeout=150)
    assert metrics["accuracy"] == 1.0 and baseline["accuracy"] == pytest.approx(2 / 3)
    export(tmp_path / "run", tmp_path / "exported")
    (tmp_path / "new.fa").write_text(">a\nacgggccgcg\n>b\n" + "attatatt\n" * 20)
    for place in (tmp_path / "run", tmp_path / "exported"):
        predictor = open_predictor(place)
        rows = [predictor.input_of(row.read(), row.name) for row in predictor.rows([str(tmp_path / "new.fa")])]
        assert [len(row.documents[0]) for row in rows] == [10, 64]
        found = [answer["class"] for answers in predictor.predict(rows) for answer in answers]
        assert found == ["cold", "warm"]
