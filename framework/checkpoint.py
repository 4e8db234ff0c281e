"""Checkpoints that any number of ranks in any ZeRO stage can read, whatever wrote them.

A checkpoint is a directory ``step-00000010`` that holds

- ``model.safetensors``: parameters (whole, fp32) and persistent buffers, by their names in the model;
- ``optimizer.safetensors``: ``<name>.exp_avg`` and so on, fp32;
- ``state.json``: what the caller keeps (step, position in the data, ...), the optimizer's step, random states,
  and the size and SHA-256 of the two files.

It is written beside its place and moved there when it is complete; then ``latest`` is made to name it. So there is
always a complete one, whenever the program is killed. Nothing in it can execute.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..kernels.errors import InputError
from ..parallel.mesh import Axis, PeerFailed, first_alone, gather_values
from .engine import Engine

FORMAT = 1
MODEL, OPTIMIZER, STATE, LATEST = "model.safetensors", "optimizer.safetensors", "state.json", "latest"
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_PARTIAL = ".partial"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints up to the one just written stay.

    Attributes:
        last: the newest so many; 0 keeps all.
        every: those whose step is a multiple of this; 0 for none.
        best: the one with the lowest ``held_out`` in its state.
    """

    last: int = 3
    every: int = 0
    best: bool = False


def save(engine: Engine, directory: str | Path, state: dict[str, Any], keep: Keep = Keep()) -> Path:
    """Write a checkpoint; a collective, in which the first rank writes.

    Args:
        engine: whose model and optimizer are saved.
        directory: of the checkpoints; made if it is missing.
        state: what `load` shall return, as JSON can hold it; ``state["step"]`` numbers the checkpoint.
        keep: which earlier ones stay.

    Returns:
        The directory of this checkpoint.

    Raises:
        InputError: on the first rank, if it cannot be written. What was there is left as it was.
        PeerFailed: on the other ranks, then.
    """
    directory = Path(directory)
    path = directory / f"step-{state['step']:08d}"
    files: dict[str, dict[str, Tensor]] = {MODEL: {}, OPTIMIZER: {}}
    first = engine.mesh.world.rank == 0
    for name, parts in engine.tensors():
        for key, tensor in parts.items():
            if first:
                file, label = (MODEL, name) if key == "param" else (OPTIMIZER, f"{name}.{key}")
                files[file][label] = tensor.to("cpu").contiguous()
    document = {
        "format": FORMAT,
        "state": state,
        "optimizer_step": engine.optimizer_step_count,
        "loss_scaler": engine.loss_scaler,
        "random": _random_states(engine),
    }
    first_alone(lambda: _write(path, files, document, keep), engine.mesh.world)
    return path


def newest(directory: str | Path) -> Path | None:
    """The checkpoint to continue from: the one that ``latest`` names, else the newest complete one.

    Returns:
        Its directory, or None if there is no checkpoint at all.

    Raises:
        InputError: there are checkpoints, but none is complete.
    """
    directory = Path(directory)
    found = _checkpoints(directory)
    try:
        named = (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    order = sorted(found, key=lambda path: (path.name == named, _step(path)), reverse=True)
    problems = []
    for path in order:
        try:
            _check(path, _read_state(path), digests=False)
        except InputError as error:
            problems.append(str(error))
            continue
        if path.name != named or problems:
            log.warning("continuing from %s: %s", path, "; ".join(problems) or f"{directory / LATEST} is not usable")
        return path
    if problems:
        allowed = f"holds no complete checkpoint: {'; '.join(problems)}"
        raise InputError("checkpoints", str(directory), allowed, "choose another run.dir to begin anew")
    return None


def load(engine: Engine, path: str | Path) -> dict[str, Any]:
    """Set an engine to a checkpoint; a collective, in which every rank reads.

    Random states are restored if as many ranks wrote them as read them.

    Returns:
        The ``state`` that was saved.

    Raises:
        InputError: a file is missing, changed, or of a newer format, or the model has other tensors.
        PeerFailed: another rank met one of these.
    """
    path = Path(path)
    world = engine.mesh.world
    document: dict[str, Any] = {}
    expected: dict[str, dict[str, tuple[int, ...]]] = {MODEL: {}, OPTIMIZER: {}}
    for name, shapes in engine.shapes().items():
        for key, shape in shapes.items():
            file, label = (MODEL, name) if key == "param" else (OPTIMIZER, f"{name}.{key}")
            expected[file][label] = shape

    def check() -> None:
        document.update(_read_state(path))
        _check(path, document, digests=world.rank == 0)
        _compare(path, expected)

    _together(check, world)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(path / file, "pt")) for file in expected}
        engine.load_tensors(
            lambda name, key: opened[MODEL if key == "param" else OPTIMIZER].get_tensor(
                name if key == "param" else f"{name}.{key}"
            )
        )
    engine.optimizer_step_count = document["optimizer_step"]
    engine.loss_scaler = document["loss_scaler"]
    _restore_random_states(engine, document["random"])
    state: dict[str, Any] = document["state"]
    return state


