"""Checkpoints: exact, readable on other ranks and stages, checked, and never lost. Real DeepSpeed, real files."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import SmallModel, batches, run_world, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longreach.errors import InputError
from longreach.framework import checkpoint
from longreach.framework.checkpoint.directory import digest_of
from longreach.framework.deepspeed.engine import Engine
from longreach.framework.deepspeed.settings import deepspeed_settings
from longreach.framework.runtime.files import digest
from longreach.parallel.mesh import PeerFailed, init_mesh

STATE = {"step": 3, "consumed": 12, "seed": 7, "fingerprint": "abc"}
GLOBAL_BATCH = 4  # sequences groups of a step, over all ranks


def engine_of(stage: int, precision: str = "fp32", seed: int = 0, dropout: float = 0.0) -> Engine:
    mesh = init_mesh()
    size = mesh.world.size
    torch.manual_seed(seed)
    model = SmallModel(dropout)
    settings = deepspeed_settings(
        f"zero{stage}",
        precision=precision,
        batch_size=GLOBAL_BATCH,
        micro_batch_size=1,
        accumulation=GLOBAL_BATCH // size,
        clip=1.0,
        world_size=size,
    )
    return Engine(model, model.optimizer(), settings, mesh)


def train(engine: Engine, first: int, last: int) -> list[float]:
    """Steps ``first`` to ``last``: the same data and the same true loss on any number of ranks."""
    world = engine.mesh.world
    norms = []
    for number, batch in list(enumerate(batches(6, 1, GLOBAL_BATCH)))[first:last]:
        for micro in batch[0][world.rank :: world.size]:
            engine.backward(engine(micro).sum() / 100)
        norms.append(engine.step(0.01 / (number + 1)))
    return norms


def everything(engine: Engine) -> dict[str, Tensor]:
    """All tensors, by name and key."""
    return {f"{name}.{key}": value for name, parts in whole(engine).items() for key, value in parts.items()}


def stored(path: Path) -> dict[str, Tensor]:
    """The same, put together from the files of a checkpoint, of which each value is in one."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    document = json.loads((path / checkpoint.STATE).read_text())
    for name in document["files"]:
        with safe_open(path / name, "pt") as file:
            starts = json.loads(file.metadata()["starts"])
        for label, values in load_file(path / name).items():
            label += ".param" * name.startswith(checkpoint.MODEL)
            pieces.setdefault(label, []).append((starts[label.removesuffix(".param")], values))
    shapes = {f"{name}.param": shape for name, shape in document["shapes"][checkpoint.MODEL].items()}
    shapes |= document["shapes"][checkpoint.OPTIMIZER]
    found = {name: torch.cat([values for _, values in sorted(parts)]) for name, parts in pieces.items()}
    return {name: found[name].view(shape) for name, shape in shapes.items()}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest absolute difference, 0 only if every bit is equal."""
    assert left.keys() == right.keys()
    return max(
        0.0 if torch.equal(left[name], right[name]) else float((left[name] - right[name]).abs().max()) + 1e-30
        for name in left
    )


def resumes_exactly(rank: int, directory: str, precision: str) -> None:
    for stage in range(4):
        place = Path(directory) / str(stage)
        engine = engine_of(stage, precision, dropout=0.3)
        torch.manual_seed(10 + rank)
        train(engine, 0, 3)
        path = checkpoint.save(engine, place, STATE)
        expected_norms = train(engine, 3, 6)
        expected = everything(engine)
        scaler = engine.loss_scaler
        engine.close()

        engine = engine_of(stage, precision, seed=99, dropout=0.3)
        assert checkpoint.load(engine, path) == STATE
        assert engine.optimizer_step_count == 3
        assert train(engine, 3, 6) == expected_norms
        assert distance(everything(engine), expected) == 0.0
        assert engine.loss_scaler == scaler
        assert engine.module.kept.tolist() == [0, 1, 2]
        engine.close()


@pytest.mark.parametrize("ranks, precision", [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, ranks: int, precision: str) -> None:
    """With dropout, so that random states count; into another model, so that nothing is right by chance."""
    run_world(resumes_exactly, ranks, str(tmp_path), precision)


def one_leg(rank: int, directory: str, stage: int, precision: str, first: int, last: int) -> dict[str, Tensor] | None:
    """Load what is newest, compare it with the file, train, save; returns all tensors on the first rank."""
    engine = engine_of(stage, precision, seed=first)  # whatever it starts as, loading decides
    if saved := checkpoint.newest(directory):
        assert checkpoint.load(engine, saved)["step"] == first
        assert distance(everything(engine), stored(saved)) == 0.0
        assert engine.optimizer_step_count == first
    else:
        assert first == 0
    train(engine, first, last)
    checkpoint.save(engine, directory, {"step": last})
    found = everything(engine)
    return found if rank == 0 else None


LEGS = {
    "odd": [(1, 2), (3, 1), (0, 2), (2, 4), (3, 2), (1, 1)],
    "even": [(1, 1), (2, 4), (1, 2), (3, 4), (0, 1), (0, 2)],
}


@pytest.mark.parametrize("order", LEGS)
def test_training_moves_between_stages_and_ranks(tmp_path: Path, order: str) -> None:
    """Six steps, each in another layout, against six steps in one; at each border the tensors are equal bit by bit."""
    (expected,) = run_world(one_leg, 1, str(tmp_path / "one"), 0, "fp32", 0, 6)
    for number, (stage, ranks) in enumerate(LEGS[order]):
        found = run_world(one_leg, ranks, str(tmp_path / "many"), stage, "fp32", number, number + 1)[0]
    assert distance(found, expected) < 2e-6


def test_low_precision_moves_too(tmp_path: Path) -> None:
    """The fp32 values behind bf16 weights are kept, not their rounded copies."""
    for number, (stage, ranks) in enumerate([(1, 2), (3, 2), (0, 1), (2, 2)]):
        found = run_world(one_leg, ranks, str(tmp_path), stage, "bf16", number, number + 1)[0]
    assert not torch.equal(found["up.weight.param"], found["up.weight.param"].bfloat16().float())


# Files

MODEL, OPTIMIZER = (checkpoint.file_name(kind, 0, 1) for kind in (checkpoint.MODEL, checkpoint.OPTIMIZER))


def save_several(rank: int, directory: str) -> None:
    engine = engine_of(1)
    for step in (3, 5):
        train(engine, step - 3, step - 2)
        checkpoint.save(engine, directory, {**STATE, "step": step})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints of steps 3 and 5; not to be changed."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_world(save_several, 1, str(directory))
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_a_plain_model_loads(saved: Path) -> None:
    torch.manual_seed(5)
    model = SmallModel()
    model.kept.zero_()
    assert checkpoint.load_model(model, saved / "step-00000005") == {**STATE, "step": 5}
    tensors = stored(saved / "step-00000005")
    for name, value in [*model.named_parameters(), ("kept", model.kept)]:
        assert torch.equal(value, tensors[f"{name}.param"])
    assert model.head.weight is model.embed.weight
    assert all(value.dtype == torch.float32 for name, value in tensors.items() if name != "kept.param")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (flip, "is damaged: its SHA-256 is not the one that was written"),
    (truncate, "is damaged: "),
    (Path.unlink, "is missing"),
    (lambda file: file.write_bytes(pickle.dumps({"a": 1})), "is damaged: "),
]


@pytest.mark.parametrize("damage, message", DAMAGE)
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_damaged_file_is_named(copy: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    damage(copy / "step-00000005" / name)
    with pytest.raises(InputError) as caught:
        checkpoint.verify(copy / "step-00000005")
    if name == MODEL:
        with pytest.raises(InputError, match=re.escape(str(caught.value))):
            checkpoint.load_model(SmallModel(), copy / "step-00000005")
    assert f"step-00000005/{name}': {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_state_is_named(copy: Path) -> None:
    file = copy / "step-00000005" / checkpoint.STATE
    text = file.read_text()
    file.write_text(text.replace('"consumed": 12', '"consumed": 13'))
    with pytest.raises(InputError, match=r"state.json': is damaged: its SHA-256"):
        checkpoint.load_model(SmallModel(), file.parent)
    file.write_text(text[:-3])
    with pytest.raises(InputError, match=r"state.json': is damaged: it is not JSON"):
        checkpoint.load_model(SmallModel(), file.parent)
    newer = {**json.loads(text), "format": 3}
    file.write_text(json.dumps({**newer, "sha256": digest_of(newer)}))
    with pytest.raises(InputError, match=r"is of format 3; this version reads 2; install a newer longreach"):
        checkpoint.load_model(SmallModel(), file.parent)


class Executed:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_does_not_execute(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when its size and digest were put into ``state.json``."""
    monkeypatch.chdir(copy)
    file = copy / "step-00000005" / MODEL
    file.write_bytes(pickle.dumps(Executed()))
    state = file.with_name(checkpoint.STATE)
    document = json.loads(state.read_text())
    document["files"][MODEL] = {"bytes": file.stat().st_size, "sha256": digest(file).hex()}
    state.write_text(json.dumps({**document, "sha256": digest_of(document)}))
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load_model(SmallModel(), file.parent)
    assert not (copy / "executed").exists()


