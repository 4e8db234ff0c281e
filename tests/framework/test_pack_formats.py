"""Packing says what became of every file: text in any encoding or compression, tables and chats; others by reason."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL, Structure, byref, c_uint32
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import AddedToken, Tokenizer

from longreach.errors import InputError
from longreach.framework.data import (
    ByteVocabulary,
    DataConfig,
    Index,
    SubwordVocabulary,
    TokenStream,
    load_vocabulary,
    pack,
    save_vocabulary,
)
from longreach.framework.data.bpe import make_tokenizer
from longreach.framework.data.chat import ChatTemplate
from longreach.framework.data.content import binary_format, encoding_of
from longreach.framework.data.corpus import list_files
from longreach.framework.data.records import documents
from longreach.framework.data.tally import Tally
from longreach.framework.inference.evaluate import _from_sources
from longreach.launch.cli import main

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(100)
NOISE = np.random.default_rng(0).bytes(5000)
TEXT = "Zustand \N{SNOWMAN} caf\xe9\r\n" * 20


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def packed(source: Path, out: Path, **options: Any) -> tuple[dict[str, bytes], dict[str, Any], Index]:
    """The documents of a source that was packed as bytes, and what was counted."""
    index = pack(str(source), out, **{"name": "x", "valid_fraction": 0.0, **options})
    stream = TokenStream(index, "train")
    bounds = zip(stream.split.keys, stream.starts, stream.starts[1:], strict=False)
    found = {key: stream.read(int(start), int(stop)).tobytes() for key, start, stop in bounds}
    return found, index.source["counts"], index


class _Capabilities(Structure):
    _fields_ = (("effective", c_uint32), ("permitted", c_uint32), ("inheritable", c_uint32))


@contextmanager
def no_right_to_read_all() -> Iterator[None]:
    """Files without a mode cannot be read, by root neither."""
    libc, header, before = CDLL(None), (c_uint32 * 2)(0x20080522, 0), (_Capabilities * 2)()
    assert libc.capget(byref(header), byref(before)) == 0
    less = (_Capabilities * 2)(*before)
    less[0].effective = before[0].effective & ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(byref(header), byref(less)) == 0
    try:
        yield
    finally:
        assert libc.capset(byref(header), byref(before)) == 0


# Every file is counted


def test_every_file_of_a_folder_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text is converted and packed; the others are skipped, by a reason, and no FIFO or socket is waited for."""
    source = tmp_path / "source"
    plain = {
        "a.txt": b"plain",
        "latin.txt": "caf\xe9".encode("latin-1") * 9,
        "bom.txt": codecs.BOM_UTF8 + TEXT.encode(),
        "16le.txt": TEXT.encode("utf-16"),
        "16be.txt": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        "32.txt": TEXT.encode("utf-32"),
        "b.txt.gz": gzip.compress(TEXT.encode()) + gzip.compress(b"more"),
        "c.md.bz2": bz2.compress(TEXT.encode()),
        "sub/d.xz": lzma.compress(codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")),
    }
    skipped = {
        "e.png": PNG,
        "noise": NOISE,
        "f.gz": gzip.compress(NOISE),
        "g.npz": b"PK\x03\x04" + NOISE,
        "h.txt.zst": b"\x28\xb5\x2f\xfd" + NOISE,
        "i": gzip.compress(b"a name without a suffix"),
        "j.pdf": b"%PDF-1.7\nsome lines that look like text",
        "sub/k.tar.gz": gzip.compress(tarfile.TarInfo("a").tobuf()),
        "empty.txt": b"",
        ".hidden": b"hidden",
        ".git/config": b"hidden",
    }
    for name, content in {**plain, **skipped}.items():
        write(source / name, content)
    (source / "link").symlink_to("a.txt")
    (source / "linked").symlink_to("sub")
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(source / "socket"))
        found, counts, _ = packed(source, tmp_path / "out")
        expected = {
            "read": {"text": 9},
            "converted": {
                "UTF-16": 3, "UTF-32": 1, "UTF-8 with a byte order mark": 1, "bzip2": 1, "gzip": 1, "xz": 1
            },
            "skipped": {
                "FIFO": 1, "binary (PDF)": 1, "binary (PNG)": 1, "binary (gzip)": 1, "binary (tar)": 1,
                "binary (unknown)": 2, "binary (zip)": 1, "binary (zstd)": 1, "empty": 1, "hidden": 2, "link": 2,
                "socket": 1,
            },
        }  # fmt: skip
        assert counts == expected
        texts = {name: TEXT.encode() for name in plain}
        texts |= {"a.txt": b"plain", "latin.txt": plain["latin.txt"], "b.txt.gz": TEXT.encode() + b"more"}
        assert found == texts
        assert main(["pack", str(source), str(tmp_path / "shown")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "read: 9 text" in lines and any(line.startswith("skipped: 1 FIFO, 1 binary (PDF), ") for line in lines)
    assert "vocabulary: 256 bytes, the rows of a model's table (model.vocab)" in lines
    (source / "latin.txt").unlink()
    assert main(["tokenizer", str(source), str(tmp_path / "t.json"), "--vocab", "256"]) == 0
    told = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["read", "converted", "skipped", "256 tokens"]


def test_binary_files_are_read_or_refused_if_that_is_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source / "a.txt", "text")
    write(source / "b.png", PNG)
    write(source / "c.gz", gzip.compress(NOISE))
    found, counts, _ = packed(source, tmp_path / "bytes", binary="bytes")
    assert found == {"a.txt": b"text", "b.png": PNG, "c.gz": (source / "c.gz").read_bytes()}
    assert counts == {"read": {"binary as bytes": 2, "text": 1}}
    message = refused(pack, str(source), tmp_path / "error", name="x", binary="error")
    assert "'b.png': is no text, but binary data (PNG); leave it out, or pack its bytes: --bin" in message
    for place in (source / "b.png", source / "c.gz"):  # one that is named is not skipped
        assert "--binary=bytes (data.binary=bytes)" in refused(pack, str(place), tmp_path / "one", name="x")
    assert "files, binary differ" in refused(pack, str(source), tmp_path / "bytes", name="x", valid_fraction=0.0)
    shutil.move(source / "a.txt", tmp_path)
    message = refused(pack, str(source), tmp_path / "none", name="x")
    assert "holds no document; skipped: 1 binary (PNG), 1 binary (unknown); --binary=bytes" in message


def test_what_is_text() -> None:
    """Any language and encoding without control characters; no longer, if its beginning is not."""
    for text in (
        TEXT.encode(),
        "Привет, мир".encode("koi8-r"),
        "こんにちは".encode("shift-jis"),
        b"\x1b[1mbold\x1b[0m\f\b",
    ):
        assert binary_format(text) == "" and encoding_of(text) == ""
    for content in (NOISE, b"a\0b", TEXT.encode("utf-16-le"), b"\xff\xfe\0\xd8a\0", bytes(range(32))):
        assert binary_format(content) == "unknown", content[:10]
    cut = TEXT.encode("utf-16")[:-1]  # of a beginning, the last character may be missing a part
    assert binary_format(cut) == "" and encoding_of(cut) == "UTF-16"


def test_members_of_archives_are_read_as_files_are(tmp_path: Path) -> None:
    members = {
        "a.txt": TEXT.encode("utf-16"), "b.md.gz": gzip.compress(codecs.BOM_UTF8 + b"b"), "c.bin": NOISE,
        "d.dat": b"text", ".e.txt": b"hidden", "f.txt": b"", "g.txt.gz": gzip.compress(NOISE),
    }  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    found, counts, _ = packed(tmp_path / "a.tar", tmp_path / "out")
    assert found == {"a.tar/a.txt": TEXT.encode(), "a.tar/b.md.gz": b"b", "a.tar/d.dat": b"text"}
    assert counts["skipped"] == {"binary (unknown)": 2, "empty": 1, "hidden": 1}
    assert counts["converted"] == {"UTF-16": 1, "UTF-8 with a byte order mark": 1, "gzip": 1}
    found, _, _ = packed(tmp_path / "a.tar", tmp_path / "bytes", binary="bytes")
    assert found["a.tar/c.bin"] == found["a.tar/g.txt.gz"] == NOISE


def test_a_file_that_cannot_be_read_is_a_bad_sample(tmp_path: Path) -> None:
    """Whatever it holds; its neighbours are packed, and so is what comes before the damage."""
    source = tmp_path / "source"
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(5000))
    write(source / "good.txt", "good")
    for name in ("a.txt", "b.jsonl", "c.fa", "e.csv", "f.parquet"):
        write(source / name, b">a\nACGT\n").chmod(0)
    write(source / "cut.jsonl.gz", gzip.compress(lines)[:-100])
    write(source / "cut.txt.gz", gzip.compress(NOISE.hex().encode())[:-100])
    write(source / "odd.txt", TEXT.encode("utf-16") + b"\0")
    with no_right_to_read_all():
        message = refused(pack, str(source), tmp_path / "out", name="x", max_bad_samples=7)
        assert re.search(r"(8 bad samples, 7 allowed)", message)
        found, counts, index = packed(source, tmp_path / "out", max_bad_samples=8)
    assert counts["bad"] == {"damaged": 3, "unreadable": 5} and index.source["num_bad_samples"] == 8
    assert found["good.txt"] == b"good" and {key.split(":")[0] for key in found} == {"good.txt", "cut.jsonl.gz"}
    numbers = [content for key, content in found.items() if key != "good.txt"]
    assert 2000 < len(numbers) < 5000 and numbers == [b"%d" % number for number in range(len(numbers))]
    (tmp_path / "arrays").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / f"arrays/{name}.npy", np.arange(9))
    (tmp_path / "arrays/a.npy").chmod(0)
    with no_right_to_read_all():
        assert "(1 bad sample, 0 allowed)" in refused(pack, str(tmp_path / "arrays"), tmp_path / "ids", name="x")
        index = pack(str(tmp_path / "arrays"), tmp_path / "ids", name="x", valid_fraction=0, max_bad_samples=1)
    assert index.splits["train"].keys == ("b.npy",) and index.vocabulary["size"] == 9
    write(tmp_path / "bad/a.txt.gz", b"no gzip")
    message = refused(pack, str(tmp_path / "bad"), tmp_path / "bad-out", name="x", max_bad_samples=1)
    assert "has no document to train on (left out as bad samples: 1 damaged)" in message


