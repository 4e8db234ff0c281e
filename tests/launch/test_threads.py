"""Threads: as many as the work is worth, as the user says where he does, and asleep while they wait."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from programs import Job, python

from longreach.framework.config import load
from longreach.framework.runtime.memory import tokens_at_a_time
from longreach.framework.runtime.process import ELEMENTS_PER_THREAD, LOCAL_RUN_ID, set_num_threads
from longreach.launch.cli import main
from longreach.launch.process import MALLOC, prepare_libraries


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a machine whose environment says nothing about threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("given", "elements", "environment", "expected"),
    [
        (0, 1e9, {}, 8),
        (0, 1e9, {"LOCAL_WORLD_SIZE": "2"}, 4),
        (0, 1e9, {"LOCAL_SIZE": "16"}, 1),
        (0, 5 * ELEMENTS_PER_THREAD, {}, 5),
        (0, 256 * 128, {}, 1),
        (3, 1, {"OMP_NUM_THREADS": "6"}, 3),
        (0, 1, {"OMP_NUM_THREADS": "6"}, 6),
        (0, 1e9, {"OMP_NUM_THREADS": "2,1"}, 2),
        (0, 1e9, {"OMP_NUM_THREADS": "1"}, 1),
        (0, 1e9, {"OMP_NUM_THREADS": "1", "LOCAL_SIZE": "2"}, 1),
        (0, 1e9, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, 4),
        (0, 1e9, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": LOCAL_RUN_ID}, 1),
    ],
)
def test_threads_are_the_users_or_those_that_the_work_is_worth(
    given: int, elements: float, environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun sets ``OMP_NUM_THREADS=1`` by itself if it is not set."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_num_threads(given, elements)
    assert torch.get_num_threads() == expected


def test_work_is_what_a_rank_processes_at_a_time() -> None:
    words = ["data.seq_len=8192", "parallel.ranks=2", "data.batch_size=6", "train.micro_batch_size=3"]
    assert tokens_at_a_time(load("quickstart", words)) == 3 * 4096
    assert tokens_at_a_time(load("quickstart", [*words, "parallel.block_len=1024"])) == 3 * 1024
    assert tokens_at_a_time(load("quickstart", [*words, "parallel.block_len=100000"])) == 3 * 4096


def test_commands_choose_threads_or_take_those_given(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One decodes a token of a small model; a whole document is worth more than one."""
    monkeypatch.chdir(job.directory)
    torch.set_num_threads(5)
    assert main(["generate", "runs/tiny", "--prompt", "halo", "--tokens", "2"]) == 0
    assert torch.get_num_threads() == 1
    assert main(["generate", "runs/tiny", "--prompt", "halo", "--tokens", "2", "--threads", "3"]) == 0
    assert torch.get_num_threads() == 3
    assert main(["evaluate", "runs/tiny", "--batches", "1"]) == 0
    assert torch.get_num_threads() == 8
    assert main(["evaluate", "runs/tiny", "--batches", "1", "--threads", "2"]) == 0
    assert torch.get_num_threads() == 2
    words = ["parallel.ranks=1", f"run.dir={tmp_path}/run", "train.steps=1", "train.validate_batches=1"]
    assert main(["train", "tiny.yaml", *words, "--threads", "4"]) == 0
    assert torch.get_num_threads() == 4 and "threads: 4" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.parametrize(
    "words", [["generate", "x", "--prompt", "a"], ["evaluate", "x"], ["predict", "x", "--source", "y"]]
)
def test_no_threads_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--threads", "0"]) == 2
    assert capsys.readouterr().err == "longreach: --threads = 0: at least 1\n"


@pytest.mark.parametrize(
    ("program", "environment", "policy"),
    [
        ("longreach", {}, "PASSIVE"),
        ("longreach", {"OMP_WAIT_POLICY": "active"}, "ACTIVE"),
        ("longreach.launch.train", {}, "PASSIVE"),
    ],
)
def test_openmp_waits_asleep_unless_the_user_says_otherwise(
    program: str, environment: dict[str, str], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenMP's library tells when it is loaded."""
    for name, value in {**environment, "OMP_DISPLAY_ENV": "true"}.items():
        monkeypatch.setenv(name, value)
    words = ["generate", "nothing", "--prompt", "a"] if program == "longreach" else ["nothing.yaml"]
    done = python("-m", program, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert [line.split("'")[1] for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line] == [policy]


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_other_words_on_waiting_are_the_users_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    prepare_libraries()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.delenv(name)
    prepare_libraries()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


FAULTS = """
import resource
from longreach.launch.process import MALLOC, prepare_libraries
prepare_libraries()
import torch
faults = []
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(7 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[-8:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
@pytest.mark.parametrize("environment, kept", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_for_the_next_tensor(
    environment: dict[str, str], kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """28 MiB, whose pages of 4 KiB are 7,168; unless the environment decides.

    The first few are new memory: an aligned block leaves small pieces beside it, which glibc (before 2.38) joins with
    it only when its per-thread cache of small blocks is full, at 7 of a size.
    """
    for name in MALLOC:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "THP_MEM_ALLOC_ENABLE": "0"}.items():
        monkeypatch.setenv(name, value)
    done = python("-c", FAULTS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) < 1000) == kept


def test_a_prompt_may_begin_with_an_at_sign(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job.directory)
    assert main(["generate", "runs/tiny", "--prompt", "@@halo", "--tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("@halo")
    assert main(["generate", "runs/tiny", "--prompt", "@@", "--tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("@")
    assert main(["generate", "runs/tiny", "--prompt", "@halo", "--tokens", "1"]) == 2
    assert "cannot be read" in capsys.readouterr().err
