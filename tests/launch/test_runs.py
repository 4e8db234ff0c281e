"""`longreach runs`: what becomes of real runs is told from their files, whatever state these are in."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_helpers import JobDirectory, kill_all, make_job_directory, ranks_of
from programs import finish, longreach, python, start
from rich.cells import cell_len

from longreach.framework.runtime import status
from longreach.launch import cli, runs
from longreach.launch.runs import find_runs, table


@pytest.fixture(scope="module")
def job_dir(tmp_path_factory: pytest.TempPathFactory) -> JobDirectory:
    return make_job_directory(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def trained(job_dir: JobDirectory) -> Iterator[Path]:
    """A directory of runs that ended in all ways there are, and of one that is running."""
    place = job_dir.directory / "runs"
    more = ("train.validate_every=2", "train.validate_batches=1")
    done = job_dir.train("runs/finished", "train.steps=3", *more)
    assert done.returncode == 0, done.stderr
    with job_dir.training("runs/stopped") as process:
        process.send_signal(signal.SIGTERM)
        assert finish(process, 60).returncode == 75
    shutil.copytree(job_dir.directory / "packed", job_dir.directory / "cut")
    with job_dir.training("runs/failed", "data.source=cut") as process:
        os.truncate(next((job_dir.directory / "cut").glob("*.tar")), 700)
        assert finish(process, 60).returncode == 2
    with job_dir.training("runs/killed") as process:
        kill_all(process)
        process.wait()
    with job_dir.training("runs/deeper/running"):
        yield place


def by_name(place: Path) -> dict[str, runs.FoundRun]:
    return {run.name: run for run in find_runs(place)}


def test_real_runs(trained: Path) -> None:
    found = by_name(trained)
    states = {"deeper/running": "running", "finished": "finished", "stopped": "stopped"}
    assert {name: run.state for name, run in found.items()} == {**states, "failed": "failed", "killed": "dead"}
    assert list(found) == ["deeper/running", "failed", "killed", "stopped", "finished"]
    assert found["stopped"].reason == "on SIGTERM" and not found["finished"].reason
    assert "shard = 'cut/" in found["failed"].reason and "ends at byte 700" in found["failed"].reason
    finished, now = found["finished"], time.time()
    rows = [json.loads(line) for line in (trained / "finished/metrics.jsonl").read_text().splitlines()]
    assert (finished.step, finished.steps, finished.loss) == (3, 3, rows[-1]["loss"])
    assert finished.held_out == json.loads((trained / "finished/validation.jsonl").read_text().splitlines()[-1])["loss"]
    assert finished.tokens_per_second == sorted(row["tokens_per_second"] for row in rows)[1]
    for run in found.values():
        assert run.num_bytes > 1000 and run.host == socket.gethostname() and run.steps
        assert run.since is not None and now - 600 < run.since <= now
        assert run.step and run.step >= 2


def test_the_program_prints_a_line_for_each(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # names of temporary directories are long
    done = longreach("runs", str(trained), cwd=trained)
    assert done.returncode == 0 and not done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == list(runs.HEADERS) and len(lines) == 5
    assert all(len(line) <= 160 for line in (head, *lines))
    assert [line.split()[0] for line in lines] == [run.name for run in find_runs(trained)]
    assert "failed: shard" in lines[1] and "dead: its process is gone" in lines[2] and "stopped on SIGTERM" in lines[3]
    rows = [json.loads(line) for line in longreach("runs", "--json", str(trained), cwd=trained).stdout.splitlines()]
    assert [row["state"] for row in rows] == ["running", "failed", "dead", "stopped", "finished"]
    assert "ends at byte 700" in rows[1]["reason"] and rows[4]["step"] == 3


def test_it_is_quick(trained: Path) -> None:
    """Without torch, which takes seconds to import."""
    code = f"import sys; from longreach.launch import cli; cli.main(['runs', {str(trained)!r}]); "
    done = python("-c", code + "print('torch' in sys.modules, 'deepspeed' in sys.modules)", cwd=trained)
    assert done.stdout.endswith("False False\n"), done.stderr


def test_watching_lists_again(trained: Path) -> None:
    process = start("-m", "longreach", "runs", "--json", "--watch", "0.1", "deeper", cwd=trained)
    try:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert finish(process, 30).returncode == 130
    finally:
        process.kill()
    assert [row["name"] for row in seen] == ["running"] * 3


def make_run(directory: Path, rows: int = 3, **kept: Any) -> Path:
    """Files as a run leaves them."""
    directory.mkdir(parents=True)
    row = {"loss": 2.5, "tokens_per_second": 1000.0, "step_seconds": 0.5}
    lines = [json.dumps({"step": number, **row}) + "\n" for number in range(1, rows + 1)]
    (directory / "metrics.jsonl").write_text("".join(lines))
    own = {
        "state": "running",
        "reason": "",
        "step": rows,
        "steps": 10,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    own |= {"machine": status.machine(), "ticks": status.start_ticks(), "since": time.time() - 7300}
    (directory / status.NAME).write_text(json.dumps(own | kept))
    return directory


def age(run: Path, seconds: float) -> None:
    for file in run.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


def test_another_host_is_told_by_its_news(tmp_path: Path) -> None:
    """A process elsewhere is not looked for: neither by its number, nor after a restart, nor in another container."""
    elsewhere = [{"host": "node-b"}, {"machine": "another start"}]
    for number, other in enumerate(elsewhere):
        age(make_run(tmp_path / f"quiet-{number}", pid=1 << 22, **other), 7300)
        make_run(tmp_path / f"busy-{number}", pid=1 << 22, **other)
        age(make_run(tmp_path / f"slow-{number}", pid=1 << 22, **other), 250)
    age(make_run(tmp_path / "frozen"), 7300)
    make_run(tmp_path / "gone", pid=1 << 22)
    make_run(tmp_path / "reused", ticks=1)
    found = by_name(tmp_path)
    states = {"busy": "running", "slow": "running", "quiet": "silent"}
    wanted = {f"{name}-{number}": state for name, state in states.items() for number in (0, 1)}
    assert {name: run.state for name, run in found.items()} == wanted | {
        "frozen": "silent",
        "gone": "dead",
        "reused": "dead",
    }
    (line,) = [line for line in table(list(found.values()), 120) if line.startswith("quiet-0")]
    assert line.endswith("2 h  no news, node-b")


def test_long_steps_are_no_silence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", host="node-b")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 2.0, "step_seconds": 600.0}) + "\n")
    age(run, 7200)
    assert find_runs(tmp_path)[0].state == "running"
    age(run, 12600)
    assert find_runs(tmp_path)[0].state == "silent"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff" * 4000,
        b'{"step": 3, "loss": 2.5}\n{"step": 4, "lo',
        b'{"step": 3, "loss": 2.5}\n[1]\n"text"\n{"loss": 1}\n{"step": "5"}\nnull\n' + b"[" * 100_000,
        b'{"step": 3, "loss": 2.5, "tokens_per_second": "fast", "step_seconds": null}\n\n\n',
        b'{"step": 1e999, "loss": NaN}\n{"step": 3, "loss": 2.5}\n{"step": ' + b"9" * 400 + b"}\n",
        b'{"step": 3, "loss": 2.5}\n' + b"x" * 70_000,
    ],
    ids=["empty", "no text", "half a line", "no rows", "no numbers", "no finite numbers", "a long end"],
)
def test_files_that_are_broken(tmp_path: Path, content: bytes) -> None:
    """Each in turn, and each in place of the status."""
    rows, kept, both = (make_run(tmp_path / name) for name in ("rows", "kept", "both"))
    make_run(tmp_path / "sound")
    for file in (rows / "metrics.jsonl", kept / status.NAME, both / "metrics.jsonl", both / status.NAME):
        file.write_bytes(content)
    found = by_name(tmp_path)
    assert set(found) == {"rows", "kept", "both", "sound"}
    assert found["rows"].state == "running" and found["rows"].step == 3
    assert found["rows"].loss == (2.5 if b"2.5" in content else None)
    assert found["kept"].state == found["both"].state == "unknown" and found["kept"].loss == 2.5
    assert len(table(list(found.values()), 80)) == 5


def test_status_of_any_values(tmp_path: Path) -> None:
    """Values of a wrong type count as missing."""
    draw, values = random.Random(0), [None, True, -1, 1 << 80, 1e308, "", "x" * 5000, "\x1b[2J", [], {}, 3, "running"]
    names = ("state", "reason", "step", "steps", "host", "machine", "pid", "ticks", "since")
    for number in range(200):
        wrong = {name: draw.choice(values) for name in draw.sample(names, draw.randint(1, len(names)))}
        make_run(tmp_path / f"{number}", **wrong)
    found = find_runs(tmp_path)
    lines = table(found, 80)
    assert len(found) == 200 and len(lines) == 201
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    for run in found:
        json.dumps(run.as_row(), allow_nan=False)


def test_thousands_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2000):
        directory = tmp_path / f"sweep-{number % 7}" / f"lr={number}"
        make_run(directory, state="finished", since=1e9 + number)
    assert cli.main(["runs", str(tmp_path)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].partition("=")[2] for line in lines] == [str(number) for number in range(1999, -1, -1)]


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
def test_a_table_fits_the_terminal(tmp_path: Path, columns: int) -> None:
    long, reason = "a-run-with-a-name-that-is-longer-than-a-column/" + "x" * 100, "the reason is " + "long " * 60
    make_run(tmp_path / long, step=120_000, steps=500_000, state="failed", reason=reason)
    make_run(tmp_path / ("\N{CJK UNIFIED IDEOGRAPH-9577}" * 40), state="failed", reason="one\nline \x1b[31m")
    head, *lines = table(find_runs(tmp_path), columns)
    assert head.startswith("run ") and len(lines) == 2
    assert all(cell_len(line) <= columns and line.isprintable() for line in lines)
    assert all("  failed: " in line for line in lines) and "120000/500000" in "".join(lines)


def test_directories_without_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs"]) == 2
    assert "DIR = 'runs': must be a directory" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert cli.main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs below runs\n"
    assert cli.main(["runs", "--json"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["runs", "--watch", "0"]) == 2
    assert "--watch" in capsys.readouterr().err


def test_a_run_itself_is_listed(tmp_path: Path) -> None:
    (run,) = find_runs(make_run(tmp_path / "mine"))
    assert run.name == "mine"


def test_runs_of_earlier_versions(tmp_path: Path) -> None:
    """Which have no status: the configuration has the steps, and the lock names the process."""
    config = "run:\n  dir: x\ntrain:\n  precision: fp32\n  steps: 3\n  threads: 1\noptim:\n  steps: 7\n"
    for name, steps, owner in (("done", 3, ""), ("going", 9, os.getpid()), ("over", 9, 1 << 22)):
        run = make_run(tmp_path / name)
        (run / status.NAME).unlink()
        (run / "config.yaml").write_text(config.replace("steps: 3", f"steps: {steps}"))
        (run / ".lock").write_text(f"process {owner} on {socket.gethostname()}\n")
    found = by_name(tmp_path)
    assert {name: run.state for name, run in found.items()} == {
        "going": "running",
        "over": "unknown",
        "done": "finished",
    }
    assert found["over"].steps == 9


def test_a_status_that_cannot_be_written(job_dir: JobDirectory) -> None:
    """A warning in one line, and the training goes on."""
    (job_dir.directory / "unwritable" / status.NAME / "x").mkdir(parents=True)
    done = job_dir.train("unwritable", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: unwritable/status.json cannot be written (Is a directory)") == 1
    assert len(job_dir.rows("unwritable")) == 3 and job_dir.checkpoints("unwritable") == ["step-00000003"]


def test_a_run_that_goes_on(job_dir: JobDirectory, trained: Path) -> None:
    """Its state is that of the last attempt; a finished run that is started again keeps its time."""
    shutil.copytree(trained / "finished", job_dir.directory / "again")
    before = status.read(trained / "finished" / status.NAME)
    assert job_dir.train("again", "train.steps=3").returncode == 0
    assert status.read(job_dir.directory / "again" / status.NAME) == before
    assert job_dir.train("again", "train.steps=9", "train.time_limit=0.001").returncode == 75
    run = by_name(job_dir.directory)["again"]
    assert (run.state, run.reason, run.steps) == ("stopped", "at train.time_limit", 9)


def test_the_rank_that_failed_first_says_why(job_dir: JobDirectory) -> None:
    """A worker of one rank's data is killed; of the other's exchange, which fails then, nothing is told."""
    with job_dir.training("worker", "parallel.ranks=2", "parallel.sequence=1", "data.workers=1") as process:
        children = psutil.Process(ranks_of(process)[1]).children()
        (worker,) = (child for child in children if "resource_tracker" not in " ".join(child.cmdline()))
        worker.kill()
        assert finish(process, 90).returncode == 1
    found = by_name(job_dir.directory)["worker"]
    assert found.state == "failed" and found.reason.startswith("rank 1: a data worker failed: "), found
