"""Which mixers there are: those of this package, and those that a user's own file registers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ...errors import InputError
from .chela import Chela
from .elementwise import Elementwise
from .feedforward_kernel import FeedforwardKernel
from .gated_deltanet import GatedDeltaNet
from .mamba2 import Mamba2
from .softmax import Softmax

MIXERS: dict[str, Any] = {
    "elementwise": Elementwise,
    "chela": Chela,
    "feedforward_kernel": FeedforwardKernel,
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "softmax": Softmax,
}
CONFIGS: dict[str, type] = {}
"""The dataclasses of the options of registered mixers."""

Mixer = TypeVar("Mixer", bound=type[nn.Module])


def register(name: str, config: type) -> Callable[[Mixer], Mixer]:
    """Make a mixer known: ``@register("ema", EmaConfig)`` above its class.

    Args:
        name: how ``model.mixers`` calls it.
        config: the dataclass of its options, ``model.options.<name>``. Each has a default.

    Returns:
        A decorator of the class, which is made by ``(width, config, causal=...)``; see `build_mixer`.

    Raises:
        InputError: another class has the name, or ``config`` is no dataclass whose fields have defaults.
    """
    if not isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise InputError(f"register({name!r}): config", config, "must be the dataclass of the mixer's options")
    if missing := [f.name for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING]:
        given = f"{config.__name__} without defaults of {', '.join(missing)}"
        raise InputError(f"register({name!r}): config", given, "must have a default for every option")

    def add(mixer: Mixer) -> Mixer:
        if name in MIXERS and _file_of(MIXERS[name]) != _file_of(mixer):
            raise InputError("mixer", name, "is the name of another mixer", "choose another name")
        MIXERS[name], CONFIGS[name] = mixer, config
        return mixer

    return add


def run_files(paths: Sequence[str]) -> None:
    """Run Python files that register mixers: each once in a process, as an import would.

    Raises:
        InputError: a file cannot be read, or fails.
    """
    for path in paths:
        file = Path(path).resolve()
        if not file.is_file():
            fix = "give its path from the directory in which longreach is started"
            raise InputError("model.code", path, "there is no such file", fix)
        if not _is_loaded(file):
            _run(file, path)


def options(name: str, given: Mapping[str, Any]) -> Any:
    """The options of a registered mixer.

    Args:
        name: a key of `CONFIGS`.
        given: ``model.options.<name>``.

    Raises:
        InputError: an option that it does not have, or of the wrong type.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"model.options.{name}", given, "a mapping of the mixer's options")
    known = [field.name for field in dataclasses.fields(CONFIGS[name])]
    for key in given:
        if key not in known:
            raise InputError(f"model.options.{name}.{key}", given[key], "is no option of this mixer", f"one of {known}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CONFIGS[name]), dict(given)))
    except OmegaConfBaseException as error:
        raise InputError(f"model.options.{name}", dict(given), str(error).splitlines()[0]) from None


def _file_of(mixer: type[nn.Module]) -> str:
    """Where a class comes from: its file, which may be more than one module."""
    place = getattr(sys.modules[mixer.__module__], "__file__", None)
    return mixer.__module__ if place is None else str(Path(place).resolve())


def _is_loaded(file: Path) -> bool:
    """Whether a module of this process came from ``file``, however it was imported."""
    places = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return any(place and Path(place).name == file.name and Path(place).resolve() == file for place in places)


def _run(file: Path, path: str) -> None:
    name = f"longreach_code_{file.stem}"
    if name in sys.modules:
        raise InputError("model.code", path, f"another file called {file.name} was run", "rename one of them")
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError("model.code", path, "is no Python file", "its name must end in .py")
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise InputError("model.code", path, f"fails: {_told(error, file)}") from error


def _told(error: Exception, file: Path) -> str:
    """What went wrong, and in which line of ``file``."""
    line, frame = getattr(error, "lineno", None), error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == str(file):
            line = frame.tb_lineno
        frame = frame.tb_next
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")
