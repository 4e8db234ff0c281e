"""Packs a corpus: documents -> WebDataset tar shards in two splits and an index, written atomically."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset import TarWriter

from ...errors import InputError
from ..runtime.files import sync, write_text
from .baselines import baselines
from .bpe import check_size, train_from_reader
from .content import Binary
from .corpus import CPYTHON, File, list_files
from .index import FILE_NAME, SPLITS, Index, Shard, Split, dtype_of
from .nucleotides import Case, LetterCount, masked_letters
from .progress import Callback, progress
from .reading import BadSamples, Reader
from .records import array_vocab_size
from .tally import Tally, told
from .vocabulary import MAX_SIZE, ByteVocabulary, IdVocabulary, SubwordVocabulary, Vocabulary

SHARD_BYTES = 64 << 20
TAR_BLOCK = 512  # a tar member's content is padded to whole blocks
ENCODE_BYTES = 1 << 20  # documents are encoded in batches of about this size
LOCK = "lock"  # in a directory that is being written: locked while its process lives

log = logging.getLogger("longreach.data")


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
    binary: Binary = "skip",
    mask: str = "",
    case: Case = "upper",
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
        tokenizer: path of a ``tokenizer.json``; documents that are not UTF-8 are then bad samples. For arrays of token
            ids: the tokenizer that they were made with.
        vocab: size of the vocabulary. For text: train a tokenizer of this size on the training documents; 0 packs
            bytes. For arrays of token ids: the bound of the ids; 0 for the largest id plus one, up to `MAX_SIZE`.
        field: of a JSON line, or column of a table, that holds the text; see `document.content_at`.
        shard_bytes: a shard is closed once its documents reach this size.
        max_bad_samples: up to this many documents and files that cannot be read or decoded are logged and skipped.
        binary: what is done with files whose content is no text; see `corpus.list_files`.
        mask: letters that are no labels, in either case; see `nucleotides`.
        case: of lower-case letters of FASTA; see `nucleotides.Case`.
        callback: reports the progress in bytes; see `progress`.

    Raises:
        InputError: ``source`` is missing, unreadable or cannot be split, has no documents or too many bad samples, or
            does not fit the vocabulary; ``out_dir`` contains something else or cannot be written.
    """
    out_dir = Path(out_dir).absolute()
    if not 0 <= valid_fraction < 1:
        raise InputError("data.valid_fraction", valid_fraction, "must be at least 0 and less than 1")
    tally = Tally()
    files = list_files(source, binary, tally)
    kinds = sorted({file.kind for file in files} - {"text"})
    given = _given_tokenizer(tokenizer, vocab, "npy" in kinds)
    if case != "upper" and "fasta" not in kinds:
        raise InputError("data.case", case, f"is for FASTA files, and {source} holds none", "leave it out")
    _check_outside(source, out_dir)
    provenance = {
        "valid_fraction": valid_fraction,
        "shard_bytes": shard_bytes,
        "files": _digest(f"{file.num_bytes} {file.key}" for file in files),
        "records": kinds or None,
        "field": field if {"jsonl", "csv", "tsv", "parquet"} & {*kinds} else None,
        "binary": None if binary == "skip" else binary,
        "mask": masked_letters(mask, case) or None,
        "case": None if case == "upper" else case,
        "tokenizer": given.sha256 if given else None,
        "chat_template": given.describe().get("chat_template") if given and {"jsonl", "parquet"} & {*kinds} else None,
        "vocab": vocab or None,
    }
    if (index := _existing(out_dir, provenance, files)) is not None:
        return index
    partial: str | None = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        reader = Reader(
            files, valid_fraction, field, callback, given.encode_chat if given else None, tally, case == "upper"
        )
        partial, lock = _partial_dir(out_dir)
        with lock:
            _write(Path(partial), reader, name, provenance, given, BadSamples(max_bad_samples, tally=tally), callback)
            newest = -(-max(file.mtime_ns for file in files) // 10**9) * 10**9  # in whole seconds, as any disk keeps it
            os.utime(Path(partial) / FILE_NAME, ns=(newest, newest))  # this host's clock may not be that of the files
            os.chmod(partial, 0o755)  # with mkdtemp's mode, other users of a cluster could not read it
            os.unlink(lock.name)  # from here on, it is not taken for a stale one: it is not empty
        _publish(partial, out_dir)
    except OSError as error:
        if (index := _existing(out_dir, provenance, files)) is not None:
            return index  # another process has packed the same in the meantime
        fix = "free some space, or " * (error.errno == errno.ENOSPC) + "give another folder (data.cache)"
        raise InputError("out_dir", str(out_dir), f"cannot be written: {error.strerror}", fix) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    for line in told(tally.as_json()):
        log.info("%s: %s", name, line)
    return Index.load(out_dir, verify=False)


def _given_tokenizer(tokenizer: str, vocab: int, arrays: bool) -> SubwordVocabulary | None:
    """The tokenizer of the file ``tokenizer``, None if empty; InputError for options that exclude each other."""
    if tokenizer and vocab:
        raise InputError("data.vocab", vocab, "must be 0 where a tokenizer is given, which has its own size")
    if vocab and not arrays:
        check_size("data.vocab", vocab)
    return SubwordVocabulary.read(tokenizer) if tokenizer else None


def _vocabulary(
    reader: Reader,
    provenance: dict[str, Any],
    given: SubwordVocabulary | None,
    max_bad: float,
    callback: Callback | None,
) -> Vocabulary:
    """The vocabulary of a corpus: ids of its arrays, the given tokenizer, one that is trained now, or bytes."""
    if (size := array_vocab_size(reader.files)) or "npy" in (provenance["records"] or ()):
        vocab = given.size if given else provenance["vocab"] or size
        if vocab < size and given:
            allowed = f"is not the tokenizer of the arrays, which hold the id {size - 1}"
            raise InputError("data.tokenizer", f"{given.size} tokens", allowed)
        if vocab < size:
            raise InputError("data.vocab", vocab, f"must be at least {size}: the arrays hold the id {size - 1}")
        if vocab > MAX_SIZE and not provenance["vocab"]:
            allowed = f"must be given: the arrays hold the id {size - 1}, and a model's table would have {size:,} rows"
            raise InputError("data.vocab", 0, allowed, f"if the ids are right: --vocab {size} (data.vocab)")
        return given or IdVocabulary(max(1, vocab))
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
    bad: BadSamples,
    callback: Callback | None,
) -> None:
    """Write shards, tokenizer and index into the existing ``folder``; ``bad`` counts what is left out."""
    vocabulary = _vocabulary(reader, provenance, given, bad.limit, callback)
    if isinstance(vocabulary, SubwordVocabulary):
        for file_name, content in vocabulary.files.items():
            write_text(folder / file_name, content)
    digest, splits, letters = hashlib.sha256(), {}, provenance["mask"] or ""
    counts = {split: LetterCount(vocabulary, letters) for split in SPLITS}
    with tempfile.TemporaryFile(dir=folder) as held_out:
        with progress(f"packing {name}", reader.num_bytes, callback) as advance:
            for split in SPLITS:
                documents = reader.read(split, bad, vocabulary.check, advance)
                copy = held_out if split == "valid" else None
                encoded = _encoded(_hashed(documents, digest), vocabulary, bad.tally, copy, counts[split], letters)
                written = _write_split(folder, split, encoded, provenance["shard_bytes"], vocabulary)
                splits[split] = replace(written, num_masked=counts[split].num_masked)
        if not splits["train"].num_documents:
            found = bad.tally.as_json()
            lines = "; ".join(told({key: found[key] for key in ("skipped", "bad") if key in found}))
            raise InputError("data.source", name, f"has no document to train on ({lines})")
        source = {**provenance, "content": digest.hexdigest(), "num_bad_samples": bad.count}
        source |= {"counts": bad.tally.as_json(), "alphabet": counts["train"].alphabet}
        dtype, measured = dtype_of(vocabulary.size), baselines(held_out, callback)
    masked = counts["train"].masked
    Index(folder, name, dtype, vocabulary.describe(), splits, source, measured, masked).write()


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


