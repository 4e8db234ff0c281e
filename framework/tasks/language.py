"""Language modelling: predicts the next token of a corpus."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..data import (
    DataConfig,
    Index,
    Mixture,
    Parts,
    Sequences,
    TokenStream,
    corpora,
    dataset_of,
    masked_letters,
    packed_dir,
    prepare,
    save_vocabulary,
)
from ..model import ModelConfig
from ..model.directory import directory_of
from ..runtime.files import digest
from .task import Task, TaskConfig, check_causal, digest_of, set_model_fields


class Language(Task):
    """Language modelling on the packed documents of ``data.source``, or of ``data.sources``.

    Attributes:
        corpora: the configuration of each source; see `data.corpora`.
        indices: of the packed corpora, by the same names.
        streams: their tokens, by name and split.
    """

    has_metrics = False
    splits: tuple[str, ...] = ("train", "valid")

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.corpora = corpora(data)
        self.indices = {
            name: Index.load(packed_dir(one), verify=False, timeout=data.timeout) for name, one in self.corpora.items()
        }
        self.title = ", ".join(index.name for index in self.indices.values())
        held_out = [index.splits["valid"] for index in self.indices.values()]
        if not any(split.num_tokens > split.num_masked for split in held_out):
            self.splits = ("train",)
        _check_vocabularies(self.indices)
        for name, one in self.corpora.items():
            _check_mask(self.indices[name], one)
        if not data.sources:  # for what reads the run's configuration later
            data.mask, data.case = self.indices[""].mask, self.indices[""].case
        self.streams = {
            (name, split): TokenStream(index, split, data.timeout)
            for name, index in self.indices.items()
            for split in self.splits
            if split == "train" or index.splits[split].num_tokens > index.splits[split].num_masked
        }
        for split in self.splits:
            self.sequences(split, None)  # checks that there are labels

    @classmethod
    def prepare(cls, data: DataConfig) -> None:
        for one in corpora(data).values():
            prepare(one)

    @property
    def fingerprint(self) -> str:
        if not self.data.sources:
            return self.indices[""].fingerprint
        return digest_of(self.task, {name: index.fingerprint for name, index in self.indices.items()})

    def configure_model(self, model: ModelConfig) -> None:
        check_causal(model, "language")
        set_model_fields(model, "language", channels=0, head="token", outputs=0, documents=1)
        index = next(iter(self.indices.values()))
        model.vocab = model.vocab or int(index.vocabulary["size"])
        is_foreign = directory_of(model) is not None
        index.check_vocab(model.vocab, "pack it with the model's own tokenizer" if is_foreign else "")
        if is_foreign and self.data.tokenizer:
            _check_tokenizer(self.indices, Path(self.data.tokenizer))

    def sequences(self, split: str, seed: int | None) -> Sequences:
        parts = {
            name: dataset_of(self.streams[name, split], self.corpora[name], seed)
            for name in self.indices
            if (name, split) in self.streams
        }
        if not self.data.sources:
            return parts[""]
        return Mixture(parts, {name: one.weight for name, one in self.data.sources.items()}, seed)

    def shorter(self, seq_len: int, seed: int) -> Sequences:
        return Parts(self.sequences("train", seed), self.data.seq_len // seq_len)

    def write_run_files(self, run_dir: Path) -> None:
        save_vocabulary(next(iter(self.indices.values())).open_vocabulary(), run_dir)

    def introduction(self) -> str:
        train = {name: f"{index.splits['train'].num_tokens:,}" for name, index in self.indices.items()}
        if not self.data.sources:
            return f"{train['']} training tokens in {self.title}"
        parts = [f"{count} in {name} (weight {self.data.sources[name].weight:g})" for name, count in train.items()]
        return f"training tokens: {', '.join(parts)}"


def _check_mask(index: Index, data: DataConfig) -> None:
    """Raise InputError if a corpus was packed with another mask, or another case, than ``data`` asks for."""
    wanted, packed = (masked_letters(data.mask, data.case), data.case), (index.mask, index.case)
    if wanted not in (packed, ("", "upper")):
        key, value = ("data.case", data.case) if data.case != index.case else ("data.mask", data.mask)
        allowed = f"is not how {index.directory} was packed: mask={index.mask!r}, case={index.case}"
        raise InputError(key, value, allowed, "pack it again, or leave the key out")


def _check_tokenizer(indices: dict[str, Index], file: Path) -> None:
    """Raise InputError if a corpus was not packed with the tokenizer of a model of transformers."""
    for index in indices.values():
        if index.vocabulary["kind"] != "ids" and index.vocabulary.get("sha256") != digest(file).hex():
            allowed = f"is packed as other {index.vocabulary['kind']} than those of the model's tokenizer {file}"
            raise InputError("data.source", str(index.directory), allowed, f"pack it with data.tokenizer={file}")


def _check_vocabularies(indices: dict[str, Index]) -> None:
    """Raise InputError unless all sources have the same vocabulary."""
    (first, index), *others = indices.items()
    for name, other in others:
        if other.vocabulary != index.vocabulary:
            kinds = [f"{one.vocabulary['kind']} of {one.vocabulary['size']}" for one in (other, index)]
            allowed = f"must have the vocabulary of data.sources.{first}: it has {kinds[0]}, and that one {kinds[1]}"
            if kinds[0] == kinds[1]:
                allowed = f"must have the vocabulary of data.sources.{first}: their tokenizers differ"
            fix = (
                "pack all with one tokenizer (data.tokenizer=FILE, of longreach tokenizer), arrays with one data.vocab"
            )
            raise InputError(f"data.sources.{name}", str(other.directory), allowed, fix)
