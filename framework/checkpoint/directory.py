"""The directory of a run's checkpoints: listing, verifying, committing and removing them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..runtime.files import digest, remove, sync, write_text
from .shards import KINDS, Damaged

FORMAT = 2
STATE, LATEST = "state.json", "latest"
PARTIAL = ".partial"
_REPLACED = ".replaced"
_NAME = re.compile(rf"step-(\d{{8,}})({re.escape(_REPLACED)})?")
_FILE = re.compile(rf"({'|'.join(KINDS)})-\d{{5,}}-of-\d{{5,}}\.safetensors")

log = logging.getLogger("longreach.checkpoint")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept, of those up to the one just written.

    Attributes:
        last: the newest so many; 0 keeps all.
        every: those whose step is a multiple of this; 0 for none.
        best: the one whose step is ``best_step`` in the newest state, or else the one with the lowest ``held_out``.
    """

    last: int = 3
    every: int = 0
    best: bool = False


def partial_of(path: Path) -> Path:
    """The directory in which a checkpoint is written before it is renamed."""
    return path.parent / f".{path.name}{PARTIAL}"


def remove_partials(directory: Path) -> None:
    """Remove the files of a save that was interrupted."""
    for leftover in directory.glob(f".*{PARTIAL}"):
        remove(leftover)


def commit(path: Path, document: dict[str, Any], keep: Keep) -> None:
    """Make a checkpoint of the files in its `partial_of`: write ``state.json``, rename it, name it in ``latest``."""
    partial = partial_of(path)
    document["sha256"] = digest_of(document)
    write_text(partial / STATE, json.dumps(document))
    sync(partial)
    replaced = path.with_name(path.name + _REPLACED)
    remove(replaced)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    remove(replaced)
    pointer = path.parent / f".{LATEST}{PARTIAL}"
    write_text(pointer, path.name + "\n")
    os.replace(pointer, path.parent / LATEST)
    sync(path.parent)
    _remove_earlier(path, keep, document["state"].get("best_step"))


def first_intact(directory: Path, paths: list[Path], check: Callable[[Path], str]) -> Path | None:
    """The first undamaged checkpoint; a warning where it is not the one that ``latest`` names.

    Args:
        directory: of the checkpoints.
        paths: `candidates`.
        check: returns what is wrong with one, or nothing.

    Returns:
        Its directory, or None if there is no checkpoint at all.

    Raises:
        InputError: there are checkpoints, but none is intact, or one is of a newer format.
    """
    problems = []
    for path in paths:
        if problem := check(path):
            problems.append(problem)
            continue
        if path.name != _latest_name(directory) or problems:
            log.warning("resuming from %s: %s", path, "; ".join(problems) or f"{directory / LATEST} is not usable")
        return path
    if problems:
        allowed = f"holds no complete checkpoint: {'; '.join(problems)}"
        raise InputError("checkpoints", str(directory), allowed, "choose another run.dir to begin anew")
    return None


def candidates(directory: Path) -> list[Path]:
    """Checkpoints, intact or not, in the order in which to try them: the one that ``latest`` names, then the newest."""
    latest = _latest_name(directory)
    return sorted(checkpoints(directory), key=lambda path: (path.name == latest, step_of(path)), reverse=True)


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints, intact or not, in the order of their steps."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(_REPLACED)))


def step_of(path: Path) -> int:
    """The step after which a checkpoint was saved."""
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def path_numbers(path: Path) -> tuple[float, float]:
    """The arguments from which `path_of` makes a checkpoint's path."""
    return float(step_of(path)), float(path.name.endswith(_REPLACED))


def path_of(directory: Path, step: float, replaced: float = 0.0) -> Path:
    """Where the checkpoint after a step is; ``replaced``: that which a newer one of this step replaces."""
    return directory / f"step-{int(step):08d}{_REPLACED if replaced else ''}"


