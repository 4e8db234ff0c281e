"""`longreach doctor`: what it says of a machine on which a job would not run, or only badly."""

from __future__ import annotations

import json
import os
import socket
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from programs import longreach, python

from longreach.errors import InputError
from longreach.launch.commands.doctor import append_json
from longreach.launch.doctor import checks
from longreach.launch.doctor.checks import Finding


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def rendezvous(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[Finding]:
    """What is said of MASTER_ADDR and MASTER_PORT; without the line about this host's own name."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return list(checks._rendezvous())[1:]


def test_the_command_finds_what_is_wrong_and_appends_it_to_a_file(
    tmp_path: Path,
) -> None:
    """A master that does not exist; without a compiler, a job only runs more slowly."""
    (tmp_path / "fleet.jsonl").write_text('{"bad": 0}\n')
    code = "import os, sys; os.environ.update(MASTER_ADDR='no-such-host.invalid', PATH='/nowhere'); "
    code += "from longreach.launch.cli import main; sys.exit(main(['doctor', 'runs', '--json', 'fleet.jsonl']))"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("lines marked bad: 1; a job would not run here\n")
    before, line = (tmp_path / "fleet.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert before == '{"bad": 0}' and row["bad"] == 1 and row["host"] == socket.gethostname()
    (bad,) = [finding for finding in row["findings"] if finding["level"] == "bad"]
    assert bad["topic"] == "rendezvous" and "no such host; set a name" in bad["text"]
    topics = {finding["topic"] for finding in row["findings"]}
    assert {"torch", "operators", "memory", "interface", "links", "disk", "limits", "clock"} <= topics
    assert done.stdout.count("; not cpu (CPU kernels need a C++ compiler") == 6 and "install g++" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_file_that_cannot_be_written_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--json = .*: cannot be written: No such file"):
        append_json(str(tmp_path / "no" / "file"), {})


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        for given in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, {"MASTER_PORT": port}):
            (found,) = rendezvous(monkeypatch, **given)
            assert (found.level, found.topic) == ("bad", "port") and found.text.startswith(f"{port}: Address already")
    (found,) = rendezvous(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert found == Finding("ok", "port", f"{port} is free")


def test_a_master_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loopback network has addresses that no interface lists, where no process listens."""
    (found,) = rendezvous(monkeypatch, MASTER_ADDR="127.9.8.7", MASTER_PORT="1")
    assert found.level == "ok" and "reached; no process listens there yet" in found.text
    with socket.create_server(("127.9.8.7", 0)) as server:
        (found,) = rendezvous(monkeypatch, MASTER_ADDR="127.9.8.7", MASTER_PORT=str(server.getsockname()[1]))
    assert found.level == "ok" and "a process listens there" in found.text


@pytest.mark.parametrize("port", ["http", "0", "70000"])
def test_a_port_that_is_none(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    (found,) = rendezvous(monkeypatch, MASTER_PORT=port)
    assert found.level == "bad" and f"MASTER_PORT={port} is not a port" in found.text


@pytest.mark.parametrize(
    ("variable", "value", "level"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", "bad"),
        ("GLOO_SOCKET_IFNAME", "ib0,lo", "ok"),
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth", "bad"),
        ("NCCL_SOCKET_IFNAME", "ib", "bad"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", "ok"),
    ],
)
def test_interfaces_that_the_environment_names(variable: str, value: str, level: str) -> None:
    found = checks._named_interface(variable, value, ["eth0", "lo"])
    assert found.level == level and f"{variable}={value}" in found.text
    assert level == "ok" or found.text.endswith("name one of eth0, lo")


def test_every_interface_that_is_up_is_listed_with_its_addresses() -> None:
    listed = [finding.text for finding in checks._network() if finding.topic == "interface"]
    addresses = {row.address for rows in psutil.net_if_addrs().values() for row in rows if row.family == socket.AF_INET}
    assert any("127.0.0.1" in line for line in listed) and addresses
    assert all(any(address in line for line in listed) for address in addresses)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """Not even by root: a file is in its place. One that is not there yet is made by the job."""
    (tmp_path / "file").touch()
    (found,) = checks._disk(str(tmp_path / "file"))
    assert found.level == "bad" and f"{tmp_path}/file: nothing can be written (Not a directory)" in found.text
    (found,) = checks._disk(str(tmp_path / "later" / "runs"))
    assert found.level != "bad" and found.text.startswith(f"{tmp_path}: ") and "MiB/s" in found.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (found,) = checks._disk(str(tmp_path))
    assert found.level == "bad" and "Permission denied" in found.text


def test_versions_that_were_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text(f"# tested\ntorch==1.2.3\nomegaconf=={version('omegaconf')}\nwebdataset==9; python_version < '3'\n")
    monkeypatch.setattr(checks, "CONSTRAINTS", pins)
    found = {finding.topic: finding for finding in checks._software()}
    assert found["torch"].level == "note" and "tested with 1.2.3; pip install -c" in found["torch"].text
    assert found["omegaconf"].level == found["webdataset"].level == found["deepspeed"].level == "ok"


def test_few_open_files_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.resource, "getrlimit", lambda which: (256, 4096))
    (found,) = [finding for finding in checks._limits() if "open files" in finding.text]
    assert found == Finding("note", "limits", "256 open files per process; raise it: ulimit -n 4096")


def test_a_check_that_breaks_is_told() -> None:
    def _broken() -> None:
        raise OSError("a driver that hangs")

    (found,) = checks.findings_of(_broken)  # type: ignore[arg-type]
    assert found == Finding("bad", "broken", "OSError: a driver that hangs")


def test_help_names_the_directory_and_the_file(tmp_path: Path) -> None:
    said = longreach("doctor", "--help", cwd=tmp_path).stdout
    assert "DIR" in said and "--json FILE" in said
