"""Predictions for new data: answers in names and units of the task, however inputs are batched, padded and streamed."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longreach.errors import InputError
from longreach.framework.data import ByteVocabulary
from longreach.framework.inference import predict as predict_module
from longreach.framework.inference.predict import Predictor
from longreach.framework.model import Model, ModelConfig, build_model
from longreach.framework.tasks import TaskDescription
from longreach.parallel.span import Span


def small_model(**fields: Any) -> Model:
    shape: dict[str, Any] = {"width": 16, "depth": 2, "mixers": ["elementwise", "chela"], **fields}
    config = ModelConfig(**shape)
    config.chela.heads, config.chela.modes = 2, 2
    torch.manual_seed(0)
    model = build_model(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def answers(predictor: Predictor, rows: list[Any]) -> list[dict[str, Any]]:
    return [answer for found in predictor.predict(rows) for answer in found]


def read(predictor: Predictor, *sources: Path) -> dict[str, list[dict[str, Any]] | InputError]:
    """What is predicted for each input of files, by its name without the folder; or why it cannot be read."""
    found: dict[str, Any] = {}
    for row in predictor.rows([str(source) for source in sources]):
        name = row.name.rpartition("/")[2]
        try:
            (found[name],) = predictor.predict([predictor.input_of(row.read(), row.name)])
        except InputError as error:
            assert "\n" not in str(error)
            found[name] = error
    return found


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 1}, {"block_len": 4}, {"batch_size": 2, "block_len": 7}], ids=str
)
@torch.no_grad()
def test_classes_of_series_of_any_length(options: dict[str, int]) -> None:
    """Standardized by the description, padded, streamed: the probabilities of the model for each series alone."""
    model = small_model(head="class", channels=2, outputs=3, positions="sinusoidal")
    task = TaskDescription("series", 20, classes=["a", "b", "c"], mean=[1.0, -2.0], deviation=[2.0, 0.5])
    random = np.random.default_rng(0)
    rows = [random.normal(size=(length, 2)) for length in (5, 20, 1, 9)]
    rows[1][3, 0] = math.nan  # a missing value is the mean
    for row, found in zip(rows, answers(Predictor(model, task, **options), rows), strict=True):
        x = torch.from_numpy(np.nan_to_num((row - [1, -2]) / [2, 0.5]))[None].float()
        chances = model(x)[0].softmax(-1)
        assert [*found] == ["input", "class", "probability_a", "probability_b", "probability_c"]
        assert found["class"] == "abc"[int(chances.argmax())]
        assert [*found.values()][2:] == pytest.approx(chances.tolist(), rel=1e-3)
    assert [found["input"] for found in answers(Predictor(model, task, **options), rows)] == ["1", "2", "3", "4"]


@torch.no_grad()
def test_series_of_a_file(tmp_path: Path) -> None:
    """Each case of a ``.ts`` file, whether it has labels or not; a file that is none is told, and others are read."""
    model = small_model(head="class", channels=2, outputs=2)
    predictor = Predictor(
        model, TaskDescription("series", 3, classes=["1", "2"], mean=[1.0, 1.0], deviation=[2.0, 1.0])
    )
    (tmp_path / "a.ts").write_text("@problemName a\n@classLabel false\n@data\n1,2,3:4,?,6\n7:8\n")
    (tmp_path / "b.ts").write_text("@problemName b\n@classLabel true 1 2\n@data\n7:8:2\n")
    (tmp_path / "c.ts").write_text("1,2,3\n")
    (tmp_path / "d.csv").write_text("a,b\n7,8\n")
    found = read(predictor, tmp_path)
    assert [*found] == ["a.ts:1", "a.ts:2", "b.ts:1", "c.ts", "d.csv"] and isinstance(found["c.ts"], InputError)
    for name, case in (("a.ts:1", [[0, 3], [0.5, 0], [1, 5]]), ("a.ts:2", [[3, 7]]), ("b.ts:1", [[3, 7]])):
        expected = model(torch.tensor([case], dtype=torch.float32))[0].softmax(-1).tolist()
        assert isinstance(rows := found[name], list)
        assert [*rows[0].values()][2:] == pytest.approx(expected, rel=1e-3)
    assert isinstance(rows := found["d.csv"], list) and [*rows[0].values()][2:] == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head", ["class", "series"])
def test_a_gpu_answers_the_same(head: str) -> None:
    model = small_model(head=head, channels=2, outputs=4)
    rows = [np.random.default_rng(length).normal(size=(length, 2)) for length in (5, 20, 9)]
    expected = answers(Predictor(model, TaskDescription(), block_len=8), rows)
    for found, wanted in zip(
        answers(Predictor(model.cuda(), TaskDescription(), block_len=8), rows), expected, strict=True
    ):
        assert [*found] == [*wanted]
        numbers = [[value for value in one.values() if isinstance(value, float)] for one in (found, wanted)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-4)


def test_the_most_probable_classes() -> None:
    model, task = small_model(head="class", vocab=256, outputs=4), TaskDescription(classes=["a", "b", "c", "d"])
    (whole,), (found,) = (answers(Predictor(model, task, top=top), ["text"]) for top in (0, 2))
    ranked = sorted("abcd", key=lambda name: -whole[f"probability_{name}"])
    assert found == {
        "input": "1",
        "class": ranked[0],
        "probability": whole[f"probability_{ranked[0]}"],
        "class_2": ranked[1],
        "probability_2": whole[f"probability_{ranked[1]}"],
    }
    assert len(answers(Predictor(model, task, top=9), ["text"])[0]) == 9


@torch.no_grad()
def test_numbers_are_in_their_own_unit() -> None:
    model = small_model(head="numbers", channels=1, outputs=2, causal=False)
    task = TaskDescription("x", targets=["mass", "age"], target_mean=[70.0, 40.0], target_deviation=[10.0, 0.1])
    (found,) = answers(Predictor(model, task), [[1.0, 2.0, 4.0]])
    mass, age = model(torch.tensor([[[1.0], [2.0], [4.0]]]))[0].tolist()
    assert found.pop("input") == "1"
    assert found == pytest.approx({"mass": 70 + 10 * mass, "age": 40 + 0.1 * age}, rel=1e-5)
    assert [*answers(Predictor(model, TaskDescription()), [[1.0]])[0]] == ["input", "value_1", "value_2"]


@torch.no_grad()
@pytest.mark.parametrize("block_len", [0, 3])
def test_forecasts_continue_a_table(block_len: int, tmp_path: Path) -> None:
    """From its last lines, behind a gap; each channel in its own unit and by its name; the dates go on."""
    model = small_model(head="series", channels=2, outputs=6)
    task = TaskDescription(
        "forecast", 8, columns=["b", "a"], mean=[5.0, 1.0], deviation=[2.0, 3.0], horizon=3, time_column="day",
        time_step=86400.0,
    )  # fmt: skip
    values = np.random.default_rng(1).normal(size=(30, 3)).round(4)
    days = np.datetime64("2026-02-01") + np.arange(30)
    lines = [f"{day},{a},{b},{c}" for day, (a, b, c) in zip(days, values, strict=True)]
    (tmp_path / "whole.csv").write_text("\n".join(["day,a,c,b", *lines]))
    (tmp_path / "gap.csv").write_text("\n".join(["day,a,c,b", *lines[:20], *lines[25:]]))
    (tmp_path / "undated.csv").write_text("\n".join(["a,c,b", *(line.partition(",")[2] for line in lines)]))
    (tmp_path / "short.csv").write_text("b,a\n1,2\n")
    (tmp_path / "wrong.csv").write_text("day,a\n2026-01-01,1\n2026-01-02,1\n")
    (tmp_path / "text.csv").write_text("a,b\n1,2\n1,x\n")
    found = read(Predictor(model, task, block_len=block_len), tmp_path)
    for name, first in {"whole.csv": 22, "gap.csv": 25, "undated.csv": 22}.items():
        x = (torch.from_numpy(values[first:, [2, 0]]) - torch.tensor([5.0, 1.0])) / torch.tensor([2.0, 3.0])
        expected = model(x[None].float())[0, -1].view(3, 2) * torch.tensor([2.0, 3.0]) + torch.tensor([5.0, 1.0])
        rows = found[name]
        assert isinstance(rows, list) and [row["step"] for row in rows] == [1, 2, 3]
        assert [[row["b"], row["a"]] for row in rows] == [pytest.approx(line, rel=1e-4) for line in expected.tolist()]
        assert rows[0]["input"] == str(tmp_path / name)
        dates = [row.get("day") for row in rows]
        assert dates == ([None] * 3 if name == "undated.csv" else ["2026-03-03", "2026-03-04", "2026-03-05"])
    assert isinstance(found["short.csv"], list), "fewer lines than in training are enough"
    assert "has no column 'b'" in str(found["wrong.csv"])
    assert isinstance(found["text.csv"], InputError)


def test_times_of_day_and_numbers_go_on(tmp_path: Path) -> None:
    model = small_model(head="series", channels=1, outputs=2)
    task = TaskDescription("forecast", 4, columns=["a"], horizon=2, time_column="t", time_step=1800.0)
    (tmp_path / "1.csv").write_text("t,a\n" + "".join(f"2026-01-01 {hour}:30:00,1\n" for hour in (20, 21, 22, 23)))
    (tmp_path / "2.csv").write_text("t,a\n" + "".join(f"{time},1\n" for time in (10, 20, 30)))
    found = read(Predictor(model, task), tmp_path)
    times = [[row["t"] for row in rows] for rows in found.values() if isinstance(rows, list)]
    assert times == [["2026-01-02T00:00", "2026-01-02T00:30"], ["40", "50"]]


def test_columns_of_the_data_keep_their_names(tmp_path: Path) -> None:
    """Also where they are called as those of the table."""
    model = small_model(head="series", channels=2, outputs=2)
    task = TaskDescription("forecast", 4, columns=["input", "step"], horizon=1)
    (found,) = answers(Predictor(model, task), [np.zeros((4, 2))])
    assert [*found] == ["input_", "step_", "input", "step"] and found["input_"] == "1" and found["step_"] == 1
    numbers = small_model(head="numbers", channels=1, outputs=1)
    (found,) = answers(Predictor(numbers, TaskDescription(targets=["input"])), [[1.0]])
    assert [*found] == ["input_", "input"]


def test_an_answer_that_is_not_finite_is_told() -> None:
    model = small_model(head="numbers", channels=1, outputs=1)
    model.head.answer.bias.data.fill_(math.nan)
    with pytest.raises(InputError, match="answer = '1': must be finite"):
        answers(Predictor(model, TaskDescription()), [[1.0]])


@torch.no_grad()
def test_pictures_of_any_size_and_kind(tmp_path: Path) -> None:
    """A path, bytes, an array and an image of Pillow are one picture; what is none is told."""
    model = small_model(head="class", channels=3, outputs=2, causal=False)
    task = TaskDescription("images", 16, classes=["x", "y"], mean=[0.5, 0.4, 0.3], deviation=[0.2, 0.3, 0.4])
    task.size, task.colors = 4, 3
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    picture, content = Image.fromarray(pixels), io.BytesIO()
    picture.save(content, "png")
    (tmp_path / "a.png").write_bytes(content.getvalue())
    (tmp_path / "b.png").write_bytes(content.getvalue()[:40])
    Image.fromarray(pixels).resize((9, 5)).save(tmp_path / "c.bmp")
    (tmp_path / ".hidden").write_text("x")
    x = (torch.from_numpy(pixels).view(1, 16, 3) / 255 - torch.tensor(task.mean)) / torch.tensor(task.deviation)
    expected = model(x)[0].softmax(-1).tolist()
    rows = [tmp_path / "a.png", content.getvalue(), pixels, picture]
    for found in answers(Predictor(model, task), rows):
        assert [found["probability_x"], found["probability_y"]] == pytest.approx(expected, rel=1e-4)
    by_file = read(Predictor(model, task), tmp_path)
    assert [*by_file] == ["a.png", "b.png", "c.bmp"] and isinstance(by_file["c.bmp"], list)
    assert "picture" in str(by_file["b.png"])
    for wrong, name in ((np.zeros((2, 2, 7)), "1"), ("nowhere.png", "nowhere.png")):
        with pytest.raises(InputError, match=f"input = '{name}'"):
            answers(Predictor(model, task), [wrong])


@torch.no_grad()
def test_pairs_of_texts(tmp_path: Path) -> None:
    """Each text is a document of its own; pairs are lines of CSV or JSON."""
    model = small_model(head="class", vocab=256, outputs=2, documents=2)
    predictor = Predictor(model, TaskDescription("retrieval", 20, classes=["different", "same"]), ByteVocabulary())
    tokens, segments = torch.tensor([[*b"spancarry"]]), torch.tensor([[0] * 4 + [1] * 5])
    expected = model(tokens, Span(segments=segments))[0].softmax(-1)[1]
    found = answers(predictor, [("span", "carry"), ("a longer text than the other", b"x")])
    assert found[0]["probability_same"] == pytest.approx(float(expected), rel=1e-3)
    (tmp_path / "p.csv").write_text('first,second\nspan,carry\n"a, b",\n')
    (tmp_path / "p.jsonl").write_text('["span", "carry"]\n{"a": "span", "b": "carry"}\n["span"]\n{\n\n')
    by_line = read(predictor, tmp_path / "p.csv", tmp_path / "p.jsonl")
    assert [*by_line] == ["p.csv:2", "p.csv:3", "p.jsonl:1", "p.jsonl:2", "p.jsonl:3", "p.jsonl:4"]
    for name in ("p.csv:2", "p.jsonl:1", "p.jsonl:2"):
        rows = by_line[name]
        assert isinstance(rows, list) and rows[0]["probability_same"] == pytest.approx(float(expected), rel=1e-3)
    assert "at least one token" in str(by_line["p.csv:3"])
    assert "two texts" in str(by_line["p.jsonl:3"]) and "not JSON" in str(by_line["p.jsonl:4"])


@torch.no_grad()
def test_texts_and_expressions(tmp_path: Path) -> None:
    """Files and lines of JSON; of ListOps the tokens that the task has."""
    model = small_model(head="class", vocab=256, outputs=2)
    (tmp_path / "a.txt").write_text("halo")
    (tmp_path / "b.jsonl").write_text('{"text": "span"}\n{"texd": "span"}\n')
    found = read(Predictor(model, TaskDescription("texts")), tmp_path)
    assert [*found] == ["a.txt", "b.jsonl:1", "b.jsonl:2"] and isinstance(found["b.jsonl:2"], InputError)
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    several = read(Predictor(model, TaskDescription("texts")), tmp_path / "c.png", tmp_path / "a.txt")
    assert isinstance(several["c.png"], InputError) and isinstance(several["a.txt"], list)
    expected = model(torch.tensor([[*b"span"]]))[0].softmax(-1).tolist()
    assert isinstance(rows := found["b.jsonl:1"], list)
    assert [*rows[0].values()][2:] == pytest.approx(expected, rel=1e-4)

    model = small_model(head="class", vocab=16, outputs=10)
    predictor = Predictor(model, TaskDescription("listops", 32))
    (found_value,) = answers(predictor, ["[SM 3 [MAX 2 9] [MIN 4 [MED 1 0 5]]]"])
    tokens = [13, 3, 10, 2, 9, 14, 11, 4, 12, 1, 0, 5, 14, 14, 14]
    chances = model(torch.tensor([tokens]))[0].softmax(-1)
    assert found_value["class"] == str(int(chances.argmax()))
    assert found_value["probability_7"] == pytest.approx(float(chances[7]), rel=1e-3)
    with pytest.raises(InputError, match=r"no \[MEAN"):
        answers(predictor, ["[MEAN 1 2]"])


def test_rows_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch at a time, by its rows and by its tokens."""
    model, taken = small_model(head="class", vocab=256, outputs=2), []

    def rows() -> Iterator[str]:
        for number in range(6):
            taken.append(number)
            yield "x" * 10

    found = Predictor(model, TaskDescription(), batch_size=2).predict(rows())
    next(found)
    assert taken == [0, 1, 2]
    assert len([*found]) == 5
    monkeypatch.setattr(predict_module, "MAX_BATCH_TOKENS", 35)
    sizes = [len(batch) for batch in Predictor(model, TaskDescription())._batches(rows())]
    assert sizes == [3, 3]


