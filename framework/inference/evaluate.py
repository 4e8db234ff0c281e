"""How well a trained model predicts: bits per byte by document, by position, and by how far back it may look."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ...parallel import streaming
from ...parallel.mesh import Mesh
from ...parallel.span import Span
from .. import tasks
from ..config import RunConfig, load
from ..data import Batches, Bytes, Ids, Index, TokenStream, load_vocabulary, packed_dir, records, sequences_of
from ..data.corpus import File, list_files
from ..data.progress import progress
from ..model import IGNORED, Model
from ..monitoring.monitor import BITS
from ..runtime.validation import score as score_task
from ..tasks import Task, kind_of, open_task
from .generate import PROMPT_BLOCK, load_run

FINEST = 64  # tokens of the first stretch of positions; each later one begins at twice the position


class Text(NamedTuple):
    """Rows of tokens to be scored, each from an empty past.

    Attributes:
        tokens, labels: ``[B, L]`` of any integer type; labels `IGNORED` do not count.
        segments: ``[B, L]`` document ids, or None.
        name: of the document, if it is one.
        num_bytes: that the labels stand for; None to count each as one.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None = None
    name: str = ""
    num_bytes: float | None = None


@dataclass(frozen=True)
class Figure:
    """A mean loss.

    Attributes:
        loss: nats a token.
        num_tokens: tokens predicted.
        num_bytes: that they stand for.
    """

    loss: float
    num_tokens: int
    num_bytes: float

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.num_tokens * BITS / self.num_bytes

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


@dataclass(frozen=True)
class Stretch:
    """The mean loss of a stretch of positions.

    Attributes:
        first: its first position.
        loss: nats a token.
        error: the standard error of ``loss`` over sequences; NaN for fewer than two.
        num_tokens: tokens predicted.
    """

    first: int
    loss: float
    error: float
    num_tokens: int


@dataclass(frozen=True)
class Score:
    """What `score` found: the whole, every text that has a name, and every stretch of positions."""

    whole: Figure
    documents: list[tuple[str, Figure]] = field(default_factory=list)
    by_position: list[Stretch] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """A score, and that of the same tokens where the past is forgotten every so many tokens: (tokens, figure)."""

    score: Score
    by_context: list[tuple[int, Figure]]
    unit: str = "byte"  # or "token", where tokens stand for no bytes

    def bits(self, nats: float) -> float:
        """Nats a token as bits a byte, by as many bytes a token as in the whole."""
        return nats * BITS * self.score.whole.num_tokens / self.score.whole.num_bytes

    def as_json(self) -> dict[str, object]:
        score = self.score
        stretches = [
            {**asdict(s), "error": None if math.isnan(s.error) else s.error, "bits_per_byte": self.bits(s.loss)}
            for s in score.by_position
        ]
        return {
            "whole": score.whole.as_json(),
            "documents": [{"name": name, **figure.as_json()} for name, figure in score.documents],
            "by_position": stretches,
            "by_context": [{"context": context, **figure.as_json()} for context, figure in self.by_context],
        }


def has_test(place: str | Path) -> bool:
    """Whether a run is of a task that has a test; `evaluate_task` scores it."""
    file = Path(place) / "config.yaml"
    return file.is_file() and "test" in kind_of(load(file).task).splits


def evaluate_task(run_dir: str | Path, overrides: Sequence[str] = ()) -> tuple[Task, tasks.Score | None]:
    """How a run's newest model does in the test of its task; None where no example has an answer.

    Args:
        run_dir: of the run, for which `has_test`.
        overrides: of its config: ``data.seq_len`` for longer examples, ``parallel.block_len`` to read them block by
            block.

    Raises:
        InputError: model, task or overrides do not fit.
    """
    config, model = load_run(run_dir, overrides)
    assert config is not None
    task = open_task(config.task, config.data)
    task.fit(config.model)
    num_tokens = len(task.sequences("test", None)) * config.data.seq_len
    with progress(f"reading {task.title}", num_tokens, unit="tokens") as advance:
        return task, score_task(config, model, model.head, Mesh(), task, "test", progress=advance)


