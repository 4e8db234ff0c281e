"""What is reported when a run ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from programs import Job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longreach.framework.config import load
from longreach.framework.trainer import Result
from longreach.launch.report import report


def test_the_sample_is_among_tensorboards_texts(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, however often the run ends; and one thread has decoded it."""
    monkeypatch.chdir(job.directory)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_dir, threads = tmp_path / "run", torch.get_num_threads()
    shutil.copytree("runs/tiny", run_dir)
    config = load(run_dir / "config.yaml", ["monitor.sample_len=9"])
    torch.set_num_threads(3)
    for step in (1, 2):
        report(config, Result(step, None, run_dir, None))
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)
    said = capsys.readouterr().out.partition("a sample, after ")[2]
    prompt, _, text = said.partition("run:")[0].removesuffix("\n").partition(":\n")
    events = EventAccumulator(str(run_dir / "tensorboard"), {"tensors": 0}).Reload()
    (found,) = events.Tensors("sample/text_summary")
    assert found.step == 2
    shown = found.tensor_proto.string_val[0].decode()
    assert shown == f"after `{prompt}`:\n\n```\n{text}\n```"
