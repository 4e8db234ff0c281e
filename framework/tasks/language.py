"""Language modelling: predicts the next token of a corpus."""

from __future__ import annotations

from pathlib import Path

from ..data import DataConfig, Index, Sequences, check_labels, packed_dir, prepare, save_vocabulary, sequences_of
from ..model import ModelConfig
from .task import Task, TaskConfig, check_causal, set_model_fields


class Language(Task):
    """Language modelling on the packed documents of ``data.source``.

    Attributes:
        index: of the packed corpus.
    """

    has_metrics = False
    splits: tuple[str, ...] = ("train", "valid")

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.index = Index.load(packed_dir(data), verify=False, timeout=data.timeout)
        self.title = self.index.name
        if not self.index.splits["valid"].num_tokens:
            self.splits = ("train",)
        check_labels(self.index, data)

    @classmethod
    def prepare(cls, data: DataConfig) -> None:
        prepare(data)

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    def configure_model(self, model: ModelConfig) -> None:
        check_causal(model, "language")
        set_model_fields(model, "language", channels=0, head="token", outputs=0, documents=1)
        model.vocab = model.vocab or int(self.index.vocabulary["size"])
        self.index.check_vocab(model.vocab)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        return sequences_of(self.index, self.data, split, seed)

    def write_run_files(self, run_dir: Path) -> None:
        save_vocabulary(self.index.open_vocabulary(), run_dir)

    def introduction(self) -> str:
        return f"{self.index.splits['train'].num_tokens:,} training tokens in {self.index.name}"