def test_a_compressed_text_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longreach.framework.data.corpus.MAX_INFLATED", 1 << 20)
    write(tmp_path / "a.txt.xz", lzma.compress(b"text " * (1 << 20)))
    message = refused(pack, str(tmp_path / "a.txt.xz"), tmp_path / "out", name="x")
    assert "inflates to more than 1 MiB (1 bad sample, 0 allowed); inflate it: plain files may be larger" in message


def test_documents_without_content_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "source/a.jsonl", '{"text": ""}\n\n{"text": "one"}\n')
    write(tmp_path / "source/b.fa", ">a\n>b\nACGT\n>c\n")
    write(tmp_path / "source/c.jsonl", "\n\n")
    write(tmp_path / "source/d.csv", "text\n")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "source/e.parquet")
    write(tmp_path / "source/f.gz", gzip.compress(b""))
    found, counts, _ = packed(tmp_path / "source", tmp_path / "out")
    assert found == {"a.jsonl:3": b"one", "b.fa/b": b"ACGT"}
    assert counts["read"] == {"csv": 1, "fasta": 1, "jsonl": 2, "parquet": 1, "text": 1}
    without = {f"{kind} without a record": 1 for kind in ("csv", "jsonl", "parquet")}
    assert counts["skipped"] == {"FASTA record without a sequence": 2, "empty": 2, **without}
    again = pack(str(tmp_path / "source"), tmp_path / "out", name="x", valid_fraction=0.0)
    assert again.source["counts"] == counts


