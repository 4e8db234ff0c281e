"""The configuration of a run: defaults <- YAML file <- command line, merged once, with every type checked.

Each section is a dataclass beside the code that it configures. `typed_yaml` reads the text against these
types, OmegaConf merges and resolves interpolations, and what `load` returns are plain dataclasses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import InterpolationValidationError, OmegaConfBaseException

from ...bounds import bounded, check_bounds
from ...errors import InputError
from ..data import DataConfig, masked_letters
from ..mixers.registry import run_files
from ..model import ModelConfig, directory
from ..tasks import TaskConfig, kind_of
from . import typed_yaml

CONFIGS = Path(__file__).parent.parent.parent / "configs"
MAX_BYTES = 1 << 18
MAX_INTERPOLATIONS = 20  # one of another multiplies: so many make a text 1,500 times as long, at most
MAX_INTERPOLATION_LEN = 1000


@dataclass
class RunSection:
    """Where results go (by default ``runs/<name of the config>``), and the seed of weights and data order."""

    dir: str = ""
    seed: int = bounded(0, minimum=0)


@dataclass
class ParallelConfig:
    """How ranks are used.

    Args:
        ranks: processes in all.
        sequence: ranks that share one sequence; 0 means all of them.
        block_len: tokens of a streamed block on each rank, so that memory does not grow with the sequence; 0 processes
            it whole.
        relay: how states travel along the ranks of a sequence: ``gather`` (all to all ranks), ``hierarchical`` (within
            nodes, then between them), ``pipeline`` (from neighbour to neighbour), ``recursive_doubling`` (to
            ranks at distances 1, 2, 4, ...), ``auto`` (the fastest by the times of the links).
        near, far: latency in seconds and bandwidth in bytes a second between ranks of a node, and between nodes, as
            ``longreach doctor`` and `launch.link_benchmark` measure them; empty for rough figures.
        park_carries: keep the carries between streamed blocks in host memory, not on the GPU.
        timeout: seconds after which the run ends, if a rank does not respond or an exchange does not complete.
    """

    ranks: int = bounded(1, minimum=1)
    sequence: int = bounded(0, minimum=0)
    block_len: int = bounded(0, minimum=0)
    relay: Literal["auto", "gather", "hierarchical", "pipeline", "recursive_doubling"] = "auto"
    near: list[float] = field(default_factory=list)
    far: list[float] = field(default_factory=list)
    park_carries: bool = False
    timeout: float = bounded(600.0, minimum=1)

    @property
    def num_sequence_ranks(self) -> int:
        return self.sequence or self.ranks

    @property
    def num_data_ranks(self) -> int:
        return self.ranks // self.num_sequence_ranks


@dataclass
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then a cosine to ``min_lr_ratio * lr`` at ``schedule_steps``.

    ``schedule_steps`` is ``train.steps`` unless given; a warm-up that is as long takes half of it. ``clip`` limits the
    gradient's norm, 0 does not.
    """

    lr: float = bounded(1e-3, above=0)
    min_lr_ratio: float = bounded(0.1, minimum=0, maximum=1)
    warmup_steps: int = bounded(0, minimum=0)
    schedule_steps: int | None = bounded(None, minimum=1)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = bounded(1e-8, above=0)
    weight_decay: float = bounded(0.1, minimum=0)
    clip: float = bounded(1.0, minimum=0)


