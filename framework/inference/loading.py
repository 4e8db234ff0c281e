"""Loads trained models for inference: the newest checkpoint of a run, or an export.

An export is a directory that `export.export` wrote:

- ``model.safetensors``: the unsharded tensors by their names in the model, tied ones once; floating-point ones in fp32.
- ``config.json``: the fields of `ExportConfig`.
- ``vocabulary.json``, and ``tokenizer.json`` for subwords: only if tokens are not bytes; see `data.load_vocabulary`.

The directories of transformers' ``save_pretrained`` are read as exports: of our own models, whose tensors have names
that begin with ``model.``, may be in several files, and have no SHA-256; and of its models (`load_foreign`), also those
with only the adapters that peft saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
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
from ..data import ByteVocabulary, SubwordVocabulary, Vocabulary, load_vocabulary
from ..data.vocabulary import FILE_NAME as VOCABULARY
from ..data.vocabulary import TOKENIZER
from ..model import Model, ModelConfig, SequenceModel, build_model, directory
from ..model.directory import ADAPTER_CONFIG, FOREIGN
from ..model.trained import adapted_model, load_adapters
from ..runtime.files import digest
from ..tasks import TaskDescription, kind_of, open_task
from .predict import Predictor

T = TypeVar("T")
FORMAT = 1
TENSORS, CONFIG, SHARDS = "model.safetensors", "config.json", "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 22
LANGUAGE = "language"  # the task that needs no description
MODEL_TYPE = "longreach"  # these are the names that transformers looks up: of the model, and of its class by the head
ARCHITECTURES = {
    "token": "LongreachForCausalLM",
    "class": "LongreachForSequenceClassification",
    "numbers": "LongreachForSequenceClassification",
    "series": "LongreachModel",
}


@dataclass
class ExportConfig:
    """The contents of an export's ``config.json``.

    Attributes:
        format: version of the format.
        step: the training step after which the model was saved.
        sha256: of ``model.safetensors``, hexadecimal; empty in a directory of transformers.
        model_type, architectures: by which transformers finds the model's classes; see `huggingface`.
        model: the configuration of the model.
        task: what predictions need; None for a language model.
    """

    format: int = FORMAT
    step: int = 0
    sha256: str = ""
    model_type: str = MODEL_TYPE
    architectures: list[str] = field(default_factory=lambda: [ARCHITECTURES["token"]])
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskDescription | None = None


class ExportedModel(Model):
    """A `Model` that was loaded from an export.

    Attributes:
        place: directory of the export.
        task: what predictions need; None for a language model, and in exports of earlier versions.
    """

    place = Path()
    task: TaskDescription | None = None

    def predict(self, rows: Iterable[Any], **options: Any) -> list[dict[str, Any]]:
        """Predict for new data; see `predict.Predictor.predict`, whose attributes ``options`` sets.

        Raises:
            InputError: the model is a language model or has no description of its task, or a row does not fit it.
        """
        found = Predictor(self, self.task, vocabulary_of(self.place, self), **options)
        return [answer for answers in found.predict(rows) for answer in answers]


def load_run(
    place: str | Path, overrides: Sequence[str] = (), device: torch.device | None = None
) -> tuple[RunConfig | None, SequenceModel]:
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
    if any((Path(place) / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        if overrides:
            raise InputError("key=value", " ".join(overrides), "only for a run: an export has no training config")
        model = load_foreign(place) if is_foreign(place) else load_exported(place)
        return None, model.to(device or default_device())
    config, model, _ = load_step(place, overrides)
    return config, model.to(device or default_device())


def open_predictor(place: str | Path, device: torch.device | None = None, **options: Any) -> Predictor:
    """Load the newest checkpoint of a run, or an export, to predict for new data.

    The training data are read for runs alone that began before runs kept a description of their task.

    Args:
        place, device: as of `load_run`.
        options: attributes of the `Predictor`.

    Raises:
        InputError: as `load_run`.
    """
    config, model = load_run(place, device=device)
    task = model.task if isinstance(model, ExportedModel) else describe_task(Path(place), config)
    return Predictor(model, task, vocabulary_of(place, model), **options)


def describe_task(run_dir: Path, config: RunConfig | None) -> TaskDescription | None:
    """What predictions with a run's model need; None for a language model.

    Raises:
        InputError: the run has no description, and its data are gone.
    """
    if config is None or config.task.name == LANGUAGE:
        return None
    found = TaskDescription.load(run_dir)
    if found is not None:
        return found
    kind_of(config.task).prepare(config.data)
    return open_task(config.task, config.data).describe()


def vocabulary_of(place: str | Path, model: SequenceModel) -> Vocabulary:
    """The vocabulary of a run or an export; of a directory of transformers, that of its ``tokenizer.json``.

    Raises:
        InputError: a file is damaged, or the directory has no tokenizer and the model does not read bytes.
    """
    directory = Path(place)
    if (directory / VOCABULARY).is_file() or model.config.channels:
        return load_vocabulary(directory)
    if (directory / TOKENIZER).is_file() and any((directory / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        found = SubwordVocabulary.read(directory / TOKENIZER)
        return ByteVocabulary() if _spells_bytes(found) else found
    if model.config.vocab > 2 * ByteVocabulary.size:  # a model of bytes may have more tokens, for padding and the like
        allowed = f"has no {VOCABULARY} and no {TOKENIZER}, and the model's {model.config.vocab} tokens are no bytes"
        raise InputError("model", str(place), allowed, "tokenizer.save_pretrained saves one of transformers there")
    return ByteVocabulary()


def load_step(run_dir: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, SequenceModel, int]:
    """Load the newest checkpoint of a run, as `load_run`, on the CPU; also return the step after which it was saved.

    Raises:
        InputError: the directory is not a run's, or has no checkpoint.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        allowed = "is neither a run nor an export: it has no config.yaml and no config.json"
        fix = "train first (longreach train quickstart makes runs/quickstart), or go to where runs/ is"
        raise InputError("RUN_DIR", str(run_dir), allowed, fix)
    config = load_config(run_dir, overrides)
    saved = checkpoint.newest(run_dir / "checkpoints")
    if saved is None:
        fix = f"longreach train {run_dir}/config.yaml run.dir={run_dir}"
        raise InputError("RUN_DIR", str(run_dir), "no checkpoint was saved there yet", fix)
    model = build_model(config.model)
    state = checkpoint.load_model(model, saved)
    return config, model.eval(), state["step"]


