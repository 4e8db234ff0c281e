"""Several sources: in which order sequences are read, that a resumed run reads the same, and losses by source."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import run_world

from longreach.errors import InputError
from longreach.framework.config import load, to_yaml
from longreach.framework.data import FILLER, Batches, Mixture, Sequences, corpora, pack
from longreach.framework.data.mixture import CYCLE
from longreach.framework.inference.evaluate import evaluate
from longreach.framework.tasks import open_task
from longreach.framework.trainer import train

CONFIG = """
model: {width: 16, depth: 1, mixers: [elementwise]}
data:
  sources:
    words: {source: WORDS, weight: 0.75}
    digits: {source: DIGITS, weight: 0.25}
  seq_len: 31
  batch_size: 4
optim: {lr: 1.0e-2}
train: {steps: 6, threads: 1, validate_every: 3, validate_batches: 2}
monitor: {tensorboard: false, plot: false}
"""


class Numbered(Sequences):
    """Sequences whose tokens are their own numbers, from ``first`` on."""

    def __init__(self, first: int, count: int, seed: int | None) -> None:
        super().__init__(seed)
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def sequence(self, window: int) -> tuple[torch.Tensor, torch.Tensor, None]:
        tokens = torch.tensor([self.first + window])
        return tokens, tokens, None


def mixture(seed: int | None = 3) -> Mixture:
    parts = {"a": Numbered(0, 30, seed), "b": Numbered(100, 7, seed), "c": Numbered(200, 500, seed)}
    return Mixture(parts, {"a": 6.0, "b": 3.0, "c": 1.0}, seed)


def test_shares_are_kept_at_any_position_and_each_source_has_its_own_epochs() -> None:
    found = mixture()
    drawn = [int(found.sequence(found.window(position))[0]) for position in range(2 * CYCLE)]
    letters = ["abc"[number // 100] if number < 200 else "c" for number in drawn]
    counts = collections.Counter[str]()
    for position, letter in enumerate(letters, 1):
        counts[letter] += 1
        for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
            assert abs(counts[name] - share * position) < 2, f"{name} at {position}"
    for first, count, name in ((0, 30, "a"), (100, 7, "b"), (200, 500, "c")):
        own = [number for number, letter in zip(drawn, letters, strict=True) if letter == name]
        epochs = [own[at : at + count] for at in range(0, len(own) - count + 1, count)]
        assert all(sorted(epoch) == [*range(first, first + count)] for epoch in epochs)
        assert epochs[0] != epochs[1], "each epoch has an order of its own"
    assert found.epochs(2 * CYCLE) == pytest.approx({"a": 12000 / 30, "b": 6000 / 7, "c": 2000 / 500})
    assert found.epochs(7) == pytest.approx({n: letters[:7].count(n) / c for n, c in (("a", 30), ("b", 7), ("c", 500))})


def test_the_order_does_not_depend_on_ranks_or_the_position_from_which_it_is_read() -> None:
    def read(ranks: int, micro: int, position: int, steps: int) -> list[list[int]]:
        shares = [
            list(
                Batches(mixture(), 8, micro_batch_size=micro, data_rank=rank, num_data_ranks=ranks).iterate(
                    position, steps
                )
            )
            for rank in range(ranks)
        ]
        per_step = 8 // ranks // micro
        return [
            [
                int(token)
                for share in shares
                for batch in share[step * per_step : (step + 1) * per_step]
                for token in batch.tokens
            ]
            for step in range(steps)
        ]

    whole = read(1, 8, 0, 9)
    assert whole == read(2, 2, 0, 9) == read(4, 1, 0, 9)
    assert whole[4:] == read(2, 4, 4 * 8, 5)
    assert whole[0] != read(1, 8, 8, 1)[0]


def test_held_out_sequences_are_read_once_one_source_after_the_other() -> None:
    found = mixture(seed=None)
    numbers = [found.window(position) for position in range(538)]
    drawn = [int(found.sequence(number)[0]) for number in numbers[:537]]
    assert drawn == [*range(30), *range(100, 107), *range(200, 700)] and numbers[537] == FILLER


def test_weights_that_cannot_be_kept() -> None:
    with pytest.raises(InputError, match=r"data\.sources\.b\.weight = 1e-05: must be at least 1/10,000 of the sum"):
        Mixture({"a": Numbered(0, 3, 0), "b": Numbered(5, 3, 0)}, {"a": 1.0, "b": 1e-5}, 0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """Two packed corpora of bytes, and one of token ids."""
    folder, draw = tmp_path_factory.mktemp("sources"), random.Random(1)
    (folder / "texts").mkdir()
    for number in range(20):
        text = "".join(draw.choice("0123456789 ") for _ in range(100))
        (folder / "texts" / f"{number:02}.txt").write_text(text)
    pack(str(folder / "texts"), folder / "digits", name="digits", valid_fraction=0.2)
    import numpy as np

    np.save(folder / "ids.npy", np.arange(2000).reshape(20, 100))
    pack(str(folder / "ids.npy"), folder / "ids", name="ids")
    return {"WORDS": corpus, "DIGITS": folder / "digits", "IDS": folder / "ids"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]) -> str:
    path, text = tmp_path_factory.mktemp("config") / "mixed.yaml", CONFIG
    for name, folder in sources.items():
        text = text.replace(name, str(folder))
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows_of(run_dir: str | Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]


def train_runs(rank: int, config: str, directory: str, layout: list[str]) -> list[str]:
    """One run without an interruption, one with, and one that goes on with other weights."""
    said = []
    every = ["optim.schedule_steps=6", *layout]
    for name, words in (
        ("whole", []),
        ("halves", ["train.steps=4"]),
        ("halves", []),
        ("other", ["train.steps=4"]),
        ("other", ["data.sources.digits.weight=0.5"]),
    ):
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            train(load(config, [f"run.dir={directory}/{name}", *every, *words]))
        said.append(printed.getvalue())
    return said


@pytest.mark.timeout(300)
def test_a_resumed_run_reads_on_in_every_source_and_another_layout_reads_the_same(
    config: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    (said,) = run_world(train_runs, 1, config, str(tmp_path / "one"), ["parallel.ranks=1"])
    run_world(train_runs, 2, config, str(tmp_path / "two"), ["parallel.ranks=2", "parallel.sequence=1"])
    whole = rows_of(tmp_path / "one" / "whole")
    assert len(whole) == 6
    for run in ("one/halves", "two/whole", "two/halves"):
        found = rows_of(tmp_path / run)
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in whole], rel=1e-5), run
    index = {name: json.loads((folder / "index.json").read_text()) for name, folder in sources.items()}
    digits, words = (index[name]["splits"]["train"]["num_tokens"] for name in ("DIGITS", "WORDS"))
    first = said[0].splitlines()[0]
    assert f"training tokens: {digits:,} in digits (weight 0.25), {words:,} in words (weight 0.75)" in first
    epochs = {
        name: count / -(-(tokens - 1) // 31) for name, count, tokens in (("digits", 6, digits), ("words", 18, words))
    }
    assert f"6 steps or {epochs['digits']:,.3g} epochs of digits, {epochs['words']:,.3g} epochs of words" in first
    assert "not an exact resume" not in "".join(said[:4])
    assert "not an exact resume: data.sources was {'words': 0.75, 'digits': 0.25} and is" in said[4]


def train_once(rank: int, config: str, directory: str) -> tuple[float | None, dict[str, float]]:
    result = train(load(config, [f"run.dir={directory}", "train.validate_batches=0"]))
    return result.held_out, result.held_out_by_source


def test_held_out_losses_are_of_each_source_and_their_mean_by_weight(
    config: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    ((held_out, by_source),) = run_world(train_once, 1, config, str(tmp_path / "run"))
    assert held_out == pytest.approx(0.25 * by_source["digits"] + 0.75 * by_source["words"])
    row = rows_of(tmp_path / "run", "validation.jsonl")[-1]
    assert (row["loss/digits"], row["loss/words"]) == (by_source["digits"], by_source["words"])
    only = {
        name: evaluate(tmp_path / "run", overrides=[f"data.source={sources[name.upper()]}"]).score.whole
        for name in ("digits", "words")
    }
    for name, whole in only.items():
        assert whole.loss == pytest.approx(by_source[name], rel=1e-5), name
    both = evaluate(tmp_path / "run").score.whole
    counts = {name: whole.num_tokens for name, whole in only.items()}
    assert both.num_tokens == sum(counts.values())
    pooled = sum(only[name].loss * counts[name] for name in only) / both.num_tokens
    assert both.loss == pytest.approx(pooled, rel=1e-6)


def test_sources_of_another_vocabulary_are_refused(config: str, sources: dict[str, Path]) -> None:
    mixed = load(config, [f"data.sources.ids={{source: {sources['IDS']}}}"])
    with pytest.raises(InputError) as error:
        open_task(mixed.task, mixed.data)
    allowed = "must have the vocabulary of data.sources.digits: it has ids of 2000, and that one bytes of 256"
    assert str(error.value).startswith(f"data.sources.ids = '{sources['IDS']}': {allowed}; pack all with one tokenizer")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.sources.words.weight=0"], r"data\.sources\.words\.weight = 0\.0: must be a number above 0"),
        (["data.sources.a b={source: x}"], r"data\.sources\.a b = 'a b': must be a name of letters"),
        (["data.sources.more={weight: 1}"], r"data\.sources\.more\.source = '\?\?\?': mandatory"),
        (["task.name=retrieval"], r"data\.sources = \['words', 'digits'\]: is for task\.name=language alone"),
        (["data.sources.words.wieght=1"], r"data\.sources\.words\.wieght"),
    ],
)
def test_mistakes_in_sources(words: list[str], message: str, config: str) -> None:
    with pytest.raises(InputError, match=message):
        load(config, words)


def test_a_source_on_the_command_line_replaces_those_of_the_file(config: str) -> None:
    assert load(config, ["data.source=mine"]).data.sources == {}
    assert [*load(config, ["data.sources.words.weight=2"]).data.sources] == ["words", "digits"]


def test_a_configuration_with_sources_is_written_and_read_back(config: str, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(to_yaml(load(config)))
    assert load(tmp_path / "again.yaml").data == load(config).data


def test_each_source_is_packed_by_itself(tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "texts").mkdir()
        shutil.copy(config, Path(name, "texts", "file.yaml"))
    words = ["data.sources.words.source=a/texts", "data.sources.digits.source=b/texts"]
    with pytest.raises(InputError, match=r"data\.sources\.words = 'a/texts': would be packed into the same directory"):
        corpora(load(config, words).data)
    named = load(config, [*words, "data.sources.words.name=words"]).data
    assert [(one.source, one.name) for one in corpora(named).values()] == [("b/texts", ""), ("a/texts", "words")]
    cached = load(config, [*words, "data.cache=cache"]).data
    assert {name: one.cache for name, one in corpora(cached).items()} == {
        "digits": "cache/digits",
        "words": "cache/words",
    }
