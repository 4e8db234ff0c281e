"""What launch/ has for clusters: each file parsed, and run as far as one machine allows."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fake_slurm
import kubeflow_trainer_api.models as models
import psutil
import pytest
import yaml
from fault_helpers import JobDirectory, error_line, make_job_directory
from programs import LAUNCHERS, finish
from torch.distributed import run

from longreach.framework.config import load
from longreach.launch.arguments import Parser, parse
from longreach.launch.commands import train

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
MISTAKE, STOPPED = 2, 75
PATIENCE = 300.0  # seconds: each of these starts four processes that import much
TORCHRUN = ("--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--master-port")


@pytest.fixture(scope="module")
def job_dir(tmp_path_factory: pytest.TempPathFactory) -> JobDirectory:
    """A corpus and a config, in a directory with a space in its name."""
    directory = tmp_path_factory.mktemp("cluster") / "a project"
    directory.mkdir()
    return make_job_directory(directory)


def begin(job_dir: JobDirectory, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command with this Python's programs first in PATH, on CPUs, in a process group of its own."""
    known = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    known |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    known["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = {"cwd": job_dir.directory, "text": True, "start_new_session": True}
    return subprocess.Popen(words, env={**known, **environment}, **pipes, **started)


def free_port(first: int = 20000) -> int:
    """Below those that the system gives away, so that nobody takes it before it is needed."""
    for port in range(first + os.getpid() % 5000, first + 10000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


def ranks_of_node(node: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(node.pid).children()


def all_ended(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


# Shell scripts


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_shellcheck_finds_nothing(name: str) -> None:
    found = subprocess.run(["shellcheck", LAUNCH / name], capture_output=True, text=True, env=search_path())
    assert found.returncode == 0, found.stdout


def search_path() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_without_words_the_scripts_say_how_they_are_used(name: str) -> None:
    done = subprocess.run(["bash", LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == MISTAKE and done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


def test_slurm_sends_the_warning_to_the_script_alone() -> None:
    """And early enough; a requeued job must go on in the same output file."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    to_batch, number, seconds = re.split("[:@]", options["signal"])
    assert (to_batch, number) == ("B", "USR1") and int(seconds) >= 120
    assert options["ntasks-per-node"] == "1" and options["open-mode"] == "append" and "requeue" in options


@pytest.fixture
def slurm(job_dir: JobDirectory) -> Iterator[Any]:
    """Runs launch/slurm.sbatch as SLURM does, on two nodes."""
    commands = job_dir.directory / "slurm commands"
    if not commands.exists():
        fake_slurm.install(commands)
    for log in job_dir.directory.glob("*.log"):
        log.unlink()
    job, begun = str(free_port() - 20000), []

    def sbatch(*words: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(commands), search_path()["PATH"]])
        made = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2", "PATH": path}
        begun.append(begin(job_dir, "bash", str(LAUNCH / "slurm.sbatch"), *words, **made))
        return begun[-1]

    yield sbatch
    for process in begun:  # and its srun, which is none of its children
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def log_of(job_dir: JobDirectory, name: str) -> list[str]:
    path = job_dir.directory / f"{name}.log"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.timeout(900)
def test_slurm_starts_again_requeues_and_ends(job_dir: JobDirectory, slurm: Any) -> None:
    """A step fails: another one is tried. The time is nearly over: saved, and queued again. Then to the end."""
    words = ["endless.yaml", "run.dir=a run"]
    (job_dir.directory / "no-step").touch()
    process = slurm(*words)
    job_dir.wait(process, lambda: len(job_dir.rows("a run")) >= 2, PATIENCE)
    process.send_signal(signal.SIGUSR1)
    done = finish(process, PATIENCE)
    assert done.returncode == STOPPED, done.stderr
    job, attempts = zip(*(re.findall(r"--rdzv-id (\d+)-(\d)", line)[0] for line in log_of(job_dir, "srun")))
    assert attempts == ("0", "1") and log_of(job_dir, "scontrol") == [f"requeue {job[0]}"]
    last = job_dir.rows("a run")[-1]["step"]
    assert f"stopped after step {last}, on SIGUSR1" in done.stderr
    assert job_dir.checkpoints("a run") == [f"step-{last:08d}"]

    done = finish(slurm(*words, f"train.steps={last + 3}"), PATIENCE)
    assert done.returncode == 0, done.stderr
    assert f"resuming from a run/checkpoints/step-{last:08d}" in done.stderr
    assert [row["step"] for row in job_dir.rows("a run")] == list(range(1, last + 4))
    assert len(log_of(job_dir, "scontrol")) == 1 and len(log_of(job_dir, "srun")) == 3


def test_slurm_tries_a_mistake_once(job_dir: JobDirectory, slurm: Any) -> None:
    done = finish(slurm("endless.yaml", "run.dir=mistaken", "optim.lrr=1"), PATIENCE)
    assert done.returncode == MISTAKE, done.stderr
    assert "optim.lrr" in error_line(done)
    assert len(log_of(job_dir, "srun")) == 1 and not log_of(job_dir, "scontrol")


@pytest.mark.timeout(900)
def test_torchrun_restarts_over_two_nodes(job_dir: JobDirectory) -> None:
    """A rank of one node is killed: the ranks of both begin again from the newest checkpoint."""
    script, port = str(LAUNCH / "torchrun.sh"), free_port()
    words = [script, "2", "1", f"localhost:{port}", "endless.yaml", "run.dir=two", "checkpoint.every=5"]
    nodes = [begin(job_dir, *words, "train.steps=60") for _ in range(2)]
    try:
        job_dir.wait(nodes[0], lambda: bool(job_dir.checkpoints("two")), PATIENCE)
        ranks_of_node(nodes[1])[0].kill()
        for done in [finish(node, PATIENCE) for node in nodes]:
            assert done.returncode == 0, done.stderr
    finally:
        all_ended(*nodes)
    assert [row["step"] for row in job_dir.rows("two")] == list(range(1, 61))


def test_the_help_of_a_node_is_its_own(job_dir: JobDirectory) -> None:
    done = finish(begin(job_dir, "python", "-m", "longreach.launch.node", "--help"), 60)
    assert done.returncode == 0 and "CONFIG [key=value ...]" in done.stdout and "--rdzv-endpoint" in done.stdout
    assert re.search(r"^  75 +SIGTERM, SIGUSR1, Ctrl-C or train\.time_limit", done.stdout, re.MULTILINE)
    for foreign in ("training_script", "--max-restarts", "--no-python", "Torch Distributed Elastic"):
        assert foreign not in done.stdout


def test_the_help_of_links_is_a_usage(job_dir: JobDirectory) -> None:
    program = ("python", "-m", "longreach.launch.link_benchmark")
    done = finish(begin(job_dir, *program, "--help"), 60)
    assert done.returncode == 0 and "torchrun --nnodes 2" in done.stdout and "parallel.far" in done.stdout
    done = finish(begin(job_dir, *program), 60)
    assert done.returncode == MISTAKE
    error_line(done, "a link lies between two ranks", "longreach.launch.link_benchmark --help")


def test_a_node_refuses_restarts_of_its_own(job_dir: JobDirectory) -> None:
    done = finish(begin(job_dir, "python", "-m", "longreach.launch.node", "--max-restarts", "3", "endless.yaml"), 60)
    assert done.returncode == MISTAKE
    error_line(done, "--max-restarts = 3", "only 0")


# DeepSpeed


def test_deepspeed_reads_the_host_file() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(LAUNCH / "hosts.example")) == {"node-1": 8, "node-2": 8}


def test_deepspeed_and_train_understand_the_line_of_the_page() -> None:
    from deepspeed.launcher.runner import parse_args

    page = (ROOT / "docs" / "launch" / "deepspeed.md").read_text()
    (line,) = re.findall(r"^deepspeed --hostfile hosts --module .*$", page, re.MULTILINE)
    arguments = parse_args(shlex.split(line)[1:])
    assert (arguments.hostfile, arguments.module, arguments.user_script) == ("hosts", True, "longreach.launch.train")
    assert understood(arguments.user_args).config == "lm-1b-1m"


# Kubernetes


def understood(words: list[str]) -> Any:
    """The words of `longreach train`, parsed; what they set is in its config, too."""
    parser = Parser()
    train.add_arguments(parser)
    arguments = parse(parser, words)
    load(arguments.config, arguments.overrides)
    return arguments


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "kubernetes" / name).read_text())


def pods() -> list[Any]:
    jobset, job = manifest("jobset.yaml"), manifest("pytorchjob.yaml")
    templates = [one["template"]["spec"]["template"] for one in jobset["spec"]["replicatedJobs"]]
    templates += [one["template"] for one in job["spec"]["pytorchReplicaSpecs"].values()]
    return [pytest.param(template, id=name) for template, name in zip(templates, ("JobSet", "Master", "Worker"))]


def test_the_job_set_has_the_fields_of_its_interface() -> None:
    """A field that is none of it would be lost on the way."""
    given = manifest("jobset.yaml")
    read = models.JobsetV1alpha2JobSet.from_dict(given)
    assert read is not None and json.loads(read.to_json()) == given


@pytest.mark.parametrize("template", pods())
def test_a_pod_has_the_fields_of_its_interface(template: dict[str, Any]) -> None:
    read = models.IoK8sApiCoreV1PodTemplateSpec.from_dict(template)
    assert read is not None and json.loads(read.to_json()) == template


@pytest.mark.parametrize("template", pods())
def test_a_pod_fits_together(template: dict[str, Any]) -> None:
    spec = template["spec"]
    (container,) = spec["containers"]
    assert container["command"] == ["python", "-m", "longreach.launch.node"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in spec["volumes"]}
    assert mounts["shm"] == "/dev/shm" and spec["terminationGracePeriodSeconds"] >= 120

    config = load_config(words_of_train(container["args"]))
    assert config.run.dir.startswith(mounts["shared"] + "/") and config.data.cache.startswith(mounts["shared"] + "/")
    assert config.parallel.ranks == 2 * int(container["resources"]["limits"]["nvidia.com/gpu"])


def words_of_train(args: list[str]) -> list[str]:
    return [word for word in args if not word.startswith(TORCHRUN)]


def load_config(words: list[str]) -> Any:
    arguments = understood(words)
    return load(arguments.config, arguments.overrides)


def test_the_job_set_agrees_with_itself() -> None:
    """Nodes, ranks, the address of the first pod, its port, and what becomes of exit codes."""
    spec = manifest("jobset.yaml")["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    options = dict(word[2:].split("=", 1) for word in container["args"] if word.startswith("--"))
    assert int(options["nnodes"]) == job["parallelism"] == job["completions"] and replicated["replicas"] == 1
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    name, network = manifest("jobset.yaml")["metadata"]["name"], spec["network"]
    assert options["master-addr"] == f"{name}-{replicated['name']}-0-0.{network['subdomain']}"
    assert network["enableDNSHostnames"] and job["completionMode"] == "Indexed"
    assert [int(options["master-port"])] == [port["containerPort"] for port in container["ports"]]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [MISTAKE]}
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    (reaction,) = spec["failurePolicy"]["rules"]
    assert (reaction["action"], reaction["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_pytorch_job_agrees_with_itself() -> None:
    job = manifest("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]) == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    assert set(job["spec"]["runPolicy"]) == {"backoffLimit", "cleanPodPolicy"}
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        assert set(replica) == {"replicas", "restartPolicy", "template"} and replica["replicas"] == 1
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator gives others no environment"
        assert job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])


def test_a_pytorch_job_gives_torchrun_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operator's variables: the container's words are those of `longreach train` alone."""
    spec = manifest("pytorchjob.yaml")["spec"]
    given = {
        "NNODES": "2",
        "NPROC_PER_NODE": spec["nprocPerNode"],
        "NODE_RANK": "1",
        "MASTER_ADDR": "longreach-master-0",
    }
    for name, value in {**given, "MASTER_PORT": "23456"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    (container,) = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    arguments = run.parse_args(container["args"])
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.master_addr, arguments.master_port) == ("longreach-master-0", 23456)
    assert (arguments.rdzv_backend, arguments.training_script) == ("static", "lm-1b-1m")


@pytest.mark.timeout(900)
def test_a_drained_node_ends_all_pods_with_a_checkpoint(job_dir: JobDirectory) -> None:
    """The job set's own command, with another address, one rank per pod, and a small config; SIGTERM to one of two."""
    job = manifest("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    here = {"--master-addr": "127.0.0.1", "--master-port": str(free_port()), "--nproc-per-node": "1"}
    pods = []
    for node in range(2):
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(node)) for word in container["args"]]
        options = dict(word.split("=", 1) for word in words if word.startswith("--"))
        options_here = [f"{key}={value}" for key, value in {**options, **here}.items()]
        pods.append(begin(job_dir, *container["command"], *options_here, "endless.yaml", "run.dir=pods"))
    try:
        job_dir.wait(pods[0], lambda: len(job_dir.rows("pods")) >= 2, PATIENCE)
        pods[1].send_signal(signal.SIGTERM)
        for done in [finish(pod, PATIENCE) for pod in pods]:
            assert done.returncode == STOPPED, done.stderr
    finally:
        all_ended(*pods)
    assert job_dir.checkpoints("pods") == [f"step-{job_dir.rows('pods')[-1]['step']:08d}"]


def test_the_page_puts_the_image_into_the_manifests(tmp_path: Path) -> None:
    """By the line that stands there: the image that is pushed is the one that pods run."""
    page = (ROOT / "docs" / "launch" / "kubernetes.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^sed .+$", page, re.MULTILINE)
    (pushed,) = re.findall(r"^docker push (\S+)$", page, re.MULTILINE)
    manifests = shutil.copytree(LAUNCH / "kubernetes", tmp_path / "launch" / "kubernetes")
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    for path in manifests.iterdir():
        assert re.findall(r"^ +image: (\S+)$", path.read_text(), re.MULTILINE) == [f"{pushed}:latest"]


def test_what_an_image_does_not_need_is_left_out() -> None:
    """Of a clone that was worked in; no pattern reaches into a package, `framework/data` among them."""
    left_out = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")}
    assert {".git", ".venv", "runs", "data", "build", "dist", "**/__pycache__"} <= left_out
    assert [line for line in left_out if line.startswith("**")] == ["**/__pycache__"]


def test_the_image_holds_what_its_file_copies() -> None:
    """No engine builds it here: each path that it names is there, and it installs the tested set."""
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    words = [line.split()[0] for line in lines]
    assert words[0] == "FROM" and set(words) <= {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT"}
    assert "RUN pip install --no-cache-dir -c constraints.txt ." in lines and "COPY . ." in lines
    assert words.index("USER") < words.index("ENTRYPOINT") and (ROOT / "constraints.txt").is_file()
