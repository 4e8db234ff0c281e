"""From taps to a recurrence: the export computes almost the same, decodes what it computes; mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close

from longreach.framework.data import ByteVocabulary
from longreach.framework.inference.distill import distill, fit, with_modes
from longreach.framework.inference.export import write_export
from longreach.framework.inference.generate import Decoder
from longreach.framework.inference.loading import load_exported
from longreach.framework.mixers.chela import ModalKernel, TapKernel
from longreach.framework.model import ModelConfig, build_model
from longreach.kernels.modal_conv import modal_kernel
from longreach.launch import cli
from longreach.parallel.span import Span

TEXT = b"the span, the carry and the halo; " * 40


def tap_model(kind: Any = "decaying", **fields: Any) -> Any:
    config = ModelConfig(vocab=256, width=16, depth=2, mixers=["chela"], **fields)
    config.chela.heads, config.chela.long_kernel, config.chela.long_len = 2, kind, 64
    torch.manual_seed(0)
    return build_model(config).eval()


def train(model: Any, steps: int = 30) -> float:
    """A few steps on `TEXT`; returns the last loss."""
    tokens = torch.tensor([list(TEXT[:513])])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nll, _ = model(tokens[:, :-1], Span(), tokens[:, 1:])
        nll.mean().backward()
        optimizer.step()
    return float(nll.mean().detach())


def exported(model: Any, place: Path) -> Path:
    write_export(model, place, step=7, vocabulary=ByteVocabulary(), task=None)
    return place


@pytest.mark.parametrize("kind", ["decaying", "free"])
def test_a_trained_model_of_taps_becomes_a_recurrence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits per byte before and after; the figures that are printed are those of the files."""
    model = tap_model(kind)
    assert train(model) < 3.0, "nothing was learned that could be lost"
    place, out, text = exported(model, tmp_path / "taps"), tmp_path / "modes", tmp_path / "text.txt"
    text.write_bytes(TEXT)
    files = ["--json", str(tmp_path / "fit.json"), "--figure", str(tmp_path / "fit.png")]
    words = ["distill", str(place), str(out), "--steps", "60", "--source", str(text), *files]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    for number in range(2):
        assert f"blocks.{number}.mixer: 64 taps -> 16 modes, 16 channels: relative error median" in said
    found = json.loads((tmp_path / "fit.json").read_text())
    before, after = (found[when]["whole"]["bits_per_byte"] for when in ("before", "after"))
    assert f"{before:.4f} with taps, {after:.4f} with modes" in said
    assert abs(after - before) < 0.05
    assert [len(layer["errors"]) for layer in found["layers"]] == [16, 16]
    assert all(0 <= error < 0.6 for layer in found["layers"] for error in layer["errors"])
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    again = load_exported(out)
    assert again.config.chela.long_kernel == "modal" and again.config.chela.modes == 16
    assert json.loads((out / "config.json").read_text())["step"] == 7
    assert cli.main(["evaluate", str(out), "--source", str(text)]) == 0
    assert f"{after:.4f} bits per byte" in capsys.readouterr().out
    assert cli.main(["generate", str(out), "--prompt", "the ", "--tokens", "3"]) == 0


def test_what_was_distilled_decodes_what_it_computes(tmp_path: Path) -> None:
    """Token by token from a carry of N numbers a channel, whatever the taps were."""
    distill(exported(tap_model(), tmp_path / "taps"), tmp_path / "modes", 8, steps=5)
    model = load_exported(tmp_path / "modes")
    tokens = torch.tensor([list(TEXT[:100])])
    with torch.no_grad():
        whole, span = model(tokens), Span(keep_carry=True)
        for i in range(100):
            assert_close(f"token {i}", model(tokens[:, i : i + 1], span)[:, 0], whole[:, i], rel_rms=1e-3)
            span = span.next_block(1)
    sizes = []
    for length in (10, 90):
        decoder = Decoder(model)
        decoder.prefill(tokens[:, :length])
        sizes.append(decoder.carry_bytes)
    assert sizes[0] == sizes[1]


def test_known_modes_are_found_again_with_the_skip() -> None:
    """A kernel of 2 modes plus a tap at the current token, which the skip takes; 1e-4 of the whole."""
    torch.manual_seed(0)
    known, learned = ModalKernel(8, 2, causal=True), TapKernel(8, 500, "free", causal=True)
    with torch.no_grad():
        known.log_decay.copy_(-(4 + 30 * torch.rand(8, 2)).log())
        known.angle.mul_(4)
        learned.points.copy_(modal_kernel(known.log_decay, known.angle, known.real[0], known.imag[0], 500))
        learned.points[:, 0] += torch.randn(8)
    found = fit("layer", learned, ModalKernel(8, 4, causal=True), steps=20)
    assert found.errors.max() < 1e-4
    error = (found.fitted[:, :500] - found.taps).norm(dim=1) / found.taps.norm(dim=1)
    assert error.max() < 1e-4


def test_only_the_long_kernels_change() -> None:
    model: Any = tap_model("free")
    distilled, layers = with_modes(model, 4, steps=0)
    found: Any = distilled
    before, after = dict(model.named_parameters()), dict(found.named_parameters())
    assert [layer.name for layer in layers] == ["blocks.0.mixer", "blocks.1.mixer"]
    for name in before.keys() & after.keys():
        if not name.endswith(".long.skip"):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    assert {name for name in before if name not in after} == {f"blocks.{i}.mixer.long.points" for i in range(2)}
    x, span = torch.randn(1, 300, 16), Span()
    for i in range(2):  # a layer's error is that of its output for white noise
        taps, modes = (m.blocks[i].mixer.long(x, span).detach() for m in (model, found))
        expected = layers[i].errors * layers[i].taps.norm(dim=1)
        assert_close("error", (taps - modes)[:, 64:].square().mean(1).sqrt()[0], expected, rel_rms=0.35)


@pytest.mark.parametrize(
    "fields, words, message",
    [
        ({"kind": "modal"}, [], "has no chela layer whose long kernel is of learned taps; longreach train chela-taps"),
        ({"causal": False}, [], "model.causal = False: true: the taps of a centred kernel"),
        ({}, ["--modes", "0"], "--modes = 0: at least 1"),
        ({}, ["--steps", "-1"], "--steps = -1: at least 0"),
        ({}, ["--figure", "fit.pdf"], "--figure = 'fit.pdf': a name that ends in .png"),
        ({}, ["--source", "x", "--batches", "2"], "--batches = 2: for the run's held-out documents"),
        ({}, ["--batches", "2"], "an export has no held-out documents"),
    ],
    ids=["modal", "centred", "modes", "steps", "figure", "both", "held out"],
)
def test_a_mistake_is_told_in_one_line(
    fields: dict[str, Any],
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    place = exported(tap_model(**fields), tmp_path / "taps")
    steps = [] if "--steps" in words else ["--steps", "0"]
    assert cli.main(["distill", str(place), "modes", *steps, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "modes").exists()


def test_a_directory_of_something_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = exported(tap_model(), tmp_path / "taps")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert cli.main(["distill", str(place), str(tmp_path / "notes")]) == 2
    assert "is something else than an export" in capsys.readouterr().err
    assert cli.main(["distill", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "is neither a run nor an export" in capsys.readouterr().err
