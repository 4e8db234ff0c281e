"""The sum of what a rank needs, against what there is: warned of, refused, and told where the kernel ends a rank."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from programs import longreach, python

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.model import ModelConfig, build_model
from longreach.framework.runtime.machine import Machine
from longreach.framework.runtime.memory import GIB, compare, needed_memory
from longreach.framework.trainer import settings_of
from longreach.launch.local import fewer_ranks
from longreach.parallel.span import Span

MEMINFO = "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n"


def write(root: Path, files: dict[str, str]) -> Machine:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Machine(root / "proc", root / "groups")


def test_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both versions, of the own group and of those around it; what is cached of files makes room."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    alone = write(tmp_path / "a", {"proc/meminfo": MEMINFO, "proc/vmstat": "oom_kill 4\n"})
    assert (alone.num_cores(), alone.available_memory(), alone.oom_kills()) == (8, 5000 * 1024, 4)
    second = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/job/step\n",
        "groups/job/memory.max": "3000000",
        "groups/job/memory.current": "2500000",
        "groups/job/memory.stat": "anon 1\ninactive_file 200000\nactive_file 50000\n",
        "groups/job/cpu.max": "350000 100000",
        "groups/job/step/memory.max": "max",
        "groups/job/step/memory.current": "1",
        "groups/job/step/memory.events": "oom 1\noom_kill 3\n",
        "groups/job/step/cpu.max": "max 100000",
    }
    found = write(tmp_path / "b", second)
    assert (found.num_cores(), found.available_memory(), found.oom_kills()) == (3, 750000, 3)
    first = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",  # the mount shows its own group
        "groups/memory/memory.limit_in_bytes": "3000000",
        "groups/memory/memory.usage_in_bytes": "2500000",
        "groups/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000\n",
        "groups/memory/memory.oom_control": "oom_kill_disable 0\noom_kill 2\n",
        "groups/cpu/cpu.cfs_quota_us": "50000",
        "groups/cpu/cpu.cfs_period_us": "100000",
    }
    found = write(tmp_path / "c", first)
    assert (found.num_cores(), found.available_memory(), found.oom_kills()) == (1, 600000, 2)
    unlimited = {"groups/cpu/cpu.cfs_quota_us": "-1", "groups/memory/memory.limit_in_bytes": str(2**63 - 4096)}
    found = write(tmp_path / "d", {**first, **unlimited})
    assert (found.num_cores(), found.available_memory()) == (8, 5000 * 1024)
    nothing = Machine(tmp_path / "none", tmp_path / "none")
    assert (nothing.available_memory(), nothing.oom_kills()) == (None, 0)


PEAK = """
import subprocess, sys
if sys.argv[1:] == ["small"]:
    from longreach.framework.runtime.machine import Machine
    print(Machine().resident_memory(peak=True))
else:
    large = b"x" * (1 << 30)
    subprocess.run([sys.executable, __file__, "small"], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_is_of_the_process_and_not_of_the_one_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "peak.py").write_text(PEAK)
    done = python("peak.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 1 << 20 < int(done.stdout) < 1 << 29


def saved_bytes(config: ModelConfig, length: int, recompute: bool) -> int:
    """Of the tensors that autograd keeps, without the parameters."""
    model = build_model(config)
    model.recompute = recompute
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros(1, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, Span(), labels=tokens)[0].sum()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in parameters)


@pytest.mark.parametrize("mixer", ["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"])
def test_activations_are_those_that_autograd_keeps(mixer: str) -> None:
    """At least: the sum must not refuse what fits; and not far below."""
    words = ["model.width=64", "model.depth=3", f"model.mixers=[{mixer}]", "parallel.ranks=1", "model.vocab=256"]
    words += ["model.chela.heads=2", "model.feedforward_kernel.heads=2", "model.softmax.heads=2"]
    config = load("quickstart", [*words, "data.seq_len=1024"])
    need = needed_memory(config, settings_of(config))
    assert need is not None
    grown = saved_bytes(config.model, 2048, False) - saved_bytes(config.model, 1024, False)
    assert 0.75 * grown < need.activations < 1.01 * grown
    config.train.recompute = True
    again = needed_memory(config, settings_of(config))
    assert again is not None and need.activations / 3 < again.activations < need.activations / 2


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        (0, "fp32", (4, 4, 8)),
        (1, "fp32", (4, 4, 3)),
        (2, "fp32", (4, 1, 3)),
        (3, "fp32", (1, 1, 3)),
        (1, "bf16", (2, 2, 3)),
        (3, "bf16", (0.5, 0.5, 3)),
    ],
)
def test_weights_and_optimizer_by_the_stage_of_zero(
    stage: int, precision: str, expected: tuple[float, float, float]
) -> None:
    """Bytes of each parameter on one of four ranks."""
    words = ["parallel.ranks=4", f"deepspeed=zero{stage}", f"train.precision={precision}", "model.vocab=256"]
    config = load("quickstart", words)
    need = needed_memory(config, settings_of(config))
    count = sum(p.numel() for p in build_model(config.model).parameters())
    assert need is not None
    found = (need.parameters / count, need.gradients / count, need.optimizer / count)
    assert found == pytest.approx(expected, rel=1e-4)


