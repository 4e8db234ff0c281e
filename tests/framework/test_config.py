"""Configuration: every way to write it wrong gives one line that says where and how to write it right."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from longreach import _aliases
from longreach.bounds import bounded, check_bounds
from longreach.errors import InputError
from longreach.framework import config as config_module
from longreach.framework.config import RunConfig, load, save, to_yaml, typed_yaml, validate
from longreach.framework.data import corpus_name

MINIMAL = """\
model: {vocab: 256, width: 64, depth: 2, mixers: [elementwise]}
data: {seq_len: 1024, batch_size: 4}
train: {steps: 10}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: str | Path, *overrides: str) -> str:
    """The message of the one-line refusal of ``load(path, overrides)``."""
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_file_and_overrides_merge_in_that_order(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "optim: {lr: 2e-3, warmup_steps: 3}\n")
    config = load(path, ["optim.lr=5e-4", "run.seed=7", "model.mixers=[elementwise, chela]"])
    assert (config.optim.lr, config.optim.warmup_steps, config.optim.eps) == (5e-4, 3, 1e-8)
    assert config.run.seed == 7 and config.model.mixers == ["elementwise", "chela"]
    assert type(config) is RunConfig and type(config.optim.betas) is list
    assert config.run.dir == "runs/run" and config.optim.schedule_steps == 10
    assert load(path, ["train.steps=20", "train.steps=30"]).train.steps == 30


def test_the_name_of_the_files_source_is_not_that_of_another(tmp_path: Path) -> None:
    """Catches runs on one's own genome that are called "e-coli"."""
    assert load("genome").data.name == load("genome", ["train.steps=3"]).data.name == "e-coli"
    assert load("genome", ["data.source=mine.fna"]).data.name == ""
    assert corpus_name(load("genome", ["data.source=mine.fna"]).data) == "mine"
    assert load("genome", ["data.source=mine.fna", "data.name=yeast"]).data.name == "yeast"
    assert load("genome", ["data={source: mine.fna}"]).data.name == ""
    assert corpus_name(load("tokens", ["data.source=mine.txt"]).data) != corpus_name(
        load("genome", ["data.source=mine.txt"]).data
    )
    # The name of a series data set selects it within its source.
    assert load("japanese-vowels", ["data.source=/archive"]).data.name == "JapaneseVowels"


def test_a_saved_config_loads_as_the_same(tmp_path: Path) -> None:
    overrides = ["data.name=0x1F", "data.source=off", "optim.eps=1e-12", "deepspeed={a: [1, 0.5, '1e3', no]}"]
    config = load(write(tmp_path, MINIMAL), overrides)
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config
    assert config.deepspeed == {"a": [1, 0.5, "1e3", "no"]}


def test_bare_name_is_a_file_in_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "CONFIGS", tmp_path)
    write(tmp_path, MINIMAL)
    assert load("run").run.dir == "runs/run"
    assert "did you mean run?" in refused("runn")


def test_a_typo_names_the_nearest_key(tmp_path: Path) -> None:
    """Fault 1: in the file with its line, on the command line, in the section and in the key."""
    path = write(tmp_path, MINIMAL + "optim:\n  warmup_step: 3\n")
    message = refused(path)
    assert "optim.warmup_step" in message and "did you mean optim.warmup_steps?" in message
    assert f"{path}, line 5" in message
    path = write(tmp_path, MINIMAL)
    assert "did you mean optim.lr?" in refused(path, "train.lr=1")
    assert "did you mean parallel?" in refused(path, "paralel.ranks=2")
    assert "did you mean data.seq_len?" in refused(path, "seq_len=2")
    assert "has no keys of its own" in refused(path, "train.steps.more=2")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=many", "train.steps = 'many': must be a whole number"),
        ("train.steps=true", "train.steps = 'true': must be a whole number"),
        ("train.steps=1.5", "must be a whole number"),
        ("train.steps=1e3", "must be a whole number (the command line); write 1000"),
        ("data.seq_len=1,048,576", "write 1048576"),
        ("data.seq_len=1.5e0", "must be a whole number (the command line)"),
        ("train.steps=", "must be a whole number"),
        ("train.steps=null", "must be a whole number"),
        ("train.steps='10'", "remove the quotes"),
        ("train.steps=" + "9" * 400, "must be a whole number"),
        ("train.steps=[1]", "train.steps = 'a list': must be a whole number"),
        ("optim.lr=true", "optim.lr = 'true': must be a number"),
        ("optim.lr=.nan", "optim.lr = nan"),
        ("checkpoint.resume=1", "must be true or false"),
        ("train.precision=fp8", "must be one of fp32, bf16, fp16"),
        ("model.mixers=elementwise", "must be a list (the command line); write 'model.mixers=[elementwise]'"),
        ("optim=fast", "must be a mapping of its keys"),
        ("deepspeed=7", "must be a name"),
    ],
)
def test_a_wrong_type_names_the_key(tmp_path: Path, override: str, expected: str) -> None:
    """Fault 2."""
    assert expected in refused(write(tmp_path, MINIMAL), override)


