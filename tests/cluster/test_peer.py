"""`longreach doctor --peer`, and runs on two hosts that differ: in storage, clocks, versions, data or ports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

import pytest
import torch
from fault_helpers import FAILED, MISTAKE, JobDirectory, error_line
from namespaces import Host
from programs import finish

import longreach

PORT = "29512"
NAMES = ("first-host", "second-host")
KEYS = ("step", "loss", "grad_norm", "lr")
Mounts = Sequence[Sequence[str]]
# A host that has a name of its own, and other files in place of some: both are gone with its last process.
OWN = """
import ctypes, json, os, socket, subprocess, sys
name, mounts, environment, *words = sys.argv[1:]
assert ctypes.CDLL(None).unshare(0x04000000) == 0  # CLONE_NEWUTS
socket.sethostname(name)
for mount in json.loads(mounts):
    subprocess.run(["mount", *mount], check=True)
os.execve(sys.executable, [sys.executable, *words], {**os.environ, **json.loads(environment)})
"""


def start_both(
    hosts: Sequence[Host],
    commands: Sequence[Sequence[str]],
    cwd: Path,
    mounts: Mounts = (),
    environment: Mapping[str, str] | None = None,
) -> list[CompletedProcess[str]]:
    """Run ``python COMMAND...`` on each of two hosts to its end.

    Args:
        mounts: arguments of ``mount``, on the second host.
        environment: more of it, on the second host.
    """
    given = [("[]", "{}"), (json.dumps(mounts), json.dumps(environment or {}))]
    processes: list[Popen[str]] = [
        host.start("-c", OWN, name, *more, *command, cwd=cwd)
        for host, name, more, command in zip(hosts, NAMES, given, commands, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(lambda process: finish(process, 120), processes)]


def doctor(
    hosts: Sequence[Host],
    peers: Sequence[str],
    *words: str,
    cwd: Path,
    wait: str = "20",
    mounts: Mounts = (),
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, list[str]]]:
    """What `longreach doctor --peer` says on each host: the lines of each topic, and the exit code."""
    commands = [["-m", "longreach", "doctor", *words, "--wait", wait, "--peer", f"{peer}:{PORT}"] for peer in peers]
    found = []
    for done in start_both(hosts, commands, cwd, mounts, environment):
        assert "Traceback" not in done.stderr, done.stderr
        rows: dict[str, list[str]] = {"exit": [str(done.returncode)]}
        for line in done.stdout.splitlines()[:-1]:
            level, topic, text = line.split(maxsplit=2)
            rows.setdefault(topic, []).append(f"{level} {text}")
        found.append(rows)
    return found


def train(
    hosts: Sequence[Host],
    job_dir: JobDirectory,
    run: str,
    *options: str,
    mounts: Mounts = (),
    environment: Mapping[str, str] | None = None,
) -> list[CompletedProcess[str]]:
    """`longreach.launch.node` on two hosts."""
    endpoint = f"{hosts[0].address}:{PORT}"
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, *options]
    command = ["-m", "longreach.launch.node", *words, "endless.yaml", f"run.dir={run}", "train.steps=2"]
    return start_both(hosts, [command, command], job_dir.directory, mounts, environment)


def private(place: Path) -> list[str]:
    """A mount that puts a file system of its own there."""
    return ["-t", "tmpfs", "tmpfs", str(place)]


def another_torch(directory: Path) -> list[str]:
    """A mount that puts another version of torch in place of the installed one."""
    installed = Path(torch.__file__).parent / "version.py"
    (directory / "version.py").write_text(f"{installed.read_text()}\n__version__ = '0.9.9'\n")
    return ["--bind", str(directory / "version.py"), str(installed)]


DROP = "tc filter add dev lr0 parent ffff: protocol ip u32 match ip protocol 6 0xff match u8 0x02 0x12 at 33 "
DROP += "action mirred egress redirect dev nowhere"  # SYN without ACK


@contextmanager
def firewall(host: Host) -> Iterator[None]:
    """A host that can call others, and that nobody can call: what would open a connection to it goes nowhere."""

    def inside(*words: str) -> None:
        subprocess.run(["ip", "netns", "exec", host.name, *words], check=True, capture_output=True, timeout=20)

    inside("ip", "link", "add", "nowhere", "type", "veth", "peer", "name", "nothing")
    try:
        inside("ip", "link", "set", "nowhere", "up")
        inside("tc", "qdisc", "add", "dev", "lr0", "ingress")
        try:
            inside(*DROP.split())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"the kernel cannot drop chosen packets: {error.stderr.decode().strip()}")
        yield
    finally:
        for words in (["tc", "qdisc", "delete", "dev", "lr0", "ingress"], ["ip", "link", "delete", "nowhere"]):
            subprocess.run(["ip", "netns", "exec", host.name, *words], capture_output=True, timeout=20)


HOLD = "import socket, sys; held = socket.create_server(('', int(sys.argv[1]))); print(flush=True); sys.stdin.read()"


@contextmanager
def taken_port(host: Host) -> Iterator[None]:
    """A program on the host that holds `PORT`, and says nothing to who connects."""
    command = ["ip", "netns", "exec", host.name, sys.executable, "-c", HOLD, PORT]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield
    finally:
        process.communicate(timeout=20)


@pytest.mark.parametrize("each_names_the_other", [False, True])
def test_70_and_77_two_hosts_between_which_all_is_well(
    hosts: Sequence[Host], tmp_path: Path, each_names_the_other: bool
) -> None:
    addresses = [host.address for host in hosts]
    peers = addresses[::-1] if each_names_the_other else addresses[:1] * 2
    found = doctor(hosts, peers, str(tmp_path / "runs"), cwd=tmp_path)
    for rows, other in zip(found, addresses[::-1], strict=True):
        assert rows["exit"] == ["0"], rows
        assert {"peer", "versions", "clock", "connect", "storage", "links"} < rows.keys()
        assert all(line.startswith("ok ") for topic in rows.keys() - {"exit"} for line in rows[topic]), rows
        assert all(word in rows["peer"][0] for word in (*NAMES, other, " on lr0"))
        assert re.search(r"latency [\d,]+ us, bandwidth [\d.]+ GB/s: parallel\.far=\[", rows["links"][0]), rows
    assert found[0]["connect"] == found[1]["connect"] and len(found[0]["connect"]) == 2
    assert not [*tmp_path.iterdir()]


def test_70_one_direction_blocked(hosts: Sequence[Host], tmp_path: Path) -> None:
    """Each names the other, so that they meet by the direction that is open."""
    first, second = (host.address for host in hosts)
    with firewall(hosts[0]):
        found = doctor(hosts, [second, first], cwd=tmp_path)
    for rows in found:
        assert rows["exit"] == ["1"]
        blocked, well = sorted(rows["connect"])
        assert (
            blocked.startswith(f"bad {second} -> {first}: TCP ports {PORT}, ") and "not reached (timed out)" in blocked
        )
        assert f"let TCP and UDP from {second} to the port of the rendezvous and" in blocked
        assert well.startswith(f"ok {first} -> {second}: TCP ports {PORT}, ")
        assert rows["links"] == ["note not measured, before each host reaches the other"]


def test_70_the_only_direction_that_is_tried_is_blocked(hosts: Sequence[Host], tmp_path: Path) -> None:
    """Both name the host whose firewall lets nobody in."""
    first, second = (host.address for host in hosts)
    with firewall(hosts[0]):
        waits, calls = doctor(hosts, [first] * 2, wait="6", cwd=tmp_path)
    assert waits["exit"] == calls["exit"] == ["1"]
    (line,) = waits["peer"]
    assert line.startswith(f"bad no host called {first}:{PORT} within 6 s") and "a firewall blocks the way" in line
    (line,) = calls["peer"]
    assert line.startswith(f"bad {second} -> {first}: port {PORT} not reached within 6 s (timed out)"), line


def test_77_the_doctor_names_a_port_that_is_taken(hosts: Sequence[Host], tmp_path: Path) -> None:
    """Both name the host where it is: this one says so at once, and the other one that a program answers."""
    with taken_port(hosts[0]):
        holds, calls = doctor(hosts, [hosts[0].address] * 2, wait="5", cwd=tmp_path)
    assert holds["exit"] == calls["exit"] == ["1"]
    (line,) = holds["port"]
    assert line.startswith(f"bad {PORT} of this host: Address already in use; end the process that holds it")
    assert "a program answers there, but not this one" in calls["peer"][0]


def test_77_a_run_names_a_port_that_is_taken(hosts: Sequence[Host], job_dir: JobDirectory) -> None:
    """On the leading host, by a program that says nothing."""
    endpoint = f"{hosts[0].address}:{PORT}"
    with taken_port(hosts[0]):
        leads, follows = train(hosts, job_dir, "held", "--rdzv-conf", "join_timeout=5")
    assert leads.returncode == follows.returncode == FAILED
    error_line(leads, f"did not meet at {endpoint}: this host leads and cannot listen on port {PORT} (Address already")
    error_line(follows, f"did not meet at {endpoint}: what listens there has not answered for 5 s as a launcher")
    assert not (job_dir.directory / "held").exists()


def test_73_and_75_the_doctor_compares_storage_and_versions(hosts: Sequence[Host], tmp_path: Path) -> None:
    """On the second host another file system lies at the run directory's place, torch is of another version, and the
    clock is a quarter of an hour behind.
    """
    runs, addresses = tmp_path / "runs", [host.address for host in hosts]
    runs.mkdir()
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    more: dict[str, Any] = {"mounts": [private(runs), another_torch(tmp_path)]}
    more["environment"] = {"PYTHONPATH": str(tmp_path)}
    found = doctor(hosts, addresses[:1] * 2, str(runs), cwd=tmp_path, **more)
    for rows, told in zip(found, ("behind", "ahead"), strict=True):
        assert re.match(rf"note that of [\d.]+ is (899|9\d\d) s {told}; set both by NTP", rows["clock"][0]), rows
    for rows, other in zip(found, addresses[::-1], strict=True):
        assert rows["exit"] == ["1"]
        (line,) = rows["storage"]
        assert line.startswith(f"bad {runs} is not the same on both hosts: ") and "put run.dir on storage" in line
        (line,) = rows["versions"]
        assert line.startswith("bad torch ") and f" on {other}; install the same on both hosts" in line
        assert "0.9.9" in line and torch.__version__ in line
    assert not [*runs.iterdir()]


def test_73_a_run_whose_directory_is_not_shared(hosts: Sequence[Host], job_dir: JobDirectory) -> None:
    """Refused on both hosts before the first step, and nothing is left behind."""
    place = job_dir.directory / "unshared"
    place.mkdir()
    for done in train(hosts, job_dir, "unshared/run", mounts=[private(place)]):
        assert done.returncode == MISTAKE, done.stderr
        line = error_line(done, "run.dir = 'unshared/run': on second-host is not the storage that rank 0 on first-host")
        assert line.endswith("sees; put run.dir on storage that all hosts share, at the same path on each")
    assert not [*place.iterdir()]


@pytest.mark.parametrize("what", ["code", "torch", "data"])
def test_75_a_run_names_the_host_that_differs(
    hosts: Sequence[Host], job_dir: JobDirectory, tmp_path: Path, what: str
) -> None:
    if what == "code":
        file = Path(longreach.__file__).parent / "kernels" / "scan.py"
        (tmp_path / "scan.py").write_text(f"{file.read_text()}\n")
        mount, expected = ["--bind", str(tmp_path / "scan.py"), str(file)], ["another code", "rank 0 on first-host"]
    elif what == "torch":
        mount = another_torch(tmp_path)
        expected = ["another version of torch (0.9.9)", f"rank 0 on first-host ({torch.__version__})"]
    else:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "a.txt").write_text("another text " * 1000)
        done = job_dir.pack(str(tmp_path / "source"), str(tmp_path / "packed"), "--valid-fraction", "0")
        assert done.returncode == 0, done.stderr
        mount = ["--bind", str(tmp_path / "packed"), str(job_dir.directory / "packed")]
        expected = ["another data set", "rank 0 on first-host"]
    for done in train(hosts, job_dir, f"another-{what}", mounts=[mount]):
        assert done.returncode == MISTAKE, done.stderr
        error_line(done, "rank 1 on second-host = ", *expected)
    assert not (job_dir.directory / f"another-{what}").exists()


# Read by every Python that finds it: a clock that is behind.
CLOCK = """
import datetime, time
of_system = time.time
time.time = lambda: of_system() - 900
class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) - datetime.timedelta(seconds=900)
Clock.__module__, Clock.__name__, Clock.__qualname__ = "datetime", "datetime", "datetime"
datetime.datetime = Clock
"""


def test_74_clocks_that_are_apart(hosts: Sequence[Host], job_dir: JobDirectory, tmp_path: Path) -> None:
    """The clock of the second host is a quarter of an hour behind: both train, with the losses of one host.

    torchrun itself would remove the second host, and the first one would train alone.
    """
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    for done in train(hosts, job_dir, "clocks", environment={"PYTHONPATH": str(tmp_path)}):
        assert done.returncode == 0, done.stderr
    done = job_dir.train("one-clock", "parallel.ranks=2", "train.steps=2")
    assert done.returncode == 0, done.stderr
    rows, expected = ([[row[key] for key in KEYS] for row in job_dir.rows(run)] for run in ("clocks", "one-clock"))
    assert rows == expected and len(rows) == 2
    assert not [*job_dir.directory.glob(".longreach-storage-*")]


def test_67_plain_torchrun_is_told_what_to_give(hosts: Sequence[Host], job_dir: JobDirectory) -> None:
    """Without --local-addr the ranks get the name of the leading host, which the other one takes for its own."""
    processes = []
    for number, host in enumerate(hosts):
        words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", f"{hosts[0].address}:{PORT}"]
        words += ["--rdzv-conf", f"is_host={1 - number}", "-m", "longreach.launch.train"]
        command = ["-m", "torch.distributed.run", *words, "endless.yaml", "run.dir=plain", "parallel.timeout=5"]
        processes.append(host.start(*command, cwd=job_dir.directory))
    with ThreadPoolExecutor(2) as pool:
        both = [*pool.map(lambda process: finish(process, 120), processes)]
    assert all(done.returncode == 1 for done in both)
    # The launcher of one host may end its rank before that says why, as the other host has ended.
    lines = [line for done in both for line in done.stderr.splitlines() if line.startswith("longreach: ")]
    assert lines, both
    for line in lines:
        assert "within 5 s" in line and "start with python -m longreach.launch.node, or give --local-addr" in line
    assert not (job_dir.directory / "plain").exists()