@pytest.mark.parametrize(
    ("fields", "options", "row", "expected"),
    [
        ({"vocab": 256}, {"task": None}, "x", "is a language model.*longreach generate"),
        ({"vocab": 256, "head": "class", "outputs": 2}, {"task": None}, "x", "task = None.*export the run again"),
        ({"vocab": 129}, {"task": TaskDescription("needle")}, "x", "task.name=needle.*longreach evaluate"),
        ({"vocab": 256, "head": "class", "outputs": 2, "causal": False}, {"block_len": 4}, "x", "not causal"),
        ({"vocab": 256, "head": "class", "outputs": 2}, {"batch_size": 0}, "x", "batch_size = 0"),
        ({"vocab": 256, "head": "class", "outputs": 2}, {}, "", "at least one token"),
        ({"vocab": 256, "head": "class", "outputs": 2}, {}, np.array([3, 256]), "from 0 to 255"),
        ({"vocab": 256, "head": "class", "outputs": 2, "documents": 2}, {}, "x", "two texts"),
        ({"channels": 2, "head": "class", "outputs": 2}, {}, np.zeros((4, 3)), r"\[n, 2\].*\[4, 3\]"),
        ({"channels": 1, "head": "class", "outputs": 2}, {}, np.zeros(0), "at least one value"),
    ],
)
def test_a_mistake_is_told(fields: dict[str, Any], options: dict[str, Any], row: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        answers(Predictor(small_model(**fields), **({"task": TaskDescription("x")} | options)), [row])
    assert "\n" not in str(caught.value)


def test_a_description_is_kept(tmp_path: Path) -> None:
    """What is read is what was written; what is damaged is told."""
    task = TaskDescription("forecast", 9, columns=["${a}", "b"], mean=[1.5, 2.0], deviation=[1, 2], horizon=3)
    assert TaskDescription.load(tmp_path) is None
    task.save(tmp_path)
    assert TaskDescription.load(tmp_path) == task
    assert TaskDescription.from_json({"name": "x", "new": 1}, "f") == TaskDescription("x")
    for tree in (
        [],
        {"name": 3},
        {"name": "x", "mean": ["a"]},
        {"name": "x", "classes": "ab"},
        {"name": "x", "size": True},
    ):
        with pytest.raises(InputError, match="task = 'here'"):
            TaskDescription.from_json(tree, "here")
    (tmp_path / "task.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        TaskDescription.load(tmp_path)
