"""Data: packed documents are read back unchanged, in an order that depends on seed and position alone."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from longreach.errors import InputError
from longreach.framework.data import (
    FILLER,
    IGNORE,
    Batch,
    Batches,
    DataConfig,
    Index,
    SequenceDataset,
    TokenStream,
    pack,
    packed_dir,
    prepare,
    sequences_of,
)
from longreach.framework.data.corpus import list_files
from longreach.framework.data.records import documents as documents_of
from longreach.framework.data.stall import run_with_timeout

TEXT = np.array([byte for byte in range(32, 256) if byte != 127], np.uint8)  # not UTF-8, and no binary data either


def write_corpus(folder: Path, num_documents: int = 40, seed: int = 0) -> dict[str, bytes]:
    """Write files of 1 to 300 random bytes of text, and what a walk must not find; return key -> bytes."""
    rng = np.random.default_rng(seed)
    contents = {}
    for number in range(num_documents):
        key = f"{'abc'[number % 3]}/{number:03d}.txt"
        contents[key] = rng.choice(TEXT, rng.integers(1, 300)).tobytes()
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(contents[key])
    (folder / "empty").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"hidden")
    (folder / "link").symlink_to("/etc/hostname")
    (folder / "linked").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    return contents


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def index(source: Path, tmp_path: Path) -> Index:
    return pack(str(source), tmp_path / "packed", name="small", valid_fraction=0.3, shard_bytes=1500)


def tiny(folder: Path, *contents: bytes) -> TokenStream:
    """A stream of the given documents, none held out."""
    (folder / "tiny").mkdir()
    for number, content in enumerate(contents):
        (folder / "tiny" / str(number)).write_bytes(content)
    index = pack(str(folder / "tiny"), folder / "out", name="tiny", valid_fraction=0, binary="bytes")
    return TokenStream(index, "train")


def documents(source: str) -> list[tuple[str, bytes]]:
    """Key and content of every document of a source."""
    return [(document.key, document.read().tobytes()) for document in documents_of(list_files(source))]


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tokens_of(batches: Iterator[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


# Corpora


def test_a_folder_is_read_in_the_order_of_keys(tmp_path: Path) -> None:
    """Regular files only; links, hidden names, pipes and empty files are left out."""
    contents = write_corpus(tmp_path / "source")
    assert documents(str(tmp_path / "source")) == sorted(contents.items())
    assert documents(str(tmp_path / "source" / "a" / "000.txt")) == [("000.txt", contents["a/000.txt"])]


def test_keys_need_not_be_utf8(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"caf\xc3\xa9", b"z"):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / os.fsdecode(name)).write_bytes(name)
    index = pack(str(tmp_path / "source"), tmp_path / "out", name="x", valid_fraction=0.5)
    keys = index.splits["train"].keys + index.splits["valid"].keys
    assert sorted(map(os.fsencode, keys)) == [b"caf\xc3\xa9", b"caf\xe9", b"z"]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refused(list_files, str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "holds no document" in refused(list_files, str(tmp_path / "empty"))
    (tmp_path / "empty" / "file").touch()
    assert "holds no document; skipped: 1 empty" in refused(list_files, str(tmp_path / "empty"))
    assert "regular file or a folder" in refused(list_files, "/dev/null")
    assert refused(pack, str(tmp_path / "none"), tmp_path / "out", name="x")
    assert not (tmp_path / "out").exists()


def test_this_pythons_own_library(tmp_path: Path) -> None:
    """The default corpus: sources of the library without installed packages; a part of it is packed."""
    found = list_files("cpython")
    assert len(found) > 500 and all(d.key.endswith(".py") for d in found)
    assert not any("site-packages" in d.key or "__pycache__" in d.key for d in found)
    assert "json/decoder.py" in {d.key for d in found}
    part = {key: content for key, content in documents("cpython") if key.startswith(("json/", "email/"))}
    for key, content in part.items():
        (tmp_path / "part" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "part" / key).write_bytes(content)
    index = pack(str(tmp_path / "part"), tmp_path / "out", name="part")
    assert sum(split.num_tokens for split in index.splits.values()) == sum(map(len, part.values())) > 100_000
    assert 1 < index.baselines["xz"] < index.baselines["gzip"] < index.baselines["order0"] < 6


# Packing


def test_equal_documents_give_equal_bytes(source: Path, tmp_path: Path) -> None:
    """Neither clock nor place nor order of creation enters the shards or the fingerprint."""
    write_corpus(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*.txt"):
        os.utime(path, (1e9, 1e9))
    one, two = (
        pack(str(path), tmp_path / f"out-{path.name}", name=path.name, shard_bytes=1500)
        for path in (source, tmp_path / "again")
    )
    assert one.fingerprint == two.fingerprint
    assert one.splits["train"].shards == two.splits["train"].shards and len(one.splits["train"].shards) > 2
    write_corpus(tmp_path / "other", seed=1)
    assert pack(str(tmp_path / "other"), tmp_path / "out", name="x").fingerprint != one.fingerprint


def test_webdataset_reads_the_same_documents(index: Index, tmp_path: Path) -> None:
    contents = write_corpus(tmp_path / "again")
    for split in index.splits.values():
        samples: list[dict[str, Any]] = []
        for shard in split.shards:
            with open(index.directory / shard.name, "rb") as stream:
                samples += group_by_keys(tar_file_expander([{"url": shard.name, "stream": stream}]))
        assert [sample["bin"] for sample in samples] == [contents[key] for key in split.keys]
        assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(split.num_documents)]


def test_the_stream_is_the_documents_in_order(index: Index, tmp_path: Path) -> None:
    contents = write_corpus(tmp_path / "again")
    seen: list[str] = []
    for name, split in index.splits.items():
        whole = b"".join(contents[key] for key in split.keys)
        stream = TokenStream(index, name)
        assert stream.read(0, stream.num_tokens).tobytes() == whole
        rng = np.random.default_rng(0)
        for start, stop in np.sort(rng.integers(0, len(whole) + 1, (100, 2))).tolist():
            assert stream.read(start, stop).tobytes() == whole[start:stop]
            numbers = [i for i, key in enumerate(split.keys) for _ in contents[key]][start:stop]
            assert stream.documents(start, stop).tolist() == numbers
        assert list(split.keys) == sorted(split.keys)
        seen += split.keys
    assert sorted(seen) == sorted(contents)  # so the splits share nothing and lose nothing


def test_a_document_stays_on_its_side_when_others_come(tmp_path: Path, source: Path, index: Index) -> None:
    (source / "zzz").write_bytes(b"new")
    more = pack(str(source), tmp_path / "more", name="small", valid_fraction=0.3)
    held_out = set(index.splits["valid"].keys)
    assert set(more.splits["valid"].keys) - {"zzz"} == held_out and 4 <= len(held_out) <= 20


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_both_sides_get_a_document(tmp_path: Path, source: Path, fraction: float) -> None:
    index = pack(str(source), tmp_path / "out", name="x", valid_fraction=fraction)
    assert min(split.num_documents for split in index.splits.values()) == 1
    lone = str(source / "a" / "000.txt")
    assert pack(lone, tmp_path / "lone", name="x", valid_fraction=0).splits["valid"].num_tokens == 0


def test_baselines_are_those_of_the_tools(tmp_path: Path) -> None:
    """Against gzip and lzma themselves, and an entropy that is known: 4 symbols, evenly, are 2 bits."""
    (tmp_path / "source").mkdir()
    for number in range(8):
        symbols = np.random.default_rng(number).permutation(np.repeat(np.frombuffer(b"ACGT", np.uint8), 500))
        (tmp_path / "source" / str(number)).write_bytes(symbols.tobytes())
    index = pack(str(tmp_path / "source"), tmp_path / "out", name="x", valid_fraction=0.5)
    stream = TokenStream(index, "valid")
    held_out = stream.read(0, stream.num_tokens).tobytes()
    assert index.baselines["order0"] == pytest.approx(2, abs=1e-12)
    assert index.baselines["gzip"] == pytest.approx(8 * len(gzip.compress(held_out, 9)) / len(held_out))
    assert index.baselines["xz"] == pytest.approx(8 * len(lzma.compress(held_out, preset=9)) / len(held_out), rel=0.01)
    assert index.baselines["num_bytes"] == index.baselines["num_compressed_bytes"] == len(held_out)


def test_a_packed_directory_is_used_again(tmp_path: Path, source: Path, index: Index) -> None:
    """Unless the source or the request is another: then it stays, and the message says what differs."""
    options: dict[str, Any] = {"name": "small", "valid_fraction": 0.3, "shard_bytes": 1500}
    before = (index.directory / "index.json").stat()
    first = source / "a" / "000.txt"
    content = first.read_bytes()
    first.write_bytes(content)  # newer, and the same
    os.utime(first, ns=(before.st_mtime_ns + 10**9,) * 2)
    assert pack(str(source), index.directory, **options).fingerprint == index.fingerprint
    message = refused(pack, str(source), index.directory, **{**options, "valid_fraction": 0.2})
    assert "valid_fraction differ" in message
    first.write_bytes(b"x" * len(content))
    os.utime(first, ns=(before.st_mtime_ns + 10**9,) * 2)
    assert "content differ" in refused(pack, str(source), index.directory, **options)
    first.write_bytes(content + b"x")
    assert "files differ" in refused(pack, str(source), index.directory, **options)
    assert (index.directory / "index.json").stat() == before


def test_a_change_is_seen_whatever_the_clock_says(tmp_path: Path) -> None:
    """Of the same size, by a host whose clock is an hour behind that of the one that packed."""
    write_corpus(tmp_path / "source")
    files, hour = [*(tmp_path / "source").rglob("*.txt")], 3600
    now = time.time()
    for file in files:
        os.utime(file, (now - 2 * hour,) * 2)
    pack(str(tmp_path / "source"), tmp_path / "out", name="x")
    pack(str(tmp_path / "source"), tmp_path / "out", name="x")
    files[0].write_bytes(b"x" * files[0].stat().st_size)
    os.utime(files[0], (now - hour,) * 2)
    assert "content differ" in refused(pack, str(tmp_path / "source"), tmp_path / "out", name="x")


def test_an_output_folder_that_is_something_else(tmp_path: Path, source: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years")
    for place in (tmp_path / "thesis", tmp_path / "thesis" / "chapter"):
        assert "not a packed corpus" in refused(pack, str(source), place, name="x")
    assert "cannot be written" in refused(pack, str(source), tmp_path / "thesis" / "chapter" / "x", name="x")
    assert "inside the source" in refused(pack, str(source), source / "packed", name="x")
    assert (tmp_path / "thesis" / "chapter").read_text() == "years"
    (tmp_path / "ready").mkdir()
    assert pack(str(source), tmp_path / "ready", name="x").directory == tmp_path / "ready"


def test_an_interrupt_leaves_nothing(tmp_path: Path, source: Path) -> None:
    calls: list[tuple[str, int, int]] = []

    def interrupt(what: str, done: int, total: int) -> None:
        calls.append((what, done, total))
        if done > total // 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            pack(str(source), tmp_path / "out", name="x", callback=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls[0][0] == "packing x" and 0 < calls[0][1] < calls[0][2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    pack(str(source), tmp_path / "out", name="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


# Tar shards of others


def test_shards_that_others_wrote(tmp_path: Path) -> None:
    """By webdataset's writer and in every format of tarfile, with long and foreign names; hidden and empty members and
    directories are left out, as in a folder, and compressed ones are inflated.
    """
    rng, contents = np.random.default_rng(0), dict[str, bytes]()
    (tmp_path / "shards/more").mkdir(parents=True)
    with TarWriter(str(tmp_path / "shards/more/web.tar")) as writer:
        for number in range(20):
            text = rng.choice(TEXT, rng.integers(1, 2000)).tobytes()
            writer.write({"__key__": f"{number:06d}", "txt": text, "json": {"number": number}})
            contents |= {f"more/web.tar/{number:06d}.txt": text}
            contents |= {f"more/web.tar/{number:06d}.json": b'{"number": %d}' % number}
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    for name, kind in formats.items():
        long = "/".join(["folder"] * (12 if name == "ustar" else 60))
        members = {
            "./a.TXT": b"a",
            f"{long}/b.py": b"b" * 512,
            "caf\xe9.md": b"c" * 513,
            "d.jsonl.gz": gzip.compress(b"d"),
        }
        with tarfile.open(tmp_path / f"shards/{name}.tar", "w", format=kind) as tar:
            tar.add(tmp_path / "shards/more", "folder", recursive=False)
            for key, content in {**members, "empty.txt": b"", ".hidden.txt": b"x", "f/._f.txt": b"x"}.items():
                about = tarfile.TarInfo(key)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
        found = {**members, "d.jsonl.gz": b"d"}
        contents |= {f"{name}.tar/{key.removeprefix('./')}": content for key, content in found.items()}
    assert documents(str(tmp_path / "shards")) == sorted(contents.items(), key=lambda item: os.fsencode(item[0]))
    index = pack(str(tmp_path / "shards"), tmp_path / "out", name="x", valid_fraction=0.2)
    assert {key for split in index.splits.values() for key in split.keys} == contents.keys()
    again = pack(str(tmp_path / "shards"), tmp_path / "out", name="x", valid_fraction=0.2)
    assert again.fingerprint == index.fingerprint
    packed = index.directory / index.splits["train"].shards[0].name  # ours is a shard like any other
    assert [content for _, content in documents(str(packed))] == [contents[key] for key in index.splits["train"].keys]


def test_what_may_be_shards_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with tarfile.open(tmp_path / "source/a.tar", "w"):
        pass
    (tmp_path / "source/b.txt").write_bytes(b"b")
    assert "1 tar files beside 1 others" in refused(list_files, str(tmp_path / "source"))
    (tmp_path / "source/a.tar").rename(tmp_path / "source/a.tar.gz")
    assert "compressed tar files are not read" in refused(list_files, str(tmp_path / "source"))


def test_a_read_that_takes_too_long(tmp_path: Path) -> None:
    """The error names the file; the result or exception of a read in time is passed on."""
    left = threading.Event()
    assert "has not answered a read for 0.1 s" in refused(run_with_timeout, 0.1, tmp_path / "file", left.wait)
    left.set()
    assert run_with_timeout(10, tmp_path / "file", lambda: 3) == 3
    with pytest.raises(FileNotFoundError):
        run_with_timeout(10, tmp_path / "file", (tmp_path / "file").read_bytes)


# What is damaged is named


def test_a_shard_that_is_not_the_packed_one_is_named(index: Index) -> None:
    """Faults 23, 24, 25: missing, cut, emptied, one bit changed; on loading and in the middle of a run."""
    shard = index.directory / index.splits["train"].shards[1].name
    stream, content = TokenStream(index, "train"), shard.read_bytes()
    shard.write_bytes(content[:512])
    message = refused(Index.load, index.directory)
    assert str(shard) in message and f"has 512 bytes; its index says {len(content)}" in message
    assert str(shard) in refused(stream.read, 0, stream.num_tokens)
    shard.write_bytes(b"")
    assert str(shard) in refused(Index.load, index.directory)
    flipped = bytearray(content)
    flipped[700] ^= 1
    shard.write_bytes(flipped)
    message = refused(Index.load, index.directory)
    assert str(shard) in message and "SHA-256" in message
    assert Index.load(index.directory, verify=False).fingerprint == index.fingerprint
    shard.unlink()
    assert str(shard) in refused(Index.load, index.directory, verify=False)
    assert str(shard) in refused(stream.read, 0, stream.num_tokens)


def test_a_damaged_shard_is_named_through_readers_ahead(index: Index) -> None:
    """Fault 24: the one line arrives from the thread and from a worker process."""
    dataset = SequenceDataset(TokenStream(index, "train"), 64, seed=None)
    (index.directory / index.splits["train"].shards[0].name).write_bytes(b"")
    for workers in (0, 1):
        assert "train-00000.tar" in refused(list, Batches(dataset, 1, workers=workers).iterate())


@pytest.mark.parametrize(
    "name", ["../train-00000.tar", "/etc/passwd", "a/b.tar", "pipe:cat x.tar", "..", ".tar", "x.pyd"]
)
def test_names_that_lead_elsewhere_are_refused(index: Index, name: str) -> None:
    """Faults 28 and 30."""
    path = index.directory / "index.json"
    fields = json.loads(path.read_text())
    fields["splits"]["train"]["shards"][0]["name"] = name
    path.write_text(json.dumps(fields))
    assert "names the shard" in refused(Index.load, index.directory)


def test_a_damaged_index_is_named(index: Index) -> None:
    """Faults 25, 27 and 61, bits of the index, and a file that has nothing to do with it."""
    path = index.directory / "index.json"
    fields = json.loads(path.read_text())
    train = fields["splits"]["train"]

    def changed(part: dict[str, Any], key: str, value: Any) -> str:
        before, part[key] = part[key], value
        path.write_text(json.dumps(fields))
        part[key] = before
        message = refused(Index.load, index.directory)
        assert str(path) in message
        return message

    columns, first = train["documents"], train["shards"][0]
    assert "version 2" in changed(fields, "version", 2)
    assert "was not written by" in changed(fields, "format", "other")
    assert "dtype must be" in changed(fields, "dtype", "object")
    assert "a document twice" in changed(columns, "key", [columns["key"][0], *columns["key"][:-1]])
    assert "outside its shard" in changed(columns, "offset", [-1, *columns["offset"][1:]])
    assert "outside its shard" in changed(columns, "length", [2**62, *columns["length"][1:]])
    assert "different lengths" in changed(columns, "length", columns["length"][1:])
    assert "is empty" in changed(first, "num_samples", 0)
    assert "number of documents" in changed(first, "num_samples", first["num_samples"] + 1)
    assert "fingerprint" in changed(columns, "offset", [columns["offset"][0] + 1, *columns["offset"][1:]])
    assert "expected fields" in changed(first, "bytes", "many")
    assert "expected fields" in changed(fields, "splits", {})
    path.write_text(path.read_text()[:100])
    assert "is not JSON" in refused(Index.load, index.directory)
    path.unlink()
    assert "longreach pack" in refused(Index.load, index.directory)


def test_a_vocabulary_that_is_too_small(index: Index) -> None:
    """Fault 33."""
    index.check_vocab(256)
    assert "model.vocab = 255: must be at least 256" in refused(index.check_vocab, 255)


# Sequences


@pytest.mark.parametrize("seq_len", [1, 2, 3, 4, 5, 9, 10, 11, 100])
def test_windows_hold_every_token_and_label_once(tmp_path: Path, seq_len: int) -> None:
    """Ten tokens: labels are the next token also across window ends, and nothing is lost at the last."""
    dataset = SequenceDataset(tiny(tmp_path, b"ABCD", b"EFGHIJ"), seq_len, seed=None)
    rows = [dataset.sequence(window) for window in range(len(dataset))]
    assert all(tokens.shape == labels.shape == (seq_len,) for tokens, labels, _ in rows)
    tokens, labels = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    num_read = min(10, len(tokens))
    assert bytes(tokens.tolist()) == b"ABCDEFGHIJ"[:num_read].ljust(len(tokens), b"\0")
    assert bytes(labels[:9].tolist()) == b"BCDEFGHIJ"
    assert (labels[9:] == IGNORE).all() and tokens.dtype == labels.dtype == torch.int64


def test_document_packing_keeps_documents_apart(tmp_path: Path) -> None:
    stream = tiny(tmp_path, b"AB", b"C", b"DEFG")
    dataset = SequenceDataset(stream, 4, seed=None, packing="documents")
    first, second = dataset.sequence(0), dataset.sequence(1)
    assert first[0].tolist() == [*b"ABCD"] and second[0].tolist() == [*b"EFG", 0]
    assert first[1].tolist() == [ord("B"), IGNORE, IGNORE, ord("E")]
    assert second[1].tolist() == [*b"FG", IGNORE, IGNORE]
    assert first[2] is not None and first[2].tolist() == [0, 0, 1, 2]
    assert second[2] is not None and second[2].tolist() == [2, 2, 2, 3]
    assert "must hold at least 2" in refused(SequenceDataset, tiny_one(tmp_path), 4, seed=0)


def tiny_one(folder: Path) -> TokenStream:
    (folder / "one").write_bytes(b"A")
    return TokenStream(pack(str(folder / "one"), folder / "out1", name="x", valid_fraction=0), "train")


def test_wider_tokens_follow_the_dtype_of_the_index(tmp_path: Path) -> None:
    """The bytes of a corpus read as uint16: two bytes a token, little-endian."""
    stream = tiny(tmp_path, bytes(range(8)))
    split = stream.index.splits["train"]
    object.__setattr__(stream.index, "dtype", "uint16")
    stream.index.vocabulary["size"] = 1 << 16
    split.length[:] //= 2
    wide = TokenStream(stream.index, "train")
    assert wide.read(1, 4).tolist() == [0x0302, 0x0504, 0x0706]


# The order


def test_an_epoch_visits_every_window_once_in_its_own_order(index: Index) -> None:
    stream = TokenStream(index, "train")
    dataset = SequenceDataset(stream, 64, seed=3)
    count = len(dataset)
    epochs = [[dataset.window(count * epoch + i) for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(count))
    other = SequenceDataset(stream, 64, seed=4)
    assert [other.window(i) for i in range(count)] != epochs[0]


def test_the_order_never_changes(tmp_path: Path) -> None:
    """Written down once: a resumed run must read the same after an update of torch or NumPy."""
    dataset = SequenceDataset(tiny(tmp_path, bytes(11)), 1, seed=7)
    assert len(dataset) == 10
    first, second = [5, 0, 1, 6, 2, 8, 4, 9, 3, 7], [4, 6, 9, 1, 0, 2, 7, 5, 8, 3]
    assert [dataset.window(i) for i in range(20)] == first + second


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("num_data_ranks", "micro_batch_size"), [(1, 1), (1, 6), (2, 3), (3, 1), (6, 1)])
def test_ranks_micro_batches_and_workers_do_not_change_the_order(
    index: Index, num_data_ranks: int, micro_batch_size: int, workers: int
) -> None:
    """Six sequences a step, over the end of an epoch, against the definition itself."""
    dataset = SequenceDataset(TokenStream(index, "train"), 256, seed=1)
    num_steps = len(dataset) // 6 + 2
    expected = [dataset.window(position) for position in range(6 * num_steps)]
    ranks = [
        Batches(
            dataset,
            6,
            micro_batch_size=micro_batch_size,
            data_rank=rank,
            num_data_ranks=num_data_ranks,
            workers=workers,
        )
        for rank in range(num_data_ranks)
    ]
    read = [list(rank.iterate(0, num_steps)) for rank in ranks]
    each = ranks[0].num_micro_batches
    indices = [
        number
        for step in range(num_steps)
        for rank in read
        for batch in rank[step * each : (step + 1) * each]
        for number in batch.indices.tolist()
    ]
    assert indices == expected
    for batch in read[-1]:
        assert batch.tokens.shape == (micro_batch_size, 256)
        for row, number in enumerate(batch.indices.tolist()):
            tokens, labels, _ = dataset.sequence(number)
            assert torch.equal(batch.tokens[row], tokens) and torch.equal(batch.labels[row], labels)


def test_a_resumed_run_reads_on_where_it_stopped(index: Index) -> None:
    """Fault 64: from any position, an epoch's last among them, and with another batch size."""
    dataset = SequenceDataset(TokenStream(index, "train"), 200, seed=1)
    count = len(dataset)
    whole = tokens_of(islice(Batches(dataset, 2).iterate(), 3 * count))
    for position in (2, count - 1, count, count + 1):
        assert tokens_of(islice(Batches(dataset, 2).iterate(position), count)) == whole[position : position + count]
        rest = tokens_of(Batches(dataset, 3, micro_batch_size=3).iterate(position, 2))
        assert rest == whole[position : position + 6]


