"""`model.init_from`: what fits is taken, what does not is told; the same weights on any ranks and ZeRO stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import run_world
from helpers import messages

from longreach.errors import InputError
from longreach.framework import checkpoint
from longreach.framework.checkpoint import tensors_of
from longreach.framework.config import RunConfig, load
from longreach.framework.inference.export import export
from longreach.framework.inference.initial import initialize, initialize_run, listed
from longreach.framework.inference.loading import load_step
from longreach.framework.model import ModelConfig, build_model
from longreach.framework.trainer import train
from longreach.parallel.mesh import PeerFailed, init_mesh, join_world

CONFIG = """
model: {width: 16, depth: 2, mixers: [elementwise, chela], chela: {heads: 2, modes: 2}}
data: {seq_len: 32, batch_size: 4}
optim: {lr: 1.0e-2}
train: {steps: 2, threads: 1, validate_batches: 1}
monitor: {tensorboard: false, plot: false}
task: {examples: 8, test_examples: 2}
"""
STILL = ["train.steps=1", "optim.lr=1e-12", "optim.weight_decay=0"]  # a step that leaves weights as they were


def train_each(rank: int, runs: list[list[str]]) -> None:
    for words in runs:
        train(load(words[0], words[1:]))


@pytest.fixture(scope="module")
def place(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a language model that two ranks trained in stage 3, and its export."""
    folder = tmp_path_factory.mktemp("initial")
    (folder / "small.yaml").write_text(CONFIG.replace("data: {", f"data: {{source: {corpus}, "))
    words = [f"{folder}/small.yaml", f"run.dir={folder}/first", "parallel.ranks=2", "deepspeed=zero3"]
    run_world(train_each, 2, [words], timeout=100)
    export(folder / "first", folder / "exported")
    return folder


def other_head(**fields: Any) -> ModelConfig:
    shape: dict[str, Any] = {"vocab": 256, "width": 16, "depth": 2, "head": "class", "outputs": 3, **fields}
    config = ModelConfig(mixers=["elementwise", "chela"], **shape)
    config.chela.heads, config.chela.modes = 2, 2
    return config


@pytest.mark.timeout(300)
def test_a_run_begins_with_the_weights_on_every_layout(place: Path, tmp_path: Path) -> None:
    """After a step at a rate of nothing, all tensors are those of the source, those of a new head apart."""
    source = tensors_of(load_step(place / "first")[1])
    common = [f"{place}/small.yaml", *STILL, f"model.init_from={place}/exported"]
    classes = ["task.name=listops", "data.seq_len=32"]  # another vocabulary and another head
    for ranks, stages in ((1, (0, 3)), (2, (1, 2))):
        runs = [[*common, f"parallel.ranks={ranks}", f"deepspeed=zero{s}", f"run.dir={tmp_path}/{s}"] for s in stages]
        runs.append([*runs[1], *classes, f"run.dir={tmp_path}/other-{ranks}"])
        run_world(train_each, ranks, runs, timeout=200)
        for stage in stages:
            for name, tensor in tensors_of(load_step(tmp_path / str(stage))[1]).items():
                assert torch.allclose(tensor, source[name], atol=1e-7), f"stage {stage}: {name}"
        other = tensors_of(load_step(tmp_path / f"other-{ranks}")[1])
        same = {name for name in other if name in source and other[name].shape == source[name].shape}
        assert other.keys() - same == {"embedding.weight", "head.answer.weight", "head.answer.bias"}
        for name in same:
            assert torch.allclose(other[name], source[name], atol=1e-7), name
    assert torch.equal(other["embedding.weight"], tensors_of(load_step(tmp_path / "other-1")[1])["embedding.weight"])


@pytest.mark.parametrize("kind", ["first", "exported"])
def test_what_fits_is_taken_and_the_rest_is_told(kind: str, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tensors_of(load_step(place / "first")[1])
    model = build_model(other_head(vocab=300))
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    with caplog.at_level("INFO", "longreach"):
        initialize(model, str(place / kind))
    new = {"embedding.weight", "head.answer.weight", "head.answer.bias"}
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensor, before[name] if name in new else source[name]), name
    count = sum(source[name].numel() for name in before.keys() - new)
    taken, added, left = messages(caplog.records)
    number = len(before) - 3
    assert taken == (
        f"initial weights of {place / kind}: {number} tensors taken, {count:,} numbers: "
        f"blocks.* ({number - 1}), head.norm.weight"
    )
    assert added == "initial weights: 3 tensors are new: embedding.weight, head.answer.* (2)"
    assert left == f"initial weights: 1 tensors of {place / kind} are left: embedding.weight [256, 16], here [300, 16]"


def test_names_are_condensed() -> None:
    assert listed(["a.b.c", "a.b.d.e", "f", "g.h"]) == "a.b.* (2), f, g.h"
    assert listed([f"n{number}" for number in range(9)]) == "n0, n1, n2, n3, n4, n5 and 3 more"


def test_mistakes_are_told(place: Path, tmp_path: Path) -> None:
    """And the model is as it was."""
    model = build_model(other_head(width=24, outputs=2, depth=1))
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    with pytest.raises(InputError, match=r"no tensor that fits this model: .*embedding.weight \[256, 16\], here"):
        initialize(model, str(place / "first"))
    with pytest.raises(InputError, match="neither an export nor a run with a checkpoint"):
        initialize(model, str(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mamba2"}')
    with pytest.raises(InputError, match=r"is a model of transformers; set model\.pretrained="):
        initialize(model, str(tmp_path / "other"))
    shutil.copytree(place / "exported", tmp_path / "damaged")
    with open(tmp_path / "damaged" / "model.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"xyz")
    with pytest.raises(InputError, match="is damaged") as error:
        initialize(model, str(tmp_path / "damaged"))
    assert error.value.field == "model.init_from"
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())


def test_a_resumed_run_reads_its_own_checkpoint(place: Path, tmp_path: Path) -> None:
    """Also where the source is gone."""
    shutil.copytree(place / "exported", tmp_path / "source")
    words = [f"{place}/small.yaml", f"run.dir={tmp_path}/run", f"model.init_from={tmp_path}/source"]
    run_world(train_each, 1, [words], timeout=100)
    half = checkpoint.newest(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "source")
    run_world(train_each, 1, [[*words, "train.steps=3"]], timeout=100)
    assert half != checkpoint.newest(tmp_path / "run" / "checkpoints")
    with pytest.raises(Exception, match=r"model\.init_from"):
        run_world(train_each, 1, [[*words, f"run.dir={tmp_path}/new"]], timeout=100)


def _read(rank: int, places: list[str]) -> str:
    join_world()
    config = RunConfig(model=other_head(init_from=places[rank]))
    config.run.dir = places[rank] + "/nothing"
    try:
        initialize_run(build_model(config.model), config, init_mesh(2))
    except (InputError, PeerFailed) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_cannot_read_ends_all(place: Path, tmp_path: Path) -> None:
    first, second = run_world(_read, 2, [str(place / "exported"), str(tmp_path)], timeout=60)
    assert first == "PeerFailed: rank 1 failed" and second.startswith("InputError: model.init_from")
