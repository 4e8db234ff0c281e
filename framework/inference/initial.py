"""Initial weights from a run or an export (``model.init_from``): all tensors that fit by name and shape."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...errors import InputError
from ...parallel.mesh import Mesh, gather_values, on_all_ranks
from .. import checkpoint
from ..checkpoint.directory import candidates, check_files, files_of, read_state
from ..checkpoint.shards import MODEL, Shards
from ..config import RunConfig
from .loading import CONFIG, is_foreign, open_tensors

KEY = "model.init_from"
MOST_NAMES = 6  # that a line names

log = logging.getLogger("longreach.initial")


class Stored(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def initialize_run(model: nn.Module, config: RunConfig, mesh: Mesh) -> None:
    """Give a run's model the weights of ``config.model.init_from``; not if the run resumes from a checkpoint of its
    own. A collective: all ranks read the same files, and all end if one cannot.

    Raises:
        InputError: as `initialize`.
        PeerFailed: on the other ranks.
    """
    resumes = config.checkpoint.resume and bool(candidates(Path(config.run.dir) / "checkpoints"))
    if not gather_values([float(resumes)], mesh.world)[0][0]:  # the first rank decides for all
        on_all_ranks(lambda: initialize(model, config.model.init_from), mesh.world)


def initialize(model: nn.Module, place: str) -> None:
    """Set the tensors of a model that a run's newest checkpoint, or an export, has in the same shape under the same
    name; the others stay as they are.

    Three lines are logged: what was taken, what of the model is new, and what of the files was left.

    Args:
        model: on any device, its tensors whole.
        place: directory of the run or of the export.

    Raises:
        InputError: it is neither, a file is damaged, or nothing fits.
    """
    try:
        with ExitStack() as stack, torch.no_grad():
            found = _stored(Path(place).expanduser(), stack)
            targets = checkpoint.tensors_of(model)
            taken = [name for name, one in targets.items() if name in found and found[name].shape == tuple(one.shape)]
            shapes = {name: tuple(one.shape) for name, one in targets.items()}
            if not taken:
                fix = "set model.width, model.depth and model.mixers as they are there"
                raise InputError(KEY, place, f"has no tensor that fits this model: {_left(found, shapes)}", fix)
            for name in taken:
                targets[name].copy_(found[name].read())
    except (OSError, SafetensorError) as error:
        raise InputError(KEY, place, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except InputError as error:
        raise InputError(KEY, place, error.allowed if error.field == KEY else str(error), error.fix) from None
    count = sum(targets[name].numel() for name in taken)
    log.info("initial weights of %s: %d tensors taken, %s numbers: %s", place, len(taken), f"{count:,}", listed(taken))
    if new := [name for name in targets if name not in taken]:
        log.info("initial weights: %d tensors are new: %s", len(new), listed(new))
    if left := {name: one for name, one in found.items() if name not in taken}:
        log.info("initial weights: %d tensors of %s are left: %s", len(left), place, _left(left, shapes))


def _stored(place: Path, stack: ExitStack) -> dict[str, Stored]:
    """The tensors of an export or of a run's newest checkpoint, by name; files stay open as long as ``stack``."""
    if is_foreign(place):
        raise InputError(KEY, str(place), "is a model of transformers", f"set model.pretrained={place} instead")
    if (place / CONFIG).is_file():
        return {
            name: Stored(tuple(file.get_slice(key).get_shape()), partial(file.get_tensor, key))
            for name, (file, key) in open_tensors(place, stack).items()
        }
    saved = checkpoint.newest(place / "checkpoints")
    if saved is None:
        raise InputError(KEY, str(place), "is neither an export nor a run with a checkpoint: it has no config.json")
    document = read_state(saved)
    names, shapes = files_of(document, MODEL), document["shapes"][MODEL]
    check_files(saved, document, names)
    shards = stack.enter_context(Shards(saved, names, shapes))
    return {name: Stored(tuple(shape), partial(shards.full_tensor, name)) for name, shape in shapes.items()}


def listed(names: Iterable[str]) -> str:
    """Names of tensors, in short: those that begin alike are one, such as ``blocks.* (22)``."""
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for name in names:
        groups[name.partition(".")[0]].append(name.split("."))
    found = []
    for parts in groups.values():
        columns = [set(column) for column in zip(*parts)]
        same = next((at for at, column in enumerate(columns) if len(column) > 1), len(columns))
        found.append(".".join(parts[0][:same]) + f".* ({len(parts)})" * (len(parts) > 1))
    more = f" and {len(found) - MOST_NAMES} more" * (len(found) > MOST_NAMES)
    return ", ".join(found[:MOST_NAMES]) + more


def _left(found: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Tensors that were not taken: those of another shape, with both shapes, and those that the model does not have."""
    other = [f"{name} {[*one.shape]}, here {[*shapes[name]]}" for name, one in found.items() if name in shapes]
    more = [f"and {len(other) - MOST_NAMES} more of another shape"] * (len(other) > MOST_NAMES)
    unknown = listed(name for name in found if name not in shapes)
    return "; ".join([*other[:MOST_NAMES], *more, *([f"not in the model: {unknown}"] if unknown else [])])
