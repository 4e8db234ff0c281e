"""Signals as systemd and Kubernetes send them: to all of a unit, to the first process of a container, to compilers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fault_helpers import JobDirectory, error_line, ranks_of
from programs import finish, start

STOPPED = 75
PATIENCE = 300.0  # seconds: Python starts in three processes and imports much


def unit(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a unit: the main one, then all that descend from it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        main = psutil.Process(process.pid)
        return [main, *main.children(recursive=True)]
    return []


def stop_unit(process: subprocess.Popen[str]) -> None:
    """As systemd does with KillMode=control-group: SIGTERM to the main process, then to all, and SIGCONT to each."""
    for one in [*unit(process)[:1], *unit(process)]:
        for number in (signal.SIGTERM, signal.SIGCONT):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)


@pytest.mark.timeout(900)
def test_76_a_unit_of_systemd(job_dir: JobDirectory) -> None:
    """Stopped twice within a second, with data workers: saved, exit code 75. Stopped with frozen ranks, which go on to
    save. SIGKILL to all, as after TimeoutStopSec: the next start goes on from the newest checkpoint.
    """
    words = ("parallel.ranks=2", "checkpoint.every=5", "data.workers=1")
    for frozen in (False, True):
        with job_dir.training("unit", *words) as process:
            seen = len(job_dir.rows("unit"))
            job_dir.wait(process, lambda seen=seen: len(job_dir.rows("unit")) > seen, PATIENCE)  # type: ignore[misc]
            if frozen:
                for number in ranks_of(process):
                    os.kill(number, signal.SIGSTOP)
            for _ in range(2):
                stop_unit(process)
                time.sleep(0.2)
            done = finish(process, PATIENCE)
        assert done.returncode == STOPPED, done.stderr
        last = job_dir.rows("unit")[-1]["step"]
        error_line(done, f"stopped after step {last}, on SIGTERM")
        assert job_dir.checkpoints("unit")[-1] == f"step-{last:08d}"
    with job_dir.training("unit", *words) as process:
        job_dir.wait(process, lambda: job_dir.rows("unit")[-1]["step"] > last, PATIENCE)
        everyone = unit(process)
        for one in everyone:
            one.kill()
        process.wait(30)
    assert not psutil.wait_procs(everyone[1:], 10)[1]
    saved = int(job_dir.checkpoints("unit")[-1].removeprefix("step-"))
    done = job_dir.train("unit", *words, f"train.steps={saved + 2}", timeout=PATIENCE)
    assert done.returncode == 0 and f"resuming from unit/checkpoints/step-{saved:08d}" in done.stderr, done.stderr
    assert [row["step"] for row in job_dir.rows("unit")] == list(range(1, saved + 3))


def test_76_a_signal_while_the_launcher_starts(job_dir: JobDirectory) -> None:
    """While Python imports what the launcher needs, before there are ranks."""
    process = start(
        "-m", "longreach", "train", "endless.yaml", "run.dir=soon", "parallel.ranks=2", cwd=job_dir.directory
    )
    job_dir.wait(process, lambda: takes(process, signal.SIGTERM))
    stop_unit(process)
    done = finish(process, 120)
    assert done.returncode == STOPPED, done.stderr
    error_line(done, "stopped on SIGTERM, with no step under way: run the same command again to go on")
    assert not (job_dir.directory / "soon").exists()


def takes(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (word,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(word, 16) & 1 << number - 1)


CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def in_container(job_dir: JobDirectory, *words: str) -> subprocess.Popen[str]:
    """Start ``python WORDS...`` as the first process of a container."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root makes a container, with unshare (util-linux)")
    enter = "import os, sys; os.execvp('unshare', sys.argv[1:])"
    return start("-c", enter, *CONTAINER, sys.executable, *words, cwd=job_dir.directory)


def first_process(container: subprocess.Popen[str]) -> psutil.Process:
    (number,) = ranks_of(container)
    return psutil.Process(number)


@pytest.mark.timeout(900)
def test_76_a_pod_of_kubernetes(job_dir: JobDirectory) -> None:
    """SIGTERM to the first process of a container, which is the launcher, again and again: exit code 75. SIGKILL to it,
    as after terminationGracePeriodSeconds, ends all; the next pod goes on.
    """
    options = ("--standalone", "--nnodes", "1", "--nproc-per-node", "2")
    words = ("-m", "longreach.launch.node", *options, "endless.yaml", "run.dir=pod", "checkpoint.every=5")
    pod = in_container(job_dir, *words)
    job_dir.wait(pod, lambda: len(job_dir.rows("pod")) >= 2, PATIENCE)
    launcher = first_process(pod)
    for _ in range(5):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    done = finish(pod, PATIENCE)
    assert done.returncode == STOPPED, done.stderr
    last = job_dir.rows("pod")[-1]["step"]
    error_line(done, f"stopped after step {last}, on SIGTERM")
    assert job_dir.checkpoints("pod")[-1] == f"step-{last:08d}"

    pod = in_container(job_dir, *words)
    job_dir.wait(pod, lambda: len(job_dir.rows("pod")) > last, PATIENCE)
    everyone = first_process(pod).children(recursive=True)
    first_process(pod).kill()
    assert finish(pod, 60).returncode != 0
    assert everyone and not psutil.wait_procs(everyone, 10)[1]
    saved = int(job_dir.checkpoints("pod")[-1].removeprefix("step-"))
    done = job_dir.train("pod", f"train.steps={saved + 2}", timeout=PATIENCE)
    assert done.returncode == 0 and f"resuming from pod/checkpoints/step-{saved:08d}" in done.stderr, done.stderr
    assert [row["step"] for row in job_dir.rows("pod")] == list(range(1, saved + 3))


TWICE = """
import os, signal, time
from longreach.framework.runtime import preemption

preemption.SAME_SECONDS = 0.1
with preemption.Preemption():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
print("goes on")
"""


def test_76_a_second_ctrl_c_in_a_container(job_dir: JobDirectory) -> None:
    """The first process of a container is not ended by the signals that end others."""
    done = finish(in_container(job_dir, "-c", TWICE), 120)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, ""), done


def compiles(process: subprocess.Popen[str]) -> bool:
    """Whether a compiler runs that a training has started."""
    for child in unit(process)[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith(("cc1plus", "g++", "c++", "clang")):
                return True
    return False


@pytest.mark.timeout(900)
@pytest.mark.parametrize("after", [0, 2], ids=["in the first step", "in a validation"])
def test_76_a_signal_while_kernels_are_compiled(
    job_dir: JobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """To all processes, compilers and their workers among them: they finish, the step is saved, exit code 75."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    run = f"compiled-{after}"
    words = ("train.compile=true", "train.validate_every=2", "model.mixers=[elementwise]", "model.depth=1")
    process = start("-m", "longreach", "train", "endless.yaml", f"run.dir={run}", *words, cwd=job_dir.directory)

    def is_at_work() -> bool:
        return (job_dir.directory / run).exists() and len(job_dir.rows(run)) >= after and compiles(process)

    job_dir.wait(process, is_at_work, PATIENCE)
    for _ in range(3):
        stop_unit(process)
        time.sleep(0.02)
    done = finish(process, PATIENCE)
    assert done.returncode == STOPPED, done.stderr
    last = job_dir.rows(run)[-1]["step"]
    error_line(done, f"stopped after step {last}, on SIGTERM")
    assert job_dir.checkpoints(run) == [f"step-{last:08d}"]
    assert "the portable implementation" not in done.stderr
