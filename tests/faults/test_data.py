"""Faults of data, numbered as in the list of faults (36 is in test_runtime.py): what is refused, and in which words."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from fault_helpers import FAILED, MISTAKE, JobDirectory, error_line, ranks_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import finish, longreach, python
from webdataset import TarWriter

from longreach.errors import InputError
from longreach.framework.data import Index, TokenStream, pack
from longreach.framework.data.corpus import list_files
from longreach.framework.data.records import documents

HOSTILE = Path(__file__).parent.parent / "data/hostile"
MADE = ("checkpoints", "indices", "tars")  # by its script; the others were written by hand
SHARD, BLOCK, DAMAGES = "train-00000.tar", 512, 200
FUZZ = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def copy_of(job_dir: JobDirectory, name: str) -> Path:
    """A copy of the packed corpus that may be damaged."""
    return Path(shutil.copytree(job_dir.directory / "packed", job_dir.directory / name))


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def tokens_of(directory: Path) -> dict[str, bytes]:
    """The documents of a packed corpus."""
    found, index = {}, Index.load(directory)
    for name, split in index.splits.items():
        stream = TokenStream(index, name)
        for key, start, stop in zip(split.keys, stream.starts, stream.starts[1:]):
            found[key] = stream.read(int(start), int(stop)).tobytes()
    return found


# Shards of ours


def test_23_a_missing_shard(job_dir: JobDirectory) -> None:
    (copy_of(job_dir, "missing") / SHARD).unlink()
    done = job_dir.train("missing-run", "data.source=missing")
    assert done.returncode == MISTAKE
    error_line(done, f"shard = 'missing/{SHARD}'", "is missing", "pack the corpus again")
    assert not (job_dir.directory / "missing-run").exists()


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A shard that is cut, has flipped bits, zeros or swapped ranges in it, or bytes appended."""
    bad, kind = bytearray(content), draw.choice(["cut", "flip", "zero", "swap", "append"])
    first, second = sorted(draw.sample(range(len(bad)), 2))
    length = draw.randint(1, 600)
    if kind == "cut":
        del bad[first:]
    elif kind == "flip":
        bad[first] ^= 1 << draw.randrange(8)
    elif kind == "zero":
        bad[first : first + length] = bytes(len(bad[first : first + length]))
    elif kind == "swap":
        length = min(length, second - first, len(bad) - second)
        part = bad[first : first + length]
        bad[first : first + length] = bad[second : second + length]
        bad[second : second + length] = part
    else:
        bad += draw.randbytes(length)
    return bytes(bad)


def test_24_any_damage_of_a_shard_is_found(job_dir: JobDirectory) -> None:
    """Cuts, flips, zeros, swaps and additions: every one of them, and the shard is named."""
    directory, draw, done = copy_of(job_dir, "damaged-corpus"), random.Random(24), 0
    shards = sorted(directory.glob("*.tar"))
    while done < DAMAGES:
        shard = draw.choice(shards)
        good = shard.read_bytes()
        bad = damaged(good, draw)
        if bad == good:  # zeros where zeros were
            continue
        shard.write_bytes(bad)
        with pytest.raises(InputError, match=rf"^shard = .*{shard.name}"):
            Index.load(directory)
        shard.write_bytes(good)
        done += 1
    Index.load(directory)


@pytest.mark.parametrize(("kind", "ranks"), [("cut", 2), ("flipped", 1)])
def test_24_a_damaged_shard_ends_a_run_before_its_first_step(job_dir: JobDirectory, kind: str, ranks: int) -> None:
    shard = copy_of(job_dir, kind) / SHARD
    content = bytearray(shard.read_bytes())
    content[5000] ^= 4
    shard.write_bytes(content[:-1] if kind == "cut" else content)
    done = job_dir.train(f"{kind}-run", f"data.source={kind}", f"parallel.ranks={ranks}")
    assert done.returncode == MISTAKE
    error_line(done, f"shard = '{kind}/{SHARD}'", "its index", "pack the corpus again")
    assert not (job_dir.directory / f"{kind}-run").exists()


