"""Every command in a ``sh`` block of README and of docs/ is run, page by page, in the order in which it stands there.

A page's commands share a directory that holds what the pages speak of: texts, a run, a config of the page. They run as
they stand, but for what the tables below change: these are all the substitutions there are. A command of a program that
is not known here fails: "no test runs this command".
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from deepspeed_world import run_world
from PIL import Image
from programs import python

from longreach.framework.config import CONFIGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Of `longreach train`: what is set to these values, whether the command names it or not ...
SMALL = {
    "data.seq_len": "128",
    "model.width": "16",
    "model.depth": "2",
    "model.chela.heads": "2",
    "model.feedforward_kernel.heads": "2",
    "optim.warmup_steps": "1",
    "train.validate_batches": "1",
    "monitor.sample_len": "4",
    "data.valid_fraction": "0.1",
    "monitor.plot": "false",
}
# ... where the command names it ...
SMALLER = {"parallel.block_len": "32", "monitor.profile_steps": "[1,2]", "data.curriculum": "[[32,1]]"}
# ... and where it does not. (`cpython` is 30 MB of text.) train.steps is 2 more than the run has, so that each trains.
DEFAULT = {"data.source": "my-texts", "parallel.ranks": "1", "parallel.sequence": "0"}
# The same of a dry run, which has no other ranks and reads no data.
PLANNED = {"model.width": "24", "model.depth": "2", "model.chela.heads": "2", "data.seq_len": "1024"}
PLANNED |= {"train.precision": "fp32"}
# Trainings of a task, which bring their data: nothing but train.steps.
TASKS = [path.stem for path in CONFIGS.glob("*.yaml") if "\ntask:" in path.read_text(encoding="utf-8")]
# Words of launchers that name many nodes, and what follows each: this machine, with two ranks.
ONE_NODE = {
    "--nnodes": ["--nnodes", "1"],
    "--nproc-per-node": ["--nproc-per-node", "2"],
    "--rdzv-endpoint": ["--rdzv-endpoint", "127.0.0.1:0"],
}
# What ends a program that would serve for ever, or run all tests.
APPENDED = {"tensorboard": ["--inspect"], "pytest": ["tests/test_layout.py"]}
MODULES = {"torchrun": "torch.distributed.run", "tensorboard": "tensorboard.main", "pytest": "pytest"}
# Commands that another test runs.
ELSEWHERE = {
    r"make docs": "tests/test_docs.py::test_the_reference_is_built",
    r"deepspeed --hostfile hosts --module longreach\.launch\.train lm-1b-1m --deepspeed_config my_zero\.json": (
        "tests/launch/test_launchers.py::test_deepspeed"
    ),
    r"longreach doctor": "tests/launch/test_cli.py::test_doctor_finds_this_machine_well",
    r"longreach doctor /shared/runs --peer .*": (
        "tests/cluster/test_peer.py::test_70_and_77_two_hosts_between_which_all_is_well"
    ),
    r"longreach doctor \. --json .*": (
        "tests/launch/test_doctor.py::test_the_command_finds_what_is_wrong_and_appends_it_to_a_file"
    ),
    r"export NCCL_SOCKET_IFNAME=.*": "tests/launch/test_doctor.py::test_interfaces_that_the_environment_names",
    r"sbatch .*launch/slurm\.sbatch .*": "tests/launch/test_cluster.py::test_slurm_starts_again_requeues_and_ends",
    r"launch/torchrun\.sh .*|wait": "tests/launch/test_cluster.py::test_torchrun_restarts_over_two_nodes",
    r"python -m longreach\.launch\.node --nnodes 2 .*": (
        "tests/cluster/test_hosts.py::test_67_two_hosts_train_as_one_does"
    ),
    r"cp launch/hosts\.example hosts": "tests/launch/test_cluster.py::test_deepspeed_reads_the_host_file",
    r"deepspeed --hostfile hosts --module .* run\.dir=.*": (
        "tests/launch/test_cluster.py::test_deepspeed_and_train_understand_the_line_of_the_page"
    ),
    r"deepspeed --hostfile hosts --no_ssh .*": "tests/launch/test_nodes.py::test_the_deepspeed_launcher_over_two_nodes",
    r"sed .* launch/kubernetes/.*": "tests/launch/test_cluster.py::test_the_page_puts_the_image_into_the_manifests",
    # No test runs these two: the files that they take are looked at.
    r"docker .*": "tests/launch/test_cluster.py::test_the_image_holds_what_its_file_copies",
    r"kubectl .*": "tests/launch/test_cluster.py::test_the_job_set_has_the_fields_of_its_interface",
    r"longreach verify extend .*": "tests/framework/test_pretrained.py::test_verify_compares_the_parts_of_its_layers",
    r"longreach verify .*": "tests/launch/test_verify.py::test_a_broken_mixer_is_found",
    r"longreach lr .*": "tests/launch/test_lr.py::test_the_command_writes_a_run_of_its_own_with_the_losses_of_one_rank",
    r"longreach train .*optim\.lr=1e-3,4e-3.*": (
        "tests/launch/test_sweep.py::test_a_sweep_goes_on_past_a_failed_run_and_does_not_repeat_finished_ones"
    ),
    r"longreach bench decode": "tests/launch/test_bench_decode.py::test_states_stay_and_caches_grow",
    r"python benchmarks/tasks\.py .*": "tests/test_benchmark_tasks.py::test_a_sweep_that_is_stopped_goes_on",
    r"longreach train .*train\.compile=true.*": "tests/framework/test_compile.py::test_training_with_compile",
}


def commands_of(page: Path) -> list[str]:
    """The lines of a page's ``sh`` blocks, without comments; a line that ends in a backslash goes on."""
    blocks = re.findall(r"^```sh[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for words in (shlex.split(line, comments=True) for line in lines) if words]


def run(command: str, place: Path) -> tuple[int, str]:
    """Run a command in ``place``; returns its exit code and what it said."""
    program, *words = shlex.split(command)
    if program == "make":
        return run(made_by(words[0], place), place)
    if program == "longreach":
        words = small(words, place) if words[0] == "train" else words
        ranks = next((int(word.partition("=")[2]) for word in words if word.startswith("parallel.ranks=")), 1)
        return run_world(_longreach, ranks, words, str(place), ranks, timeout=300)[0]
    if program == ".":  # of the environment that runs the tests
        done = subprocess.run(
            ["bash", "-c", f". {shlex.quote(sys.prefix)}/bin/activate && longreach --version"],
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr
    if program == "python" and words[0].startswith("docs/examples/"):
        done = python(*words, cwd=place, timeout=300)
        return done.returncode, done.stdout + done.stderr
    if program not in MODULES:
        raise LookupError(f"no test runs this command: {command}")
    words = [*one_node(words, place), *APPENDED.get(program, [])]
    done = python("-m", MODULES[program], *words, cwd=ROOT if program == "pytest" else place, timeout=300)
    return done.returncode, done.stdout + done.stderr


def _longreach(rank: int, words: list[str], place: str, ranks: int) -> tuple[int, str]:
    """``longreach WORDS...`` in a process that is forked from one which has imported all already."""
    from longreach.launch import cli

    os.chdir(place)
    if ranks > 1 and "--dry-run" not in words:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, said.getvalue()


def small(words: Iterable[str], place: Path) -> list[str]:
    """The words of a training in ``place``, or of a plan, with the settings of the tables."""
    words = list(words)
    config = next(word for word in words if word != "train" and not word.startswith("-"))
    directories = [word.partition("=")[2] for word in words if word.startswith("run.dir=")]
    metrics = place / (directories or [f"runs/{Path(config).stem}"])[-1] / "metrics.jsonl"
    steps = 2 + (len(metrics.read_text().splitlines()) if metrics.exists() else 0)
    if any(word in TASKS for word in words[:2]):
        shape = [f"{key}={value}" for key, value in SMALL.items() if key.startswith("model.")]
        from_run = any(word.startswith("model.init_from=") for word in words)  # its model is as small
        return [*words, *(shape if from_run else []), f"train.steps={steps}", "optim.warmup_steps=1"]
    given = {word.partition("=")[0] for word in words if "=" in word}
    fixed = PLANNED if "--dry-run" in words else SMALL | {"train.steps": str(steps)}
    if given & {"model.pretrained", "model.architecture"}:  # which have a shape of their own
        fixed = {key: value for key, value in fixed.items() if not key.startswith("model.")}
    always = fixed | {key: value for key, value in SMALLER.items() if key in given}
    more = {} if "--dry-run" in words else {key: value for key, value in DEFAULT.items() if key not in given}
    kept = [word for word in words if word.partition("=")[0] not in always]
    return [*kept, *(f"{key}={value}" for key, value in (always | more).items())]


def one_node(words: list[str], place: Path) -> list[str]:
    """The words of a launcher for this machine; those of the training behind them made small."""
    found = []
    for before, word in zip(["", *words], words):
        if word in ONE_NODE:
            found += ONE_NODE[word]
        elif before not in ONE_NODE:
            found.append(word)
    if "longreach.launch.train" not in found:
        return found
    ours = found.index("longreach.launch.train") + 1
    return [*found[:ours], *small(found[ours:], place)]


def made_by(target: str, place: Path) -> str:
    """The last command of a make target, as a clone that is set up would run it."""
    clone = place / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, clone)
    for name, text in {"made-in": str(clone.resolve()), "installed-run": "", "installed-dev": ""}.items():
        (clone / ".venv" / name).write_text(text)
    python = clone / ".venv" / "bin" / "python"
    python.unlink(missing_ok=True)
    python.symlink_to(shutil.which("true") or "/bin/true")
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    plan = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return plan.stdout.splitlines()[-1].partition(" -m ")[2]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of; ``runs/quickstart`` was trained on two ranks."""
    place, draw = tmp_path_factory.mktemp("commands"), random.Random(0)
    (place / "my-texts").mkdir()
    words = ["span", "carry", "halo", "scan", "relay"]
    for number in range(20):
        text = " ".join(draw.choice(words) for _ in range(120))
        (place / "my-texts" / f"{number:02}.txt").write_text(text)
    (place / "book.txt").write_text(" ".join(draw.choice(words) for _ in range(200)))
    record = ">chr1\n" + "".join(draw.choice("ACGT") for _ in range(4000)) + "\n"
    (place / "genome.fna.gz").write_bytes(gzip.compress(record.encode()))
    prices = "".join(f"2026-01-{day},{draw.random()},{draw.random()}\n" for day in range(400))
    (place / "prices.csv").write_text(f"date,a,b\n{prices}")
    for level, folder in ((60, "photos/cats"), (190, "photos/dogs"), (190, "new-photos")):
        (place / folder).mkdir(parents=True)
        for number in range(20 if "/" in folder else 2):
            Image.effect_noise((20, 20), 40).point(lambda x, level=level: x - 128 + level).save(
                place / folder / f"{number:02}.png"
            )
    for name, liked in (("good", "span carry"), ("bad", "halo relay")):
        (place / "reviews" / name).mkdir(parents=True)
        for number in range(10):
            (place / "reviews" / name / f"{number}.txt").write_text(" ".join(draw.choices(liked.split(), k=50)))
    (place / "README.md").write_text(" ".join(draw.choice(words) for _ in range(100)))
    shutil.copytree(ROOT / "docs" / "examples", place / "docs" / "examples")
    code, said = run("python docs/examples/tiny_model.py my-model", place)
    assert code == 0, said
    code, said = run("longreach train quickstart parallel.ranks=2", place)
    assert code == 0, said
    return place


@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.cuda.is_available(), reason="launchers would give the ranks GPUs")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands_of(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_command_of_a_page_runs(page: Path, prepared: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(prepared, place)
    for name, text in re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        (place / name).write_text(text)
    for command in commands_of(page):
        if not any(re.fullmatch(pattern, command) for pattern in ELSEWHERE):
            code, said = run(command, place)
            assert code == 0, f"{page.name}: {command}\n{said}"


def test_a_command_that_nothing_knows_is_told(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no test runs this command: frobnicate --all"):
        run("frobnicate --all", tmp_path)


def test_commands_are_found_without_comments_and_over_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n```sh\na b  # said\n\n# only said\nc \\\n  'd e'\n```\n```python\nno\n```\n```sh cluster\nf\n```\n"
    )
    assert commands_of(page) == ["a b", "c 'd e'", "f"]


@pytest.mark.parametrize("test", ELSEWHERE.values())
def test_the_other_tests_are_there(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")
