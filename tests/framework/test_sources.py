"""Sources: JSONL, FASTA and arrays of token ids become the documents that they hold; a lone document is split."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.errors import InputError
from longreach.framework.data import Index, TokenStream, pack
from longreach.framework.data.bpe import make_tokenizer
from longreach.framework.data.corpus import list_files
from longreach.framework.data.holdout import Holdout
from longreach.framework.data.records import documents


def contents(path: Path, field: str = "text") -> dict[str, bytes]:
    return {document.key: document.read().tobytes() for document in documents(list_files(str(path)), field)}


def tokens(index: Index) -> dict[str, dict[str, list[int]]]:
    """Split -> key -> tokens."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, split in index.splits.items():
        stream = TokenStream(index, name)
        bounds = zip(split.keys, stream.starts, stream.starts[1:], strict=False)
        found[name] = {key: stream.read(int(start), int(stop)).tolist() for key, start, stop in bounds}
    return found


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.jsonl.gz"])
def test_each_line_of_json_is_a_document(tmp_path: Path, name: str) -> None:
    """By its number, blank lines counted; the last one needs no end."""
    lines = [{"text": "one"}, {"text": "zwei \N{SNOWMAN}\n", "other": float("nan")}, {"text": ""}, {"text": "three"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=number % 2 == 0) for number, line in enumerate(lines))
    found = contents(write(tmp_path / name, text.encode()))
    assert [*found] == [f"{name}:{number}" for number in (1, 3, 5, 7)]
    assert [*found.values()] == [line["text"].encode() for line in lines]  # type: ignore[union-attr]


def test_another_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"body": "x", "text": 1}\n{"body": "y"}\n')
    assert [*contents(path, "body").values()] == [b"x", b"y"]
    index = pack(str(path), tmp_path / "out", name="x", field="body", valid_fraction=0)
    assert tokens(index)["train"] == {"a.jsonl:1": [ord("x")], "a.jsonl:2": [ord("y")]}
    assert "field differ" in refused(pack, str(path), tmp_path / "out", name="x", valid_fraction=0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "is not JSON: "),
        (b"[" * 100_000, "is not JSON: "),
        (b"9" * 100_000, "is not JSON: "),
        (b'{"text": "\xff"}', "is not JSON: not UTF-8"),
        (b"NaN", "must be an object"),
        (b'["text"]', "must be an object"),
        (b'{"text": NaN}', "must have a text in its field 'text', not NaN"),
        (b'{"text": null}', "must have a text in its field 'text', not null"),
        (b'{"text": ["a"]}', "must have a text"),
        (b'{"content": "a"}', "has no field 'text', but 'content'"),
        (b'{"text": "\\ud800"}', "has half a character (a lone surrogate) in its field 'text'"),
    ],
)
def test_a_bad_line_is_named_or_left_out(tmp_path: Path, line: bytes, words: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b'\n{"text": "better"}')
    options: dict[str, Any] = {"name": "x", "valid_fraction": 0}
    message = refused(pack, str(path), tmp_path / "out", **options)
    assert f"a.jsonl:2': {words}" in message and "(1 bad sample, 0 allowed)" in message
    index = pack(str(path), tmp_path / "out", max_bad_samples=1, **options)
    assert index.splits["train"].keys == ("a.jsonl:1", "a.jsonl:3") and index.source["num_bad_samples"] == 1


@pytest.mark.parametrize("name", ["g.fa", "g.fasta", "g.fna.gz"])
def test_each_record_of_fasta_is_a_document(tmp_path: Path, name: str) -> None:
    text = b";a comment\n>one first sequence\r\nACGT\r\nacgtN\r\n\r\n>empty\n>two\nMK*-\n>\nAC"
    found = contents(write(tmp_path / name, text))
    assert found == {f"{name}/one": b"ACGTACGTN", f"{name}/two": b"MK*-", f"{name}/record 4": b"AC"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"ACGT\n", "g.fa:1': is no line of FASTA"),
        (b">a\nAC GT\n", "g.fa:2': is no line of FASTA"),
        (b">a\n\x00\x01\n", "g.fa:2': is no line of FASTA"),
        (b">a\nAC\n>a b\nGT\n", "g.fa:3': is the second with the id 'a'"),
        (b">a\n>b\n", "must hold at least one"),
    ],
)
def test_what_is_no_fasta(tmp_path: Path, text: bytes, words: str) -> None:
    assert words in refused(pack, str(write(tmp_path / "g.fa", text)), tmp_path / "out", name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["g.fa"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "g.fa.gz"])
