"""Trains the tasks of ``configs/`` with each mixer, and small language models; keeps what their tests found: tables and
figures of docs/results.md.

    python benchmarks/tasks.py                             # all of them; hours on two cores
    python benchmarks/tasks.py --resume --directory DIR    # what is missing, going on with what was interrupted
    python benchmarks/tasks.py digits adding               # these
    python benchmarks/tasks.py "recall / mamba2"           # one mixer of a task
    python benchmarks/tasks.py --table --page docs/results.md --figures docs/images    # what was found so far

Every run is ``longreach train CONFIG`` with the words that the table names and a seed; its ``result.json`` is the
figure, or the held-out loss of ``language``. Nothing is chosen by the test: the steps are the config's, and the last
model is scored, once.

A result is kept as soon as its training ends. With ``--resume`` those that are there are not trained again, if words
and config are still the same. SIGTERM or Ctrl-C ends a sweep; trainings with a ``--directory`` save a checkpoint first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import needle
import yaml
from trainings import (
    EA2,
    EA6,
    MIXERS,
    PAPER,
    PATTERNS,
    TAPS,
    Failed,
    Stopped,
    hardware,
    longreach,
    num_parameters,
    rows_of,
    training_seconds,
)

from longreach.framework.config import CONFIGS, load
from longreach.framework.mixers import registry
from longreach.framework.runtime.files import replace_text
from longreach.launch.bench import environment, table_header, table_line
from longreach.launch.exit_codes import FAILED, STOPPED
from longreach.launch.process import forward_signals

RESULTS = Path(__file__).parent / "results" / "tasks.json"
PUBLIC, LANGUAGE, MEMORY = TABLES = ("public", "language", "memory")
BITS = "bits per byte"
SAVE_EVERY = 50  # steps between the checkpoints of a training that can be interrupted


@dataclass(frozen=True)
class Runs:
    """Trainings of one config, each a row of a table.

    Attributes:
        table: one of `TABLES`.
        config: a name in ``configs/``.
        mixers: names in `MIXERS`.
        seeds: how many, from 0 on.
        words: ``key=value``, besides those of the mixer.
        parameters: of each model, within 1%, by the width of its feed-forward layers; 0 to leave that as it is.
        contexts: of a language model, to score long held-out documents with: tokens after which the past is forgotten.
    """

    table: str
    config: str
    mixers: Sequence[str]
    seeds: int
    words: Sequence[str] = ()
    parameters: int = 0
    contexts: Sequence[int] = ()


MOST = [EA6, "chela", "feedforward_kernel", "softmax"]
FORMS = ["elementwise, norm_group=0", "elementwise, conv_len=0", PAPER]
FIVE = [TAPS, EA6, "feedforward_kernel", "gated_deltanet", "softmax"]
ALIKE = [EA6, "chela", TAPS, "feedforward_kernel", "mamba2", "gated_deltanet", "softmax", *PATTERNS]
# For a CPU: about three hours on two cores for the five of a task.
LISTOPS = ["data.batch_size=8", "model.width=64", "model.depth=2", "train.steps=5000", "train.validate_every=500"]
PATHFINDER = ["task.test_examples=2000", "model.depth=2", "train.steps=3000", "train.validate_every=250"]
LM = ["parallel.ranks=1", "monitor.sample_len=0", "train.steps=150", "train.validate_every=0", "optim.warmup_steps=10"]
LONG = [
    "data.valid_fraction=0.05",
    "data.seq_len=65536",
    "data.curriculum=[[1024, 50], [8192, 50]]",
    "parallel.block_len=8192",
]
CONTEXTS = [1024, 8192, 65536]
# What tells two runs of one config apart follows a comma.
RUNS: dict[str, Runs] = {
    "japanese-vowels": Runs(PUBLIC, "japanese-vowels", [EA6, EA2, *FORMS, *MOST[1:]], 5),
    "basic-motions": Runs(
        PUBLIC, "japanese-vowels", [EA6, PAPER, *MOST[1:]], 5, ["data.name=BasicMotions", "data.seq_len=100"]
    ),
    "digits": Runs(PUBLIC, "digits", MOST, 3),
    "fashion-mnist": Runs(PUBLIC, "fashion-mnist", FIVE, 1),
    "forecast": Runs(PUBLIC, "forecast", MOST, 3),
    "listops": Runs(PUBLIC, "listops", FIVE, 1, [*LISTOPS, "train.validate_batches=60"]),
    "pathfinder": Runs(PUBLIC, "pathfinder", FIVE, 1, PATHFINDER),
    "retrieval": Runs(PUBLIC, "retrieval", ["chela", "feedforward_kernel"], 1),
    "language": Runs(LANGUAGE, "quickstart", ALIKE, 3, [*LM, "data.seq_len=8192"], 478_000),
    "language, 65,536 tokens": Runs(
        LANGUAGE,
        "quickstart",
        [EA6, "gated_deltanet", *PATTERNS[:2]],
        3,
        [*LM, *LONG],
        478_000,
        CONTEXTS,
    ),
    "adding": Runs(MEMORY, "adding", [EA6, "softmax"], 3),
    "recall": Runs(MEMORY, "recall", ["chela", "softmax", "mamba2", "gated_deltanet"], 3),
    "needle": Runs(MEMORY, "needle", ["chela", EA6, "mamba2", "gated_deltanet"], 3),
}
UEA = "arXiv 2501.05730"
# What was published for the very same data: by mixer, or for all of them.
PUBLISHED = {
    ("japanese-vowels", EA6): f"0.973 ({UEA})",
    ("japanese-vowels", EA2): f"0.957 ({UEA})",
    ("japanese-vowels", "softmax"): f"0.970 ({UEA})",
    ("listops", "feedforward_kernel"): "0.185 to 0.187 (its author, arXiv 2211.04076)",
    ("listops", ""): "Mega 0.631 (arXiv 2209.10655)",
    ("pathfinder", ""): "Mega 0.960 (arXiv 2209.10655)",
}


class Case(NamedTuple):
    """One training."""

    name: str
    mixer: str
    seed: int

    @property
    def key(self) -> str:
        """Of its row."""
        return f"{self.name} / {self.mixer}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = f"of {'; '.join(RUNS)}; 'NAME / MIXER' for one mixer"
    parser.add_argument("names", metavar="NAME", nargs="*", default=[*RUNS], help=choices)
    parser.add_argument(
        "--resume", action="store_true", help="keep results of the same words, and train what is missing"
    )
    parser.add_argument("--directory", type=Path, help="keep run directories here, with checkpoints")
    parser.add_argument("--seeds", type=int, default=sys.maxsize, help="at most so many of each row")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="one more word for all of them")
    parser.add_argument("--table", action="store_true", help="print the tables and train nothing")
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page, docs/results.md")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw needle.png and learning.png there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.table:
        every = [Case(name, mixer, seed) for name, r in RUNS.items() for mixer in r.mixers for seed in range(r.seeds)]
        cases = [case for case in every if case.name in arguments.names or case.key in arguments.names]
        cases.sort(key=lambda case: case.seed)  # stopped early, it has some seeds of all rows
        if code := _sweep([case for case in cases if case.seed < arguments.seeds], arguments):
            return code
    rows, found = _read(arguments.out), _read(needle.RESULTS)
    tables = {**{name: table(rows, name) for name in TABLES}, "needle": needle.table(found)}
    print("\n\n".join(tables.values()))
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        for name, text in tables.items():
            page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\1{text}\n\2", page, flags=re.DOTALL)
        replace_text(arguments.page, page)
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        needle.figure(found, arguments.figures / "needle.png")
        learning_figure(rows, arguments.figures / "learning.png")
    return 0


def _sweep(cases: list[Case], arguments: argparse.Namespace) -> int:
    """Train these cases, and keep each result in ``--out`` when it is there; returns the exit code."""
    out, words = arguments.out, {(c.name, c.mixer): words_of(c.name, c.mixer, arguments.set) for c in cases}
    rows = {case.key: _empty_row(case, words[case[:2]]) for case in cases}
    if arguments.resume:
        rows |= {key: row for key, row in _read(out).items() if key in rows and _is_current(row, rows[key])}
        cases = [case for case in cases if str(case.seed) not in rows[case.key]["seeds"]]
    forward_signals()
    codes = [0]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(arguments.jobs) as pool:
        place = arguments.directory or Path(temporary)
        running = {pool.submit(_train, case, rows[case.key], place, arguments): case for case in cases}
        for future in as_completed(running):
            case, row = running[future], rows[running[future].key]
            try:
                result = future.result()
            except (Failed, Stopped) as error:
                codes.append(STOPPED if isinstance(error, Stopped) else FAILED)
                if isinstance(error, Failed):
                    print(error, file=sys.stderr, flush=True)
                continue
            row |= result.pop("of_row")
            row["seeds"] = dict(sorted({**row["seeds"], str(case.seed): result}.items(), key=lambda one: int(one[0])))
            _keep(out, case.key, row)
            print(f"{case.key}, seed {case.seed}: {_metrics([result])}", file=sys.stderr, flush=True)
    if STOPPED in codes:
        print("stopped: the same command with --resume goes on", file=sys.stderr, flush=True)
    return max(codes)


def words_of(name: str, mixer: str, more: Sequence[str] = ()) -> list[str]:
    """The words of a training besides its seed."""
    runs = RUNS[name]
    words = [*runs.words, *MIXERS[mixer], *more]
    model = load(runs.config, words).model
    if not model.causal and any(getattr(registry.MIXERS[one], "causal_only", False) for one in model.mixers):
        words.append("model.causal=true")
    if runs.parameters:
        words.append(f"model.ffn_ratio={ffn_ratio(runs.config, tuple(words), runs.parameters)}")
    return words


@cache
def ffn_ratio(config: str, words: tuple[str, ...], parameters: int) -> float:
    """The `model.ffn_ratio`, in sixteenths, with which a model of bytes has most nearly so many parameters.

    Raises:
        ValueError: none is within 1%.
    """

    def size(sixteenths: int) -> int:
        return num_parameters(config, [*words, f"model.ffn_ratio={sixteenths / 16}"])

    of_16, of_32 = size(16), size(32)
    near = max(1, round(16 + 16 * (parameters - of_16) / (of_32 - of_16)))  # feed-forward layers are linear in it
    if abs(size(near) - parameters) > 0.01 * parameters:
        raise ValueError(f"{config} {shlex.join(words)}: no model has {parameters:,} parameters within 1%")
    return near / 16


def _empty_row(case: Case, words: list[str]) -> dict[str, Any]:
    runs = RUNS[case.name]
    return {
        "table": runs.table,
        "config": runs.config,
        "mixer": case.mixer,
        "words": words,
        "settings": settings_of(runs.config),
        "seeds": {},
    }


def settings_of(config: str) -> str:
    """A digest of what a config's file says of task, model, data and training; comments do not count."""
    tree = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text(encoding="utf-8"))
    shown = ("log_every", "validate_every", "threads")
    train = {key: value for key, value in tree.get("train", {}).items() if key not in shown}
    counted = {name: tree.get(name) for name in ("task", "model", "data", "optim")} | {"train": train}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def _is_current(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether the trainings of a row are those that are wanted now."""
    return all(row[name] == wanted[name] for name in ("config", "words", "settings"))


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _keep(out: Path, key: str, row: dict[str, Any]) -> None:
    """Replace a row of a file; rows are in the order of `RUNS`, and those of no run there are dropped."""
    rows = _read(out) | {key: row}
    order = [f"{name} / {mixer}" for name, runs in RUNS.items() for mixer in runs.mixers]
    replace_text(out, json.dumps({key: rows[key] for key in order if key in rows}, indent=1) + "\n")


def _train(case: Case, row: dict[str, Any], place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training and its test: what is kept of a seed, and in ``of_row`` what all seeds have in common."""
    found = environment("cpu", 1)
    digest = hashlib.sha256(json.dumps([row["words"], row["settings"]]).encode()).hexdigest()[:8]
    run = place / f"{re.sub('[^a-z0-9_]+', '-', case.key)}-{digest}-seed-{case.seed}"
    if not arguments.resume:
        shutil.rmtree(run, ignore_errors=True)
    save_every = SAVE_EVERY if arguments.directory else 0
    longreach("train", row["config"], *row["words"], f"run.seed={case.seed}", run=run, save_every=save_every)
    held_out = rows_of(run / "validation.jsonl")
    if (run / "result.json").exists():
        result = json.loads((run / "result.json").read_text())
        size, steps, chance, metrics = (result[name] for name in ("num_parameters", "step", "chance", "metrics"))
    else:
        size = num_parameters(row["config"], row["words"])  # tokens are bytes
        steps, chance, metrics = held_out[-1]["step"], {}, {BITS: held_out[-1]["loss"] / math.log(2)}
        metrics |= _by_context(run, RUNS[case.name].contexts)
    measure = next(iter(metrics))
    values = [one["loss"] / math.log(2) if measure == BITS else one[measure] for one in held_out]
    curve = [[one["step"], round(value, 5)] for one, value in zip(held_out, values, strict=True)]
    of_row = {"num_parameters": size, "steps": steps, "chance": chance}
    result = {"metrics": metrics, "seconds": training_seconds(run), "curve": curve, "environment": found}
    return {**result, "of_row": of_row}


def _by_context(run: Path, contexts: Sequence[int]) -> dict[str, float]:
    """Bits per byte of the held-out documents that have as many tokens as the largest context, by context."""
    if not contexts:
        return {}
    file = run / "contexts.json"
    words = ["--by-document", "--min-tokens", str(max(contexts)), "--contexts", ",".join(map(str, contexts))]
    longreach("evaluate", str(run), *words, "--json", str(file))
    return {context_name(one["context"]): one["bits_per_byte"] for one in _read(file)["by_context"]}


def context_name(context: int) -> str:
    """Of the metric of `Runs.contexts`."""
    return f"{BITS} at {context:,}"


def table(rows: dict[str, Any], name: str) -> str:
    """The rows of one of `TABLES`, as Markdown."""
    found = {key: row for key, row in rows.items() if row["table"] == name}
    shown = {metric for row in found.values() for seed in row["seeds"].values() for metric in seed["metrics"]}
    contexts = {context_name(n): f"context {n:,}" for n in CONTEXTS if context_name(n) in shown}
    measured = [BITS, *contexts.values()] if name == LANGUAGE else ["test", "simplest answer"]
    published = ["published"] if name == PUBLIC else []
    names = ["`longreach train`", "mixer", "parameters", "steps", "seeds", *measured, *published]
    lines = [table_header([*names, "seconds", "machine, commit"])]
    for key, row in found.items():
        seeds = [*row["seeds"].values()]
        if name == LANGUAGE:
            figures = [_spread(seeds, one) for one in (BITS, *contexts)]
        else:
            figures = [_metrics(seeds), ", ".join(f"{one} {value:.3f}" for one, value in row["chance"].items())]
        case, command = key.split(" / "), shlex.join([row["config"], *row["words"]])
        public = [PUBLISHED[case[0], one] for one in (case[1], "") if (case[0], one) in PUBLISHED]
        times = [seed["seconds"] for seed in seeds if seed["seconds"] is not None]
        cells = [f"`{command}`", row["mixer"], f"{row['num_parameters']:,}", row["steps"], len(seeds), *figures]
        cells += ["; ".join(public)] if published else []
        cells += [f"{mean(times):,.0f}" if times else "", hardware([seed["environment"] for seed in seeds])]
        lines.append(table_line(cells))
    return "\n".join(lines)


def _metrics(seeds: Sequence[dict[str, Any]]) -> str:
    """Each metric's mean over the seeds, and their standard deviation."""
    return ", ".join(f"{name} {_spread(seeds, name)}" for name in seeds[0]["metrics"])


def _spread(seeds: Sequence[dict[str, Any]], name: str) -> str:
    values = [seed["metrics"][name] for seed in seeds if name in seed["metrics"]]
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def learning_figure(rows: dict[str, Any], path: Path) -> None:
    """Draw the held-out metric over the steps of training, a panel for each task whose runs validate more than once; a
    line for each seed.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for key, row in rows.items():
        if any(len(seed["curve"]) > 1 for seed in row["seeds"].values()):
            panels.setdefault(key.split(" / ")[0], []).append(row)
    if not panels:
        return
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, (name, members) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, row in enumerate(members):
            for label, seed in zip([row["mixer"]] + [None] * len(row["seeds"]), row["seeds"].values(), strict=False):
                axes.plot(*zip(*seed["curve"], strict=True), color=f"C{number}", label=label)
        measure = next(iter(next(iter(members[0]["seeds"].values()))["metrics"]))
        axes.set(title=name, xlabel="step", ylabel=f"held-out {measure}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
