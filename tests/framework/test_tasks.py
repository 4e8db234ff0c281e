"""Tasks: examples have the labels of their definition; training does not depend on how sequences are split."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from deepspeed_world import run_world

from longreach.errors import InputError
from longreach.framework.config import RunConfig, load
from longreach.framework.model import build_model
from longreach.framework.model.heads import IGNORED, ClassHead, labelled
from longreach.framework.runtime.validation import batches_of
from longreach.framework.tasks import TASKS, Task, TaskName, open_task
from longreach.framework.tasks.task import TaskConfig, digest_of
from longreach.framework.trainer import train
from longreach.launch import cli
from longreach.parallel import streaming
from longreach.parallel.mesh import Axis, Mesh
from longreach.parallel.span import Span

TABLE = "Daphnet_S06R02E0"  # which aeon brings
CONFIG: dict[str, Any] = {
    "model": {"width": 16, "depth": 2, "mixers": ["elementwise", "chela"], "chela": {"heads": 2, "modes": 2}},
    "data": {"seq_len": 48, "batch_size": 4},
    "optim": {"lr": 1.0e-2},
    "train": {"steps": 2, "threads": 1, "micro_batch_size": 2},
    "monitor": {"tensorboard": False, "plot": False},
    "task": {"examples": 64, "test_examples": 10},
}


@pytest.fixture(scope="session")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two waves with dates and a column that never changes."""
    time = np.arange(400)
    lines = ["date,a,constant,b"]
    lines += [f"2026-01-{1 + t // 24:02} {t % 24:02}:00,{np.sin(t / 5):.5f},1,{np.cos(t / 9):.5f}" for t in time]
    path = tmp_path_factory.mktemp("csv") / "waves.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of one letter each."""
    folder = tmp_path_factory.mktemp("texts")
    for letter in "abcdefghijklmnop":
        (folder / letter).write_text("".join(letter + str(number % 10) for number in range(100)))
    return folder


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty documents of each of two classes, longer and shorter than a sequence."""
    folder = tmp_path_factory.mktemp("classes")
    for name, letters in (("even", "02468"), ("odd", "13579")):
        (folder / name).mkdir()
        for number in range(20):
            text = "".join(letters[(number + place * place) % 5] for place in range(20 + 3 * number))
            (folder / name / f"{number:02}").write_text(f"{number} {text}")
    return folder


@pytest.fixture
def words(csv: Path, texts: Path, classes: Path, tmp_path: Path) -> dict[str, list[str]]:
    """The overrides that make each task of `CONFIG`."""
    return {
        "documents": [f"data.source={classes}", f"data.cache={tmp_path}/classes", "data.valid_fraction=0.3"],
        "series": ["data.source=aeon", "data.name=JapaneseVowels", "model.causal=false", "model.positions=sinusoidal"],
        "forecast": [f"data.source={csv}", "task.horizon=4"],
        "images": ["data.source=digits", "data.seq_len=64"],
        "retrieval": [f"data.source={texts}", f"data.cache={tmp_path}/packed", "data.valid_fraction=0.3"],
        "listops": ["model.causal=false", "model.dropout=0.1"],
        "pathfinder": ["data.seq_len=1024"],
        "recall": ["task.pairs=4"],
        "needle": [],
        "adding": [],
    }


def make(tmp_path: Path, name: str, *overrides: str) -> RunConfig:
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return load(path, [f"task.name={name}", *overrides])


def opened(config: RunConfig) -> Task:
    from longreach.framework.tasks import kind_of

    kind_of(config.task).prepare(config.data)
    return open_task(config.task, config.data)


def run_each(rank: int, path: str, runs: list[list[str]]) -> list[tuple[list[float], float, dict[str, float]]]:
    """Losses of the steps, the gradient's last norm, and the test."""
    found = []
    for words in runs:
        config = load(path, words)
        result = train(config)
        rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
        assert result.test is not None
        found.append(([row["loss"] for row in rows], rows[-1]["grad_norm"], result.test.metrics))
    return found