def load_model(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Set a plain model (no DeepSpeed) to a checkpoint's parameters and buffers; returns the saved ``state``.

    Raises:
        InputError: as `load`.
    """
    path = Path(path)
    document = _read_state(path)
    _check(path, document, digests=True)
    targets = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    targets |= {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in tied}
    _compare(path, {MODEL: {name: tuple(target.shape) for name, target in targets.items()}})
    with safe_open(path / MODEL, "pt") as file, torch.no_grad():
        for name, target in targets.items():
            target.copy_(file.get_tensor(name))
    state: dict[str, Any] = document["state"]
    return state


def _write(path: Path, files: dict[str, dict[str, Tensor]], document: dict[str, Any], keep: Keep) -> None:
    """Write a checkpoint beside its place and move it there; on failure nothing of it remains."""
    partial = path.parent / f".{path.name}{_PARTIAL}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".*{_PARTIAL}"):
            _remove(leftover)
        partial.mkdir()
        document["files"] = {}
        for name, tensors in files.items():
            save_file(tensors, partial / name, {"format": "pt"})
            _sync(partial / name)
            document["files"][name] = {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
        document["sha256"] = _digest_of(document)
        _write_text(partial / STATE, json.dumps(document))
        _sync(partial)
        _move(partial, path)
        pointer = path.parent / f".{LATEST}{_PARTIAL}"
        _write_text(pointer, path.name + "\n")
        os.replace(pointer, path.parent / LATEST)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        _remove(partial)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        allowed = f"cannot be written: {reason}"
        raise InputError("checkpoint", str(path), allowed, "earlier checkpoints are untouched") from error
    _remove_earlier(path, keep)


def _remove_earlier(path: Path, keep: Keep) -> None:
    """Remove what `Keep` does not keep of the checkpoints up to this one."""
    if not keep.last:
        return
    found = [old for old in _checkpoints(path.parent) if _step(old) <= _step(path)]
    kept = set(found[-keep.last :])
    if keep.every:
        kept |= {old for old in found if _step(old) % keep.every == 0}
    if keep.best:
        kept |= {min(found, key=_held_out)}
    for old in found:
        if old not in kept:
            _remove(old)


def _held_out(path: Path) -> float:
    """The held-out loss of a checkpoint; infinity if it has none."""
    try:
        loss = _read_state(path)["state"].get("held_out")
    except InputError:
        loss = None
    return math.inf if loss is None else float(loss)


def _move(partial: Path, path: Path) -> None:
    """Put a complete checkpoint into its place; one that is there steps aside until then."""
    aside = path.with_name(path.name + ".replaced")
    _remove(aside)
    if path.exists():
        path.rename(aside)
    partial.rename(path)
    _remove(aside)


def _remove(path: Path) -> None:
    """Remove a file or a directory as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Have the disk hold a file, or a directory's entries, before we go on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories, complete or not, in the order of their steps."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_step(path), not path.name.endswith(".replaced")))


def _read_state(path: Path) -> dict[str, Any]:
    """The contents of ``state.json``, checked against its own digest."""
    file = path / STATE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("checkpoint", str(file), f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError("checkpoint", str(file), "is damaged: it is not JSON") from None
    if isinstance(document, dict) and isinstance(document.get("format"), int) and document["format"] > FORMAT:
        allowed = f"is of format {document['format']}; this version reads up to {FORMAT}"
        raise InputError("checkpoint", str(file), allowed, "install a newer longreach")
    if not isinstance(document, dict) or document.get("sha256") != _digest_of(document):
        raise InputError("checkpoint", str(file), "is damaged: its SHA-256 is not the one that was written")
    if document.keys() < {"state", "optimizer_step", "loss_scaler", "random", "files"}:
        raise InputError("checkpoint", str(file), "is damaged: it lacks keys")
    return document


def _check(path: Path, document: dict[str, Any], *, digests: bool) -> None:
    """Compare the files with what ``state.json`` says of them: their sizes and, if asked, their SHA-256."""
    for name in (MODEL, OPTIMIZER):
        file, written = path / name, document["files"][name]
        if not file.is_file():
            raise InputError("checkpoint", str(file), "is missing")
        size = file.stat().st_size
        if size != written["bytes"]:
            raise InputError("checkpoint", str(file), f"is damaged: {size} bytes instead of {written['bytes']}")
        if digests and _digest(file) != written["sha256"]:
            raise InputError("checkpoint", str(file), "is damaged: its SHA-256 is not the one that was written")


def _compare(path: Path, expected: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """Compare names and shapes with those in the files."""
    lines = []
    for name, shapes in expected.items():
        try:
            with safe_open(path / name, "pt") as file:
                found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError("checkpoint", str(path / name), f"is damaged: {error}") from None
        lines += [f"{key} is not in it" for key in shapes.keys() - found.keys()]
        lines += [f"{key} is not in the model" for key in found.keys() - shapes.keys()]
        both = shapes.keys() & found.keys()
        lines += [f"{k} is {[*found[k]]}, not {[*shapes[k]]}" for k in both if found[k] != shapes[k]]
    if lines:
        shown = sorted(lines)[:10] + [f"and {len(lines) - 10} more"] * (len(lines) > 10)
        raise InputError("checkpoint", str(path), f"does not fit the model: {', '.join(shown)}", "check model.*")


def _together(work: Callable[[], None], axis: Axis) -> None:
    """Run ``work`` on every rank, and fail on all if it fails on one; a collective."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:  # told to the others first, raised again below
        failure = error
    failed = [rank for rank, (bad,) in enumerate(gather_values([float(failure is not None)], axis)) if bad]
    if failure is not None:
        raise failure
    if failed:
        raise PeerFailed(f"rank {axis.ranks[failed[0]]} failed")


def _generators(engine: Engine) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[Tensor], None]]]:
    """Name, getter and setter of the random states of this rank."""
    yield "cpu", torch.get_rng_state, torch.set_rng_state
    device = engine.mesh.device
    if device.type == "cuda":
        yield "cuda", lambda: torch.cuda.get_rng_state(device), lambda s: torch.cuda.set_rng_state(s, device)


def _random_states(engine: Engine) -> dict[str, list[str]]:
    """Every rank's random states, as hexadecimal bytes; a collective."""
    states = {}
    for name, get, _ in _generators(engine):
        rows = gather_values([float(byte) for byte in get().tolist()], engine.mesh.world)
        states[name] = [bytes(int(byte) for byte in row).hex() for row in rows]
    return states


def _restore_random_states(engine: Engine, states: dict[str, list[str]]) -> None:
    world = engine.mesh.world
    for name, _, put in _generators(engine):
        if len(states.get(name, ())) == world.size:
            put(torch.tensor(list(bytes.fromhex(states[name][world.rank])), dtype=torch.uint8))
