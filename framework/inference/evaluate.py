"""Evaluates a trained model: bits per byte by document, by position, and by context length; or the test of its task."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import _aliases
from ...errors import InputError
from ...parallel import streaming
from ...parallel.mesh import Mesh, to_device
from ...parallel.span import Span
from .. import tasks
from ..config import RunConfig
from ..data import (
    Batches,
    DataConfig,
    IdVocabulary,
    Index,
    SubwordVocabulary,
    TokenStream,
    Vocabulary,
    corpora,
    packed_dir,
    sequences_of,
)
from ..data.corpus import list_files
from ..data.nucleotides import LetterCount, masked_letters
from ..data.progress import progress
from ..data.reading import BadSamples, Reader
from ..data.tally import Tally
from ..model import IGNORED, SequenceModel
from ..monitoring.monitor import BITS
from ..runtime.validation import score as score_task
from ..tasks import Task, kind_of, open_task
from .generate import PREFILL_BLOCK_LEN
from .inputs import document_tokens
from .loading import load_config, load_run, vocabulary_of

FIRST_BIN_LEN = 64  # bins of positions begin at 0, 64, 128, 256, ...: each but the first is as long as all before it


class ScoredRows(NamedTuple):
    """B independent sequences of L tokens with labels, to be scored from an empty carry.

    Attributes:
        tokens, labels: ``[B, L]`` of any integer type; labels `IGNORED` do not count.
        segments: ``[B, L]`` document ids, or None.
        name: of the document, if the rows are one.
        num_bytes: size in bytes of the labels' text; None to count each label as one byte.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None = None
    name: str = ""
    num_bytes: float | None = None


@dataclass(frozen=True)
class MeanLoss:
    """A mean loss, and what it is a mean over.

    Attributes:
        loss: nats per token.
        num_tokens: number of predicted tokens.
        num_bytes: size in bytes of their text.
    """

    loss: float
    num_tokens: int
    num_bytes: float

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.num_tokens * BITS / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Of a token; at most ``exp(700)``, which a float can hold."""
        return math.exp(min(self.loss, 700.0))

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


@dataclass(frozen=True)
class PositionBin:
    """The mean loss of a bin of consecutive positions.

    Attributes:
        first: first position of the bin.
        loss: nats per token.
        error: standard error of ``loss`` over sequences; NaN for fewer than two.
        num_tokens: number of predicted tokens.
    """

    first: int
    loss: float
    error: float
    num_tokens: int


@dataclass(frozen=True)
class Score:
    """The result of `score`: the mean over all tokens, over each named document, and over each bin of positions."""

    whole: MeanLoss
    documents: list[tuple[str, MeanLoss]] = field(default_factory=list)
    by_position: list[PositionBin] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        score: of all tokens with their whole context.
        by_context: (context, mean loss) of the same tokens with the carry reset every ``context`` tokens.
        unit: of `bits` and `MeanLoss.bits_per_byte`; ``token`` if tokens are ids, which stand for no bytes.
        counts: of the files and documents that were read, converted and skipped; see `data.tally.Tally`. Empty for
            held-out documents.
    """

    score: Score
    by_context: list[tuple[int, MeanLoss]]
    unit: Literal["byte", "token"] = "byte"
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def bits(self, nats: float) -> float:
        """Convert nats per token to bits per byte, with the mean bytes per token of all tokens."""
        return nats * BITS * self.score.whole.num_tokens / self.score.whole.num_bytes

    def as_json(self) -> dict[str, object]:
        score = self.score
        bins = [
            {**asdict(one), "error": None if math.isnan(one.error) else one.error, "bits_per_byte": self.bits(one.loss)}
            for one in score.by_position
        ]
        return {
            "whole": score.whole.as_json(),
            "documents": [{"name": name, **mean.as_json()} for name, mean in score.documents],
            "by_position": bins,
            "by_context": [{"context": context, **mean.as_json()} for context, mean in self.by_context],
            "counts": self.counts,
        }


