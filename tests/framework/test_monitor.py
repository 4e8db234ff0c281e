"""What a run shows: charts whose tags are there, once, whatever was resumed; times, figures, results and traces."""

from __future__ import annotations

import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_world import run_world
from helpers import run_distributed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    parse_session_start_info_plugin_data,
)
from torch import Tensor

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.mixers.chela import ModalKernel, TapKernel
from longreach.framework.model import ModelConfig, build_model
from longreach.framework.monitoring.charts import PARTS
from longreach.framework.monitoring.hosts import Hosts
from longreach.framework.monitoring.monitor import HELD_OUT
from longreach.framework.monitoring.probe import TAPS, Probe, kernel_taps, products, safe_range
from longreach.framework.monitoring.profile import StepProfile
from longreach.framework.trainer import train
from longreach.parallel import traffic
from longreach.parallel.mesh import Axis, Mesh
from longreach.parallel.span import Span
from longreach.parallel.traffic import Stopwatch, timed

CONFIG = """
model:
  width: 16
  depth: 3
  mixers: [elementwise, chela]
  chela: {heads: 2, modes: 2}
data: {source: CORPUS, seq_len: 64, batch_size: 2}
optim: {lr: 1.0e-2, warmup_steps: 2}
train: {steps: 4, threads: 1, validate_every: 2, validate_batches: 2}
monitor: {plot: false, profile_steps: [3, 4]}
"""


