"""Loads trained models for inference: the newest checkpoint of a run, or an export.

An export is a directory that `export.export` wrote:

- ``model.safetensors``: the unsharded tensors by their names in the model, tied ones once; floating-point ones in fp32.
- ``config.json``: the fields of `ExportConfig`.
- ``vocabulary.json``, and ``tokenizer.json`` for subwords: only if tokens are not bytes; see `data.load_vocabulary`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open

from ...errors import InputError
from ...parallel.mesh import default_device
from .. import checkpoint
from ..checkpoint import differences, tensors_of
from ..config import RunConfig, load, typed_yaml
from ..model import Model, ModelConfig, build_model
from ..runtime.files import digest

T = TypeVar("T")
FORMAT = 1
TENSORS, CONFIG = "model.safetensors", "config.json"
MAX_CONFIG_BYTES = 1 << 16
MODEL_TYPE, ARCHITECTURE = "longreach", "LongreachForCausalLM"  # the names that transformers looks up


@dataclass
class ExportConfig:
    """The contents of an export's ``config.json``.

    Attributes:
        format: version of the format.
        step: the training step after which the model was saved.
        sha256: of ``model.safetensors``, hexadecimal.
        model_type, architectures: by which transformers finds the model's classes; see `huggingface`.
        model: the configuration of the model.
    """

    format: int = FORMAT
    step: int = 0
    sha256: str = ""
    model_type: str = MODEL_TYPE
    architectures: list[str] = field(default_factory=lambda: [ARCHITECTURE])
    model: ModelConfig = field(default_factory=ModelConfig)


def load_run(
    place: str | Path, overrides: Sequence[str] = (), device: torch.device | None = None
) -> tuple[RunConfig | None, Model]:
    """Load the newest checkpoint of a run, or an export, in evaluation mode.

    Args:
        place: directory of a run or of an export.
        overrides: of the run's config, as of `config.load`.
        device: where the model computes; by default on the GPU, where torch sees one.

    Returns:
        The run's config (None for an export), and the model.

    Raises:
        InputError: the directory is neither, the run has no checkpoint yet, or the export is damaged.
    """
    if (Path(place) / CONFIG).is_file():
        if overrides:
            raise InputError("key=value", " ".join(overrides), "for a run: an export has no configuration of one")
        return None, load_exported(place).to(device or default_device())
    config, model, _ = load_step(place, overrides)
    return config, model.to(device or default_device())


def load_step(run_dir: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Model, int]:
    """Load the newest checkpoint of a run, as `load_run`, on the CPU; also return the step after which it was saved.

    Raises:
        InputError: the directory is not a run's, or has no checkpoint.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        allowed = "is no run and no export: it holds neither config.yaml nor config.json"
        fix = "train first (longreach train quickstart makes runs/quickstart), or go to where runs/ is"
        raise InputError("RUN_DIR", str(run_dir), allowed, fix)
    config = load(run_dir / "config.yaml", overrides)
    saved = checkpoint.newest(run_dir / "checkpoints")
    if saved is None:
        fix = f"longreach train {run_dir}/config.yaml run.dir={run_dir}"
        raise InputError("RUN_DIR", str(run_dir), "no checkpoint was saved there yet", fix)
    model = build_model(config.model)
    state = checkpoint.load_model(model, saved)
    return config, model.eval(), state["step"]


def load_exported(path: str | Path) -> Model:
    """Load an export on the CPU, in fp32 and evaluation mode. Does not need DeepSpeed, and executes no code of a file.

    Args:
        path: directory of the export.

    Returns:
        The model: ``model(tokens [B, L] int64)`` returns logits ``[B, L, vocab]``.

    Raises:
        InputError: a file is missing, damaged or of another format, or the tensors do not fit the configuration.
    """
    path = Path(path)
    config = read_export_config(path / CONFIG)
    file = path / TENSORS
    try:
        if digest(file).hex() != config.sha256:
            raise InputError("model", str(file), f"is damaged: its SHA-256 is not the one in {CONFIG}")
        with safe_open(file, "pt") as opened:
            return _build(config.model, opened, file)
    except OSError as error:
        raise InputError("model", str(file), f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError("model", str(file), f"is damaged: {error}") from None


def read_export_config(file: Path) -> ExportConfig:
    """Read an export's ``config.json`` and check all types.

    Raises:
        InputError: it cannot be read, is of another format, or was not written by `export.export`.
    """
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
    return read_json_as(text, ExportConfig, str(file))


def read_json_as(text: str, kind: type[T], source: str) -> T:
    """Parse JSON into the dataclass ``kind`` and check all types; missing keys have their defaults.

    Args:
        text: JSON.
        kind: a dataclass.
        source: where the text comes from, for messages.

    Raises:
        InputError: an unknown key, a value of another type, or an interpolation ``${...}``.
    """
    if "${" in text:
        raise InputError("model", source, "must hold plain values, no ${...}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), typed_yaml.read_document(text, kind, source))
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise InputError("model", source, str(error).splitlines()[0]) from None


def _build(config: ModelConfig, opened: Any, file: Path) -> Model:
    """Build a model with the tensors of the opened ``file``; shapes are compared before memory is allocated."""
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
    with torch.random.fork_rng(devices=()), torch.no_grad():  # the caller's random generator does not advance
        model = build_model(config)
        for name, tensor in tensors_of(model).items():
            tensor.copy_(opened.get_tensor(name))
    return model.eval()