@pytest.mark.parametrize("damage", ["cut", "head", "middle"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    line = b'{"text": "%d"}\n' if "json" in name else b">%d\nACGT\n"
    content = bytearray(gzip.compress(b"".join(line % number for number in range(5000))))
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[1 if damage == "head" else len(content) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(content)
    message = refused(pack, str(tmp_path / name), tmp_path / "out", name="x")
    assert name in message and (damage == "middle" or "cannot be inflated" in message)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_ends_of_names_decide_in_a_folder(tmp_path: Path) -> None:
    """In the order of files, and in a file in that of its documents."""
    write(tmp_path / "source/b.jsonl", b"".join(b'{"text": "%d"}\n' % number for number in range(1, 12)))
    write(tmp_path / "source/a.txt", b'{"text": "a"}')
    write(tmp_path / "source/c.fa", b">z\nA\n>y\nC\n")
    found = contents(tmp_path / "source")
    lines = [f"b.jsonl:{number}" for number in range(1, 12)]
    assert [*found] == ["a.txt", *lines, "c.fa/z", "c.fa/y"] and found["a.txt"] == b'{"text": "a"}'
    index = pack(str(tmp_path / "source"), tmp_path / "out", name="x", valid_fraction=0.3)
    keys = [set(split.keys) for split in index.splits.values()]
    assert keys[0] | keys[1] == found.keys() and not keys[0] & keys[1] and min(map(len, keys)) > 0
    again = pack(str(tmp_path / "source"), tmp_path / "out", name="x", valid_fraction=0.3)
    assert again.fingerprint == index.fingerprint


@pytest.mark.parametrize("shape", [(50,), (10, 5)])
@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), (">i2", 300), ("int64", 70_000), ("uint32", 2)])
def test_arrays_of_token_ids(tmp_path: Path, shape: tuple[int, ...], dtype: str, largest: int) -> None:
    ids = np.random.default_rng(0).integers(0, largest + 1, shape).astype(dtype)
    ids.flat[7] = largest
    np.save(tmp_path / "a.npy", np.asfortranarray(ids))
    index = pack(str(tmp_path / "a.npy"), tmp_path / "out", name="x", valid_fraction=0.2)
    assert index.vocabulary == {"kind": "ids", "size": largest + 1} and index.baselines == {}
    assert index.dtype == ("uint8" if largest < 256 else "uint16" if largest < 65536 else "uint32")
    found = tokens(Index.load(tmp_path / "out"))
    assert index.bits_per_byte(1.0) is None
    if len(shape) == 1:
        cut = len(found["train"]["a.npy"])
        assert found["train"]["a.npy"] + found["valid"]["a.npy"] == ids.tolist() and 36 < cut <= 40
    else:
        rows = {**found["train"], **found["valid"]}
        assert rows == {f"a.npy:{number}": row for number, row in enumerate(ids.tolist())}
        assert min(map(len, found.values())) > 0


def test_the_vocabulary_of_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    assert "must be at least 100" in refused(pack, str(tmp_path / "a.npy"), tmp_path / "out", name="x", vocab=99)
    assert pack(str(tmp_path / "a.npy"), tmp_path / "out", name="x", vocab=1000).vocabulary["size"] == 1000
    np.save(tmp_path / "b.npy", np.array([1, 1 << 30]))  # a table of a billion rows has to be asked for
    message = refused(pack, str(tmp_path / "b.npy"), tmp_path / "b", name="x", valid_fraction=0)
    assert "hold the id 1073741824, and a model's table would have 1,073,741,825 rows" in message
    index = pack(str(tmp_path / "b.npy"), tmp_path / "b", name="x", valid_fraction=0, vocab=1 << 31)
    assert index.vocabulary["size"] == 1 << 31


def test_arrays_with_the_tokenizer_that_made_them(tmp_path: Path) -> None:
    """They are packed as the text itself is: the same tokens, the number of its bytes, and the tokenizer."""
    texts = [f"caf\xe9 {number} \N{SNOWMAN} " * 5 for number in range(9)]
    for number, text in enumerate(texts):
        write(tmp_path / "text" / f"{number}.txt", text.encode())
    tokenizer = str(tmp_path / "t.json")
    vocabulary = make_tokenizer(str(tmp_path / "text"), tokenizer, 280)
    rows = [vocabulary.encode_text(text.encode()) for text in texts]
    (tmp_path / "ids").mkdir()
    for number, row in enumerate(rows):
        np.save(tmp_path / f"ids/{number}.npy", row.astype(np.uint16))
    options: dict[str, Any] = {"name": "x", "tokenizer": tokenizer, "valid_fraction": 0.5}
    index = pack(str(tmp_path / "ids"), tmp_path / "out", **options)
    found = {key: row for split in tokens(index).values() for key, row in split.items()}
    assert found == {f"{number}.npy": row.tolist() for number, row in enumerate(rows)}
    assert index.vocabulary == vocabulary.describe() and index.open_vocabulary().describe() == vocabulary.describe()
    for split in index.splits.values():
        assert split.num_bytes == sum(len(texts[int(key.split(".")[0])].encode()) for key in split.keys) > 0
    assert index.baselines["num_bytes"] == index.splits["valid"].num_bytes
    np.save(tmp_path / "ids/large.npy", np.array([vocabulary.size]))
    message = refused(pack, str(tmp_path / "ids"), tmp_path / "large", **options)
    assert f"is not the tokenizer of the arrays, which hold the id {vocabulary.size}" in message


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("/tmp/longreach-evil.txt", "w")


