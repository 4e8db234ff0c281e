"""Trains a tokenizer: byte-level BPE, which encodes any text and decodes it exactly."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from ...errors import InputError
from ..runtime.files import replace_text
from .content import Binary
from .corpus import list_files
from .progress import Callback, progress
from .reading import BadSamples, Reader
from .stall import run_in_thread
from .tally import Tally
from .vocabulary import MAX_SIZE, SubwordVocabulary

MIN_SIZE = 256  # one token for each byte


def check_size(field: str, size: int) -> None:
    """Raise InputError unless a byte-level BPE of ``size`` tokens can be trained; ``field`` names the option."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(field, size, f"must be from {MIN_SIZE}, the bytes, to {MAX_SIZE}")


def make_tokenizer(
    source: str,
    path: str | Path,
    size: int,
    *,
    valid_fraction: float = 0.05,
    field: str = "text",
    max_bad_samples: int = 0,
    binary: Binary = "skip",
    callback: Callback | None = None,
    tally: Tally | None = None,
) -> SubwordVocabulary:
    """Train a tokenizer on the training documents of a source, the same that `pack` puts into ``train``, and save it.

    Args:
        source: see `corpus.list_files`.
        path: of the ``tokenizer.json`` to write; must not exist.
        size: see `train_bpe`.
        valid_fraction, field, max_bad_samples, binary, callback: as for `pack`.
        tally: counts the files and documents that are read, converted and skipped.

    Raises:
        InputError: the source cannot be read or is not text, or the file cannot be written.
    """
    path = Path(path)
    check_size("--vocab", size)
    if path.exists() or not path.parent.is_dir():
        raise InputError("FILE", str(path), "must be a new file in a directory that exists")
    files = list_files(source, binary, tally)
    if any(file.kind == "npy" for file in files):
        raise InputError("data.source", source, "must be text: .npy arrays hold token ids already")
    reader = Reader(files, valid_fraction, field, callback, tally=tally)
    vocabulary = train_from_reader(reader, size, BadSamples(max_bad_samples, tally=tally), callback)
    try:
        replace_text(path, vocabulary.content.decode())
    except OSError as error:
        raise InputError("FILE", str(path), f"cannot be written: {error.strerror}") from None
    return vocabulary


def train_from_reader(
    reader: Reader, size: int, bad: BadSamples, callback: Callback | None = None
) -> SubwordVocabulary:
    """Train on the documents of the ``train`` split; see `train_bpe`."""
    with progress("training a tokenizer", reader.num_bytes, callback) as advance:
        documents = reader.read("train", bad, SubwordVocabulary.check, advance)
        return train_bpe((content for _, content in documents), size)


def train_bpe(contents: Iterable[NDArray[Any]], size: int) -> SubwordVocabulary:
    """Train a byte-level BPE on documents; equal documents give equal tokenizers.

    Args:
        contents: UTF-8 as uint8 ``[n]``; iterated over once.
        size: of the vocabulary, the 256 bytes included. A small corpus may give fewer tokens.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    texts = (str(content.data, "utf-8") for content in contents)
    run_in_thread(partial(tokenizer.train_from_iterator, texts, trainer)).result()
    return SubwordVocabulary(tokenizer.to_str().encode(), "the trained tokenizer")
