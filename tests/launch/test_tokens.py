"""Runs on tokens, from the source to the text that is written: the program itself, and one line for each mistake."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from programs import finish, longreach, start

from longreach.errors import InputError
from longreach.framework.data import Index, load_vocabulary
from longreach.framework.inference.evaluate import evaluate
from longreach.framework.inference.export import export
from longreach.launch.cli import main

CONFIG = """
model: {width: 16, depth: 2, mixers: [elementwise, chela], chela: {heads: 2, modes: 2}}
data: {source: packed, seq_len: 65, batch_size: 2}
optim: {lr: 1.0e-2}
train: {steps: 2, threads: 1}
monitor: {tensorboard: false, plot: false, sample_len: 12}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tokens of a JSONL file and one on ids, both without the corpora that they were trained on."""
    place, draw = tmp_path_factory.mktemp("tokens"), random.Random(0)
    words = ["span", "carry", "halo", "scan", "relay", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]
    texts = [" ".join(draw.choice(words) for _ in range(120)) for _ in range(20)]
    (place / "book.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    np.save(place / "ids.npy", np.random.default_rng(0).integers(0, 40, (20, 100)))
    (place / "tiny.yaml").write_text(CONFIG)
    (place / "latin.txt").write_bytes(b"caf\xe9")
    return place


@pytest.fixture(scope="module")
def said(place: Path) -> str:
    """What a training on tokens said in the end."""
    assert longreach("pack", "ids.npy", "ids", cwd=place).returncode == 0
    made = longreach("tokenizer", "book.jsonl", "t.json", "--field", "body", "--vocab", "290", cwd=place)
    assert made.returncode == 0 and re.fullmatch(r"read: 1 jsonl\n2\d\d tokens: t\.json\n", made.stdout), made
    packed = longreach("pack", "book.jsonl", "packed", "--field", "body", "--tokenizer", "t.json", cwd=place)
    assert packed.returncode == 0 and packed.stderr == ""
    assert re.search(r"^valid: \d+ documents, [\d,]+ tokens of [\d,]+ bytes, 1 shards$", packed.stdout, re.MULTILINE)
    done = longreach("train", "tiny.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    ids = longreach("train", "tiny.yaml", "data.source=ids", "run.dir=runs/ids", cwd=place)
    assert ids.returncode == 0 and "held-out bits per token, ids" in ids.stdout, ids.stderr
    return done.stdout


def test_a_run_on_tokens_is_told_in_bits_per_byte(place: Path, said: str) -> None:
    index = Index.load(place / "packed")
    loss = json.loads((place / "runs/tiny/validation.jsonl").read_text())["loss"]
    valid = index.splits["valid"]
    bits = re.search(r"^  this model +([\d.]+)$", said, re.MULTILINE)
    assert bits and "held-out bits per byte" in said and "gzip -9" in said
    assert float(bits[1]) == pytest.approx(loss / math.log(2) * valid.num_tokens / valid.num_bytes, abs=1e-3)


@pytest.mark.usefixtures("said")
def test_what_a_run_needs_to_read_and_write_is_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The corpora are gone."""
    shutil.copytree(place / "runs", place / "alone/runs")
    words = ["--tokens", "9", "--temperature", "0"]
    run = str(place / "alone/runs/tiny")
    assert main(["generate", run, "--prompt", "span caf\xe9", *words]) == 0
    assert capsys.readouterr().out.startswith("span caf\xe9")
    (place / "text.txt").write_text("carry halo caf\xe9", encoding="utf-8")
    assert main(["evaluate", run, "--source", str(place / "text.txt")]) == 0
    num_tokens = len(load_vocabulary(run).encode_text("carry halo caf\xe9".encode()))
    told = capsys.readouterr().out
    assert num_tokens < 12 and told.startswith(f"{num_tokens - 1} tokens: ") and told.endswith("\nread: 1 text\n")
    ids = str(place / "alone/runs/ids")
    assert main(["generate", ids, "--prompt", "3 39", *words]) == 0
    assert re.fullmatch(r"3 39( \d+){9}\n", capsys.readouterr().out)
    export(run, place / "exported")
    export(run, place / "exported")  # over the first one
    assert (place / "exported/tokenizer.json").read_bytes() == (place / "t.json").read_bytes()
    export(ids, place / "exported-ids")
    assert main(["generate", str(place / "exported-ids"), "--prompt", "3 39", *words]) == 0
    assert re.fullmatch(r"3 39( \d+){9}\n", capsys.readouterr().out.splitlines(keepends=True)[-1])


