"""The command line: real programs, what they print, and one line for each mistake."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from programs import Job, finish, longreach, python, start

from longreach.framework.inference.export import load_exported
from longreach.framework.inference.generate import Decoder
from longreach.framework.inference.loading import load_run
from longreach.launch.cli import main

PROGRESS = re.compile(
    r"[\d,]+ parameters \(|\w+ on cpu: backend \w+$|states of [\d,]+ bytes are scanned over \d+ ranks by \w+$|"
    r"step \d+/\d+  loss |step \d+: held-out |resuming "
)


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    """Undo what a command does to its process for good."""
    log, threads = logging.getLogger("longreach"), torch.get_num_threads()
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])
    torch.set_num_threads(threads)


def assert_only_progress(text: str) -> None:
    """Standard error holds plain lines of ours: nothing of torch or DeepSpeed, no bars, no escape sequences."""
    for line in text.splitlines():
        assert PROGRESS.match(line) and "\x1b" not in line, repr(line)


def assert_one_line(text: str, *words: str) -> None:
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("longreach: "), text
    for word in words:
        assert word in lines[0], f"{word!r} is missing in {lines[0]!r}"


def test_help_is_quick_and_names_every_command(tmp_path: Path) -> None:
    """Without torch, which takes seconds to import."""
    script = "import sys; from longreach.launch import cli\n"
    script += "try: cli.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("False\n")
    for command in ("train", "evaluate", "generate", "pack", "tokenizer", "export", "doctor"):
        assert re.search(rf"^  +{command}\b", done.stdout, re.MULTILINE), command


def test_train_help_shows_what_a_user_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for word in ("CONFIG", "key=value", "--deepspeed_config", "torchrun", "parallel.ranks", "docs/config.md"):
        assert word in text
    assert "local_rank" not in text


def test_pack_says_what_it_made(job: Job) -> None:
    assert job.packed.returncode == 0 and job.packed.stderr == ""
    assert re.search(r"^train: 1\d documents, [\d,]+ tokens, 1 shards$", job.packed.stdout, re.MULTILINE)
    assert re.search(r"^valid, gzip -9: \d\.\d+ bits per byte$", job.packed.stdout, re.MULTILINE)
    assert sorted(path.name for path in (job.directory / "packed").iterdir()) == [
        "index.json",
        "train-00000.tar",
        "valid-00000.tar",
    ]


def test_train_starts_its_ranks(job: Job) -> None:
    """In plain lines where standard error is no terminal, and with the result beside that of simple compressors."""
    assert job.trained.returncode == 0, job.trained.stderr
    assert_only_progress(job.trained.stderr)
    assert (
        "step 2/2  loss " in job.trained.stderr
        and "129 tokens, 2 steps or 0.0465 epochs, sequence-parallel 2, data-parallel 1" in job.trained.stderr
    )
    for word in (
        "order-0 entropy",
        "gzip -9",
        "xz -9",
        "this model",
        "runs/tiny/plots/loss.png",
        "tensorboard --logdir",
    ):
        assert word in job.trained.stdout
    assert [row["step"] for row in job.rows()] == [1, 2]


def test_one_rank_needs_no_launcher(job: Job) -> None:
    done = longreach("train", "tiny.yaml", "parallel.ranks=1", "run.dir=runs/one", cwd=job.directory)
    assert done.returncode == 0, done.stderr
    assert_only_progress(done.stderr)
    for row, wanted in zip(job.rows("one"), job.rows(), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


def test_evaluate_gives_the_held_out_loss(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the batch that training held out, in a process of its own; and of a file as one sequence."""
    done = longreach("evaluate", "runs/tiny", "--batches", "1", cwd=job.directory)
    assert done.returncode == 0 and "longreach: " not in done.stderr  # its progress shows where that takes long
    found = re.match(r"([\d,]+) tokens: ([\d.]+) nats, ([\d.]+) bits per byte", done.stdout)
    validated = json.loads((job.directory / "runs/tiny/validation.jsonl").read_text().splitlines()[-1])
    assert found and found[1] == str(2 * 129)
    assert float(found[2]) == pytest.approx(validated["loss"], abs=1e-4)
    assert float(found[3]) == pytest.approx(validated["bits_per_token"], abs=1e-4)

    file = job.directory / "source" / "00.txt"
    assert main(["evaluate", str(job.directory / "runs/tiny"), "--source", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{file.stat().st_size - 1:,} tokens: ") and err == ""
    assert "from position   bits per byte   standard error" in out
    assert re.search(r"^ +0 +\d\.\d{4} +- +\d+$", out, re.MULTILINE) and "nan" not in out, "one text has no spread"


def test_evaluate_tells_documents_and_contexts_apart(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the held-out documents, and of a folder by an export, as tables, JSON and a figure."""
    monkeypatch.chdir(job.directory)
    run_dir, exported = str(job.directory / "runs/tiny"), str(tmp_path / "exported")
    assert main(["export", run_dir, exported]) == 0
    assert main(["evaluate", run_dir, "--by-document"]) == 0
    assert re.search(r"perplexity   document\n *[\d,]+ +[\d.]+ +[\d.]+ +[\d.]+   \S+\n", capsys.readouterr().out)
    words = ["--contexts", "16,64", "--json", str(tmp_path / "a.json"), "--figure", str(tmp_path / "a.png")]
    source = job.directory / "source"
    assert main(["evaluate", exported, "--source", str(source), "--by-document", *words]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    files = {path.name: path.stat().st_size for path in source.iterdir()}
    assert {one["name"]: one["num_tokens"] + 1 for one in found["documents"]} == files
    assert all(re.search(rf" {re.escape(name)}$", out, re.MULTILINE) for name in files)
    assert [one["context"] for one in found["by_context"]] == [16, 64]
    assert {one["num_tokens"] for one in found["by_context"]} == {found["whole"]["num_tokens"]}
    assert "state reset every" in out and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    longest = max(files.values())
    words = ["--min-tokens", str(longest), "--json", str(tmp_path / "long.json")]
    assert main(["evaluate", exported, "--source", str(source), *words]) == 0
    found = json.loads((tmp_path / "long.json").read_text())
    assert {one["num_tokens"] + 1 for one in found["documents"]} == {longest}
    assert f"shorter than {longest:,} tokens" in capsys.readouterr().out
    assert main(["evaluate", run_dir, "--by-document", "--min-tokens", str(longest + 1)]) == 2
    assert_one_line(capsys.readouterr().err, "--min-tokens", "longest held-out document")
    assert main(["evaluate", exported]) == 2
    assert_one_line(capsys.readouterr().err, "RUN_DIR", "an export has no held-out documents")
    assert main(["generate", exported, "--prompt", "halo", "--tokens", "9"]) == 0
    written = capsys.readouterr().out
    assert main(["generate", run_dir, "--prompt", "halo", "--tokens", "9"]) == 0
    assert capsys.readouterr().out == written


def test_generate_continues_a_prompt(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes from a file in a process of its own, and from the command line."""
    (job.directory / "prompt.txt").write_text("span carry é")
    words = ["--tokens", "24", "--seed", "5", "--top-k", "40"]
    done = longreach("generate", "runs/tiny", "--prompt", "@prompt.txt", *words, cwd=job.directory)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("span carry é") and len(done.stdout) > len("span carry é")
    assert main(["generate", str(job.directory / "runs/tiny"), "--prompt", "span carry é", *words]) == 0
    assert capsys.readouterr().out == done.stdout


def test_generate_goes_on_from_a_carry(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two commands what one would have written, to the last bit; reading alone; and several prompts in turn."""
    monkeypatch.chdir(tmp_path)
    words = ["generate", str(job.directory / "runs/tiny"), "--top-p", "0.9"]
    assert main([*words, "--prompt", "span", "--seed", "3", "--tokens", "20", "--carry-out", "whole"]) == 0
    assert main([*words, "--prompt", "span", "--seed", "3", "--tokens", "0", "--carry-out", "part"]) == 0
    assert main([*words, "--carry-in", "part", "--tokens", "8", "--carry-out", "part"]) == 0
    assert main([*words, "--carry-in", "part", "--tokens", "12", "--carry-out", "part"]) == 0
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    pair = Decoder(load_run(job.directory / "runs/tiny")[1])
    pair.prefill(torch.arange(8).view(2, 4))
    pair.save("pair")
    capsys.readouterr()
    assert main([*words, "--carry-in", "pair"]) == 2
    assert_one_line(capsys.readouterr().err, "--carry-in = 'pair'", "not 2 side by side")

    alone = []
    for prompt in ("halo", "relay scan"):
        assert main([*words, "--carry-in", "part", "--prompt", prompt, "--tokens", "9"]) == 0
        alone.append(capsys.readouterr().out)
    assert main([*words, "--carry-in", "part", "--prompt", "halo", "--prompt", "relay scan", "--tokens", "9"]) == 0
    assert capsys.readouterr().out == f"prompt 1 of 2:\n{alone[0]}prompt 2 of 2:\n{alone[1]}"


def test_export_writes_what_loads(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = str(job.directory / "runs/tiny")
    assert main(["export", run_dir, str(tmp_path / "out")]) == 0
    assert re.match(r"step 2, [\d,]+ parameters: exported to .*/out\n", capsys.readouterr().out)
    model, tokens = load_exported(tmp_path / "out"), torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens), load_run(run_dir)[1](tokens))


def test_doctor_finds_this_machine_well(tmp_path: Path) -> None:
    done = longreach("doctor", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("a job runs here\n")
    for operator in ("elementwise_attention", "linear_attention", "delta_rule", "short_conv", "long_conv"):
        assert re.search(rf"^ok +operators +{operator} on cpu: backend \w+[,;] ", done.stdout, re.MULTILINE)


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no command": ([], ["COMMAND", "longreach --help"]),
    "unknown command": (["trian"], ["trian"]),
    "no config": (["train"], ["CONFIG", "longreach train --help"]),
    "unknown option": (["train", "tiny.yaml", "--stpes=3"], ["--stpes=3"]),
    "a setting as an option": (
        ["train", "tiny.yaml", "--steps", "3"],
        ["--steps", "settings are key=value", "see longreach train --help"],
    ),
    "pack: unknown option": (["pack", "source", "out", "--feild", "a"], ["--feild", "see longreach pack --help"]),
    "unknown config": (["train", "quickstrat"], ["config = 'quickstrat'", "did you mean quickstart?"]),
    "missing config": (["train", "no/such.yaml"], ["no/such.yaml"]),
    "typo in a key": (["train", "tiny.yaml", "train.stpes=3"], ["train.stpes", "steps"]),
    "sequence does not divide": (
        ["train", "tiny.yaml", "parallel.ranks=4", "parallel.sequence=3"],
        ["parallel.sequence = 3", "4"],
    ),
    "batch does not divide": (["train", "tiny.yaml", "train.micro_batch_size=3"], ["data.batch_size = 2", "multiple"]),
    "missing source": (["train", "tiny.yaml", "data.source=nothing"], ["data.source = 'nothing'"]),
    "empty source": (["train", "tiny.yaml", "data.source=empty"], ["data.source = 'empty'", "no"]),
    "unknown deepspeed name": (["train", "tiny.yaml", "deepspeed=zero4"], ["deepspeed = 'zero4'", "did you mean zero"]),
    "missing deepspeed file": (["train", "tiny.yaml", "--deepspeed_config", "no.json"], ["deepspeed = 'no.json'"]),
    "vocabulary too small": (["train", "tiny.yaml", "model.vocab=100"], ["model.vocab = 100", "256"]),
    "heads do not divide": (["train", "tiny.yaml", "model.chela.heads=3"], ["model.chela", "heads = 3"]),
    "unknown mixer": (["train", "tiny.yaml", "model.mixers=[chella]"], ["chella"]),
    "pack: missing source": (["pack", "nothing", "out"], ["nothing"]),
    "pack: empty source": (["pack", "empty", "out"], ["empty"]),
    "pack: one byte cannot be split": (["pack", "byte", "out"], ["valid_fraction"]),
    "pack: out dir is a file": (["pack", "source", "tiny.yaml"], ["tiny.yaml"]),
    "pack: out dir inside source": (["pack", "source", "source/out"], ["source/out"]),
    "pack: packed already": (["pack", "packed", "out"], ["SOURCE = 'packed'", "data.source=packed"]),
    "pack: bad fraction": (["pack", "source", "out", "--valid-fraction", "1.5"], ["--valid-fraction = 1.5"]),
    "evaluate: no run": (["evaluate", "source"], ["RUN_DIR = 'source'"]),
    "evaluate: no such run": (["evaluate", "runs/none"], ["RUN_DIR = 'runs/none'"]),
    "evaluate: nothing saved": (["evaluate", "unsaved"], ["RUN_DIR = 'unsaved'", "no checkpoint"]),
    "evaluate: missing source": (["evaluate", "runs/tiny", "--source", "nothing"], ["source = 'nothing'"]),
    "evaluate: one byte": (["evaluate", "runs/tiny", "--source", "byte"], ["source = 'byte'", "two"]),
    "evaluate: an empty folder": (["evaluate", "runs/tiny", "--source", "empty"], ["source = 'empty'"]),
    "evaluate: contexts": (["evaluate", "runs/tiny", "--contexts", "16,x"], ["--contexts = '16,x'"]),
    "evaluate: no context": (["evaluate", "runs/tiny", "--contexts", "0"], ["--contexts = '0'", "at least 1"]),
    "evaluate: json nowhere": (["evaluate", "runs/tiny", "--json", "no/such"], ["--json = 'no/such'"]),
    "evaluate: odd figure": (["evaluate", "runs/tiny", "--figure", "a.txt"], ["--figure = 'a.txt'", ".png"]),
    "evaluate: batches of a file": (
        ["evaluate", "runs/tiny", "--batches", "1", "--source", "byte"],
        ["--batches = 1", "leave it out"],
    ),
    "evaluate: shortest of windows": (["evaluate", "runs/tiny", "--min-tokens", "9"], ["--min-tokens = 9", "--source"]),
    "evaluate: shortest": (["evaluate", "runs/tiny", "--by-document", "--min-tokens", "-1"], ["--min-tokens = -1"]),
    "evaluate: bad number": (["evaluate", "runs/tiny", "--batches", "-1"], ["--batches = -1"]),
    "evaluate: another shape": (
        ["evaluate", "reshaped"],
        ["does not fit the model", "blocks.0.ffn.down.weight is [16, 48], not [24, 64]", "and 22 more"],
    ),
    "generate: no run": (["generate", "runs/none", "--prompt", "a"], ["RUN_DIR = 'runs/none'"]),
    "generate: no prompt": (["generate", "runs/tiny"], ["--prompt", "longreach generate --help"]),
    "generate: empty prompt": (["generate", "runs/tiny", "--prompt", ""], ["--prompt = ''"]),
    "generate: missing file": (["generate", "runs/tiny", "--prompt", "@nothing"], ["--prompt = '@nothing'"]),
    "generate: empty file": (["generate", "runs/tiny", "--prompt", "@empty/file"], ["--prompt = '@empty/file'"]),
    "generate: cold": (["generate", "runs/tiny", "--prompt", "a", "--temperature", "-1"], ["--temperature = -1.0"]),
    "generate: nan": (["generate", "runs/tiny", "--prompt", "a", "--temperature", "nan"], ["--temperature = nan"]),
    "generate: warm": (["generate", "runs/tiny", "--prompt", "a", "--temperature", "warm"], ["--temperature", "warm"]),
    "generate: no tokens": (["generate", "runs/tiny", "--prompt", "a", "--tokens", "0"], ["--tokens = 0"]),
    "generate: top-p of 0": (["generate", "runs/tiny", "--prompt", "a", "--top-p", "0"], ["--top-p = 0.0"]),
    "generate: top-p over 1": (["generate", "runs/tiny", "--prompt", "a", "--top-p", "1.1"], ["--top-p = 1.1"]),
    "generate: top-p nan": (["generate", "runs/tiny", "--prompt", "a", "--top-p", "nan"], ["--top-p = nan"]),
    "generate: no carry": (["generate", "runs/tiny", "--carry-in", "nothing"], ["carry = 'nothing'"]),
    "generate: no such carry": (["generate", "runs/tiny", "--carry-in", "byte"], ["carry = 'byte'", "damaged"]),
    "generate: two carries": (
        ["generate", "runs/tiny", "--prompt", "a", "--prompt", "b", "--carry-out", "out"],
        ["--carry-out = 'out'", "one --prompt"],
    ),
    "generate: carry to a folder": (
        ["generate", "runs/tiny", "--prompt", "a", "--carry-out", "source"],
        ["--carry-out = 'source'"],
    ),
    "generate: carry to a device": (
        ["generate", "runs/tiny", "--prompt", "a", "--carry-out", "/dev/null"],
        ["--carry-out = '/dev/null'"],
    ),
    "generate: carry to nowhere": (
        ["generate", "runs/tiny", "--prompt", "a", "--carry-out", "no/such"],
        ["--carry-out = 'no/such'"],
    ),
    "export: no run": (["export", "runs/none", "out"], ["RUN_DIR = 'runs/none'"]),
    "export: no place": (["export", "runs/tiny"], ["OUT_DIR", "longreach export --help"]),
    "export: a folder": (["export", "runs/tiny", "source"], ["OUT_DIR = 'source'", "something else than an export"]),
    "export: over itself": (["export", "runs/tiny", "runs/tiny"], ["OUT_DIR = 'runs/tiny'", "something else"]),
    "export: in a file": (["export", "runs/tiny", "byte/out"], ["OUT_DIR = 'byte/out'"]),
    "generate: bad seed": (["generate", "runs/tiny", "--prompt", "a", "--seed", "-1"], ["--seed = -1"]),
}


@pytest.fixture(scope="module")
def shelf(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the mistakes are made with."""
    place = tmp_path_factory.mktemp("mistakes")
    for name in ("source", "packed", "runs"):
        shutil.copytree(job.directory / name, place / name)
    # One rank: the same mistakes as on several, told without the seconds that starting them takes.
    text = (job.directory / "tiny.yaml").read_text().replace("ranks: 2", "ranks: 1")
    (place / "tiny.yaml").write_text(text)
    (place / "byte").write_text("b")
    (place / "empty").mkdir()
    (place / "empty" / "file").touch()
    (place / "unsaved").mkdir()
    shutil.copy(place / "runs/tiny/config.yaml", place / "unsaved")
    shutil.copytree(place / "runs/tiny", place / "reshaped")
    config = place / "reshaped/config.yaml"
    config.write_text(config.read_text().replace("width: 16", "width: 24"))
    return place


def files_below(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    name: str, shelf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, and no file or directory is made or changed."""
    words, expected = MISTAKES[name]
    monkeypatch.chdir(shelf)
    before, folders = files_below(shelf), sorted(shelf.rglob("*"))
    try:
        code = main(words)
    except SystemExit as ended:  # as argparse ends
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert_one_line(err, *expected)
    assert sorted(shelf.rglob("*")) == folders and files_below(shelf) == before


def test_a_mistake_in_a_real_process(shelf: Path) -> None:
    done = longreach("train", "tiny.yaml", "train.stpes=3", cwd=shelf)
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr, "train.stpes", "steps")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["data.source=nothing", "run.dir=runs/new"], ["data.source = 'nothing'"]),  # found by the first rank alone
        (["model.width=24"], ["checkpoint = ", "blocks.0.ffn.down.weight is [16, 48], not [24, 64]"]),  # by all ranks
    ],
    ids=["one rank", "all ranks"],
)
def test_two_ranks_tell_a_mistake_once(shelf: Path, words: list[str], expected: list[str]) -> None:
    before, folders = files_below(shelf), sorted(shelf.rglob("*"))
    done = longreach("train", "tiny.yaml", "parallel.ranks=2", *words, cwd=shelf)
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr, *expected)
    assert sorted(shelf.rglob("*")) == folders and files_below(shelf) == before


def train_for_ever(job: Job, name: str, *changes: str) -> subprocess.Popen[str]:
    """A training of two ranks that has made a few steps."""
    words = ["train", "tiny.yaml", "train.steps=1000000", f"run.dir=runs/{name}", *changes]
    process = start("-m", "longreach", *words, cwd=job.directory)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        metrics = job.directory / "runs" / name / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            return process
    process.terminate()
    raise AssertionError(finish(process))


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, from /proc."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(number) for number in found]


def assert_ended(numbers: list[int]) -> None:
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_a_checkpoint(job: Job, ranks: int) -> None:
    """As a terminal sends it, to all processes at once; the launcher hands it on besides."""
    name = f"interrupted-{ranks}"
    process = train_for_ever(job, name, f"parallel.ranks={ranks}")
    children = ranks_of(process)
    os.killpg(process.pid, signal.SIGINT)
    for child in children:
        os.kill(child, signal.SIGINT)
    done = finish(process, 60)
    assert done.returncode == 75, done
    said = done.stderr.splitlines()
    step = int(re.search(r"stopped after step (\d+), on Ctrl-C; a checkpoint of step \1 was saved in", said[-1])[1])  # type: ignore[index]
    assert said.count("longreach: saving after this step; Ctrl-C again ends at once, without saving") == 1
    checkpoints = job.directory / "runs" / name / "checkpoints"
    assert checkpoints.joinpath("latest").read_text().strip() == f"step-{step:08d}"
    assert_ended(children)


@pytest.mark.parametrize(("pause", "code"), [(0.0, 0), (1.3, -signal.SIGINT)], ids=["the same", "another"])
def test_a_second_ctrl_c_ends_at_once(pause: float, code: int, tmp_path: Path) -> None:
    program = f"""
import os, signal, time
from longreach.framework.runtime.preemption import Preemption
from longreach.parallel.mesh import Axis
with Preemption() as preemption:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep({pause})
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.reason(Axis()) == "on Ctrl-C"
"""
    assert finish(start("-c", program, cwd=tmp_path), 60).returncode == code


def test_ctrl_c_while_a_text_is_continued_saves_its_carry(job: Job, tmp_path: Path) -> None:
    """What was printed is what was saved: the next tokens are those that would have come."""
    run_dir, words = str(job.directory / "runs/tiny"), ["--temperature", "0"]
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from longreach.launch.cli import program; program()"
    first = [*words, "--prompt", "span", "--tokens", "1000000", "--carry-out", "carry"]
    process = start("-c", program, "generate", run_dir, *first, cwd=tmp_path)
    assert process.stdout is not None
    begun = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    done = finish(process, 60)
    assert done.returncode == 130 and done.stderr.endswith("--carry-in carry goes on from it\n"), done
    written = begun + done.stdout.removesuffix("\n")
    number = len(written.encode()) - len("span")
    more = longreach("generate", run_dir, *words, "--carry-in", "carry", "--tokens", "20", cwd=tmp_path)
    whole = longreach("generate", run_dir, *words, "--prompt", "span", "--tokens", str(number + 20), cwd=tmp_path)
    assert whole.stdout == written + more.stdout


def test_a_killed_rank_ends_the_others(job: Job) -> None:
    process = train_for_ever(job, "killed")
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGKILL)
    done: CompletedProcess[str] = finish(process, 60)
    assert done.returncode == 1
    assert re.search(r"^longreach: rank [01] was ended by SIGKILL$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert_ended(ranks)