def test_too_little_is_warned_of_and_far_too_little_refused() -> None:
    """And the block that is named fits."""
    config = load("quickstart", ["data.seq_len=1048576", "parallel.ranks=1", "model.vocab=256"])
    need = needed_memory(config, settings_of(config))
    assert need is not None and compare(config, need, need.total) == ""
    line = compare(config, need, need.total / 1.4, "rank 3")
    assert line.startswith("memory may not suffice: rank 3 needs at least 26.0")
    for word in ("train.recompute=true", "parallel.block_len=", "--dry-run"):
        assert word in line
    available = 2 * GIB
    with pytest.raises(InputError, match=r"data\.seq_len = 1048576: does not fit into memory: a rank needs") as refused:
        compare(config, need, available)
    found = re.search(r"parallel\.block_len=(\d+)", str(refused.value))
    assert found is not None
    fits = {}
    for block_len in (int(found[1]), 4 * int(found[1])):
        config.parallel.block_len = block_len
        needed = needed_memory(config, settings_of(config))
        assert needed is not None
        fits[block_len] = needed.total <= available / 2
    assert list(fits.values()) == [True, False]


def test_a_dry_run_prints_the_sum_and_refuses_what_cannot_fit(tmp_path: Path) -> None:
    words = ["train", "quickstart", "--dry-run", "--world", "2", "data.seq_len=64", "model.width=16"]
    words += ["model.depth=1", "optim.warmup_steps=0"]
    done = longreach(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^  at least +0\.\d\d GiB: parameters 0.00, gradients 0.00, optimizer ", done.stdout, re.MULTILINE
    )
    assert re.search(r"^available here +[\d.]+ GiB, enough for \d+ such ranks$", done.stdout, re.MULTILINE)
    done = longreach(*words, f"data.seq_len={1 << 40}", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "does not fit into memory" in done.stderr and "parallel.block_len=" in done.stderr


@pytest.mark.parametrize(
    ("cores", "words", "expected"),
    [
        (2, [], (2, 0)),
        (3, [], (3, 0)),
        (8, [], (8, 0)),
        (2, ["parallel.ranks=8"], (8, 0)),
        (2, ["parallel={ranks: 8}"], (8, 0)),
        (3, ["parallel.sequence=1", "data.batch_size=8"], (2, 1)),  # 3 data ranks do not divide the batch
        (3, ["parallel.sequence=4"], (8, 4)),
    ],
)
def test_a_small_machine_takes_fewer_ranks_than_a_file_asks_for(
    cores: int,
    words: list[str],
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A number on the command line is honoured."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    config = load("lm-125m", words)
    overrides = fewer_ranks(config, words)
    assert (config.parallel.ranks, config.parallel.sequence) == expected
    told = capsys.readouterr().err
    if expected[0] == 8:
        assert overrides == words and told == ""
    else:
        assert overrides == [*words, f"parallel.ranks={expected[0]}", f"parallel.sequence={expected[1]}"]
        line = f"parallel.ranks=8 in the config, but this machine has {cores} cores: training on {expected[0]}"
        assert told.startswith(line) and told.count("\n") == 1


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with little memory."""
    root = Path("/sys/fs/cgroup")
    first = (root / "memory").is_dir()
    group = (root / "memory" if first else root) / f"longreach-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if first else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(900 << 20))
    except OSError as error:
        shutil.rmtree(group, ignore_errors=True)
        pytest.skip(f"no control group can be made here: {error.strerror}")
    yield group
    group.rmdir()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("b'x' * (1 << 31)", "was ended by the kernel for want of memory: a smaller parallel.block_len"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL\n"),
    ],
)
def test_the_kernels_memory_killer_is_named(program: str, told: str, small_group: Path, tmp_path: Path) -> None:
    """And no one else who sends SIGKILL."""
    start = "import os, sys; from longreach.launch.local import report_rank_errors, start_ranks\n"
    start += f"open({str(small_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    start += f"with report_rank_errors() as outcome: start_ranks(1, sys.executable, '-c', {program!r})\n"
    done = python("-c", f"{start}sys.exit(outcome.exit_code)", cwd=tmp_path)
    assert done.returncode == 1 and f"longreach: rank 0 {told}" in done.stderr, done.stderr
