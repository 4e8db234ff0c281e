"""CSV files: what is taken as channels, lines and times, what is left out, and that windows cross no gap."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import messages

from longreach.errors import InputError
from longreach.framework.data import DataConfig
from longreach.framework.tasks.forecast import Forecast
from longreach.framework.tasks.table import Table, read_table
from longreach.framework.tasks.task import TaskConfig


def table_of(tmp_path: Path, content: str | bytes, **options: Any) -> Table:
    path = tmp_path / "table.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path, **options)


def forecast_of(tmp_path: Path, content: str, **options: Any) -> Forecast:
    (tmp_path / "series.csv").write_text(content)
    data = DataConfig(source=str(tmp_path / "series.csv"), seq_len=4, batch_size=1, **options)
    return Forecast(TaskConfig(name="forecast", horizon=2), data)


def hours(*numbers: int) -> list[str]:
    return [f"2026-01-{1 + n // 24:02}T{n % 24:02}:00:00Z" for n in numbers]


PLAIN = np.array([[1.5, 10.0], [2.5, 20.0], [3.5, 35.0]])


@pytest.mark.parametrize(
    "content",
    [
        "a,b\n1.5,10\n2.5,20\n3.5,35\n",
        "a;b\n1,5;10\n2,5;20\n3,5;35",
        "a;b\n1.5;10\n2.5;20\n3.5;35",
        "a\tb\n1,5\t10\n2,5\t20\n3,5\t35",
        "sep=;\na;b\n1,5;10\n2,5;20\n3,5;35",
        "a,b,\n1.5,10,\n2.5,20,\n3.5,35,\n,,\n",
        "a,b\n1.5,10,\n2.5,20,\n3.5,35,\n",
        "\n a , b \n\n1.5 , 10\r\n2.5, 20\r\n\r\n3.5,35\n\n",
        '"a", "b"\n"1.5","10"\n"2.5", "20"\n"3.5","35"\n',
        "a,b\n1.5,10\n2.5,2e1\n+3.5,35.",
        b"\xef\xbb\xbfa,b\n1.5,10\n2.5,20\n3.5,35\n",
        "a;b\n1,5;10\n2,5;20\n3,5;35".encode("utf-16"),
        "a,b,note\n1.5,10,x;y\n2.5,20,y\n3.5,35,x;z",
        "a,b,note\n1.5,10,x;y\n2.5,20,y;z\n3.5,35,x;z",
        "a,b,note\n1.5,10,\n2.5,20,\n3.5,35,x",
        "a;b\n1,5;10;\n2,5;20;\n3,5;35;",
    ],
)
def test_notations_of_a_table_are_read_alike(content: str | bytes, tmp_path: Path) -> None:
    table = table_of(tmp_path, content)
    assert table.columns == ["a", "b"]
    assert np.array_equal(table.values, PLAIN)


@pytest.mark.parametrize(
    ("content", "columns", "values"),
    [
        ("1,2\n3,4\n5,7", ["column-1", "column-2"], [[1, 2], [3, 4], [5, 7]]),
        ("1,5;2,5\n3,5;4,5\n0,5;1", ["column-1", "column-2"], [[1.5, 2.5], [3.5, 4.5], [0.5, 1]]),
        ("2026-01-01,x,2\n2026-01-02,y,4", ["column-3"], [[2], [4]]),
        ("x,2\ny,4", ["column-2"], [[2], [4]]),
        (",0,1\n0,2,3\n1,5,6", ["0", "1"], [[2, 3], [5, 6]]),  # an array that pandas wrote, with its lines' numbers
        ("a,,column-2\n5,1,2\n4,3,4", ["a", "column-2-2", "column-2"], [[5, 1, 2], [4, 3, 4]]),
        ("a,a,a-2\n5,1,2\n4,3,4", ["a", "a-2-2", "a-2"], [[5, 1, 2], [4, 3, 4]]),
        ("2020,2021\na,1\nb,2", ["2021"], [[1], [2]]),
        ("day,1,2\n2026-01-01,3,4\n2026-01-02,4,5", ["1", "2"], [[3, 4], [4, 5]]),
        ("a\n1\n\n2\n", ["a"], [[1], [2]]),
    ],
)
def test_names_are_those_of_the_file_or_invented(
    content: str, columns: list[str], values: list[list[float]], tmp_path: Path
) -> None:
    if content.startswith("2020"):  # numbers above numbers are values: names must be asked for
        table = table_of(tmp_path, content, columns=["2021"])
    else:
        table = table_of(tmp_path, content)
    assert table.columns == columns
    assert table.values.tolist() == values


def test_the_summary_says_what_was_taken(tmp_path: Path) -> None:
    rows = [f"{t};{n},5;{'x' * (n % 2)};;3" for n, t in enumerate(hours(0, 1, 2, 3, 9, 10))]
    table = table_of(tmp_path, "date;a;note;nothing;b\n" + "\n".join(rows))
    for part in (
        "table.csv: values in lines 2 to 7 (6)",
        "names in line 1",
        "separated by semicolons",
        "decimal commas",
        "2 channels: a, b",
        "time step 3600 s by 'date', 1 gap",
        "'note' (no numbers: 'x' in line 3)",
        "'nothing' (empty)",
    ):
        assert part in table.summary
    assert "\n" not in table.summary
    plain = table_of(tmp_path, "1,2\n3,4").summary
    assert "no line of names: column-1, ..." in plain and "no column of times" in plain and "left out" not in plain
    assert "Latin-1" in table_of(tmp_path, "größe\n1\n2".encode("latin-1")).summary


def test_training_prints_it_once_with_the_constant_columns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("longreach"), "propagate", True)
    with caplog.at_level(logging.INFO, "longreach"):
        task = forecast_of(tmp_path, "a,flat\n" + "\n".join(f"{n % 7},1" for n in range(60)))
    (line,) = messages(caplog.records)
    assert line == task.table.summary
    assert "1 channel: a;" in line and "'flat' (constant in training)" in line
    assert task.columns == ["a"]


MISSING = "a,b\n1,10\n,20\n3,NA\n5,oops\n9,30\n"


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("", "no value in line 3"),
        ("nan", "no value"),
        ("NULL", "no value"),
        ("x", "'x', which is no number"),
        ("inf", "inf"),
    ],
)
def test_a_cell_without_a_number_is_named(cell: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told) as error:
        table_of(tmp_path, f"a,b\n1,2\n2,{cell}\n3,4")
    assert "table.csv" in str(error.value) and "column 'b'" in str(error.value) and "line 3" in str(error.value)
    assert "data.missing=" in error.value.fix


def test_missing_numbers_are_filled_as_asked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 3, column 'a' \(the first of 3"):
        table_of(tmp_path, MISSING)
    table = table_of(tmp_path, MISSING, missing="interpolate")
    assert table.values[:, 0].tolist() == [1, 2, 3, 5, 9]
    np.testing.assert_allclose(table.values[:, 1], [10, 20, 20 + 10 / 3, 20 + 20 / 3, 30])
    assert "3 cells without a number filled (data.missing=interpolate)" in table.summary
    table = table_of(tmp_path, MISSING, missing="ffill")
    assert table.values.T.tolist() == [[1, 1, 3, 5, 9], [10, 20, 20, 20, 30]]
    assert table_of(tmp_path, "a,b\n,1\n2,1\n,1", missing="ffill").values[:, 0].tolist() == [2, 2, 2]
    # With times, in proportion to them.
    rows = [f"{t},{v}" for t, v in zip(hours(0, 1, 4), (0, "", 8), strict=True)]
    assert table_of(tmp_path, "time,a\n" + "\n".join(rows), missing="interpolate").values.tolist() == [[0], [2], [8]]


def test_one_empty_cell_keeps_its_column_in_training(tmp_path: Path) -> None:
    rows = [f"{n % 7},{'' if n == 11 else n % 5}" for n in range(60)]
    with pytest.raises(InputError, match="line 13, column 'b'"):
        forecast_of(tmp_path, "a,b\n" + "\n".join(rows))
    task = forecast_of(tmp_path, "a,b\n" + "\n".join(rows), missing="ffill")
    assert task.columns == ["a", "b"]
    np.testing.assert_allclose(task.values[11] * task.deviation + task.mean, [4, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "times", "step", "runs"),
    [
        ("date", hours(0, 1, 2, 3), 3600, [(0, 4)]),
        ("when", ["2026-01-01 00:00:00.5", "2026-01-01 00:00:01.0", "2026-01-01 00:00:01.500"], 0.5, [(0, 3)]),
        ("when", ["2026-01-01T12:00+02:00", "2026-01-01T11:00Z", "2026-01-01T07:00-0500"], 3600, [(0, 3)]),
        ("month", ["2026-01", "2026-02", "2026-03", "2026-04"], 31 * 86400, [(0, 4)]),
        ("timestamp", [1700000000, 1700000060, 1700000120, 1700000300, 1700000360], 60, [(0, 3), (3, 5)]),
        ("time (s)", [0, 0.1, 0.2, 0.3, 0.5, 0.6], 0.1, [(0, 4), (4, 6)]),
        ("", [0, 1, 2, 5, 6], 1, [(0, 3), (3, 5)]),
        ("time", [0, 60, 120, 1e20], 60, [(0, 3), (3, 4)]),
        ("date", hours(0, 1, 2, 9, 10, 11, 30, 31), 3600, [(0, 3), (3, 6), (6, 8)]),
    ],
)
def test_times_are_found_and_their_gaps(
    name: str, times: list[Any], step: float, runs: list[tuple[int, int]], tmp_path: Path
) -> None:
    content = f"{name},a\n" + "\n".join(f"{one},{n % 3}" for n, one in enumerate(times))
    table = table_of(tmp_path, content)
    assert table.columns == ["a"]
    assert table.time_step == pytest.approx(step)
    assert table.runs == runs
    ignored = table_of(tmp_path, content, time_column="none")
    assert ignored.runs == [(0, len(times))] and ignored.times is None


def test_a_number_that_is_called_time_but_does_not_increase_is_a_channel(tmp_path: Path) -> None:
    assert table_of(tmp_path, "lap,time\n1,62\n1,60\n3,66\n2,61").columns == ["lap", "time"]
    table = table_of(tmp_path, "lap,odometer\n1,60\n1,62\n3,66", time_column="odometer")
    assert (table.columns, table.time_column, table.time_step) == (["lap"], "odometer", 3)
    with pytest.raises(InputError, match=r"data\.time_column"):
        table_of(tmp_path, "a,b\n1,2\n2,3", time_column="c")


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ((0, 1, 1, 2), r"'2026-01-01T01:00:00Z' in line 4, column 'date': the time of the line before once more \(1"),
        ((0, 1, 2, 1, 3), r"in line 5, column 'date': an earlier time"),
        ((3, 2, 1), r"in line 3, column 'date': an earlier time \(2 such lines\)"),
    ],
)
def test_times_that_do_not_increase_are_named(order: tuple[int, ...], told: str, tmp_path: Path) -> None:
    rows = [f"{t},{n % 3}" for n, t in enumerate(hours(*order))]
    with pytest.raises(InputError, match=told):
        table_of(tmp_path, "date,a\n" + "\n".join(rows))
    assert len(table_of(tmp_path, "date,a\n" + "\n".join(rows), time_column="none").values) == len(order)


def test_a_missing_time_is_named(tmp_path: Path) -> None:
    rows = [f"{t if n != 12 else 'soon'},{n % 3}" for n, t in enumerate(hours(*range(20)))]
    with pytest.raises(InputError, match=r"'soon' in line 14, column 'date', which is no time \(1 such"):
        table_of(tmp_path, "date,a\n" + "\n".join(rows))


def test_no_window_crosses_a_gap(tmp_path: Path) -> None:
    """Windows of 4 lines and 2 to forecast: exactly those that lie between two gaps."""
    numbers = [n + 50 * (n >= 30) + 50 * (n >= 75) + 50 * (n >= 92) for n in range(100)]
    content = "date,a,b\n" + "\n".join(f"{t},{n},{n % 3}" for n, t in enumerate(hours(*numbers)))
    task = forecast_of(tmp_path, content)
    assert task.table.runs == [(0, 30), (30, 75), (75, 92), (92, 100)]
    begins = {}
    for split in task.splits:
        sequences = task.sequences(split, None)
        windows = [sequences.sequence(number) for number in range(len(sequences))]
        lines = [np.rint(w[0].numpy()[:, 0] * task.deviation[0] + task.mean[0]).astype(int) for w in windows]
        assert all((np.diff(one) == 1).all() for one in lines)
        last = [w[1][-1].view(2, 2)[:, 0].numpy() * task.deviation[0] + task.mean[0] for w in windows]
        assert all(
            np.allclose(one, [begin[-1] + 1, begin[-1] + 2], atol=1e-3) for one, begin in zip(last, lines, strict=True)
        )
        begins[split] = [int(one[0]) for one in lines]
    assert begins["train"] == [*range(25), *range(30, 65)]
    assert begins["valid"] == [66, 67, 68, 69]
    assert begins["test"] == [*range(76, 87), 92, 93, 94]
    whole = forecast_of(tmp_path, content, time_column="none")
    assert len(whole.sequences("train", None)) == 65
    assert whole.fingerprint != task.fingerprint
    error = task.baseline_metrics["rmse"]  # by hand, over the windows of the test
    ends = np.array(begins["test"]) + 3
    apart = [task.values[ends + ahead] - task.values[ends] for ahead in (1, 2)]
    assert error == pytest.approx(float(np.sqrt(np.mean(np.square(apart)))), rel=1e-5)


def test_parts_that_are_all_too_short_are_told(tmp_path: Path) -> None:
    numbers = [n + 9 * (n // 5) for n in range(60)]
    content = "date,a\n" + "\n".join(f"{t},{n % 7}" for n, t in enumerate(hours(*numbers)))
    with pytest.raises(InputError, match="11 gaps, and the longest part without one has 5 lines") as error:
        forecast_of(tmp_path, content)
    assert "data.time_column=none" in error.value.fix


def test_columns_are_chosen_by_name_also_for_new_data(tmp_path: Path) -> None:
    content = "date,a,b,c\n" + "\n".join(f"{t},{n % 7},{n % 5},{n % 3}" for n, t in enumerate(hours(*range(60))))
    task = forecast_of(tmp_path, content, columns=["c", "a"])
    assert task.columns == ["c", "a"]
    assert task.mean == pytest.approx([np.mean([n % 3 for n in range(42)]), np.mean([n % 7 for n in range(42)])])
    assert task.deviation.dtype == np.float64
    assert "'b' (not in data.columns)" in task.table.summary
    new = tmp_path / "new.csv"
    new.write_text("a;x;c;date\n1;?;2,5;2027-01-01\n3;?;4;2027-01-02\n")
    table = task.read(new, task.columns)
    assert table.values.tolist() == [[2.5, 1], [4, 3]]
    np.testing.assert_allclose(task.standardized(table), (table.values - task.mean) / task.deviation, rtol=1e-6)
    with pytest.raises(InputError, match=r"source = .*has no column 'c', but 'a', 'b'"):
        new.write_text("a,b\n1,2\n2,3")
        task.read(new, task.columns, key="source")
    described = task.describe()
    assert (described.columns, described.time_column, described.time_step) == (["c", "a"], "date", 3600)
    with pytest.raises(InputError, match=r"data\.columns = 'flat'"):
        forecast_of(tmp_path, "flat,a\n" + "\n".join(f"1,{n % 7}" for n in range(60)), columns=["flat", "a"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "empty"),
        ("a,b\n", "only names"),
        ("a,b\n1,2\n3", "1 value in line 3, and 2 in line 1"),
        ("a,b\n1,2\n3,4,5", "3 values in line 3"),
        ("a\nx\ny", "no column of finite numbers"),
        ('a,b\n1,"2\n3,4', "quote that is not closed, from line 2"),
        (b"PK\x03\x04\0\0", "no text"),
        ("a,b\n1,2\n" + "x" * 200_000 + ",2", "as CSV"),
    ],
)
def test_no_table_at_all(content: str | bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        table_of(tmp_path, content)


def test_files_of_other_names_and_hidden_files(tmp_path: Path) -> None:
    """The file that is given is read, whatever its suffix; resource forks and hidden files are not seen."""
    rows = "\n".join(f"{n % 7}" for n in range(60))
    (tmp_path / "._mine.csv").write_bytes(b"\0\5\26\7")
    (tmp_path / "mine.CSV").write_text("a\n" + rows)
    data = DataConfig(source=str(tmp_path), seq_len=4, batch_size=1)
    assert Forecast(TaskConfig(name="forecast", horizon=2), data).columns == ["a"]
    (tmp_path / "mine.txt").write_text("b\n" + rows)
    data.source = str(tmp_path / "mine.txt")
    assert Forecast(TaskConfig(name="forecast", horizon=2), data).columns == ["b"]
    (tmp_path / "odd[1].csv").write_text("c\n" + rows)
    data.source, data.name = str(tmp_path), "odd[1]"
    assert Forecast(TaskConfig(name="forecast", horizon=2), data).columns == ["c"]
    data.name = "/etc"
    with pytest.raises(InputError, match=r"data\.name"):
        Forecast(TaskConfig(name="forecast", horizon=2), data)
