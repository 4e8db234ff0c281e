"""launch/slurm.sbatch under a real SLURM: a slurmctld, and a slurmd on each of two hosts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_helpers import JobDirectory

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
PROGRAMS = ("slurmctld", "slurmd", "sbatch")
STEPS = "train.steps=100"
KEYS = ("step", "loss", "grad_norm", "lr")
PATIENCE = 400.0  # seconds: Python starts in four processes and imports much
CONFIG = """
ClusterName=test
SlurmctldHost={own}({addresses[0]})
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/completed
KillWait=120
PartitionName=all Nodes={names[0]},{names[1]} Default=YES
"""


# Into a host, with an /etc/hosts of its own. `ip netns exec` could do so too, but hides the cgroups that slurmd needs.
ENTER = 'mount --bind "$0" /etc/hosts && host=$1 && shift && exec nsenter --net="/run/netns/$host" -- "$@"'


def enter(hosts_file: Path, host: str, *words: str) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", ENTER, str(hosts_file), host, *words]


@dataclass
class Slurm:
    """A SLURM that runs; ``host`` is where its commands are given."""

    host: str
    hosts_file: Path
    environment: dict[str, str]
    directory: Path

    def __call__(self, *words: str) -> str:
        command = enter(self.hosts_file, self.host, *words)
        settings: dict[str, Any] = {"env": self.environment, "cwd": self.directory, "timeout": 60, "text": True}
        done = subprocess.run(command, capture_output=True, **settings)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *words: str) -> str:
        """The number of a job that trains on both hosts, a rank each."""
        options = ("--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--output=%j.out")
        return self("sbatch", *options, str(SCRIPT), "endless.yaml", STEPS, *words).strip()

    def state(self, job: str) -> str:
        fields = dict(word.partition("=")[::2] for word in self("scontrol", "show", "job", job).split())
        return f"{fields['JobState']} {fields['ExitCode']} {fields['Restarts']}"

    def wait(self, job: str, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            if time.monotonic() > deadline:
                output = self.directory / f"{job}.out"
                said = output.read_text() if output.exists() else "no output"
                raise AssertionError(f"{self.state(job)}\n{self('squeue')}\n{said}")
            time.sleep(0.05)


@pytest.fixture
def slurm(hosts: Sequence[Any], job_dir: JobDirectory, tmp_path: Path) -> Iterator[Slurm]:
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"there is no {', '.join(missing)} (Debian: slurm-wlm)")
    names, addresses = [host.name for host in hosts], [host.address for host in hosts]
    own, known = os.uname().nodename.partition(".")[0], tmp_path / "hosts"
    config = CONFIG.format(own=own, names=names, addresses=addresses, directory=tmp_path)
    known.write_text(f"127.0.0.1 localhost {own}\n")
    for name, address in zip(names, addresses, strict=True):
        config += f"NodeName={name} NodeHostname={own} NodeAddr={address} CPUs=1\n"
        known.write_text(f"{known.read_text()}{address} {name}\n")
    (tmp_path / "slurm.conf").write_text(config)
    (tmp_path / "state").mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "HOME": str(tmp_path), "SLURM_CONF": str(tmp_path / "slurm.conf"), "LANG": "C.UTF-8"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    made = Slurm(names[0], known, environment, job_dir.directory)
    commands = [(names[0], "slurmctld", "-D"), *((name, "slurmd", "-D", "-N", name) for name in names)]
    daemons = []
    try:
        for number, (host, *words) in enumerate(commands):
            (tmp_path / f"spool-{host}").mkdir(exist_ok=True)
            with (tmp_path / f"{words[0]}-{number}.log").open("w") as log:
                daemons.append(subprocess.Popen(enter(known, host, *words), env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + 60
        while made("sinfo", "-h", "-o", "%D%t").strip() != "2idle":
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
                raise AssertionError("".join(path.read_text() for path in tmp_path.glob("*.log")))
            time.sleep(0.5)
        yield made
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)
        for process in psutil.process_iter():  # steps that are left
            if process.name() == "slurmstepd" and process.environ().get("SLURM_CONF") == environment["SLURM_CONF"]:
                process.kill()


def rank(run: str) -> psutil.Process:
    """One of the ranks that train in this run directory."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "longreach.launch.train" in words and f"run.dir={run}" in words:
            return process
    raise AssertionError(f"no rank of {run}")


def is_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a process has yet to take a signal."""
    (word,) = (line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "ShdPnd" in line)
    return bool(int(word.split()[1], 16) & 1 << number - 1)


@pytest.mark.timeout(1800)
def test_76_cancelled_stopped_by_the_limit_and_requeued(slurm: Slurm, job_dir: JobDirectory) -> None:
    """`scancel` (SIGTERM to every process, twice): saved within the grace. The same job again: its time limit is near,
    it saves, is queued again and trains to the end; every step's loss is that of an undisturbed run.
    """
    job = slurm.submit("run.dir=limited")
    slurm.wait(job, lambda: len(job_dir.rows("limited")) >= 2)
    slurm("scancel", job)
    slurm.wait(job, lambda: "COMPLETING" not in slurm.state(job) and not slurm("squeue", "-h", "-j", job).strip())
    said, last = (job_dir.directory / f"{job}.out").read_text(), job_dir.rows("limited")[-1]["step"]
    assert f"stopped after step {last}, on SIGTERM" in said, said
    assert job_dir.checkpoints("limited") == [f"step-{last:08d}"]

    job = slurm.submit("run.dir=limited")
    slurm.wait(job, lambda: len(job_dir.rows("limited")) > last)
    frozen = rank("limited")
    frozen.send_signal(signal.SIGSTOP)  # else it could be at its end before SLURM looks at the time
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=4")  # less than the 300 s of --signal are left
    slurm.wait(job, lambda: is_pending(frozen, signal.SIGUSR1))
    frozen.send_signal(signal.SIGCONT)
    slurm.wait(job, lambda: slurm.state(job).startswith("PENDING"))
    print(slurm("squeue"))
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert job_dir.rows("limited")[-1]["step"] < 100
    slurm.wait(job, lambda: slurm.state(job).startswith("COMPLETED"))
    assert slurm.state(job) == "COMPLETED 0:0 1"
    completed = slurm("sacct", "--completion")
    print(completed)
    states = [words[-2] for words in map(str.split, completed.splitlines()) if words[:1] == [job]]
    assert states == ["PENDING", "COMPLETED"], completed
    said = (job_dir.directory / f"{job}.out").read_text()
    assert "on SIGUSR1; a checkpoint of step" in said and "resuming from limited/checkpoints" in said, said

    done = job_dir.train("undisturbed", "parallel.ranks=2", STEPS, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    rows = [[[row[key] for key in KEYS] for row in job_dir.rows(run)] for run in ("limited", "undisturbed")]
    assert rows[0] == rows[1] and len(rows[1]) == 100
