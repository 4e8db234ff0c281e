"""Predicts for new data with a model of a task: classes, numbers, forecasts, whether two texts belong together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...parallel import streaming
from ...parallel.mesh import Mesh, to_device
from ...parallel.span import Span
from ..data import ByteVocabulary, Vocabulary
from ..model import SequenceModel
from ..tasks import TaskDescription
from ..tasks.task import padded_sequence
from .generate import PREFILL_BLOCK_LEN
from .inputs import Input, Row, encode, rows_of

MAX_BATCH_TOKENS = 1 << 17  # that several rows have side by side, padding included
LANGUAGE = "is a language model: it predicts the next token"


@dataclass
class Predictor:
    """A model with what its task says of inputs and outputs.

    Attributes:
        model: in evaluation mode, on any device.
        task: see `TaskDescription`; None if there is none: of a language model, or of an export of an earlier version.
        vocabulary: of texts.
        batch_size: rows that are computed at a time.
        block_len: tokens of a streamed block; 0 for `PREFILL_BLOCK_LEN`, and for whole rows if the model is not causal.
        top: of classes, return the so many most probable ones; 0 for the probability of each class.

    Raises:
        InputError: the model is one of the next token, there is no description, or ``block_len`` does not fit.
    """

    model: SequenceModel
    task: TaskDescription | None = None
    vocabulary: Vocabulary = field(default_factory=ByteVocabulary)
    batch_size: int = 32
    block_len: int = 0
    top: int = 0

    def __post_init__(self) -> None:
        config = self.model.config
        if config.head == "token":
            named = f"is a model of task.name={self.task.name}, whose examples are generated" if self.task else LANGUAGE
            fix = "longreach evaluate scores it" + ("" if self.task else ", longreach generate continues a text")
            raise InputError("model", config.head, named, fix)
        if self.task is None:
            allowed = "a description of the task: names, units, standardization"
            raise InputError("task", None, allowed, "export the run again, with this version")
        for name, least in (("batch_size", 1), ("block_len", 0), ("top", 0)):
            if getattr(self, name) < least:
                raise InputError(name, getattr(self, name), f"at least {least}")
        if self.block_len and not config.causal:
            allowed = "0 for this model, which is not causal: every token of it needs all that follow it"
            raise InputError("block_len", self.block_len, allowed)
        self._task = self.task
        self._block_len = (self.block_len or PREFILL_BLOCK_LEN) if config.causal else 0

    def rows(self, sources: Sequence[str]) -> Iterator[Row]:
        """The examples in files and folders; see `inputs.rows_of`."""
        return rows_of(sources, self._task, self.model.config)

    def input_of(self, row: Any, name: str) -> Input:
        """An example as the model reads it; see `inputs.encode`."""
        return row if isinstance(row, Input) else encode(row, name, self._task, self.model.config, self.vocabulary)

    def predict(self, rows: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
        """Predict for each row; rows are read as they are needed.

        Args:
            rows: examples as `inputs.encode` takes them, or `Input`.

        Yields:
            For each row its answers, plain values by their names. ``input`` is the name of the row; ``input_`` if the
            data have a column ``input``, and alike for ``step``. A model of

            - classes answers ``class``, the most probable one, and ``probability_NAME`` of each class; with ``top``
              ``class``, ``probability``, ``class_2``, ``probability_2`` and so on;
            - numbers answers each by its name, in its own unit;
            - forecasts has one answer for each future step: ``step`` from 1 on, its time by the name of the column of
              times where the time step is known, and the value of each channel by its name, in its own unit.

        Raises:
            InputError: a row does not fit the model, or an answer is not finite.
        """
        for batch in self._batches(rows):
            for row, answer in zip(batch, self._compute(batch), strict=True):
                yield self._answers(row, answer)

    def _batches(self, rows: Iterable[Any]) -> Iterator[list[Input]]:
        """Rows side by side: at most ``batch_size``, and not more than `MAX_BATCH_TOKENS` tokens in a block."""
        batch: list[Input] = []
        longest = 0
        for number, row in enumerate(rows, 1):
            is_path = isinstance(row, PathLike) or (isinstance(row, str) and self.model.config.channels > 0)
            one = self.input_of(row, str(row) if is_path else str(number))
            length = min(_length(one), self._block_len or _length(one))
            longest = max(longest, length)
            if len(batch) == self.batch_size or (batch and longest * (len(batch) + 1) > MAX_BATCH_TOKENS):
                yield batch
                batch, longest = [], length
            batch.append(one)
        if batch:
            yield batch

    def _compute(self, batch: list[Input]) -> Tensor:
        """The head's output for each row, at its last token: ``[B, outputs]`` fp32 on the CPU."""
        model, length = self.model, max(map(_length, batch))
        mesh = Mesh(device=next(model.parameters()).device)
        tokens, _, segments = zip(*(padded_sequence(one.documents, 0, length) for one in batch), strict=True)
        whole = torch.zeros(length, dtype=torch.int64)
        ids = None
        if any(one is not None for one in segments):
            ids = torch.stack([whole if one is None else one for one in segments])
        spans = streaming.blocks(mesh, length, self._block_len, segments=ids)
        rows, last = torch.stack(tokens), torch.tensor([_length(one) - 1 for one in batch], device=mesh.device)

        def features(span: Span) -> Tensor:
            return model.features(to_device(span.shard(rows), mesh.device), span)[0]

        found = torch.zeros(len(batch), model.config.width, device=mesh.device)
        for span, x in zip(spans, streaming.read(spans, features), strict=True):
            if model.config.head != "series":
                found = x  # pooled over all tokens so far
                continue
            place = last - span.position
            here = (place >= 0) & (place < x.shape[1])
            found[here] = x[here, place[here]]
        with torch.no_grad():
            return model.head(found).float().cpu()

    def _answers(self, row: Input, answer: Tensor) -> list[dict[str, Any]]:
        """The answers of a row; ``answer [outputs]``."""
        head = self.model.config.head
        if not answer.isfinite().all():
            raise InputError(
                "answer", row.name, "must be finite", "the weights are damaged, or its values far too large"
            )
        if head == "class":
            return [{"input": row.name, **self._classes(answer)}]
        if head == "numbers":
            numbers = self._numbers(answer)
            return [{_free("input", numbers): row.name, **numbers}]
        return self._forecast(row, answer)

    def _classes(self, answer: Tensor) -> dict[str, Any]:
        names = self._task.classes or [str(number) for number in range(len(answer))]
        chances, order = answer.double().softmax(-1).sort(descending=True, stable=True)
        ranked = [(names[number], _plain(chance)) for number, chance in zip(order.tolist(), chances.tolist())]
        if not self.top:
            known = dict(ranked)
            return {"class": ranked[0][0], **{f"probability_{name}": known[name] for name in names}}
        found: dict[str, Any] = {}
        for place, (name, chance) in enumerate(ranked[: self.top], 1):
            end = "" if place == 1 else f"_{place}"
            found |= {f"class{end}": name, f"probability{end}": chance}
        return found

    def _numbers(self, answer: Tensor) -> dict[str, Any]:
        task, values = self._task, answer.double()
        if task.target_mean:
            values = values * torch.tensor(task.target_deviation) + torch.tensor(task.target_mean)
        names = task.targets or (["value"] if len(values) == 1 else [f"value_{n}" for n in range(1, len(values) + 1)])
        return dict(zip(names, map(_plain, values.tolist()), strict=True))

    def _forecast(self, row: Input, answer: Tensor) -> list[dict[str, Any]]:
        task, channels = self._task, self.model.config.channels
        values = answer.double().view(-1, channels)
        if task.mean:
            values = values * torch.tensor(task.deviation, dtype=torch.float64) + torch.tensor(task.mean)
        names = task.columns or [f"value_{n}" for n in range(1, channels + 1)]
        key, count = _free("input", [*names, task.time_column]), _free("step", [*names, task.time_column])
        found = []
        for step, line in enumerate(values.tolist(), 1):
            time = {task.time_column: row.times[step - 1]} if row.times else {}
            found.append({key: row.name, count: step, **time, **dict(zip(names, map(_plain, line), strict=True))})
        return found


def _free(name: str, taken: Iterable[str]) -> str:
    """A name that no column of the data has."""
    return _free(f"{name}_", taken) if name in taken else name


def _length(row: Input) -> int:
    return sum(map(len, row.documents))


def _plain(value: float) -> float:
    """A number with the digits that fp32 has."""
    return float(f"{value:.7g}")
