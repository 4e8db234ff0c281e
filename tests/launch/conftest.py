"""What the tests of the programs share."""

from __future__ import annotations

import random

import pytest
from programs import Job, longreach

CONFIG = """
model: {width: 16, depth: 2, mixers: [elementwise, chela], chela: {heads: 2, modes: 2}}
data: {source: packed, seq_len: 129, batch_size: 2}
optim: {lr: 1.0e-2, warmup_steps: 1}
train: {steps: 2, validate_batches: 1}
parallel: {ranks: 2}
"""


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A corpus that the program packed, and a run that it trained on two ranks."""
    directory, draw = tmp_path_factory.mktemp("job"), random.Random(0)
    (directory / "source").mkdir()
    for number in range(20):
        text = " ".join(draw.choice(["span", "carry", "halo", "scan", "relay"]) for _ in range(120))
        (directory / "source" / f"{number:02}.txt").write_text(text)
    (directory / "tiny.yaml").write_text(CONFIG)
    packed = longreach("pack", "source", "packed", "--valid-fraction", "0.1", cwd=directory)
    return Job(directory, packed, longreach("train", "tiny.yaml", cwd=directory))