def load_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run; a model of transformers is that of the configuration which the run has kept."""
    kept = run_dir / FOREIGN
    foreign = [f"model.architecture={kept}"] if (kept / CONFIG).is_file() else []
    return load(run_dir / "config.yaml", [*foreign, "data.curriculum=[]", *overrides])


def is_foreign(place: str | Path) -> bool:
    """Whether a directory holds a model of transformers that is not ours, or adapters of one."""
    has_adapters = (Path(place) / ADAPTER_CONFIG).is_file()
    return has_adapters or directory.model_type(Path(place)) not in ("", MODEL_TYPE)


def load_foreign(path: str | Path) -> SequenceModel:
    """Load a model of transformers on the CPU, in fp32 and evaluation mode, from a directory that ``save_pretrained``
    wrote; of one with adapters alone, the model that they belong to, and them.

    Raises:
        InputError: a file is missing or damaged, or a layer of the model cannot be given a span.
    """
    path, base = Path(path), str(path)
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        base = adapted_model(path)
    config = ModelConfig(pretrained=base)
    directory.fill(config)
    with torch.random.fork_rng(devices=()):  # the caller's random generator does not advance
        model = build_model(config)
        if (path / ADAPTER_CONFIG).is_file():
            load_adapters(model.model, path)
    return model.eval()


def load_exported(path: str | Path) -> ExportedModel:
    """Load an export on the CPU, in fp32 and evaluation mode. Does not need DeepSpeed, and executes no code of a file.

    Args:
        path: directory of the export, or one that ``save_pretrained`` wrote.

    Returns:
        The model: ``model(tokens [B, L] int64)`` returns logits ``[B, L, vocab]``; ``model.predict(rows)`` predicts for
        new data of its task.

    Raises:
        InputError: a file is missing, damaged or of another format, or the tensors do not fit the configuration.
    """
    path = Path(path)
    config = read_export_config(path / CONFIG)
    if directory.directory_of(config.model) is not None:
        raise InputError("model", str(path / CONFIG), "names another directory")
    file = _tensor_file(path, config)
    try:
        with ExitStack() as stack:
            model = _build(config.model, open_tensors(path, stack), file)
    except OSError as error:
        raise InputError("model", str(file), f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError("model", str(file), f"is damaged: {error}") from None
    model.place, model.task = path, config.task
    return model


def open_tensors(path: Path, stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """Where each tensor of an export is: an opened safetensors file and the name there, by its name in the model.

    Args:
        path: directory of the export, or one that ``save_pretrained`` wrote.
        stack: closes the files.

    Raises:
        InputError: a file is damaged.
        OSError, safetensors.SafetensorError: one cannot be read.
    """
    config = read_export_config(path / CONFIG)
    file = _tensor_file(path, config)
    if config.sha256 and digest(file).hex() != config.sha256:
        raise InputError("model", str(file), f"is damaged: its SHA-256 is not the one in {CONFIG}")
    opened = [stack.enter_context(safe_open(shard, "pt")) for shard in _shards(file)]
    return _tensors(opened, prefix="" if config.sha256 else "model.")


def _tensor_file(path: Path, config: ExportConfig) -> Path:
    return path / (TENSORS if config.sha256 or not (path / SHARDS).is_file() else SHARDS)


def read_export_config(file: Path) -> ExportConfig:
    """Read an export's ``config.json``, or that of transformers, and check all types.

    Raises:
        InputError: it cannot be read, is of another format, or was not written by `export.export` or transformers.
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
    if isinstance(tree, dict) and tree.get("model_type") == MODEL_TYPE and written is None:
        return _of_transformers(tree, str(file))
    if written != FORMAT:
        raise InputError("model", str(file), f"is of format {written!r}; this version reads {FORMAT}")
    if not isinstance(tree.get("sha256"), str) or not isinstance(tree.get("model"), dict):
        raise InputError("model", str(file), "is not what longreach export writes")
    task = tree.pop("task", None)
    config = read_json_as(text if task is None else json.dumps(tree), ExportConfig, str(file))
    config.task = None if task is None else TaskDescription.from_json(task, str(file))
    return config


