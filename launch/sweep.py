"""Sweeps: one training after the other, for every combination of the values that the command line lists."""

from __future__ import annotations

import itertools
import math
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_origin

from ..errors import InputError
from ..framework.config import RunConfig, load, typed_yaml
from .exit_codes import FAILED, INTERRUPTED, STOPPED
from .process import forward_signals

STOPS = (STOPPED, INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)  # exit codes that end a sweep, not only the run
NOT_SWEPT = ("run.dir",)  # each run has its own, named by what varies
SCALARS = (bool, int, float, str, Any)
Values = dict[str, str]  # of what varies, by key


def split(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate what is the same in all runs from what varies.

    Only a field of one value varies, where its text has a comma: ``optim.lr=1e-3,3e-3``. In a list a comma separates
    its items, and quotes keep one in a text: ``data.name='"a,b"'``.

    Returns:
        The overrides of one value, and of the others the values of each key. The later of two of one key wins.

    Raises:
        InputError: a value is empty, or not one of its field.
    """
    single: list[str] = []
    varied: dict[str, list[str]] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        varied.pop(key, None)
        if not equals or not _is_list(key, text):
            single.append(item)
            continue
        values = list(dict.fromkeys(text.split(",")))
        if "" in values:
            raise InputError(key, text, "must be values with one comma between them", "remove the comma too many")
        for value in values:
            typed_yaml.read_override(key, value, RunConfig)
        varied[key] = values
    return single, varied


def _is_list(key: str, text: str) -> bool:
    """Whether the text of an override has several values of a field that takes one."""
    if "," not in text or text[0] in "[{'\"" or "${" in text or key in NOT_SWEPT:
        return False
    try:
        kind = typed_yaml.base_of(typed_yaml.type_of(key, text, RunConfig))
    except InputError:  # an unknown key, of which `load` knows the nearest
        return False
    return kind in SCALARS or get_origin(kind) is Literal


def combinations(varied: dict[str, list[str]]) -> dict[str, Values]:
    """Every combination, by the name of its run: ``lr=1e-3,width=64``; the last key varies fastest."""
    leaves = [key.rpartition(".")[2] for key in varied]
    labels = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(varied, leaves, strict=True)}
    found: dict[str, Values] = {}
    for values in itertools.product(*varied.values()):
        combination = dict(zip(varied, values, strict=True))
        name = ",".join(f"{labels[key]}={re.sub(r'[^A-Za-z0-9.+_-]+', '-', v)}" for key, v in combination.items())
        while name in found:  # two paths can have one name
            name += "+"
        found[name] = combination
    return found


def sweep(config: str, single: Sequence[str], varied: dict[str, list[str]]) -> int:
    """Train every combination in a process of its own, one after the other, and print a table of them.

    A run that fails does not end the sweep; one that was stopped (by a signal, or ``train.time_limit``) does, and the
    same command continues it. Runs that are finished are not started again.

    Returns:
        The exit code: 0 if every run is finished, that of a run that was stopped, or `FAILED`.
    """
    runs = combinations(varied)
    shown = f"monitor.hparams=[{', '.join(varied)}]"
    words = {name: [*single, *(f"{key}={v}" for key, v in runs[name].items()), shown] for name in runs}
    directory = _directory(config, list(words.values()))
    for name in runs:
        words[name].append(f"run.dir={directory / name}")
    say = partial(print, file=sys.stderr, flush=True)
    say(f"sweep of {len(runs)} runs in {directory}: {', '.join(varied)}")
    forward_signals()  # the run saves a checkpoint and ends
    exit_codes: dict[str, int] = {}
    for number, name in enumerate(runs, 1):
        is_finished = _outcome(config, words[name])[1]
        say(f"run {number} of {len(runs)}: {name}{', finished' * is_finished}")
        if not is_finished:
            command = [sys.executable, "-m", "longreach", "train", config, *words[name]]
            exit_codes[name] = subprocess.Popen(command).wait()
            if exit_codes[name] in STOPS:
                break
    print(_table({name: (*_outcome(config, words[name]), exit_codes.get(name)) for name in runs}))
    codes = [code for code in exit_codes.values() if code]
    if codes and codes[-1] in STOPS:
        return STOPPED if codes[-1] < 0 else codes[-1]
    return FAILED if codes else 0


def _directory(config: str, runs: list[list[str]]) -> Path:
    """The directory of the sweep, beside that of a run; InputError if no combination is a valid configuration."""
    errors = []
    for words in runs:
        try:
            return Path(f"{load(config, words).run.dir.rstrip('/')}-sweep")
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _outcome(config: str, words: list[str]) -> tuple[float | None, bool]:
    """The held-out loss of a run (the lowest, where that checkpoint is kept), and whether it is finished."""
    # Imported here: with a comma in an override, this module is imported also where nothing varies.
    from ..framework.checkpoint import newest
    from ..framework.checkpoint.directory import read_state
    from ..framework.runtime.patience import has_ended
    from ..framework.runtime.run import keeps_best

    try:
        wanted = load(config, words)
        path = newest(Path(wanted.run.dir) / "checkpoints")
        if path is None:
            return None, False
        state = read_state(path)["state"]
        if wanted.data.epochs:
            trained = load(Path(wanted.run.dir) / "config.yaml")
            if trained.data.epochs != wanted.data.epochs:
                return state.get("held_out"), False
            wanted.train.steps = trained.train.steps
    except InputError:  # the run itself will say so
        return None, False
    held_out = state.get("best_held_out") if keeps_best(wanted) else state.get("held_out")
    return held_out, has_ended(wanted, state)


def _table(rows: dict[str, tuple[float | None, bool, int | None]]) -> str:
    """The runs, by their held-out loss; those without one at the end.

    Args:
        rows: by name, the held-out loss, whether it is finished, and the exit code, None if it was not started.
    """
    width = max(len("run"), *map(len, rows))
    lines = [f"{'run':<{width}}  held-out"]
    for name, (loss, ended, code) in sorted(rows.items(), key=lambda row: math.inf if row[1][0] is None else row[1][0]):
        how = "" if ended else "  not started" if code is None else f"  not finished (exit code {code})"
        lines.append(f"{name:<{width}}  {'-' if loss is None else f'{loss:.4f}':>8}{how}")
    return "\n".join(lines)
