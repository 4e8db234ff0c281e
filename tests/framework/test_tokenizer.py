"""Tokenizers: decode every text exactly, are trained on the train split alone, and are saved with a run."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from longreach.errors import InputError
from longreach.framework.data import (
    ByteVocabulary,
    IdVocabulary,
    Index,
    SubwordVocabulary,
    TokenStream,
    load_vocabulary,
    pack,
    save_vocabulary,
)
from longreach.framework.data import vocabulary as vocabularies
from longreach.framework.data.bpe import make_tokenizer, train_bpe

WORDS = "span carry halo scan relay Zustand \N{SNOWMAN} \N{GRINNING FACE} caf\N{LATIN SMALL LETTER E WITH ACUTE}"
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def array(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def write_corpus(folder: Path) -> dict[str, str]:
    draw, texts = random.Random(0), {}
    folder.mkdir()
    for number in range(30):
        texts[f"{number:02}.txt"] = " ".join(draw.choice(WORDS.split()) for _ in range(80)) + "\n"
        (folder / f"{number:02}.txt").write_text(texts[f"{number:02}.txt"], encoding="utf-8")
    return texts


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


@pytest.fixture(scope="module")
def subwords() -> SubwordVocabulary:
    return train_bpe([array(WORDS * 5)], 300)


def test_training_leaves_the_main_thread_to_answer_ctrl_c() -> None:
    threads = []

    def contents() -> Iterator[np.ndarray]:
        threads.append(threading.current_thread())
        yield array(WORDS)

    train_bpe(contents(), 300)
    assert threads and threading.main_thread() not in threads


@EXAMPLES
@given(text=st.text(max_size=40))
def test_every_text_comes_back(subwords: SubwordVocabulary, text: str) -> None:
    """Whole, and as a stream that never shows a part of a character."""
    tokens = subwords.encode([array(text)])[0].tolist()
    assert subwords.tokenizer.decode(tokens, skip_special_tokens=False) == text
    for prefix in ((), None):
        parts = list(subwords.decode(tokens, prefix))
        assert "".join(parts) == text and len(parts) == len(tokens) + 1


@EXAMPLES
@given(tokens=st.lists(st.integers(0, 299), max_size=60))
def test_any_tokens_can_be_shown(subwords: SubwordVocabulary, tokens: list[int]) -> None:
    """Incomplete characters do not delay the text after them for more than `MAX_PENDING` tokens."""
    parts = list(subwords.decode([*tokens, *subwords.encode([array(" span")])[0].tolist()]))
    assert "".join(parts).endswith("span")
    assert max((len(part) for part in parts), default=0) < 200


def test_a_tokenizer_of_another_kind_is_shown_as_it_decodes() -> None:
    """A first space that the decoder drops is dropped once, as in the text in one go."""
    vocab = {"\u2581a": 0, "\u2581b": 1, "c": 2, "<s>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    subwords = SubwordVocabulary(tokenizer.to_str().encode(), "x")
    tokens = [0, 1, 0, 0, 1]
    assert "".join(subwords.decode(tokens)) == tokenizer.decode(tokens) == "a b a a b"
    assert "".join(subwords.decode(tokens[2:], prefix=tokens[:2])) == " a a b"
    assert "".join(subwords.decode(tokens[2:], prefix=None)) == " a a b"
    assert subwords.encode([array("<s>")])[0].tolist() != [] and subwords.size == 4


def test_training_is_the_same_again_and_sees_nothing_that_is_held_out(tmp_path: Path) -> None:
    """The documents that `pack` holds out may change: the tokenizer does not. One of the others does change it."""
    write_corpus(tmp_path / "source")
    source = str(tmp_path / "source")
    index = pack(source, tmp_path / "packed", name="x", vocab=300, valid_fraction=0.2)
    made = make_tokenizer(source, tmp_path / "a.json", 300, valid_fraction=0.2)
    kept = (tmp_path / "packed/tokenizer.json").read_bytes()
    assert kept == (tmp_path / "a.json").read_bytes() and index.vocabulary["sha256"] == made.sha256
    for name, key in (("valid", index.splits["valid"].keys[0]), ("train", index.splits["train"].keys[0])):
        (tmp_path / "source" / key).write_text("entirely other words, again and again and again " * 99)
        make_tokenizer(source, tmp_path / f"{name}.json", 300, valid_fraction=0.2)
        assert ((tmp_path / f"{name}.json").read_bytes() == kept) == (name == "valid")


def test_tokens_are_packed_with_the_number_of_their_bytes(tmp_path: Path) -> None:
    """Baselines are of the bytes, the same as of a corpus of bytes; each document comes back."""
    texts = write_corpus(tmp_path / "source")
    source = str(tmp_path / "source")
    make_tokenizer(source, tmp_path / "t.json", 320, valid_fraction=0.2)
    as_bytes = pack(source, tmp_path / "bytes", name="x", valid_fraction=0.2)
    index = pack(source, tmp_path / "tokens", name="x", valid_fraction=0.2, tokenizer=str(tmp_path / "t.json"))
    assert index.baselines == as_bytes.baselines and index.fingerprint != as_bytes.fingerprint
    assert index.dtype == "uint16" and index.vocabulary["kind"] == "tokens" and 256 < index.vocabulary["size"] <= 320
    vocabulary = index.open_vocabulary()
    for name, split in index.splits.items():
        stream = TokenStream(index, name)
        for key, start, stop in zip(split.keys, stream.starts, stream.starts[1:], strict=False):
            assert "".join(vocabulary.decode(stream.read(int(start), int(stop)).tolist())) == texts[key]
        assert split.num_bytes == as_bytes.splits[name].num_tokens == as_bytes.splits[name].num_bytes
        assert split.num_tokens < split.num_bytes / 2 and split.keys == as_bytes.splits[name].keys
    valid = index.splits["valid"]
    assert as_bytes.bits_per_byte(np.log(2)) == pytest.approx(1)
    assert index.bits_per_byte(np.log(2)) == pytest.approx(valid.num_tokens / valid.num_bytes)
    again = {"name": "x", "valid_fraction": 0.2}
    assert (
        pack(source, tmp_path / "tokens", tokenizer=str(tmp_path / "t.json"), **again).fingerprint == index.fingerprint
    )  # type: ignore[arg-type]
    assert "tokenizer differ" in refused(pack, source, tmp_path / "tokens", **again)
    assert "tokenizer, vocab differ" in refused(pack, source, tmp_path / "tokens", vocab=300, **again)


def test_documents_that_are_not_text(tmp_path: Path) -> None:
    """They are refused by name, or so many are left out, for what is trained too."""
    write_corpus(tmp_path / "source")
    (tmp_path / "source/latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    source = str(tmp_path / "source")
    message = refused(pack, source, tmp_path / "out", name="x", vocab=300)
    assert "document = 'latin.txt': is not UTF-8 from byte 3 on" in message and "--max-bad N" in message
    index = pack(source, tmp_path / "out", name="x", vocab=300, max_bad_samples=1)
    assert index.source["num_bad_samples"] == 1
    assert "not UTF-8" in refused(make_tokenizer, source, tmp_path / "t.json", 300)
    assert not (tmp_path / "t.json").exists()


AWKWARD = {
    "prose": (WORDS + ".\r\n") * 40,
    "no spaces": WORDS.replace(" ", "") * 60,
    "one letter": "xyz" + "a" * 3000,
    "spaces": "a" + " " * 1500 + "span" + "\n" * 900 + "halo " * 100,
    "CRLF": "span\r\n\r\n" * 300,
    "emoji": "\N{GRINNING FACE}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}\N{ZERO WIDTH JOINER}\N{SNOWMAN}" * 300,
    "combining": "e\N{COMBINING ACUTE ACCENT}\N{COMBINING DOT BELOW} " * 300,
    "long word": "halo " * 100 + "scancarryrelay" * 100 + " span" * 100,
    "digits": "carry " * 50 + "1234567" * 200 + " halo" * 50,
    "other digits": "".join(random.Random(2).choices("0123456789", k=2000)),
    "random": "".join(random.Random(1).choice(WORDS + "\n\t  ") for _ in range(4000)),
}


def of_kind(kind: str) -> SubwordVocabulary:
    """A tokenizer whose pre-tokenizer cuts at words, or numbers of three digits, or nowhere."""
    if kind == "byte-level":
        return train_bpe([array(text[:40]) for text in AWKWARD.values()], 400)
    model = models.Unigram() if kind == "unigram" else models.BPE(byte_fallback=False, unk_token="?")
    tokenizer = Tokenizer(model)
    if kind == "digits":
        splits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    elif kind == "nowhere":  # as Llama's: the whole text is one word, behind a mark
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "digits" else []
    options: dict[str, Any] = {"vocab_size": 400, "initial_alphabet": alphabet, "show_progress": False}
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(special_tokens=["?"], unk_token="?", **options)
    else:
        trainer = trainers.BpeTrainer(special_tokens=["?"], max_token_length=16, **options)
    tokenizer.train_from_iterator([text[:600] for text in AWKWARD.values()], trainer)
    return SubwordVocabulary(tokenizer.to_str().encode(), kind)


@pytest.mark.parametrize("kind", ["byte-level", "digits", "nowhere", "unigram"])
def test_a_long_text_has_the_tokens_that_it_has_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded in windows, wherever they are cut: in words longer than a window, in a character, between CR and LF."""
    vocabulary = of_kind(kind)
    whole = {name: vocabulary.tokenizer.encode(text).ids for name, text in AWKWARD.items()}
    joined = set[str]()
    monkeypatch.setattr(vocabularies, "BATCH_WINDOWS", 3)
    monkeypatch.setattr(vocabularies, "NUM_AGREED", 6)
    for window, overlap in ((256, 96), (301, 128), (512, 255)):
        monkeypatch.setattr(vocabularies, "WINDOW", window)
        monkeypatch.setattr(vocabularies, "OVERLAP", overlap)
        found = vocabulary.encode([array(text) for text in AWKWARD.values()] + [array("")])
        for (name, text), tokens in zip(AWKWARD.items(), found, strict=False):
            assert tokens.tolist() == whole[name], (name, window)
            joined |= {name} if vocabulary._encode_windows(text, window) is not None else set()
        assert len(found[-1]) == 0
    assert kind != "byte-level" or joined > {"prose", "no spaces", "one letter", "spaces", "digits"}, joined
    assert joined >= {"prose", "combining"}, joined  # they were not encoded at once


BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b"\x80\x04N.",
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}).encode(),
        json.dumps({"version": "1.0", "model": {**BPE, "merges": [["a", "b"]]}}).encode(),
        json.dumps({"version": "1.0", "model": {**BPE, "vocab": {"a": 2**32 - 1}}}).encode(),
        json.dumps({"version": "1.0", "model": {**BPE, "vocab": {"a": 2**31}}}).encode(),
        json.dumps({"version": "9.0", "model": BPE}).encode(),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    (tmp_path / "a.txt").write_bytes(b"some text")
    message = refused(pack, str(tmp_path / "a.txt"), tmp_path / "out", name="x", tokenizer=str(tmp_path / "t.json"))
    assert message.startswith("tokenizer = ") and "t.json" in message
    assert not (tmp_path / "out").exists()


@EXAMPLES
@given(at=st.integers(0, 10**6), new=st.binary(min_size=1, max_size=6))
def test_a_tokenizer_of_any_bytes_works_or_is_refused(subwords: SubwordVocabulary, at: int, new: bytes) -> None:
    content = bytearray(subwords.content)
    content[at % len(content) : at % len(content) + len(new)] = new
    try:
        changed = SubwordVocabulary(bytes(content), "t.json")
        list(changed.decode(changed.encode_text(b"span \xc3\xa9").tolist()))
    except InputError as error:
        assert "\n" not in str(error)


