"""Asynchronous checkpoints: a thread of every rank writes its partitions, and the first rank commits them."""

from __future__ import annotations

import math
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ...errors import InputError
from ...parallel.mesh import PeerFailed, first_rank_only, gather_values
from ..deepspeed.engine import Engine
from ..runtime.files import digest, remove, sync
from .directory import FORMAT, Keep, commit, partial_of, path_of, remove_partials
from .randomness import states
from .shards import KINDS, MODEL, OPTIMIZER, Partitions, file_name, write

_DIGEST = struct.Struct(">8I")  # a SHA-256 as numbers that an exchange of floats carries exactly


class Saver:
    """Saves an engine's model and optimizer, one checkpoint after the other; all its calls are collectives.

    Args:
        engine: whose model and optimizer are saved.
        directory: of the checkpoints, on storage that all ranks see; made if it is missing.
        keep: which earlier ones stay.
        timeout: seconds that `wait` waits for this rank's files.
    """

    def __init__(
        self, engine: Engine, directory: str | Path, keep: Keep | None = None, timeout: float | None = None
    ) -> None:
        self._engine, self._directory, self._keep = engine, Path(directory), keep or Keep()
        self._timeout = timeout
        self._world = engine.mesh.world
        self._shapes = shapes_by_kind(engine)
        self._path: Path | None = None  # of the one that is being written
        self._document: dict[str, Any] = {}
        self._thread = threading.Thread()
        self._failure: Exception | None = None
        self._written: list[float] = []  # of each file of this rank: bytes, SHA-256

    def check_space(self) -> None:
        """Raise `InputError`, on the first rank, where a checkpoint does not fit beside what is there."""
        first_rank_only(self._check_space, self._world)

    def start(self, state: dict[str, Any]) -> Path:
        """Start a checkpoint of the engine's present values, after waiting for the one before.

        Args:
            state: returned by `load`, as JSON can hold it; ``state["step"]`` numbers the checkpoint.

        Returns:
            Its directory, which appears when it is complete.

        Raises:
            InputError: it, or the one before, cannot be written; raised on the ranks that fail.
            PeerFailed: on the others, then.
        """
        self.wait()
        path = path_of(self._directory, state["step"])
        first_rank_only(lambda: self._prepare(path), self._world)
        shapes = {
            kind: {name: list(shape) for name, shape in tensors.items()} for kind, tensors in self._shapes.items()
        }
        self._document = {
            "format": FORMAT,
            "state": state,
            "optimizer_step": self._engine.optimizer_step_count,
            "loss_scaler": self._engine.loss_scaler,
            "shapes": shapes,
        }
        partitions: dict[str, Partitions] = {kind: {} for kind in KINDS}
        for name, key, start, values in self._engine.partitions():
            kind, label = file_entry(name, key)
            partitions[kind][label] = start, _copy(values)
        random = states(self._engine.mesh.device)
        self._path, self._failure, self._written = path, None, []
        self._thread = threading.Thread(target=self._write, args=(partitions, random), name="save", daemon=True)
        self._thread.start()
        return path

    def poll(self) -> None:
        """Complete the checkpoint if all ranks have written their partitions; raises as `start` does."""
        if self._path is None:
            return
        rows = gather_values([float(self._thread.is_alive())], self._world)
        if not any(row[0] for row in rows):
            self._finish(self._path)

    def wait(self) -> None:
        """Wait until the checkpoint is complete; raises as `start` does."""
        if self._path is not None:
            self._thread.join(self._timeout)
            if self._thread.is_alive():
                allowed = f"was not written within {self._timeout:g} s: its storage does not answer"
                fix = "earlier checkpoints are untouched; parallel.timeout sets the seconds"
                # Without an exchange, for which the other ranks may be late as well.
                raise InputError("checkpoint", str(self._path), allowed, fix)
            self._finish(self._path)

    def _check_space(self) -> None:
        where = self._directory
        while not where.exists() and where != where.parent:
            where = where.parent
        free = shutil.disk_usage(where).free
        needed = sum(4 * math.prod(shape) for tensors in self._shapes.values() for shape in tensors.values())
        if free < needed:
            allowed = f"has {free:,} bytes free, and a checkpoint needs {needed:,}"
            raise InputError(
                "checkpoints", str(self._directory), allowed, "free some space; earlier ones are untouched"
            )

    def _prepare(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_partials(path.parent)
            self._check_space()
            partial_of(path).mkdir()
        except OSError as error:
            raise _write_error(path, error) from error

    def _write(self, partitions: dict[str, Partitions], random: dict[str, str]) -> None:
        """Write this rank's files; the thread's work."""
        assert self._path is not None
        try:
            for kind in KINDS:
                file = partial_of(self._path) / file_name(kind, self._world.rank, self._world.size)
                write(file, partitions.pop(kind), random)
                self._written += [float(file.stat().st_size), *map(float, _DIGEST.unpack(digest(file)))]
            sync(file.parent)
        except (OSError, SafetensorError) as error:
            self._failure = _write_error(self._path, error)
        except Exception as error:  # surfaces when the checkpoint is to be completed
            self._failure = error

    def _finish(self, path: Path) -> None:
        self._path = None
        size = len(KINDS) * (1 + _DIGEST.size // 4)
        written = self._written if self._failure is None else [math.nan] * size
        rows = gather_values(written, self._world)
        failed = [rank for rank, row in enumerate(rows) if any(map(math.isnan, row))]
        if failed:
            first_rank_only(lambda: remove(partial_of(path)), self._world)
            raise self._failure or PeerFailed(f"rank {self._world.ranks[failed[0]]} failed")
        first_rank_only(lambda: self._commit(path, rows), self._world)

    def _commit(self, path: Path, rows: list[list[float]]) -> None:
        files = {}
        for rank, row in enumerate(rows):
            for number, kind in enumerate(KINDS):
                num_bytes, *words = map(int, row[number * len(row) // len(KINDS) :][: len(row) // len(KINDS)])
                files[file_name(kind, rank, len(rows))] = {"bytes": num_bytes, "sha256": _DIGEST.pack(*words).hex()}
        try:
            for name, written in files.items():
                found = partial_of(path) / name
                if not found.is_file() or found.stat().st_size != written["bytes"]:
                    allowed = f"does not show the first rank {name}, which another one has written there"
                    raise InputError("run.dir", str(path), allowed, "choose storage that all nodes share")
            commit(path, {**self._document, "files": files}, self._keep)
        except BaseException as error:
            remove(partial_of(path))
            raise (_write_error(path, error) if isinstance(error, OSError) else error) from None


def save(engine: Engine, directory: str | Path, state: dict[str, Any], keep: Keep | None = None) -> Path:
    """Write a checkpoint and wait for it; see `Saver.start`. A collective."""
    saver = Saver(engine, directory, keep)
    path = saver.start(state)
    saver.wait()
    return path


def file_entry(name: str, key: str) -> tuple[str, str]:
    """The kind of file that holds a tensor of the engine, and its name there."""
    return (MODEL, name) if key == "param" else (OPTIMIZER, f"{name}.{key}")


def shapes_by_kind(engine: Engine) -> dict[str, dict[str, tuple[int, ...]]]:
    """Kind -> name -> shape of every tensor that a checkpoint of this engine has."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {kind: {} for kind in KINDS}
    for name, parts in engine.shapes().items():
        for key, shape in parts.items():
            kind, label = file_entry(name, key)
            shapes[kind][label] = shape
    return shapes


def _copy(values: Tensor) -> Tensor:
    """A copy on the host, which later steps do not change."""
    return values.detach().to("cpu", copy=True).contiguous()


def _write_error(path: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError("checkpoint", str(path), f"cannot be written: {reason}", "earlier checkpoints are untouched")
