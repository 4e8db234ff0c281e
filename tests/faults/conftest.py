"""What the tests of faults share: a small corpus that the program packed, a config that trains on it, a small disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_helpers import JobDirectory, make_job_directory, mounted


@pytest.fixture(scope="session")
def job_dir(tmp_path_factory: pytest.TempPathFactory) -> JobDirectory:
    return make_job_directory(tmp_path_factory.mktemp("job_dir"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 440 KiB: room for two checkpoints of a run."""
    with mounted(tmp_path / "disk", "size=440k") as place:
        yield place
