"""Decoding: one token at a time, block by block, side by side and in one pass, all the same; a small carry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longreach.errors import InputError
from longreach.framework.inference import generate as decoding
from longreach.framework.inference.generate import Decoder, continuations, decode_stream, encode, generate, prefill
from longreach.framework.model import Model, ModelConfig, build_model

SMALL_STATE = ["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet"]


def small_model(mixers: list[str], *, causal: bool = True, modes: int = 4) -> Model:
    """A model in float64 whose blocks say more than the token that they read."""
    config = ModelConfig(vocab=256, width=16, depth=len(mixers), mixers=mixers, causal=causal)
    config.chela.heads = config.feedforward_kernel.heads = config.softmax.heads = 2
    config.chela.modes, config.mamba2.head_width = modes, 8
    model = build_model(config).double().eval()
    for parameter in model.blocks.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def text(length: int, rows: int = 1) -> Tensor:
    return torch.randint(0, 256, (rows, length))


def test_a_seed_determines_the_samples() -> None:
    model, prompt = small_model(SMALL_STATE), text(5, rows=2)

    def draw(seed: int, temperature: float = 1.0, top_k: int = 0) -> list[list[int]]:
        return [t.tolist() for t in generate(model, prompt, 12, temperature=temperature, top_k=top_k, seed=seed)]

    assert len(draw(1)) == 12
    assert draw(1) == draw(1) != draw(2)
    assert draw(1, temperature=0) == draw(2, temperature=0) == draw(3, top_k=1)


@pytest.mark.parametrize("mixers", [SMALL_STATE, ["softmax", "chela"]], ids=" ".join)
def test_temperature_zero_takes_the_likeliest_of_the_parallel_pass(mixers: list[str]) -> None:
    """Every token against one parallel pass over all tokens before it."""
    model, prompt = small_model(mixers), text(7, rows=2)
    written = torch.stack(list(generate(model, prompt, 20, temperature=0)), 1)
    tokens = torch.cat([prompt, written], 1)
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    assert isinstance(logits, Tensor)
    assert torch.equal(logits[:, 6:].argmax(-1), written)
    assert written.unique().numel() > 5


def test_top_k_samples_only_from_the_likeliest() -> None:
    model, prompt = small_model(SMALL_STATE), text(9).expand(100, 9)
    with torch.no_grad():
        likeliest = model(prompt[:1])[0, -1].topk(3).indices
    sampled = next(generate(model, prompt, 1, top_k=3, temperature=5.0))
    assert sampled.unique().tolist() == likeliest.sort().values.tolist()


def test_the_smallest_and_largest_settings_sample() -> None:
    """Catches numbers that fp32 does not hold: a temperature of 0, a top_p of 0, a quotient that overflows."""
    model, prompt = small_model(["elementwise"]).float(), text(9, rows=3)
    greedy = list(generate(model, prompt, 5, temperature=0))
    for temperature in (5e-324, 1e-46, 1e-38, 1e-30):
        assert all(map(torch.equal, generate(model, prompt, 5, temperature=temperature), greedy))
    for top_p in (5e-324, 1e-46, 1e-8):
        assert all(map(torch.equal, generate(model, prompt, 5, top_p=top_p), greedy))
    hot = next(generate(model, prompt[:1].expand(4000, 9), 1, temperature=1.7e308))
    assert torch.bincount(hot, minlength=256).float().std() < 6  # uniform: 15.6 of each, give or take 4
    assert next(generate(model, prompt, 1, top_p=1 - 1e-16, top_k=10**9)).shape == (3,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", x) for x in (-1.0, math.inf, math.nan)],
        *[("top_p", x) for x in (0.0, 1.5, math.nan)],
        ("top_k", -1),
    ],
)
def test_settings_beyond_their_range_are_told(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        next(generate(small_model(["elementwise"]), text(3), 1, **{name: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("mixer, grows", [*((name, False) for name in SMALL_STATE), ("softmax", True)])
def test_the_carry_does_not_grow_with_the_position(mixer: str, grows: bool) -> None:
    """In bytes, at position 10 and at 200; the baseline's does, so the measure measures."""
    model, tokens = small_model([mixer, mixer]), text(200)
    num_bytes, decoder = {}, Decoder(model)
    for first, stop in ((0, 10), (10, 200)):
        decoder.prefill(tokens[:, first:stop])
        assert decoder.span is not None and decoder.span.position == stop and decoder.span.carry
        num_bytes[stop] = decoder.carry_bytes
    assert num_bytes[200] > 15 * num_bytes[10] if grows else num_bytes[200] == num_bytes[10]