def train_and_resume(rank: int, config: str, directory: str) -> None:
    """Four steps, and on to six."""
    one = [f"run.dir={directory}/run", f"parallel.ranks={dist.get_world_size()}"]
    train(load(config, one))
    train(load(config, [*one, "train.steps=6", "optim.lr=2e-2", "deepspeed=zero3"]))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Of a run on two ranks, finished at step 4, and continued to step 6 with another rate and ZeRO stage."""
    directory = tmp_path_factory.mktemp("monitored")
    config = directory / "small.yaml"
    config.write_text(CONFIG.replace("CORPUS", str(corpus)), encoding="utf-8")
    run_world(train_and_resume, 2, str(config), str(directory), timeout=150)
    return directory / "run"


def read_events(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), {"images": 0, "scalars": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def events(run_dir: Path) -> EventAccumulator:
    return read_events(run_dir / "tensorboard")


@pytest.fixture(scope="module")
def held_out(run_dir: Path) -> EventAccumulator:
    return read_events(run_dir / "tensorboard" / HELD_OUT)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_chart_of_the_layout_has_its_tags(events: EventAccumulator, held_out: EventAccumulator) -> None:
    """Five questions, once; each chart's tags are in the run, at every step or at every validation; those of held-out
    data, and no others, in a run of their own, which TensorBoard draws in another colour.
    """
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title[-1] for category in layout.category] == ["?"] * 5
    known = {tag: run for run in (events, held_out) for tag in run.Tags()["scalars"]}
    assert all((run is held_out) == tag.startswith("validation/") for tag, run in known.items())
    for category in layout.category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                tags = [tag for tag in known if re.match(pattern, tag)]
                assert tags == [pattern.removesuffix("$")], chart.title
                steps = [scalar.step for scalar in known[tags[0]].Scalars(tags[0])]
                assert steps in ([1, 2, 3, 4, 5, 6], [2, 4, 6]), (tags, steps)


def test_a_resumed_run_has_one_line_in_the_table_of_runs(events: EventAccumulator, run_dir: Path) -> None:
    """And it is that of the end: its hyperparameters and results. No run beside it comes of that."""
    board = run_dir / "tensorboard"
    assert {path.parent for path in run_dir.rglob("events.out.tfevents.*")} == {board, board / HELD_OUT}
    assert sorted(path.suffix for path in (run_dir / "tensorboard").glob("*.layout")) == [".layout"]
    assert len(list((run_dir / "tensorboard").glob("*.results"))) == 1
    start = parse_session_start_info_plugin_data(events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
    given = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
    assert given["lr"] == 2e-2 and given["steps"] == 6 and given["deepspeed"] == "zero3" and given["ranks"] == 2
    assert given["mixers"] == "elementwise, chela"
    assert {EXPERIMENT_TAG, SESSION_END_INFO_TAG} <= events.summary_metadata.keys()
    rows, held_out = rows_of(run_dir / "metrics.jsonl"), rows_of(run_dir / "validation.jsonl")
    results = {
        "result/held_out": held_out[-1]["loss"],
        "result/loss": sum(row["loss"] for row in rows) / 6,
        "result/tokens_per_second": sorted(row["tokens_per_second"] for row in rows)[2:4],
    }
    for tag, wanted in results.items():
        (result,) = events.Scalars(tag)
        assert result.step == 6
        if isinstance(wanted, list):
            assert wanted[0] * 0.999 <= result.value <= wanted[1] * 1.001
        else:
            assert result.value == pytest.approx(wanted, rel=1e-6)


def test_the_parts_of_a_step_make_it_up(run_dir: Path) -> None:
    for row in rows_of(run_dir / "metrics.jsonl"):
        parts = {part: row[f"{part}_seconds"] for part in PARTS if part != "save"}
        assert all(seconds >= 0 for seconds in parts.values())
        assert min(parts[name] for name in ("compute", "exchange", "zero", "optimizer")) > 0, parts
        assert sum(parts.values()) <= row["step_seconds"] * 1.001
        assert row["skipped_steps"] == 0


def test_validations_say_what_context_gains(events: EventAccumulator, run_dir: Path) -> None:
    for row in rows_of(run_dir / "validation.jsonl"):
        first, last = (row["by_position"][place][1] for place in (0, -1))
        assert row["gain_of_context"] == pytest.approx((first - last) / math.log(2))
        assert 0 <= row["outside_range"] <= 1
    for tag in ("figures/long_kernels", "figures/products", "validation/by_position", "figures/where_the_time_goes"):
        assert [image.step for image in events.Images(tag)] == [2, 4, 6], tag


def test_traces_name_steps_layers_and_exchanges(events: EventAccumulator, run_dir: Path) -> None:
    assert {path.name for path in (run_dir / "profile").iterdir()} == {
        f"steps-3-4.rank-{rank}.json.gz" for rank in range(2)
    }
    for path in (run_dir / "profile").iterdir():
        with gzip.open(path, "rt") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count("step 3") == names.count("step 4") == 1 and "step 2" not in names
        assert names.count("blocks.0.mixer") == names.count("blocks.2.ffn") == 4  # two sequences in each step
        assert any("c10d::" in name for name in names if name)
    (text,) = events.Tensors("profile/top_operators/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert "steps-3-4.rank-0.json.gz" in said and "aten::" in said


def test_layers_that_are_computed_again_lie_in_their_step(tmp_path: Path) -> None:
    """Computing a block again ends in the midst of its last layer."""
    model = build_model(ModelConfig(vocab=8, width=16, depth=2, mixers=["elementwise"]))
    model.recompute = True
    told: list[Path] = []
    traced = StepProfile([1, 2], tmp_path, 0, model, lambda step, path, table: told.append(path))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    for number in (1, 2):
        with traced.step(number):
            model(tokens, labels=tokens)[0].sum().backward()
    with gzip.open(told[0], "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    steps = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith("step ")]
    layers = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith("blocks.")]
    assert len(steps) == 2 and len(layers) == 2 * 2 * 4
    for first, last in layers:
        assert any(begin <= first and last <= end for begin, end in steps)


@pytest.mark.parametrize("steps", ["[3]", "[0, 2]", "[4, 3]", "[1, 2, 3]"])
def test_steps_that_cannot_be_traced_are_refused(steps: str) -> None:
    with pytest.raises(InputError, match=r"monitor\.profile_steps = .*: must be a first and a last step"):
        load("quickstart", [f"monitor.profile_steps={steps}"])


def waits(axis: Axis, relay: str) -> tuple[list[bool], list[bool]]:
    """Whether the stopwatch ran at each wait: of the verbs, forward and backward, and of a `timed` collective."""
    config = ModelConfig(vocab=17, width=8, depth=4, mixers=["elementwise", "chela", "chela", "softmax"])
    config.chela.heads, config.softmax.heads = 2, 2
    model = build_model(config)
    model.blocks[2].mixer.long = TapKernel(8, 64, "free", True)
    span = Span(axis=replace(axis, relay=relay), lengths=[8] * axis.size)
    wait, seen, waiting = dist.Work.wait, [], span.traffic.waiting
    dist.Work.wait = lambda work, *rest: (seen.append(waiting._depth > 0), wait(work, *rest))[1]
    try:
        model(torch.zeros(1, 8, dtype=torch.int64), span).sum().backward()
        verbs, seen, waiting = seen, [], Stopwatch()
        timed(dist.all_reduce, waiting)(torch.ones(3), group=axis.group)
        timed(dist.all_reduce, waiting)(torch.ones(3), group=axis.group, async_op=True).wait()
    finally:
        dist.Work.wait = wait
    return verbs, seen


@pytest.mark.parametrize("relay", ["gather", "pipeline", "recursive_doubling"])
def test_every_wait_for_other_ranks_is_timed(relay: str) -> None:
    for verbs, collectives in run_distributed(waits, 2, relay):
        assert len(verbs) > 20 and all(verbs)
        assert collectives == [True, True]


def test_a_stopwatch_counts_nested_stretches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And begins again at each reading."""
    now = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(traffic, "perf_counter", lambda: next(now))
    counted = traffic.Traffic()
    with counted.waiting, counted.counter("layer", "scan")(8):
        pass
    with counted.waiting:
        pass
    assert counted.waiting.read() == 4.0 and counted.waiting.read() == 0.0
    assert counted.bytes == {("layer", "scan"): 8}


