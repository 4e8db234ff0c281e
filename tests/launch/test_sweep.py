"""Sweeps: which overrides vary, the runs and their table, a run that fails, and what a restart skips."""

from __future__ import annotations

import json
import re

import pytest
from programs import Job, longreach
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.monitoring.charts import hyperparameters
from longreach.launch.cli import main
from longreach.launch.sweep import combinations, split


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("optim.lr=1e-3,3e-3,1e-3", ["1e-3", "3e-3"]),
        ("model.width=64,128", ["64", "128"]),
        ("train.compile=true,false", ["true", "false"]),
        ("train.precision=fp32,bf16", ["fp32", "bf16"]),
        ("optim.schedule_steps=100,200", ["100", "200"]),
        ("deepspeed=zero1,zero2", ["zero1", "zero2"]),
        ("data.source=a/b,c", ["a/b", "c"]),
        ("data.sources.code.weight=1,2", ["1", "2"]),
    ],
)
def test_a_comma_in_the_value_of_one_field_is_a_sweep(word: str, values: list[str]) -> None:
    assert split(["train.steps=3", word]) == (["train.steps=3"], {word.partition("=")[0]: values})


@pytest.mark.parametrize(
    "word",
    [
        "model.mixers=[elementwise,chela]",
        "model.mixers=elementwise,chela",
        "optim.betas=[0.9,0.95]",
        "data.sources={a: {source: x, weight: 1}, b: {source: y}}",
        "deepspeed={a: 1, b: 2}",
        'deepspeed="a,b"',
        "data.name='a,b'",
        "data.name=${oc.env:NAME,b}",
        "run.dir=runs/a,b",
        "optim.rl=1,2",
        "a,b",
    ],
)
def test_other_commas_are_none(word: str) -> None:
    assert split([word]) == ([word], {})


def test_the_later_of_two_values_wins() -> None:
    assert split(["optim.lr=1,2", "optim.lr=3"]) == (["optim.lr=3"], {})
    assert split(["optim.lr=3", "optim.lr=1,2"]) == (["optim.lr=3"], {"optim.lr": ["1", "2"]})


@pytest.mark.parametrize(
    ("word", "message"), [("optim.lr=1e-3,", "optim.lr = '1e-3,'"), ("optim.lr=1e-3,x", "optim.lr = 'x'")]
)
def test_a_wrong_value_is_told_before_any_run(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split([word])


def test_runs_are_named_by_what_varies() -> None:
    assert combinations({"optim.lr": ["1e-3", "3e-3"], "model.width": ["64", "128"]}) == {
        f"lr={lr},width={width}": {"optim.lr": lr, "model.width": width}
        for lr in ("1e-3", "3e-3")
        for width in ("64", "128")
    }
    assert [*combinations({"run.seed": ["0"], "task.seed": ["1"]})] == ["run.seed=0,task.seed=1"]
    assert [*combinations({"data.source": ["a/b", "a-b"]})] == ["source=a-b", "source=a-b+"]


def test_the_table_of_runs_begins_with_what_varies() -> None:
    config = load("quickstart", ["monitor.hparams=[optim.eps, model.width, optim.lr, task.seed]", "optim.lr=2e-3"])
    shown = hyperparameters(config)
    assert [*shown.items()][:4] == [("optim.eps", 1e-8), ("width", 128), ("lr", 2e-3), ("task.seed", 0)]
    assert shown["seed"] == config.run.seed and "lr" in hyperparameters(load("quickstart"))
    with pytest.raises(InputError, match=r"optim\.rl"):
        load("quickstart", ["monitor.hparams=[optim.rl]"])


@pytest.mark.timeout(400)
def test_a_sweep_goes_on_past_a_failed_run_and_does_not_repeat_finished_ones(job: Job) -> None:
    words = ["train", "tiny.yaml", "parallel.ranks=1", "run.dir=runs/widths", "model.width=15,16,20"]
    done = longreach(*words, cwd=job.directory)
    assert done.returncode == 1, done.stderr
    place = job.directory / "runs" / "widths-sweep"
    losses = {}
    for width in (16, 20):
        rows = (place / f"width={width}" / "validation.jsonl").read_text().splitlines()
        losses[f"width={width}"] = json.loads(rows[-1])["loss"]
    best, second = sorted(losses, key=losses.__getitem__)
    table = [
        "run       held-out",
        f"{best}    {losses[best]:.4f}",
        f"{second}    {losses[second]:.4f}",
        "width=15         -  not finished (exit code 2)",
    ]
    assert done.stdout.splitlines()[-4:] == table
    events = EventAccumulator(str(place / "width=16" / "tensorboard"))
    events.Reload()
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    infos = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.hparam_infos
    assert infos[0].name == "width" and "lr" in {info.name for info in infos}
    again = longreach(*words[:-1], "model.width=16,20", cwd=job.directory)
    assert again.returncode == 0 and again.stdout.splitlines()[-3:] == table[:3]
    assert re.findall(r"^run .*", again.stderr, re.MULTILINE) == [
        f"run {number} of 2: width={width}, finished" for number, width in ((1, 16), (2, 20))
    ]


def test_a_sweep_starts_its_runs_by_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", "quickstart", "--dry-run", "optim.lr=1,2"]) == 2
    assert "optim.lr = '1,2': must be one value under --dry-run: a sweep" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "quickstart", "optim.lr=1,2"]) == 2
    assert "optim.lr = '1,2': must be one value under a launcher: a sweep" in capsys.readouterr().err