def test_all_missing_keys_are_named_at_once(tmp_path: Path) -> None:
    """Fault 3."""
    message = refused(write(tmp_path, "model: {vocab: 256}\n"))
    assert message.startswith("data.batch_size, data.seq_len, train.steps = ")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.steps", "012"),
        ("train.steps", "12:30:45"),
        ("train.steps", "1_000"),
        ("train.steps", "off"),
        ("optim.lr", "012"),
        ("optim.lr", "1:30"),
        ("checkpoint.resume", "off"),
        ("checkpoint.resume", "yes"),
        ("monitor.plot", "n"),
    ],
)
def test_yaml_traps_are_refused_where_a_number_or_truth_value_stands(tmp_path: Path, key: str, text: str) -> None:
    """Fault 4: in the file and on the command line."""
    section, name = key.split(".")
    assert f"{key} = '{text}'" in refused(write(tmp_path, MINIMAL), f"{key}={text}")
    lines = MINIMAL.replace("train: {steps: 10}\n", "" if section == "train" else "train: {steps: 10}\n")
    message = refused(write(tmp_path, lines + f"{section}:\n  {name}: {text}\n"))
    assert f"{key} = '{text}'" in message and "line" in message


@pytest.mark.parametrize("text", ["012", "12:30:45", "off", "1e3", "0x1F", "1_0", "2024-01-01", "1.50", "No"])
def test_text_is_what_was_written(tmp_path: Path, text: str) -> None:
    """Fault 4: a field of text keeps its characters, also through a saved config."""
    path = write(tmp_path, MINIMAL.replace("seq_len", f"name: {text}, seq_len"))
    config = load(path, [f"data.cache={text}"])
    assert config.data.name == text and config.data.cache == text
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml").data == config.data


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("3", 3.0), (".5", 0.5), ("1E+2", 100.0)])
def test_numbers_in_every_usual_notation(tmp_path: Path, text: str, value: float) -> None:
    path = write(tmp_path, MINIMAL + f"optim:\n  lr: {text}\n  weight_decay: 1\n")
    for config in (load(path), load(write(tmp_path, MINIMAL), [f"optim.lr={text}"])):
        assert config.optim.lr == value and type(config.optim.lr) is float


def test_a_duplicate_key_gives_both_lines(tmp_path: Path) -> None:
    """Fault 5."""
    message = refused(write(tmp_path, MINIMAL + "optim:\n  lr: 1e-3\n  lr: 1e-4\n"))
    assert message.startswith("optim.lr = ") and "lines 5 and 6" in message


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system ['touch x']", "!!python/name:os.system ''", "!!binary aGk=", "!x y"],
)
def test_tags_are_refused(tmp_path: Path, tag: str) -> None:
    """Fault 6."""
    assert "tags are not allowed" in refused(write(tmp_path, MINIMAL + f"run:\n  dir: {tag}\n"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=${train.steps}", None),
        ("run.seed=${run.seed}", "Recursive interpolation"),
        ("run.seed=${no.such}", "'no.such' not found"),
        ("run.seed=${oc.env:LONGREACH_TEST_NOT_SET}", "'LONGREACH_TEST_NOT_SET' not found"),
        ("run.seed=${oc.env:LONGREACH_TEST_SECRET}", "not of the field's type"),
        ("run.seed=${oops", "run.seed = '${oops'"),
        ("deepspeed={a: '${deepspeed.b}', b: '${deepspeed.a}'}", "Recursive interpolation"),
    ],
)
def test_an_interpolation_that_cannot_be_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, expected: str | None
) -> None:
    """Fault 7: and the value from the environment is not in the message."""
    monkeypatch.setenv("LONGREACH_TEST_SECRET", "hunter2")
    if expected is None:
        assert load(write(tmp_path, MINIMAL), [override]).run.seed == 10
        return
    message = refused(write(tmp_path, MINIMAL), override)
    assert expected in message and "hunter2" not in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.lr"], "write optim.lr=VALUE"),
        (["=3"], "must be key=value"),
        (["optim.lr = 3"], "write optim.lr=3"),
        (["optim.lr =3"], "write optim.lr=3"),
        (["optim.lr", "=", "3"], "write optim.lr=3"),
        (["optim.lr", "=3"], "write optim.lr=3"),
        (["optim..lr=3"], "is not a key"),
    ],
)
def test_an_override_that_is_not_key_equals_value(tmp_path: Path, words: list[str], expected: str) -> None:
    """Faults 8 and 9."""
    assert expected in refused(write(tmp_path, MINIMAL), *words)