def test_24_a_shard_that_is_cut_under_a_run(job_dir: JobDirectory) -> None:
    shard = copy_of(job_dir, "shortened") / SHARD
    with job_dir.training("shortened-run", "data.source=shortened") as process:
        os.truncate(shard, 700)
        done = finish(process, 60)
    assert done.returncode == MISTAKE
    error_line(done, f"shard = 'shortened/{SHARD}'", "ends at byte 700")


def test_25_a_shard_that_was_emptied(job_dir: JobDirectory) -> None:
    (copy_of(job_dir, "emptied") / SHARD).write_bytes(b"")
    done = job_dir.train("emptied-run", "data.source=emptied")
    assert done.returncode == MISTAKE
    error_line(done, f"shard = 'emptied/{SHARD}'", "has 0 bytes; its index says")


# Shards of others


def test_24_a_foreign_shard_that_is_cut_or_has_a_damaged_header(tmp_path: Path) -> None:
    """Told, or harmless: then the documents are the same. What is changed in the content of a tar file cannot be
    known, since its checksums are of headers alone, nor what is cut together with a new end put in its job_dir.
    """
    draw, told_of = random.Random(0), 0
    members = {f"{number:03}.txt": bytes(draw.choices(range(32, 256), k=draw.randint(1, 1500))) for number in range(30)}
    shard = tmp_path / "shard.tar"
    with TarWriter(str(shard)) as writer:
        for name, content in members.items():
            writer.write({"__key__": name[:3], "txt": content})
    good = shard.read_bytes()
    with tarfile.open(shard) as tar:
        headers = [about.offset for about in tar]
    headers += [at + 2 * BLOCK for at in headers]  # before each stand pax records with a header of their own
    for number in range(DAMAGES):
        bad, at = bytearray(good), draw.choice(headers)
        kind = draw.choice(["cut", "flip", "zero", "byte", "copy"])
        if kind == "cut":
            del bad[draw.randrange(len(bad)) :]
        elif kind == "flip":
            bad[at + draw.randrange(BLOCK)] ^= 1 << draw.randrange(8)
        elif kind == "zero":
            bad[at : at + BLOCK] = bytes(BLOCK)
        elif kind == "byte":
            bad[at + draw.randrange(BLOCK)] = draw.randrange(256)
        else:
            other = draw.choice(headers)
            bad[at : at + BLOCK] = good[other : other + BLOCK]
        shard.write_bytes(bad)
        try:
            pack(str(shard), tmp_path / f"packed-{number}", name="x", valid_fraction=0.1)
            assert tokens_of(tmp_path / f"packed-{number}") == {f"shard.tar/{k}": v for k, v in members.items()}, kind
        except InputError as error:
            assert "shard.tar" in str(error)
            assert not (tmp_path / f"packed-{number}").exists()
            told_of += 1
    assert told_of > DAMAGES // 2


