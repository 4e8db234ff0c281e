"""Hidden states of files: those of each block of the model, however they are read in blocks and pooled."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file
from torch import Tensor

from longreach.framework.checkpoint import tensors_of
from longreach.framework.inference import embed as embed_module
from longreach.framework.inference.embed import Embedder, embed
from longreach.framework.inference.loading import CONFIG, TENSORS, ExportConfig
from longreach.framework.model import ModelConfig, build_model
from longreach.framework.runtime.files import digest, write_tensors
from longreach.framework.tasks import TaskDescription
from longreach.launch import cli
from longreach.parallel.span import Span

WIDTH, DEPTH = 16, 3


def small_model(**fields: Any) -> Any:
    shape: dict[str, Any] = {"vocab": 256, "width": WIDTH, "depth": DEPTH, "positions": "sinusoidal", **fields}
    config = ModelConfig(mixers=["elementwise", "chela"], **shape)
    config.chela.heads, config.chela.modes = 2, 2
    torch.manual_seed(0)
    return build_model(config).eval()


def exported(model: Any, place: Path, task: TaskDescription | None = None) -> Path:
    """An export of a model that no run trained."""
    place.mkdir()
    write_tensors(place / TENSORS, {name: one.detach().contiguous() for name, one in tensors_of(model).items()})
    document = dataclasses.asdict(ExportConfig(sha256=digest(place / TENSORS).hex(), model=model.config))
    document["task"] = None if task is None else task.as_json()
    if task is None:
        del document["task"]
    (place / CONFIG).write_text(json.dumps(document))
    return place


@torch.no_grad()
def states(model: Any, tokens: Tensor) -> list[Tensor]:
    """The hidden states ``[L, D]`` of all layers, block after block, of a whole sequence."""
    span = Span()
    x = model._embed(tokens.unsqueeze(0), span)
    found = [x]
    for number, block in enumerate(model.blocks):
        x, _ = block(x, span.for_layer(f"blocks.{number}"))
        found.append(x)
    if model.config.head in ("token", "series"):
        found[-1] = model.head.norm(x)
    return [x[0] for x in found]


@pytest.mark.parametrize(
    "fields",
    [{}, {"head": "class", "outputs": 3}, {"head": "numbers", "outputs": 2, "channels": 2}, {"causal": False}],
    ids=str,
)
@pytest.mark.parametrize("layer", [0, 1, DEPTH, -1, -2, -DEPTH - 1])
def test_each_layer(layer: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a model that pools its tokens, in blocks that do not divide the sequence, and unlike in one block."""
    monkeypatch.setattr(embed_module, "PREFILL_BLOCK_LEN", 16)
    model = small_model(**fields)
    tokens = torch.randn(45, 2) if "channels" in fields else torch.randint(0, 256, (45,), dtype=torch.uint8)
    expected = states(model, tokens if tokens.is_floating_point() else tokens.long())[layer]
    parts = [*Embedder(model, layer, per="token").rows(tokens)]
    assert [len(part) for part in parts] == ([16, 16, 13] if model.config.causal else [45])
    assert_close("hidden states", torch.cat(parts), expected, max_abs=1e-5)


@pytest.mark.parametrize("window", [1, 5, 16, 20, 45, 60, 0])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_windows_and_documents(pooling: Any, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are shorter and longer than a block, and that cross several."""
    monkeypatch.setattr(embed_module, "PREFILL_BLOCK_LEN", 16)
    model, tokens = small_model(), torch.randint(0, 256, (45,))
    parts = states(model, tokens)[-1].split(window or 45)
    expected = torch.stack([part.mean(0) if pooling == "mean" else part[-1] for part in parts])
    embedder = Embedder(model, per="window" if window else "document", pooling=pooling, window=window)
    assert_close("rows", torch.cat([*embedder.rows(tokens)]), expected, max_abs=1e-5)


def test_files_and_their_index(tmp_path: Path) -> None:
    """Of two sources, one with records and an empty one; both formats have the same rows, and nothing else is left."""
    model = small_model()
    place = exported(model, tmp_path / "exported")
    (tmp_path / "texts").mkdir()
    for name, text in (("a.txt", "a span"), ("b.txt", "a carry and a halo"), ("empty.txt", "")):
        (tmp_path / "texts" / name).write_text(text)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "three"}\n')
    sources = [str(tmp_path / "texts"), str(tmp_path / "c.jsonl")]
    for suffix in ("npy", "safetensors"):
        out = tmp_path / "out" / f"x-{suffix}.{suffix}"
        out.parent.mkdir(exist_ok=True)
        found = embed(place, sources, out, per="window", window=8, layer=1)
        assert (found.num_documents, found.num_tokens, found.num_rows, found.width) == (4, 32, 6, WIDTH)
        assert found.counts["skipped"] == {"empty": 2}
    rows = np.load(tmp_path / "out" / "x-npy.npy")
    assert rows.dtype == np.float32 and rows.shape == (6, WIDTH)
    tensors = load_file(tmp_path / "out" / "x-safetensors.safetensors")
    assert torch.equal(tensors["embeddings"], torch.from_numpy(rows)) and len(tensors) == 1
    index = json.loads((tmp_path / "out" / "x-npy.json").read_text())
    documents = index.pop("documents")
    assert index == {
        "model": str(place),
        "layer": 1,
        "per": "window",
        "pooling": "mean",
        "window": 8,
        "rows": 6,
        "width": WIDTH,
    }
    assert [list(one.values()) for one in documents] == [
        [sources[0], "a.txt", 0, 1, 6, 6],
        [sources[0], "b.txt", 1, 3, 18, 18],
        [sources[1], "c.jsonl:1", 4, 1, 3, 3],
        [sources[1], "c.jsonl:3", 5, 1, 5, 5],
    ]
    assert [*documents[0]] == ["source", "document", "first_row", "rows", "tokens", "bytes"]
    text = torch.tensor([*b"a carry and a halo"])
    expected = torch.stack([part.mean(0) for part in states(model, text)[1].split(8)])
    assert_close("rows", torch.from_numpy(rows[1:4]), expected, max_abs=1e-5)
    assert len([*(tmp_path / "out").iterdir()]) == 4


def test_windows_that_end_with_the_document(tmp_path: Path) -> None:
    """Nothing is left for another row, and the file is whole."""
    (tmp_path / "a.txt").write_text("a" * 32)
    place = exported(small_model(), tmp_path / "exported")
    embed(place, [str(tmp_path / "a.txt")], tmp_path / "a.npy", per="window", window=16)
    assert np.load(tmp_path / "a.npy").shape == (2, WIDTH)


def test_a_model_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states that transformers gives, of a model with attention and the delta rule, in blocks."""
    transformers = pytest.importorskip("transformers")
    shape: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2}
    shape |= {"linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 8}
    shape |= {"layer_types": ["linear_attention", "full_attention"]}
    shape |= dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"])
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("olmo_hybrid", **shape))
    model.eval().save_pretrained(tmp_path / "model")
    text = bytes(random.Random(0).choices(range(32, 127), k=45))
    (tmp_path / "a.txt").write_bytes(text)
    with torch.no_grad():
        expected = model(torch.tensor([[*text]]), output_hidden_states=True).hidden_states
    monkeypatch.setattr(embed_module, "PREFILL_BLOCK_LEN", 16)
    for layer in range(3):
        embed(tmp_path / "model", [str(tmp_path / "a.txt")], tmp_path / "a.npy", layer=layer, per="token")
        rows = torch.from_numpy(np.load(tmp_path / "a.npy"))
        assert_close(f"layer {layer}", rows, expected[layer][0], max_abs=1e-5)