def test_a_prompt_in_blocks_equals_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = small_model([*SMALL_STATE, "softmax"]), text(75, rows=2)
    whole, _ = prefill(model, prompt)
    expected = [token.tolist() for token in generate(model, prompt, 8)]
    for block_len in (16, 25, 74):
        monkeypatch.setattr(decoding, "PREFILL_BLOCK_LEN", block_len)
        logits, span = prefill(model, prompt)
        assert span.position == 75
        torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)
        assert [token.tolist() for token in generate(model, prompt, 8)] == expected


def test_a_prompt_in_main_memory_is_read_where_the_model_is() -> None:
    """On torch's device without data, whose tensors refuse to meet others, as a GPU's do."""
    model = small_model([*SMALL_STATE, "softmax"]).to("meta")
    logits, span = prefill(model, torch.zeros(1, 9, dtype=torch.int64))
    assert logits.is_meta and all(state.is_meta for state, _ in span.carry.values())


def test_a_model_that_is_not_causal_cannot_write() -> None:
    with pytest.raises(InputError, match=r"model\.causal"):
        next(generate(small_model(["elementwise", "softmax"], causal=False), text(40), 1))


def decoders(model: Model, lengths: list[int]) -> list[Decoder]:
    """Decoders that have read texts of their own, all by the same seed."""
    found = []
    for number, length in enumerate(lengths):
        found.append(Decoder(model, seed=3))
        found[-1].prefill(torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(number)))
    return found


@pytest.mark.parametrize(
    "mixers, lengths, stacks",
    [
        (SMALL_STATE, [5, 70, 9], True),
        (["softmax", "chela"], [8, 8, 8], True),
        (["softmax", "chela"], [5, 8, 9], False),
    ],
    ids=["states", "softmax, one length", "softmax, several lengths"],
)
@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.3, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_texts_side_by_side_are_as_if_alone(
    mixers: list[str], lengths: list[int], stacks: bool, how: dict[str, float]
) -> None:
    """Every row has its own random generator; where a state grows, texts of several lengths are continued in turn."""
    model = small_model(mixers)
    alone = [[int(token) for token in one.generate(20, **how)] for one in decoders(model, lengths)]  # type: ignore[arg-type]
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert [list(tokens) for tokens in continuations(decoders(model, lengths), 20, **how)] == alone
    together = Decoder.stack(decoders(model, lengths))
    assert (together is not None) == stacks
    if together is not None:
        assert together.rows == 3
        with pytest.raises(InputError, match="one text"):
            together.save("nowhere")


def test_texts_whose_positions_count_stack_at_one_length_alone() -> None:
    model = small_model(SMALL_STATE)
    model.config.positions = "sinusoidal"
    assert Decoder.stack(decoders(model, [5, 9])) is None and Decoder.stack(decoders(model, [9, 9])) is not None


def test_the_first_text_comes_as_it_is_written() -> None:
    first = next(continuations(decoders(small_model(SMALL_STATE), [5, 9]), 1_000_000))
    assert 0 <= next(first) < 256


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_told_in_one_line(value: float) -> None:
    """Of a carry that lies about its numbers, or of damaged weights: at any temperature."""
    model = small_model(["elementwise"])
    decoder = Decoder(model)
    decoder.prefill(text(7))
    model.blocks[0].ffn.down.weight.data.fill_(value)
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="logits after 8 tokens = nan: must be finite"):
            list(decoder.fork().generate(3, temperature=temperature))


def test_bytes_become_text_as_soon_as_a_character_is_whole() -> None:
    assert list(decode_stream(encode("aé€").flatten().tolist())) == ["a", "", "é", "", "", "€", ""]
    assert "".join(decode_stream([0x61, 0xE2, 0x82])) == "a\N{REPLACEMENT CHARACTER}"
    assert encode(b"\xff\x00").tolist() == [[255, 0]]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="prompt"):
        next(generate(small_model(["elementwise"]), encode(""), 1))
