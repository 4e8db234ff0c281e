"""The model in transformers: the same logits, texts and gradients as ours; saved, loaded, padded, searched, trained."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import longreach
from longreach.errors import InputError
from longreach.framework.inference.export import load_exported
from longreach.framework.inference.generate import Decoder
from longreach.framework.inference.huggingface import (
    LongreachCache,
    LongreachConfig,
    LongreachForCausalLM,
    LongreachForSequenceClassification,
    LongreachModel,
    byte_tokenizer,
)
from longreach.framework.model import ModelConfig
from longreach.framework.tasks import TaskDescription
from longreach.launch import cli
from longreach.parallel.span import Span

MIXERS = ["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"]
RECOMPUTE = "activation_checkpointing"  # "gradient_checkpointing" before transformers 5.21
if not hasattr(PreTrainedModel, f"{RECOMPUTE}_enable"):
    RECOMPUTE = "gradient_checkpointing"
TIGHT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def small_config(mixers: list[str] = MIXERS, dropout: float = 0.0) -> LongreachConfig:
    shape = ModelConfig(vocab=256, width=16, depth=len(mixers), mixers=mixers)
    shape.chela.heads = shape.feedforward_kernel.heads = shape.softmax.heads = 2
    shape.mamba2.head_width, shape.mamba2.state_size = 8, 5
    shape.feedforward_kernel.dropout = dropout
    return LongreachConfig(shape)


def small_model(mixers: list[str] = MIXERS, dropout: float = 0.0) -> LongreachForCausalLM:
    """A model whose blocks say more than the token that they read."""
    model = LongreachForCausalLM(small_config(mixers, dropout)).eval()
    for parameter in model.model.blocks.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def text(length: int, rows: int = 1) -> Tensor:
    return torch.randint(0, 256, (rows, length))


def padded(rows: list[Tensor], left: int, right: int = 0) -> tuple[Tensor, Tensor]:
    """Rows ``[1, L]`` side by side, the longest with so much padding; and the mask."""
    longest = max(row.shape[1] for row in rows)
    tokens, mask = (torch.zeros(len(rows), left + longest + right, dtype=torch.int64) for _ in range(2))
    for number, row in enumerate(rows):
        here = slice(left + longest - row.shape[1], left + longest)
        tokens[number, here], mask[number, here] = row[0], 1
    return tokens, mask


def test_logits_loss_and_gradients_are_those_of_the_model() -> None:
    """With and without a whole set of logits, with labels left out, and with blocks computed again."""
    model, tokens = small_model(), text(70, rows=2)
    labels = tokens.clone()
    labels[:, 5:9] = -100
    wanted = torch.cat([labels[:, 1:], labels.new_full((2, 1), -100)], dim=1)
    logits = model.model(tokens)
    nll, penalty = model.model(tokens, None, wanted)
    expected = nll.sum() / (wanted != -100).sum() + penalty
    expected.backward()
    gradients = [p.grad for p in model.parameters()]
    assert penalty > 0 and len(gradients) > 40
    output = model(tokens, labels=labels)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, output.logits[:, -3:])
    assert isinstance(model(tokens, return_dict=False)[0], Tensor)
    model.train()
    for again in (False, True):
        if again:
            getattr(model, f"{RECOMPUTE}_enable")()
        model.zero_grad()
        output = model(tokens, labels=labels)
        assert output.logits is None and output.past_key_values is None and model.model.recompute == again
        output.loss.backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, **TIGHT)


def test_dropout_is_that_of_training_alone() -> None:
    model, tokens = small_model(["feedforward_kernel"], dropout=0.5), text(30)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_a_text_is_written_as_the_decoder_writes_it() -> None:
    """Greedily, with the cache and by reading all tokens again for each; sampled, two texts differ."""
    model, prompt = small_model(), text(9, rows=2)
    decoder = Decoder(model.model)
    decoder.prefill(prompt)
    expected = torch.stack(list(decoder.generate(20, temperature=0)), dim=1)
    assert expected.unique().numel() > 5
    for use_cache in (True, False):
        found = model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=use_cache)
        assert torch.equal(found[:, 9:], expected)
    sampled = [model.generate(prompt, max_new_tokens=20, do_sample=True, top_k=0).tolist() for _ in range(2)]
    assert sampled[0] != sampled[1] and sampled[0][0][:9] == prompt[0].tolist()


def test_a_token_costs_one_token() -> None:
    """Each step of `generate` hands the model what it has not read, and no carry grows with the text."""
    model, seen = small_model(MIXERS[:3]), []
    model.model.embedding.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    sizes = []
    for num_tokens in (2, 30):
        seen.clear()
        cache = LongreachCache()
        model.generate(text(9), max_new_tokens=num_tokens, do_sample=False, past_key_values=cache)
        assert seen == [9] + [1] * (num_tokens - 1) and cache.get_seq_length() == 8 + num_tokens
        sizes.append(sum(carry.state.numel() for carry in cache.span.carry.values()))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("mixers", [MIXERS[:3], ["softmax", "chela"]], ids=" ".join)
@pytest.mark.parametrize("left, right", [(0, 0), (5, 0), (1, 2)])
def test_padding_has_no_influence(mixers: list[str], left: int, right: int) -> None:
    """Rows of 1, 2 and 40 tokens, alone and side by side: all logits, then tokens one by one."""
    model, rows = small_model(mixers), [text(1), text(2), text(40)]
    tokens, mask = padded(rows, left, right)
    with torch.no_grad():
        found = model(tokens, attention_mask=mask).logits
        for row, logits in zip(rows, found, strict=True):
            end = left + 40
            torch.testing.assert_close(logits[end - row.shape[1] : end], model(row).logits[0], **TIGHT)
    if right:
        return
    written = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, line in zip(rows, written, strict=True):
        assert torch.equal(model.generate(row, max_new_tokens=8, do_sample=False)[0, -8:], line[-8:])
    if left:
        return
    read_in_pieces = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        prefill_chunk_size=7,
        past_key_values=LongreachCache(),
    )
    assert torch.equal(read_in_pieces, written)


def test_a_mask_that_says_nothing_changes_nothing() -> None:
    model, tokens = small_model(), text(20, rows=2)
    assert torch.equal(model(tokens, attention_mask=torch.ones(2, 20)).logits, model(tokens).logits)


def test_beams_search_with_the_carry() -> None:
    """The same as when every beam is read again without a cache; also with padding."""
    model = small_model()
    tokens, mask = padded([text(4), text(11)], left=0)
    options: dict[str, Any] = {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    found, uncached = (model.generate(tokens, attention_mask=mask, use_cache=use, **options) for use in (True, False))
    assert torch.equal(found, uncached)
    greedy = model.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert not torch.equal(found[::2], greedy)


@torch.no_grad()
def test_padding_stays_padding_without_a_mask() -> None:
    """Where the next tokens come without one, what was padding is none of their past."""
    model, rows, ends = small_model(), [text(1), text(9)], text(4, rows=2)
    tokens, mask = padded(rows, left=2)
    cache = model(tokens, attention_mask=mask).past_key_values
    logits = model(ends, past_key_values=cache).logits
    for row, end, found in zip(rows, ends, logits, strict=True):
        expected = model(torch.cat([row, end[None]], dim=1)).logits[0, -4:]
        torch.testing.assert_close(found, expected, **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("whole_mask", [False, True], ids=["mask of the new tokens", "mask of all"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_behind_tokens_does_not_enter_the_cache(mixer: str, whole_mask: bool) -> None:
    """Rows of 1, 2 and 9 tokens padded on the right, then continued: as each row alone."""
    model, rows, ends = small_model([mixer]), [text(1), text(2), text(9)], text(4, rows=3)
    tokens, mask = torch.full((3, 12), 7), torch.zeros(3, 12, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : row.shape[1]], mask[number, : row.shape[1]] = row[0], 1
    first = model(tokens, attention_mask=mask, use_cache=True)
    for row, logits in zip(rows, first.logits, strict=True):
        torch.testing.assert_close(logits[: row.shape[1]], model(row).logits[0], **TIGHT)
    cache, whole = first.past_key_values, torch.cat([mask, torch.ones_like(ends)], dim=1)
    for end in ends.split(2, dim=1):
        given = whole[:, : cache.get_seq_length() + 2] if whole_mask else None
        logits = model(end, past_key_values=cache, attention_mask=given).logits
    for row, end, found in zip(rows, ends, logits, strict=True):
        torch.testing.assert_close(found, model(torch.cat([row, end[None]], 1)).logits[0, -2:], **TIGHT)


@torch.no_grad()
def test_a_mask_that_changes_what_was_read_is_refused() -> None:
    model, tokens = small_model(["elementwise"]), text(4)
    cache = model(tokens).past_key_values
    with pytest.raises(InputError, match="as it was when it was read"):
        model(tokens, past_key_values=cache, attention_mask=torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_token_whose_next_one_is_a_label(side: str) -> None:
    """The loss and the gradients of padded rows, labels of padding left out or not, are those of the rows alone."""
    model, rows = small_model().train(), [text(5), text(12), text(9)]
    count = sum(row.shape[1] - 1 for row in rows)
    nll = torch.stack([model(row, labels=row).loss * (row.shape[1] - 1) for row in rows])  # the penalty is the same
    expected = nll.sum() / count
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for ignored in (7, -100):
        tokens, mask = torch.full((3, 12), 7), torch.zeros(3, 12, dtype=torch.int64)
        for number, row in enumerate(rows):
            here = slice(12 - row.shape[1], 12) if side == "left" else slice(0, row.shape[1])
            tokens[number, here], mask[number, here] = row[0], 1
        model.zero_grad()
        loss = model(tokens, attention_mask=mask, labels=tokens.where(mask == 1, ignored)).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, **TIGHT)


@pytest.mark.parametrize("num_items", [None, 0, 12])
def test_rows_without_labels_have_no_loss_and_no_gradient(num_items: int | None) -> None:
    """Catches a division by no labels, and a penalty that such a micro-batch adds once more."""
    model, tokens = small_model().train(), text(6, rows=2)
    items = None if num_items is None else torch.tensor(num_items)
    loss = model(tokens, labels=torch.full_like(tokens, -100), num_items_in_batch=items).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_one_reading_is_gone_on_from_many_times() -> None:
    model, prompt = small_model(), text(12)
    cache = model(prompt).past_key_values
    for end in (text(3), text(5)):
        whole = torch.cat([prompt, end], dim=1)
        found = model.generate(whole, past_key_values=copy.deepcopy(cache), max_new_tokens=5, do_sample=False)
        assert torch.equal(found, model.generate(whole, max_new_tokens=5, do_sample=False))
    cache.batch_repeat_interleave(3)
    ends = text(4, rows=3)
    logits = model(ends, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(torch.cat([prompt.expand(3, 12), ends], 1)).logits[:, 12:], **TIGHT)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """Through the Auto class; the tied weight once; in 16 bits the rates of the modal kernel stay in 32."""
    model, tokens = small_model(), text(30)
    model.save_pretrained(tmp_path)
    assert "model.head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, LongreachForCausalLM) and not any(found.values()) and not loaded.training
    assert loaded.model.head.weight is loaded.model.embedding.weight
    assert loaded.config.shape() == model.config.shape() and loaded.config.vocab_size == 256
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)

    model = small_model(["elementwise", "chela", "feedforward_kernel", "softmax"])
    model.save_pretrained(tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    dtypes = {name.rsplit(".", 1)[-1]: parameter.dtype for name, parameter in half.named_parameters()}
    assert dtypes["log_decay"] == dtypes["angle"] == torch.float32 and dtypes["weight"] == torch.bfloat16
    expected = model(tokens).logits
    assert (half(tokens).logits - expected).norm() < 0.04 * expected.norm()


def test_a_missing_tensor_is_told(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.head.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.head\.norm\.weight$"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_vocabulary_grows(tmp_path: Path) -> None:
    model, tokens = small_model(), text(10)
    logits = model(tokens).logits
    model.resize_token_embeddings(260)
    assert model.model.head.weight is model.model.embedding.weight and model.model.config.vocab == 260
    torch.testing.assert_close(model(tokens).logits[..., :256], logits)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits.shape == (1, 10, 260)
    model.set_input_embeddings(torch.nn.Embedding(270, 16))
    assert model(tokens).logits.shape == (1, 10, 270)


@torch.no_grad()
def states_of(model: LongreachModel | LongreachForCausalLM, tokens: Tensor) -> list[Tensor]:
    """The embedded tokens and the output of each block, one after the other."""
    found = [model.model._embed(tokens, Span())]
    for number, block in enumerate(model.model.blocks):
        found.append(block(found[-1], Span().for_layer(f"blocks.{number}"))[0])
    return found


@torch.no_grad()
def test_hidden_states_are_what_the_blocks_compute(tmp_path: Path) -> None:
    """Embedding, each block, the last one normed; also from `AutoModel`, padded, with a cache, and in `generate`."""
    model, tokens = small_model(), text(20, rows=2)
    *before, last = states_of(model, tokens)
    expected = [*before, model.model.head.norm(last)]
    output = model(tokens, output_hidden_states=True)
    assert isinstance(output.hidden_states, tuple) and len(output.hidden_states) == len(MIXERS) + 1
    for state, wanted in zip(output.hidden_states, expected, strict=True):
        assert state.shape == (2, 20, 16)
        torch.testing.assert_close(state, wanted)
    logits = torch.nn.functional.linear(output.hidden_states[-1], model.model.embedding.weight)
    torch.testing.assert_close(logits, output.logits)
    assert model(tokens).hidden_states is None and not any(block._forward_hooks for block in model.model.blocks)
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == len(MIXERS) + 1
    model.config.output_hidden_states = False

    model.save_pretrained(tmp_path)
    base, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(base, LongreachModel) and not any(found.values())
    assert torch.equal(base(tokens).last_hidden_state, output.hidden_states[-1])
    assert base(tokens).hidden_states is None
    for side in (0, 5):
        padded_tokens, mask = padded([tokens[:1, :9], tokens[1:]], left=side, right=5 - side)
        states = base(padded_tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        for state, wanted in zip(states, base(tokens[:1, :9], output_hidden_states=True).hidden_states, strict=True):
            end = side + 20
            torch.testing.assert_close(state[:1, end - 9 : end], wanted, **TIGHT)
    cache = base(tokens[:, :12]).past_key_values
    rest = base(tokens[:, 12:], past_key_values=cache, output_hidden_states=True).hidden_states
    torch.testing.assert_close(rest[2], expected[2][:, 12:], **TIGHT)
    written = model.generate(
        tokens, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    )
    assert [len(step) for step in written.hidden_states] == [len(MIXERS) + 1] * 3
    assert [step[-1].shape[1] for step in written.hidden_states] == [20, 1, 1]


@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_states_have_gradients(recompute: bool) -> None:
    model, tokens = small_model(["elementwise", "chela"]).train(), text(12)
    if recompute:
        getattr(model, f"{RECOMPUTE}_enable")()
    model(tokens, output_hidden_states=True).hidden_states[1].square().sum().backward()
    weights = [block.ffn.down.weight.grad for block in model.model.blocks]
    assert weights[0].any() and (weights[1] is None or not weights[1].any())


def classifier(**fields: Any) -> LongreachForSequenceClassification:
    shape = ModelConfig(**({"width": 16, "depth": 2, "mixers": ["elementwise"], "head": "class"} | fields))
    torch.manual_seed(0)
    return LongreachForSequenceClassification(LongreachConfig(shape)).eval()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_classes_of_padded_rows_are_those_of_the_rows(causal: bool, side: str) -> None:
    """The logits of the model itself, also where its tokens have positions; the loss is the mean over the labels."""
    model = classifier(vocab=50, outputs=3, causal=causal, positions="sinusoidal")
    rows = [torch.randint(0, 50, (1, length)) for length in (4, 9, 12)]
    expected = torch.cat([model.model(row) for row in rows])
    tokens, mask = torch.full((3, 12), 7), torch.zeros(3, 12, dtype=torch.int64)
    for number, row in enumerate(rows):
        here = slice(12 - row.shape[1], 12) if side == "left" else slice(0, row.shape[1])
        tokens[number, here], mask[number, here] = row[0], 1
    labels = torch.tensor([2, -100, 0])
    output = model(tokens, attention_mask=mask, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected, **TIGHT)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(expected, labels), **TIGHT)
    assert [state.shape for state in output.hidden_states] == [(3, 12, 16)] * 3
    alone = states_of(model, rows[0])
    for state, wanted in zip(output.hidden_states, alone, strict=True):
        torch.testing.assert_close(state[:1][mask[:1] == 1], wanted[0], **TIGHT)
    torch.testing.assert_close(
        model(tokens, attention_mask=mask, labels=labels, num_items_in_batch=4).loss * 2, output.loss
    )


@torch.no_grad()
def test_numbers_and_pairs_are_answered() -> None:
    """Sequences of vectors, numbers as labels, two documents side by side."""
    model, values = classifier(head="numbers", channels=2, outputs=3), torch.randn(2, 7, 2)
    labels = torch.randn(2, 3)
    output = model(input_values=values, labels=labels)
    torch.testing.assert_close(output.logits, model.model(values))
    torch.testing.assert_close(output.loss, (output.logits - labels).square().mean())
    pairs, tokens = classifier(vocab=9, outputs=2, documents=2), torch.randint(0, 9, (1, 6))
    kinds = torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = pairs.model(tokens, Span(segments=kinds))
    padded_tokens, mask = torch.nn.functional.pad(tokens, (2, 1)), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]])
    found = pairs(padded_tokens, attention_mask=mask, token_type_ids=torch.nn.functional.pad(kinds, (2, 1))).logits
    torch.testing.assert_close(found, expected, **TIGHT)
    with pytest.raises(InputError, match="token_type_ids"):
        pairs(tokens)
    with pytest.raises(InputError, match=r"input_values \[B, L, 2\]"):
        model(tokens)
    with pytest.raises(InputError, match="has a cache"):
        LongreachModel(model.config)(input_values=values, use_cache=True)


def test_classes_have_names(tmp_path: Path) -> None:
    """Those of the task, or of the user; saved and loaded, also by `load_exported`."""
    shape = ModelConfig(width=16, depth=1, mixers=["elementwise"], head="class", channels=1, outputs=3)
    task = TaskDescription("series", 9, classes=["cat", "dog", "owl"], mean=[1.0], deviation=[2.0])
    model = LongreachForSequenceClassification(LongreachConfig(shape, task=task)).eval()
    assert model.config.num_labels == 3 and model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert model.config.label2id["owl"] == 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == model.config.id2label
    values = torch.randn(5, 1)
    logits = loaded(input_values=(values[None] - 1) / 2).logits
    (answer,) = load_exported(tmp_path).predict([values.numpy()])
    assert answer["class"] == ["cat", "dog", "owl"][int(logits.argmax())]
    assert answer["probability_owl"] == pytest.approx(float(logits.detach().softmax(-1)[0, 2]), rel=1e-4)
    named = AutoModelForSequenceClassification.from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"})
    named.save_pretrained(tmp_path / "named")
    assert "probability_c" in load_exported(tmp_path / "named").predict([values.numpy()])[0]


def test_a_language_model_learns_to_classify(tmp_path: Path) -> None:
    """With a new output, which alone is not loaded; what the trainer saved is read by transformers and by `predict`."""
    small_model(["elementwise"]).save_pretrained(tmp_path / "language")
    names = {0: "letters", 1: "digits"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language", id2label=names)
    weights = load_file(tmp_path / "language" / "model.safetensors")
    assert torch.equal(model.model.embedding.weight, weights["model.embedding.weight"])
    answer = model.model.head.answer
    assert answer.weight.shape == (2, 16) and 0.1 < answer.weight.std() < 0.5 and not answer.bias.any()
    rows = [
        {"input_ids": torch.randint(48, 58, (10,)) + 49 * (number % 2 == 0), "labels": torch.tensor(number % 2)}
        for number in range(32)
    ]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=20, learning_rate=1e-2,
        save_strategy="no", per_device_train_batch_size=8, dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    found = Trainer(model, arguments, train_dataset=rows)
    found.train()
    assert losses(found)[-1] < 0.5 * losses(found)[0]
    found.save_model(str(tmp_path / "tuned"))
    byte_tokenizer().save_pretrained(tmp_path / "tuned")
    answers = load_exported(tmp_path / "tuned").predict(["hello", "2026", b"31415"])
    assert [answer["class"] for answer in answers] == ["letters", "digits", "digits"]
    classify = pipeline("text-classification", model=str(tmp_path / "tuned"), device="cpu")
    assert [one["label"] for one in classify(["hello", "2026"], batch_size=2)] == ["letters", "digits"]


def test_what_is_saved_is_read_by_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`load_exported`, in one file or several; `longreach generate` and `evaluate`; a missing file is told."""
    model, tokens = small_model(["elementwise", "chela"]), text(30)
    for place, options in (("one", {}), ("several", {"max_shard_size": "20KB"}), ("half", {})):
        saved = model.bfloat16() if place == "half" else model
        saved.save_pretrained(tmp_path / place, **options)
        byte_tokenizer().save_pretrained(tmp_path / place)
        model.float()
        loaded = load_exported(tmp_path / place)
        assert not loaded.training and loaded.head.weight is loaded.embedding.weight
        assert torch.equal(loaded(tokens), model.model(tokens))
    assert len([*(tmp_path / "several").glob("*.safetensors")]) > 1
    (tmp_path / "book.txt").write_text("a carry is all that a shard needs of its past; " * 4)
    one = str(tmp_path / "one")
    assert (
        cli.main(["generate", one, "--prompt", "def ", "--tokens", "5", "--temperature", "0", "--device", "cpu"]) == 0
    )
    said = capsys.readouterr().out
    assert said.startswith("def ")
    assert cli.main(["evaluate", one, "--source", str(tmp_path / "book.txt"), "--device", "cpu"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    next((tmp_path / "several").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_exported(tmp_path / "several")
    (tmp_path / "several" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="does not name the files"):
        load_exported(tmp_path / "several")


def test_a_model_of_subwords_needs_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of another vocabulary are not shown as bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    LongreachForCausalLM(LongreachConfig(model={"vocab": 600, "width": 16, "depth": 1})).save_pretrained(tmp_path)
    words = ["generate", str(tmp_path), "--prompt", "shard", "--tokens", "3"]
    assert cli.main(words) == 2
    assert "tokenizer.save_pretrained" in capsys.readouterr().err
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a shard of a sequence " * 9], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("shard")


def at_positions(model: LongreachForCausalLM) -> LongreachForCausalLM:
    model.model.config.positions = "sinusoidal"
    return model


@pytest.mark.parametrize(
    "mistake, expected",
    [
        (lambda m, x: m(x, attention_mask=torch.tensor([[1, 0, 1, 1]])), "attention_mask"),
        (lambda m, x: m(x, attention_mask=torch.ones(1, 3)), "attention_mask"),
        (lambda m, x: m(x, past_key_values=m(x).past_key_values, attention_mask=torch.eye(8)[7:]), "attention_mask"),
        (lambda m, x: at_positions(m)(x, attention_mask=torch.tensor([[0, 1, 1, 1]])), "padding_side='right'"),
        (
            lambda m, x: m(x, past_key_values=m(x).past_key_values, attention_mask=torch.ones(1, 6)),
            "\\[1, 4\\] or \\[1, 8\\]",
        ),
        (
            lambda m, x: m(x, past_key_values=m(x).past_key_values, attention_mask=torch.tensor([[1, 1, 1, 0]])),
            "continues",
        ),
        (
            lambda m, x: m(x, attention_mask=torch.tensor([[1, 1, 1, 0]]), past_key_values=m(x).past_key_values),
            "continues",
        ),
        (
            lambda m, x: at_positions(m)(x, attention_mask=torch.tensor([[1, 1, 1, 0]]), use_cache=True),
            "use_cache=False",
        ),
        (lambda m, x: m(x, past_key_values=object()), "past_key_values = 'object'"),
        (lambda m, x: m(x, output_attentions=True), "output_attentions"),
        (lambda m, x: m(x.unsqueeze(-1)), r"input_ids \[B, L\]"),
        (lambda m, x: m(x).past_key_values.crop(1), "cannot take tokens back"),
        (lambda m, x: LongreachConfig(model={"widht": 3}), "did you mean width"),
        (lambda m, x: LongreachConfig(model={"width": "${oc.env:HOME}"}), "plain values"),
        (lambda m, x: LongreachForCausalLM(LongreachConfig(model={"vocab": 256, "causal": False})), "model.causal"),
        (lambda m, x: LongreachForCausalLM(LongreachConfig()), "model.vocab"),
    ],
)
def test_a_mistake_is_told_in_one_line(mistake: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        mistake(small_model(["elementwise"]), text(4))
    assert "\n" not in str(caught.value)


def data(rows: int) -> list[dict[str, Tensor]]:
    """Sequences that count upwards, with labels left out in some rows more than in others."""
    found = []
    for row in range(rows):
        tokens = (torch.arange(24) + 7 * row) % 32
        labels = tokens.clone()
        labels[: 3 * (row % 4)] = -100
        found.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)})
    return found


def trainer(model: LongreachForCausalLM, place: Path, **options: Any) -> Trainer:
    options = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 3e-3, "logging_steps": 1} | options
    arguments = TrainingArguments(
        str(place), use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, seed=0, **options
    )
    return Trainer(model, arguments, train_dataset=data(16), eval_dataset=data(4))


