"""Packs a corpus: documents -> WebDataset tar shards in two splits and an index, written atomically."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from webdataset import TarWriter

from ...errors import InputError
from ..runtime.files import sync, write_text
from .baselines import baselines
from .bpe import check_size, train_from_reader
from .corpus import CPYTHON, File, list_files
from .index import FILE_NAME, SPLITS, Index, Shard, Split, dtype_of
from .progress import Callback, progress
from .reading import BadSamples, Reader
from .records import array_vocab_size, kind_of
from .vocabulary import TOKENIZER, ByteVocabulary, IdVocabulary, SubwordVocabulary, Vocabulary

SHARD_BYTES = 64 << 20
TAR_BLOCK = 512  # a tar member's content is padded to whole blocks
ENCODE_BYTES = 1 << 20  # documents are encoded in batches of about this size


def pack(
    source: str,
    out_dir: str | Path,
    *,
    name: str,
    valid_fraction: float = 0.05,
    tokenizer: str = "",
    vocab: int = 0,
    field: str = "text",
    shard_bytes: int = SHARD_BYTES,
    max_bad_samples: int = 0,
    callback: Callback | None = None,
) -> Index:
    """Pack the documents of ``source`` into ``out_dir``; if it already is the result of that, return its index.

    `records` defines the documents, and `Holdout` the split. Each document is one tar member of raw little-endian
    tokens (``00000012.bin``, numbered in its split), without times and users: equal documents give equal shards. The
    result is written to a temporary directory and renamed, so ``out_dir`` is complete or does not exist.

    Args:
        source: see `corpus.list_files`.
        out_dir: must not exist, be empty, or be the result of an earlier call.
        name: of the corpus.
        valid_fraction: part of the documents that is held out, in [0, 1); 0 holds out none.
        tokenizer: path of a ``tokenizer.json``; documents that are not UTF-8 are then bad samples.
        vocab: size of the vocabulary. For text: train a tokenizer of this size on the training documents; 0 packs
            bytes. For arrays of token ids: the bound of the ids; 0 for the largest id plus one.
        field: of a JSON line that holds the text.
        shard_bytes: a shard is closed once its documents reach this size.
        max_bad_samples: up to this many documents that cannot be decoded are logged and skipped.
        callback: reports the progress in bytes; see `progress`.

    Raises:
        InputError: ``source`` is missing, empty, unreadable or cannot be split, has too many bad samples, or does not
            fit the vocabulary; ``out_dir`` contains something else or cannot be written.
    """
    out_dir = Path(out_dir).absolute()
    if not 0 <= valid_fraction < 1:
        raise InputError("data.valid_fraction", valid_fraction, "must be at least 0 and less than 1")
    files = list_files(source)
    kinds = sorted({kind_of(file) for file in files} - {"file"})
    given = _given_tokenizer(tokenizer, vocab, "npy" in kinds)
    _check_outside(source, out_dir)
    provenance = {
        "valid_fraction": valid_fraction,
        "shard_bytes": shard_bytes,
        "files": _digest(f"{file.num_bytes} {file.key}" for file in files),
        "records": kinds or None,
        "field": field if "jsonl" in kinds else None,
        "tokenizer": given.sha256 if given else None,
        "vocab": vocab or None,
    }
    if (index := _existing(out_dir, provenance, files)) is not None:
        return index
    partial: str | None = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent)
        reader = Reader(files, valid_fraction, field, callback)
        _write(Path(partial), reader, name, provenance, given, max_bad_samples, callback)
        os.chmod(partial, 0o755)  # with mkdtemp's mode, other users of a cluster could not read it
        _publish(partial, out_dir)
    except OSError as error:
        if (index := _existing(out_dir, provenance, files)) is not None:
            return index  # another process has packed the same in the meantime
        fix = "free some space, or " * (error.errno == errno.ENOSPC) + "give another folder (data.cache)"
        raise InputError("out_dir", str(out_dir), f"cannot be written: {error.strerror}", fix) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return Index.load(out_dir, verify=False)


def _given_tokenizer(tokenizer: str, vocab: int, arrays: bool) -> SubwordVocabulary | None:
    """The tokenizer of the file ``tokenizer``, None if empty; InputError for options that exclude each other."""
    if tokenizer and arrays:
        raise InputError("data.tokenizer", tokenizer, "must be empty where the source holds token ids already")
    if tokenizer and vocab:
        raise InputError("data.vocab", vocab, "must be 0 where a tokenizer is given, which has its own size")
    if vocab and not arrays:
        check_size("data.vocab", vocab)
    return SubwordVocabulary.read(tokenizer) if tokenizer else None


def _vocabulary(
    reader: Reader, provenance: dict[str, Any], given: SubwordVocabulary | None, max_bad: int, callback: Callback | None
) -> Vocabulary:
    """The vocabulary of a corpus: ids of its arrays, the given tokenizer, one that is trained now, or bytes."""
    if size := array_vocab_size(reader.files):
        vocab = provenance["vocab"] or size
        if vocab < size:
            raise InputError("data.vocab", vocab, f"must be at least {size}: the arrays hold the id {size - 1}")
        return IdVocabulary(vocab)
    if given or not provenance["vocab"]:
        return given or ByteVocabulary()
    bad = BadSamples(max_bad, report=False)  # they are reported when they are packed
    return train_from_reader(reader, provenance["vocab"], bad, callback)


def _write(
    folder: Path,
    reader: Reader,
    name: str,
    provenance: dict[str, Any],
    given: SubwordVocabulary | None,
    max_bad: int,
    callback: Callback | None,
) -> None:
    """Write shards, tokenizer and index into the existing ``folder``."""
    vocabulary = _vocabulary(reader, provenance, given, max_bad, callback)
    if isinstance(vocabulary, SubwordVocabulary):
        write_text(folder / TOKENIZER, vocabulary.content.decode())
    digest, bad, splits = hashlib.sha256(), BadSamples(max_bad), {}
    with tempfile.TemporaryFile(dir=folder) as held_out:
        with progress(f"packing {name}", reader.num_bytes, callback) as advance:
            for split in SPLITS:
                documents = reader.read(split, bad, vocabulary.check, advance)
                copy = held_out if split == "valid" and not isinstance(vocabulary, IdVocabulary) else None
                encoded = _encoded(_hashed(documents, digest, copy), vocabulary)
                splits[split] = _write_split(folder, split, encoded, provenance["shard_bytes"], vocabulary)
        source = {**provenance, "content": digest.hexdigest(), "num_bad_samples": bad.count}
        dtype, measured = dtype_of(vocabulary.size), baselines(held_out, callback)
    Index(folder, name, dtype, vocabulary.describe(), splits, source, measured).write()


class _ShardFile:
    """A file for writing that computes the SHA-256 of its content; flushed to disk when the context ends."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, open(path, "wb")  # noqa: SIM115, closed on exit
        self.digest, self.num_bytes = hashlib.sha256(), 0

    def __enter__(self) -> _ShardFile:
        return self

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.num_bytes += len(content)
        return self.file.write(content)

    def __exit__(self, *error: object) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())