def test_26_a_sample_that_cannot_be_decoded(job_dir: JobDirectory) -> None:
    """The first one ends it, with shard and key; or so many are told, counted and left out."""
    (job_dir.directory / "shards").mkdir()
    good = {f"{number}.txt": b"a text %d" % number for number in range(8)}
    whole = gzip.compress(b"a text that was compressed")
    tar_of(job_dir.directory / "shards/a.tar", {**good, "9.txt.gz": whole})
    tar_of(job_dir.directory / "shards/b.tar", {"10.txt": b"another", "cut.txt.gz": whole[:-9], "none.txt.gz": b"text"})
    done = job_dir.pack("shards", "from-shards")
    assert done.returncode == MISTAKE
    line = error_line(
        done, "member of shards/b.tar = ", "cannot be inflated: ", "(1 bad sample, 0 allowed)", "--max-bad N"
    )
    assert "'cut.txt.gz'" in line or "'none.txt.gz'" in line
    assert "(2 bad samples, 1 allowed)" in job_dir.pack("shards", "from-shards", "--max-bad", "1").stderr
    assert not (job_dir.directory / "from-shards").exists()
    done = job_dir.pack("shards", "from-shards", "--max-bad", "2")
    assert done.returncode == 0 and "left out as bad samples: 2 damaged\n" in done.stdout
    for name in ("cut", "none"):
        assert f"left out: member of shards/b.tar = '{name}.txt.gz': cannot be inflated" in done.stderr
    expected = {f"a.tar/{name}": content for name, content in good.items()}
    expected |= {"a.tar/9.txt.gz": b"a text that was compressed", "b.tar/10.txt": b"another"}
    assert tokens_of(job_dir.directory / "from-shards") == expected
    words = ["data.source=shards", "data.cache=from-run", "data.max_bad_samples=2", "train.steps=1"]
    done = job_dir.train("shards-run", *words)
    assert done.returncode == 0 and done.stderr.count("left out: ") == 2, done.stderr
    assert tokens_of(job_dir.directory / "from-run") == expected


# The hostile files, each in a process of the program: forked, since its imports take seconds.

EACH = """
import json, os, sys, longreach.framework.trainer
from longreach.launch.cli import main
for directory, words in json.load(open(sys.argv[1])):
    if not os.fork():
        os.chdir(directory)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"../../{name}", os.O_WRONLY | os.O_CREAT), number)
        code = main(words)
        sys.stderr.flush()
        os._exit(code)  # an orderly end of a forked process takes a second
    with open(f"{directory}/../../code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


def tree(directory: Path) -> dict[str, bytes]:
    """All files below a directory, with their contents."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def hostile(job_dir: JobDirectory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompletedProcess[str]]:
    """What the program says of each hostile file; it wrote nothing, and executed nothing."""
    root, jobs = tmp_path_factory.mktemp("hostile"), []
    (root / "secret.tar").write_bytes(b"secret")
    files = sorted([*(HOSTILE / "tars").iterdir(), *(HOSTILE / "indices").iterdir()])
    for file in files:
        directory = root / file.name / "a/b"
        directory.mkdir(parents=True)
        shutil.copy(job_dir.directory / "endless.yaml", directory)
        tar = file.suffix == ".tar"
        words = ["pack", "x", "packed"] if tar else ["train", "endless.yaml", "data.source=x", "train.steps=1"]
        (shutil.copy if tar else shutil.copytree)(file, directory / (name := "x.tar" if tar else "x"))
        jobs.append((str(directory), [word if word != "x" else name for word in words]))
    (root / "jobs.json").write_text(json.dumps(jobs))
    before = tree(root)
    done = python("-c", EACH, str(root / "jobs.json"), cwd=root)
    assert done.returncode == 0, done.stderr
    after = tree(root)
    said = {f"{file.name}/{name}" for file in files for name in ("out", "err", "code")}
    runs = {"small-vocabulary/a/b/runs/endless"}  # found at the first step, when there is a run already
    written = {name for name in after.keys() - before.keys() if not any(name.startswith(run) for run in runs)}
    assert written == said and all(after[name] == content for name, content in before.items())
    assert not Path("/tmp/longreach-evil.txt").exists()
    answers = {}
    for file in files:
        out, err, code = (after[f"{file.name}/{name}"].decode() for name in ("out", "err", "code"))
        answers[file.stem] = CompletedProcess(file.name, int(code), out, err)
    return answers


