"""Genomes: letters out of the loss, soft-masking, and the reverse complement."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed_world import run_world

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.data import FILLER, IGNORE, Batches, Index, SequenceDataset, TokenStream, pack
from longreach.framework.data.nucleotides import complement_of
from longreach.framework.inference.evaluate import evaluate
from longreach.framework.tasks import open_task
from longreach.framework.trainer import train

COMPLEMENT = str.maketrans("ACGTNacgtn", "TGCANtgcan")
CONFIG = """
model: {width: 16, depth: 1, mixers: [elementwise]}
data: {source: SOURCE, seq_len: 24, batch_size: 2}
optim: {lr: 1.0e-2, schedule_steps: 6}
train: {steps: 6, threads: 1}
monitor: {tensorboard: false, plot: false}
"""


def fasta(path: Path, *sequences: str) -> str:
    path.write_text("".join(f">s{number}\n{text}\n" for number, text in enumerate(sequences)))
    return str(path)


def packed(folder: Path, *sequences: str, name: str = "packed", **options: Any) -> Index:
    options = {"valid_fraction": 0, **options}
    return pack(fasta(folder / f"{name}.fa", *sequences), folder / name, name=name, **options)


def text_of(tokens: torch.Tensor) -> str:
    return "".join(chr(token) if token != IGNORE else "_" for token in tokens.tolist())


def test_masked_letters_are_context_and_no_labels(tmp_path: Path) -> None:
    index = packed(tmp_path, "ACNNGTA", "NNCG", mask="N")
    dataset = SequenceDataset(TokenStream(index, "train"), 5, seed=None)
    rows = [tuple(map(text_of, dataset.sequence(number)[:2])) for number in range(len(dataset))]
    assert rows == [("ACNNG", "C__GT"), ("TANNC", "A__CG")]
    split = Index.load(tmp_path / "packed").splits["train"]
    assert (split.num_tokens, split.num_masked, split.num_bytes) == (11, 4, 7)
    apart = SequenceDataset(TokenStream(index, "train"), 5, seed=None, packing="documents")
    assert [text_of(apart.sequence(number)[1]) for number in range(len(apart))] == ["C__GT", "A__CG"]


def test_windows_of_nothing_but_masked_letters_are_left_out(tmp_path: Path) -> None:
    """The first token of the stream is no label, and the last of a window's labels is the next window's first token."""
    index = packed(tmp_path, "ACGTACGT" + "N" * 17 + "ACGTACG", mask="N")
    stream = TokenStream(index, "train")
    dataset = SequenceDataset(stream, 4, seed=None)
    rows = [text_of(dataset.sequence(number)[1]) for number in range(len(dataset))]
    assert rows == ["CGTA", "CGT_", "ACGT", "ACG_"]
    labels = "".join(rows).replace("_", "")
    assert labels == "CGTACGT" + "ACGTACG"
    assert text_of(dataset.sequence(FILLER)[1]) == "____"
    for seq_len in range(1, 12):
        found = SequenceDataset(stream, seq_len, seed=None)
        rows = [text_of(found.sequence(number)[1]) for number in range(len(found))]
        assert "".join(rows).replace("_", "") == labels and all(row.strip("_") for row in rows), seq_len
    with pytest.raises(InputError, match="holds only masked tokens in its split train"):
        SequenceDataset(TokenStream(packed(tmp_path, "NNNN", name="none", mask="n"), "train"), 2, seed=None)


@pytest.mark.parametrize(
    ("case", "mask", "content", "labels"),
    [
        ("upper", "", "ACGTNNAC", "CGTNNAC"),
        ("keep", "", "ACgtNnAC", "CgtNnAC"),
        ("keep", "N", "ACgtNnAC", "Cgt__AC"),
        ("mask", "", "ACgtNnAC", "C__N_AC"),
        ("mask", "N", "ACgtNnAC", "C____AC"),
    ],
)
def test_lower_case_is_made_capitals_kept_or_kept_out_of_the_loss(
    case: Any, mask: str, content: str, labels: str, tmp_path: Path
) -> None:
    index = packed(tmp_path, "ACgtNnAC", case=case, mask=mask)
    tokens, found, _ = SequenceDataset(TokenStream(index, "train"), 7, seed=None).sequence(0)
    assert (text_of(tokens), text_of(found)) == (content[:7], labels)
    assert (index.case, bool(index.masked)) == (case, "_" in labels)


def test_what_was_packed_before_is_used_again_and_other_options_are_not_mixed_up(tmp_path: Path) -> None:
    first = packed(tmp_path, "ACgtNN")
    assert "masked" not in json.loads((tmp_path / "packed" / "index.json").read_text())
    assert packed(tmp_path, "ACgtNN").fingerprint == first.fingerprint
    for options in ({"mask": "N"}, {"case": "keep"}):
        with pytest.raises(InputError, match=f"was packed from something else \\(.*{next(iter(options))}"):
            packed(tmp_path, "ACgtNN", **options)
    other = packed(tmp_path, "ACgtNN", name="other", mask="N", case="keep")
    (tmp_path / "other.fa").touch()  # newer than the index: contents are compared
    assert packed(tmp_path, "ACgtNN", name="other", mask="nN", case="keep").fingerprint == other.fingerprint


def test_a_mask_is_of_letters_and_not_of_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.mask = 'N-': must be letters"):
        packed(tmp_path, "ACGT", mask="N-")
    with pytest.raises(InputError, match=r"data\.mask = 'N1': must be letters"):
        load("genome", ["data.mask=N1"])
    np.save(tmp_path / "ids.npy", np.arange(10))
    with pytest.raises(InputError, match="token ids, which have no letters"):
        pack(str(tmp_path / "ids.npy"), tmp_path / "ids", name="ids", mask="N", valid_fraction=0)
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(InputError, match=r"data\.case = 'keep': is for FASTA files"):
        pack(str(tmp_path / "text.txt"), tmp_path / "text", name="text", case="keep")


def test_subwords_of_nothing_but_masked_letters_are_masked(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choice("ACGT") for _ in range(400)) + "N" * 64 for _ in range(8)]
    index = packed(tmp_path, *texts, vocab=300, mask="N")
    vocabulary = index.open_vocabulary()
    masked = {"".join(vocabulary.decode([token])) for token in index.masked}
    assert "N" in masked and all(set(text) == {"N"} for text in masked if "n" not in text)
    split = index.splits["train"]
    assert 0 < split.num_masked < split.num_tokens
    stream = TokenStream(index, "train")
    tokens = stream.read(0, stream.num_tokens)
    assert split.num_masked == np.isin(tokens, index.masked).sum()
    sizes = [len("".join(vocabulary.decode([int(token)]))) for token in tokens if token not in index.masked]
    assert split.num_bytes == sum(sizes)
    assert index.bits_per_byte(math.log(2), "train") == pytest.approx(len(sizes) / sum(sizes))


def test_baselines_are_of_the_letters_in_the_loss(tmp_path: Path) -> None:
    text = ("ACGT" * 25 + "N" * 300) * 8
    bits = [
        packed(tmp_path, text, name=name, mask=mask, valid_fraction=0.5).baselines["order0"]
        for name, mask in (("all", ""), ("labels", "N"))
    ]
    assert bits[0] < 1.5 and bits[1] == pytest.approx(2.0, abs=0.05)


def test_the_other_strand_has_the_labels_of_its_own_direction(tmp_path: Path) -> None:
    text = "AACGTTNGATTACAGG"
    index = packed(tmp_path, text[:9], text[9:], mask="N")
    for packing in ("stream", "documents"):
        dataset = SequenceDataset(TokenStream(index, "train"), 6, seed=1, packing=packing, both_strands=True)
        for number in range(len(dataset)):
            start = 6 * number
            window = text[start : start + 7]
            expected = window[::-1].translate(COMPLEMENT)
            tokens, labels, segments = dataset.sequence(number + len(dataset))
            length = min(6, len(text) - start)
            assert text_of(tokens)[:length] == expected[:length]
            shown = [*expected[1 : length + 1].replace("N", "_").ljust(6, "_")]
            if segments is not None:
                assert segments.tolist() == sorted(segments.tolist())
                ends = [at for at in range(5) if segments[at] != segments[at + 1]]
                for at in ends:
                    shown[at] = "_"
                if start < 9 <= start + 6:
                    assert length - (9 - start) + (len(window) > length) - 1 in ends
            assert text_of(labels) == "".join(shown)


def test_half_of_the_sequences_are_read_as_the_other_strand_the_same_ones_on_any_number_of_ranks(
    tmp_path: Path,
) -> None:
    draw = random.Random(0)
    index = packed(tmp_path, "".join(draw.choice("ACGT") for _ in range(4001)))

    def dataset() -> SequenceDataset:
        return SequenceDataset(TokenStream(index, "train"), 10, seed=5, both_strands=True)

    found = dataset()
    epochs = [[found.window(position) for position in range(first, first + 400)] for first in (0, 400)]
    strands = [{number % 400: number >= 400 for number in epoch} for epoch in epochs]
    for epoch, strand in zip(epochs, strands, strict=True):
        assert sorted(number % 400 for number in epoch) == [*range(400)]
        assert 160 < sum(strand.values()) < 240
    assert 120 < sum(strands[0][number] != strands[1][number] for number in range(400)) < 280
    whole = [batch.tokens for batch in Batches(dataset(), 4, micro_batch_size=4).iterate(380, 20)]
    ranks = [list(Batches(dataset(), 4, data_rank=rank, num_data_ranks=2).iterate(380, 20)) for rank in range(2)]
    for step, tokens in enumerate(whole):
        parts = [batch.tokens for rank in ranks for batch in rank[2 * step : 2 * step + 2]]
        assert torch.equal(tokens, torch.cat(parts))
    resumed = [batch.tokens for batch in Batches(dataset(), 4, micro_batch_size=4).iterate(420, 10)]
    assert all(map(torch.equal, whole[10:], resumed))


def test_the_complement_of_every_code_of_dna_and_rna() -> None:
    dna = complement_of([*b"ACGTRYSWKMBDHVNacgtn.-"], "genome")
    assert bytes(dna[[*b"ACGTRYSWKMBDHVNacgtn.-"]].tolist()) == b"TGCAYRSWMKVHDBNtgcan.-"
    assert bytes(dna[dna[[*b"ACGTRYSWKMBDHVNacgtn.-"]]].tolist()) == b"ACGTRYSWKMBDHVNacgtn.-"
    rna = complement_of([*b"ACGUN"], "transcripts")
    assert bytes(rna[[*b"ACGUN"]].tolist()) == b"UGCAN"


def test_only_nucleotides_have_a_reverse_complement(corpus: Path, tmp_path: Path) -> None:
    words = ["data.reverse_complement=true", "data.seq_len=16"]
    config = load("genome", [f"data.source={corpus}", *words])
    with pytest.raises(InputError) as error:
        open_task(config.task, config.data)
    assert re.match(
        r"data\.reverse_complement = True: needs a corpus of nucleotides, and words holds ' ", str(error.value)
    )
    np.save(tmp_path / "ids.npy", np.arange(100))
    pack(str(tmp_path / "ids.npy"), tmp_path / "ids", name="ids", valid_fraction=0)
    config = load("genome", [f"data.source={tmp_path}/ids", *words])
    with pytest.raises(InputError, match="needs the bytes of nucleotides, and ids has other tokens"):
        open_task(config.task, config.data)


def test_a_mask_other_than_that_of_the_packed_corpus_is_refused(tmp_path: Path) -> None:
    packed(tmp_path, "ACGTACGTNN", mask="N", case="keep")
    words = [f"data.source={tmp_path}/packed", "data.seq_len=4"]
    for same in ([], ["data.mask=N", "data.case=keep"]):
        config = load("genome", [*words, *same])
        open_task(config.task, config.data)
        assert (config.data.mask, config.data.case) == ("Nn", "keep")
    config = load("genome", [*words, "data.mask=R", "data.case=keep"])
    with pytest.raises(InputError, match=r"data\.mask = 'R': is not how .* was packed: mask='Nn', case=keep"):
        open_task(config.task, config.data)


def test_a_split_of_masked_letters_alone_is_as_if_nothing_were_held_out(tmp_path: Path) -> None:
    packed(tmp_path, "ACGT" * 50 + "N" * 200, mask="N", valid_fraction=0.4)
    config = load("genome", [f"data.source={tmp_path}/packed", "data.seq_len=16"])
    task = open_task(config.task, config.data)
    assert task.splits == ("train",) and len(task.sequences("train", None)) == 13


def train_genome(rank: int, config: str, directory: str) -> list[Any]:
    results = []
    for name, steps in (("whole", 6), ("halves", 3), ("halves", 6)):
        words = [f"run.dir={directory}/{name}", f"train.steps={steps}", "data.reverse_complement=true"]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            result = train(load(config, words))
        results.append((result.held_out, said.getvalue()))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train(load(config, [f"run.dir={directory}/halves", "train.steps=7"]))
    return [*results, (None, said.getvalue())]


def test_a_genome_is_trained_resumed_and_evaluated_on_its_labels_alone(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choice("ACGTacgt") for _ in range(90)) + "N" * 60 for _ in range(12)]
    source = fasta(tmp_path / "genome.fa", *texts)
    index = pack(source, tmp_path / "packed", name="genome", valid_fraction=0.3, mask="N", case="keep")
    config = tmp_path / "genome.yaml"
    config.write_text(CONFIG.replace("SOURCE", str(tmp_path / "packed")))
    ((whole, halves, again, changed),) = run_world(train_genome, 1, str(config), str(tmp_path))
    rows = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "halves")
    ]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1][:6]]
    assert again[0] == whole[0] and "not an exact resume" not in halves[1] + again[1]
    assert "not an exact resume: data.reverse_complement was True and is False" in changed[1]
    found = evaluate(tmp_path / "whole").score.whole
    split = index.splits["valid"]
    assert found.loss == pytest.approx(whole[0], rel=1e-5)
    assert found.num_tokens == split.num_tokens - split.num_masked - 1 == found.num_bytes
    documents = evaluate(tmp_path / "whole", by_document=True).score
    assert documents.whole.num_tokens == found.num_tokens - split.num_documents + 1
    held_out = [texts[int(key.rpartition("s")[2])] for key in split.keys]
    files = evaluate(tmp_path / "whole", [fasta(tmp_path / "held_out.fa", *held_out)]).score
    assert files.whole.num_tokens == documents.whole.num_tokens == files.whole.num_bytes
    assert files.whole.loss == pytest.approx(documents.whole.loss, rel=1e-6)
