"""Retrieval: classifies whether two excerpts of a packed corpus are from the same document."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..data import DataConfig, Index, Sequences, TokenStream, packed_dir, prepare, save_vocabulary
from ..model import ModelConfig
from .description import TaskDescription
from .task import Examples, Rows, Task, TaskConfig, digest_of, padded_sequence, set_model_fields

log = logging.getLogger("longreach.data")


class Retrieval(Task):
    """Classifies pairs of excerpts from the documents of ``data.source``, each half a sequence long.

    They are from the same document without overlap (class 1), or from two (class 0), with equal probability. Each
    excerpt has a segment of its own, so its tokens do not see the other one; the head compares the features of both.
    Validation and test use the held-out documents. Documents shorter than two excerpts are left out.

    Attributes:
        summary: one line: how many documents are long enough.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.index = Index.load(packed_dir(data), verify=False, timeout=data.timeout)
        self.title = f"excerpts of {self.index.name}"
        self.half = data.seq_len // 2
        self.streams = {"train": TokenStream(self.index, "train", data.timeout)}
        self.streams["valid"] = self.streams["test"] = TokenStream(self.index, "valid", data.timeout)
        self.long = {
            split: np.flatnonzero(stream.split.length >= 2 * self.half) for split, stream in self.streams.items()
        }
        for split, found in self.long.items():
            if len(found) < 2 or not self.half:
                allowed = f"must be at most the length of two documents of the {split} split, and at least 2"
                raise InputError("data.seq_len", data.seq_len, allowed, "shorter sequences, or more long documents")
        self.baseline_metrics = {"accuracy": 0.5}
        long = [f"{len(self.long[split]):,} of {self.streams[split].num_documents:,}" for split in ("train", "valid")]
        enough = f"long enough for two excerpts of {self.half:,} tokens"
        self.summary = f"{self.index.name}: {enough}: {long[0]} documents to train on, {long[1]} held-out ones"
        log.info("%s", self.summary)

    @classmethod
    def prepare(cls, data: DataConfig) -> None:
        prepare(data)

    def describe(self) -> TaskDescription:
        return TaskDescription("retrieval", self.data.seq_len, classes=["different", "same"])

    def write_run_files(self, run_dir: Path) -> None:
        super().write_run_files(run_dir)
        save_vocabulary(self.index.open_vocabulary(), run_dir)

    @property
    def fingerprint(self) -> str:
        return digest_of(self.task, self.data.seq_len, self.index.fingerprint)

    def configure_model(self, model: ModelConfig) -> None:
        vocab = int(self.index.vocabulary["size"])
        set_model_fields(model, "retrieval", channels=0, vocab=vocab, head="class", outputs=2, documents=2)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        count = self.task.examples if split == "train" else self.task.test_examples
        return Examples(partial(self._make, split), count, seed)

    def _make(self, split: str, number: int) -> Rows:
        random = np.random.RandomState([self.task.seed, self.splits.index(split), number])
        stream, half = self.streams[split], self.half
        documents = random.choice(self.long[split], 2, replace=False)
        same = random.randint(2)
        # [document, excerpt]: offsets of an earlier and a later excerpt of each document. They are distributed alike in
        # both classes, so that neither excerpt alone is evidence of the class.
        spare = stream.split.length[documents] - 2 * half
        offsets = np.sort([random.randint(most + 1, size=2) for most in spare]) + np.array([0, half])
        first, second = (0, 0), (0 if same else 1, 1)
        starts = [int(stream.starts[documents[which]] + offsets[which, place]) for which, place in (first, second)]
        excerpts = [stream.read(start, start + half).astype(np.int64) for start in starts]
        return padded_sequence(excerpts, same, self.data.seq_len)
