"""Scores: block by block and in one pass the same; by document, by position, by context, of runs and of exports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longreach.errors import InputError
from longreach.framework.inference import evaluate as scoring
from longreach.framework.inference.evaluate import MeanLoss, ScoredRows, score, with_resets
from longreach.framework.model import IGNORED, Model, ModelConfig, build_model
from longreach.parallel.span import Span


def small_model(mixers: list[str], *, causal: bool = True) -> Model:
    """A model in float64 whose blocks say more than the token that they read."""
    config = ModelConfig(vocab=256, width=16, depth=len(mixers), mixers=mixers, causal=causal)
    config.chela.heads = config.feedforward_kernel.heads = config.softmax.heads = 2
    torch.manual_seed(0)
    model = build_model(config).double().eval()
    for parameter in model.blocks.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def tokens_of(length: int, rows: int = 1) -> Tensor:
    return torch.randint(0, 256, (rows, length))


@pytest.mark.parametrize("packed", [False, True])
def test_a_score_block_by_block_equals_the_whole_pass(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """The mean, the number of tokens, every bin of positions and its standard error; several lengths and documents."""
    model = small_model(["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"])
    texts, rows = [], []
    for length in (200, 90, 30):
        tokens, labels = tokens_of(length, rows=2), tokens_of(length, rows=2)
        labels[:, 3:6] = IGNORED
        segments = torch.randint(0, 8, (2, length)).eq(0).cumsum(1) if packed else None
        texts.append(ScoredRows(tokens, labels, segments))
        with torch.no_grad():
            nll, _ = model(tokens, Span(segments=segments), labels)
        rows += [(nll[row], labels[row] != IGNORED) for row in range(2)]
    expected = float(sum(nll.sum() for nll, _ in rows)) / int(sum(mask.sum() for _, mask in rows))
    for block_len in (16, 69, 1000):
        monkeypatch.setattr(scoring, "PREFILL_BLOCK_LEN", block_len)
        read: list[int] = []
        found = score(model, texts, read.append)
        assert found.whole.loss == pytest.approx(expected, rel=1e-10)
        assert found.whole.num_tokens == sum(int(mask.sum()) for _, mask in rows) and sum(read) == 2 * (200 + 90 + 30)
        assert [one.first for one in found.by_position] == [0, 64, 128]
        for one, stop in zip(found.by_position, (64, 128, 256)):
            here = [(nll[one.first : stop], mask[one.first : stop]) for nll, mask in rows if len(nll) > one.first]
            s, c = (torch.stack([part.double().sum() for part in parts]) for parts in zip(*here))
            mean = float(s.sum() / c.sum())
            assert one.loss == pytest.approx(mean, rel=1e-10) and one.num_tokens == int(c.sum())
            spread = float((s - mean * c).square().sum()) * len(here) / (len(here) - 1)
            assert one.error == pytest.approx(math.sqrt(spread) / float(c.sum()), rel=1e-6)


def test_a_model_that_is_not_causal_is_scored_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, labels = small_model(["elementwise", "softmax"], causal=False), tokens_of(40), tokens_of(40)
    with torch.no_grad():
        nll, _ = model(tokens, None, labels)
    monkeypatch.setattr(scoring, "PREFILL_BLOCK_LEN", 16)
    assert score(model, [ScoredRows(tokens, labels)]).whole.loss == pytest.approx(float(nll.mean()), rel=1e-10)


@pytest.mark.parametrize("context", [7, 16, 1000])
def test_the_carry_is_reset_every_so_many_tokens(monkeypatch: pytest.MonkeyPatch, context: int) -> None:
    """Against a separate pass over each part; the same labels, however many parts are one batch."""
    monkeypatch.setattr(scoring, "PREFILL_BLOCK_LEN", 32)
    model, tokens, labels = small_model(["elementwise", "chela"]), tokens_of(100, rows=2), tokens_of(100, rows=2)
    with torch.no_grad():
        parts = zip(tokens.split(context, 1), labels.split(context, 1))
        expected = torch.cat([model(part, Span(), targets)[0] for part, targets in parts], dim=1)
    found = score(model, with_resets([ScoredRows(tokens, labels, num_bytes=500.0)], context)).whole
    assert found.loss == pytest.approx(float(expected.mean()), rel=1e-10)
    assert found.num_tokens == 200 and found.num_bytes == pytest.approx(500.0)


def test_documents_have_figures_of_their_own() -> None:
    """Nats a token become bits a byte by the bytes that the tokens stand for."""
    model = small_model(["elementwise"])
    texts = [
        ScoredRows(tokens_of(9), tokens_of(9), name="a", num_bytes=36.0),
        ScoredRows(tokens_of(5), tokens_of(5), name="b"),
    ]
    found = score(model, texts)
    (_, a), (_, b) = found.documents
    assert [name for name, _ in found.documents] == ["a", "b"]
    assert a.bits_per_byte == pytest.approx(a.loss / math.log(2) / 4) and a.perplexity == pytest.approx(
        math.exp(a.loss)
    )
    assert b.bits_per_byte == pytest.approx(b.loss / math.log(2))
    whole = (9 * a.loss + 5 * b.loss) / 14
    assert found.whole == MeanLoss(pytest.approx(whole), 14, 41.0)  # type: ignore[arg-type]
    assert math.isnan(score(model, texts[:1]).by_position[0].error)


def test_nothing_to_predict_is_told() -> None:
    labels = torch.full((1, 5), IGNORED)
    with pytest.raises(InputError, match="no tokens"):
        score(small_model(["elementwise"]), [ScoredRows(tokens_of(5), labels)])


def test_json_has_no_nan(tmp_path: Path) -> None:
    found = scoring.Evaluation(
        score(small_model(["elementwise"]), [ScoredRows(tokens_of(9), tokens_of(9), name="a")]), []
    )
    scoring.write_json(found, tmp_path / "found.json")
    tree = json.loads((tmp_path / "found.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert tree["by_position"][0]["error"] is None and tree["documents"][0]["name"] == "a"
    scoring.plot(found, tmp_path / "found.png", "found")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