def evaluate(
    place: str | Path,
    sources: Sequence[str] = (),
    *,
    overrides: Sequence[str] = (),
    by_document: bool = False,
    max_batches: int = 0,
    contexts: Sequence[int] = (),
) -> Evaluation:
    """Score a run's newest model, or an exported one.

    Args:
        place: directory of the run, or of an export.
        sources: files and folders, each document of which is one sequence, however long; none for the run's held-out
            documents.
        overrides: of the run's config.
        by_document: held-out documents are one sequence each too, and not the windows that training validates with.
        max_batches: stop after so many held-out batches; 0 reads all.
        contexts: score again with the past forgotten every so many tokens.

    Raises:
        InputError: model, corpus or files do not fit or cannot be read.
    """
    config, model = load_run(place, overrides)
    if model.config.head != "token":
        raise InputError("model.head", model.config.head, "token: it is the next token that is scored")
    vocabulary = load_vocabulary(place)
    if sources:
        name, num_tokens, texts = _given(sources, vocabulary, "text" if config is None else config.data.field)
    else:
        name, num_tokens, texts = _held_out(config, place, vocabulary, by_document, max_batches)
    with progress(f"reading {name}", num_tokens * (1 + len(contexts)), unit="tokens") as advance:
        whole = score(model, texts(), advance)
        others = [(context, score(model, restarted(texts(), context), advance).whole) for context in contexts]
    return Evaluation(whole, others, "token" if isinstance(vocabulary, Ids) else "byte")


Texts = tuple[str, int, Callable[[], Iterator[Text]]]  # what they are called, how many tokens, and they themselves


def _given(sources: Sequence[str], vocabulary: Bytes, field: str) -> Texts:
    """The documents that packing would find in some sources."""
    files: list[tuple[str, File]] = []
    for source in sources:
        some = [one for one in list_files(source) if one.num_bytes > 1]
        if not some:
            raise InputError("source", source, "at least two bytes")
        files += [(f"{source}: " if len(sources) > 1 else "", one) for one in some]

    def texts() -> Iterator[Text]:
        for prefix, file in files:
            for document in records.documents([file], field):
                name, content = f"{prefix}{document.key}", document.read()
                tokens = _tokens(name, content, vocabulary, records.kind_of(file) == "npy")
                if len(tokens) > 1:
                    yield _text(name, tokens, None if isinstance(vocabulary, Ids) else len(content) / len(tokens))

    return ", ".join(sources), sum(one.num_bytes - 1 for _, one in files), texts


def _tokens(name: str, content: NDArray[Any], vocabulary: Bytes, is_array: bool) -> Tensor:
    """The tokens ``[n]`` of a document, or of an array of ids."""
    if not is_array:
        if why := vocabulary.check(content):
            raise InputError("source", name, why, "leave it out")
        return torch.from_numpy(vocabulary.prompt(content.tobytes()).copy())
    if not isinstance(vocabulary, Ids):
        raise InputError("source", name, f"holds token ids, and the model reads {vocabulary.kind}", "leave it out")
    if content.size and not 0 <= int(content.min()) <= int(content.max()) < vocabulary.size:
        raise InputError("source", name, f"must hold token ids from 0 to {vocabulary.size - 1}")
    return torch.from_numpy(content.astype("int64"))