# Records


@pytest.mark.parametrize("end", ["", ".gz", ".xz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_records_in_other_encodings(tmp_path: Path, end: str, encoding: str) -> None:
    pack_of = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[end]
    texts = {
        "a.jsonl": '{"text": "caf\xe9 \\n\u2028"}\n{"text": "two"}\r\n',
        "b.csv": 'number,text\r\n1,"caf\xe9, ""two""\nlines"\r\n\r\n2,\u2028x\n',
        "c.tsv": "text\tnumber\nsome words\t1\n",
        "d.fa": ">one\nAC\n",
    }
    for name, text in texts.items():
        write(tmp_path / "source" / (name + end), pack_of(text.encode(encoding)))
    found = {d.key: d.read().tobytes().decode() for d in documents(list_files(str(tmp_path / "source")))}
    expected = {
        "a.jsonl:1": "caf\xe9 \n\u2028", "a.jsonl:2": "two", "b.csv:2": 'caf\xe9, "two"\nlines', "b.csv:5": "\u2028x",
        "c.tsv:2": "some words", "d.fa/one": "AC",
    }  # fmt: skip
    assert found == {re.sub("([a-z])([:/])", rf"\1{end}\2", key): text for key, text in expected.items()}


def test_tables_of_text(tmp_path: Path) -> None:
    """A bad row is named or left out; without a column of that name a table is a text, or not what was asked for."""
    write(tmp_path / "a.csv", "text,n\none,1\ntwo\n" + "x" * 200_000 + ',3\n"",4\n')
    message = refused(pack, str(tmp_path / "a.csv"), tmp_path / "out", name="x")
    assert "a.csv:3': must have the 2 cells of the first line, not 1 (1 bad sample, 0 allowed)" in message
    found, counts, _ = packed(tmp_path / "a.csv", tmp_path / "out", max_bad_samples=1)
    assert found == {"a.csv:2": b"one", "a.csv:4": b"x" * 200_000} and counts["skipped"] == {"empty": 1}
    found, _, _ = packed(tmp_path / "a.csv", tmp_path / "n", field="n", max_bad_samples=1)
    assert [*found.values()] == [b"1", b"3", b"4"]
    message = refused(pack, str(tmp_path / "a.csv"), tmp_path / "no", name="x", field="body")
    assert "has no column 'body', but 'text', 'n'" in message and "--field NAME" in message
    content = b'time,value\n1,"2\n'
    found, counts, _ = packed(write(tmp_path / "b.csv", content), tmp_path / "whole")
    assert found == {"b.csv": content} and counts["whole"] == {"csv without the column 'text'": 1}
    write(tmp_path / "c.csv", 'text\nok\n"open\n')
    assert "c.csv:3': is not CSV: unexpected end of data" in refused(
        pack, str(tmp_path / "c.csv"), tmp_path / "c", name="x"
    )
    write(tmp_path / "d.csv", b"text\ncaf\xe9\n")
    assert packed(tmp_path / "d.csv", tmp_path / "d")[0] == {"d.csv:2": b"caf\xe9"}


def test_parquet(tmp_path: Path) -> None:
    texts = [f"row {number} \N{SNOWMAN}" for number in range(1000)]
    table = pa.table({
        "text": pa.array(texts, pa.large_string()),
        "meta": [{"content": text[::-1], "n": 1} for text in texts],
        "a.b": pa.array(texts).dictionary_encode(),
        "n": range(1000),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    for field in ("text", "meta.content", "a.b"):
        found, counts, index = packed(tmp_path / "a.parquet", tmp_path / field, field=field)
        order = -1 if field == "meta.content" else 1
        assert found == {f"a.parquet:{number}": text[::order].encode() for number, text in enumerate(texts)}
        assert counts == {"read": {"parquet": 1}} and index.source["field"] == field
    index = pack(str(tmp_path / "a.parquet"), tmp_path / "split", name="x", valid_fraction=0.1)
    assert 50 < index.splits["valid"].num_documents < 150
    message = refused(pack, str(tmp_path / "a.parquet"), tmp_path / "no", name="x", field="body")
    assert "has no column 'body', but 'text', 'meta', 'a.b', 'n'" in message
    message = refused(pack, str(tmp_path / "a.parquet"), tmp_path / "no", name="x", field="n")
    assert "a.parquet:0': must have a text in its field 'n', not 0" in message
    parquet.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "b.parquet")
    found, counts, _ = packed(tmp_path / "b.parquet", tmp_path / "b", max_bad_samples=1)
    assert [*found] == ["b.parquet:0", "b.parquet:2"] and counts["bad"] == {"without a text in the field 'text'": 1}
    for name, content in (("cut", (tmp_path / "a.parquet").read_bytes()[:-9]), ("other", b"text")):
        path = write(tmp_path / f"{name}.parquet", content)
        assert f"{name}.parquet': cannot be read as Parquet: " in refused(pack, str(path), tmp_path / "c", name="x")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refused(pack, str(tmp_path / "a.parquet"), tmp_path / "out", name="x")
    assert message.endswith("a.parquet': is Parquet, which pyarrow reads; pip install 'longreach[parquet]'")


def test_nested_fields(tmp_path: Path) -> None:
    """A key with the dot itself comes first, and the longer of several ways is taken where the shorter ends."""
    rows: list[dict[str, Any]] = [
        {"a": {"b": {"c": "inner"}}},
        {"a.b": {"c": "half"}},
        {"a.b.c": "literal", "a": {"b": {"c": "inner"}}},
        {"a": {"b.c": "second half", "b": 1}},
        {"a": "text", "a.b": {"c": "half"}},
    ]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    found, _, _ = packed(tmp_path / "a.jsonl", tmp_path / "out", field="a.b.c")
    assert [*found.values()] == [b"inner", b"half", b"literal", b"second half", b"half"]
    message = refused(pack, str(tmp_path / "a.jsonl"), tmp_path / "no", name="x", field="a.x")
    assert "has no field 'a.x', but 'a'" in message


def test_names_of_records_are_those_of_no_file(tmp_path: Path) -> None:
    names = ["a.jsonl", "a.jsonl:1", "a.jsonl::2", "a.jsonl:3.jsonl", "b.csv", "b.csv:9:"]
    contents = {"a.jsonl": '{"text": "x"}\n{"text": "y"}', "a.jsonl:3.jsonl": '{"text": "z"}', "b.csv": "text\nw\n"}
    for name in names:
        write(tmp_path / "source" / name, contents.get(name, name))
    found, _, index = packed(tmp_path / "source", tmp_path / "out")
    assert len(found) == 7 and Index.load(index.directory).splits["train"].num_documents == 7
    assert found["a.jsonl:::1"] == b"x" and found["a.jsonl:::2"] == b"y" and found["a.jsonl:1"] == b"a.jsonl:1"
    write(tmp_path / "g.fa", ">\nAC\n>3\nGT\n>\nTT\n>4\nAA\n>record\nCC\n")
    assert [d.key for d in documents(list_files(str(tmp_path / "g.fa")))] == [
        "g.fa/record 1", "g.fa/3", "g.fa/record 3", "g.fa/4", "g.fa/record"
    ]  # fmt: skip


# Chats


MESSAGES = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "two & <two>?"},
    {"role": "assistant", "content": "four"},
]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message.role == 'nobody' %}{{ raise_exception('no role') }}{% endif %}
    {%- generation %}<|{{ message['role'] }}|>{% endgeneration %}
    {%- if loop.first %}{{ message | tojson }}{% continue %}{% endif %}
    {{- message['content'] | trim }}
{% endfor %}"""


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer, its special tokens and its chat template, as transformers saves them."""
    place = tmp_path_factory.mktemp("tokenizer")
    write(place / "text.txt", "two and two are four. " * 50)
    make_tokenizer(str(place / "text.txt"), place / "tokenizer.json", 270)
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "<|user|>", "<|assistant|>")])
    tokenizer.save(str(place / "tokenizer.json"))
    fields: dict[str, Any] = {"chat_template": TEMPLATE, "bos_token": {"__type": "AddedToken", "content": "<s>"}}
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    write(place / "tokenizer_config.json", json.dumps(fields))
    return place


