"""Models of transformers in the place of our own: trained, frozen in part, adapted by LoRA, exported, verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import run_world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from longreach.errors import InputError
from longreach.framework.checkpoint.directory import read_state
from longreach.framework.config import load, to_yaml
from longreach.framework.data import Batches
from longreach.framework.inference.evaluate import evaluate
from longreach.framework.inference.export import export
from longreach.framework.inference.generate import Decoder
from longreach.framework.inference.loading import load_run, load_step, vocabulary_of
from longreach.framework.model import build_model
from longreach.framework.model.trained import freeze
from longreach.framework.tasks import kind_of, open_task
from longreach.framework.trainer import _optimizer, train
from longreach.launch import cli
from longreach.launch.dry_run import plan
from longreach.launch.verify import groups, verify

transformers = pytest.importorskip("transformers")

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

    class InOrder(transformers.Trainer):  # type: ignore[name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(model, arguments, train_dataset=rows, optimizers=(_optimizer(model, ours.optim), None))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.timeout(600)
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
    place, results = tmp_path_factory.mktemp("runs"), dict[str, tuple[Rows, Any]]()
    for ranks in (1, 2):
        runs = {}
        for kind, (what, ways) in KINDS.items():
            for way in ways if ranks == 2 else ["alone"]:
                how = [
                    "deepspeed=zero0",
                    *WAYS.get(way, []),
                    f"parallel.ranks={ranks}",
                    f"run.dir={place}/{kind}-{way}",
                ]
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
    kept = json.loads((place / "all-alone" / "transformers" / "longreach.json").read_text())
    before = dict(load_run(kept["pretrained"])[1].named_parameters())
    for kind in ("lora", "frozen"):
        for way in ("alone", *KINDS[kind][1]):
            _, model, step = load_step(place / f"{kind}-{way}")
            shapes = read_state(place / f"{kind}-{way}" / "checkpoints" / f"step-{step:08d}")["shapes"]["optimizer"]
            for name, parameter in model.named_parameters():
                original = before.get(name.replace(".base_layer", ""))
                is_trained = "lora_" in name if kind == "lora" else "embed" not in name and ".layers.0." not in name
                assert is_trained == (f"{name}.exp_avg" in shapes), name
                if original is not None:  # no adapter
                    assert torch.equal(parameter, original) != is_trained, name


def train_in_two_halves(rank: int, config: str, directory: str) -> None:
    how = ["parallel.ranks=2", f"deepspeed={PARTITION_ALL}", "optim.schedule_steps=4"]
    train(load(config, [*how, "train.steps=4", f"run.dir={directory}/whole"]))
    for steps in (2, 4):
        train(load(config, [*how, f"train.steps={steps}", f"run.dir={directory}/halves"]))


@pytest.mark.timeout(600)
def test_a_run_that_is_stopped_and_continued_equals_one_that_is_not(config: str, tmp_path: Path) -> None:
    run_world(train_in_two_halves, 2, config, str(tmp_path), timeout=500)
    whole, halves = rows_of(tmp_path / "whole"), rows_of(tmp_path / "halves")
    assert [(row["step"], row["loss"]) for row in halves] == [(row["step"], row["loss"]) for row in whole]
    ours, theirs = (load_step(tmp_path / name)[1].state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def make_tokenizer(place: Path, vocab: int) -> None:
    """A tokenizer of subwords, as ``save_pretrained`` writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["span carry halo scan relay past future piece " * 9], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(place)


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a model with a tokenizer (``model``), texts (``texts``) and a config (``small.yaml``) are."""
    place = tmp_path_factory.mktemp("subwords")
    make_tokenizer(save_tiny(place / "model", 280), 270)
    (place / "texts").mkdir()
    for number in range(12):
        (place / "texts" / f"{number}.txt").write_text("span carry halo scan relay past future piece " * 12)
    text = CONFIG.replace("data: {", f"data: {{source: {place}/texts, cache: {place}/packed, valid_fraction: 0.2, ")
    (place / "small.yaml").write_text(f"{text}model: {{pretrained: {place}/model}}\n", encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def trained(subwords: Path) -> Path:
    """A directory with runs of three steps: ``whole``, and ``lora`` with adapters. The model has been moved since."""
    runs = [[*what, "train.steps=3", f"run.dir={subwords}/{name}"] for name, what in (("whole", []), ("lora", LORA))]
    run_world(train_each, 1, str(subwords / "small.yaml"), runs, timeout=250)
    return subwords


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def test_what_is_exported_is_loaded_by_transformers(trained: Path, tmp_path: Path) -> None:
    """The same logits and texts, the tokenizer beside; an export replaces another one, and nothing else."""
    tokens = torch.randint(0, 270, (2, 40))
    out = tmp_path / "out"
    model, step = export(trained / "whole", out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert step == 3 and theirs.dtype == torch.float32
    torch.testing.assert_close(model(tokens), logits_of(theirs, tokens), rtol=1e-5, atol=1e-5)
    before = transformers.AutoModelForCausalLM.from_pretrained(trained / "model")
    assert not torch.allclose(logits_of(before, tokens), logits_of(theirs, tokens), atol=1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("span carry").input_ids == list(vocabulary_of(trained / "whole", model).encode_text(b"span carry"))
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "as readable as any file"
    export(trained / "whole", out)
    (out / "mine.txt").write_text("text")
    with pytest.raises(InputError, match="something else than an export"):
        export(trained / "whole", out)


def test_a_run_and_its_export_are_evaluated_and_continued_alike(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the commands; greedily, the text is that of transformers' own generation."""
    export(trained / "whole", tmp_path / "out")
    text = trained / "texts" / "0.txt"
    scores = [evaluate(place, [str(text)]).score.whole for place in (trained / "whole", tmp_path / "out")]
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6) and 500 < scores[0].num_bytes < 540
    assert evaluate(trained / "whole").score.whole.num_tokens > 0
    said = []
    for place in (trained / "whole", tmp_path / "out"):
        words = ["generate", str(place), "--prompt", "span carry", "--tokens", "6", "--temperature", "0"]
        assert cli.main([*words, "--device", "cpu", "--carry-out", str(tmp_path / "carry")]) == 0
        said.append(capsys.readouterr().out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = model.generate(**tokenizer("span carry", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert said == [f"{tokenizer.decode(ids[0])}\n"] * 2
    again = Decoder.load(load_run(tmp_path / "out")[1], tmp_path / "carry")  # a carry fits the run and its export
    assert again.rows == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_adapters_are_exported_as_peft_loads_them(trained: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokens = torch.randint(0, 270, (2, 40))
    model, _ = export(trained / "lora", tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "model.safetensors").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(trained / "model")
    plain = logits_of(base, tokens)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(model(tokens), logits_of(adapted, tokens), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, logits_of(adapted, tokens), atol=1e-4)
    torch.testing.assert_close(load_run(tmp_path / "out")[1](tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert evaluate(tmp_path / "out", [str(trained / "texts" / "0.txt")]).score.whole.loss > 0


def test_a_run_does_not_need_the_directory_that_it_began_with(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "whole", tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace(str(trained / "model"), str(tmp_path / "gone")))
    tokens = torch.randint(0, 270, (1, 20))
    model, _ = export(tmp_path / "run", tmp_path / "out")
    assert torch.equal(model(tokens), load_step(trained / "whole")[1](tokens))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 270


def test_a_part_of_our_own_model_is_frozen(corpus: Path, tmp_path: Path) -> None:
    words = [f"data.source={corpus}", "data.seq_len=61", "train.steps=2", "model.width=16", "deepspeed=zero2"]
    words += ["train.validate_every=0", "monitor.sample_len=0", "optim.warmup_steps=0", "parallel.ranks=1"]
    frozen = [*words, "train.freeze=[embedding.*, blocks.0.*]", f"run.dir={tmp_path}/frozen"]
    run_world(train_each, 1, "quickstart", [frozen, [*words, f"run.dir={tmp_path}/whole"]])
    (_, some, _), (_, whole, _) = (load_step(tmp_path / name) for name in ("frozen", "whole"))
    torch.manual_seed(0)
    start = build_model(some.config)
    for (name, value), other, first in zip(some.named_parameters(), whole.parameters(), start.parameters()):
        assert torch.equal(value, first) == name.startswith(("embedding.", "blocks.0.")), name
        assert not torch.equal(other, first), name


def test_verify_compares_the_parts_of_its_layers(config: str) -> None:
    found = load(config, ["data.source=nothing"])
    assert sorted(groups(found)) == ["embedding", "head", "linear_attn", "loss", "mlp", "norms", "self_attn"]
    found.data.seq_len = 33
    rows = verify(found, 2)
    assert [str(row) for row in rows if not row.good] == []
    assert [(row.precision, row.ranks, row.streamed) for row in rows[:2]] == [("fp64", 1, True), ("fp32", 1, True)]


def test_a_dry_run_knows_its_shape(tiny: Path) -> None:
    """Without weights and without the data; with adapters, fewer gradients and less state."""
    words = [f"model.architecture={tiny}", "parallel.ranks=4", "data.source=nothing", "data.seq_len=61"]
    found, adapted = (run_world(plan_one, 1, [*words, *what])[0] for what in ([], LORA))
    assert found.num_parameters == 42_224 and found.needed is not None and adapted.needed is not None
    assert {line.purpose for line in found.exchanges} >= {"scan", "halo", "by_channel", "ZeRO"}
    assert adapted.needed.optimizer < found.needed.optimizer / 10
    assert adapted.needed.gradients < found.needed.gradients / 10


def plan_one(rank: int, words: list[str]) -> Any:
    return plan(load("quickstart", words))


def test_the_shape_of_a_config_is_that_of_the_directory(config: str, tiny: Path, tmp_path: Path) -> None:
    """Also written and read again; on the command line it replaces the model of a file."""
    found = load(config)
    model = found.model
    assert (model.vocab, model.width, model.depth, model.mixers) == (256, 32, 3, ["olmo_hybrid"])
    assert model.ffn_ratio == 1.5 and found.data.tokenizer == ""
    (tmp_path / "again.yaml").write_text(to_yaml(found))
    again = load(tmp_path / "again.yaml", [f"run.dir={found.run.dir}"])
    assert again == found
    assert load("quickstart", [f"model.pretrained={tiny}"]).model == model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.width=64"], "model.width = 64: is of our own models"),
        (["model.mixers=[softmax]"], "model.mixers"),
        (["model.pretrained={tiny}", "model.architecture={tiny}"], "cannot be given beside model.pretrained"),
        (["model.pretrained=nowhere"], "must be a local directory with the config.json of transformers"),
        (["model.pretrained={empty}"], "holds no weights"),
        (["model.pretrained=", "model.lora.rank=2"], "is for model.pretrained and model.architecture"),
        (["train.compile=true"], "train.compile"),
        (["model.pretrained={other}"], "writes one"),
    ],
)
def test_a_mistake_is_told_in_one_line(config: str, tiny: Path, tmp_path: Path, words: list[str], message: str) -> None:
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny / "config.json", tmp_path / name)
    shutil.copy(tiny / "model.safetensors", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.model").touch()
    places = {"tiny": tiny, "empty": tmp_path / "empty", "other": tmp_path / "other"}
    with pytest.raises(InputError) as caught:
        load(config, [word.format(**places) for word in words])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.freeze=[blocks.*]"], "matches no parameter"),
        (["train.freeze=['*']"], "leaves no parameter"),
        (["model.lora.rank=2", "model.lora.targets=[nothing]"], "peft cannot adapt them"),
    ],
)
def test_what_cannot_be_trained_is_told(config: str, words: list[str], message: str) -> None:
    found = load(config, words)
    with pytest.raises(InputError, match=message), torch.device("meta"):
        freeze(build_model(found.model), found.train.freeze)


def test_a_tokenizer_that_does_not_fit_is_told(subwords: Path, corpus: Path, tiny: Path, tmp_path: Path) -> None:
    """A corpus of bytes for a model of subwords, and a tokenizer with more tokens than the model."""
    found = load(subwords / "small.yaml", [f"data.source={corpus}", "data.cache="])
    assert found.data.tokenizer == str(subwords / "model" / "tokenizer.json")
    with pytest.raises(InputError, match="packed as other bytes than those of the model's tokenizer"):
        open_task(found.task, found.data).configure_model(found.model)
    shutil.copytree(tiny, tmp_path / "model")
    make_tokenizer(tmp_path / "model", 270)
    found = load(subwords / "small.yaml", [f"model.pretrained={tmp_path}/model", f"data.cache={tmp_path}/packed"])
    kind_of(found.task).prepare(found.data)
    with pytest.raises(InputError, match=r"must be at least 270.*with the model's own tokenizer"):
        open_task(found.task, found.data).configure_model(found.model)


def test_adapters_are_of_all_linear_layers_but_the_output_unless_they_are_named(config: str) -> None:
    plain = build_model(load(config).model)
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    for targets, wanted in (([], linear - {"model.lm_head"}), (["q_proj"], {x for x in linear if "q_proj" in x})):
        model = build_model(load(config, ["model.lora.rank=2", f"model.lora.targets={json.dumps(targets)}"]).model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {f"{name}.lora_{part}.default.weight" for name in wanted for part in "AB"}
