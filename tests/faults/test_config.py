"""Faults of configurations, numbered as in the list of faults: each told in one line, before anything is made."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import pytest
from fault_helpers import CONFIG, JobDirectory, error_line, files_below
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from programs import longreach

from longreach.errors import InputError
from longreach.framework.config import MAX_BYTES, load
from longreach.framework.deepspeed.settings import deepspeed_settings
from longreach.launch.cli import main

MISTAKE = 2
SECRET = "hunter2-of-the-environment"
HOSTILE = Path(__file__).parents[1] / "data/hostile/config"
SECONDS = 20.0  # on a machine that has other things to do


@pytest.fixture(autouse=True)
def nothing_is_made(job_dir: JobDirectory) -> Iterator[None]:
    """No case leaves a file, or changes one, where the program ran."""
    before = files_below(job_dir.directory)
    yield
    for path, content in files_below(job_dir.directory).items():
        assert path.startswith("runs/") or before.get(path) == content, path


def refused(done: CompletedProcess[str], *words: str) -> None:
    assert done.returncode == MISTAKE and done.stdout == ""
    error_line(done, *words)
    assert done.stderr.count("\n") == 1, done.stderr


def here(job_dir: JobDirectory, capsys: pytest.CaptureFixture[str], *words: str) -> CompletedProcess[str]:
    """What a process of its own would do, without the seconds that it takes to start."""
    with mock.patch.dict(os.environ):
        before = Path.cwd()
        os.chdir(job_dir.directory)
        try:
            code = main(["train", *words])
        except SystemExit as ended:  # as argparse ends
            code = int(ended.code or 0)
        finally:
            os.chdir(before)
    return CompletedProcess(words, code, *capsys.readouterr())


def config(job_dir: JobDirectory, tail: str, text: str = CONFIG) -> str:
    path = job_dir.directory / "runs/case.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + tail)
    return str(path)


FILES = {  # what is added to a config that is right, and what must be said of it
    "1-typo": ("checkpoint: {evry: 3}", ["checkpoint.evry", "line 7", "did you mean checkpoint.every?"]),
    "1-section": ("chekpoint: {every: 3}", ["chekpoint", "did you mean checkpoint?"]),
    "2-text": ("checkpoint: {every: often}", ["checkpoint.every = 'often'", "whole number", "line 7"]),
    "2-bool-for-int": ("checkpoint: {every: true}", ["checkpoint.every = 'true'", "whole number"]),
    "2-int-for-bool": ("checkpoint: {resume: 1}", ["checkpoint.resume = '1'", "true or false"]),
    "2-list": ("checkpoint: {every: [1]}", ["checkpoint.every = 'a list'", "whole number"]),
    "4-octal": ("checkpoint: {every: 012}", ["checkpoint.every = '012'", "leading zeros"]),
    "4-clock": ("checkpoint: {every: 12:30:45}", ["checkpoint.every = '12:30:45'", "whole number"]),
    "4-off": ("checkpoint: {resume: off}", ["checkpoint.resume = 'off'", "true or false"]),
    "5-duplicate": ("run: {seed: 1}\nrun: {seed: 2}", ["run", "given twice", "lines 7 and 8"]),
    "6-python": ("run: {dir: !!python/object/apply:os.system ['touch canary']}", ["run.dir", "tags are not allowed"]),
    "7-cycle": ("run: {dir: '${run.dir}'}", ["run.dir = '${run.dir}'", "Recursive interpolation"]),
    "7-environment": ("run: {dir: '${oc.env:NOT_SET_HERE}'}", ["run.dir", "NOT_SET_HERE", "not found"]),
    "10-alias": ("deepspeed: &a [*a]", ["more than 10000 values", "an alias"]),
    "12-unknown": ("deepspeed: {gradient_clipp: 1}", ["deepspeed.gradient_clipp", "did you mean gradient_clipping?"]),
    "13-equation": (
        "deepspeed: {train_batch_size: 7}",
        ["deepspeed.train_batch_size = 7", "data.batch_size 2 = train.micro_batch_size 1 x 2 accumulated x 1 data"],
    ),
    "14-contradiction": ("deepspeed: {gradient_clipping: 3}", ["deepspeed.gradient_clipping = 3", "optim.clip = 1.0"]),
    "14-precision": ("deepspeed: {fp16: {enabled: true}}", ["deepspeed.fp16.enabled = True", "train.precision = fp32"]),
}
WORDS = {  # what is said on the command line
    "1-override": (["train.stesp=3"], ["train.stesp", "did you mean train.steps?"]),
    "2-override": (["train.steps=1.5"], ["train.steps = '1.5'", "whole number"]),
    "4-override": (["data.seq_len=012"], ["data.seq_len = '012'", "leading zeros"]),
    "8-no-equals": (["optim.lr"], ["optim.lr", "write optim.lr=VALUE"]),
    "8-no-key": (["=3"], ["must be key=value"]),
    "9-spaces": (["optim.lr", "=", "3"], ["optim.lr = 3", "without spaces", "write optim.lr=3"]),
    "9-one-word": (["optim.lr = 3"], ["write optim.lr=3"]),
    "12-type": (["deepspeed={log_level: 3}"], ["deepspeed.log_level = 3", "must be one of debug"]),
    "12-section": (["deepspeed={tensorboard: 3}"], ["deepspeed.tensorboard = 3", "keys of its own"]),
    "13-type": (["deepspeed={train_batch_size: [1]}"], ["deepspeed.train_batch_size = [1]", "must be 2"]),
    "15-path": (["run.dir=" + "x" * 5000], ["run.dir", "File name too long"]),
}


@pytest.mark.parametrize("name", FILES)
def test_01_to_14_in_a_file(job_dir: JobDirectory, capsys: pytest.CaptureFixture[str], name: str) -> None:
    tail, words = FILES[name]
    refused(here(job_dir, capsys, config(job_dir, tail)), *words)


@pytest.mark.parametrize("name", WORDS)
def test_01_to_15_on_the_command_line(job_dir: JobDirectory, capsys: pytest.CaptureFixture[str], name: str) -> None:
    given, words = WORDS[name]
    refused(here(job_dir, capsys, "endless.yaml", *given), *words)


REAL = {
    "01": "1-typo",
    "02": "2-bool-for-int",
    "04": "4-clock",
    "05": "5-duplicate",
    "06": "6-python",
    "07": "7-cycle",
    "08": "8-no-equals",
    "09": "9-spaces",
    "10": "10-alias",
    "12": "12-unknown",
    "13": "13-equation",
    "14": "14-contradiction",
}


@pytest.mark.parametrize("number", REAL)
def test_01_to_14_in_a_process(job_dir: JobDirectory, number: str) -> None:
    """One case of each number as a user meets it."""
    name = REAL[number]
    given, words = (WORDS if name in WORDS else FILES)[name]
    command = ["endless.yaml", *given] if name in WORDS else [config(job_dir, str(given))]
    refused(longreach("train", *command, cwd=job_dir.directory), *words)


def test_03_missing_fields_are_named_at_once(job_dir: JobDirectory) -> None:
    path = config(job_dir, "model: {vocab: 256}\n", "")
    refused(longreach("train", path, cwd=job_dir.directory), "data.batch_size, data.seq_len, train.steps")


def test_04_text_is_what_was_written(job_dir: JobDirectory) -> None:
    """Where a field is text, 012 is a name like any other."""
    done = job_dir.train("runs/012", "data.name=012", "train.steps=1")
    assert done.returncode == 0, done.stderr
    assert "name: '012'" in (job_dir.directory / "runs/012/config.yaml").read_text()


def test_06_and_10_hostile_files(job_dir: JobDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """Tags that call, bombs, depth, numbers without end, wrong encodings: nothing runs, and one line says why."""
    files = sorted(HOSTILE.iterdir())
    assert len(files) > 90
    for file in files:
        began = time.monotonic()
        if file.suffix == ".yaml":
            done = here(job_dir, capsys, str(file))
        else:
            done = here(job_dir, capsys, "endless.yaml", f"deepspeed={file}", "run.dir=runs/hostile")
        assert done.returncode == MISTAKE, file
        refused(done)
        assert len(done.stderr) < 1500 and done.stderr[:-1].isprintable(), file
        assert time.monotonic() - began < SECONDS, file
        assert not (job_dir.directory / "canary").exists() and not Path("canary").exists(), file


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_10_a_file_that_is_too_large(job_dir: JobDirectory, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    file = job_dir.directory / f"runs/large.{suffix}"
    file.parent.mkdir(exist_ok=True)
    file.write_text("[" * (MAX_BYTES + 1))
    words = [str(file)] if suffix == "yaml" else ["endless.yaml", f"deepspeed={file}"]
    refused(here(job_dir, capsys, *words), f"must be at most {MAX_BYTES} bytes")
    file.write_text("[" * MAX_BYTES)
    began = time.monotonic()
    refused(here(job_dir, capsys, *words), "nested")
    assert time.monotonic() - began < SECONDS


def test_11_a_secret_is_in_no_file_of_a_run(job_dir: JobDirectory) -> None:
    """Nor in what is printed; as a path, inside of a text, and among DeepSpeed's keys."""
    (job_dir.directory / "runs").mkdir(exist_ok=True)
    (job_dir.directory / "runs" / SECRET).symlink_to(job_dir.directory / "packed")
    given = [
        "data.source=runs/${oc.env:LONGREACH_SECRET}",
        "data.cache=${oc.env:LONGREACH_SECRET}",
        "deepspeed={comet: {enabled: false, api_key: '${oc.env:LONGREACH_SECRET}'}}",
        "monitor.tensorboard=true",
        "monitor.plot=true",
        "train.steps=2",
    ]
    with mock.patch.dict(os.environ, {"LONGREACH_SECRET": SECRET}):
        done = job_dir.train("runs/secret", *given, "parallel.ranks=2")
    assert done.returncode == 0, done.stderr
    files = files_below(job_dir.directory / "runs/secret")
    assert any("tfevents" in path for path in files) and any("safetensors" in path for path in files)
    assert not [path for path, content in files.items() if SECRET.encode() in content]
    assert b"${oc.env:LONGREACH_SECRET}" in files["config.yaml"]
    assert SECRET not in done.stdout + done.stderr
    with mock.patch.dict(os.environ, {"LONGREACH_SECRET": f"{SECRET}-gone"}):
        done = job_dir.train("runs/other", *given)
    refused(done, "data.source = 'runs/${oc.env:LONGREACH_SECRET}'", "No such file")


