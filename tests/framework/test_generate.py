"""Decoding and scoring: one token at a time, block by block and in one pass, all the same; and a carry that stays
small.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longreach.framework import evaluate
from longreach.framework import generate as decoding
from longreach.framework.evaluate import score
from longreach.framework.generate import decode_stream, encode, generate, read_prompt
from longreach.framework.model import IGNORED, Model, ModelConfig, build_model
from longreach.kernels.errors import InputError
from longreach.parallel.span import Span

SMALL_STATE = ["elementwise", "chela", "feedforward_kernel"]


def small_model(mixers: list[str], *, causal: bool = True, modes: int = 4) -> Model:
    """A model in float64 whose blocks say more than the token that they read."""
    config = ModelConfig(vocab=256, width=16, depth=len(mixers), mixers=mixers, causal=causal)
    config.chela.heads = config.feedforward_kernel.heads = config.softmax.heads = 2
    config.chela.modes = modes
    model = build_model(config).double().eval()
    for parameter in model.blocks.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def text(length: int, rows: int = 1) -> Tensor:
    return torch.randint(0, 256, (rows, length))


def test_a_seed_decides_the_draws() -> None:
    model, prompt = small_model(SMALL_STATE), text(5, rows=2)

    def draw(seed: int, temperature: float = 1.0, top_k: int = 0) -> list[list[int]]:
        return [t.tolist() for t in generate(model, prompt, 12, temperature=temperature, top_k=top_k, seed=seed)]

    assert len(draw(1)) == 12
    assert draw(1) == draw(1) != draw(2)
    assert draw(1, temperature=0) == draw(2, temperature=0) == draw(3, top_k=1)


@pytest.mark.parametrize("mixers", [SMALL_STATE, ["softmax", "chela"]], ids=" ".join)
def test_temperature_zero_takes_the_likeliest_of_the_parallel_pass(mixers: list[str]) -> None:
    """Every token against a whole pass over all that stands before it."""
    model, prompt = small_model(mixers), text(7, rows=2)
    written = torch.stack(list(generate(model, prompt, 20, temperature=0)), 1)
    tokens = torch.cat([prompt, written], 1)
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    assert isinstance(logits, Tensor)
    assert torch.equal(logits[:, 6:].argmax(-1), written)
    assert written.unique().numel() > 5


def test_top_k_draws_only_from_the_likeliest() -> None:
    model, prompt = small_model(SMALL_STATE), text(9).expand(100, 9)
    with torch.no_grad():
        likeliest = model(prompt[:1])[0, -1].topk(3).indices
    drawn = next(generate(model, prompt, 1, top_k=3, temperature=5.0))
    assert drawn.unique().tolist() == likeliest.sort().values.tolist()


@pytest.mark.parametrize("mixer, grows", [*((name, False) for name in SMALL_STATE), ("softmax", True)])
def test_the_carry_does_not_grow_with_the_position(mixer: str, grows: bool) -> None:
    """In bytes, at position 10 and at 200; the baseline's does, so the measure measures."""
    model, tokens = small_model([mixer, mixer]), text(200)
    num_bytes = {}
    span = None
    for first, stop in ((0, 10), (10, 200)):
        _, span = read_prompt(model, tokens[:, first:stop], span)
        assert span.position == stop and span.carry
        tensors = [part for carry in span.carry.values() for part in (carry.state, carry.segment) if part is not None]
        num_bytes[stop] = sum(part.numel() * part.element_size() for part in tensors)
    assert num_bytes[200] > 15 * num_bytes[10] if grows else num_bytes[200] == num_bytes[10]


def test_a_prompt_in_blocks_equals_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = small_model([*SMALL_STATE, "softmax"]), text(75, rows=2)
    whole, _ = read_prompt(model, prompt)
    expected = [token.tolist() for token in generate(model, prompt, 8)]
    for block_len in (16, 25, 74):
        monkeypatch.setattr(decoding, "PROMPT_BLOCK", block_len)
        logits, span = read_prompt(model, prompt)
        assert span.position == 75
        torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)
        assert [token.tolist() for token in generate(model, prompt, 8)] == expected


@pytest.mark.parametrize("packed", [False, True])
def test_a_score_block_by_block_equals_the_whole_pass(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """The mean, the number of tokens and every stretch of positions; sequences of several lengths and documents."""
    model = small_model([*SMALL_STATE, "softmax"])
    sequences, losses, counted = [], [], []
    for length in (70, 33):
        tokens, labels = text(length, rows=2), text(length, rows=2)
        labels[:, 3:6] = IGNORED
        segments = torch.randint(0, 8, (2, length)).eq(0).cumsum(1) if packed else None
        sequences.append((tokens, labels, segments))
        with torch.no_grad():
            nll, _ = model(tokens, Span(segments=segments), labels)
        losses.append(nll)
        counted.append(labels != IGNORED)
    expected = float(sum(nll.sum() for nll in losses)) / int(sum(mask.sum() for mask in counted))
    for block_len in (16, 69, 1000):
        monkeypatch.setattr(evaluate, "PROMPT_BLOCK", block_len)
        read: list[int] = []
        found = score(model, sequences, num_bins=1000, progress=read.append)
        assert found.loss == pytest.approx(expected, rel=1e-10)
        assert found.num_tokens == sum(int(mask.sum()) for mask in counted) and sum(read) == 2 * (70 + 33)
        assert [first for first, _ in found.by_position] == [*range(3), *range(6, 70)]
        for first, loss in found.by_position:
            here = [(nll[:, first], mask[:, first]) for nll, mask in zip(losses, counted) if first < nll.shape[1]]
            mean = sum(float(nll.sum()) for nll, _ in here) / sum(int(mask.sum()) for _, mask in here)
            assert loss == pytest.approx(mean, rel=1e-10)
    assert score(model, sequences, num_bins=7).loss == pytest.approx(expected, rel=1e-10)


def test_a_model_that_is_not_causal_is_scored_whole_and_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, labels = small_model(["elementwise", "softmax"], causal=False), text(40), text(40)
    with torch.no_grad():
        nll, _ = model(tokens, None, labels)
    monkeypatch.setattr(evaluate, "PROMPT_BLOCK", 16)
    assert score(model, [(tokens, labels, None)]).loss == pytest.approx(float(nll.mean()), rel=1e-10)
    with pytest.raises(InputError, match=r"model\.causal"):
        next(generate(model, tokens, 1))


def test_bytes_become_text_as_soon_as_a_character_is_whole() -> None:
    assert list(decode_stream(encode("aé€").flatten().tolist())) == ["a", "", "é", "", "", "€", ""]
    assert "".join(decode_stream([0x61, 0xE2, 0x82])) == "a\N{REPLACEMENT CHARACTER}"
    assert encode(b"\xff\x00").tolist() == [[255, 0]]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="prompt"):
        next(generate(small_model(["elementwise"]), encode(""), 1))