def read_state(path: Path) -> dict[str, Any]:
    """The contents of ``state.json``, checked against its own digest.

    Raises:
        Damaged: it is not as it was written.
        InputError: it is of another format.
    """
    file = path / STATE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged("checkpoint", str(file), f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise Damaged("checkpoint", str(file), "is damaged: it is not JSON") from None
    written = document.get("format") if isinstance(document, dict) else None
    if isinstance(document, dict) and document.get("sha256") != digest_of(document):
        raise Damaged("checkpoint", str(file), "is damaged: its SHA-256 is not the one that was written")
    if isinstance(written, int) and written != FORMAT:
        allowed = f"is of format {written}; this version reads {FORMAT}"
        fix = f"install {'a newer' if written > FORMAT else 'an older'} longreach"
        raise InputError("checkpoint", str(file), allowed, fix)
    if not isinstance(document, dict) or not _is_state(document):
        raise Damaged("checkpoint", str(file), "is damaged: it does not hold what it must")
    return document


def _is_state(document: dict[str, Any]) -> bool:
    """Whether a ``state.json`` holds what the functions here take from it; a file can hold anything."""

    def are(values: Any, kind: type | tuple[type, ...]) -> bool:
        return isinstance(values, dict) and all(isinstance(value, kind) for value in values.values())

    shapes: Any = document.get("shapes")
    files: Any = document.get("files")
    return (
        isinstance(document.get("state"), dict)
        and is_count(document["state"].get("step"))
        and isinstance(document["state"].get("held_out"), (float, int, type(None)))
        and is_count(document.get("optimizer_step"))
        and are(document.get("loss_scaler"), (int, float))
        and are(shapes, dict)
        and shapes.keys() == set(KINDS)
        and all(are(shapes[kind], list) for kind in KINDS)
        and all(isinstance(n, int) and n >= 0 for kind in KINDS for shape in shapes[kind].values() for n in shape)
        and are(files, dict)
        and all(_FILE.fullmatch(name) and written.keys() == {"bytes", "sha256"} for name, written in files.items())
    )


def files_of(document: dict[str, Any], kind: str) -> list[str]:
    """The names of the files of a kind, in the order of the ranks that wrote them."""
    return sorted(name for name in document["files"] if name.startswith(f"{kind}-"))


def check_files(path: Path, document: dict[str, Any], hashed: Sequence[str]) -> None:
    """Compare the files with what ``state.json`` says of them: their sizes and, of some, their SHA-256.

    Raises:
        Damaged: the first that differs.
    """
    for name, written in document["files"].items():
        file = path / name
        if not file.is_file():
            raise Damaged("checkpoint", str(file), "is missing")
        size = file.stat().st_size
        if size != written["bytes"]:
            raise Damaged("checkpoint", str(file), f"is damaged: {size} bytes instead of {written['bytes']}")
    for name in hashed:
        if digest(path / name).hex() != document["files"][name]["sha256"]:
            allowed = "is damaged: its SHA-256 is not the one that was written"
            raise Damaged("checkpoint", str(path / name), allowed)


def digest_of(document: dict[str, Any]) -> str:
    """The SHA-256 of what ``state.json`` says, but for this digest itself."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_count(value: Any) -> bool:
    """Whether a value is a number of steps or sequences."""
    return isinstance(value, int) and 0 <= value < 1 << 53


def _latest_name(directory: Path) -> str:
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _remove_earlier(path: Path, keep: Keep, best_step: int | None) -> None:
    """Remove what `Keep` does not keep of the checkpoints up to this one."""
    if not keep.last:
        return
    found = [old for old in checkpoints(path.parent) if step_of(old) <= step_of(path)]
    kept = set(found[-keep.last :])
    if keep.every:
        kept |= {old for old in found if step_of(old) % keep.every == 0}
    if keep.best:
        best = None if best_step is None else path_of(path.parent, best_step)
        kept |= {best if best in found else min(found, key=_held_out)}
    for old in found:
        if old not in kept:
            remove(old)


def _held_out(path: Path) -> float:
    """The held-out loss of a checkpoint; infinity if it has none."""
    try:
        loss = read_state(path)["state"].get("held_out")
    except InputError:
        loss = None
    return math.inf if loss is None else float(loss)