def test_time_series(tmp_path: Path) -> None:
    """Standardized as the task says."""
    model = small_model(head="series", outputs=2, channels=1, vocab=0)
    task = TaskDescription("forecast", 100, columns=["a"], mean=[2.0], deviation=[4.0], horizon=2)
    place = exported(model, tmp_path / "exported", task)
    values = [1.0, 2.0, 6.0, 5.0, 3.0]
    (tmp_path / "a.csv").write_text("a\n" + "".join(f"{value}\n" for value in values))
    embed(place, [str(tmp_path / "a.csv")], tmp_path / "a.npy", per="token")
    expected = states(model, (torch.tensor(values)[:, None] - 2) / 4)[-1]
    assert_close("rows", torch.from_numpy(np.load(tmp_path / "a.npy")), expected, max_abs=1e-5)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["a.txt", "--out", "a.csv"], "--out = 'a.csv': a name that ends in .npy or .safetensors"),
        (["a.txt", "--out", "none/a.npy"], "--out = 'none/a.npy': a file in a directory that exists"),
        (["a.txt", "--out", "a.npy", "--layer", "4"], "layer = 4: from 0 (the embedded tokens) to 3, or from -1"),
        (["a.txt", "--out", "a.npy", "--layer", "x"], "--layer = 'x': a number, or last"),
        (["a.txt", "--out", "a.npy", "--per", "window"], "--window = 0: at least 1 token with --per window"),
        (["a.txt", "--out", "a.npy", "--window", "5"], "--window = 5: at least 1 token with --per window"),
        (["a.txt", "--out", "a.npy", "--per", "token", "--pool", "last"], "--pool = 'last': only for --per window"),
        (["none.txt", "--out", "a.npy"], "data.source = 'none.txt': cannot be read: No such file"),
        (["a.txt", "ids.npy", "--out", "a.npy"], "holds token ids, and the model reads bytes"),
        (["folder", "--out", "a.npy"], "data.source = 'folder': holds no document"),
        (["b.jsonl", "--out", "a.npy"], "is not JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_and_leave_nothing(
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line; a file of an earlier call stays as it was."""
    monkeypatch.chdir(tmp_path)
    exported(small_model(), tmp_path / "exported")
    Path("a.txt").write_text("a text")
    Path("folder").mkdir()
    Path("b.jsonl").write_text('{"text": "one"}\n{"text": \n')
    Path("a.npy").write_text("as it was")
    np.save("ids.npy", np.arange(3))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert cli.main(["embed", "exported", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before and Path("a.npy").read_text() == "as it was"


@pytest.mark.timeout(200)
def test_a_million_tokens_in_bounded_memory(tmp_path: Path) -> None:
    """A row for each token is written: in all, the process has less than 2 GiB at any time."""
    place = exported(small_model(positions="none", depth=1), tmp_path / "exported")
    (tmp_path / "a.txt").write_text("".join(random.Random(0).choices("abcdefgh", k=1 << 20)))
    program = (
        "from longreach.framework.runtime.machine import Machine; from longreach.launch import cli;"
        f"assert cli.main(['embed', {str(place)!r}, 'a.txt', '--out', 'a.npy', '--per', 'token']) == 0;"
        "print('peak', Machine().resident_memory(peak=True))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "1 document of 1,048,576 tokens: 1,048,576 rows of 16 numbers in a.npy" in done.stdout
    peak = re.search(r"peak (\d+)", done.stdout)
    assert peak is not None and int(peak[1]) < 2 << 30
    rows = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert rows.shape == (1 << 20, WIDTH) and np.isfinite(rows[-1]).all() and np.abs(rows[-1]).max() > 0