def _hashed(documents: Iterator[tuple[str, NDArray[Any]]], digest: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the documents unchanged; update ``digest`` with them."""
    for key, content in documents:
        digest.update(f"{content.nbytes} {key}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
        yield key, content


def _encoded(
    documents: Iterator[tuple[str, NDArray[Any]]],
    vocabulary: Vocabulary,
    tally: Tally,
    copy: IO[bytes] | None,
    count: LetterCount,
    letters: str,
) -> Iterator[tuple[str, int, bytes]]:
    """Yield key, size of its text in bytes, and tokens (as written to a shard) of each document that has any token.

    Masked tokens are counted, and not part of the size. The texts are also written to ``copy``, without the masked
    ``letters``, and documents without tokens are counted.
    """
    dtype = np.dtype(dtype_of(vocabulary.size)).newbyteorder("<")
    for batch in _batches(documents):
        encoded = vocabulary.encode([content for _, content in batch])
        for (key, content), tokens in zip(batch, encoded, strict=True):
            num_bytes = 0
            for part in vocabulary.text_of(content):
                num_bytes += len(part)
                if copy is not None:
                    copy.write(bytes(part).translate(None, letters.encode()) if letters else part)
            num_bytes -= count.add(tokens)
            if len(tokens):
                yield key, num_bytes, tokens.astype(dtype, copy=False).tobytes()
            else:
                tally.add("skipped", "text without a token")


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
    return Split(tuple(shards), tuple(keys), shard, offset, length, total_bytes)


def _existing(out_dir: Path, provenance: dict[str, Any], files: list[File]) -> Index | None:
    """The index of ``out_dir`` if it was packed from these files with these options; None if nothing is there.

    Names and sizes of the files are always compared; their contents only if a file is newer than the index, which has
    the time of the newest file that it was packed from.

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
        newest = (out_dir / FILE_NAME).stat().st_mtime_ns
        if max(file.mtime_ns for file in files) > newest:
            digest, bad, vocabulary = hashlib.sha256(), BadSamples(math.inf, report=False), index.open_vocabulary()
            chat = vocabulary.encode_chat if isinstance(vocabulary, SubwordVocabulary) else None
            field, upper = provenance["field"] or "", provenance["case"] is None
            reader = Reader(files, provenance["valid_fraction"], field, chat=chat, upper=upper)
            for split in SPLITS:
                for _ in _hashed(reader.read(split, bad, vocabulary.check), digest):
                    pass
            changed = ["content"] * (index.source.get("content") != digest.hexdigest())
    if changed:
        allowed = f"was packed from something else ({', '.join(changed)} differ)"
        fix = "give another name (data.name=NAME), or delete it to pack again, if no run needs it"
        raise InputError("out_dir", str(out_dir), allowed, fix)
    return index


def _partial_dir(out_dir: Path) -> tuple[str, BinaryIO]:
    """Create the directory in which ``out_dir`` is written, and remove those of processes that were killed.

    Returns:
        Its path, and the open file in it whose lock says that this process lives.
    """
    prefix = f".{out_dir.name}.partial-"
    for name in os.listdir(out_dir.parent):
        if name.startswith(prefix):
            _remove_stale(out_dir.parent / name)
    while True:
        partial = tempfile.mkdtemp(prefix=prefix, dir=out_dir.parent)
        with suppress(FileNotFoundError):  # another process has just taken it for a stale one
            lock = open(Path(partial, LOCK), "wb")  # noqa: SIM115, closed by the caller
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            except OSError:
                pass  # a file system without locks: no process removes it
            if os.path.exists(lock.name):
                return partial, lock
            lock.close()


def _remove_stale(partial: Path) -> None:
    """Remove a directory of `_partial_dir` if no process has its lock."""
    try:
        with open(partial / LOCK, "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)
    except FileNotFoundError:
        with suppress(OSError):
            partial.rmdir()  # one that has no lock yet is empty
    except OSError:
        pass  # it is being written


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
