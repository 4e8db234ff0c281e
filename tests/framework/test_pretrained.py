"""Models of transformers in the place of our own: trained, frozen in part, adapted by LoRA, exported, verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import run_world
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from longreach.errors import InputError
from longreach.framework.checkpoint.directory import read_state
from longreach.framework.config import load, to_yaml
from longreach.framework.data import Batches
from longreach.framework.inference.evaluate import evaluate
from longreach.framework.inference.export import export
from longreach.framework.inference.generate import Decoder
from longreach.framework.inference.loading import load_run, load_step, vocabulary_of
from longreach.framework.tasks import open_task
from longreach.framework.trainer import _optimizer, train
from longreach.launch import cli
from longreach.launch.dry_run import plan
from longreach.launch.verify import groups, verify
from longreach.parallel.span import Span

transformers = pytest.importorskip("transformers")

LENGTH = 61
CONFIG = """
data: {seq_len: 61, batch_size: 4}
optim: {lr: 1.0e-3, warmup_steps: 4, clip: 0.5}
train: {steps: 20, threads: 1, validate_batches: 2}
monitor: {tensorboard: false, plot: false}
"""
LORA = ["model.lora.rank=4", "model.lora.alpha=8", "model.lora.targets=[q_proj, v_proj, o_proj]"]
PARTITION_ALL = "{zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"  # also the smallest tensors
WAYS: dict[str, list[str]] = {  # to train on two ranks
    "zero0": ["deepspeed=zero0"],
    "zero1": ["deepspeed=zero1", "train.recompute=true"],
    "zero2": ["deepspeed=zero2", "parallel.sequence=1", "train.micro_batch_size=2"],
    "zero3": [f"deepspeed={PARTITION_ALL}"],
    "streamed": ["deepspeed=zero1", "parallel.block_len=11"],
    "streamed zero3": [f"deepspeed={PARTITION_ALL}", "parallel.block_len=11", "train.recompute=true"],
}
KINDS: dict[str, tuple[list[str], list[str]]] = {  # what is trained, and the ways
    "all": ([], list(WAYS)),
    "documents": (["data.packing=documents"], ["zero3", "streamed"]),
    "lora": (LORA, ["zero1", "zero3", "streamed zero3"]),
    "frozen": (["train.freeze=[embed_tokens.weight, layers.0.*]"], ["zero1", "zero2", "zero3", "streamed zero3"]),
}
Rows = list[dict[str, Any]]


def save_tiny(place: Path, vocab: int = 256, **changes: Any) -> Path:
    """An olmo_hybrid of three layers, as ``save_pretrained`` writes it."""
    shape = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model("olmo_hybrid", **{**shape, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny: Path) -> str:
    """Path of the config that the tests here train, with overrides of their own."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    text = CONFIG.replace("data: {", f"data: {{source: {corpus}, ") + f"model: {{pretrained: {tiny}}}\n"
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows_of(run_dir: str | Path) -> Rows:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def train_each(rank: int, config: str, runs: list[list[str]]) -> list[tuple[Rows, float | None]]:
    """Train once with each list of overrides; returns each run's rows and its held-out loss."""
    results = []
    for overrides in runs:
        result = train(load(config, overrides))
        results.append((rows_of(result.run_dir), result.held_out))
    return results


def close(rows: Rows, expected: Rows, keys: tuple[str, ...] = ("loss", "grad_norm")) -> None:
    """Step by step, to a relative 1e-5."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for key in keys:
            assert row[key] == pytest.approx(wanted[key], rel=1e-5, abs=0), f"step {row['step']}: {key}"


def losses_of_transformers(config: str, place: Path, output: Path) -> list[float]:
    """The losses of 20 steps by transformers' own `Trainer`, of the same sequences, with the same AdamW."""
    ours = load(config)
    task = open_task(ours.task, ours.data)
    batches = Batches(task.sequences("train", ours.run.seed), 4, micro_batch_size=4)
    found = list(batches.iterate(num_steps=ours.train.steps))
    rows = [
        {"input_ids": tokens, "labels": labels, "shift_labels": labels}
        for batch in found
        for tokens, labels in zip(batch.tokens.long(), batch.labels.long(), strict=True)
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    arguments = transformers.TrainingArguments(
        str(output), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=ours.train.steps, save_strategy="no",
        per_device_train_batch_size=4, dataloader_pin_memory=False, logging_steps=1, max_grad_norm=ours.optim.clip,
        lr_scheduler_type="constant", remove_unused_columns=False,
    )  # fmt: skip

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(model, arguments, train_dataset=rows, optimizers=(_optimizer(model, ours.optim), None))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.timeout(300)
def test_twenty_steps_are_those_of_the_trainer_of_transformers(config: str, tiny: Path, tmp_path: Path) -> None:
    """On one rank, and on two that share each sequence, in stage 3."""
    constant = ["optim.warmup_steps=0", "optim.min_lr_ratio=1", "train.micro_batch_size=4"]
    expected = losses_of_transformers(config, tiny, tmp_path / "trainer")
    assert len(expected) == 20 and expected[-1] < 0.85 * expected[0]
    for ranks, stage in ((1, 1), (2, 3)):
        run = [*constant, f"parallel.ranks={ranks}", f"deepspeed=zero{stage}", f"run.dir={tmp_path}/{ranks}"]
        (rows, _), *_ = run_world(train_each, ranks, config, [run])[0]
        assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.fixture(scope="module")
def everywhere(config: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Rows, Any]]]:
    """Three steps of every kind of training, on one rank in stage 0 and on two in other ways: where, and the rows."""
    place, results = tmp_path_factory.mktemp("runs"), {}
    for ranks in (1, 2):
        runs = {}
        for kind, (what, ways) in KINDS.items():
            for way in ways if ranks == 2 else ["alone"]:
                how = ["deepspeed=zero0", *WAYS.get(way, []), f"parallel.ranks={ranks}", f"run.dir={place}/{kind}-{way}"]
                runs[f"{kind}-{way}"] = ["train.steps=3", "optim.warmup_steps=0", *what, *how]
        results |= zip(runs, run_world(train_each, ranks, config, list(runs.values()), timeout=500)[0], strict=True)
    return place, results


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_are_the_same_on_two_ranks(everywhere: tuple[Path, dict[str, tuple[Rows, Any]]], kind: str) -> None:
    """In every stage of ZeRO, streamed, recomputed, packed, with adapters, and with a frozen part."""
    rows, held_out = everywhere[1][f"{kind}-alone"]
    assert len(rows) == 3 and rows[2]["loss"] < rows[0]["loss"] and held_out is not None
    for way in KINDS[kind][1]:
        found, found_held_out = everywhere[1][f"{kind}-{way}"]
        close(found, rows)
        assert found_held_out == pytest.approx(held_out, rel=1e-5), way


def test_only_what_is_trained_changes_and_has_a_state(everywhere: tuple[Path, dict[str, tuple[Rows, Any]]]) -> None:
    """With adapters and with a frozen part, in stages 0 to 3: all other weights are those that the run began with."""
    place = everywhere[0]
    before = dict(load_run(json.loads((place / "all-alone/transformers/longreach.json").read_text())["pretrained"])[1].named_parameters())
    for kind in ("lora", "frozen"):
        for way in ("alone", *KINDS[kind][1]):
            _, model, step = load_step(place / f"{kind}-{way}")
            shapes = read_state(place / f"{kind}-{way}" / "checkpoints" / f"step-{step:08d}")["shapes"]["optimizer"]
            for name, parameter in model.named_parameters():
                original = before.get(name.replace(".base_layer", ""))
                is_trained = "lora_" in name if kind == "lora" else "embed" not in name and ".layers.0." not in name
                assert is_trained == (f"{name}.exp_avg" in shapes), name
                if not is_trained:
                    assert torch.equal(parameter, original), name
                elif original is not None:
                    assert not torch.equal(parameter, original), name