def test_mistakes_in_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"some text")
    source, out = str(tmp_path / "a.txt"), tmp_path / "out"
    assert "longreach tokenizer SOURCE FILE" in refused(pack, source, out, name="x", tokenizer="nothing.json")
    assert "data.vocab = 100: must be from 256" in refused(pack, source, out, name="x", vocab=100)
    assert "data.vocab = 300: must be 0" in refused(pack, source, out, name="x", vocab=300, tokenizer="t.json")
    assert "--vocab = 100" in refused(make_tokenizer, source, tmp_path / "t.json", 100)
    assert "a new file" in refused(make_tokenizer, source, source, 300)
    assert "a new file" in refused(make_tokenizer, source, tmp_path / "no/t.json", 300)
    np.save(tmp_path / "a.npy", np.arange(9))
    assert "hold token ids already" in refused(make_tokenizer, str(tmp_path / "a.npy"), tmp_path / "t.json", 300)


def test_a_packed_tokenizer_that_was_changed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "source")
    pack(str(tmp_path / "source"), tmp_path / "out", name="x", vocab=300)
    path = tmp_path / "out/tokenizer.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"version":"1.0"', b'"version": "1.0"'))
    assert "SHA-256" in refused(Index.load, tmp_path / "out", verify=False)
    path.unlink()
    assert "tokenizer.json" in refused(Index.load, tmp_path / "out", verify=False)
    path.write_bytes(content)
    fields = json.loads((tmp_path / "out/index.json").read_text())
    fields["splits"]["valid"]["num_bytes"] += 1
    (tmp_path / "out/index.json").write_text(json.dumps(fields))
    assert "fingerprint" in refused(Index.load, tmp_path / "out")


@pytest.mark.parametrize("kind", ["bytes", "ids", "tokens"])
def test_a_run_keeps_its_vocabulary(tmp_path: Path, subwords: SubwordVocabulary, kind: str) -> None:
    vocabulary = {"bytes": ByteVocabulary(), "ids": IdVocabulary(50), "tokens": subwords}[kind]
    assert load_vocabulary(tmp_path).kind == "bytes", "as of a run that kept nothing"
    save_vocabulary(vocabulary, tmp_path)
    found = load_vocabulary(tmp_path)
    assert type(found) is type(vocabulary) and found.describe() == vocabulary.describe()
    text = b"7 49, 3" if kind == "ids" else "caf\xe9 halo".encode()
    assert found.encode_text(text).tolist() == vocabulary.encode_text(text).tolist()
    assert "".join(found.decode(found.encode_text(text).tolist())) == (" 7 49 3" if kind == "ids" else text.decode())
    for content in (b"", b"[]", b"{}", b'{"kind": "tokens"}', b'{"kind": "ids", "size": []}', b'{"kind": 3}'):
        (tmp_path / "vocabulary.json").write_bytes(content)
        if content != b'{"kind": "tokens"}' or kind == "tokens":
            assert "vocabulary" in refused(load_vocabulary, tmp_path)


def test_prompts_that_do_not_fit(subwords: SubwordVocabulary) -> None:
    assert "must be token ids below 50" in refused(IdVocabulary(50).encode_text, b"7 50")
    assert "must be token ids below 50" in refused(IdVocabulary(50).encode_text, b"-1")
    assert "not UTF-8" in refused(subwords.encode_text, b"\xff")
