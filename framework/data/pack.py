"""Pack a corpus: documents -> WebDataset tar shards, a train/valid split and an index, all or nothing."""

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
from .bpe import check_size, train_on
from .corpus import CPYTHON, File, list_files
from .index import FILE_NAME, SPLITS, Index, Shard, Split, dtype_of
from .progress import Callback, progress
from .reading import BadSamples, Reader
from .records import array_size, kind_of
from .vocabulary import TOKENIZER, Bytes, Ids, Pieces

SHARD_BYTES = 64 << 20
TAR_BLOCK = 512  # a tar member's content is padded to whole blocks
ENCODED = 1 << 20  # bytes of documents that are encoded in one go


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
    """Pack the documents of ``source`` into ``out_dir``; reuse it where it already holds just that.

    `records` says what a document is, and `Holdout` which are held out. Each document is one tar member of raw
    tokens (``00000012.bin``, numbered in its split); nothing of the clock or the user enters, so equal documents
    give equal shards. The directory appears complete or not at all: it is written beside ``out_dir`` and renamed.

    Args:
        source: see `corpus.list_files`.
        name: what the corpus is called.
        valid_fraction: part of the documents that is held out, in [0, 1); 0 holds out none.
        tokenizer: path of a ``tokenizer.json``; documents that are not UTF-8 are then bad samples.
        vocab: size of the vocabulary: of a text, train a tokenizer of so many tokens on what is not held out; of token
            arrays, what their ids are below. 0 packs a text as bytes, and takes an array's largest id.
        field: of a line of JSON that holds the text.
        shard_bytes: a shard is closed once its documents reach this size.
        max_bad_samples: so many documents that cannot be decoded are told and left out.
        callback: told of the progress in bytes; see `progress`.

    Raises:
        InputError: ``source`` is missing, empty, unreadable or cannot be split, has too many bad samples, or does not
            fit the vocabulary; ``out_dir`` is something else or cannot be written.
    """
    out_dir = Path(out_dir).absolute()
    if not 0 <= valid_fraction < 1:
        raise InputError("data.valid_fraction", valid_fraction, "must be at least 0 and less than 1")
    files = list_files(source)
    kinds = sorted({kind_of(file) for file in files} - {"file"})
    given = _given(tokenizer, vocab, "npy" in kinds)
    _check_outside(source, out_dir)
    made_from = {
        "valid_fraction": valid_fraction,
        "shard_bytes": shard_bytes,
        "files": _digest(f"{file.num_bytes} {file.key}" for file in files),
        "records": kinds or None,
        "field": field if "jsonl" in kinds else None,
        "tokenizer": given.sha256 if given else None,
        "vocab": vocab or None,
    }
    if (index := _existing(out_dir, made_from, files)) is not None:
        return index
    partial: str | None = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent)
        reader = Reader(files, valid_fraction, field, callback)
        _write(Path(partial), reader, name, made_from, given, max_bad_samples, callback)
        os.chmod(partial, 0o755)  # mkdtemp's own mode would shut out the other users of a cluster
        _put_in_place(partial, out_dir)
    except OSError as error:
        if (index := _existing(out_dir, made_from, files)) is not None:
            return index  # another process packed the same meanwhile
        fix = "free some space, or " * (error.errno == errno.ENOSPC) + "give another folder (data.cache)"
        raise InputError("out_dir", str(out_dir), f"cannot be written: {error.strerror}", fix) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return Index.load(out_dir, verify=False)


def _given(tokenizer: str, vocab: int, arrays: bool) -> Pieces | None:
    """The tokenizer of a file, if one is given; InputError where that is at odds with the rest."""
    if tokenizer and arrays:
        raise InputError("data.tokenizer", tokenizer, "must be empty where the source holds token ids already")
    if tokenizer and vocab:
        raise InputError("data.vocab", vocab, "must be 0 where a tokenizer is given, which has its own size")
    if vocab and not arrays:
        check_size("data.vocab", vocab)
    return Pieces.read(tokenizer) if tokenizer else None


def _vocabulary(
    reader: Reader, made_from: dict[str, Any], given: Pieces | None, max_bad: int, callback: Callback | None
) -> Bytes:
    """What the tokens of a corpus stand for: what is given, what its arrays hold, or what is trained now."""
    if size := array_size(reader.files):
        vocab = made_from["vocab"] or size
        if vocab < size:
            raise InputError("data.vocab", vocab, f"must be at least {size}: the arrays hold the id {size - 1}")
        return Ids(vocab)
    if given or not made_from["vocab"]:
        return given or Bytes()
    bad = BadSamples(max_bad, tell=False)  # they are told when they are packed
    return train_on(reader, made_from["vocab"], bad, callback)


def _write(
    folder: Path,
    reader: Reader,
    name: str,
    made_from: dict[str, Any],
    given: Pieces | None,
    max_bad: int,
    callback: Callback | None,
) -> None:
    """Write shards, tokenizer and index into the existing ``folder``."""
    vocabulary = _vocabulary(reader, made_from, given, max_bad, callback)
    if isinstance(vocabulary, Pieces):
        write_text(folder / TOKENIZER, vocabulary.content.decode())
    digest, bad, splits = hashlib.sha256(), BadSamples(max_bad), {}
    with tempfile.TemporaryFile(dir=folder) as held_out:
        with progress(f"packing {name}", reader.num_bytes, callback) as advance:
            for split in SPLITS:
                documents = reader.read(split, bad, vocabulary.check, advance)
                copy = held_out if split == "valid" and not isinstance(vocabulary, Ids) else None
                encoded = _encoded(_noted(documents, digest, copy), vocabulary)
                splits[split] = _write_split(folder, split, encoded, made_from["shard_bytes"], vocabulary)
        source = {**made_from, "content": digest.hexdigest(), "num_bad_samples": bad.count}
        dtype, measured = dtype_of(vocabulary.size), baselines(held_out, callback)
    Index(folder, name, dtype, vocabulary.describe(), splits, source, measured).write()


