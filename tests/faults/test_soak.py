"""Two minutes of faults at random; `soak.py` has the hours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from soak import soak


@pytest.mark.timeout(1200)
def test_faults_at_random(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown where it fails
    result = soak(tmp_path, seconds=120, seed=seed)
    assert result["trainings"] >= 1 and result["faults_in_all"] >= 3