def refused(hostile: dict[str, CompletedProcess[str]], name: str, *words: str) -> None:
    done = hostile.pop(name)
    assert done.returncode == MISTAKE
    lines = done.stderr.splitlines()
    assert lines[-1] == error_line(done, *words) and done.stdout == "", lines
    assert len([line for line in lines if line.startswith("longreach: ")]) == 1
    assert lines[-1].isprintable() and len(lines[-1]) < 500


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut-end", "ends at byte 1024 without the two empty blocks of a tar's end; it was cut"),
        ("cut-member", "ends at byte 1000, inside of its member 'a.txt', which needs 1560 more"),
        ("checksum", "the block at byte 0 is not a tar header: its checksum is wrong"),
        ("long-name", "must be a name of at most 4096 characters"),
        ("many-digits", "ends at byte 1536, inside of its member 'a.txt'"),
        ("negative-size", "the block at byte 0 has a field that is not a number"),
        ("pax-length", "has invalid pax records"),
        ("pax-size", "inside of its member 'a.txt'"),
        ("two-in-one", "ends the archive, and more follows"),
    ],
)
def test_24_hostile_archives(hostile: dict[str, CompletedProcess[str]], name: str, words: str) -> None:
    refused(hostile, name, "x.tar", words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deep", "is not JSON"),
        ("digits", "does not have the expected fields"),
        ("dtype", "dtype must be one of"),
        ("infinite", "does not have the expected fields"),
        ("inside", "holds other members than its index says"),
        ("large-vocabulary", "has a vocabulary that does not fit uint8"),
        ("many-samples", "does not give each shard the number of documents it says"),
        ("measured", "does not have the expected fields"),
        ("outside", "places a document outside its shard"),
        ("screen", "has a name that cannot be shown"),
    ],
)
def test_24_hostile_indices(hostile: dict[str, CompletedProcess[str]], name: str, words: str) -> None:
    refused(hostile, name, "'x/", words)


@pytest.mark.parametrize(
    ("name", "words"), [("empty", "is empty: 0 bytes"), ("no-member", "no document"), ("no-content", "no document")]
)
def test_25_an_empty_archive(hostile: dict[str, CompletedProcess[str]], name: str, words: str) -> None:
    refused(hostile, name, "shard = 'x.tar'", words)


def test_26_a_hostile_sample(hostile: dict[str, CompletedProcess[str]]) -> None:
    refused(hostile, "bad-gzip", "member of x.tar = 'b.txt.gz': cannot be inflated")


def test_27_a_member_that_is_there_twice(hostile: dict[str, CompletedProcess[str]]) -> None:
    refused(hostile, "duplicate", "member of x.tar = 'a.txt': is there twice")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absolute", "= '/tmp/longreach-evil.txt': leads out of the archive"),
        ("backslash", r"= '..\\evil.txt': leads out of the archive"),
        ("device", "= 'b.txt': is a device"),
        ("drive", "= 'C:evil.txt': leads out of the archive"),
        ("fifo", "= 'b.txt': is a FIFO"),
        ("hardlink", "= 'b.txt': is a hard link"),
        ("names-for-all", "gives one name or size to all members"),
        ("newline", r"= 'a\nlongreach: all is well.txt': must be a name"),
        ("nul", r"= 'a.txt\x00../../evil.txt': "),
        ("sparse", "= 'b.txt': is of the type 'S'"),
        ("symlink", "= 'a': is a symbolic link"),
        ("traversal", "= 'b/../../../evil.txt': leads out of the archive"),
    ],
)
def test_28_names_and_kinds_of_members(hostile: dict[str, CompletedProcess[str]], name: str, words: str) -> None:
    refused(hostile, name, "x.tar", words)


@pytest.mark.parametrize(
    ("name", "words"),
    [("traversal", "names the shard '../../secret.tar'"), ("linked", "= '00000001.bin': is a symbolic link")],
)
def test_28_indices_that_lead_elsewhere(job_dir: JobDirectory, name: str, words: str) -> None:
    done = job_dir.train("elsewhere", f"data.source={HOSTILE / 'indices' / name}", "train.steps=1")
    assert done.returncode == MISTAKE
    error_line(done, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pickle", "= 'b.pkl': .pkl can be code in disguise"),
        ("pyd", "= 'b.pyd': .pyd can be code in disguise"),
        ("object-array", "= 'b.npy': .npy can be code in disguise"),
        ("unknown", "= 'b.so': .so is not read from tar files; unpack the archive into a folder"),
    ],
)
def test_29_what_could_run_is_never_loaded(hostile: dict[str, CompletedProcess[str]], name: str, words: str) -> None:
    refused(hostile, name, "member of x.tar", words)