def test_12_to_14_in_a_json_of_deepspeed(job_dir: JobDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    file = job_dir.directory / "runs/mine.json"
    file.parent.mkdir(exist_ok=True)
    for text, words in [
        ('{"zero_optimisation": {}}', ["mine.json: zero_optimisation", "did you mean zero_optimization?"]),
        ('{"train_batch_size": 7}', ["mine.json: train_batch_size = 7", "data.batch_size 2 ="]),
        ('{"gradient_clipping": 3}', ["mine.json: gradient_clipping = 3", "optim.clip = 1.0"]),
    ]:
        file.write_text(text)
        refused(here(job_dir, capsys, "endless.yaml", f"deepspeed={file}"), *words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no/such.yaml", ["no/such.yaml", "No such file"]),
        ("quickstrat", ["quickstrat", "did you mean quickstart?"]),
        ("empty.yaml", ["is empty", "model, data and train.steps"]),
        ("source", ["source", "Is a directory"]),
    ],
)
def test_15_a_config_that_is_none(job_dir: JobDirectory, path: str, words: list[str]) -> None:
    (job_dir.directory / "empty.yaml").write_text("# nothing\n")
    try:
        refused(longreach("train", path, cwd=job_dir.directory), *words)
    finally:
        (job_dir.directory / "empty.yaml").unlink()


