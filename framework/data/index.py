"""``index.json``: the contents of a packed directory, and how they are checked.

Shards are ordinary WebDataset tar files, but training does not read them as tar: the index has the byte offset of each
document, so names, links and pickles inside a shard have no effect. Only `Index.load` with ``verify`` reads the tar
headers, and requires that they agree with the index.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .nucleotides import Case
from .progress import Callback, progress
from .stall import TIMEOUT, run_with_timeout
from .tar import members
from .vocabulary import KINDS, TOKENIZER, SubwordVocabulary, Vocabulary, open_vocabulary

FILE_NAME = "index.json"
FORMAT = "longreach-pack"
VERSION = 1
DTYPES = ("uint8", "uint16", "uint32")
SPLITS = ("train", "valid")
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
HASH_BYTES = 1 << 22


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the directory, size in bytes, SHA-256 and number of members."""

    name: str
    num_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class Split:
    """The documents of one split, in stream order, as columns.

    Args:
        shards: the tar files; each holds consecutive documents.
        keys: of the documents, unique.
        shard: int64 ``[documents]``, the number of each document's shard.
        offset: int64 ``[documents]``, the byte offset of each document's tokens in its shard.
        length: int64 ``[documents]``, tokens of each document.
        num_bytes: size of the documents before tokenization, without masked tokens; 0 if tokens are ids without a text.
        num_masked: tokens that are in `Index.masked`.
    """

    shards: tuple[Shard, ...] = ()
    keys: tuple[str, ...] = ()
    shard: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    offset: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    length: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    num_bytes: int = 0
    num_masked: int = 0

    @property
    def num_documents(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        return int(self.length.sum())

    @property
    def bytes_per_token(self) -> float:
        """The mean size of a token that is not masked; 0 if tokens stand for no bytes."""
        return self.num_bytes / max(1, self.num_tokens - self.num_masked)


@dataclass(frozen=True)
class Index:
    """A packed directory.

    Args:
        directory: of ``index.json`` and the shards.
        name: of the corpus.
        dtype: of the tokens in the shards, little-endian; one of `DTYPES`.
        vocabulary: the fields of `Vocabulary.describe`.
        splits: ``train`` and ``valid``; ``valid`` may be empty.
        source: what was packed and with which options; `pack` compares them to decide whether it can be reused.
        baselines: bits per byte of simple compressors on the held-out bytes; see `baselines.baselines`.
        masked: tokens that are no labels, such as those of N in a genome; they are context like all others.
    """

    directory: Path
    name: str
    dtype: str
    vocabulary: dict[str, Any]
    splits: dict[str, Split]
    source: dict[str, Any]
    baselines: dict[str, Any] = field(default_factory=dict)
    masked: tuple[int, ...] = ()

    @property
    def mask(self) -> str:
        """The letters whose tokens are masked; see `nucleotides.masked_letters`."""
        return str(self.source.get("mask") or "")

    @property
    def case(self) -> Case:
        """What was done with lower-case letters of FASTA; see `nucleotides.Case`."""
        found: Case = self.source.get("case") or "upper"
        return found

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that determines the tokens and their order; name and source are not included."""
        content = self._content()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def bits_per_byte(self, loss: float, split: str = "valid") -> float | None:
        """Convert a mean loss in nats per token to bits per byte; None if tokens stand for no bytes.

        Uses the mean bytes per token of the split, so it is exact for a loss over the whole split.
        """
        size = self.splits[split].bytes_per_token
        return loss / math.log(2) / size if size else None

    def open_vocabulary(self) -> Vocabulary:
        """Return the vocabulary; InputError if the tokenizer is missing, damaged or not the one of the index."""
        return open_vocabulary(self.directory, self.vocabulary)

    def check_vocab(self, vocab: int, fix: str = "") -> None:
        """Raise InputError if a model's vocabulary of ``vocab`` tokens is smaller than the corpus's."""
        size = int(self.vocabulary["size"])
        if vocab < size:
            allowed = f"must be at least {size}, the vocabulary of {self.directory}"
            raise InputError("model.vocab", vocab, allowed, fix or f"set model.vocab={size}")

    def write(self) -> None:
        """Write ``index.json`` and flush it to the disk."""
        head = {"format": FORMAT, "name": self.name, "fingerprint": self.fingerprint}
        tail = {"baselines": self.baselines, "source": self.source}
        with open(self.directory / FILE_NAME, "w", encoding="ascii") as file:
            json.dump({**head, **tail, **self._content()}, file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        verify: bool = True,
        timeout: float = TIMEOUT,
        callback: Callback | None = None,
    ) -> Index:
        """Read ``index.json`` and check every shard against it.

        Args:
            directory: of the packed corpus.
            verify: also compare each shard's SHA-256 (about 1 GiB/s) and tar headers; sizes are always compared.
            timeout: seconds that a read may take.
            callback: reports the bytes hashed; see `progress`.

        Raises:
            InputError: a file is missing, damaged, changed, of a newer version, or does not answer a read; names it.
        """
        directory = Path(directory)
        path = directory / FILE_NAME
        try:
            content = run_with_timeout(timeout, path, path.read_bytes)
        except OSError as error:
            fix = f"pack it first: longreach pack SOURCE {directory}"
            raise InputError("index", str(path), f"cannot be read: {error.strerror}", fix) from None
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            raise _damaged(path, "is not JSON") from None
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            allowed = f'must hold "format": "{FORMAT}"'
            raise InputError("index", str(path), allowed, "it was not written by longreach pack")
        if fields.get("version") != VERSION:
            allowed = f"has version {fields.get('version')!r}; this longreach reads version {VERSION}"
            raise InputError("index", str(path), allowed, "pack the corpus again, or update longreach")
        try:
            index = cls._parse(directory, fields)
            is_intact = index.fingerprint == fields.get("fingerprint")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise _damaged(path, f"does not have the expected fields ({repr(error)[:200]})") from None
        if not is_intact:
            raise _damaged(path, "does not match its own fingerprint")
        if index.vocabulary["kind"] == SubwordVocabulary.kind:
            run_with_timeout(timeout, directory / TOKENIZER, index.open_vocabulary)
        index._check_shards(verify, timeout, callback)
        return index

    def _content(self) -> dict[str, Any]:
        """The fields of ``index.json`` that the fingerprint covers."""
        splits = {}
        for name, split in self.splits.items():
            splits[name] = {
                "num_tokens": split.num_tokens,
                **({"num_masked": split.num_masked} if self.masked else {}),
                **({"num_bytes": split.num_bytes} if self.vocabulary.get("kind") == SubwordVocabulary.kind else {}),
                "shards": [
                    {"name": s.name, "bytes": s.num_bytes, "sha256": s.sha256, "num_samples": s.num_samples}
                    for s in split.shards
                ],
                "documents": {
                    "key": list(split.keys),
                    "shard": split.shard.tolist(),
                    "offset": split.offset.tolist(),
                    "length": split.length.tolist(),
                },
            }
        masked = {"masked": [*self.masked]} if self.masked else {}
        return {"version": VERSION, "vocabulary": self.vocabulary, **masked, "dtype": self.dtype, "splits": splits}

    @classmethod
    def _parse(cls, directory: Path, fields: dict[str, Any]) -> Index:
        """The index of the fields of ``index.json``; InputError, KeyError, TypeError, ... if they are invalid."""
        path = directory / FILE_NAME
        if fields["dtype"] not in DTYPES:
            raise InputError("index", str(path), f"dtype must be one of {', '.join(DTYPES)}")
        vocabulary, source, splits = dict(fields["vocabulary"]), dict(fields["source"]), {}
        if vocabulary["kind"] not in KINDS:
            raise InputError("index", str(path), f"vocabulary must be one of {', '.join(KINDS)}")
        for name in SPLITS:
            part, columns = fields["splits"][name], fields["splits"][name]["documents"]
            shards = [Shard(s["name"], s["bytes"], s["sha256"], s["num_samples"]) for s in part["shards"]]
            shard, offset, length = (np.array(columns[c], dtype=np.int64) for c in ("shard", "offset", "length"))
            splits[name] = Split(tuple(shards), tuple(columns["key"]), shard, offset, length)
            _check_split(path, splits[name], np.dtype(fields["dtype"]).itemsize)
            num_masked = int(part.get("num_masked", 0))
            known = {"bytes": splits[name].num_tokens - num_masked, "ids": 0}
            num_bytes = int(known.get(vocabulary["kind"], part.get("num_bytes")))
            splits[name] = replace(splits[name], num_bytes=num_bytes, num_masked=num_masked)
        if not 1 <= int(vocabulary["size"]) <= np.iinfo(fields["dtype"]).max + 1:
            raise _damaged(path, f"has a vocabulary that does not fit {fields['dtype']}")
        name, baselines = str(fields["name"]), {key: float(value) for key, value in fields["baselines"].items()}
        if not name.isprintable():
            raise _damaged(path, "has a name that cannot be shown")
        masked = tuple(int(token) for token in fields.get("masked", ()))
        return cls(directory, name, fields["dtype"], vocabulary, splits, source, baselines, masked)

    def _check_shards(self, verify: bool, timeout: float, callback: Callback | None) -> None:
        """Raise InputError unless every shard has the size and, with ``verify``, the content of the index."""
        shards = [(split, number) for split in self.splits.values() for number in range(len(split.shards))]
        for split, number in shards:
            shard = split.shards[number]
            path = self.directory / shard.name
            status = run_with_timeout(timeout, path, partial(_file_status, path))
            if status is None:
                raise InputError("shard", str(path), "is missing", "restore it, or pack the corpus again")
            if (size := status.st_size) != shard.num_bytes:
                allowed = f"has {size} bytes; its index says {shard.num_bytes}"
                raise InputError("shard", str(path), allowed, "it was cut or changed: pack the corpus again")
        if not verify:
            return
        total = sum(split.shards[number].num_bytes for split, number in shards)
        with progress(f"checking {self.name}", total, callback) as advance:
            for split, number in shards:
                path = self.directory / split.shards[number].name
                try:
                    self._verify(path, split, number, timeout, advance)
                except OSError as error:
                    raise InputError("shard", str(path), f"cannot be read: {error.strerror}") from None

    def _verify(self, path: Path, split: Split, number: int, timeout: float, advance: Callable[[int], None]) -> None:
        """Raise InputError unless a shard has the SHA-256 and exactly the members of the index."""
        digest = hashlib.sha256()
        with run_with_timeout(timeout, path, partial(FileIO, path)) as file:
            while content := run_with_timeout(timeout, path, partial(file.read, HASH_BYTES)):
                digest.update(content)
                advance(len(content))
        if digest.hexdigest() != split.shards[number].sha256:
            allowed = "does not have the SHA-256 of its index"
            raise InputError("shard", str(path), allowed, "it was changed: pack the corpus again")
        first, last = np.searchsorted(split.shard, [number, number + 1]).tolist()
        size = np.dtype(self.dtype).itemsize
        documents = zip(split.offset[first:last].tolist(), split.length[first:last].tolist(), strict=True)
        expected = [(f"{first + i:08d}.bin", offset, length * size) for i, (offset, length) in enumerate(documents)]
        if [(member.name, member.offset, member.num_bytes) for member in members(path)] != expected:
            allowed = "holds other members than its index says"
            raise InputError("shard", str(path), allowed, "do not use this directory")


def dtype_of(size: int) -> str:
    """Return the smallest of `DTYPES` that holds the ids of a vocabulary of ``size`` tokens."""
    return next(name for name in DTYPES if size <= np.iinfo(name).max + 1)


def _file_status(path: Path) -> os.stat_result | None:
    """The status of a regular file; None if ``path`` is not one."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _check_split(path: Path, split: Split, item_size: int) -> None:
    """Raise InputError unless columns and shards are consistent: every document inside its shard, none twice."""
    for shard in split.shards:
        if not SHARD_NAME.fullmatch(shard.name):
            allowed = f"names the shard {shard.name!r}; a shard is a .tar file beside its index"
            raise InputError("index", str(path), allowed, "do not use this directory")
        if shard.num_samples < 1 or shard.num_bytes < 1:
            raise _damaged(path, f"says that the shard {shard.name} is empty")
    count = split.num_documents
    if not all(column.shape == (count,) for column in (split.shard, split.offset, split.length)):
        raise _damaged(path, "has document columns of different lengths")
    if len(set(split.keys)) != count:
        raise _damaged(path, "names a document twice")
    counts = np.array([shard.num_samples for shard in split.shards], dtype=np.int64)
    if sum(shard.num_samples for shard in split.shards) != count or not np.array_equal(
        split.shard, np.repeat(np.arange(len(counts)), counts)
    ):
        raise _damaged(path, "does not give each shard the number of documents it says")
    sizes = np.array([shard.num_bytes for shard in split.shards], dtype=np.int64)
    if not count:
        return
    room = (sizes[split.shard] - split.offset) // item_size
    if ((split.offset < 0) | (split.length < 1) | (split.length > room)).any():
        raise _damaged(path, "places a document outside its shard")


def _damaged(path: Path, why: str) -> InputError:
    return InputError("index", str(path), f"is damaged: it {why}", "pack the corpus again")
