"""Classifies whole documents: texts or nucleotides, from a folder for each class or records with labels."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..data import DataConfig, Index, Sequences, TokenStream, corpus_name, packed_dir, prepare, save_vocabulary
from ..data.corpus import File, list_files
from ..data.records import FIELD, documents
from ..model import ModelConfig
from .description import TaskDescription
from .task import (
    SPLITS,
    TEST_FRACTION,
    Examples,
    Rows,
    Task,
    TaskConfig,
    counted_classes,
    digest_of,
    holdout_split,
    padded_sequence,
    set_model_fields,
    stratified_split,
)

LABEL = "label"  # the field with the class, if no other is named
FORMS = "a folder with one folder of documents for each class, or JSONL, CSV, Parquet or FASTA with labels"
log = logging.getLogger("longreach.data")


class Documents(Task):
    """Classifies the documents of ``data.source``, which are packed as those of a corpus are.

    Their classes are the folders in it, if there are two or more that hold files; else each record has its own, see
    `records.documents`. Every fifth document of a class is for the test, and ``data.valid_fraction`` of the others for
    validation. A sequence is one document: a shorter one is padded, of a longer one the first tokens are read.

    Attributes:
        classes: their names, by number.
        labels: int64 ``[documents]``, the class of each document.
        summary: one line: what was taken.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.index = Index.load(packed_dir(_packing(data)), verify=False, timeout=data.timeout)
        self.title = data.name or Path(data.source).name
        self.stream = TokenStream(self.index, "train", data.timeout)
        names = _class_names(data, task.label or LABEL, self.index)
        self.numbers_of_documents = np.array([n for n, name in enumerate(names) if name], np.int64)
        self.classes = sorted({name for name in names if name})
        if len(self.classes) < 2:
            found = f"only {self.classes[0]!r}" if self.classes else "no class"
            raise InputError("data.source", data.source, f"must have two classes or more, and has {found}: {FORMS}")
        number_of = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array([number_of[name] for name in names if name], np.int64)
        rest, test = stratified_split(self.labels, TEST_FRACTION)
        if not len(test):
            least = round(1 / TEST_FRACTION)
            raise InputError(
                "data.source", data.source, f"must have a class of {least} documents or more, for the test"
            )
        train, valid = holdout_split(len(rest), data.valid_fraction)
        self.numbers = {"train": rest[train], "valid": rest[valid], "test": test}
        most_common = np.bincount(self.labels[self.numbers["train"]]).argmax()
        self.baseline_metrics = {"accuracy": float((self.labels[test] == most_common).mean())}
        self.summary = self._summary()
        log.info("%s", self.summary)

    @classmethod
    def prepare(cls, data: DataConfig) -> None:
        prepare(_packing(data))

    def describe(self) -> TaskDescription:
        field = "" if self.data.field == FIELD else self.data.field
        keep_case = self.data.case != "upper"
        return TaskDescription("documents", self.data.seq_len, classes=self.classes, field=field, keep_case=keep_case)

    def write_run_files(self, run_dir: Path) -> None:
        super().write_run_files(run_dir)
        save_vocabulary(self.index.open_vocabulary(), run_dir)

    @cached_property
    def fingerprint(self) -> str:
        read = [self.data.seq_len, self.data.valid_fraction, self.index.fingerprint, self.classes]
        return digest_of(self.task, *read, self.numbers_of_documents, self.labels)

    def configure_model(self, model: ModelConfig) -> None:
        outputs = len(self.classes)
        set_model_fields(model, "documents", channels=0, head="class", outputs=outputs, documents=1)
        model.vocab = model.vocab or int(self.index.vocabulary["size"])
        self.index.check_vocab(model.vocab)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        numbers = self.numbers[split]

        def make(number: int) -> Rows:
            place = numbers[number]
            start, stop = (int(self.stream.starts[self.numbers_of_documents[place] + after]) for after in (0, 1))
            tokens = self.stream.read(start, min(stop, start + self.data.seq_len)).astype(np.int64)
            return padded_sequence([tokens], int(self.labels[place]), self.data.seq_len)

        return Examples(make, len(numbers), seed)

    def _summary(self) -> str:
        lengths, seq_len = self.stream.split.length[self.numbers_of_documents], self.data.seq_len
        longer, outside = int((lengths > seq_len).sum()), self.stream.num_documents - len(lengths)
        cut = f"; of {longer:,} longer than data.seq_len={seq_len} the first tokens are read" if longer else ""
        others = f"; not read: {outside:,} outside of the folders" if outside else ""
        what = f"{len(self.labels):,} documents of {len(self.classes):,} classes"
        classes = counted_classes(self.classes, self.labels)
        return f"{self.title}: {what} ({classes}); {lengths.min():,} to {lengths.max():,} tokens{cut}{others}"


def _packing(data: DataConfig) -> DataConfig:
    """How the documents are packed: none is held out, and none is cut; beside the same source packed as a corpus."""
    return dataclasses.replace(data, valid_fraction=0.0, name=f"{corpus_name(data)}-documents")


def _class_names(data: DataConfig, label: str, index: Index) -> list[str]:
    """The name of the class of each document of a packed source; empty for one that has none.

    Raises:
        InputError: there are folders of splits in place of classes, or a record has no class.
    """
    keys = index.splits["train"].keys
    if index.splits["valid"].num_documents:
        allowed = "was packed with held-out documents, of which the largest may be cut"
        raise InputError(
            "data.source", data.source, allowed, "pack it with --valid-fraction 0, or give what was packed"
        )
    if packed_dir(data) == Path(data.source).expanduser():
        return [key.partition("/")[0] if "/" in key else "" for key in keys]
    files = list_files(data.source, data.binary)
    folders = {_folder(file) for file in files} - {""}
    if {folder.lower() for folder in folders} & SPLITS and {folder.lower() for folder in folders} <= SPLITS:
        allowed = f"has folders of splits ({', '.join(sorted(folders))}), where classes are expected"
        fix = f"give one of them: data.source={Path(data.source) / min(folders)}"
        raise InputError("data.source", data.source, allowed, fix)
    if len(folders) > 1:
        in_tar = {file.key: _folder(file) for file in files if file.member is not None}
        found = (in_tar.get(key, key.partition("/")[0]) for key in keys)
        return [name if name in folders else "" for name in found]
    return _of_records(files, data.field, label, keys)


def _folder(file: File) -> str:
    """The first folder on the path of a file, in its source or its tar file; empty if it is in none."""
    first, slash, _ = (file.key if file.member is None else file.member.name).partition("/")
    return first if slash else ""


def _of_records(files: Sequence[File], field: str, label: str, keys: Iterable[str]) -> list[str]:
    """The classes that records name, for the keys of their documents."""
    wanted = dict.fromkeys(keys, "")
    for document in documents(files, field, label=label):
        if document.key in wanted:
            if document.label is None:
                raise InputError("data.source", document.key, f"has no class; must be {FORMS}")
            wanted[document.key] = document.label()
    return [*wanted.values()]
