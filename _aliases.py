"""Old names and values that are still accepted, for one release: this file is all that there is of them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any, TypeVar

log = logging.getLogger("longreach")
T = TypeVar("T", bound=type)

MODULES = {
    "framework.carry": "framework.inference.carry_file",
    "framework.evaluate": "framework.inference.evaluate",
    "framework.export": "framework.inference.export",
    "framework.generate": "framework.inference.generate",
    "framework.huggingface": "framework.inference.huggingface",
    "kernels.errors": "errors",
    "kernels.long_conv.modal": "kernels.modal_conv",
    "launch.links": "launch.link_benchmark",
}
"""Modules that moved: old name -> new name, both below ``longreach``."""

ATTRIBUTES = {
    "framework.inference.carry_file": {"Bookmark": "SavedCarry"},
    "framework.inference.evaluate": {"Figure": "MeanLoss", "Stretch": "PositionBin", "Text": "ScoredRows"},
    "framework.inference.generate": {
        "load_run": "framework.inference.loading.load_run",
        "load_step": "framework.inference.loading.load_step",
        "read_prompt": "prefill",
    },
    "kernels.scan": {
        "Advance": "FusedForward",
        "Flow": "DirectionalScan",
        "Relay": "StateExchange",
        "entering_states": "exclusive_chunk_scan",
    },
    "parallel.relay": {"AxisRelay": "AxisStateExchange", "WAYS": "RELAYS"},
    "parallel.span": {"Whole": "ChannelShard", "shares": "shard_lengths"},
}
"""Names in modules: module -> {old name: new name}, with the module of the new name where it is another one."""

OPERATOR_METHODS = {
    "summarize": "local_transition",
    "attend": "apply_state",
    "summarize_grad": "incoming_state_grad",
    "attend_grad": "input_grads",
    "advance": "fused_forward",
    "on": "resolve_backend",
}
"""Methods of a `StatefulOp` that a user's operator may define."""

SPAN_MEMBERS = {
    "at": "for_layer",
    "entered": "with_carry",
    "following": "next_block",
    "take": "shard",
    "noise": "dropout_seeds",
    "remember": "cache_collectives",
}
RESULT_MEMBERS = {"chance": "baseline_metrics"}
DECODER_MEMBERS = {"read": "prefill", "write": "generate"}

CONFIG_VALUES = {"parallel.relay": {"two_level": "hierarchical", "doubling": "recursive_doubling"}}
"""Of a key of the config: old value -> the one that took its place."""


def current_value(key: str, value: str) -> str:
    """The value of a config's key that took the place of an old one, logged once; any other value as it is."""
    current = CONFIG_VALUES.get(key, {}).get(value, value)
    if current != value:
        _log_once(f"{key}={value} is deprecated: write {key}={current}")
    return current


@cache
def _log_once(line: str) -> None:
    # One process of a run says it: the one that starts local ranks, which have this run id, or else the first rank.
    if os.environ.get("RANK", "0") == "0" and os.environ.get("TORCHELASTIC_RUN_ID") != "longreach":
        log.warning("%s", line)


def carry_key(key: str, keys: Sequence[str]) -> str:
    """The present key of a carry in a file of format 1, whose keys numbered a layer's calls: ``blocks.0.scan1``.

    Args:
        key: one of ``keys``.
        keys: all keys of the file. Of two scans in a layer, the first one is that of a long convolution.
    """
    layer, _, call = key.rpartition(".")
    verb = call.rstrip("0123456789")
    scans = sorted(other for other in keys if other.rstrip("0123456789") == f"{layer}.scan")
    return f"{layer}.long_conv" if verb == "scan" and len(scans) == 2 and key == scans[0] else f"{layer}.{verb}"


def attribute(module: str, name: str) -> Any:
    """An attribute of a module by its old name, for the module's ``__getattr__``."""
    new = ATTRIBUTES.get(module.partition(".")[2], {}).get(name)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, _, last = f"{_PACKAGE}.{new}".rpartition(".") if "." in new else (module, "", new)
    _warn(f"{module}.{name}", f"{home}.{last}", 4)
    return getattr(import_module(home), last)


def adopt_methods(kind: type, names: Mapping[str, str]) -> None:
    """Let methods that ``kind`` defines by old names serve under the new ones."""
    for old, new in names.items():
        if old in vars(kind) and new not in vars(kind):
            _warn(f"{kind.__name__}.{old}", f"{kind.__name__}.{new}", 4)
            setattr(kind, new, vars(kind)[old])


def with_old_members(names: Mapping[str, str]) -> Any:
    """A class decorator: old names of members, and of arguments of its constructor."""

    def decorate(kind: T) -> T:
        made = kind.__init__  # type: ignore[misc]

        @wraps(made)
        def init(self: Any, *args: Any, **fields: Any) -> None:
            for old, new in names.items():
                if old in fields:
                    _warn(f"{kind.__name__}({old}=...)", f"{kind.__name__}({new}=...)", 3)
                    fields[new] = fields.pop(old)
            made(self, *args, **fields)

        kind.__init__ = init  # type: ignore[misc]
        for old, new in names.items():
            setattr(kind, old, _member(kind.__name__, old, new))
        return kind

    return decorate


def _member(kind: str, old: str, new: str) -> property:
    def get(self: Any) -> Any:
        _warn(f"{kind}.{old}", f"{kind}.{new}", 3)
        return getattr(self, new)

    return property(get)


def _warn(old: str, new: str, level: int) -> None:
    warnings.warn(f"{old} is deprecated: write {new}", DeprecationWarning, stacklevel=level)


class _Moved(MetaPathFinder, Loader):
    """Finds modules by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        _warn(old, self._new(old), 7)
        sys.modules[old] = import_module(self._new(old))

    def get_code(self, fullname: str) -> CodeType | None:
        """For ``python -m``."""
        found = find_spec(self._new(fullname))
        code: CodeType | None = found.loader.get_code(found.name) if found is not None else None  # type: ignore
        return code

    def _new(self, old: str) -> str:
        return f"{_PACKAGE}.{MODULES[old.partition('.')[2]]}"


_PACKAGE = __name__.partition(".")[0]


def install() -> None:
    """Let old names of modules be found."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