MARKS = [
    *"{}[]:,&*!|>-?#%@'\"\n \\$~=\0\ud800",
    "${",
    "!!",
    "<<",
    "???",
    "1e999",
    "0x",
    "&a ",
    "*a",
    "a: ",
    "true",
    "null",
]
NAMES = ["model", "data", "train", "steps", "deepspeed", "oc.env:HOME", "oc.decode:", "run.seed"]
PIECES = st.sampled_from(MARKS) | st.sampled_from(NAMES)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=30).map("".join)
FUZZ = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """A text with a few pieces of it replaced."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(TEXTS) + text[at + draw(st.integers(0, 10)) :]
    return text


def only_input_errors(path: Path, words: list[str]) -> None:
    try:
        load(path, words)
    except InputError as error:
        assert "\n" not in str(error)


@FUZZ
@given(text=TEXTS | mutated(CONFIG))
@example(text=CONFIG + "run: {dir: '${oc.decode:\"{\"}'}")
def test_10_any_text_is_a_configuration_or_a_mistake(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    only_input_errors(path, [])


@FUZZ
@given(
    word=TEXTS | st.builds("{}={}".format, st.sampled_from(["deepspeed", "run.dir", "optim.lr", "model.mixers"]), TEXTS)
)
def test_10_any_override_is_one_or_a_mistake(job_dir: JobDirectory, word: str) -> None:
    only_input_errors(job_dir.directory / "endless.yaml", [word])


JSON = '{"zero_optimization": {"stage": 2}, "train_batch_size": 2, "fp16": {"enabled": "auto"}, "steps_per_print": 3}'
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "train_batch_size",
    "fp16",
    "bf16",
    "zero_optimization",
    "data_types",
    "comms_logger",
    "flops_profiler",
    "timers",
]
KEYS += ["tensorboard", "checkpoint", "log_level", "aio", "optimizer", "communication_data_type", "gradient_clipping"]


def settings_or_a_mistake(choice: object) -> None:
    batch = {"batch_size": 2, "micro_batch_size": 1, "accumulation": 2, "world_size": 1}
    try:
        deepspeed_settings(choice, precision="fp32", clip=1.0, **batch)  # type: ignore[arg-type]
    except InputError as error:
        assert "\n" not in str(error)


@FUZZ
@given(text=TEXTS | mutated(JSON))
def test_12_any_text_is_settings_or_a_mistake(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    settings_or_a_mistake(str(path))


@FUZZ
@given(keys=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_12_any_keys_are_settings_or_a_mistake(keys: dict[str, object]) -> None:
    settings_or_a_mistake(keys)