def test_another_model_is_told_which_tensors_differ(saved: Path) -> None:
    model = SmallModel()
    model.odd = nn.Parameter(torch.zeros(6))
    model.more = nn.Parameter(torch.zeros(1))
    del model.frozen
    with pytest.raises(InputError) as caught:
        checkpoint.load_model(model, saved / "step-00000005")
    differences = "frozen is not in the model, more is not in it, odd is [5], not [6]"
    assert f"does not fit the model: {differences}; check model.*" in str(caught.value)


@pytest.mark.parametrize("latest", ["", "step-00000099\n", "../../etc", None])
def test_a_stale_latest_is_passed_over_loudly(copy: Path, latest: str | None, caplog: Any) -> None:
    if latest is None:
        (copy / checkpoint.LATEST).unlink()
    else:
        (copy / checkpoint.LATEST).write_text(latest)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(copy) == copy / "step-00000005"
    assert "latest is not usable" in caplog.text


def test_latest_decides(copy: Path, caplog: Any) -> None:
    (copy / checkpoint.LATEST).write_text("step-00000003\n")
    assert checkpoint.newest(copy) == copy / "step-00000003"
    assert not caplog.records
    assert checkpoint.newest(copy / "nowhere") is None


def test_an_incomplete_checkpoint_is_passed_over_and_only_such_ones_are_an_error(copy: Path, caplog: Any) -> None:
    """A run is never begun anew because its checkpoints are broken."""
    truncate(copy / "step-00000005" / OPTIMIZER)
    assert checkpoint.newest(copy) == copy / "step-00000003"
    assert f"step-00000005/{OPTIMIZER}" in caplog.text
    (copy / "step-00000003" / checkpoint.STATE).unlink()
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        checkpoint.newest(copy)


