"""Trains a tokenizer: byte-level BPE, in which any text can be written and comes back exactly."""

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
from .corpus import list_files
from .progress import Callback, progress
from .reading import BadSamples, Reader
from .records import kind_of
from .stall import aside
from .vocabulary import MAX_SIZE, Pieces

LEAST_SIZE = 256  # the bytes


def check_size(field: str, size: int) -> None:
    """Raise InputError unless a BPE of so many tokens can be trained."""
    if not LEAST_SIZE <= size <= MAX_SIZE:
        raise InputError(field, size, f"must be from {LEAST_SIZE}, the bytes, to {MAX_SIZE}")


def make_tokenizer(
    source: str,
    path: str | Path,
    size: int,
    *,
    valid_fraction: float = 0.05,
    field: str = "text",
    max_bad_samples: int = 0,
    callback: Callback | None = None,
) -> Pieces:
    """Train a tokenizer on the documents of a source that `pack` would not hold out, and write its file.

    Args:
        source: see `corpus.list_files`.
        path: of the file, which must not be there yet.
        size: see `train_bpe`.
        valid_fraction, field, max_bad_samples, callback: as for `pack`.

    Raises:
        InputError: the source cannot be read, is none of text, or the file cannot be written.
    """
    path = Path(path)
    check_size("--vocab", size)
    if path.exists() or not path.parent.is_dir():
        raise InputError("FILE", str(path), "must be a new file in a directory that exists")
    files = list_files(source)
    if any(kind_of(file) == "npy" for file in files):
        raise InputError("data.source", source, "must be text: .npy arrays hold token ids already")
    reader = Reader(files, valid_fraction, field, callback)
    pieces = train_on(reader, size, BadSamples(max_bad_samples), callback)
    try:
        replace_text(path, pieces.content.decode())
    except OSError as error:
        raise InputError("FILE", str(path), f"cannot be written: {error.strerror}") from None
    return pieces


def train_on(reader: Reader, size: int, bad: BadSamples, callback: Callback | None = None) -> Pieces:
    """Train on the documents that are not held out."""
    with progress("training a tokenizer", reader.num_bytes, callback) as advance:
        documents = reader.read("train", bad, Pieces.check, advance)
        return train_bpe((content for _, content in documents), size)


def train_bpe(contents: Iterable[NDArray[Any]], size: int) -> Pieces:
    """Train on documents; the same documents give the same tokenizer.

    Args:
        contents: UTF-8 as uint8 ``[n]``; read one after the other, and once.
        size: of the vocabulary, the 256 bytes among it. A small corpus may give fewer.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    texts = (str(content.data, "utf-8") for content in contents)
    aside(partial(tokenizer.train_from_iterator, texts, trainer)).result()
    return Pieces(tokenizer.to_str().encode(), "the trained tokenizer")