def test_chats_are_rendered_as_transformers_does(tmp_path: Path, chat_tokenizer: Path) -> None:
    """The same text and ids, from JSON and from Parquet; the template is kept with the tokenizer."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(chat_tokenizer)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False)
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert text.startswith("<s><|system|>{") and "<|user|>two & <two>?" in text
    template = ChatTemplate.beside(chat_tokenizer / "tokenizer.json")
    assert template is not None and template.render(MESSAGES, "here") == text
    write(tmp_path / "a.jsonl", json.dumps({"id": 3, "chat": {"messages": MESSAGES}}))
    parquet.write_table(pa.table({"chat": [{"messages": MESSAGES}]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        options: dict[str, Any] = {"field": "chat.messages", "tokenizer": str(chat_tokenizer / "tokenizer.json")}
        index = pack(str(tmp_path / name), tmp_path / f"{name}-out", name="x", valid_fraction=0, **options)
        assert (
            TokenStream(index, "train").read(0, len(ids)).tolist() == ids
            and len(ids) == index.splits["train"].num_tokens
        )
        plain = re.sub(r"<s>|<\|user\|>|<\|assistant\|>", "", text)
        assert index.splits["train"].num_bytes == len(plain.encode())
    vocabulary = Index.load(tmp_path / "a.jsonl-out").open_vocabulary()
    save_vocabulary(vocabulary, tmp_path)
    kept = load_vocabulary(tmp_path)
    assert isinstance(kept, SubwordVocabulary) and kept.encode_chat(MESSAGES, "here").tolist() == ids
    assert kept.encode_text(b"<s>").tolist() != [theirs.bos_token_id]  # of a text, it is text
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace("trim", "upper"))
    assert "does not have the SHA-256" in refused(load_vocabulary, tmp_path)


def test_chats_that_cannot_be_rendered(tmp_path: Path, chat_tokenizer: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": MESSAGES}))
    out, options = tmp_path / "out", {"name": "x", "valid_fraction": 0.0}
    message = refused(pack, str(path), out, **options)
    assert "has chat messages in its field 'text', and no chat template; give --tokenizer FILE" in message
    write(tmp_path / "plain/tokenizer.json", (chat_tokenizer / "tokenizer.json").read_bytes())
    message = refused(pack, str(path), out, tokenizer=str(tmp_path / "plain/tokenizer.json"), **options)
    assert "a.jsonl:1': has chat messages, and the tokenizer has no chat template" in message
    tokenizer = str(chat_tokenizer / "tokenizer.json")
    bad = [{"role": "nobody", "content": ""}]
    write(path, json.dumps({"text": bad}) + "\n" + json.dumps({"text": MESSAGES}))
    message = refused(pack, str(path), out, tokenizer=tokenizer, **options)
    assert "a.jsonl:1': does not fit the chat template: no role (1 bad sample, 0 allowed)" in message
    assert pack(str(path), out, tokenizer=tokenizer, max_bad_samples=1, **options).source["counts"]["bad"] == {
        "not a chat": 1
    }
    fields = json.loads((chat_tokenizer / "tokenizer_config.json").read_text())
    changed = write(tmp_path / "changed/tokenizer.json", (chat_tokenizer / "tokenizer.json").read_bytes())
    write(tmp_path / "changed/chat_template.jinja", fields["chat_template"] + "!")  # it goes before the other file's
    assert "chat_template differ" in refused(pack, str(path), out, tokenizer=str(changed), max_bad_samples=1, **options)
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    assert "does not fit the chat template: access to attribute" in refused(template.render, MESSAGES, "here")
    assert "is not a Jinja template" in refused(ChatTemplate("{% if %}", {}).render, MESSAGES, "here")
    write(tmp_path / "plain/tokenizer_config.json", "{")
    message = refused(pack, str(path), out, tokenizer=str(tmp_path / "plain/tokenizer.json"), **options)
    assert "tokenizer_config.json': is damaged" in message


def test_a_fifo_for_a_tokenizer_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.json")
    path = write(tmp_path / "a.txt", "text")
    message = refused(pack, str(path), tmp_path / "out", name="x", tokenizer=str(tmp_path / "t.json"))
    assert "must be a regular file" in message


# Evaluation


def test_what_is_evaluated_is_what_pack_reads(tmp_path: Path) -> None:
    """Pictures are not scored, UTF-16 is converted; all is counted once, however often it is read."""
    write(tmp_path / "README.md", "some text")
    write(tmp_path / "docs/a.md", TEXT.encode("utf-16"))
    write(tmp_path / "docs/b.png", PNG)
    write(tmp_path / "docs/c.jsonl", '{"text": "line"}\n{"text": ""}\n{"text": "x"}\n{}')
    sources, tally = [str(tmp_path / "README.md"), str(tmp_path / "docs")], Tally()
    _, _, rows = _from_sources(sources, ByteVocabulary(), DataConfig(max_bad_samples=1), tally)
    for _ in range(2):
        found = {row.name.split(": ")[1]: bytes([*row.tokens[0].tolist(), int(row.labels[0, -1])]) for row in rows()}
        assert found == {"README.md": b"some text", "a.md": TEXT.encode(), "c.jsonl:1": b"line"}
        assert tally.as_json() == {
            "read": {"jsonl": 1, "text": 2},
            "converted": {"UTF-16": 1},
            "skipped": {"binary (PNG)": 1, "empty": 1, "shorter than two tokens": 1},
            "bad": {"without the field 'text'": 1},
        }
    with pytest.raises(InputError, match="--binary=bytes"):
        _from_sources([str(tmp_path / "docs/b.png")], ByteVocabulary(), DataConfig(), Tally())
    (_, _, rows) = _from_sources([sources[1]], ByteVocabulary(), DataConfig(binary="bytes", max_bad_samples=1), Tally())
    assert [row.name for row in rows()] == ["a.md", "b.png", "c.jsonl:1"]


def test_ids_are_scored_by_their_bytes(tmp_path: Path, chat_tokenizer: Path) -> None:
    vocabulary = SubwordVocabulary.read(chat_tokenizer / "tokenizer.json")
    np.save(tmp_path / "a.npy", vocabulary.encode_text(b"two and four"))
    (row,) = _from_sources([str(tmp_path / "a.npy")], vocabulary, DataConfig(), Tally())[2]()
    num_tokens = row.tokens.shape[1] + 1
    assert row.num_bytes == pytest.approx(len("two and four") * (num_tokens - 1) / num_tokens)
    with pytest.raises(InputError, match="holds token ids, and the model reads bytes"):
        list(_from_sources([str(tmp_path / "a.npy")], ByteVocabulary(), DataConfig(), Tally())[2]())


# What a killed process leaves


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """By the next one that packs to the same place, and only if no process is writing it."""
    write(tmp_path / "source/a.txt", "text " * 1000)
    code = (
        "import sys, time; from longreach.framework.data import pack\n"
        "def wait(what, done, total):\n    print(flush=True); time.sleep(60)\n"
        "pack(sys.argv[1], sys.argv[2], name='x', callback=wait)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            (partial,) = tmp_path.glob(".out.partial-*")
            write(tmp_path / ".out.partial-other/index.json", "somebody's")
            (tmp_path / ".out.partial-empty").mkdir()
            pack(str(tmp_path / "source"), tmp_path / "out", name="x")
            assert partial.is_dir() and not (tmp_path / ".out.partial-empty").exists()
            shutil.rmtree(tmp_path / "out")
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert partial.is_dir()
    index = pack(str(tmp_path / "source"), tmp_path / "out", name="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-other", "out", "source"]
    assert "lock" not in os.listdir(index.directory)
