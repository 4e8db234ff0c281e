"""Corpora, packed shards and the order in which a run reads them.

`prepare` turns ``data.source`` into a packed directory; `sequences_of` are its windows, and `Batches` reads them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from ...errors import InputError
from .baselines import BASELINES
from .corpus import CPYTHON, check_source
from .index import FILE_NAME, Index
from .loader import (
    FILLER,
    IGNORE,
    KILLED,
    Batch,
    Batches,
    SequenceDataset,
    Sequences,
    TokenStream,
    WorkerFailed,
    worker_failure,
)
from .pack import pack
from .progress import Callback
from .stall import TIMEOUT, within
from .vocabulary import Bytes, Ids, Pieces, load_vocabulary, save_vocabulary

__all__ = [
    "BASELINES",
    "FILLER",
    "IGNORE",
    "KILLED",
    "Batch",
    "Batches",
    "Bytes",
    "DataConfig",
    "Ids",
    "Index",
    "Pieces",
    "SequenceDataset",
    "Sequences",
    "TokenStream",
    "WorkerFailed",
    "check_labels",
    "load_vocabulary",
    "pack",
    "packed_dir",
    "prepare",
    "save_vocabulary",
    "sequences_of",
    "worker_failure",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class DataConfig:
    """What is read, and in what portions.

    Args:
        source: ``cpython`` (this Python's own library), or the path of a file, a folder, a ``.tar`` file or a folder of
            such, a packed directory. `records` says which documents JSONL, FASTA and ``.npy`` files hold.
        name: what the corpus is called; by default the source's own name.
        tokenizer: path of a ``tokenizer.json`` of the tokenizers library; empty for bytes.
        vocab: train a tokenizer of so many tokens when the corpus is packed; of ``.npy`` arrays, what their ids are
            below. 0 for bytes, and for an array's largest id.
        field: of a line of JSONL that holds the text.
        seq_len: tokens of a whole sequence, before it is split over ranks.
        batch_size: sequences per optimizer step, over all ranks.
        packing: ``stream``: sequences run through document ends; ``documents``: none sees another.
        workers: processes a rank that read ahead; 0 is a thread.
        cache: the directory that takes the packed shards; by default ``data/packed/<name>``.
        valid_fraction: part of the documents that is held out; of a single document its end.
        verify: compare the SHA-256 of every shard before a run.
        accept_change: continue a run whose corpus is no longer the one that it began with.
        max_bad_samples: so many documents that cannot be decoded are told and left out.
        timeout: seconds after which a shard that does not answer ends the run; less than ``parallel.timeout``, or the
            ranks that wait for it are named instead.
    """

    source: str = CPYTHON
    name: str = ""
    tokenizer: str = ""
    vocab: int = 0
    field: str = "text"
    seq_len: int = MISSING
    batch_size: int = MISSING
    packing: Literal["stream", "documents"] = "stream"
    workers: int = 0
    cache: str = ""
    valid_fraction: float = 0.05
    verify: bool = True
    accept_change: bool = False
    max_bad_samples: int = 0
    timeout: float = TIMEOUT


def corpus_name(data: DataConfig) -> str:
    """Return ``data.name``, or the name of the source.

    Raises:
        InputError: it cannot name a directory, or the source is an address.
    """
    check_source(data.source)
    name = data.name or (CPYTHON if data.source == CPYTHON else Path(data.source).expanduser().resolve().stem)
    if not NAME.fullmatch(name):
        raise InputError("data.name", name, "must be letters, digits, '.', '_' or '-'", "set data.name")
    return name


def packed_dir(data: DataConfig) -> Path:
    """Return where the packed corpus lies or will lie: the source itself if it is one already."""
    if _is_packed(data):
        return Path(data.source).expanduser()
    return Path(data.cache).expanduser() if data.cache else Path("data", "packed", corpus_name(data))


def prepare(data: DataConfig, callback: Callback | None = None) -> Index:
    """Pack the source unless that is done already, and check the shards.

    One rank calls this while the others wait; they then call ``Index.load(packed_dir(data), verify=False)``.

    Raises:
        InputError: see `pack` and `Index.load`.
    """
    folder = packed_dir(data)
    if not _is_packed(data):
        pack(
            data.source,
            folder,
            name=corpus_name(data),
            valid_fraction=data.valid_fraction,
            tokenizer=data.tokenizer,
            vocab=data.vocab,
            field=data.field,
            max_bad_samples=data.max_bad_samples,
            callback=callback,
        )
    return Index.load(folder, verify=data.verify, timeout=data.timeout, callback=callback)


def check_labels(index: Index, data: DataConfig) -> None:
    """Raise InputError where a split of the corpus holds tokens but none to predict: before the first step."""
    for name, split in index.splits.items():
        if name == "train" or split.num_tokens:
            sequences_of(index, data, name)


def _is_packed(data: DataConfig) -> bool:
    """Whether the source is what `pack` makes, damaged or not; a web site may have an ``index.json`` as well."""
    file = Path(data.source).expanduser() / FILE_NAME
    if data.source == CPYTHON or not file.exists():
        return False
    if file.with_name("train-00000.tar").exists():
        return True
    try:
        fields = json.loads(within(data.timeout, file, file.read_bytes))
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(fields, dict) and "format" in fields


def sequences_of(index: Index, data: DataConfig, split: str, seed: int | None = None) -> SequenceDataset:
    """The windows of a split, in the order of ``seed``; see `SequenceDataset`."""
    return SequenceDataset(TokenStream(index, split, data.timeout), data.seq_len, seed=seed, packing=data.packing)