def test_training_is_the_same_however_it_is_split(words: dict[str, list[str]], tmp_path: Path) -> None:
    """Each head, two steps and the test: one rank; two ranks of a sequence, one of which may hold padding alone; causal
    ones block by block.
    """
    words = {name: words[name] for name in ("series", "listops", "retrieval", "adding", "forecast")}
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    streamed = [name for name in words if "model.causal=false" not in words[name]]

    def runs(layout: str, names: list[str], *extra: str) -> list[list[str]]:
        return [[f"task.name={n}", f"run.dir={tmp_path}/{layout}-{n}", *words[n], *extra] for n in names]

    (alone,) = run_world(run_each, 1, str(path), runs("1", [*words]), timeout=200)
    (blocks,) = run_world(run_each, 1, str(path), runs("b", streamed, "parallel.block_len=20"), timeout=200)
    pair = run_world(run_each, 2, str(path), runs("2", [*words], "parallel.ranks=2"), timeout=200)[0]
    expected = dict(zip(words, alone, strict=True))
    for names, results in ((words, pair), (streamed, blocks)):
        for name, (losses, norm, metrics) in zip(names, results, strict=True):
            assert losses == pytest.approx(expected[name][0], rel=1e-4), name
            assert norm == pytest.approx(expected[name][1], rel=1e-3), name
            assert metrics == pytest.approx(expected[name][2], rel=1e-3), name
    check_evaluation(tmp_path / "1-adding", expected["adding"][2])


def check_evaluation(run_dir: Path, metrics: dict[str, float]) -> None:
    """What a run found in its test is in its directory; `longreach evaluate` finds it again, and scores other tests."""
    result = json.loads((run_dir / "result.json").read_text())
    assert result["metrics"] == metrics
    assert set(result["chance"]) == set(metrics)
    file = run_dir / "again.json"
    assert cli.main(["evaluate", str(run_dir), "--json", str(file)]) == 0
    assert json.loads(file.read_text())["metrics"] == pytest.approx(metrics, rel=1e-4)
    words = ["data.seq_len=200", "task.test_examples=3", "parallel.block_len=64", "--json", str(file)]
    assert cli.main(["evaluate", str(run_dir), *words]) == 0
    assert json.loads(file.read_text())["num_labels"] == 3
    assert cli.main(["evaluate", str(run_dir), "--by-document"]) == 2
    assert cli.main(["generate", str(run_dir), "--prompt", "a"]) == 2


def test_every_task_has_a_name_of_the_config() -> None:
    assert set(TASKS) == set(get_args(TaskName))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "language"])
def test_examples_follow_from_their_numbers(name: str, words: dict[str, list[str]], tmp_path: Path) -> None:
    config = make(tmp_path, name, *words[name])
    one, other = opened(config), opened(config)
    assert one.fingerprint == other.fingerprint != opened(make(tmp_path, name, *words[name], "task.seed=1")).fingerprint
    seen = set()
    for split in one.splits:
        sequences = one.sequences(split, None)
        for number in range(min(len(sequences), 5)):
            tokens, labels, segments = sequences.sequence(number)
            assert tokens.shape[0] == labels.shape[0] == config.data.seq_len
            assert segments is None or (segments.diff() >= 0).all()
            assert labelled(labels.unsqueeze(0)).any()
            again = other.sequences(split, None).sequence(number)
            assert torch.equal(tokens, again[0])
            seen.add((split, tokens.numpy().tobytes()))
    assert len(seen) >= 10, "the splits do not share their examples"
    one.configure_model(config.model)
    assert config.model.outputs or config.model.head == "token"
    filler = one.sequences("test", None).sequence(-1)
    assert not labelled(filler[1].unsqueeze(0)).any()


def test_what_is_to_be_recalled_was_said(tmp_path: Path) -> None:
    tokens, labels, _ = opened(make(tmp_path, "recall", "task.pairs=5")).sequences("train", None).sequence(3)
    said = dict(zip(tokens[:10:2].tolist(), tokens[1:10:2].tolist(), strict=True))
    asked = labels != IGNORED
    assert dict(zip(tokens[asked].tolist(), labels[asked].tolist(), strict=True)) == said
    tokens, labels, _ = opened(make(tmp_path, "needle")).sequences("train", None).sequence(3)
    (place, end) = (tokens == 0).nonzero().flatten().tolist()
    assert end == len(tokens) - 1
    assert labels[-1] == tokens[place + 1]