def test_alias_bombs_are_refused(tmp_path: Path) -> None:
    """Fault 10: exponential growth, a cycle, plain depth and plain size; small aliases work."""
    bomb = "deepspeed:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    assert "an alias (*name) counts" in refused(write(tmp_path, MINIMAL + bomb))
    assert "an alias (*name) counts" in refused(write(tmp_path, MINIMAL + "deepspeed: &a [*a]\n"))
    assert "nested" in refused(write(tmp_path, MINIMAL + "deepspeed: " + "[" * 1000))
    assert "at most" in refused(write(tmp_path, MINIMAL + "#" * (1 << 18)))
    aliased = MINIMAL + "deepspeed: {a: &a {x: 1}, b: *a}\n"
    assert load(write(tmp_path, aliased)).deepspeed == {"a": {"x": 1}, "b": {"x": 1}}


def test_a_secret_of_the_environment_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 11: at the top, inside other text, through another key, and deep in the DeepSpeed part."""
    monkeypatch.setenv("LONGREACH_TEST_SECRET", "hunter2")
    secret = "${oc.env:LONGREACH_TEST_SECRET}"
    path = write(tmp_path, MINIMAL.replace("{seq_len", f'{{source: "{secret}", seq_len'))
    overrides = [
        f"data.cache=/data/{secret}",
        "data.name=${data.source}",
        f"deepspeed={{a: [1, '{secret}']}}",
    ]
    config = load(path, overrides)
    assert (config.data.source, config.data.cache, config.data.name) == (
        "hunter2",
        "/data/hunter2",
        "hunter2",
    )
    assert config.deepspeed == {"a": [1, "hunter2"]}
    text = to_yaml(config)
    assert "hunter2" not in text and text.count(secret) == 3
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config
    config.data.cache = "elsewhere"
    assert "elsewhere" in to_yaml(config) and "hunter2" not in to_yaml(config)


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    """Fault 15."""
    assert "No such file" in refused(tmp_path / "none.yaml")
    assert "neither a file nor a name" in refused("no-such-name")
    assert "directory" in refused(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert "for this run, give " in refused(tmp_path / "run")
    assert "is empty" in refused(write(tmp_path, "# nothing\n"))
    assert "must be a mapping" in refused(write(tmp_path, "- a list\n"))
    assert "is not YAML" in refused(write(tmp_path, "model: {vocab: 256\n"))
    assert "is not YAML" in refused(write(tmp_path, "model: \x00\n"))
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"run:\n  dir: caf\xe9\n")
    assert "is not UTF-8 text (line 2)" in refused(path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=0"], "train.steps = 0: must be a number and at least 1"),
        (["data.seq_len=-1"], "data.seq_len = -1"),
        (["optim.lr=0"], "optim.lr = 0.0: must be more than 0"),
        (["optim.betas=[0.9]"], "must be two numbers"),
        (["optim.min_lr_ratio=2"], "between 0 and 1"),
        (["data.valid_fraction=1"], "must be less than 1"),
        (["parallel.block_len=128", "model.causal=false"], "only a causal model can be streamed"),
        (
            ["parallel.ranks=4", "parallel.sequence=3"],
            "parallel.ranks = 4 (ranks = data ranks x sequence ranks)",
        ),
        (["parallel.ranks=2", "parallel.sequence=4"], "must divide parallel.ranks = 2"),
        (
            ["parallel.ranks=6", "parallel.sequence=2"],
            "data.batch_size = 4: must be a multiple of 3 = 3 data ranks (6 ranks / 2 of a sequence) x 1",
        ),
        (["train.micro_batch_size=8"], "set data.batch_size=8"),
    ],
)
def test_values_that_do_not_fit_each_other(tmp_path: Path, overrides: list[str], expected: str) -> None:
    """Fault 16, and ranges."""
    assert expected in refused(write(tmp_path, MINIMAL), *overrides)


def test_validate_sees_what_the_program_changed(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL), ["parallel.ranks=4"])
    assert (config.parallel.num_sequence_ranks, config.parallel.num_data_ranks) == (4, 1)
    config.parallel.sequence = 3
    with pytest.raises(InputError, match=r"parallel\.sequence = 3"):
        validate(config)


def test_every_key_can_be_written_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    """A saved configuration holds every key; giving each of them again as an override changes nothing."""
    config = load(write(tmp_path, MINIMAL))
    save(config, tmp_path / "saved.yaml")
    overrides: list[str] = []
    for key in typed_yaml.keys(RunConfig):
        value = dataclasses.asdict(config)
        for part in key.split("."):
            value = value[part]
        if not isinstance(value, dict):
            overrides.append(f"{key}={json.dumps(value)}")
    assert len(overrides) > 30
    path = write(tmp_path, "run: {seed: 99}\n")
    assert load(tmp_path / "saved.yaml", overrides) == load(path, overrides) == config


@pytest.mark.parametrize("old, new", [("two_level", "hierarchical"), ("doubling", "recursive_doubling")])
def test_an_old_value_of_a_key_is_read_as_its_new_one(
    tmp_path: Path, old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    """From a file, as a run directory of the release before has it, and on the command line; one warning names it."""
    _aliases._log_once.cache_clear()
    path = write(tmp_path, f"{MINIMAL}parallel: {{relay: {old}}}\n")
    with mock.patch.object(logging.getLogger("longreach"), "propagate", True):
        configs = [load(path), load(write(tmp_path, MINIMAL), [f"parallel.relay={old}"])]
    assert [config.parallel.relay for config in configs] == [new, new]
    assert caplog.messages == [f"parallel.relay={old} is deprecated: write parallel.relay={new}"]
    save(configs[0], tmp_path / "saved.yaml")
    assert f"relay: {new}" in (tmp_path / "saved.yaml").read_text()


def test_an_old_value_is_told_once_of_all_ranks(tmp_path: Path) -> None:
    """The process that starts local ranks says it; they do not, and of those of another launcher only the first."""
    path = write(tmp_path, f"{MINIMAL}parallel: {{relay: doubling}}\n")
    code = f"from longreach.framework.config import load; load({str(path)!r})"
    unset = {"RANK", "TORCHELASTIC_RUN_ID"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    for given, lines in (
        ({}, 1),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "longreach"}, 0),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, 1),
        ({"RANK": "1"}, 0),
    ):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment | given, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("parallel.relay=doubling is deprecated") == lines == done.stderr.count("\n")


def test_bounds_of_every_kind() -> None:
    @dataclasses.dataclass
    class Inner:
        share: float = bounded(0.5, minimum=0, below=1)

    @dataclasses.dataclass
    class Outer:
        rate: float = bounded(1.0, above=0)
        ratio: float = bounded(0.0, minimum=0, maximum=1)
        steps: int | None = bounded(None, minimum=1)
        free: int = -1
        inner: Inner = dataclasses.field(default_factory=Inner)

    check_bounds(Outer())
    check_bounds(Outer(rate=1e-9, ratio=1.0, steps=1))
    for wrong, message in (
        (Outer(rate=0.0), "rate = 0.0: must be more than 0"),
        (Outer(rate=math.nan), "rate = nan: must be more than 0"),
        (Outer(rate=math.inf), "rate = inf: must be a number"),
        (Outer(ratio=-0.1), "ratio = -0.1: must be a number and at least 0"),
        (Outer(ratio=1.1), "ratio = 1.1: must be between 0 and 1"),
        (Outer(steps=0), "steps = 0: must be a number and at least 1"),
        (Outer(inner=Inner(1.0)), "inner.share = 1.0: must be less than 1"),
        (Outer(inner=Inner(math.nan)), "inner.share = nan: must be a number and at least 0"),
    ):
        with pytest.raises(InputError) as caught:
            check_bounds(wrong)
        assert str(caught.value) == message