def has_test(place: str | Path) -> bool:
    """Whether ``place`` is the directory of a run whose task has a test split; see `evaluate_task`."""
    file = Path(place) / "config.yaml"
    return file.is_file() and "test" in kind_of(load_config(Path(place)).task).splits


def has_distances(run_dir: str | Path) -> bool:
    """Whether the test of a run's task is scored by distance too; see `tasks.Task.distances`."""
    return kind_of(load_config(Path(run_dir)).task).has_distances


def evaluate_task(
    run_dir: str | Path, overrides: Sequence[str] = (), device: torch.device | None = None
) -> tuple[Task, tasks.Score | None]:
    """Score a run's newest model on the test split of its task.

    Args:
        run_dir: directory of the run; `has_test` is true for it.
        overrides: of its config: ``data.seq_len`` for longer examples, ``parallel.block_len`` to stream them in blocks.
        device: where the model computes; by default on the GPU, where torch sees one.

    Returns:
        The task, and the score; None if no example has a label.

    Raises:
        InputError: model, task or overrides do not fit together.
    """
    config, model = load_run(run_dir, overrides, device)
    assert config is not None
    task = open_task(config.task, config.data)
    task.configure_model(config.model)
    num_tokens = len(task.sequences("test", None)) * config.data.seq_len
    with progress(f"reading {task.title}", num_tokens, unit="tokens") as advance:
        return task, score_task(
            config, model, model.head, Mesh(device=next(model.parameters()).device), task, "test", progress=advance
        )


def evaluate(
    place: str | Path,
    sources: Sequence[str] = (),
    *,
    overrides: Sequence[str] = (),
    by_document: bool = False,
    min_tokens: int = 0,
    max_batches: int = 0,
    contexts: Sequence[int] = (),
    device: torch.device | None = None,
    model: SequenceModel | None = None,
) -> Evaluation:
    """Score a run's newest model, or an export, on next-token prediction.

    Args:
        place: directory of the run or of the export.
        sources: files and folders, each document of which is one sequence of any length; empty for the run's held-out
            documents.
        overrides: of the run's config.
        by_document: score each held-out document as one sequence, instead of the windows of validation.
        min_tokens: leave out documents of fewer tokens; the windows of validation have them all.
        max_batches: stop after this many held-out batches; 0 reads all.
        contexts: score again with the carry reset every so many tokens, for each number.
        device: where the model computes; by default on the GPU, where torch sees one.
        model: is scored in the place of the run's own, where it is.

    Raises:
        InputError: model, corpus or files do not fit together or cannot be read.
    """
    config, own = load_run(place, overrides, device)
    model = own if model is None else model
    if model.config.head != "token":
        allowed = "token: it is the next token that is scored"
        raise InputError("model.head", model.config.head, allowed, "longreach predict answers for new data")
    vocabulary = vocabulary_of(place, model)
    tally = Tally()
    if sources:
        data = DataConfig() if config is None else config.data
        name, num_tokens, rows = _from_sources(sources, vocabulary, data, tally, min_tokens)
    else:
        name, num_tokens, rows = _held_out(config, place, vocabulary, by_document, min_tokens, max_batches)
    with progress(f"reading {name}", num_tokens * (1 + len(contexts)), unit="tokens") as advance:
        whole = score(model, rows(), advance)
        others = [(context, score(model, with_resets(rows(), context), advance).whole) for context in contexts]
    unit: Literal["byte", "token"] = "token" if isinstance(vocabulary, IdVocabulary) else "byte"
    return Evaluation(whole, others, unit, tally.as_json())


RowSource = tuple[str, int, Callable[[], Iterator[ScoredRows]]]
"""A name, the number of tokens, and a function that iterates over the rows."""


