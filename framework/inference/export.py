"""Exports a trained model: a directory of a few files, loaded by `load_exported` without DeepSpeed.

`loading` describes the files. `load_exported` is defined there and is importable from here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor

from ...errors import InputError
from ..checkpoint import tensors_of
from ..config import RunConfig
from ..data import ByteVocabulary, Vocabulary, load_vocabulary, save_vocabulary
from ..data.chat import TOKENIZER_CONFIG
from ..data.vocabulary import FILE_NAME as VOCABULARY
from ..data.vocabulary import TOKENIZER
from ..model import Pretrained, SequenceModel
from ..model.directory import ADAPTER, ADAPTER_CONFIG, FOREIGN, MARK, ORIGIN, TOKENIZER_FILES, copy_files, quietly
from ..runtime.files import digest, remove, sync, write_tensors, write_text
from ..tasks import TaskDescription
from .loading import (
    ARCHITECTURES,
    CONFIG,
    SHARDS,
    TENSORS,
    ExportConfig,
    describe_task,
    load_exported,
    load_step,
    read_export_config,
)

log = logging.getLogger("longreach")
FOREIGN_FILES = {
    *TOKENIZER_FILES, MARK, VOCABULARY, CONFIG, "generation_config.json", TENSORS, SHARDS, ADAPTER_CONFIG, ADAPTER,
    "README.md",
}  # fmt: skip
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

__all__ = ["CONFIG", "TENSORS", "export", "load_exported"]


def export(run_dir: str | Path, out_dir: str | Path) -> tuple[SequenceModel, int]:
    """Write the newest checkpoint of a run as an export, atomically: an earlier export is replaced once all is written.

    A model of transformers is written as transformers does; of one with adapters, these alone, as peft does.

    Args:
        run_dir: directory of the run.
        out_dir: is created, with its parent directories. May be an earlier export or an empty directory.

    Returns:
        The model, and the training step after which it was saved.

    Raises:
        InputError: ``run_dir`` is not a run with a checkpoint, ``out_dir`` contains something else than an export, or
            it cannot be written.
    """
    check_replaceable(Path(os.path.realpath(out_dir)), out_dir)
    config, model, step = load_step(run_dir)
    if isinstance(model, Pretrained) and config.model.head != "token":
        allowed = f"has a head of our own ({config.model.head}), for which transformers has no place"
        raise InputError("RUN_DIR", str(run_dir), allowed, "longreach predict takes the run")
    vocabulary = load_vocabulary(run_dir)
    if isinstance(model, Pretrained):
        foreign = model

        def write(place: Path) -> None:
            _write_foreign(place, foreign, Path(run_dir), step)
            save_vocabulary(vocabulary, place)

        _replace(out_dir, write)
    else:
        write_export(model, out_dir, step=step, vocabulary=vocabulary, task=description_of(Path(run_dir), config))
    return model, step


def write_export(
    model: SequenceModel, out_dir: str | Path, *, step: int, vocabulary: Vocabulary, task: TaskDescription | None
) -> None:
    """Write a model of ours as an export, atomically.

    Args:
        model: on any device.
        out_dir: as of `export`; `check_replaceable` has looked at it.
        step: the training step after which it was saved.
        vocabulary: of its tokens.
        task: what predictions need; None for a language model.

    Raises:
        InputError: ``out_dir`` cannot be written.
    """

    def write(place: Path) -> None:
        _write_own(place, model, step, task)
        if vocabulary.kind != ByteVocabulary.kind:
            save_vocabulary(vocabulary, place)

    _replace(out_dir, write)


def _replace(out_dir: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a directory, which then takes the place of ``out_dir``."""
    place = Path(os.path.realpath(out_dir))
    partial, replaced = (place.parent / f".{place.name}.{end}" for end in ("partial", "replaced"))
    try:
        remove(partial)
        partial.mkdir(parents=True)
        write(partial)
        sync(partial)
        if place.exists():
            remove(replaced)
            place.rename(replaced)
        partial.rename(place)
        sync(place.parent)
        remove(replaced)
    except (OSError, SafetensorError) as error:
        remove(partial)
        why = getattr(error, "strerror", None) or error
        raise InputError("OUT_DIR", str(out_dir), f"cannot be written: {why}") from None


def _write_own(place: Path, model: SequenceModel, step: int, task: TaskDescription | None) -> None:
    """The tensors and ``config.json`` of a model of ours."""
    write_tensors(place / TENSORS, {name: _exported(tensor) for name, tensor in tensors_of(model).items()})
    sha256, classes = digest(place / TENSORS).hex(), [ARCHITECTURES[model.config.head]]
    document = dataclasses.asdict(ExportConfig(step=step, sha256=sha256, architectures=classes, model=model.config))
    for key in ("task", *ORIGIN):  # without these, earlier versions read the export
        document.pop(key, None)
        document["model"].pop(key, None)
    if task is not None:
        document["task"] = task.as_json()
    write_text(place / CONFIG, json.dumps(document, indent=2) + "\n")


def _write_foreign(place: Path, model: Pretrained, run_dir: Path, step: int) -> None:
    """What transformers loads, or peft where the model has adapters; the tokenizer; and a file that tells an export."""
    kept, found = run_dir / FOREIGN, cast(Any, model.model)
    if model.config.lora.rank:
        base = json.loads((kept / MARK).read_bytes())["pretrained"]
        if not base:
            allowed = "is of adapters of random weights (model.architecture), which nothing can be added to later"
            raise InputError("RUN_DIR", str(run_dir), allowed, "train with model.pretrained")
        found.peft_config["default"].base_model_name_or_path = base
    with quietly():
        found.save_pretrained(place)
    copy_files(kept, place, TOKENIZER_FILES)
    write_text(place / MARK, json.dumps({"step": step}) + "\n")
    for file in place.iterdir():
        file.chmod((place / MARK).stat().st_mode)  # that of safetensors is for the user alone
        sync(file)


def description_of(run_dir: Path, config: RunConfig) -> TaskDescription | None:
    """What predictions need; None where a run of an earlier version did not keep it and the data are gone."""
    try:
        return describe_task(run_dir, config)
    except InputError as error:
        log.warning("exported without the names and units that `longreach predict` needs: %s", error)
        return None


def _exported(tensor: Tensor) -> Tensor:
    """A tensor as it is written: contiguous, and fp32 if it is floating-point."""
    contiguous = tensor.detach().contiguous()
    return contiguous.float() if contiguous.is_floating_point() else contiguous


def check_replaceable(place: Path, given: str | Path) -> None:
    """Raise InputError if ``place`` is there and neither an export nor an empty directory; ``given`` names it."""
    try:
        names = set(os.listdir(place))
        ours = names - {VOCABULARY, TOKENIZER, TOKENIZER_CONFIG}
        if not names or (ours == {TENSORS, CONFIG} and read_export_config(place / CONFIG)):
            return
        if MARK in names and all(name in FOREIGN_FILES or SHARD.fullmatch(name) for name in names):
            return
    except FileNotFoundError:
        return
    except (OSError, InputError):
        pass
    allowed = "is something else than an export, which would be replaced"
    raise InputError("OUT_DIR", str(given), allowed, "name a directory that is not there yet")