@dataclass
class TrainConfig:
    """The loop.

    Args:
        steps: optimizer steps.
        micro_batch_size: sequences that a data rank processes at once; gradients are accumulated over its share of the
            batch.
        precision: of weights and activations in the forward and backward passes; the optimizer keeps its own weights in
            fp32.
        log_every, validate_every: steps; a run always validates at its end, and with 0 only there.
        validate_batches: how many batches of ``data.batch_size`` sequences a validation reads; 0 reads all.
        patience: end the run after this many validations without a new lowest held-out loss, and keep the best
            checkpoint; 0 never ends it.
        threads: threads with which a rank computes on a CPU; 0 takes ``OMP_NUM_THREADS`` or, where that is not set,
            divides the cores among the ranks of a machine, and takes fewer where little is computed at a time.
        compile: run the model through ``torch.compile``, which fuses what lies between the operators; the first step
            takes minutes. Exchanges between ranks stay outside of its graphs.
        recompute: activation checkpointing: keep only the input of each layer for the backward pass, and compute the
            layer again there. Less memory for one more forward pass; states and halos are exchanged once.
        time_limit: seconds from the start after which a run saves and ends at its next step; 0 for none.
        freeze: patterns of names of parameters that are not trained, as in ``[embed_tokens.*, layers.0.*]``; of a name,
            the parts before a dot may be left out.
        nonfinite: what to do about a loss or a gradient that is not finite, before any weight is changed: ``stop``, or
            ``skip`` the step, up to 10 in a row.
    """

    steps: int = bounded(MISSING, minimum=1)
    micro_batch_size: int = bounded(1, minimum=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    log_every: int = bounded(1, minimum=1)
    validate_every: int = bounded(0, minimum=0)
    validate_batches: int = bounded(0, minimum=0)
    patience: int = bounded(0, minimum=0)
    threads: int = bounded(0, minimum=0)
    compile: bool = False
    recompute: bool = False
    time_limit: float = bounded(0.0, minimum=0)
    freeze: list[str] = field(default_factory=list)
    nonfinite: Literal["stop", "skip"] = "stop"


@dataclass
class CheckpointConfig:
    """When to save, and what to keep. Training goes on while a checkpoint is written.

    Args:
        every: steps from one checkpoint to the next; one more is saved at the end. 0: only the one at the end.
        resume: continue from the newest checkpoint in ``run.dir``, if there is one.
        keep_last: how many of the newest checkpoints are kept; 0 keeps all.
        keep_every: also keep those whose step is a multiple of this; 0 for none.
        keep_best: also keep the one with the lowest held-out loss; a validation that is the best so far saves one.
    """

    every: int = bounded(100, minimum=0)
    resume: bool = True
    keep_last: int = bounded(3, minimum=0)
    keep_every: int = bounded(0, minimum=0)
    keep_best: bool = False


@dataclass
class MonitorConfig:
    """What is shown.

    Args:
        tensorboard, plot: write TensorBoard's events, and the loss curve at the end.
        sample_len: tokens of a text that is generated and printed at the end; 0 for none.
        record_exchanges: in this many first steps, record every exchange of every rank, in ``exchanges/rank-N.jsonl``.
        hparams: keys that the table of runs (HPARAMS) shows first; a sweep sets those that it varies.
        profile_steps: the first and the last step to trace, as in ``[10, 12]``; each rank writes a file into
            ``profile/``. Empty for none.
    """

    tensorboard: bool = True
    plot: bool = True
    sample_len: int = bounded(0, minimum=0)
    record_exchanges: int = bounded(0, minimum=0)
    hparams: list[str] = field(default_factory=list)
    profile_steps: list[int] = field(default_factory=list)


@dataclass
class RunConfig:
    """A whole run. ``deepspeed`` is a name in ``configs/deepspeed/``, the path of a JSON, or its keys."""

    run: RunSection = field(default_factory=RunSection)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    deepspeed: Any = "zero1"

    def __post_init__(self) -> None:
        # Where an interpolation stood: {path: (as written, what it gave)}. `to_yaml` writes it back.
        self.interpolations: dict[tuple[str | int, ...], tuple[str, Any]] = {}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration, check it, and run the files of ``model.code``.

    Args:
        path: of a YAML file, or the bare name of one in ``configs/``.
        overrides: ``section.key=value``, the value in YAML's notation; later ones win.

    Raises:
        InputError: in one line, with the key and where it was written.
    """
    file = _find(path)
    trees = [
        _read_file(file),
        *(_read_override(item, overrides[i + 1 :]) for i, item in enumerate(overrides)),
    ]
    _check_interpolations(trees)
    if any(_of_section(tree, "model").get(name) for tree in trees[1:] for name in ("pretrained", "architecture")):
        _drop_shape(trees[0])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), *trees)
        if _source_alone(trees[1:]) and merged.task.name != "series":  # there, the name selects a data set
            merged.data.name = ""
        if any("source" in _of_section(tree, "data") for tree in trees[1:]):
            merged.data.sources = {}  # the command line's source replaces those of the file
        # What a file wants from the command line is missing there as well, where the schema has a default for it.
        if missing := OmegaConf.missing_keys(merged) | OmegaConf.missing_keys(OmegaConf.merge(*trees)):
            allowed = f"mandatory, and given neither in {file} nor on the command line"
            raise InputError(", ".join(sorted(missing)), MISSING, allowed, "add each as key=value")
        config = typing.cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise _unresolved(error, trees) from None
    except RecursionError:
        raise InputError("config", str(file), "holds an interpolation that is nested too deeply") from None
    given = dataclasses.asdict(config)
    for place, text in _interpolations(OmegaConf.to_container(merged, resolve=False), ()):
        config.interpolations[place] = (text, _at(given, place))
    config.run.dir = config.run.dir or f"runs/{file.stem}"
    try:
        validate(config, {name for tree in trees for name in _of_section(tree, "model")})
        run_files(config.model.code)
    except InputError as error:
        raise without_secrets(error, config) from None
    if config.optim.schedule_steps is None and not config.data.epochs:
        config.optim.schedule_steps = config.train.steps
    return config


def _source_alone(overrides: Sequence[Any]) -> bool:
    """Whether another source is given without a name: that in the file is the name of the file's own source."""
    given = {key for tree in overrides for key in _of_section(tree, "data")}
    return "source" in given and "name" not in given


def _of_section(tree: Any, section: str) -> Mapping[str, Any]:
    """What a file or an override sets in a section."""
    found = tree.get(section)
    return found if isinstance(found, Mapping) else {}


def _drop_shape(tree: Any) -> None:
    """Take the shape of its model out of a file: a model of transformers on the command line replaces it."""
    kept = {"lora", *directory.FROM_TASK}
    tree["model"] = {name: value for name, value in _of_section(tree, "model").items() if name in kept}


def as_written(config: RunConfig) -> dict[str, Any]:
    """A configuration's keys and values for others to read.

    What came from an interpolation is that interpolation, not its value (which may be a secret from the environment),
    unless the program has changed it since.
    """
    tree = dataclasses.asdict(config)
    for place, (text, value) in config.interpolations.items():
        if _at(tree, place) == value:
            _at(tree, place[:-1])[place[-1]] = text
    return tree


def to_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML that `load` reads back; see `as_written`."""
    return typed_yaml.dump(as_written(config))


def save(config: RunConfig, path: str | Path) -> None:
    """Write `to_yaml` to a file, UTF-8; what was there stays until all is written."""
    partial = Path(path).with_suffix(".partial")
    partial.write_text(to_yaml(config), encoding="utf-8")
    os.replace(partial, path)


def without_secrets(error: InputError, config: RunConfig) -> InputError:
    """The same mistake, told with ``${oc.env:NAME}`` in place of what the environment gave the configuration."""
    parts = [error.value if isinstance(error.value, str) else repr(error.value), error.allowed, error.fix]
    parts = [hide_secrets(part, config) for part in parts]
    unchanged = parts[0] in (error.value, repr(error.value))
    return type(error)(error.field, error.value if unchanged else parts[0], parts[1], parts[2])


def hide_secrets(text: str, config: RunConfig) -> str:
    """A text with ``${oc.env:NAME}`` in place of what the environment gave the configuration."""
    texts = " ".join(text for text, _ in config.interpolations.values())
    secrets = {os.environ.get(name, ""): name for name in re.findall(r"oc\.env:\s*(\w+)", texts)}
    for value, name in secrets.items():
        if len(value) > 3 and not value.isdecimal():  # numbers and words like "off" stand in any message
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def validate(config: RunConfig, given: Collection[str] | None = None) -> None:
    """Check the values that a type cannot: ranges, and what fields say together; set what a directory of
    ``model.pretrained`` or ``model.architecture`` says of the model and its tokenizer.

    Args:
        config: is completed in place.
        given: fields of ``model`` that the user has set; None for those that differ from their defaults.

    Raises:
        InputError: for the first that is wrong, with the numbers.
    """
    tree = dataclasses.asdict(config)
    paths = ("run.dir", "data.source", "data.cache", "data.tokenizer")
    for key in (*paths, "model.init_from", "model.pretrained", "model.architecture"):
        _check_path(key, _at(tree, tuple(key.split("."))))
    check_bounds(config)
    directory.fill(config.model, given)
    if not config.data.vocab:
        config.data.tokenizer = config.data.tokenizer or directory.tokenizer_of(config.model)
    optim, parallel, train = config.optim, config.parallel, config.train
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise InputError("optim.betas", optim.betas, "must be two numbers in [0, 1)")
    kind_of(config.task)
    _check_sources(config)
    masked_letters(config.data.mask, config.data.case)
    if train.patience and not train.validate_every:
        allowed = "needs validations to count, and train.validate_every is 0"
        raise InputError("train.patience", train.patience, allowed, "set train.validate_every=100")
    if not isinstance(config.deepspeed, (str, dict)):
        allowed = "must be a name in configs/deepspeed/, the path of a JSON file, or a mapping"
        raise InputError("deepspeed", config.deepspeed, allowed)
    for key in config.monitor.hparams:
        typed_yaml.type_of(key, "monitor.hparams", RunConfig)
    profiled = config.monitor.profile_steps
    if profiled and not (len(profiled) == 2 and 1 <= profiled[0] <= profiled[1]):
        raise InputError("monitor.profile_steps", profiled, "must be a first and a last step, as in [10, 12]")
    for key, link in (("parallel.near", parallel.near), ("parallel.far", parallel.far)):
        if link and not (len(link) == 2 and 0 <= link[0] < math.inf and 0 < link[1] < math.inf):
            allowed = "must be a latency in seconds and a bandwidth in bytes a second"
            how = (
                "longreach doctor"
                if key == "parallel.near"
                else "python -m longreach.launch.link_benchmark under torchrun"
            )
            raise InputError(key, link, allowed, f"measure it with {how}, or write {key}=[1e-5,1e10]")
    if train.compile and directory.directory_of(config.model) is not None:
        allowed = "must be false with model.pretrained and model.architecture: torch does not trace what adapts them"
        raise InputError("train.compile", True, allowed, "set it to false")
    if parallel.block_len and not config.model.causal:
        allowed = "only a causal model can be streamed: every token of another one needs all that follow it"
        raise InputError("parallel.block_len", parallel.block_len, allowed, "set it to 0, or model.causal=true")
    if parallel.ranks % parallel.num_sequence_ranks:
        allowed = f"must divide parallel.ranks = {parallel.ranks} (ranks = data ranks x sequence ranks)"
        fix = f"set parallel.sequence={parallel.ranks}, or 0: all ranks share a sequence"
        raise InputError("parallel.sequence", parallel.sequence, allowed, fix)
    unit = parallel.num_data_ranks * train.micro_batch_size
    if config.data.batch_size % unit:
        allowed = (
            f"must be a multiple of {unit} = {parallel.num_data_ranks} data ranks "
            f"({parallel.ranks} ranks / {parallel.num_sequence_ranks} of a sequence) "
            f"x {train.micro_batch_size} (train.micro_batch_size)"
        )
        nearest = max(1, round(config.data.batch_size / unit)) * unit
        raise InputError("data.batch_size", config.data.batch_size, allowed, f"set data.batch_size={nearest}")
    _check_curriculum(config.data)
    if not config.data.epochs:
        check_curriculum_end(config)


def _check_curriculum(data: DataConfig) -> None:
    for stage in data.curriculum:
        if len(stage) != 2 or min(stage) < 1:
            allowed = "must be pairs of tokens and steps, each at least 1, as in [[1024, 200], [8192, 200]]"
            raise InputError("data.curriculum", data.curriculum, allowed)
    for length, longer in pairwise([*(tokens for tokens, _ in data.curriculum), data.seq_len]):
        if length >= longer:
            allowed = f"lengths must increase up to data.seq_len = {data.seq_len}, and {length} comes before {longer}"
            raise InputError("data.curriculum", data.curriculum, allowed)
        if data.seq_len % length:
            divisors = [number for number in range(1, 2 * length) if data.seq_len % number == 0]
            near = min(divisors, key=lambda number: abs(number - length))
            allowed = f"each length must divide data.seq_len = {data.seq_len}, and {length} does not"
            raise InputError("data.curriculum", data.curriculum, allowed, f"write {near} in its place")


def check_curriculum_end(config: RunConfig) -> None:
    """Raise InputError if no step is left for sequences of ``data.seq_len``."""
    total = sum(steps for _, steps in config.data.curriculum)
    if total >= config.train.steps:
        allowed = f"must end before the last step, and has {total} of {config.train.steps} (train.steps)"
        fix = f"set train.steps to more than {total}, or data.curriculum=[]"
        raise InputError("data.curriculum", config.data.curriculum, allowed, fix)


def _check_sources(config: RunConfig) -> None:
    for name, one in config.data.sources.items():
        key = f"data.sources.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(key, name, "must be a name of letters, digits, '_' or '-'")
        if not 0 < one.weight < math.inf:
            raise InputError(f"{key}.weight", one.weight, "must be a number above 0")
        _check_path(f"{key}.source", one.source)
    if config.data.sources and config.task.name != "language":
        raise InputError("data.sources", [*config.data.sources], "is for task.name=language alone", "set data.source")


def _find(path: str | Path) -> Path:
    """Return the file that CONFIG means."""
    file, text = Path(path), str(path)
    _check_path("config", text)
    names = sorted(item.stem for item in CONFIGS.glob("*.yaml"))
    if file.name == text and file.suffix not in (".yaml", ".yml"):
        if text in names:
            return CONFIGS / f"{text}.yaml"
        if not file.exists():
            near = difflib.get_close_matches(text, names, 1)
            fix = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}"
            raise InputError("config", text, "is neither a file nor a name in configs/", fix)
    return file


def _check_path(key: str, text: str) -> None:
    """Raise `InputError` for what no file system takes as a path; whether something lies there is asked later."""
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except OSError as error:
        raise InputError(key, text, f"is no path: {error.strerror}") from None
    except ValueError as error:  # a NUL, or a character that the system cannot encode
        raise InputError(key, text, f"is no path: {error}") from None


def _read_file(file: Path) -> Any:
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        fix = "give the path of a YAML file, or the bare name of one in configs/"
        if (file / "config.yaml").is_file():
            fix = f"for this run, give {file / 'config.yaml'}"
        raise InputError("config", str(file), f"cannot be read: {error.strerror}", fix) from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        allowed = f"is not UTF-8 text (line {line})"
        raise InputError("config", str(file), allowed, "save it as UTF-8") from None
    if len(content) > MAX_BYTES:
        raise InputError("config", str(file), f"must be at most {MAX_BYTES} bytes")
    return typed_yaml.read_document(text, RunConfig, str(file))


def _read_override(item: str, following: Sequence[str]) -> Any:
    """Turn ``a.b=value`` into ``{a: {b: value}}``.

    Args:
        item: one word of the command line.
        following: the words after it, to see through ``a.b = value``.
    """
    key, equals, text = item.partition("=")
    if not equals and following and following[0].startswith("="):
        words = f"{item} {' '.join(following[: 2 if following[0] == '=' else 1])}"
    else:
        words = item
    tight = "=".join(part.strip() for part in words.split("=", 1))
    if "=" not in words or not key.strip():
        raise InputError("override", item, "must be key=value", f"write {key.strip() or 'KEY'}=VALUE")
    if tight != item:
        raise InputError("override", words, "must be key=value without spaces around '='", f"write {tight}")
    return typed_yaml.read_override(key, text, RunConfig)


def _unresolved(error: OmegaConfBaseException, trees: Sequence[Any]) -> InputError:
    """Say in one line what OmegaConf found; never with a resolved value, which may be a secret."""
    key = getattr(error, "full_key", None) or "config"
    problem = str(error).splitlines()[0].replace("KeyError raised while resolving interpolation: ", "")
    if isinstance(error, InterpolationValidationError):
        problem = "what the interpolation gives is not of the field's type"
    written: Any = "${...}"
    for tree in trees:
        with contextlib.suppress(KeyError, TypeError):
            written = _at(tree, key.split("."))
    return InputError(key, written, problem)


def _interpolations(tree: Any, place: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(tree, str) and "${" in tree:
        yield place, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, child in items:
        yield from _interpolations(child, (*place, name))


def _check_interpolations(trees: Sequence[Any]) -> None:
    """Raise `InputError` for more or longer interpolations than a configuration needs, before any is resolved."""
    found = [item for tree in trees for item in _interpolations(tree, ())]
    for place, text in found:
        if len(text) > MAX_INTERPOLATION_LEN:
            allowed = f"a text with an interpolation must be at most {MAX_INTERPOLATION_LEN} characters"
            raise InputError(".".join(map(str, place)), text, allowed)
    number = sum(text.count("${") for _, text in found)
    if number > MAX_INTERPOLATIONS:
        allowed = f"a configuration must hold at most {MAX_INTERPOLATIONS}"
        raise InputError("interpolations", number, allowed, "write values out")


def _at(tree: Any, place: Sequence[str | int]) -> Any:
    for name in place:
        tree = tree[name]
    return tree