class _ShardFile:
    """A file that hashes what is written to it, and is on the disk once left."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, open(path, "wb")  # noqa: SIM115, closed on exit
        self.digest, self.num_bytes = hashlib.sha256(), 0

    def __enter__(self) -> _ShardFile:
        return self

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        self.num_bytes += len(piece)
        return self.file.write(piece)

    def __exit__(self, *error: object) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())


def _noted(
    documents: Iterator[tuple[str, NDArray[Any]]], digest: Any, copy: IO[bytes] | None = None
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield documents on; ``digest`` hashes them, and ``copy`` takes what they hold."""
    for key, content in documents:
        digest.update(f"{content.nbytes} {key}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
        if copy is not None:
            copy.write(content.data)
        yield key, content


def _encoded(documents: Iterator[tuple[str, NDArray[Any]]], vocabulary: Bytes) -> Iterator[tuple[str, int, bytes]]:
    """Yield key, bytes and tokens, as a shard holds them, of each document that has any token."""
    dtype = np.dtype(dtype_of(vocabulary.size)).newbyteorder("<")
    for batch in _batches(documents):
        encoded = vocabulary.encode([content for _, content in batch])
        for (key, content), tokens in zip(batch, encoded, strict=True):
            if len(tokens):
                yield key, content.nbytes, tokens.astype(dtype, copy=False).tobytes()


def _batches(documents: Iterator[tuple[str, NDArray[Any]]]) -> Iterator[list[tuple[str, NDArray[Any]]]]:
    """Put documents together that are encoded in one go."""
    batch, num_bytes = list[tuple[str, NDArray[Any]]](), 0
    for key, content in documents:
        batch.append((key, content))
        num_bytes += content.nbytes
        if num_bytes >= ENCODED:
            yield batch
            batch, num_bytes = [], 0
    yield batch


def _write_split(
    folder: Path, split: str, documents: Iterator[tuple[str, int, bytes]], shard_bytes: int, vocabulary: Bytes
) -> Split:
    """Write one split's shards."""
    item_size = np.dtype(dtype_of(vocabulary.size)).itemsize
    shards: list[Shard] = []
    rows: list[tuple[int, int, int]] = []
    keys: list[str] = []
    read = 0
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
                # After a member tarfile stands behind its padding; only there is the offset known.
                padded = -(-len(tokens) // TAR_BLOCK) * TAR_BLOCK
                rows.append((len(shards), writer.tarstream.offset - padded, len(tokens) // item_size))
                keys.append(key)
                num_bytes += len(tokens)
                read += size
                item = next(documents, None)
        shards.append(Shard(path.name, file.num_bytes, file.digest.hexdigest(), len(rows) - first))
    shard, offset, length = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    known = 0 if isinstance(vocabulary, Ids) else read
    return Split(tuple(shards), tuple(keys), shard, offset, length, known)


def _existing(out_dir: Path, made_from: dict[str, Any], files: list[File]) -> Index | None:
    """Give the index of ``out_dir`` if it was made from just these files; None where nothing is there.

    Names and sizes of the source are compared always; its bytes only where a file is newer than the index.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    if not (out_dir / FILE_NAME).is_file():
        fix = "give another folder (data.cache)"
        raise InputError("out_dir", str(out_dir), "exists and is not a packed corpus", fix)
    index = Index.load(out_dir, verify=False)
    changed = [key for key, value in made_from.items() if index.source.get(key) != value]
    if not changed:
        packed_at = (out_dir / FILE_NAME).stat().st_mtime_ns
        if max(file.mtime_ns for file in files) > packed_at:
            digest, bad = hashlib.sha256(), BadSamples(math.inf, tell=False)
            reader = Reader(files, made_from["valid_fraction"], made_from["field"] or "")
            for split in SPLITS:
                for _ in _noted(reader.read(split, bad, index.open_vocabulary().check), digest):
                    pass
            changed = ["content"] * (index.source.get("content") != digest.hexdigest())
    if changed:
        allowed = f"was packed from something else ({', '.join(changed)} differ)"
        fix = "give another name (data.name=NAME), or delete it to pack again, if no run needs it"
        raise InputError("out_dir", str(out_dir), allowed, fix)
    return index


def _put_in_place(partial: str, out_dir: Path) -> None:
    """Make the finished folder appear under its name, durably; OSError where something else is there."""
    sync(Path(partial))
    os.rename(partial, out_dir)  # replaces nothing but an empty folder
    sync(out_dir.parent)


def _check_outside(source: str, out_dir: Path) -> None:
    """Refuse an output folder inside the source: the next run would pack the shards themselves."""
    root = Path(source).expanduser()
    if source != CPYTHON and root.is_dir() and out_dir.resolve().is_relative_to(root.resolve()):
        fix = "give a folder outside of it (data.cache)"
        raise InputError("out_dir", str(out_dir), f"must not lie inside the source {source!r}", fix)


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\0".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