def losses(found: Trainer) -> list[float]:
    return [row["loss"] for row in found.state.log_history if "loss" in row]


def test_a_trainer_trains_stops_and_goes_on(tmp_path: Path) -> None:
    """The loss falls, with blocks computed again; going on from a checkpoint ends where never stopping does."""
    start = LongreachForCausalLM(small_config(["elementwise", "feedforward_kernel"], dropout=0.1))
    whole, first, rest = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)
    one = trainer(whole, tmp_path / "one", save_strategy="no", **{RECOMPUTE: True})
    one.train()
    assert whole.gradient_checkpointing and len(losses(one)) == 6 and losses(one)[-1] < losses(one)[0] - 0.3
    evaluated = one.evaluate()["eval_loss"]
    assert 0 < evaluated < losses(one)[0]
    trainer(first, tmp_path / "two", save_steps=3).train()
    two = trainer(rest, tmp_path / "two", save_steps=3)
    two.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    assert losses(two)[-3:] == losses(one)[-3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


def test_the_mean_is_over_the_labels_of_a_step(tmp_path: Path) -> None:
    """Two batches of two rows, accumulated, are one of four, though they have different numbers of labels."""
    start, weights = small_model(["feedforward_kernel"]), []
    for size, parts in ((4, 1), (2, 2)):
        found = trainer(
            copy.deepcopy(start),
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=1,
            save_strategy="no",
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1.0,
        )
        found.train()
        weights.append([p.detach() for p in found.model.parameters()])
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, **TIGHT)


