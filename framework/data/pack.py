"""Pack a corpus: documents -> WebDataset tar shards, a train/valid split and an index, all or nothing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import logging
import lzma
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from ...kernels.errors import InputError
from ..files import sync
from .corpus import CPYTHON, Document, list_documents, read_document
from .index import FILE_NAME, Index, Shard, Split
from .loader import TokenStream
from .progress import Callback, progress
from .tar import BadSample

log = logging.getLogger("longreach.data")
SHARD_BYTES = 64 << 20
TAR_BLOCK = 512  # a tar member's content is padded to whole blocks
SAMPLE_BLOCK = 1 << 20
SAMPLE_BLOCKS = 8
BASELINES = {"order0": "order-0 entropy", "gzip": "gzip -9", "xz": "xz -9"}  # what `baselines` measures, and its name


def pack(
    source: str,
    out_dir: str | Path,
    *,
    name: str,
    valid_fraction: float = 0.05,
    shard_bytes: int = SHARD_BYTES,
    max_bad_samples: int = 0,
    callback: Callback | None = None,
) -> Index:
    """Pack the documents of ``source`` into ``out_dir``; reuse it where it already holds just that.

    Whole documents are held out, chosen by a hash of their keys, so the choice stays when others come or go.
    Each document is one tar member of raw bytes (``00000012.bin``, numbered in its split); nothing of the
    clock or the user enters, so equal documents give equal shards. The directory appears complete or not
    at all: it is written beside ``out_dir`` and renamed.

    Args:
        source: see `corpus.list_documents`.
        name: what the corpus is called.
        valid_fraction: part of the documents that is held out, in [0, 1); 0 holds out none.
        shard_bytes: a shard is closed once its documents reach this size.
        max_bad_samples: so many members of tar files that cannot be decoded are told and left out.
        callback: told of the progress in bytes; see `progress`.

    Raises:
        InputError: ``source`` is missing, empty, unreadable or cannot be split, or has too many bad samples;
            ``out_dir`` is something else or cannot be written.
    """
    out_dir = Path(out_dir).absolute()
    if not 0 <= valid_fraction < 1:
        raise InputError("data.valid_fraction", valid_fraction, "must be at least 0 and less than 1")
    documents = list_documents(source)
    _check_outside(source, out_dir)
    made_from = {
        "valid_fraction": valid_fraction,
        "shard_bytes": shard_bytes,
        "num_documents": len(documents),
        "files": _digest(f"{document.num_bytes} {document.key}" for document in documents),
    }
    if (index := _existing(out_dir, made_from, documents)) is not None:
        return index
    partial: str | None = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent)
        _write(Path(partial), documents, name, made_from, max_bad_samples, callback)
        os.chmod(partial, 0o755)  # mkdtemp's own mode would shut out the other users of a cluster
        _put_in_place(partial, out_dir)
    except OSError as error:
        if (index := _existing(out_dir, made_from, documents)) is not None:
            return index  # another process packed the same meanwhile
        fix = "free some space, or " * (error.errno == errno.ENOSPC) + "give another folder (data.cache)"
        raise InputError("out_dir", str(out_dir), f"cannot be written: {error.strerror}", fix) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return Index.load(out_dir, verify=False)


def split_documents(documents: list[Document], valid_fraction: float) -> tuple[list[Document], list[Document]]:
    """Split into (train, valid) by a hash of the key alone; each side gets at least one document.

    Raises:
        InputError: there is only one document to split.
    """
    if valid_fraction == 0:
        return documents, []
    if len(documents) < 2:
        allowed = f"needs at least two documents; the source has only {documents[0].key!r}"
        fix = "set data.valid_fraction=0, or give a folder of several files"
        raise InputError("data.valid_fraction", valid_fraction, allowed, fix)
    place = {document.key: _place(document.key) for document in documents}
    valid = {key for key, at in place.items() if at < valid_fraction}
    if not valid:
        valid = {min(place, key=place.__getitem__)}
    elif len(valid) == len(documents):
        valid -= {max(place, key=place.__getitem__)}
    return [d for d in documents if d.key not in valid], [d for d in documents if d.key in valid]


def baselines(index: Index, callback: Callback | None = None) -> dict[str, Any]:
    """Measure what a model has to beat on the held-out bytes, in bits per byte.

    ``order0``: the entropy of a byte under the held-out bytes' own histogram, over all of them. ``gzip`` and
    ``xz``: what ``gzip -9`` and ``xz -9`` need for the held-out documents in one piece; of more than 8 MiB
    they get eight blocks of 1 MiB, evenly spaced (``num_compressed_bytes`` says how much that was).

    Returns:
        order0, gzip, xz: floats, bits per byte; num_bytes, num_compressed_bytes: ints. Nothing where no
        document is held out.
    """
    stream = TokenStream(index, "valid")
    size = stream.num_tokens
    if size == 0:
        return {}
    counts = np.zeros(256, np.int64)
    for start in range(0, size, SAMPLE_BLOCK):
        counts += np.bincount(stream.read(start, min(start + SAMPLE_BLOCK, size)), minlength=256)
    shares = counts[counts > 0] / size
    starts = range(0, size, SAMPLE_BLOCK)
    if len(starts) > SAMPLE_BLOCKS:
        starts = range(0, size - SAMPLE_BLOCK + 1, (size - SAMPLE_BLOCK) // (SAMPLE_BLOCKS - 1))
    pieces = [stream.read(start, min(start + SAMPLE_BLOCK, size)).tobytes() for start in starts]
    num_sampled = sum(map(len, pieces))
    # wbits 31 is gzip's own header; xz's dictionary need not be larger than what it is given.
    gzip_coder = zlib.compressobj(9, zlib.DEFLATED, 31)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": SAMPLE_BLOCKS * SAMPLE_BLOCK}]
    xz_coder = lzma.LZMACompressor(filters=filters)
    num_gzip = num_xz = 0
    with progress("compressing held-out bytes", num_sampled, callback) as advance:
        for piece in pieces:
            num_gzip += len(gzip_coder.compress(piece))
            num_xz += len(xz_coder.compress(piece))
            advance(len(piece))
        num_gzip, num_xz = num_gzip + len(gzip_coder.flush()), num_xz + len(xz_coder.flush())
    return {
        "order0": -float(shares @ np.log2(shares)),
        "gzip": 8 * num_gzip / num_sampled,
        "xz": 8 * num_xz / num_sampled,
        "num_bytes": size,
        "num_compressed_bytes": num_sampled,
    }


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


def _write(
    folder: Path,
    documents: list[Document],
    name: str,
    made_from: dict[str, Any],
    max_bad_samples: int,
    callback: Callback | None,
) -> None:
    """Write shards and index into the existing ``folder``."""
    train, valid = split_documents(documents, made_from["valid_fraction"])
    content, reader = hashlib.sha256(), _Reader(max_bad_samples)
    with progress(f"packing {name}", sum(document.num_bytes for document in documents), callback) as advance:
        splits = {}
        for split, part in (("train", train), ("valid", valid)):
            splits[split] = _write_split(folder, split, reader.read(part, advance), made_from["shard_bytes"], content)
    source = {**made_from, "content": content.hexdigest(), "num_bad_samples": reader.num_bad}
    index = Index(folder, name, "uint8", {"kind": "bytes", "size": 256}, splits, source)
    dataclasses.replace(index, baselines=baselines(index, callback)).write()


class _Reader:
    """Reads documents, and leaves out up to ``max_bad`` bad ones."""

    def __init__(self, max_bad: float) -> None:
        self.max_bad, self.num_bad = max_bad, 0

    def read(self, documents: list[Document], advance: Callable[[int], None]) -> Iterator[tuple[Document, bytes]]:
        """Yield each document with its tokens, if it has any; ``advance`` is told of the bytes read."""
        for document in documents:
            tokens = b""
            try:
                tokens = read_document(document)
            except BadSample as error:
                self.num_bad += 1
                if self.num_bad > self.max_bad:
                    count = f"{self.num_bad} bad sample{'s' * (self.num_bad > 1)}, {self.max_bad} allowed"
                    fix = "mend it, or leave such samples out: data.max_bad_samples=N, or pack --max-bad N"
                    raise InputError(error.field, error.value, f"{error.allowed} ({count})", fix) from None
                if self.max_bad < math.inf:
                    log.warning("left out: %s", error)
            advance(document.num_bytes)
            if tokens:
                yield document, tokens


def _write_split(
    folder: Path, split: str, documents: Iterator[tuple[Document, bytes]], shard_bytes: int, content: Any
) -> Split:
    """Write one split's shards; ``content`` hashes the documents."""
    shards: list[Shard] = []
    rows: list[tuple[int, int, int]] = []
    keys: list[str] = []
    item = next(documents, None)
    while item is not None:
        path, first, num_bytes = folder / f"{split}-{len(shards):05d}.tar", len(rows), 0
        with (
            _ShardFile(path) as file,
            TarWriter(file, encoder=False, mtime=0, user="longreach", group="longreach") as writer,
        ):
            while item is not None and num_bytes < shard_bytes:
                document, tokens = item
                writer.write({"__key__": f"{len(rows):08d}", "bin": tokens})
                # After a member tarfile stands behind its padding; only there is the offset known.
                padded = -(-len(tokens) // TAR_BLOCK) * TAR_BLOCK
                rows.append((len(shards), writer.tarstream.offset - padded, len(tokens)))
                keys.append(document.key)
                _update(content, document, tokens)
                num_bytes += len(tokens)
                item = next(documents, None)
        shards.append(Shard(path.name, file.num_bytes, file.digest.hexdigest(), len(rows) - first))
    columns = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    return Split(tuple(shards), tuple(keys), *columns)


def _existing(out_dir: Path, made_from: dict[str, Any], documents: list[Document]) -> Index | None:
    """Give the index of ``out_dir`` if it was made from just these documents; None where nothing is there.

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
        if max(document.mtime_ns for document in documents) > packed_at:
            content = hashlib.sha256()
            for part in split_documents(documents, made_from["valid_fraction"]):
                for document, tokens in _Reader(math.inf).read(part, lambda _: None):
                    _update(content, document, tokens)
            changed = ["content"] * (index.source.get("content") != content.hexdigest())
    if changed:
        allowed = f"was packed from something else ({', '.join(changed)} differ)"
        fix = "delete it to pack again, or give another folder (data.cache)"
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


def _update(content: Any, document: Document, tokens: bytes) -> None:
    content.update(f"{len(tokens)} {document.key}\0".encode("utf-8", "surrogateescape"))
    content.update(tokens)


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\0".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _place(key: str) -> float:
    """Map a key to a number in [0, 1), the same everywhere and for ever."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return math.ldexp(int.from_bytes(digest[:6], "big"), -48)