def _of_transformers(tree: dict[str, Any], source: str) -> ExportConfig:
    """The same of a ``config.json`` that `huggingface.LongreachConfig` saved."""
    model, task, names = tree.get("model"), tree.get("task"), tree.get("id2label")
    if not isinstance(model, dict):
        raise InputError("model", source, "has no configuration of a model")
    config = ExportConfig(model=read_json_as(json.dumps(model), ModelConfig, source))
    config.task = None if task is None else TaskDescription.from_json(task, source)
    if config.model.head != "token":
        config.task = config.task or TaskDescription("transformers")
    if config.task is not None and config.model.head == "class" and isinstance(names, dict):
        config.task.classes = [str(names[key]) for key in sorted(names, key=int)]
    return config


def _spells_bytes(vocabulary: SubwordVocabulary) -> bool:
    """Whether its tokens are the 256 bytes, as those of `huggingface.byte_tokenizer`."""
    model = json.loads(vocabulary.content).get("model", {})
    return vocabulary.size == ByteVocabulary.size and model.get("type") == "BPE" and not model.get("merges")


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


def _shards(file: Path) -> list[Path]:
    """The files of tensors: ``file`` itself, or those that an index of transformers names.

    Raises:
        InputError: the index is damaged.
    """
    if file.name != SHARDS:
        return [file]
    try:
        names = set(json.loads(file.read_bytes())["weight_map"].values())
        return [file.with_name(Path(name).name) for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError("model", str(file), "is damaged: it does not name the files of the tensors") from None


def _tensors(opened: Iterable[Any], prefix: str) -> dict[str, tuple[Any, str]]:
    """Where each tensor is, by its name in the model: an opened safetensors file, and the name there, which may begin
    with ``prefix``.
    """
    found = {name: (file, name) for file in opened for name in file.keys()}  # noqa: SIM118
    if all(name.startswith(prefix) for name in found):
        return {name.removeprefix(prefix): place for name, place in found.items()}
    return found


def _build(config: ModelConfig, tensors: Mapping[str, tuple[Any, str]], file: Path) -> ExportedModel:
    """Build a model with the tensors of `_tensors`; shapes are compared before memory is allocated."""
    found = {name: opened.get_slice(key).get_shape() for name, (opened, key) in tensors.items()}
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
        model = ExportedModel(config)
        for name, tensor in tensors_of(model).items():
            opened, key = tensors[name]
            tensor.copy_(opened.get_tensor(key))
    return model.eval()
