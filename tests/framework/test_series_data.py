"""``.ts`` files: values, missing ones, times and classes; and the documents that excerpts are drawn from."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from helpers import messages

from longreach.errors import InputError
from longreach.framework.data import DataConfig, prepare
from longreach.framework.tasks.cases import read_cases
from longreach.framework.tasks.retrieval import Retrieval
from longreach.framework.tasks.series import Series
from longreach.framework.tasks.task import TaskConfig

HEADER = "@problemName waves\n@classLabel true up down\n@data\n"


def write(tmp_path: Path, train: str, test: str = "", header: str = HEADER) -> DataConfig:
    for split, content in (("TRAIN", train), ("TEST", test or train)):
        (tmp_path / f"waves_{split}.ts").write_text(header + content)
    return DataConfig(source=str(tmp_path), name="waves", seq_len=4, batch_size=1, valid_fraction=0)


def series_of(data: DataConfig) -> Series:
    return Series(TaskConfig(name="series"), data)


@pytest.mark.parametrize("name", ["BasicMotions", "JapaneseVowels", "UnitTest"])
def test_files_of_the_archives_are_read_as_by_aeon(name: str) -> None:
    import aeon.datasets

    file = Path(aeon.datasets.__file__).parent / "data" / name / f"{name}_TRAIN.ts"
    values, labels = aeon.datasets.load_from_ts_file(str(file))
    found = read_cases(file)
    assert [label.lower() for label in found.labels] == [str(label) for label in labels]
    for ours, theirs in zip(found.values, values, strict=True):
        assert np.array_equal(ours, np.float32(theirs.T))


def test_missing_values_blank_lines_and_case(tmp_path: Path) -> None:
    text = "# a comment\n" + HEADER.upper() + "\n1,?,3:4,NaN,6:Up\n\n% another\n 7, 8 :9,10: down \r\n\n"
    (tmp_path / "a.ts").write_text(text)
    found = read_cases(tmp_path / "a.ts")
    assert found.labels == ["Up", "down"]
    np.testing.assert_array_equal(found.values[0], np.float32([[1, 4], [np.nan, np.nan], [3, 6]]))
    np.testing.assert_array_equal(found.values[1], np.float32([[7, 9], [8, 10]]))


def test_values_with_times_keep_their_sign_and_exponent(tmp_path: Path) -> None:
    header = "@timestamps true\n@classLabel true 1 2\n@data\n"
    text = (
        "(0,-1.5),(1,2),(2,3e-1):(0,4),(1,?),(2,-6):1\n(2020-01-01 10:00:00,7),(2020-01-01 11:00:00,-8):(0,1),(1,2):2\n"
    )
    (tmp_path / "a.ts").write_text(header + text)
    found = read_cases(tmp_path / "a.ts")
    assert found.labels == ["1", "2"]
    np.testing.assert_array_equal(found.values[0], np.float32([[-1.5, 4], [2, np.nan], [0.3, -6]]))
    np.testing.assert_array_equal(found.values[1], np.float32([[7, 1], [-8, 2]]))
    (tmp_path / "b.ts").write_text("@classLabel false\n@timestamps true\n@data\n(0,1),(1,2)\n")
    assert read_cases(tmp_path / "b.ts").values[0].tolist() == [[1], [2]]
    assert read_cases(tmp_path / "b.ts").labels == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("1,2:up", "no line @data"),
        (HEADER, "no series"),
        (HEADER + "1,2:3,4:up\n1,2:up", "1 channels, where 2 are expected, in line 5"),
        (HEADER + "1,2:3:up", r"channels of different lengths \(2, 1\) in line 4"),
        (HEADER + "1,2:up\n1,x:up", "a value that is no number .*'x'.* in line 5"),
        (HEADER + "up", "0 channels"),
    ],
)
def test_no_series_at_all(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_text(content if content.startswith("@") else "@classLabel false\n@x " + content)
    with pytest.raises(InputError, match=told):
        read_cases(tmp_path / "a.ts")


def test_the_line_says_what_was_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("longreach"), "propagate", True)
    with caplog.at_level(logging.INFO, "longreach"):
        task = series_of(write(tmp_path, "1,2,3:Up\n4,?:down\n7,9:down\n", "1,2:up\n"))
    assert messages(caplog.records) == [task.summary]


def test_what_was_taken(tmp_path: Path) -> None:
    task = series_of(write(tmp_path, "1,2,3:up\n4,?:Down\n7,9:Down\n", "1,2:up\n"))
    assert task.summary == (
        "waves: 3 training and 1 test cases of 2 classes (in training: Down: 2, up: 1); 1 channel; lengths 2 to 3; "
        "1 missing value, set to the channel's mean"
    )
    assert task.classes == ["Down", "up"]
    tokens, labels, segments = task.sequences("train", None).sequence(1)
    assert tokens[1].item() == 0 and labels[-1] == 0 and segments is not None


def test_a_channel_without_a_value_is_zero(tmp_path: Path) -> None:
    task = series_of(write(tmp_path, "1,2:?,?:up\n4,5:?,?:down\n", "1,2:3,4:up"))
    assert all((case[:, 1] == 0).all() for cases in task.cases.values() for case in cases)


@pytest.mark.parametrize(
    ("train", "test", "header", "told"),
    [
        ("1,2:3,4:up\n", "1,2:up\n", HEADER, "2 channels in its training cases and 1"),
        ("1,2:0.5\n", "", "@targetLabel true\n@classLabel false\n@data\n", "numbers to predict"),
        ("1,2\n", "", "@classLabel false\n@data\n", "no classes"),
        ("1,2:up\n", "1,2:down\n", HEADER, "classes in its test cases alone"),
    ],
)
def test_cases_that_do_not_fit(train: str, test: str, header: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        series_of(write(tmp_path, train, test, header))


def test_excerpts_say_how_many_documents_are_long_enough(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text("x" * (40 if number < 12 else 100))
    data = DataConfig(
        source=str(tmp_path / "texts"), cache=str(tmp_path / "packed"), seq_len=64, batch_size=1, valid_fraction=0.3
    )
    prepare(data)
    task = Retrieval(TaskConfig(name="retrieval"), data)
    kept = {split: len(task.long[split]) for split in ("train", "valid")}
    counts = {split: task.streams[split].num_documents for split in ("train", "valid")}
    assert sum(counts.values()) == 60 and sum(kept.values()) == 48
    assert task.summary.endswith(
        f"long enough for two excerpts of 32 tokens: {kept['train']} of {counts['train']} documents to train on, "
        f"{kept['valid']} of {counts['valid']} held-out ones"
    )