@pytest.mark.parametrize("source", ["pipe:touch executed", "https://example.org/x.tar"])
def test_30_commands_and_addresses(job_dir: JobDirectory, source: str) -> None:
    for done in (job_dir.pack(source, "piped"), job_dir.train("piped-run", f"data.source='{source}'")):
        assert done.returncode == MISTAKE
        error_line(
            done, f"data.source = '{source}': must be a path: no command is run and nothing is fetched; fetch it"
        )
    assert not any((job_dir.directory / name).exists() for name in ("executed", "piped", "piped-run"))


def test_30_a_command_for_a_shard(hostile: dict[str, CompletedProcess[str]]) -> None:
    refused(hostile, "command", "names the shard 'pipe:touch executed.tar'")


def test_the_hostile_files_are_what_their_script_makes(tmp_path: Path) -> None:
    done = python("-c", f"import sys; sys.path.insert(0, {str(HOSTILE)!r}); import make; from pathlib import Path; "
                  f"make.make(Path({str(tmp_path)!r}))", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    committed = {name: content for name, content in tree(HOSTILE).items() if Path(name).parts[0] in MADE}
    assert tree(tmp_path) == committed


def only_input_errors(call: Callable[[], Any]) -> None:
    try:
        call()
    except InputError as error:
        assert "\n" not in str(error)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Any bytes, or a hostile archive with some bytes replaced, the checksums of all blocks put right or not."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=4 * BLOCK))
    files = sorted((HOSTILE / "tars").iterdir())
    content = bytearray(draw(st.sampled_from(files)).read_bytes() or bytes(BLOCK))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(content) - 1))
        new = draw(st.binary(min_size=1, max_size=12))
        content[at : at + len(new)] = new
    if draw(st.booleans()):
        for at in range(0, len(content) - BLOCK + 1, BLOCK):
            if any(block := content[at : at + BLOCK]):
                block[148:156] = b" " * 8
                content[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(content)


@FUZZ
@given(archives())
def test_28_archives_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    """Documents, or an error in one line."""
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    only_input_errors(lambda: [document.read() for document in documents(list_files(str(path)))])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(1 << 70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def indices(draw: st.DrawFn) -> bytes:
    """Any bytes, any JSON, or an index of which some values are any JSON, signed or not."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        return json.dumps(draw(JSON)).encode()
    fields = json.loads((HOSTILE / "indices/linked/index.json").read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        tree, last = fields, draw(st.sampled_from(sorted(fields)))
        while isinstance(tree[last], (dict, list)) and tree[last] and draw(st.integers(0, 4)):
            tree = tree[last]
            last = draw(st.sampled_from(sorted(tree) if isinstance(tree, dict) else range(len(tree))))
        tree[last] = draw(JSON)
    return json.dumps(fields).encode()


@FUZZ
@given(indices(), st.booleans())
def test_24_indices_of_any_bytes(tmp_path: Path, content: bytes, signed: bool) -> None:
    """An index, or an error in one line; signed: what is behind the fingerprint's check is reached, too."""
    directory = tmp_path / "x"
    directory.mkdir(exist_ok=True)
    shutil.copy(HOSTILE / "indices/linked" / SHARD, directory)
    (directory / "index.json").write_bytes(content)
    only_input_errors(lambda: Index.load(directory))
    if signed:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Index, "fingerprint", property(lambda index: json.loads(content).get("fingerprint")))
            only_input_errors(lambda: Index.load(directory))


# What is read


@pytest.fixture(scope="module")
def by_sample(job_dir: JobDirectory) -> dict[str, CompletedProcess[str]]:
    """The same steps and validations by one rank, and by two data ranks with two workers each."""
    words = ["train.steps=4", "train.validate_every=2", "data.batch_size=4"]
    two = ["parallel.ranks=2", "parallel.sequence=1", "data.workers=2"]
    done = {"one": job_dir.train("one", *words), "two": job_dir.train("two", *words, *two)}
    assert all(run.returncode == 0 for run in done.values()), done
    return done


@pytest.mark.usefixtures("by_sample")
def test_31_fewer_shards_than_ranks_and_workers(job_dir: JobDirectory) -> None:
    """Samples are dealt out, not shards: what is read does not change."""
    assert len(list((job_dir.directory / "packed").glob("train-*.tar"))) == 1
    one, two = ([row["loss"] for row in job_dir.rows(run)] for run in ("one", "two"))
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-5)