def test_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    """A token is a byte, whatever the text holds; saved and loaded; pads on the left."""
    byte_tokenizer().save_pretrained(tmp_path)
    everything = "".join(map(chr, range(0x3000))) + "a\0b Ā <pad>\r\n don 't \N{GRINNING FACE} ."
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 256
        ids = tokenizer(everything)["input_ids"]
        assert ids == list(everything.encode()) and tokenizer.decode(ids) == everything
        assert tokenizer.decode([0xE2, 0x82]) == "\N{REPLACEMENT CHARACTER}"
        batch = tokenizer(["a", "bcd"], padding=True, return_tensors="pt")
        assert batch["input_ids"].tolist() == [[0, 0, 97], [98, 99, 100]] and set(batch) == {
            "input_ids",
            "attention_mask",
        }
        assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["a", "bcd"]


def test_a_pipeline_writes(tmp_path: Path) -> None:
    """From a directory that holds both; two prompts at once are as each alone."""
    small_model(MIXERS[:3]).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False}
    both = write(["def ", "class Span:"], batch_size=2, **options)
    for prompt, found in zip(["def ", "class Span:"], both, strict=True):
        assert found == write(prompt, **options) and found[0]["generated_text"].startswith(prompt)


def run(code: str) -> subprocess.CompletedProcess[str]:
    place = Path(longreach.__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place, timeout=120)


def test_nothing_else_needs_transformers() -> None:
    """The export and the command line do not import it; without it, this module says what to type."""
    modules = "longreach.framework.inference.export, longreach.launch.cli"
    others = f"import sys, {modules}; assert 'transformers' not in sys.modules"
    done = run(f"{others}; sys.modules['transformers'] = None; import longreach.framework.inference.huggingface")
    assert done.returncode == 1 and "AssertionError" not in done.stderr
    expected = (
        "ModuleNotFoundError: longreach.framework.inference.huggingface needs transformers: pip install 'longreach[hf]'"
    )
    assert done.stderr.splitlines()[-1] == expected
