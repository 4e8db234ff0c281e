"""Exports: the same model in another process without DeepSpeed, and one line for whatever is wrong with one."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import longreach
from longreach.errors import InputError
from longreach.framework.checkpoint import tensors_of
from longreach.framework.checkpoint.directory import FORMAT, Keep, commit, partial_of, path_of
from longreach.framework.checkpoint.shards import write
from longreach.framework.config import RunConfig, save
from longreach.framework.inference.export import CONFIG, TENSORS, export, load_exported
from longreach.framework.inference.generate import Decoder
from longreach.framework.inference.loading import load_run
from longreach.framework.model import build_model
from longreach.framework.runtime.files import digest

MIXERS = ["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"]


def make_run(place: Path, seed: int = 0, width: int = 16) -> Path:
    """A run as training leaves it, but without training: a config, and a checkpoint of the model in two shards."""
    config = RunConfig()
    config.model.vocab, config.model.width, config.model.depth, config.model.mixers = 256, width, len(MIXERS), MIXERS
    config.model.chela.heads = config.model.feedforward_kernel.heads = config.model.softmax.heads = 2
    config.model.mamba2.head_width, config.model.mamba2.state_size = 8, 5
    config.train.steps, config.optim.schedule_steps = 7, 7
    config.data.seq_len, config.data.batch_size = 65, 1
    (place / "checkpoints").mkdir(parents=True)
    save(config, place / "config.yaml")
    torch.manual_seed(seed)
    tensors = {name: tensor.detach().flatten() for name, tensor in tensors_of(build_model(config.model)).items()}
    path = path_of(place / "checkpoints", 7)
    partial_of(path).mkdir()
    for rank in range(2):
        shard = {}
        for name, values in tensors.items():
            middle = len(values) // 3
            shard[name] = (0, values[:middle].clone()) if rank == 0 else (middle, values[middle:].clone())
        write(partial_of(path) / f"model-{rank:05d}-of-00002.safetensors", shard, {})
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": digest(file).hex()} for file in partial_of(path).iterdir()
    }
    shapes = {name: [*tensor.shape] for name, tensor in tensors_of(build_model(config.model)).items()}
    document = {
        "format": FORMAT,
        "state": {"step": 7, "held_out": None},
        "optimizer_step": 7,
        "loss_scaler": {},
        "shapes": {"model": shapes, "optimizer": {}},
        "files": files,
    }
    commit(path, document, Keep())
    return place


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "small")


def test_what_is_exported_is_the_runs_model(run: Path, tmp_path: Path) -> None:
    """Every tensor bit by bit, whole, once, by its name; the same logits; no file beside the two."""
    assert export(run, tmp_path / "deep" / "out")[1] == 7
    out = tmp_path / "deep" / "out"
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, TENSORS]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    model, tensors = load_run(run)[1], load_file(out / TENSORS)
    assert tensors.keys() == tensors_of(model).keys() and "head.weight" not in tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(model).items())
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    document = json.loads((out / CONFIG).read_text())
    assert document["format"] == 1 and document["step"] == 7 and document["model"]["mixers"] == MIXERS

    modes = {path.stat().st_mode & 0o777 for path in (*out.iterdir(), *run.rglob("step-*/*"))}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}

    before = torch.get_rng_state()
    loaded, tokens = load_exported(out), torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training and loaded.head.weight is loaded.embedding.weight
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_readmes_lines_load_it_without_deepspeed(run: Path, tmp_path: Path) -> None:
    """In a process where importing DeepSpeed fails."""
    export(run, tmp_path / "exported")
    package = Path(longreach.__path__[0])
    lines = re.search(r"^```python\n(.*?)^```$", (package / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert lines and "load_exported" in lines[1]
    script = f"import sys; sys.modules['deepspeed'] = None; sys.path.insert(0, {str(package.parent)!r})\n{lines[1]}"
    script += "print(logits.double().sum().item())\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load_run(run)[1](torch.tensor([list(b"def main(")])).double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


def test_an_export_goes_on_from_a_carry_of_the_run(run: Path, tmp_path: Path) -> None:
    """They are one model, by the digest too."""
    export(run, tmp_path / "out")
    decoder = Decoder(load_run(run)[1], seed=4)
    decoder.prefill(torch.arange(30).unsqueeze(0))
    decoder.save(tmp_path / "carry")
    other = Decoder.load(load_exported(tmp_path / "out"), tmp_path / "carry")
    assert [*map(int, other.generate(12))] == [*map(int, decoder.generate(12))]


def test_transformers_loads_an_export(run: Path, tmp_path: Path) -> None:
    """And `load_exported` reads what it saves, which has no digest: its tensors may have been changed."""
    from transformers import AutoModelForCausalLM

    from longreach.framework.inference.huggingface import LongreachForCausalLM

    model, tokens = export(run, tmp_path / "out")[0], torch.randint(0, 256, (2, 33))
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(loaded, LongreachForCausalLM) and not any(found.values())
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens))
    loaded.save_pretrained(tmp_path / "again")
    document = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert document["architectures"] == ["LongreachForCausalLM"]
    assert not {"format", "step", "sha256"} & document.keys()
    with torch.no_grad():
        assert torch.equal(load_exported(tmp_path / "again")(tokens), model(tokens))


def test_an_export_of_an_earlier_version_is_read(run: Path, tmp_path: Path) -> None:
    """One that says nothing to transformers."""
    export(run, tmp_path)
    document = json.loads((tmp_path / CONFIG).read_text())
    del document["model_type"], document["architectures"]
    (tmp_path / CONFIG).write_text(json.dumps(document))
    load_exported(tmp_path)


def test_an_earlier_export_is_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty directory is nothing that would be lost
    export(run, out)
    export(make_run(tmp_path / "other", seed=1), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    assert torch.equal(load_exported(out).embedding.weight, load_run(tmp_path / "other")[1].embedding.weight)


@pytest.mark.parametrize("what", ["file", "folder", "run", "another project's model"])
def test_a_place_that_is_something_else_is_refused(what: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        for name in {"folder": ["mine"], "run": ["config.yaml"]}.get(what, [CONFIG, TENSORS]):
            (out / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"OUT_DIR = .*is something else than an export"):
        export(run, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_cannot_be_written_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a part of it, nor a gap where an earlier one was."""
    export(run, tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longreach.framework.inference.export.write_text", full)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_exported(tmp_path / "out")


def change(key: str, value: Any) -> Callable[[Path], None]:
    """Write another value into ``config.json``."""

    def harm(out: Path) -> None:
        document = json.loads((out / CONFIG).read_text())
        *path, last = key.split(".")
        place = document
        for name in path:
            place = place[name]
        place[last] = value
        (out / CONFIG).write_text(json.dumps(document))

    return harm


def flip(out: Path) -> None:
    data = bytearray((out / TENSORS).read_bytes())
    data[-5] ^= 1
    (out / TENSORS).write_bytes(data)


def rewrite(out: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors, and the digest with them, as someone would who lies."""
    tensors = load_file(out / TENSORS)
    edit(tensors)
    save_file(tensors, out / TENSORS)
    change("sha256", digest(out / TENSORS).hex())(out)


def cut(out: Path) -> None:
    (out / TENSORS).write_bytes((out / TENSORS).read_bytes()[:100])
    change("sha256", digest(out / TENSORS).hex())(out)


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tensors": (lambda out: (out / TENSORS).unlink(), r"model.safetensors.*cannot be read"),
    "no config": (lambda out: (out / CONFIG).unlink(), r"config.json.*cannot be read.*longreach export"),
    "a bit": (flip, r"is damaged: its SHA-256"),
    "cut": (cut, r"model.safetensors.*is damaged"),
    "not JSON": (lambda out: (out / CONFIG).write_text("{"), "is not JSON"),
    "not text": (lambda out: (out / CONFIG).write_bytes(b"\xff"), "is not JSON"),
    "a list": (lambda out: (out / CONFIG).write_text("[]"), "is of format None"),
    "nested": (lambda out: (out / CONFIG).write_text("[" * 9999), "is not JSON"),
    "another format": (change("format", 2), "is of format 2; this version reads 1"),
    "no digest": (change("sha256", 5), "not what longreach export writes"),
    "an unknown key": (change("model.widht", 3), r"model.widht.*did you mean"),
    "a wrong type": (change("model.width", "wide"), r"model.width = 'wide'"),
    "an interpolation": (change("model.mixers", ["${oc.env:HOME}"]), "must hold plain values"),
    "an unknown mixer": (change("model.mixers", ["magic"]), "model.mixers = 'magic'"),
    "no heads": (change("model.chela.heads", 0), "describes no model"),
    "a ratio that is none": (change("model.ffn_ratio", math.inf), "describes no model|ffn_ratio"),
    "another shape": (change("model.width", 32), r"does not fit config.json: .* is \[16\], not \[32\]"),
    "enormous": (change("model.width", 2**40), r"does not fit config.json|describes no model"),
    "endless": (change("model.depth", 2**40), "too few for a depth"),
    "less": (lambda out: rewrite(out, lambda t: t.pop("embedding.weight")), "embedding.weight is not in it"),
    "more": (lambda out: rewrite(out, lambda t: t.update(odd=torch.ones(1))), "odd is not in the model"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_bad_export_is_told_in_one_line(name: str, run: Path, tmp_path: Path) -> None:
    harm, expected = HARMS[name]
    export(run, tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(InputError, match=expected) as caught:
        load_exported(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_nothing_but_the_two_files_is_needed(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    with safe_open(tmp_path / "out" / TENSORS, "pt") as file:
        assert file.metadata() is None
    (tmp_path / "out" / "README.md").write_text("a model")
    load_exported(tmp_path / "out")
