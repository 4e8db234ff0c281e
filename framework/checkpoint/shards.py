"""The files of a checkpoint: in each the partitions of one rank, flat, and in its header where each begins.

A file is safetensors. Its metadata holds ``starts``, JSON of ``{name: start of its partition}``, and ``random``, JSON
of ``{device: that rank's random state, hexadecimal}``. Any range of any tensor can be read, whatever the number
of ranks that wrote it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import InputError
from ..runtime.files import write_tensors

MODEL, OPTIMIZER = "model", "optimizer"  # the two kinds of files
KINDS = (MODEL, OPTIMIZER)

Partitions = dict[str, tuple[int, Tensor]]  # {name: (where it begins in the flattened tensor, values [n])}
Shapes = Mapping[str, Sequence[int]]


class Damaged(InputError):
    """A checkpoint, or a file of it, is not as it was written."""


def file_name(kind: str, rank: int, ranks: int) -> str:
    """The name of the file of one rank's partitions."""
    return f"{kind}-{rank:05d}-of-{ranks:05d}.safetensors"


def write(path: Path, partitions: Partitions, random: Mapping[str, str]) -> None:
    """Write one rank's partitions of a kind and flush them to the disk."""
    starts = {name: start for name, (start, _) in partitions.items()}
    metadata = {"format": "pt", "starts": json.dumps(starts), "random": json.dumps(dict(random))}
    write_tensors(path, {name: values for name, (_, values) in partitions.items()}, metadata)


class Shards:
    """The files of one kind, opened; a context.

    Args:
        directory: of the checkpoint.
        names: of the files.
        shapes: of the whole tensors.

    Raises:
        Damaged: a file is not one of `write`, or a value is missing or there twice.
    """

    def __init__(self, directory: Path, names: Sequence[str], shapes: Shapes) -> None:
        self._shapes, self._opened = shapes, ExitStack()
        self._ranges: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
        self.random: list[dict[str, str]] = []
        try:
            for name in names:
                self._open(directory / name)
            self._check(directory)
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The values [start, stop) of a flattened tensor, in the type in which they were written."""
        found = []
        for first, last, partition in self._ranges[name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                found.append(partition[low - first : high - first])
        return torch.cat(found) if found else torch.empty(0)

    def full_tensor(self, name: str) -> Tensor:
        """A whole tensor, in its shape."""
        shape = self._shapes[name]
        return self.read(name, 0, math.prod(shape)).view(*shape)

    def _open(self, path: Path) -> None:
        try:
            file = self._opened.enter_context(safe_open(path, "pt"))
            metadata = file.metadata() or {}
            starts = {str(name): int(start) for name, start in json.loads(metadata["starts"]).items()}
            self.random.append({str(key): str(state) for key, state in json.loads(metadata["random"]).items()})
            for name in file.keys():  # noqa: SIM118
                partition = file.get_slice(name)
                (count,) = partition.get_shape()
                self._ranges[name].append((starts[name], starts[name] + count, partition))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged("checkpoint", str(path), f"is damaged: {error}") from None

    def _check(self, directory: Path) -> None:
        """Check that the partitions of each tensor cover it once."""
        for name, shape in self._shapes.items():
            reached = 0
            for first, last, _ in sorted(self._ranges[name], key=lambda entry: entry[:2]):
                if first != reached:
                    break
                reached = last
            if reached != math.prod(shape):
                allowed = f"is damaged: {name} is not complete, or has values twice"
                raise Damaged("checkpoint", str(directory), allowed)
        for ranges in self._ranges.values():
            ranges.sort(key=lambda entry: entry[:2])