def damaged_for_all(rank: int, path: str) -> str:
    engine = engine_of(2)
    with pytest.raises((InputError, PeerFailed)) as caught:
        checkpoint.load(engine, path)
    return f"{caught.type.__name__}: {caught.value}"


def test_every_rank_hears_of_a_damaged_file(copy: Path) -> None:
    """The ranks share out the files to be hashed; the one that finds nothing does not wait for the other for ever."""
    flip(copy / "step-00000005" / OPTIMIZER)
    first, second = run_world(damaged_for_all, 2, str(copy / "step-00000005"), timeout=60)
    assert first == "PeerFailed: rank 1 failed"
    assert second.startswith("Damaged") and OPTIMIZER in second


def fails_to_save(rank: int, directory: str) -> list[str]:
    engine = engine_of(2)
    train(engine, 0, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = []
    for victim, limit in ((0, 100), (0, 3000), (1, 100)):  # as on a full disk: in the first file, or in the second
        if rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises((InputError, PeerFailed)) as caught:
            checkpoint.save(engine, directory, {"step": 7})
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        told.append(f"{caught.type.__name__}: {caught.value}")
    assert checkpoint.newest(directory) == Path(directory) / "step-00000005"
    found = sorted(path.name for path in Path(directory).iterdir())
    assert found == ["latest", "step-00000003", "step-00000005"]
    assert checkpoint.load(engine, Path(directory) / "step-00000005")["step"] == 5
    return told


def test_a_save_that_fails_leaves_what_was_there(copy: Path) -> None:
    first, second = run_world(fails_to_save, 2, str(copy))
    for line in (*first[:2], second[2]):
        assert line.startswith(f"InputError: checkpoint = '{copy}/step-00000007': cannot be written: ")
        assert "File too large" in line
        assert line.endswith("earlier checkpoints are untouched")
        assert "\n" not in line
    assert (*second[:2], first[2]) == ("PeerFailed: rank 0 failed",) * 2 + ("PeerFailed: rank 1 failed",)


def saves_after_a_kill(rank: int, directory: str) -> None:
    engine = engine_of(0)
    checkpoint.save(engine, directory, {"step": 6}, checkpoint.Keep(2))


def test_the_leavings_of_a_killed_save_are_ignored_then_removed(copy: Path) -> None:
    """At each stage of it: before the move, between the two moves of a replacement, before ``latest``."""
    (copy / ".step-00000006.partial").mkdir()
    (copy / ".step-00000006.partial" / MODEL).write_text("half")
    (copy / ".latest.partial").write_text("step-0000")
    assert checkpoint.newest(copy) == copy / "step-00000005"
    (copy / "step-00000005").rename(copy / "step-00000005.replaced")
    assert checkpoint.newest(copy) == copy / "step-00000005.replaced"
    (copy / "step-00000005.replaced").rename(copy / "step-00000005")
    run_world(saves_after_a_kill, 1, str(copy))
    assert sorted(path.name for path in copy.iterdir()) == ["latest", "step-00000005", "step-00000006"]
    assert checkpoint.newest(copy) == copy / "step-00000006"


def saves_twice(rank: int, directory: str) -> None:
    engine = engine_of(0)
    for step in (1, 2, 9, 2, 3):
        checkpoint.save(engine, directory, {"step": step}, checkpoint.Keep(2))


def test_a_checkpoint_is_replaced_and_later_ones_are_not_removed(tmp_path: Path) -> None:
    run_world(saves_twice, 1, str(tmp_path / "a" / "b"))
    found = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert found == ["latest", "step-00000002", "step-00000003", "step-00000009"]
    assert (tmp_path / "a" / "b" / "latest").read_text() == "step-00000003\n"


def cannot_save(rank: int, directory: str) -> str:
    with pytest.raises(InputError) as caught:
        checkpoint.save(engine_of(0), directory, {"step": 1})
    return str(caught.value)


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (line,) = run_world(cannot_save, 1, str(tmp_path / "file"))
    assert "cannot be written: File exists" in line or "cannot be written: Not a directory" in line


# Whoever can write a whole checkpoint can sign it: what he writes must end in one line all the same.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place] * bool(place) + [found for key, child in items for found in places(child, (*place, key))]


def sign(path: Path, document: dict[str, Any]) -> None:
    (path / checkpoint.STATE).write_text(json.dumps({**document, "sha256": digest_of(document)}))


def load_it(path: Path) -> None:
    """Everything that reads a checkpoint."""
    with contextlib.suppress(InputError):
        checkpoint.verify(path)
    with contextlib.suppress(InputError):
        checkpoint.newest(path.parent)
    with contextlib.suppress(InputError):
        checkpoint.load_model(SmallModel(), path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_forged_state_ends_as_an_input_error(copy: Path, data: st.DataObject) -> None:
    path = copy / "step-00000005"
    good = (path / checkpoint.STATE).read_bytes()
    document = json.loads(good)
    *parents, key = data.draw(st.sampled_from(places(document)))
    node = document
    for parent in parents:
        node = node[parent]
    if data.draw(st.booleans()):
        node[key] = data.draw(VALUES)
    else:
        del node[key]
    try:
        sign(path, document)
        load_it(path)
    finally:
        (path / checkpoint.STATE).write_bytes(good)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forged_tensors_end_as_an_input_error(copy: Path, data: st.DataObject) -> None:
    """Changes in the header, where names, types, shapes and places stand, and cuts."""
    path = copy / "step-00000005"
    state, good = json.loads((path / checkpoint.STATE).read_text()), (path / MODEL).read_bytes()
    content = bytearray(good)
    header = 8 + int.from_bytes(good[:8], "little")
    for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), header, 8, 0]) | st.integers(0, len(content)))]
    (path / MODEL).write_bytes(content)
    files = {**state["files"], MODEL: {"bytes": len(content), "sha256": digest(path / MODEL).hex()}}
    try:
        sign(path, {**state, "files": files})
        load_it(path)
    finally:
        (path / MODEL).write_bytes(good)
        sign(path, state)


def restores_random_states(rank: int, path: str) -> str:
    with pytest.raises(InputError) as caught:
        checkpoint.load(engine_of(1), path)
    return str(caught.value)


def test_forged_random_states_end_as_an_input_error(copy: Path) -> None:
    path = copy / "step-00000005"
    document = json.loads((path / checkpoint.STATE).read_text())
    with safe_open(path / MODEL, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path / MODEL), path / MODEL, {**metadata, "random": json.dumps({"cpu": "00ff"})})
    document["files"][MODEL] = {"bytes": (path / MODEL).stat().st_size, "sha256": digest(path / MODEL).hex()}
    sign(path, document)
    (line,) = run_world(restores_random_states, 1, str(path))
    assert "its random states are none" in line and "\n" not in line