def _held_out(
    config: RunConfig | None, place: str | Path, vocabulary: Bytes, by_document: bool, max_batches: int
) -> Texts:
    if config is None:
        fix = "give --source FILE, or the directory of the run"
        raise InputError("RUN_DIR", str(place), "an export has no held-out documents", fix)
    data = config.data
    index = Index.load(packed_dir(data), verify=data.verify, timeout=data.timeout)
    index.check_vocab(vocabulary.size)
    ours, theirs = ({**v.describe(), "size": 0} for v in (vocabulary, index.open_vocabulary()))
    if ours != theirs:
        allowed = f"must be packed with the vocabulary of {place}: {ours['kind']}"
        raise InputError("data.source", data.source, f"{allowed}, and not with {theirs['kind']} of others")
    split = index.splits["valid"]
    bytes_a_token = split.num_bytes / split.num_tokens if split.num_bytes else None  # the mean stands for all
    if by_document:
        stream = TokenStream(index, "valid", data.timeout)

        def documents() -> Iterator[Text]:
            for name, start, stop in zip(stream.split.keys, stream.starts, stream.starts[1:], strict=False):
                if stop - start > 1:
                    tokens = torch.from_numpy(stream.read(int(start), int(stop)).astype("int64"))
                    yield _text(name, tokens, bytes_a_token)

        return index.name, stream.num_tokens - stream.num_documents, documents
    batches = Batches(sequences_of(index, data, "valid"), data.batch_size)

    def windows() -> Iterator[Text]:
        for batch in batches.iterate(num_steps=max_batches or None):
            num_labels = int(torch.count_nonzero(batch.labels != IGNORED))
            num_bytes = None if bytes_a_token is None else num_labels * bytes_a_token
            yield Text(batch.tokens, batch.labels, batch.segments, num_bytes=num_bytes)

    num_sequences = min(len(batches.dataset), max_batches * data.batch_size or len(batches.dataset))
    return index.name, num_sequences * data.seq_len, windows


def _text(name: str, tokens: Tensor, bytes_a_token: float | None) -> Text:
    """A document of tokens ``[L]``, L >= 2, each but the first of which is predicted."""
    num_bytes = None if bytes_a_token is None else (len(tokens) - 1) * bytes_a_token
    return Text(tokens[:-1].unsqueeze(0), tokens[1:].unsqueeze(0), name=name, num_bytes=num_bytes)