def _hashed(
    documents: Iterator[tuple[str, NDArray[Any]]], digest: Any, copy: IO[bytes] | None = None
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the documents unchanged; update ``digest`` with them, and write their contents to ``copy``."""
    for key, content in documents:
        digest.update(f"{content.nbytes} {key}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
        if copy is not None:
            copy.write(content.data)
        yield key, content


def _encoded(documents: Iterator[tuple[str, NDArray[Any]]], vocabulary: Vocabulary) -> Iterator[tuple[str, int, bytes]]:
    """Yield key, size in bytes, and tokens (as written to a shard) of each document that has any token."""
    dtype = np.dtype(dtype_of(vocabulary.size)).newbyteorder("<")
    for batch in _batches(documents):
        encoded = vocabulary.encode([content for _, content in batch])
        for (key, content), tokens in zip(batch, encoded, strict=True):
            if len(tokens):
                yield key, content.nbytes, tokens.astype(dtype, copy=False).tobytes()


def _batches(documents: Iterator[tuple[str, NDArray[Any]]]) -> Iterator[list[tuple[str, NDArray[Any]]]]:
    """Group documents into batches of at least `ENCODE_BYTES`, the last one excepted."""
    batch, num_bytes = list[tuple[str, NDArray[Any]]](), 0
    for key, content in documents:
        batch.append((key, content))
        num_bytes += content.nbytes
        if num_bytes >= ENCODE_BYTES:
            yield batch
            batch, num_bytes = [], 0
    yield batch


def _write_split(
    folder: Path, split: str, documents: Iterator[tuple[str, int, bytes]], shard_bytes: int, vocabulary: Vocabulary
) -> Split:
    """Write the shards of one split from the documents of `_encoded`."""
    item_size = np.dtype(dtype_of(vocabulary.size)).itemsize
    shards: list[Shard] = []
    rows: list[tuple[int, int, int]] = []
    keys: list[str] = []
    total_bytes = 0
    item = next(documents, None)
    while item is not None:
        path, first, num_bytes = folder / f"{split}-{len(shards):05d}.tar", len(rows), 0
        with (
            _ShardFile(path) as file,
            TarWriter(file, encoder=False, mtime=0, user="longreach", group="longreach") as writer,
        ):
            while item is not None and num_bytes < shard_bytes:
                key, size, tokens = item
                writer.write({"__key__": f"{len(rows):08d}", "bin": tokens})
                # The writer does not say where a member begins: computed back from its end, padding included.
                padded = -(-len(tokens) // TAR_BLOCK) * TAR_BLOCK
                rows.append((len(shards), writer.tarstream.offset - padded, len(tokens) // item_size))
                keys.append(key)
                num_bytes += len(tokens)
                total_bytes += size
                item = next(documents, None)
        shards.append(Shard(path.name, file.num_bytes, file.digest.hexdigest(), len(rows) - first))
    shard, offset, length = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    split_bytes = 0 if isinstance(vocabulary, IdVocabulary) else total_bytes
    return Split(tuple(shards), tuple(keys), shard, offset, length, split_bytes)


def _existing(out_dir: Path, provenance: dict[str, Any], files: list[File]) -> Index | None:
    """The index of ``out_dir`` if it was packed from these files with these options; None if nothing is there.

    Names and sizes of the files are always compared; their contents only if a file is newer than the index.

    Raises:
        InputError: ``out_dir`` contains something else.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    if not (out_dir / FILE_NAME).is_file():
        fix = "give another folder (data.cache)"
        raise InputError("out_dir", str(out_dir), "exists and is not a packed corpus", fix)
    index = Index.load(out_dir, verify=False)
    changed = [key for key, value in provenance.items() if index.source.get(key) != value]
    if not changed:
        packed_at = (out_dir / FILE_NAME).stat().st_mtime_ns
        if max(file.mtime_ns for file in files) > packed_at:
            digest, bad = hashlib.sha256(), BadSamples(math.inf, report=False)
            reader = Reader(files, provenance["valid_fraction"], provenance["field"] or "")
            for split in SPLITS:
                for _ in _hashed(reader.read(split, bad, index.open_vocabulary().check), digest):
                    pass
            changed = ["content"] * (index.source.get("content") != digest.hexdigest())
    if changed:
        allowed = f"was packed from something else ({', '.join(changed)} differ)"
        fix = "give another name (data.name=NAME), or delete it to pack again, if no run needs it"
        raise InputError("out_dir", str(out_dir), allowed, fix)
    return index


def _publish(partial: str, out_dir: Path) -> None:
    """Rename the finished folder to ``out_dir`` and flush that to disk; OSError if ``out_dir`` is not empty."""
    sync(Path(partial))
    os.rename(partial, out_dir)  # replaces an empty folder only
    sync(out_dir.parent)


def _check_outside(source: str, out_dir: Path) -> None:
    """Refuse an output folder inside the source: the next run would pack the shards themselves."""
    root = Path(source).expanduser()
    if source != CPYTHON and root.is_dir() and out_dir.resolve().is_relative_to(root.resolve()):
        fix = "give a folder outside of it (data.cache)"
        raise InputError("out_dir", str(out_dir), f"must not lie inside the source {source!r}", fix)


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\0".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
