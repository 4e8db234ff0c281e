"""Corpora, packed shards, and the order in which training reads them.

`prepare` packs ``data.source`` into a directory of shards; `sequences_of` gives the windows of a split as a dataset,
and `Batches` reads it in micro-batches.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from ...bounds import bounded
from ...errors import InputError
from .baselines import BASELINES
from .content import Binary
from .corpus import CPYTHON, check_source
from .index import FILE_NAME, Index
from .labels import IGNORE, next_token_labels
from .loader import (
    FILLER,
    WORKER_DIED,
    Batch,
    Batches,
    Packing,
    Parts,
    SequenceDataset,
    Sequences,
    TokenStream,
    WorkerFailed,
    worker_failure,
)
from .mixture import Mixture
from .nucleotides import Case, masked_letters
from .pack import pack
from .progress import Callback
from .stall import TIMEOUT, run_with_timeout
from .vocabulary import (
    TOKENIZER,
    ByteVocabulary,
    IdVocabulary,
    SubwordVocabulary,
    Vocabulary,
    load_vocabulary,
    save_vocabulary,
)

__all__ = [
    "BASELINES",
    "FILLER",
    "IGNORE",
    "WORKER_DIED",
    "Batch",
    "Batches",
    "ByteVocabulary",
    "DataConfig",
    "IdVocabulary",
    "Index",
    "Missing",
    "Mixture",
    "Parts",
    "SequenceDataset",
    "Sequences",
    "SourceConfig",
    "SubwordVocabulary",
    "TokenStream",
    "Vocabulary",
    "WorkerFailed",
    "check_labels",
    "corpora",
    "corpus_name",
    "load_vocabulary",
    "masked_letters",
    "next_token_labels",
    "pack",
    "packed_dir",
    "prepare",
    "save_vocabulary",
    "sequences_of",
    "worker_failure",
]

Missing = Literal["error", "interpolate", "ffill"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class SourceConfig:
    """One of several sources.

    Args:
        source: as ``data.source``.
        weight: share of the training sequences, relative to the other sources.
        name: as ``data.name``.
    """

    source: str = MISSING
    weight: float = 1.0
    name: str = ""


@dataclass
class DataConfig:
    """The data set, its tokens, and how sequences are read from it.

    Args:
        source: ``cpython`` (the standard library of the running Python), or the path of a file, a folder, a ``.tar``
            file or a folder of such, or a packed directory. `records` says how JSONL, CSV, Parquet, FASTA and ``.npy``
            files are split into documents.
        name: name of the corpus; by default that of the source, with that of the tokenizer.
        sources: several sources in place of ``source``: a mapping of names to ``{source: PATH, weight: NUMBER}``. Each
            gives its share of the training sequences, and is read in a new order at each of its own epochs; held-out
            losses are of each source, and their mean by weight.
        tokenizer: path of a ``tokenizer.json`` of the tokenizers library; empty for bytes or, with ``model.pretrained``
            or ``model.architecture``, for that of the model. A chat template is read from
            the ``tokenizer_config.json`` beside it. Of ``.npy`` arrays, the tokenizer that they were made with.
        vocab: size of the tokenizer to train when the corpus is packed; for ``.npy`` arrays, the bound of their ids. 0
            for bytes, and for the largest id plus one.
        field: the field of a JSON line, or the column of a table, that holds the text or the messages of a chat; nested
            fields are joined by dots, as in ``meta.content``.
        seq_len: tokens of a whole sequence, before it is split over ranks.
        batch_size: sequences per optimizer step, over all ranks.
        curriculum: shorter sequences first: pairs of their tokens and how many steps have them, as in
            ``[[1024, 200], [8192, 200]]``; then follow those of ``seq_len``. Lengths increase, and each divides
            ``seq_len``. All steps have the same number of tokens.
        epochs: passes over the training sequences of ``seq_len`` tokens, in place of ``train.steps``; 0 leaves those.
        packing: ``stream``: documents are concatenated, and tokens see earlier documents too; ``documents``: tokens see
            their own document only.
        workers: prefetching processes of each rank; 0 for a thread.
        cache: directory for the packed shards; by default ``data/packed/<name>``. Of several sources, each has its own
            below it.
        valid_fraction: part of the documents that is held out for validation; the end of a single document.
        verify: compare the SHA-256 of every shard before a run.
        accept_change: resume a run also if its corpus has changed since it began.
        max_bad_samples: up to this many documents, files or pictures that cannot be read or decoded are logged and
            skipped.
        binary: files whose content is no text: ``skip`` and count them, read their ``bytes``, or ``error``.
        mask: letters that are out of the loss, in either case, such as ``N``; they stay context. A packed corpus keeps
            this, and ``case``.
        case: of lower-case (soft-masked) letters of FASTA: ``upper`` makes them capitals, ``keep`` keeps them, ``mask``
            keeps them out of the loss, too.
        reverse_complement: read half of the training sequences, drawn anew in each epoch, as the other strand; only of
            nucleotides.
        columns: forecast: names of the columns of a CSV file to take as channels; empty for all columns of numbers.
        time_column: forecast: name of the column of times, ``none`` for no such column; empty to find it: ISO dates, or
            increasing numbers with a name such as ``time``. No window crosses a gap of more than 1.5 median steps.
        missing: forecast: where a channel has no number: ``error``; ``interpolate`` (linear, between the values before
            and after it); ``ffill`` (the value before it).
        timeout: seconds after which a shard that does not answer a read ends the run; keep it below
            ``parallel.timeout``, or the error names the ranks that wait and not the shard.
    """

    source: str = CPYTHON
    name: str = ""
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    tokenizer: str = ""
    vocab: int = bounded(0, minimum=0)
    field: str = "text"
    seq_len: int = bounded(MISSING, minimum=1)
    batch_size: int = bounded(MISSING, minimum=1)
    curriculum: list[list[int]] = dataclasses.field(default_factory=list)
    epochs: float = bounded(0.0, minimum=0)
    packing: Packing = "stream"
    workers: int = bounded(0, minimum=0)
    cache: str = ""
    valid_fraction: float = bounded(0.05, minimum=0, below=1)
    verify: bool = True
    accept_change: bool = False
    max_bad_samples: int = bounded(0, minimum=0)
    binary: Binary = "skip"
    mask: str = ""
    case: Case = "upper"
    reverse_complement: bool = False
    columns: list[str] = dataclasses.field(default_factory=list)
    time_column: str = ""
    missing: Missing = "error"
    timeout: float = bounded(TIMEOUT, minimum=1)


def corpus_name(data: DataConfig) -> str:
    """Return ``data.name``, or the name of the source; with a tokenizer, also its number of tokens, or the name of its
    file or, where that is ``tokenizer.json``, of its directory.

    Raises:
        InputError: it is not valid as the name of a directory, or the source is a URL.
    """
    check_source(data.source)
    source = CPYTHON if data.source == CPYTHON else Path(data.source).expanduser().resolve().stem
    file = Path(data.tokenizer)
    tokenizer = file.parent.resolve().name if file.name == TOKENIZER else file.stem  # of a model: its directory's name
    tokens = f"-{data.vocab}" if data.vocab else f"-{tokenizer}" if data.tokenizer else ""
    name = data.name or source + tokens
    if not NAME.fullmatch(name):
        raise InputError("data.name", name, "must be letters, digits, '.', '_' or '-'", "set data.name")
    return name


def corpora(data: DataConfig) -> dict[str, DataConfig]:
    """The configuration of each source, by its name in ``data.sources`` and in that order; ``data`` itself, without a
    name, where there are none.

    Raises:
        InputError: two sources would be packed into the same directory.
    """
    if not data.sources:
        return {"": data}
    found: dict[str, DataConfig] = {}
    names: dict[Path, str] = {}
    for name in sorted(data.sources):  # the order of reading does not depend on how the mapping is written
        one, cache = data.sources[name], str(Path(data.cache, name)) if data.cache else ""
        found[name] = dataclasses.replace(data, source=one.source, name=one.name, cache=cache, sources={})
        other = names.setdefault(folder := packed_dir(found[name]), name)
        if other != name and data.sources[other].source != one.source:
            allowed = f"would be packed into the same directory as {other}: {folder}"
            raise InputError(f"data.sources.{name}", one.source, allowed, f"set data.sources.{name}.name={name}")
    return found


def packed_dir(data: DataConfig) -> Path:
    """Return the directory of the packed corpus, which need not exist yet; the source itself if it is packed."""
    if _is_packed(data):
        return Path(data.source).expanduser()
    return Path(data.cache).expanduser() if data.cache else Path("data", "packed", corpus_name(data))


def prepare(data: DataConfig, callback: Callback | None = None) -> Index:
    """Pack the source unless it is packed already, and check the shards.

    Called by one rank while the others wait; they then call ``Index.load(packed_dir(data), verify=False)``.

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
            binary=data.binary,
            mask=data.mask,
            case=data.case,
            callback=callback,
        )
    return Index.load(folder, verify=data.verify, timeout=data.timeout, callback=callback)