def test_excerpts_of_one_document_or_of_two(words: dict[str, list[str]], tmp_path: Path) -> None:
    sequences = opened(make(tmp_path, "retrieval", *words["retrieval"])).sequences("train", None)
    answers = set()
    for number in range(20):
        tokens, labels, segments = sequences.sequence(number)
        assert segments is not None
        letters = [{chr(token) for token in tokens[segments == half] if token >= 97} for half in (0, 1)]
        assert (letters[0] == letters[1]) == bool(labels[-1])
        answers.add(int(labels[-1]))
    assert answers == {0, 1}


def test_options_that_are_not_set_leave_the_examples_as_they_were() -> None:
    """A run from before an option was added can be resumed."""
    before = {
        "name": "images",
        "seed": 0,
        "examples": 10_000,
        "test_examples": 1_000,
        "horizon": 16,
        "pairs": 32,
        "size": 28,
    }
    expected = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert digest_of(TaskConfig("images")) == expected != digest_of(TaskConfig("images", channels=3))


def test_forecasts_are_of_the_values_that_follow(words: dict[str, list[str]], tmp_path: Path) -> None:
    task = opened(make(tmp_path, "forecast", *words["forecast"]))
    tokens, labels, _ = task.sequences("train", None).sequence(0)
    assert tokens.shape == (48, 2), "dates and constants are no channels"
    ahead = labels.view(48, 4, 2)
    assert torch.equal(ahead[:-1, 0], tokens[1:])
    assert torch.equal(ahead[:-4, 3], tokens[4:])
    tokens, labels, _ = task.sequences("test", None).sequence(0)
    assert labelled(labels.unsqueeze(0)).sum() == 1
    assert labelled(labels.unsqueeze(0))[0, -1]
    trained = task.sequences("train", None)
    last = trained.sequence(len(trained) - 1)[1][-1].view(4, 2)[-1]
    first = task.sequences("valid", None).sequence(0)[1][-1].view(4, 2)[0]
    assert not torch.equal(last, first), "no value is forecast in two splits"


def test_padding_does_not_count() -> None:
    """A class of a padded sequence is that of the sequence alone; also block by block."""
    config = load("japanese-vowels").model
    config.channels, config.head, config.outputs, config.vocab, config.causal = 3, "class", 4, 0, True
    model = build_model(config).double().eval()
    x = torch.randn(2, 10, 3, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(2, 5, 3, dtype=torch.float64)], dim=1)
    segments = torch.tensor([[0] * 10 + [1] * 5] * 2)
    expected = model(x)
    torch.testing.assert_close(model(padded, Span(segments=segments)), expected)
    spans = streaming.blocks(Mesh(), 15, 4, segments=segments)
    *_, last = streaming.read(spans, lambda span: model(span.shard(padded), span))
    torch.testing.assert_close(last, expected)


def test_two_documents_are_compared_each_by_its_own_mean() -> None:
    head = ClassHead(8, 2, documents=2).double()
    x, segments = torch.randn(1, 9, 8, dtype=torch.float64), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    found = head.collect(x, Span(segments=segments))
    torch.testing.assert_close(found, torch.stack([x[:, :3].mean(1), x[:, 3:7].mean(1)], dim=1))


def test_speakers_are_told_apart(tmp_path: Path) -> None:
    """Sixty steps of the config of the results' table; the figure there comes from all of its steps."""
    words = [f"run.dir={tmp_path}/run", "train.steps=60", "train.threads=1"]
    ((found,),) = run_world(run_each, 1, "japanese-vowels", [words])
    assert found[2]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["task.name=listop"], "task.name"),
        (["task.name=series", "data.source=aeon"], "data.name"),
        (["task.name=series", "data.source=aeon", "data.name=NoSuch"], "data.name"),
        (["task.name=series", "data.source=aeon", "data.name=JapaneseVowels", "data.seq_len=20"], "data.seq_len"),
        (["task.name=images", "data.source=nowhere"], "data.source"),
        (["task.name=series", "data.source=nowhere", "data.name=X"], "data.source"),
        (["task.name=forecast", "data.source=nowhere.csv", "data.name=x"], "data.source"),
        (
            ["task.name=forecast", "data.source=aeon", "data.name=Daphnet_S06R02E0", "model.causal=false"],
            "model.causal",
        ),
        (["task.name=recall", "task.pairs=0"], "task.pairs"),
        (["task.name=recall", "task.pairs=20", "data.seq_len=59"], "data.seq_len"),
        (["task.name=adding", "model.channels=3"], "model.channels"),
        (["task.name=adding", "model.head=token"], None),
        (["task.name=needle", "model.vocab=5"], "model.vocab"),
    ],
)
def test_mistakes_are_told(words: list[str], expected: str | None, tmp_path: Path) -> None:
    def attempt() -> None:
        config = make(tmp_path, words[0].partition("=")[2], *words[1:])
        opened(config).configure_model(config.model)

    if expected is None:
        return attempt()
    with pytest.raises(InputError) as error:
        attempt()
    assert error.value.field == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "names"),
        ("a,b\n1,2\n3", "line 3"),
        ("a\nx\ny", "no column"),
        ("a\n1\n2\n3", "windows"),
        ("a\n1\n1", "change"),
    ],
)
def test_a_table_that_cannot_be_forecast(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=expected):
        opened(make(tmp_path, "forecast", f"data.source={path}"))


