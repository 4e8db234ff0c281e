"""What the tests of faults share: a small corpus that the program packed, and a config that trains on it for ever."""

from __future__ import annotations

import random

import pytest
from places import CONFIG, Place
from programs import longreach


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory, draw = tmp_path_factory.mktemp("place"), random.Random(0)
    (directory / "source").mkdir()
    for number in range(20):
        text = " ".join(draw.choice(["span", "carry", "halo", "scan", "relay"]) for _ in range(120))
        (directory / "source" / f"{number:02}.txt").write_text(text)
    (directory / "endless.yaml").write_text(CONFIG)
    done = longreach("pack", "source", "packed", "--valid-fraction", "0.1", cwd=directory)
    assert done.returncode == 0, done.stderr
    return Place(directory)
