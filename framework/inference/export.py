"""A trained model as a directory of a few files, which three lines of Python load without DeepSpeed.

- ``model.safetensors``: whole tensors by their names in the model, tied ones once; floating-point ones are fp32.
- ``config.json``: ``format`` (1), ``step``, ``model`` (the configuration's section of that name), the ``sha256`` of
  the first file, and what tells transformers which model it is (`huggingface`).
- ``vocabulary.json``: of a run whose tokens are not bytes, what they are; of pieces of text, ``tokenizer.json`` too.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import InputError
from ..checkpoint import differences, tensors_of
from ..config import typed_yaml
from ..data import Bytes, load_vocabulary, save_vocabulary
from ..data.vocabulary import FILE_NAME as VOCABULARY
from ..data.vocabulary import TOKENIZER
from ..model import Model, ModelConfig, build_model
from ..runtime.files import digest, remove, sync, write_text
from .generate import load_step

T = TypeVar("T")
FORMAT = 1
TENSORS, CONFIG = "model.safetensors", "config.json"
MAX_CONFIG_BYTES = 1 << 16
MODEL_TYPE, ARCHITECTURE = "longreach", "LongreachForCausalLM"  # in transformers' terms


@dataclass
class _Document:
    """The contents of ``config.json``."""

    format: int = FORMAT
    step: int = 0
    sha256: str = ""
    model_type: str = MODEL_TYPE
    architectures: list[str] = field(default_factory=lambda: [ARCHITECTURE])
    model: ModelConfig = field(default_factory=ModelConfig)


def export(run_dir: str | Path, out_dir: str | Path) -> tuple[Model, int]:
    """Write the newest model of a run to a directory of its own; what was there stays until all is written.

    Args:
        run_dir: of the run.
        out_dir: made, with the directories above it. An earlier export is replaced.

    Returns:
        The model, and the step after which it was saved.

    Raises:
        InputError: there is no such run, ``out_dir`` is something else than an export, or it cannot be written.
    """
    place = Path(os.path.realpath(out_dir))
    _check_place(place, out_dir)
    config, model, step = load_step(run_dir)
    vocabulary = load_vocabulary(run_dir)
    partial, aside = (place.parent / f".{place.name}.{end}" for end in ("partial", "replaced"))
    try:
        remove(partial)
        partial.mkdir(parents=True)
        save_file({name: _kept(tensor) for name, tensor in tensors_of(model).items()}, partial / TENSORS)
        sync(partial / TENSORS)
        document = _Document(step=step, sha256=digest(partial / TENSORS).hex(), model=config.model)
        write_text(partial / CONFIG, json.dumps(dataclasses.asdict(document), indent=2) + "\n")
        if vocabulary.kind != Bytes.kind:
            save_vocabulary(vocabulary, partial)
        sync(partial)
        if place.exists():
            remove(aside)
            place.rename(aside)
        partial.rename(place)
        sync(place.parent)
        remove(aside)
    except (OSError, SafetensorError) as error:
        remove(partial)
        why = getattr(error, "strerror", None) or error
        raise InputError("OUT_DIR", str(out_dir), f"cannot be written: {why}") from None
    return model, step


def load_exported(path: str | Path) -> Model:
    """The model that `export` wrote, on the CPU, in fp32, ready for inference. Needs no DeepSpeed and executes nothing.

    Args:
        path: of the directory.

    Returns:
        The model: ``model(tokens [B, L] int64)`` gives logits ``[B, L, vocab]``.

    Raises:
        InputError: a file is missing, damaged or of another format, or the tensors are not those of the configuration.
    """
    path = Path(path)
    document = _read(path / CONFIG)
    file = path / TENSORS
    try:
        if digest(file).hex() != document.sha256:
            raise InputError("model", str(file), f"is damaged: its SHA-256 is not the one in {CONFIG}")
        with safe_open(file, "pt") as opened:
            return _build(document.model, opened, file)
    except OSError as error:
        raise InputError("model", str(file), f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError("model", str(file), f"is damaged: {error}") from None


def _build(config: ModelConfig, opened: Any, file: Path) -> Model:
    """A model with the tensors of an opened file; their shapes are compared before memory is taken for them."""
    found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    if config.depth > len(found):
        raise InputError("model", str(file), f"holds {len(found)} tensors, too few for a depth of {config.depth}")
    try:
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in tensors_of(build_model(config)).items()}
    except InputError:
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise InputError("model", str(file.with_name(CONFIG)), f"describes no model: {error}") from None
    if lines := differences(found, expected):
        raise InputError("model", str(file), f"does not fit {CONFIG}: {lines}")
    with torch.random.fork_rng(devices=()), torch.no_grad():  # the caller's random numbers stay as they are
        model = build_model(config)
        for name, tensor in tensors_of(model).items():
            tensor.copy_(opened.get_tensor(name))
    return model.eval()


def _kept(tensor: Tensor) -> Tensor:
    whole = tensor.detach().contiguous()
    return whole.float() if whole.is_floating_point() else whole


def _check_place(place: Path, given: str | Path) -> None:
    """Raise `InputError` where anything but an export, or an empty directory, would be replaced."""
    try:
        names = set(os.listdir(place))
        if not names or (names - {VOCABULARY, TOKENIZER} == {TENSORS, CONFIG} and _read(place / CONFIG)):
            return
    except FileNotFoundError:
        return
    except (OSError, InputError):
        pass
    allowed = "is something else than an export, which would be replaced"
    raise InputError("OUT_DIR", str(given), allowed, "name a directory that is not there yet")


def _read(file: Path) -> _Document:
    """The contents of ``config.json``, every type checked."""
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1).decode("utf-8")
        tree = json.loads(text)
    except OSError as error:
        fix = "give the directory that longreach export wrote"
        raise InputError("model", str(file), f"cannot be read: {error.strerror}", fix) from None
    except (ValueError, RecursionError):
        raise InputError("model", str(file), "is not JSON") from None
    written = tree.get("format") if isinstance(tree, dict) else None
    if written != FORMAT:
        raise InputError("model", str(file), f"is of format {written!r}; this version reads {FORMAT}")
    if not isinstance(tree.get("sha256"), str) or not isinstance(tree.get("model"), dict):
        raise InputError("model", str(file), "is not what longreach export writes")
    return read_as(text, _Document, str(file))


def read_as(text: str, kind: type[T], source: str) -> T:
    """JSON as the dataclass ``kind``, every type checked; keys that are not there have their defaults.

    Raises:
        InputError: an unknown key, a value of another type, or one that the environment would fill in.
    """
    if "${" in text:
        raise InputError("model", source, "must hold plain values, no ${...}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), typed_yaml.read_document(text, kind, source))
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise InputError("model", source, str(error).splitlines()[0]) from None