def test_a_file_of_a_data_set_stands_for_both(tmp_path: Path) -> None:
    """What is scored is never what was trained on."""
    import aeon.datasets

    folder = Path(aeon.datasets.__file__).parent / "data" / "JapaneseVowels"
    words = ["data.name=JapaneseVowels"]
    for place in (folder, folder / "JapaneseVowels_TRAIN.ts", folder / "JapaneseVowels_TEST.ts"):
        task = opened(make(tmp_path, "series", f"data.source={place}", *words))
        assert [len(task.sequences(split, None)) for split in task.splits][-1] == 370


def test_tables_are_found_by_name(csv: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.csv").write_text(csv.read_text().replace("date,a", f"date,{name}"))
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "values.csv").write_text(csv.read_text())
    for name in ("one", "two", "three"):
        assert opened(make(tmp_path, "forecast", f"data.source={tmp_path}", f"data.name={name}")).title == name
    for words, expected in ((["data.name=four"], "data.name = 'four'"), ([], "one of one, two")):
        with pytest.raises(InputError, match=expected):
            opened(make(tmp_path, "forecast", f"data.source={tmp_path}", *words))


def test_a_column_that_changes_after_training_alone_is_left_out(tmp_path: Path) -> None:
    """The deviation of a constant such as 0.1 is not 0, for rounding."""
    lines = ["a,late", *(f"{np.sin(t / 5):.5f},{0.1 if t < 180 else 0.2}" for t in range(200))]
    path = tmp_path / "late.csv"
    path.write_text("\n".join(lines))
    config = make(tmp_path, "forecast", f"data.source={path}", "task.horizon=4")
    task = opened(config)
    task.configure_model(config.model)
    assert config.model.channels == 1 and task.baseline_metrics["rmse"] < 2


@pytest.mark.parametrize(("examples", "ranks", "sizes"), [(5, 1, [4, 4]), (3, 1, [3]), (3, 2, [2]), (1, 2, [1])])
def test_no_more_is_scored_than_there_is(examples: int, ranks: int, sizes: list[int], tmp_path: Path) -> None:
    """A test of few examples is read in small batches, not in a training's filled up."""
    words = [
        f"task.test_examples={examples}",
        "data.batch_size=8",
        "train.micro_batch_size=4",
        f"parallel.ranks={ranks}",
    ]
    config = make(tmp_path, "needle", *words)
    mesh = Mesh(data=Axis(rank=0, size=ranks, ranks=tuple(range(ranks))))
    batches = list(batches_of(config, mesh, opened(config).sequences("test", None)).iterate())
    assert [len(batch.indices) for batch in batches] == sizes


def test_a_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    for shade, name in ((10, "dark"), (240, "light")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (9, 7), (shade, shade, shade + number)).save(tmp_path / "images" / name / f"{number}.png")
    words = [f"data.source={tmp_path}/images", "task.size=4", "data.seq_len=16"]
    task = opened(make(tmp_path, "images", *words))
    assert [len(task.sequences(split, None)) for split in task.splits] == [8, 0, 2]
    (tmp_path / "images" / "dark" / "6.png").write_text("no image")
    with pytest.raises(InputError, match=r"6\.png"):
        opened(make(tmp_path, "images", *words))
