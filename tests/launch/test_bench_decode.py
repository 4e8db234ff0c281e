"""`longreach bench decode`: a small one of real models, and what it makes of rows that are given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.framework.mixers.softmax import Softmax
from longreach.framework.model import Block
from longreach.launch.bench import decode as bench
from longreach.launch.cli import main
from longreach.parallel.span import Span


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything the same, but small; times of so few tokens are not what is wanted of long ones."""
    for name, value in {"SHORTEST": 64, "TURNS": 2, "TOKENS": 2, "BATCHES": (1, 3), "RATIO": (0.0, 1e9)}.items():
        monkeypatch.setattr(bench, name, value)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_states_stay_and_caches_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly: in bytes, at every position; what would take more memory than allowed is left out by name."""
    gib = (
        3 * 2**20 / 2**30
    )  # the cache of 1,024 tokens is 2 MiB, of 4,096 tokens 8 MiB; the mixer's step holds thrice that
    assert main(["bench", "decode", "--out", str(tmp_path / "new"), "--longest", "4096", "--memory-gib", str(gib)]) == 0
    report = json.loads((tmp_path / "new" / "decode-cpu.json").read_text())
    kept = {(row["way"], row["position"]): row["carry_bytes"] for row in report["rows"]}
    for way in bench.STATES:
        assert len({kept[way, position] for position in (64, 256, 1024, 4096)}) == 1
    per_token = bench.DEPTH * bench.WIDTH * 4
    assert [kept[bench.CACHED, position] for position in (64, 256, 1024)] == [
        n * 2 * per_token for n in (64, 256, 1024)
    ]
    assert kept[bench.OWN, 256] == 256 * 2 * per_token
    assert report["left_out"][bench.CACHED] == [4096] and report["left_out"][bench.OWN] == [1024, 4096]
    assert all(row["seconds"] > 0 and row["num_tokens"] == 4 for row in report["rows"])
    assert set(report["texts_side_by_side"]) == {"1", "3"}
    assert len(report["bounds"]) == 3 * 5 and all(bound["holds"] for bound in report["bounds"])
    assert (tmp_path / "new" / "decode-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "elementwise, tokens/s at position 4,096 over those at 64" in capsys.readouterr().out


@pytest.mark.parametrize("way", [bench.STATES[0], bench.OWN])
def test_a_decoder_stands_where_it_says(way: str) -> None:
    decoders, kept = bench.decoders_at(way, [64, 256], 2**30)
    for position, decoder in decoders.items():
        assert decoder.span is not None and decoder.span.position == position
        assert decoder.carry_bytes == kept[position]
    bench.time_tokens(decoders)
    assert [decoder.span and decoder.span.position for decoder in decoders.values()] == [64, 256]


def test_the_cache_computes_what_the_mixer_does() -> None:
    """Token by token, against the whole pass: the peer is no cheaper than softmax attention is."""
    block = bench.model_of("softmax").blocks[0]
    assert isinstance(block, Block) and isinstance(block.mixer, Softmax)
    cached, x = bench.CachedSoftmax(block.mixer, bench.WIDTH, 20), torch.randn(1, 20, bench.WIDTH)
    with torch.no_grad():
        found = torch.cat([cached(x[:, n : n + 1], Span(start=n)) for n in range(20)], dim=1)
        torch.testing.assert_close(found, block.mixer(x, Span()))


def given(seconds: float, carry_bytes: int) -> list[Any]:
    return [bench.Row(way, 64, 1.0, 100, 4) for way in bench.STATES] + [
        bench.Row(way, 256, seconds if way == "elementwise" else 1.0, carry_bytes, 4) for way in bench.STATES
    ]


@pytest.mark.parametrize(
    "seconds, carry_bytes, broken",
    [(1.05, 100, []), (1.2, 100, ["elementwise"]), (0.8, 100, ["elementwise"]), (1.0, 101, list(bench.STATES))],
)
def test_what_grows_is_out_of_bounds(
    seconds: float, carry_bytes: int, broken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RATIO", (0.9, 1.1))
    bounds = [bound for bound in bench._bounds(given(seconds, carry_bytes)) if not bound.holds]
    assert [bound.what.split(",")[0] for bound in bounds] == broken
