"""Directories that transformers wrote: the shape of the model in one, and its other files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError

if TYPE_CHECKING:
    from .config import ModelConfig

CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER = "tokenizer.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")
TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    *OTHER_TOKENIZERS,
)  # fmt: skip
KEPT_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES)
FOREIGN = "transformers"  # folder of a run with the `KEPT_FILES` of its model
MARK = "longreach.json"  # what we note beside them
FROM_TASK = {"channels", "head", "outputs", "documents"}  # fields of `ModelConfig` that a task sets
ORIGIN = ("init_from", "pretrained", "architecture", "lora")  # fields that say where weights come from; not in exports
OURS = "longreach"  # the model type of our own models


def directory_of(config: ModelConfig) -> Path | None:
    """The directory of transformers that the model comes from; None for a model of our own."""
    place = config.pretrained or config.architecture
    return Path(place).expanduser() if place else None


def fill(config: ModelConfig, given: Collection[str] | None = None) -> None:
    """Set the fields of a model of transformers that say its shape, from its directory; of our own models, check that
    they have nothing that is for those of transformers.

    ``mixers`` becomes the type of the model, ``ffn_ratio`` that of its feed-forward layers.

    Args:
        given: names of the fields that the user has set; None for those that differ from their defaults.

    Raises:
        InputError: a field is given another value, or the directory holds no such model.
    """
    if config.pretrained and config.architecture:
        allowed = "cannot be given beside model.pretrained, which has an architecture"
        raise InputError("model.architecture", config.architecture, allowed, "leave one of them out")
    if directory_of(config) is None:
        if config.lora.rank:
            allowed = "is for model.pretrained and model.architecture"
            raise InputError("model.lora.rank", config.lora.rank, allowed, "leave it out")
        return
    key = "model.pretrained" if config.pretrained else "model.architecture"
    default, shape = type(config)(), shape_of(config)
    for field in dataclasses.fields(config):
        name = field.name
        if name in FROM_TASK or name in ("pretrained", "architecture", "lora"):
            continue
        wanted, value = shape.get(name, getattr(default, name)), getattr(config, name)
        is_given = value != getattr(default, name) if given is None else name in given
        if is_given and value != wanted:
            allowed = f"is of our own models, and {key}={directory_of(config)} has a shape of its own"
            raise InputError(f"model.{name}", value, allowed, f"leave model.{name} out")
        setattr(config, name, wanted)


def shape_of(config: ModelConfig) -> dict[str, Any]:
    """The fields of `ModelConfig` that the configuration of a model of transformers tells.

    Raises:
        InputError: the directory holds no model of transformers.
    """
    found = read_config(config).get_text_config()
    width = int(found.hidden_size)
    shape = {
        "vocab": int(found.vocab_size),
        "width": width,
        "depth": int(found.num_hidden_layers),
        "mixers": [str(found.model_type)],
    }
    hidden = getattr(found, "intermediate_size", None)
    return shape | ({"ffn_ratio": hidden / width} if isinstance(hidden, int) else {})


def read_config(config: ModelConfig) -> Any:
    """The configuration of transformers in the directory of a model.

    Raises:
        InputError: it is missing or damaged, of a model that transformers does not know, or weights are missing.
    """
    place = directory_of(config)
    assert place is not None
    key = "model.pretrained" if config.pretrained else "model.architecture"
    if not (place / CONFIG).is_file():
        allowed = f"must be a local directory with the {CONFIG} of transformers"
        raise InputError(key, str(place), allowed, "save_pretrained of transformers writes one")
    if config.pretrained and not any((place / name).is_file() for name in WEIGHTS):
        allowed = f"holds no weights ({', '.join(WEIGHTS[:2])})"
        raise InputError(key, str(place), allowed, f"model.architecture={place} begins with random ones")
    if model_type(place) == OURS:
        raise InputError(key, str(place), "is a model of longreach, not of transformers")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise InputError(key, str(place), "needs transformers", "pip install 'longreach[hf]'") from None
    try:
        found = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the configuration's class stumbles over
        why = (str(error).splitlines() or [""])[0]
        raise InputError(key, str(place), f"holds no model that transformers knows: {why}") from None
    if type(found) not in AutoModelForCausalLM._model_mapping:
        raise InputError(key, str(place), f"is of a {found.model_type}, which has no form that predicts the next token")
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars of transformers, one a rank, and its warnings of slow functions that ours replace."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def model_type(place: Path) -> str:
    """The type of model that a ``config.json`` names; empty where it names none."""
    try:
        found = json.loads((place / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    named = found.get("model_type") if isinstance(found, dict) else None
    return named if isinstance(named, str) else ""


def tokenizer_of(config: ModelConfig) -> str:
    """The path of the ``tokenizer.json`` of a model of transformers; empty where it has no tokenizer.

    Raises:
        InputError: it has a tokenizer of another format.
    """
    place = directory_of(config)
    if place is None or (place / TOKENIZER).is_file():
        return "" if place is None else str(place / TOKENIZER)
    others = [name for name in OTHER_TOKENIZERS if (place / name).is_file()]
    if others:
        allowed = f"has no {TOKENIZER}, but {', '.join(others)}"
        fix = f"AutoTokenizer.from_pretrained({str(place)!r}).save_pretrained({str(place)!r}) writes one"
        raise InputError("data.tokenizer", str(place), allowed, fix)
    return ""


def files_of(config: ModelConfig) -> list[Path]:
    """The configuration and weights of a model of transformers; none for one of our own."""
    place = directory_of(config)
    return [] if place is None else [place / CONFIG, *sorted(place.glob("*.safetensors")), *sorted(place.glob("*.bin"))]


def keep_files(config: ModelConfig, folder: Path) -> None:
    """Keep the files of a model of transformers that are no weights in a folder of its run.

    Raises:
        OSError: one cannot be read or written.
    """
    place = directory_of(config)
    if place is None or place.resolve() == folder.resolve():
        return
    folder.mkdir(exist_ok=True)
    copy_files(place, folder, KEPT_FILES)
    pretrained = str(place.resolve()) if config.pretrained else ""
    (folder / MARK).write_text(json.dumps({"pretrained": pretrained}) + "\n", encoding="utf-8")


def copy_files(place: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files of these names that a directory has.

    Raises:
        OSError: one cannot be read or written.
    """
    for name in names:
        if (place / name).is_file():
            shutil.copyfile(place / name, target / name)
