"""Counts the values that Python reads from tensors: on a GPU, each makes the host wait for the device."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

READS = {  # operators whose result, or the shape of it, the host must know
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::masked_select",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}


class HostReads(TorchDispatchMode):
    """Within it, each read of what would lie on a GPU is noted.

    A tensor made from numbers of Python or NumPy, and what is computed from such tensors alone, lies in main memory
    where there is a GPU too; all else counts as the device's. An optimizer's count of steps does not count: on a GPU
    torch's fused optimizers keep it there and read it nowhere else.

    Attributes:
        places: of each read, the innermost frames of this project and of DeepSpeed, the innermost first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._on_host = WeakIdKeyDictionary()
        self._lists = _Lists(self)

    def __enter__(self) -> HostReads:
        super().__enter__()
        self._lists.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._lists.__exit__(*failure)
        super().__exit__(*failure)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func.name() == "aten::lift_fresh" or (tensors and all(x in self._on_host for x in tensors)):
            self._on_host.update((x, True) for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        elif func.name() in READS or (func.name() == "aten::index.Tensor" and _by_mask(args[1])):
            self.note()
        return result

    def is_on_host(self, x: torch.Tensor) -> bool:
        return x in self._on_host

    def note(self) -> None:
        stack = traceback.extract_stack()
        if not any("/torch/optim/" in frame.filename for frame in stack):
            root = str(Path(__file__).resolve().parents[1])
            frames = [f for f in stack if f.filename.startswith(root) and "/torch/" not in f.filename]
            named = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in reversed(frames)]
            self.places.append(" < ".join([name for name in named if not name.startswith("host_reads.py")][:8]))


class _Lists(TorchFunctionMode):
    """Notes what reads many values at once, which no operator shows on a CPU."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.cpu) and args[0].dim() and not self.reads.is_on_host(args[0]):
            self.reads.note()
        return func(*args, **(kwargs or {}))


def _by_mask(indices: list[torch.Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)