@pytest.mark.parametrize(("order", "ends"), [(2, (-0.70, 1.10)), (4, (-1.32, 2.43)), (6, (-1.91, 3.89))])
def test_the_safe_range_is_that_of_the_mathematics(order: int, ends: tuple[float, float]) -> None:
    assert safe_range(order) == pytest.approx(ends, abs=0.006)


def test_products_are_of_tokens_and_their_past() -> None:
    """q grows and k jumps at the middle: a pair with k of a later token would be seen."""
    q = torch.ones(1, 6, 2)
    k = torch.tensor([0.0, 0.0, 0.0, 3.0, 3.0, 3.0]).view(1, 6, 1).expand(1, 6, 2)
    found = products(q, k, 6)
    assert found.quantiles[0] == 0.0 and found.quantiles[-1] == 6.0
    assert found.outside == pytest.approx(6 / 21)  # pairs of the last three tokens


@pytest.mark.parametrize("kind", ["modal", "free", "decaying"])
@pytest.mark.parametrize("causal", [True, False])
def test_kernels_are_what_the_layer_answers_to_an_impulse(kind: str, causal: bool) -> None:
    length, width = 70, 3
    layer = ModalKernel(width, 4, causal) if kind == "modal" else TapKernel(width, 65, kind, causal)
    impulse = torch.zeros(1, 2 * length, width)
    impulse[:, length] = 1
    with torch.no_grad():
        answer = layer(impulse, Span())[0, length:] - layer.skip * impulse[0, length:]
    taps = kernel_taps(layer)
    assert len(taps) == width and taps.shape[1] <= TAPS
    seen = min(taps.shape[1], length)
    past: Tensor = answer[:seen].T
    torch.testing.assert_close(taps[:, 1:seen], past[:, 1:], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch, of autograd Functions
@pytest.mark.parametrize("compiled", [False, True])
def test_a_probe_looks_once_and_changes_nothing(compiled: bool) -> None:
    model = build_model(ModelConfig(vocab=17, width=16, depth=4, mixers=["elementwise", "chela"]))
    tokens = torch.randint(0, 17, (2, 40))
    with torch.no_grad():
        if compiled:
            model.compile(dynamic=False, backend="eager")
        wanted = model(tokens, Span())
        probe = Probe(model)
        for number in range(2):
            with probe:
                torch.testing.assert_close(model(tokens, Span()), wanted)
            found = dict(probe.products), dict(probe.kernels)
            assert list(found[0]) == ["blocks.0", "blocks.2"] and list(found[1]) == ["blocks.1", "blocks.3"]
            if number == 0:
                first = found
        assert found == first
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        disabled = Probe(model, enabled=False)
        with disabled:
            model(tokens, Span())
        assert not disabled.products and disabled.outside_range is None


def add_steps(world: Axis, directory: str) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Two steps of ranks that waited 1 s and 4 s in exchanges, and came last and 0.5 s before the end to the last."""
    hosts = Hosts(Mesh(sequence=world, world=world), Path(directory))
    own = hosts.own(0.0, 7.0)
    assert own[0] == 0.0 and own[1] >= 0 and own[2] == 7.0 and own[3] > 1 << 20 and own[4] > 0
    for part in (1.0, 2.0):
        found = hosts.add([[part, 9.0, 7.0, 5.0, math.nan], [4 * part, 8.5, 8.0, 6.0, 3.0]])
    report = hosts.report()
    assert hosts.names == list(report.hosts) and not set(report.scalars().values()) & {math.nan}
    return found, report.as_row(), hosts.names


def test_the_slowest_rank_is_the_one_that_waits_least(tmp_path: Path) -> None:
    """By what all ranks told at the end of a step; reports are means, and what a host does not know is null."""
    for found, row, (name,) in run_distributed(add_steps, 2, str(tmp_path)):
        assert found == {"wait_seconds": 5.25, "slowest_rank": 0, "waited_for_slowest_seconds": 6.5}
        assert row == {
            "slowest_host": name,
            "hosts": {
                name: {
                    "ranks": [0, 1],
                    "wait_seconds": [1.5, 6.5],
                    "peak_memory_bytes": [7.0, 8.0],
                    "available_memory_bytes": 5.0,
                    "free_disk_bytes": 3.0,
                }
            },
        }
