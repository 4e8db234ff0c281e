"""`longreach bench network`: a small one of two real hosts, and what it makes of figures."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from longreach.errors import InputError
from longreach.launch.bench import host
from longreach.launch.bench import network as bench
from longreach.launch.cli import main
from longreach.parallel.cost import Link
from longreach.parallel.recorder import Event

LINK = {"latency": 1e-4, "bandwidth": 12.5e6}


class Done(NamedTuple):
    code: int
    said: str
    report: dict[str, Any]


def run(out: Path, *words: str) -> Done:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["bench", "network", "--out", str(out), *words])
    assert (out / "network-cpu.json").is_file(), said.getvalue()
    return Done(code, said.getvalue(), json.loads((out / "network-cpu.json").read_text()))


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("bench")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two methods train 256 tokens over a link of 20 Mbit/s."""
    if why := bench.why_not():
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "METHODS": {name: bench.METHODS[name] for name in ("elementwise", "ring attention")},
            "RATES": {"loopback": 0.0, "20 Mbit/s": 2e7},
            "TRAIN": ["model.width=64"],
            "SHORTEST": 256,
            "MOST": 2,
            "ERROR_LIMIT": 1e9,
            "HOST_SECONDS": 120.0,
        }.items():
            patch.setattr(bench, name, value)
        return run(tmp_path_factory.mktemp("bench"), "--longest", "256")


def test_two_hosts_train_over_each_link(done: Done) -> None:
    assert done.code == 0, done.said
    rows = {(row["method"], row["link"]): row for row in done.report["rows"]}
    assert len(rows) == 4 and all(row["steps"] == 2 and row["seconds"] > 0 for row in rows.values())
    for method in ("elementwise", "ring attention"):
        model = done.report["models"][method]
        free, limited = model["links"].values()
        assert limited["bandwidth"] == pytest.approx(2.5e6 * host.PAYLOAD) and limited["bandwidth"] < free["bandwidth"]
        assert rows[method, "loopback"]["of_loopback"] == 1.0 > rows[method, "20 Mbit/s"]["of_loopback"]
        # Gradients in 16 bits, once for both sequences of the step; a few numbers more are summed over ranks.
        reduced = rows[method, "loopback"]["bytes"]["reduction"]
        assert 0 <= reduced - 2 * model["num_parameters"] < 1000
    half, depth, sequences = 64 * 128 * 4, 2, 1
    ring = rows["ring attention", "loopback"]["bytes"]
    # k and v forward and again backward, and their gradients around the whole ring.
    assert (ring["ring"], ring["ring_grads"]) == (sequences * depth * 4 * half, sequences * depth * 4 * half)
    assert 0 < rows["elementwise", "loopback"]["bytes"]["scan"] < half


def test_hosts_are_gone_afterwards(done: Done) -> None:
    assert namespaces() == set()


def test_a_host_that_fails_says_why_and_ends_the_other() -> None:
    if why := bench.why_not():
        pytest.skip(why)
    job = host.Job(["model.vocab=256", "parallel.ranks=2", "model.width=-1"], [256], bench.RATES, "lr0", 1.0, 1)
    failed = pytest.raises(InputError, match=r"exit code of host \d, mine = 1: .*it said: .*model\.width")
    with failed, bench.two_hosts() as hosts:
        bench.steps(hosts, "mine", job)
    assert namespaces() == set()


def given(tokens: int, seconds: Sequence[float], predicted: float = 1.0) -> list[host.Found]:
    one = host.Found(tokens, 2, "", 1.0, 0.5, 0.4, {"scan": 10, "reduction": 100}, 3, 1.0, 2)
    return [
        replace(one, link=link, seconds=took, predicted_seconds=predicted * took)
        for link, took in zip(bench.RATES, seconds, strict=True)
    ]


@pytest.mark.parametrize(
    "slowest, predicted, told",
    [
        (1.4, 1.24, []),
        (1.5, 1.0, ["elementwise, tokens/s at 32,768 tokens over 100 Mbit/s, of loopback: 0.667, wanted >= 0.7"]),
        (1.4, 0.7, ["error of the cost model", "0.3, wanted <= 0.25"]),
    ],
)
def test_a_broken_bound_is_told_in_one_line(
    slowest: float, predicted: float, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "two_hosts", lambda: contextlib.nullcontext(["one", "other"]))

    def steps(hosts: list[str], method: str, job: host.Job) -> Any:
        ours = method in bench.OURS
        assert job.lengths == [8192, 32_768, 131_072][: 3 if ours else 2]
        took = [1.0, 1.1, slowest if ours else 9.0]
        return 1000, dict.fromkeys(bench.RATES, LINK), [f for n in job.lengths for f in given(n, took, predicted)]

    monkeypatch.setattr(bench, "steps", steps)
    done = run(tmp_path)
    assert done.code == bool(told), done.said
    lines = [line for line in done.said.splitlines() if line.startswith("longreach: ")]
    assert len(lines) == bool(told) and all(word in lines[0] for word in told)
    assert len(done.report["rows"]) == 3 * (3 + 3 + 2 + 2)
    assert (tmp_path / "network-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_is_predicted_from_its_exchanges() -> None:
    link, both = Link(0.0, 100.0), (0, 1)
    scan, reduced = (
        Event("send", both, 50, "0", "scan"),
        [Event("all_reduce", both, 300), Event("all_reduce", both, 60)],
    )
    received = Event("receive", both, 0, "0", "scan")
    # All-reduces of two ranks send what they reduce once; the last backward pass goes on beside them.
    assert host.predict([6.0, 4.0], [[scan, *reduced], [received, *reduced]], link, 1, 1) == pytest.approx(
        6.0 + 0.5 + (3.6 - 4.0 * host.BACKWARD)
    )
    assert host.predict([60.0, 60.0], [[scan, *reduced]] * 2, link, 1, 1) == pytest.approx(60.0 + 0.5 + 0.6)
    ring = [Event("send", both, 300, "0", "ring"), Event("send", both, 300, "0", "ring_grads")]
    assert host.predict([3.0, 3.0], [ring] * 2, link, 1, 1) == pytest.approx(3.0 + (3.0 - 1.0) + 3.0)


def test_without_root_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench.os, "geteuid", lambda: 1000)
    assert main(["bench", "network", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("longreach: bench = 'network': needs two network namespaces: only root") and "run it" in line
    assert not (tmp_path / "out").exists()


def test_too_short_a_sequence_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["bench", "network", "--out", str(tmp_path), "--longest", "8191"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--longest = 8191: at least 8192" in line