def restarted(texts: Iterable[Text], context: int) -> Iterator[Text]:
    """The same labels, but the past is forgotten every ``context`` tokens: these become rows of their own."""
    step = max(1, PROMPT_BLOCK // context) * context
    for text in texts:
        length = text.tokens.shape[1]
        for start in range(0, length, step):
            stop = min(length, start + step)
            whole = stop - (stop - start) % context
            for first, last in ((start, whole), (whole, stop)):
                if first < last:
                    yield _folded(text, first, last, min(context, last - first))


def _folded(text: Text, first: int, last: int, length: int) -> Text:
    """A stretch of a text as rows of ``length`` tokens."""

    def fold(x: Tensor) -> Tensor:
        return x[:, first:last].reshape(-1, length)

    labels, num_bytes = fold(text.labels), None
    if text.num_bytes is not None:
        share = torch.count_nonzero(labels != IGNORED) / torch.count_nonzero(text.labels != IGNORED).clamp(min=1)
        num_bytes = text.num_bytes * float(share)
    return Text(fold(text.tokens), labels, None if text.segments is None else fold(text.segments), num_bytes=num_bytes)


@torch.no_grad()
def score(model: Model, texts: Iterable[Text], progress: Callable[[int], None] | None = None) -> Score:
    """Mean loss over texts, read block by block where the model is causal: memory does not grow with their length.

    Args:
        model: on the CPU or a device; texts are moved there block by block.
        texts: what is scored.
        progress: called with the number of tokens just read.

    Raises:
        InputError: there is no token to predict.
    """
    total, documents, stretches = torch.zeros(3, dtype=torch.float64), [], _Stretches()
    for text in texts:
        rows = _by_stretch(model, text, progress)
        nats, count = rows.sum((0, 1)).tolist()
        num_bytes = count if text.num_bytes is None else text.num_bytes
        total += torch.tensor([nats, count, num_bytes], dtype=torch.float64)
        if text.name and count:
            documents.append((text.name, Figure(nats / count, int(count), num_bytes)))
        stretches.add(rows)
    nats, count, num_bytes = total.tolist()
    if not count:
        raise InputError("source", "no tokens", "at least one token with a next one")
    return Score(Figure(nats / count, int(count), num_bytes), documents, stretches.means())


def _by_stretch(model: Model, text: Text, progress: Callable[[int], None] | None) -> Tensor:
    """Nats and labelled tokens of each row's stretches, ``[B, stretches, 2]`` fp64."""
    mesh = Mesh(device=next(model.parameters()).device)
    num_rows, length = text.tokens.shape
    sums = torch.zeros(num_rows, (length // FINEST).bit_length() + 1, 2, dtype=torch.float64)

    def losses(span: Span) -> Tensor:
        """Nats and whether there is a label, ``[B, n, 2]``, of a block."""
        ids, wanted = (span.shard(x).to(device=mesh.device, dtype=torch.int64) for x in (text.tokens, text.labels))
        nll = model(ids, span, wanted)[0].double()
        return torch.stack([nll, (wanted != IGNORED).double()], dim=-1).cpu()

    spans = streaming.blocks(mesh, length, PROMPT_BLOCK if model.config.causal else 0, segments=text.segments)
    for span, found in zip(spans, streaming.read(spans, losses), strict=True):
        position = torch.arange(span.position, span.position + found.shape[1])
        stretch = torch.log2((position // FINEST).double().clamp(min=0.5)).floor().long() + 1
        sums.index_add_(1, stretch, found)
        if progress is not None:
            progress(found.shape[0] * found.shape[1])
    return sums


class _Stretches:
    """Sums over sequences, by stretch: of 1, s, c, s^2, s c and c^2, where s is nats and c tokens of one sequence."""

    def __init__(self) -> None:
        self.sums = torch.zeros(0, 6, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Count the sequences of `_by_stretch`."""
        s, c = rows.unbind(-1)
        new = torch.stack([(c > 0).double(), s, c, s * s, s * c, c * c], dim=-1).sum(0)
        short, long = sorted((self.sums, new), key=len)
        self.sums = long.clone()
        self.sums[: len(short)] += short

    def means(self) -> list[Stretch]:
        """Means a token, with the standard error of a ratio of sums."""
        found = []
        for number, (n, s, c, ss, sc, cc) in enumerate(self.sums.tolist()):
            if c:
                mean = s / c
                spread = max(0.0, ss - 2 * mean * sc + mean * mean * cc)
                error = math.sqrt(spread * n / (n - 1)) / c if n > 1 else math.nan
                found.append(Stretch(FINEST << number >> 1 if number else 0, mean, error, int(c)))
        return found


def write_json(found: Evaluation, path: Path) -> None:
    """Write an evaluation as JSON."""
    path.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")


def plot(found: Evaluation, path: Path, title: str) -> None:
    """Bits per byte against the position, and against the context where that was asked for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 1 + bool(found.by_context), figsize=(12, 5), layout="constrained", squeeze=False
    )
    some = found.score.by_position
    bits = [found.bits(one.loss) for one in some]
    errors = [0.0 if math.isnan(one.error) else found.bits(one.error) for one in some]
    panels[0, 0].errorbar([max(one.first, FINEST // 2) for one in some], bits, yerr=errors, marker="o", capsize=3)
    panels[0, 0].set(
        xlabel=f"from position (the first: 0 to {FINEST - 1})", ylabel="bits per byte, with standard error"
    )
    if found.by_context:
        contexts, figures = zip(*sorted(found.by_context), strict=True)
        panels[0, 1].plot(contexts, [one.bits_per_byte for one in figures], marker="o", label="forgotten every")
        panels[0, 1].axhline(found.score.whole.bits_per_byte, color="grey", linestyle=":", label="nothing forgotten")
        panels[0, 1].set(xlabel="tokens after which the past is forgotten", ylabel="bits per byte")
        panels[0, 1].legend()
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.grid(True, alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
