"""Compares configuration, code and library versions of all ranks before the first step."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from ...errors import InputError
from ...parallel.mesh import Axis, gather_texts, is_one_host
from ..config import RunConfig, to_yaml
from ..model.directory import files_of
from ..tasks import Task
from .files import digest

ROOT = Path(__file__).resolve().parent.parent.parent
LAYERS = ("framework", "kernels", "launch", "parallel")


def check_rank_consistency(config: RunConfig, world: Axis) -> None:
    """A collective.

    Raises:
        InputError: a rank has another configuration, code or library than the first one; the same on all ranks.
    """
    pretrained = " ".join(f"{file.name} {file.stat().st_size}" for file in files_of(config.model))
    own = {
        "configuration": _short(to_yaml(config)),
        "code": _short(source_digest()),
        "file of model.code": _short(" ".join(digest(Path(file)).hex() for file in config.model.code)),
        "model in model.pretrained": _short(pretrained),
        "version of torch": torch.__version__,
        "version of DeepSpeed": version("deepspeed"),
        "version of Python": platform.python_version(),
    }
    _compare(own, world, "start all ranks with the same command, code and libraries")


def check_same_data(task: Task, world: Axis) -> None:
    """A collective; it does nothing where the launcher says that all ranks are on one host.

    Raises:
        InputError: a rank has other data than the first one; the same on all ranks.
    """
    if is_one_host(world):
        return
    fix = "pack once, and put data.source or data.cache on storage that all hosts share"
    _compare({"data set": _short(task.fingerprint)}, world, fix)


def _compare(own: dict[str, str], world: Axis, fix: str) -> None:
    # As texts, because another version may compare other things.
    texts = gather_texts(json.dumps({"host": socket.gethostname(), **own}), world)
    first, *others = (json.loads(text) for text in texts)
    for rank, row in enumerate(others, 1):
        for name in own:
            if row.get(name) != first.get(name):
                named = [f" ({one.get(name)})" if name.startswith("version") else "" for one in (row, first)]
                where, allowed = (f"rank {world.ranks[n]} on {one['host']}" for n, one in ((rank, row), (0, first)))
                raise InputError(where, f"another {name}{named[0]}", f"must be that of {allowed}{named[1]}", fix)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def source_digest() -> str:
    """The SHA-256 of this package's source."""
    found = hashlib.sha256()
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()