def test_32_uneven_ends(job_dir: JobDirectory, by_sample: dict[str, CompletedProcess[str]]) -> None:
    """The held-out windows do not divide by what ranks read at once: both end together, and each counts once."""
    num_tokens = Index.load(job_dir.directory / "packed").splits["valid"].num_tokens
    assert -(-(num_tokens - 1) // 65) % 4
    one, two = (re.findall(r"held-out (\S+) nats", done.stderr) for done in by_sample.values())
    assert len(one) == 2 and [float(x) for x in two] == pytest.approx([float(x) for x in one], abs=2e-4)


def test_33_a_token_that_the_model_does_not_know(
    job_dir: JobDirectory, hostile: dict[str, CompletedProcess[str]]
) -> None:
    """The model's vocabulary is smaller than that of the corpus, or its own is a lie."""
    done = job_dir.train("few", "model.vocab=200", "parallel.ranks=2")
    assert done.returncode == MISTAKE
    error_line(done, "model.vocab = 200: must be at least 256, the vocabulary of packed", "set model.vocab=256")
    refused(hostile, "small-vocabulary", "token in '", f" in x/{SHARD} = 200: must be less than 200")


def packed_from(job_dir: JobDirectory, name: str, *contents: bytes) -> None:
    (job_dir.directory / f"{name}-source").mkdir()
    for number, content in enumerate(contents):
        (job_dir.directory / f"{name}-source" / f"{number:03}").write_bytes(content)
    assert job_dir.pack(f"{name}-source", name, "--valid-fraction", "0").returncode == 0


def test_34_a_sample_that_is_too_long(job_dir: JobDirectory) -> None:
    """One of any length is read in windows; a member of a foreign archive has a limit, whatever its size claims."""
    packed_from(job_dir, "long", bytes(random.Random(0).choices(range(32, 127), k=650)))
    done = job_dir.train("long-run", "data.source=long", "train.steps=10")
    assert done.returncode == 0 and "650 training tokens" in done.stderr
    head = tarfile.TarInfo("long.txt")
    head.size = 300 << 20
    path = job_dir.directory / "long.tar"
    path.write_bytes(head.tobuf() + b"x" * 8192)  # the beginning is text
    os.truncate(path, 512 + head.size + 1024)  # a hole, which takes no room on the disk
    done = job_dir.pack("long.tar", "from-long", "--valid-fraction", "0")
    assert done.returncode == MISTAKE
    error_line(done, "member of long.tar = 'long.txt': is larger than 256 MiB", "(1 bad sample, 0 allowed)")


def test_34_nothing_to_predict(job_dir: JobDirectory) -> None:
    """Documents of a token each have no label: known before the first step, or else when a step has none."""
    packed_from(job_dir, "letters", *(b"%c" % letter for letter in range(65, 91)))
    done = job_dir.train("letters-run", "data.source=letters", "data.packing=documents", "parallel.ranks=2")
    assert done.returncode == MISTAKE
    error_line(done, "letters holds only documents of one token in its split train", "data.packing=stream")
    assert not (job_dir.directory / "letters-run").exists()
    packed_from(job_dir, "mixed", b"a longer document", *(b"%c" % letter for letter in range(65, 91)))
    words = ["data.seq_len=5", "data.batch_size=2", "parallel.ranks=2", "parallel.sequence=1"]
    done = job_dir.train("mixed-run", "data.source=mixed", "data.packing=documents", *words)
    assert done.returncode == MISTAKE
    error_line(done, "the sequences of a step = [", "must hold a token that has a next one", "data.packing=stream")
    assert all(0 < row["loss"] < 20 for row in job_dir.rows("mixed-run"))
    assert job_dir.train("mixed-run", "data.source=letters", "train.steps=5").returncode == 0


def children(number: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_35_a_data_worker_is_killed(job_dir: JobDirectory, ranks: int) -> None:
    words = ["data.workers=1", f"parallel.ranks={ranks}"]
    with job_dir.training(f"killed-{ranks}", *words) as process:
        (worker,) = children(ranks_of(process)[1] if ranks > 1 else process.pid)
        os.kill(worker, signal.SIGKILL)
        done = finish(process, 60)
    assert done.returncode == FAILED
    error_line(done, "a data worker failed: ", "data.workers=0 reads in a thread instead")


def test_37_a_decompression_bomb(job_dir: JobDirectory) -> None:
    """10 GiB in 10 MB: refused at once, within the memory of one document, and left out if that is asked for."""
    part = gzip.compress(b"a" * (64 << 20), 9)
    tar_of(job_dir.directory / "bomb.tar", {"a.txt": b"harmless", "bomb.txt.gz": part * 160})
    code = (
        "import sys; from longreach.launch.cli import main; from longreach.framework.runtime.machine import Machine; "
        "code = main(sys.argv[1:]); print(Machine().resident_memory(peak=True)); sys.exit(code)"
    )
    words = ["pack", "bomb.tar", "from-bomb", "--valid-fraction", "0"]
    done = python("-c", code, *words, cwd=job_dir.directory, timeout=60)
    assert done.returncode == MISTAKE
    error_line(done, "member of bomb.tar = 'bomb.txt.gz'", "is larger than 256 MiB, or inflates to more")
    assert int(done.stdout) < 1 << 30
    done = longreach(*words, "--max-bad", "1", cwd=job_dir.directory)
    assert done.returncode == 0 and tokens_of(job_dir.directory / "from-bomb") == {"bomb.tar/a.txt": b"harmless"}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (2, 0)])
