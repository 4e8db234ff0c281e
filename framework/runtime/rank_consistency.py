"""Compares configuration, code and library versions of all ranks before the first step."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

from ...errors import InputError
from ...parallel.mesh import Axis, gather_values
from ..config import RunConfig, to_yaml
from ..model.directory import files_of
from .files import digest

ROOT = Path(__file__).resolve().parent.parent.parent
LAYERS = ("framework", "kernels", "launch", "parallel")


def check_rank_consistency(config: RunConfig, world: Axis) -> None:
    """A collective.

    Raises:
        InputError: a rank has another configuration, code or library than the first one; the same on all ranks.
    """
    own = {
        "configuration": to_yaml(config),
        "code": source_digest(),
        "file of model.code": " ".join(digest(Path(file)).hex() for file in config.model.code),
        "model in model.pretrained": " ".join(f"{file.name} {file.stat().st_size}" for file in files_of(config.model)),
        "version of torch": torch.__version__,
        "version of Python": platform.python_version(),
    }
    numbers = [float(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)) for text in own.values()]  # 48 bits
    first, *others = gather_values(numbers, world)
    for rank, row in enumerate(others, 1):
        for name, mine, theirs in zip(own, row, first, strict=True):
            if mine != theirs:
                allowed = f"must be that of rank {world.ranks[0]}"
                raise InputError(f"rank {world.ranks[rank]}", f"another {name}", allowed, "start all ranks alike")


@cache
def source_digest() -> str:
    """The SHA-256 of this package's source."""
    found = hashlib.sha256()
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()