@pytest.mark.usefixtures("said")
def test_evaluate_reads_the_documents_that_pack_finds(place: Path) -> None:
    lines = [json.loads(line)["body"] for line in (place / "book.jsonl").read_text().splitlines()]
    found = evaluate(place / "runs/tiny", [str(place / "book.jsonl")], overrides=["data.field=body"])
    assert [name for name, _ in found.score.documents] == [f"book.jsonl:{number}" for number in range(1, 21)]
    pieces = load_vocabulary(place / "runs/tiny")
    for line, (_, figure) in zip(lines, found.score.documents, strict=True):
        assert figure.num_tokens == len(pieces.encode_text(line.encode())) - 1
    arrays = evaluate(place / "runs/ids", [str(place / "ids.npy")])
    assert [figure.num_tokens for _, figure in arrays.score.documents] == [99] * 20 and arrays.unit == "token"


@pytest.mark.usefixtures("said")
def test_a_corpus_of_another_vocabulary_is_not_scored(place: Path) -> None:
    words = ["tokenizer", "book.jsonl", "other.json", "--field", "body", "--vocab", "280"]
    assert longreach(*words, cwd=place).returncode == 0
    words = ["pack", "book.jsonl", "other", "--field", "body", "--tokenizer", "other.json"]
    assert longreach(*words, cwd=place).returncode == 0
    for name in ("other", "ids"):
        with pytest.raises(InputError, match="must be packed with the vocabulary of"):
            evaluate(place / "runs/tiny", overrides=[f"data.source={place / name}"])


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", "runs/ids", "--prompt", "some words"], "must be token ids below 40"),
        (["generate", "runs/ids", "--prompt", "40"], "must be token ids below 40"),
        (["generate", "runs/tiny", "--prompt", "@ids.npy"], "is not UTF-8 from byte 0 on"),
        (["evaluate", "runs/tiny", "--source", "latin.txt"], "document = 'latin.txt': is not UTF-8 from byte 3 on"),
        (["pack", "book.jsonl", "out"], "has no field 'text', but 'body' (1 bad sample, 0 allowed); name its field"),
        (["pack", "book.jsonl", "out", "--tokenizer", "tiny.yaml"], "is no file of the tokenizers library"),
        (["pack", "book.jsonl", "packed", "--field", "body"], "was packed from something else (tokenizer differ)"),
        (["pack", "ids.npy", "out", "--vocab", "39"], "data.vocab = 39: must be at least 40"),
        (["tokenizer", "ids.npy", "new.json"], "hold token ids already"),
        (["tokenizer", "book.jsonl", "t.json", "--field", "body"], "FILE = 't.json': must be a new file"),
        (["tokenizer", "book.jsonl", "new.json", "--max-bad", "-1"], "--max-bad = -1"),
        (["train", "tiny.yaml", "run.dir=new", "model.vocab=256"], "model.vocab = 256: must be at least 2"),
        (["train", "tiny.yaml", "run.dir=new", "data.vocab=-1"], "data.vocab = -1"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    place: Path,
    words: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("longreach: ") and expected in err
    assert sorted(place.rglob("*")) == before


def test_ctrl_c_while_a_tokenizer_is_trained(tmp_path: Path) -> None:
    """The library, which does not look for signals, is left behind, and so is no half a corpus."""
    letters = np.frombuffer(b"abcdefghijklmnop  ", np.uint8)
    (tmp_path / "text.txt").write_bytes(np.random.default_rng(0).choice(letters, 12_000_000).tobytes())  # many seconds
    # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from longreach.launch.cli import program; program()"
    process = start("-c", program, "pack", "text.txt", "packed", "--vocab", "30000", cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob(".packed.partial-*")):
        time.sleep(0.02)
    time.sleep(0.5)  # so that its text has been read
    process.send_signal(signal.SIGINT)
    done = finish(process, 60)
    assert done.returncode == 130 and done.stderr.endswith("longreach: interrupted\n"), done
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