def test_what_is_no_array_of_ids(tmp_path: Path) -> None:
    """Nothing in it is run."""
    good = np.arange(1000, dtype=np.uint16)
    cases: dict[str, Any] = {
        "float64 of 1 axes": good.astype(float),
        "bool of 1 axes": good > 3,
        "uint16 of 3 axes": good.reshape(10, 10, 10),
        "uint16 of 0 axes": good[3],
        "holds -100 at [0]: token ids are from 0 to 2^31 - 1": good.astype(int) - 100,
        f"holds {2**40} at [1, 2]: token ids": np.array([[0, 1, 2], [3, 4, 2**40]]),
        f"holds {2**64 - 1} at [3]: token ids": np.array([0, 1, 2, -1]).astype(np.uint64),
        f"holds {2**31} at [0]: token ids": np.array([2**31]),
        "is not a complete .npy array": np.array([Evil()], object),
        "must hold at least one": good[:0].reshape(0, 4),
    }
    for number, (words, array) in enumerate(cases.items()):
        path = tmp_path / f"{number}.npy"
        np.save(path, array, allow_pickle=True)
        assert words in refused(pack, str(path), tmp_path / "out", name="x"), words
    np.save(tmp_path / "a.npy", good)
    whole = (tmp_path / "a.npy").read_bytes()
    for content in (whole[:-1], whole[:40], whole[:3], whole.replace(b")", b" ", 1), b"\x80\x04N.", b"PK\x03\x04"):
        path = write(tmp_path / "bad.npy", content)
        assert "bad.npy" in refused(pack, str(path), tmp_path / "out", name="x")
    write(tmp_path / "both/a.npy", whole)
    write(tmp_path / "both/a.txt", b"text")
    assert "1 .npy files beside 1 others" in refused(pack, str(tmp_path / "both"), tmp_path / "out", name="x")
    assert not (tmp_path / "out").exists() and not Path("/tmp/longreach-evil.txt").exists()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text(min_size=4, max_size=60), st.floats(0.01, 0.99))
def test_the_end_of_a_lone_document_is_held_out(text: str, fraction: float) -> None:
    """Nothing is lost or read twice, both parts are text, and each has a token to predict."""
    with tempfile.TemporaryDirectory() as place:
        path = write(Path(place) / "a.txt", text.encode("utf-8", "ignore"))
        if len(path.read_bytes()) < 4:
            return
        holdout = Holdout([("a.txt", 9)], fraction)
        parts = []
        for split in ("train", "valid"):
            (document,) = holdout.select(documents(list_files(str(path), "bytes")), split)
            parts.append(document.read().tobytes())
    assert b"".join(parts) == text.encode("utf-8", "ignore") and min(map(len, parts)) >= 2
    if len(text) > 20:
        assert "".join(part.decode() for part in parts) == text
        assert len(parts[1]) == pytest.approx(fraction * len(text.encode()), abs=5)


@pytest.mark.parametrize("sizes", [(10, 20_000), (20_000, 10), (300, 400, 100_000)], ids=str)
def test_no_more_is_held_out_than_trained_on(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """Under every name: where a large document would be held out, its end is instead."""
    for name in "abcdefgh":
        folder = tmp_path / name
        for number, size in enumerate(sizes):
            write(folder / f"{name}{number}.txt", b"x" * size)
        index = pack(str(folder), tmp_path / f"{name}-out", name="x", valid_fraction=0.05)
        train, valid = (index.splits[split].num_tokens for split in ("train", "valid"))
        assert train + valid == sum(sizes) and 0 < valid <= train
        assert index.splits["train"].num_documents >= 1
    shares = []
    for name in "abcdefgh":
        index = pack(str(tmp_path / name), tmp_path / f"{name}-half", name="x", valid_fraction=0.3)
        shares.append(index.splits["valid"].num_tokens / sum(sizes))
    assert max(shares) == pytest.approx(0.3, abs=0.01)  # of the large one, held out by its name at least once


def test_a_lone_document_that_is_too_short(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"abc")
    assert "must hold 4 or more to be split; set data.valid_fraction=0" in refused(
        pack, str(path), tmp_path / "out", name="x"
    )
