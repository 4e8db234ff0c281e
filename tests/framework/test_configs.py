"""The files in ``configs/``: each loads as it stands, builds, and is what its name says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longreach.errors import InputError
from longreach.framework.config import CONFIGS, RunConfig, load, to_yaml
from longreach.framework.deepspeed.settings import SETTINGS, deepspeed_settings
from longreach.framework.model import Model, build_model

EXTEND = "extend"  # which wants the directory of a model
NAMES = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {EXTEND})
DEEPSPEED = sorted(path.stem for path in SETTINGS.glob("*.json"))
BYTES = 256  # what `model.vocab: 0` becomes for a corpus of bytes


def model_on_no_device(config: RunConfig) -> Model:
    """The model with shapes only: nothing is allocated."""
    config.model.vocab = config.model.vocab or BYTES
    with torch.device("meta"):
        model = build_model(config.model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return model


def settings(config: RunConfig, deepspeed: str, precision: str) -> dict[str, object]:
    return deepspeed_settings(
        deepspeed,
        precision=precision,
        batch_size=config.data.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.data.batch_size // (config.parallel.num_data_ranks * config.train.micro_batch_size),
        clip=config.optim.clip,
        world_size=config.parallel.ranks,
    )


def test_there_are_the_files_that_the_documentation_names() -> None:
    assert {"quickstart", "lm-125m", "lm-1b-1m"} <= set(NAMES)
    assert {"zero0", "zero1", "zero2", "zero3"} <= set(DEEPSPEED)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_builds_and_can_be_written(name: str, tmp_path: Path) -> None:
    config = load(name)
    assert config.run.dir == f"runs/{name}" and config.optim.schedule_steps == config.train.steps
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "again.yaml") == config
    assert isinstance(config.deepspeed, str) and settings(config, config.deepspeed, config.train.precision)
    num_parameters = sum(parameter.numel() for parameter in model_on_no_device(config).parameters())
    assert num_parameters > 0
    assert config.data.seq_len % config.parallel.num_sequence_ranks == 0, "or a rank holds fewer tokens than the others"


def test_a_model_to_extend_must_be_named(tmp_path: Path) -> None:
    """Or its architecture; else a default one would be trained without a word."""
    with pytest.raises(InputError, match=r"model\.pretrained = '\?\?\?': mandatory.*; add each as key=value"):
        load(EXTEND)
    for name in ("pretrained", "architecture"):
        with pytest.raises(InputError, match=f"model.{name} = '{tmp_path}': must be a local directory with the config"):
            load(EXTEND, [f"model.{name}={tmp_path}"])


def test_the_large_configs_are_as_large_as_their_names_say() -> None:
    billion, small = load("lm-1b-1m"), load("lm-125m")
    assert billion.data.seq_len == 1_048_576 and billion.parallel.num_sequence_ranks == 8
    assert 1.2e9 <= sum(parameter.numel() for parameter in model_on_no_device(billion).parameters()) <= 1.4e9
    assert 115e6 <= sum(parameter.numel() for parameter in model_on_no_device(small).parameters()) <= 135e6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_deepspeed_file_is_accepted(name: str, precision: str) -> None:
    config = load("lm-125m")
    found = settings(config, name, precision)
    assert "auto" not in json.dumps(found)
    assert found["train_micro_batch_size_per_gpu"] == 1 and found["gradient_accumulation_steps"] == 4
    assert found["train_batch_size"] == 4 * 8, "DeepSpeed counts every rank's part of a sequence as one"
    assert found["gradient_clipping"] == 1.0
    zero = found["zero_optimization"]
    assert isinstance(zero, dict) and zero["stage"] == int(name.removeprefix("zero") if name != "slow_network" else 0)
    for section in ("fp16", "bf16"):
        enabled = found[section]
        assert isinstance(enabled, dict) and enabled["enabled"] == (precision == section)
