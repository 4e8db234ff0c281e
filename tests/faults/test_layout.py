"""Faults of how work is laid out, numbered as in the list of faults: it comes out right, or stops before it starts."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from fault_helpers import JobDirectory, error_line
from programs import finish, longreach, start

from longreach.errors import InputError
from longreach.framework.model import ModelConfig, build_model
from longreach.parallel import mesh
from longreach.parallel.span import Span

MISTAKE = 2
ODD = ["train.steps=2", "data.seq_len=67", "model.mixers=[elementwise,softmax]", "model.softmax.heads=4"]
SHORT = ["train.steps=2", "data.seq_len=5", "model.mixers=[chela,feedforward_kernel]"]


def losses(job_dir: JobDirectory, run: str) -> list[list[float]]:
    return [[row[key] for key in ("loss", "grad_norm", "tokens")] for row in job_dir.rows(run)]


@pytest.mark.parametrize(
    ("words", "formula"),
    [
        (["parallel.ranks=4", "parallel.sequence=3"], "parallel.ranks = 4 (ranks = data ranks x sequence ranks)"),
        (["parallel.ranks=2", "parallel.sequence=4"], "must divide parallel.ranks = 2"),
        (["parallel.ranks=3", "parallel.sequence=1"], "data.batch_size = 2: must be a multiple of 3 = 3 data ranks"),
    ],
)
def test_16_a_world_that_is_not_data_times_sequence(job_dir: JobDirectory, words: list[str], formula: str) -> None:
    done = job_dir.train("unmade", *words)
    assert done.returncode == MISTAKE
    error_line(done, formula)
    assert done.stderr.count("\n") == 1 and not (job_dir.directory / "unmade").exists()


def test_17_and_18_a_length_and_heads_that_the_ranks_do_not_divide(job_dir: JobDirectory) -> None:
    """67 tokens and 4 heads on 3 ranks: the same losses, gradients and tokens as on one."""
    for run, ranks in (("odd-1", 1), ("odd-3", 3)):
        done = job_dir.train(run, *ODD, f"parallel.ranks={ranks}")
        assert done.returncode == 0, done.stderr
    for row, wanted in zip(losses(job_dir, "odd-3"), losses(job_dir, "odd-1"), strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)


def test_18_heads_that_do_not_divide_the_width(job_dir: JobDirectory) -> None:
    done = job_dir.train("unmade", "model.mixers=[chela]", "model.chela.heads=3", "parallel.ranks=2")
    assert done.returncode == MISTAKE
    error_line(done, "model.chela.heads = 3")
    assert not (job_dir.directory / "unmade").exists()


@pytest.mark.parametrize(
    "field", ["softmax.heads", "feedforward_kernel.heads", "mamba2.head_width", "gated_deltanet.key_heads"]
)
def test_18_sizes_of_the_other_mixers(field: str) -> None:
    mixer, _, name = field.partition(".")
    config = ModelConfig(vocab=256, width=16, depth=1, mixers=[mixer])
    setattr(getattr(config, mixer), name, 3)
    with pytest.raises(InputError, match=rf"^model\.{mixer}\.{name} = 3: "):
        build_model(config)


def test_19_every_mixer_honours_packed_documents() -> None:
    """None is to be refused: a document's losses are those that it has alone."""
    for mixer in ("elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"):
        torch.manual_seed(0)
        model = build_model(ModelConfig(vocab=256, width=16, depth=2, mixers=[mixer])).eval()
        tokens = torch.randint(0, 256, (1, 40))
        segments = torch.arange(40)[None] // 23
        with torch.no_grad():
            packed, _ = model(tokens, span=Span(segments=segments), labels=tokens)
            alone, _ = model(tokens[:, 23:], span=Span(), labels=tokens[:, 23:])
        torch.testing.assert_close(packed[:, 23:], alone, rtol=1e-4, atol=1e-5)


def test_20_and_21_ranks_without_tokens_and_more_ranks_than_cores(job_dir: JobDirectory) -> None:
    """5 tokens on 4 ranks: the last has none, the others fewer than a convolution's taps; losses as on one."""
    assert job_dir.train("short-1", *SHORT).returncode == 0
    done = job_dir.train("short-4", *SHORT, "parallel.ranks=4")
    assert done.returncode == 0, done.stderr
    for row, wanted in zip(losses(job_dir, "short-4"), losses(job_dir, "short-1"), strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("value", "why"), [("cuda", "torch computes on cpu"), ("tpu9", "DeepSpeed cannot use it")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is missing here")
def test_21_no_cuda(job_dir: JobDirectory, value: str, why: str) -> None:
    code = f"import os; os.environ['DS_ACCELERATOR'] = {value!r}; from longreach.launch.train import main; "
    process = start("-c", f"{code}main(['endless.yaml', 'run.dir=unmade', 'train.steps=1'])", cwd=job_dir.directory)
    done = finish(process)
    assert done.returncode == MISTAKE
    error_line(done, f"DS_ACCELERATOR = '{value}'", why, "unset it")
    assert done.stderr.count("\n") == 1 and not (job_dir.directory / "unmade").exists()


def test_21_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from a process that is told of one GPU: a stop before anything is joined."""
    world = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"ranks of a machine = 2: must be at most 1, one for each GPU") as told:
        mesh.join_world(1.0)
    assert "set parallel.ranks=1, or put CUDA_VISIBLE_DEVICES= before the command" in str(told.value)


def test_21_no_triton_and_no_compiler(job_dir: JobDirectory, tmp_path: Path) -> None:
    """The portable kernels run, say so once, and reach the same losses."""
    code = (
        "import sys; sys.modules['triton'] = None; from longreach.launch.train import main; "
        "main(['endless.yaml', 'run.dir=portable', 'train.steps=2'])"
    )
    with mock.patch.dict(os.environ, {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": ""}):
        done = finish(start("-c", code, cwd=job_dir.directory))
    assert done.returncode == 0, done.stderr
    assert "compiler" in done.stderr and "Traceback" not in done.stderr
    assert longreach("train", "endless.yaml", "run.dir=native", "train.steps=2", cwd=job_dir.directory).returncode == 0
    for row, wanted in zip(losses(job_dir, "portable"), losses(job_dir, "native"), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)