def test_validation_reads_each_window_once_and_ends_together(index: Index) -> None:
    """Fault 32: every rank gets as many micro-batches; what fills them up counts for nothing."""
    held_out = SequenceDataset(TokenStream(index, "valid"), 100, seed=None, packing="documents")
    count = len(held_out)
    assert count % 4  # or nothing is to be filled up
    ranks = [
        list(Batches(held_out, 4, micro_batch_size=2, data_rank=rank, num_data_ranks=2).iterate()) for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1]) == -(-count // 4)
    numbers = torch.cat([batch.indices for pair in zip(*ranks, strict=True) for batch in pair])
    assert numbers[:count].tolist() == list(range(count)) and (numbers[count:] == FILLER).all()
    last = ranks[1][-1]
    assert (last.labels[last.indices == FILLER] == IGNORE).all()
    assert last.segments is not None and (last.segments.diff(dim=1) >= 0).all()
    assert len(list(Batches(held_out, 4).iterate(num_steps=1))) == 4
    assert len(list(Batches(held_out, 4).iterate(num_steps=10**6))) == 4 * -(-count // 4)


def test_reading_ahead_does_not_touch_torchs_generator(index: Index) -> None:
    """Dropout must not depend on the number of workers."""
    dataset = SequenceDataset(TokenStream(index, "train"), 64, seed=1)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(Batches(dataset, 1, workers=workers).iterate(0, 2))
        assert torch.equal(torch.get_rng_state(), before)


KILLED_WORKER = """
import multiprocessing, os, signal, sys
from longreach.framework.data import Batches, Index, SequenceDataset, TokenStream

if __name__ == "__main__":
    dataset = SequenceDataset(TokenStream(Index.load(sys.argv[1]), "train"), 64, seed=1)
    batches = Batches(dataset, 1, workers=1).iterate()
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for _ in batches:
        pass
"""


def test_a_killed_worker_ends_the_run(index: Index, tmp_path: Path) -> None:
    """Fault 35: within seconds, with the reason."""
    program = tmp_path / "program.py"
    program.write_text(KILLED_WORKER)
    command = [sys.executable, str(program), str(index.directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert any("WorkerFailed: a data worker failed" in line for line in done.stderr.splitlines())


def test_a_batch_size_that_ranks_cannot_share(index: Index) -> None:
    dataset = SequenceDataset(TokenStream(index, "train"), 64, seed=1)
    message = refused(Batches, dataset, 5, micro_batch_size=2, num_data_ranks=2)
    assert "data.batch_size = 5: must be a multiple of 2 data ranks x 2 sequences" in message


def test_from_the_configuration_to_batches(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` packs once, in the default place; the packed directory is a source too."""
    monkeypatch.chdir(tmp_path)
    data = DataConfig(source="source", seq_len=50, batch_size=2, valid_fraction=0.2)
    index = prepare(data)
    assert index.directory == packed_dir(data) == Path("data/packed/source")
    again = DataConfig(source="data/packed/source", seq_len=50, batch_size=2)
    assert packed_dir(again) == Path("data/packed/source")
    assert prepare(again).fingerprint == prepare(data).fingerprint == index.fingerprint
    batches = Batches(sequences_of(index, data, "train", seed=5), data.batch_size, data_rank=1, num_data_ranks=2)
    assert next(batches.iterate()).indices.item() == batches.dataset.window(1)
    assert "set data.name" in refused(prepare, DataConfig(source="source", name="../x", seq_len=5, batch_size=1))
    (source / "index.json").write_text('{"pages": ["of a web site"]}')
    more = DataConfig(source="source", name="site", seq_len=50, batch_size=2, valid_fraction=0.2)
    assert "index.json" in prepare(more).splits["train"].keys + prepare(more).splits["valid"].keys