def test_38_storage_that_stalls(job_dir: JobDirectory, ranks: int, workers: int) -> None:
    """To open a FIFO that nobody writes to takes for ever, as a file on a file server that is gone."""
    name = f"stalled-{ranks}-{workers}"
    shard = copy_of(job_dir, name) / SHARD
    os.mkfifo(job_dir.directory / f"{name}-fifo")
    words = [f"data.source={name}", "data.timeout=2", f"data.workers={workers}", f"parallel.ranks={ranks}"]
    with job_dir.training(f"{name}-run", *words) as process:
        began = time.monotonic()
        os.replace(job_dir.directory / f"{name}-fifo", shard)
        done = finish(process, 60)
    assert done.returncode == MISTAKE and time.monotonic() - began >= 2
    error_line(done, f"file = '{name}/{SHARD}'", "has not answered a read for 2 s", "data.timeout")


def test_38_an_index_that_does_not_answer(job_dir: JobDirectory) -> None:
    index = copy_of(job_dir, "silent") / "index.json"
    index.unlink()
    os.mkfifo(index)
    done = job_dir.train("silent-run", "data.source=silent", "data.timeout=2", "parallel.ranks=2", timeout=60)
    assert done.returncode == MISTAKE
    error_line(done, "file = 'silent/index.json'", "has not answered a read for 2 s")
