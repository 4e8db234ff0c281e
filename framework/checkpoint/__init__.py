"""Checkpoints that any number of ranks in any ZeRO stage can read, whatever wrote them.

A checkpoint is a directory ``step-00000010`` that holds

- of each rank that wrote it, ``model-00000-of-00002.safetensors`` (its partitions of the parameters, fp32, and of the
  persistent buffers, by their names in the model) and ``optimizer-...`` (of ``<name>.exp_avg`` and so on, fp32); see
  `shards`;
- ``state.json``: the caller's state (step, position in the data, ...), the optimizer's step, the shapes of all
  tensors, and the size and SHA-256 of every file.

It is written under another name and renamed when it is complete; then ``latest`` is made to name it. So there is
always a complete one, whenever the program is killed. Nothing in it can execute.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...parallel.mesh import Axis, PeerFailed, gather_values, on_all_ranks
from ..deepspeed.engine import Engine
from .directory import (
    LATEST,
    STATE,
    Keep,
    candidates,
    check_files,
    files_of,
    first_intact,
    is_count,
    path_numbers,
    path_of,
    read_state,
)
from .randomness import restore
from .saver import Saver, file_entry, save, shapes_by_kind
from .shards import KINDS, MODEL, OPTIMIZER, Damaged, Shapes, Shards, file_name

__all__ = [
    "LATEST", "MODEL", "OPTIMIZER", "STATE", "Damaged", "Keep", "Saver", "differences", "file_name", "is_count",
    "load", "load_model", "newest", "path_of", "resume", "save", "tensors_of", "verify",
]  # fmt: skip


def newest(directory: str | Path) -> Path | None:
    """The checkpoint to resume from, by the sizes of its files; see `directory.first_intact`."""
    directory = Path(directory)

    def check(path: Path) -> str:
        try:
            check_files(path, read_state(path), hashed=())
        except Damaged as error:
            return str(error)
        return ""

    return first_intact(directory, candidates(directory), check)


def resume(engine: Engine, directory: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Set an engine to the newest undamaged checkpoint; a collective.

    Returns:
        The checkpoint, and the ``state`` that was saved with it; None if there is no checkpoint at all.

    Raises:
        InputError: there are checkpoints, but none is intact; or the newest intact one is of another format, or its
            tensors are not those of the model.
    """
    directory, world = Path(directory), engine.mesh.world

    def check(path: Path) -> str:
        try:
            on_all_ranks(lambda: verify(path, world.rank, world.size), world)
        except Damaged as error:
            return str(error)
        except PeerFailed as error:
            return f"{path}: {error}"
        return ""

    path = first_intact(directory, _candidates_of_first_rank(directory, world), check)
    return None if path is None else (path, _restore(engine, path))


def load(engine: Engine, path: str | Path) -> dict[str, Any]:
    """Set an engine to a checkpoint; a collective, in which every rank reads what it needs.

    Random states are restored if as many ranks wrote them as read them.

    Returns:
        The ``state`` that was saved.

    Raises:
        InputError: a file is missing, changed, or of another format, or the model has other tensors.
        PeerFailed: another rank met one of these.
    """
    path, world = Path(path), engine.mesh.world
    on_all_ranks(lambda: verify(path, world.rank, world.size), world)
    return _restore(engine, path)


def load_model(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Set a plain model (no DeepSpeed) to a checkpoint's parameters and buffers; returns the saved ``state``.

    Raises:
        InputError: as `load`.
    """
    path = Path(path)
    document = read_state(path)
    names = files_of(document, MODEL)
    check_files(path, document, names)
    targets = tensors_of(model)
    with Shards(path, names, document["shapes"][MODEL]) as shards, torch.no_grad():
        _compare(path, document, {MODEL: {name: tuple(target.shape) for name, target in targets.items()}})
        for name, target in targets.items():
            target.copy_(shards.full_tensor(name))
    state: dict[str, Any] = document["state"]
    return state


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that a checkpoint holds, by name: parameters, tied ones once, and persistent buffers."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return found | {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in tied}


def differences(found: Shapes, expected: Shapes) -> str:
    """How the names and shapes of a file differ from those of a model; nothing if they do not."""
    lines = [f"{name} is not in it" for name in expected.keys() - found.keys()]
    lines += [f"{name} is not in the model" for name in found.keys() - expected.keys()]
    both = expected.keys() & found.keys()
    lines += [f"{k} is {[*found[k]]}, not {[*expected[k]]}" for k in both if [*found[k]] != [*expected[k]]]
    return ", ".join(sorted(lines)[:10] + [f"and {len(lines) - 10} more"] * (len(lines) > 10))


def verify(path: str | Path, rank: int = 0, ranks: int = 1) -> None:
    """Check every file of a checkpoint; of those to be hashed, one of so many ranks takes its share.

    Raises:
        InputError: the first file that is missing, changed, or of another format.
    """
    path = Path(path)
    document = read_state(path)
    check_files(path, document, sorted(document["files"])[rank::ranks])


def _restore(engine: Engine, path: Path) -> dict[str, Any]:
    """Set an engine to a checkpoint that was checked."""
    document, world = read_state(path), engine.mesh.world
    model, optimizer = (Shards(path, files_of(document, kind), document["shapes"][kind]) for kind in KINDS)
    with model, optimizer:
        _compare(path, document, shapes_by_kind(engine))

        def read(name: str, key: str, start: int, stop: int) -> Tensor:
            kind, label = file_entry(name, key)
            return (model if kind == MODEL else optimizer).read(label, start, stop)

        engine.load(read)
        if len(model.random) == world.size:
            restore(model.random[world.rank], engine.mesh.device, path)
    engine.optimizer_step_count = document["optimizer_step"]
    engine.loss_scaler = document["loss_scaler"]
    state: dict[str, Any] = document["state"]
    return state


def _compare(path: Path, document: dict[str, Any], expected: Mapping[str, Shapes]) -> None:
    """Compare names and shapes with those of the checkpoint."""
    found = {name: shape for kind in expected for name, shape in document["shapes"][kind].items()}
    if lines := differences(found, {name: shape for shapes in expected.values() for name, shape in shapes.items()}):
        raise InputError("checkpoint", str(path), f"does not fit the model: {lines}", "check model.*")


def _candidates_of_first_rank(directory: Path, world: Axis) -> list[Path]:
    """The first rank's list of checkpoints, on all ranks; a collective. All lie in one directory."""
    paths = candidates(directory)
    count = int(gather_values([float(len(paths))], world)[0][0])
    own = [value for path in paths[:count] for value in path_numbers(path)]
    first = gather_values(own + [0.0] * (2 * count - len(own)), world)[0]
    return [path_of(directory, *pair) for pair in zip(first[::2], first[1::2])]