def _from_sources(
    sources: Sequence[str], vocabulary: Vocabulary, data: DataConfig, tally: Tally, min_tokens: int = 0
) -> RowSource:
    """The documents of files and folders, as packing would find them, and skip and count others; one row each."""
    chat = vocabulary.encode_chat if isinstance(vocabulary, SubwordVocabulary) else None
    readers: list[tuple[str, Reader]] = []
    for source in sources:
        files, upper = list_files(source, data.binary, tally), data.case == "upper"
        reader = Reader(files, 0.0, data.field, chat=chat, tally=tally, upper=upper)
        readers.append((f"{source}: " if len(sources) > 1 else "", reader))
    count = LetterCount(vocabulary, masked_letters(data.mask, data.case))
    masked, shortest = torch.tensor(count.masked), max(2, min_tokens)
    least = "two" if shortest == 2 else f"{shortest:,}"
    tallies = iter([tally])  # documents are counted when they are read first

    def rows() -> Iterator[ScoredRows]:
        ours = next(tallies, None)
        bad, num_rows = BadSamples(data.max_bad_samples, report=ours is not None, tally=ours), 0
        for prefix, reader in readers:
            for key, content in reader.read("train", bad, vocabulary.check):
                tokens = document_tokens(f"{prefix}{key}", content, vocabulary)
                if len(tokens) >= shortest:
                    before = count.num_masked
                    num_bytes = sum(map(len, vocabulary.text_of(content))) - count.add(tokens.numpy())
                    num_labels = max(1, len(tokens) - (count.num_masked - before))
                    bytes_per_token = None if isinstance(vocabulary, IdVocabulary) else num_bytes / num_labels
                    yield _document_row(f"{prefix}{key}", tokens, bytes_per_token, masked)
                    num_rows += 1
                else:
                    bad.tally.add("skipped", f"shorter than {least} tokens")
        if not num_rows:
            raise InputError("source", ", ".join(sources), f"must have a document of at least {least} tokens")

    return ", ".join(sources), sum(reader.num_bytes for _, reader in readers), rows


def _held_out(
    config: RunConfig | None,
    place: str | Path,
    vocabulary: Vocabulary,
    by_document: bool,
    min_tokens: int,
    max_batches: int,
) -> RowSource:
    """The held-out documents of a run: one row each, or the windows of validation."""
    if config is None:
        fix = "give --source FILE, or the directory of the run"
        raise InputError("RUN_DIR", str(place), "an export has no held-out documents", fix)
    options = place, vocabulary, by_document, min_tokens, max_batches
    found = [_held_out_of(data, *options) for data in corpora(config.data).values()]

    def rows() -> Iterator[ScoredRows]:
        for _, _, read in found:
            yield from read()

    total = sum(num_tokens for _, num_tokens, _ in found)
    if min_tokens and not total:
        raise InputError("--min-tokens", min_tokens, "is more than the longest held-out document has")
    return ", ".join(name for name, _, _ in found), total, rows


def _held_out_of(
    data: DataConfig, place: str | Path, vocabulary: Vocabulary, by_document: bool, min_tokens: int, max_batches: int
) -> RowSource:
    """The held-out documents of one source."""
    index = Index.load(packed_dir(data), verify=data.verify, timeout=data.timeout)
    index.check_vocab(vocabulary.size)
    ours, theirs = ({**v.describe(), "size": 0} for v in (vocabulary, index.open_vocabulary()))
    if ours != theirs:
        allowed = f"must be packed with the vocabulary of {place}: {ours['kind']}"
        raise InputError("data.source", data.source, f"{allowed}, and not with {theirs['kind']} of others")
    split = index.splits["valid"]
    bytes_per_token = split.bytes_per_token or None  # the split's mean, for all rows
    if by_document:
        stream, masked = TokenStream(index, "valid", data.timeout), torch.tensor(index.masked)
        every = zip(stream.split.keys, stream.starts.tolist(), stream.starts[1:].tolist(), strict=False)
        read = [document for document in every if document[2] - document[1] >= max(2, min_tokens)]

        def documents() -> Iterator[ScoredRows]:
            for name, start, stop in read:
                tokens = torch.from_numpy(stream.read(start, stop).astype("int64"))
                yield _document_row(name, tokens, bytes_per_token, masked)

        return index.name, sum(stop - start - 1 for _, start, stop in read), documents
    batches = Batches(sequences_of(index, data, "valid"), data.batch_size)

    def windows() -> Iterator[ScoredRows]:
        for batch in batches.iterate(num_steps=max_batches or None):
            num_labels = int(torch.count_nonzero(batch.labels != IGNORED))
            num_bytes = None if bytes_per_token is None else num_labels * bytes_per_token
            yield ScoredRows(batch.tokens, batch.labels, batch.segments, num_bytes=num_bytes)

    num_sequences = min(len(batches.dataset), max_batches * data.batch_size or len(batches.dataset))
    return index.name, num_sequences * data.seq_len, windows