def check_labels(index: Index, data: DataConfig) -> None:
    """Raise InputError if a split has tokens but no labels."""
    for name, split in index.splits.items():
        if name == "train" or split.num_tokens:
            sequences_of(index, data, name)


def _is_packed(data: DataConfig) -> bool:
    """Whether the source is a packed directory, possibly damaged, and not any folder with an ``index.json``."""
    file = Path(data.source).expanduser() / FILE_NAME
    if data.source == CPYTHON or not file.exists():
        return False
    if file.with_name("train-00000.tar").exists():
        return True
    try:
        fields = json.loads(run_with_timeout(data.timeout, file, file.read_bytes))
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(fields, dict) and "format" in fields


def sequences_of(index: Index, data: DataConfig, split: str, seed: int | None = None) -> SequenceDataset:
    """The windows of a split as a dataset in the order of ``seed``; see `SequenceDataset`."""
    return dataset_of(TokenStream(index, split, data.timeout), data, seed)


def dataset_of(stream: TokenStream, data: DataConfig, seed: int | None = None) -> SequenceDataset:
    """The windows of a stream as a dataset; training sequences are augmented as ``data`` says."""
    both_strands = data.reverse_complement and stream.name == "train"
    return SequenceDataset(stream, data.seq_len, seed=seed, packing=data.packing, both_strands=both_strands)