def _document_row(name: str, tokens: Tensor, bytes_per_token: float | None, masked: Tensor) -> ScoredRows:
    """A document of tokens ``[L]``, L >= 2, as one row; each token but the first is a label, unless in ``masked``."""
    is_masked = torch.isin(tokens[1:], masked)
    labels = tokens[1:].long().masked_fill(is_masked, IGNORED)
    num_bytes = None if bytes_per_token is None else int((~is_masked).sum()) * bytes_per_token
    return ScoredRows(tokens[:-1].unsqueeze(0), labels.unsqueeze(0), name=name, num_bytes=num_bytes)


def with_resets(batches: Iterable[ScoredRows], context: int) -> Iterator[ScoredRows]:
    """Yield the same tokens and labels with the carry reset every ``context`` tokens, each such part as its own row."""
    step = max(1, PREFILL_BLOCK_LEN // context) * context
    for rows in batches:
        length = rows.tokens.shape[1]
        for start in range(0, length, step):
            stop = min(length, start + step)
            whole = stop - (stop - start) % context
            for first, last in ((start, whole), (whole, stop)):
                if first < last:
                    yield _folded(rows, first, last, min(context, last - first))


def _folded(rows: ScoredRows, first: int, last: int, length: int) -> ScoredRows:
    """The tokens ``[first, last)`` of each row, reshaped to rows of ``length`` tokens."""

    def fold(x: Tensor) -> Tensor:
        return x[:, first:last].reshape(-1, length)

    labels, num_bytes = fold(rows.labels), None
    if rows.num_bytes is not None:
        fraction = torch.count_nonzero(labels != IGNORED) / torch.count_nonzero(rows.labels != IGNORED).clamp(min=1)
        num_bytes = rows.num_bytes * float(fraction)
    segments = None if rows.segments is None else fold(rows.segments)
    return ScoredRows(fold(rows.tokens), labels, segments, num_bytes=num_bytes)


@torch.no_grad()
def score(model: SequenceModel, batches: Iterable[ScoredRows], progress: Callable[[int], None] | None = None) -> Score:
    """Mean loss over rows of tokens.

    A causal model reads them in blocks of `PREFILL_BLOCK_LEN` tokens: memory does not grow with their length.

    Args:
        model: on any device; blocks of tokens are moved there.
        batches: the rows to score.
        progress: called with the number of tokens just read.

    Raises:
        InputError: there is no label.
    """
    total, documents, bins = torch.zeros(3, dtype=torch.float64), [], _BinSums()
    for rows in batches:
        sums = _sums_by_bin(model, rows, progress)
        nats, count = sums.sum((0, 1)).tolist()
        num_bytes = count if rows.num_bytes is None else rows.num_bytes
        total += torch.tensor([nats, count, num_bytes], dtype=torch.float64)
        if rows.name and count:
            documents.append((rows.name, MeanLoss(nats / count, int(count), num_bytes)))
        bins.add(sums)
    nats, count, num_bytes = total.tolist()
    if not count:
        raise InputError("source", "no tokens", "at least one token with a next one")
    return Score(MeanLoss(nats / count, int(count), num_bytes), documents, bins.means())


def _sums_by_bin(model: SequenceModel, rows: ScoredRows, progress: Callable[[int], None] | None) -> Tensor:
    """Sum of the losses in nats, and number of labels, of each row's bins of positions: ``[B, bins, 2]`` fp64."""
    mesh = Mesh(device=next(model.parameters()).device)
    num_rows, length = rows.tokens.shape
    sums = torch.zeros(num_rows, (length // FIRST_BIN_LEN).bit_length() + 1, 2, dtype=torch.float64, device=mesh.device)

    def losses(span: Span) -> Tensor:
        """The loss of each token of a block, and 1 if it has a label: ``[B, n, 2]`` fp64."""
        ids, labels = (to_device(span.shard(x).long(), mesh.device) for x in (rows.tokens, rows.labels))
        nll = model(ids, span, labels)[0].double()
        return torch.stack([nll, (labels != IGNORED).double()], dim=-1)

    spans = streaming.blocks(mesh, length, PREFILL_BLOCK_LEN if model.config.causal else 0, segments=rows.segments)
    for span, found in zip(spans, streaming.read(spans, losses), strict=True):
        position = torch.arange(span.position, span.position + found.shape[1], device=mesh.device)
        bins = torch.log2((position // FIRST_BIN_LEN).double().clamp(min=0.5)).floor().long() + 1
        sums.index_add_(1, bins, found)
        if progress is not None:
            progress(found.shape[0] * found.shape[1])
    return sums.cpu()


class _BinSums:
    """Sums over sequences for each bin of positions, of which means and standard errors are computed.

    Attributes:
        sums: ``[bins, 6]`` fp64, of 1, s, c, s^2, s c and c^2 over the sequences with labels in the bin, where s is the
            sum of losses in nats and c the number of labels of one sequence.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(0, 6, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add the sequences of `_sums_by_bin`."""
        s, c = rows.unbind(-1)
        new = torch.stack([(c > 0).double(), s, c, s * s, s * c, c * c], dim=-1).sum(0)
        short, long = sorted((self.sums, new), key=len)
        self.sums = long.clone()
        self.sums[: len(short)] += short

    def means(self) -> list[PositionBin]:
        """The mean loss per token of each bin with labels, and the standard error of this ratio of sums."""
        found = []
        for number, (n, s, c, ss, sc, cc) in enumerate(self.sums.tolist()):
            if c:
                mean = s / c
                spread = max(0.0, ss - 2 * mean * sc + mean * mean * cc)
                error = math.sqrt(spread * n / (n - 1)) / c if n > 1 else math.nan
                found.append(PositionBin(FIRST_BIN_LEN << number >> 1 if number else 0, mean, error, int(c)))
        return found


def plot_distances(bins: Sequence[tasks.DistanceBin], path: Path, title: str) -> None:
    """Plot each metric over the distance, in bins that begin at powers of two; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    for name in bins[0].metrics:
        axes.plot([one.first for one in bins], [one.metrics[name] for one in bins], marker="o", label=name)
    axes.set(xlabel="tokens from the value to the query, from", title=title, ylim=(-0.03, 1.03))
    axes.set_xscale("log", base=2)
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_json(found: Evaluation, path: Path) -> None:
    """Write an evaluation as JSON; OSError if that is not possible."""
    path.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")


def plot(found: Evaluation, path: Path, title: str) -> None:
    """Plot bits per byte over the position and, if there are several contexts, over the context; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 1 + bool(found.by_context), figsize=(12, 5), layout="constrained", squeeze=False
    )
    bins = found.score.by_position
    bits = [found.bits(one.loss) for one in bins]
    errors = [0.0 if math.isnan(one.error) else found.bits(one.error) for one in bins]
    positions = [max(one.first, FIRST_BIN_LEN // 2) for one in bins]
    panels[0, 0].errorbar(positions, bits, yerr=errors, marker="o", capsize=3)
    panels[0, 0].set(
        xlabel=f"from position (the first: 0 to {FIRST_BIN_LEN - 1})", ylabel="bits per byte, with standard error"
    )
    if found.by_context:
        contexts, means = zip(*sorted(found.by_context), strict=True)
        panels[0, 1].plot(contexts, [one.bits_per_byte for one in means], marker="o", label="forgotten every")
        panels[0, 1].axhline(found.score.whole.bits_per_byte, color="grey", linestyle=":", label="nothing forgotten")
        panels[0, 1].set(xlabel="tokens after which the past is forgotten", ylabel="bits per byte")
        panels[0, 1].legend()
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.grid(True, alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def __getattr__(name: str) -> Any:
    return _aliases.attribute(__name__, name)
