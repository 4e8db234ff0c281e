"""Hidden states of files of any length, for each token, window or document, written as they are computed.

A causal model reads a document block by block: memory does not grow with its length. The rows of all documents are one
array ``[rows, D]`` fp32 in an ``.npy`` or a ``.safetensors`` file, and a JSON file beside it says whose they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...parallel import streaming
from ...parallel.mesh import Mesh, to_device
from ...parallel.span import Span
from ..config import RunConfig
from ..data import DataConfig, SubwordVocabulary, Vocabulary
from ..data.corpus import list_files
from ..data.reading import BadSamples, Reader
from ..data.tally import Tally
from ..model import SequenceModel
from ..model.heads import SequenceHead
from ..runtime.files import remove
from .generate import PREFILL_BLOCK_LEN
from .inputs import document_tokens, encode, rows_of
from .loading import ExportedModel, describe_task, load_run, vocabulary_of

Per = Literal["token", "document", "window"]
Pooling = Literal["mean", "last"]
SUFFIXES = (".npy", ".safetensors")
TENSOR = "embeddings"  # name of the tensor in a safetensors file
LAST = -1  # the layer
NPY_HEADER, SAFETENSORS_HEADER = 128, 256  # bytes; a fixed size, so that the number of rows can be written at the end


@dataclass
class Embedder:
    """A model whose hidden states are wanted.

    Args:
        model: in evaluation mode, on any device. Its layers are its first list of modules.
        layer: 0 for the embedded tokens, N for the output of layer N, or counted from the end: -1 for that of the last
            layer, after the final norm unless the head pools before it (as in transformers).
        per: a row for each ``token``, each ``window`` of tokens or each ``document``.
        pooling: of the tokens of a window or document: their ``mean``, or the ``last`` one.
        window: tokens of a window; the last one of a document may be shorter.

    Raises:
        InputError: the model has no such layer, or the window does not fit ``per``.
    """

    model: SequenceModel
    layer: int = LAST
    per: Per = "document"
    pooling: Pooling = "mean"
    window: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("per", Per), ("pooling", Pooling)):
            if getattr(self, name) not in get_args(kinds):
                raise InputError(name, getattr(self, name), f"one of {', '.join(get_args(kinds))}")
        if (self.window > 0) != (self.per == "window") or self.window < 0:
            allowed = "at least 1 token for per=window, and 0 otherwise"
            raise InputError("window", self.window, allowed, "for example --per window --window 4096")
        self._layers = next(one for one in self.model.modules() if isinstance(one, nn.ModuleList))
        depth = len(self._layers)
        if not -depth - 1 <= self.layer <= depth:
            raise InputError(
                "layer", self.layer, f"from 0 (the embedded tokens) to {depth}, or from -1 to {-depth - 1}"
            )
        self._number = self.layer % (depth + 1)

    def rows(self, tokens: Tensor) -> Iterator[Tensor]:
        """The rows of one document, as they are known.

        Args:
            tokens: ``[n]`` ids of any integer type, or ``[n, C]`` numbers; n is at least 1.

        Yields:
            ``[k, D]`` fp32 on the CPU; k may be 0.
        """
        model, device = self.model, next(self.model.parameters()).device
        sequence = tokens.unsqueeze(0)
        pool = None if self.per == "token" else _Pool(self.window, self.pooling)

        def states(span: Span) -> Tensor:
            part = to_device(span.shard(sequence), device)
            return self._states(part if part.is_floating_point() else part.long(), span)[0]

        block_len = PREFILL_BLOCK_LEN if model.config.causal else 0
        for x in streaming.read(streaming.blocks(Mesh(device=device), len(tokens), block_len), states):
            yield (x if pool is None else pool.add(x)).float().cpu()
        if pool is not None and pool.count:
            yield pool.finish().float().cpu()

    def _states(self, tokens: Tensor, span: Span) -> Tensor:
        """The hidden states ``[1, n, D]`` of the layer for a block of tokens."""
        pools, is_last = isinstance(self.model.head, SequenceHead), self._number == len(self._layers)
        if is_last and not pools:
            norm = getattr(self.model.head, "norm", nn.Identity())
            return cast(Tensor, norm(self.model.features(tokens, span)[0]))
        found: list[Tensor] = []

        def keep(value: Any) -> None:
            found.append(value[0] if isinstance(value, tuple) else value)

        if self._number:
            hook = self._layers[self._number - 1].register_forward_hook(lambda module, given, value: keep(value))
        else:
            hook = self._layers[0].register_forward_pre_hook(lambda module, given: keep(given))
        with hook:
            self.model.features(tokens, span)
        return found[0]


class _Pool:
    """Pools each so many consecutive tokens to a row, and those that are left at the end to another.

    Args:
        length: tokens of a row; 0 for all.
        pooling: ``mean``, of sums in fp64, or ``last``.
    """

    def __init__(self, length: int, pooling: Pooling) -> None:
        self.length, self.is_last = length, pooling == "last"
        self.count, self.kept = 0, torch.zeros(0)  # tokens of the row under way; their sum, or the last of them

    def add(self, x: Tensor) -> Tensor:
        """Take the next tokens ``[n, D]``; returns the rows ``[k, D]`` that they complete."""
        rows = [x[:0].double()]
        while len(x):
            if self.length and not self.count and len(x) >= self.length:
                whole = x[: len(x) // self.length * self.length].unflatten(0, (-1, self.length))
                rows.append(whole[:, -1].double() if self.is_last else whole.double().mean(1))
                x = x[whole.shape[0] * self.length :]
                continue
            part = x[: self.length - self.count] if self.length else x
            x = x[len(part) :]
            summed = part[-1].double() if self.is_last else part.double().sum(0)
            self.kept = summed if self.is_last or not self.count else self.kept + summed
            self.count += len(part)
            if self.count == self.length:
                rows.append(self.finish())
        return torch.cat(rows)

    def finish(self) -> Tensor:
        """The row under way, ``[1, D]``; it has a token."""
        row = self.kept if self.is_last else self.kept / self.count
        self.count = 0
        return row.unsqueeze(0)


class Summary(NamedTuple):
    """What `embed` wrote: numbers of documents, tokens and rows, D, and what became of the files.

    ``counts`` is of `Tally.as_json`.
    """

    num_documents: int
    num_tokens: int
    num_rows: int
    width: int
    counts: dict[str, dict[str, int]]


class _Document(NamedTuple):
    """A document: its source and name, tokens ``[n]`` or ``[n, C]``, and its size in bytes if it is a text."""

    source: str
    name: str
    tokens: Tensor
    num_bytes: int | None


def embed(
    place: str | Path,
    sources: Sequence[str],
    out: str | Path,
    *,
    layer: int = LAST,
    per: Per = "document",
    pooling: Pooling = "mean",
    window: int = 0,
    device: torch.device | None = None,
) -> Summary:
    """Write the hidden states of all documents of some files and folders.

    Args:
        place: directory of a run or of an export.
        sources: files and folders, of which documents are read as `evaluate.evaluate` reads them; pictures and time
            series as `inputs.rows_of` does.
        out: an ``.npy`` or ``.safetensors`` file, and beside it a ``.json`` file: the rows of each document. Both are
            there once all is written.
        layer, per, pooling, window: see `Embedder`.
        device: where the model computes; by default on the GPU, where torch sees one.

    Raises:
        InputError: model, files and options do not fit together, or a file cannot be read or written.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise InputError("out", str(out), f"a name that ends in {' or '.join(SUFFIXES)}")
    config, model = load_run(place, device=device)
    embedder, tally = Embedder(model, layer, per, pooling, window), Tally()
    head = {"model": str(place), "layer": embedder._number, "per": per}
    head |= {} if per == "token" else {"pooling": pooling}
    head |= {"window": window} if per == "window" else {}
    try:
        with ExitStack() as stack:
            table = stack.enter_context(_Table.open(out))
            index = stack.enter_context(_replacing(out.with_suffix(".json"), "w"))
            index.write(json.dumps(head)[:-1] + ', "documents": [')
            num_documents = num_tokens = 0
            for document in _documents(place, config, model, sources, tally):
                first = table.num_rows
                for rows in embedder.rows(document.tokens):
                    table.add(rows)
                entry: dict[str, Any] = {"source": document.source, "document": document.name}
                entry |= {"first_row": first, "rows": table.num_rows - first, "tokens": len(document.tokens)}
                entry |= {} if document.num_bytes is None else {"bytes": document.num_bytes}
                index.write("," * (num_documents > 0) + "\n" + json.dumps(entry))
                num_documents, num_tokens = num_documents + 1, num_tokens + len(document.tokens)
            if not num_documents:
                raise InputError("SOURCE", ", ".join(sources), "must have a document of at least one token")
            index.write(f'\n], "rows": {table.num_rows}, "width": {table.width}}}\n')
    except OSError as error:
        raise InputError("out", str(out), f"cannot be written: {error.strerror or error}") from None
    return Summary(num_documents, num_tokens, table.num_rows, table.width, tally.as_json())


def _documents(
    place: str | Path, config: RunConfig | None, model: SequenceModel, sources: Sequence[str], tally: Tally
) -> Iterator[_Document]:
    """The documents of the sources; texts are held as their bytes are, one at a time."""
    vocabulary, data = vocabulary_of(place, model), DataConfig() if config is None else config.data
    if not model.config.channels:
        yield from _texts(vocabulary, model.config.vocab, data, sources, tally)
        return
    task = model.task if isinstance(model, ExportedModel) else describe_task(Path(place), config)
    if task is None:
        raise InputError("model", str(place), "has no description of its task", "export the run again")
    for source in sources:
        for row in rows_of([source], task, model.config):
            (numbers,) = encode(row.read(), row.name, task, model.config, vocabulary).documents
            yield _Document(source, row.name, torch.from_numpy(numbers), None)


def _texts(
    vocabulary: Vocabulary, vocab: int, data: DataConfig, sources: Sequence[str], tally: Tally
) -> Iterator[_Document]:
    chat = vocabulary.encode_chat if isinstance(vocabulary, SubwordVocabulary) else None
    for source in sources:
        files, upper = list_files(source, data.binary, tally), data.case == "upper"
        reader = Reader(files, 0.0, data.field, chat=chat, tally=tally, upper=upper)
        for key, content in reader.read("train", BadSamples(data.max_bad_samples, tally=tally), vocabulary.check):
            tokens = document_tokens(key, content, vocabulary)
            if len(tokens) and int(tokens.max()) >= vocab:
                raise InputError("SOURCE", key, f"must have tokens from 0 to {vocab - 1}, as the model")
            if len(tokens):
                yield _Document(source, key, tokens, content.nbytes if content.itemsize == 1 else None)


@dataclass
class _Table:
    """A file of rows ``[N, D]`` fp32 that grows.

    Attributes:
        file: is written from its beginning.
        is_npy: or safetensors.
        num_rows, width: N and D; 0 before the first row.
    """

    file: IO[bytes]
    is_npy: bool
    num_rows: int = 0
    width: int = 0

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[_Table]:
        """A table whose file replaces ``path`` at the end."""
        with _replacing(path, "wb") as file:
            table = cls(file, path.suffix == ".npy")
            file.write(table.header())
            yield table
            file.seek(0)
            file.write(table.header())

    def add(self, rows: Tensor) -> None:
        """Append rows ``[k, D]`` fp32."""
        self.file.write(rows.numpy().astype("<f4", copy=False).tobytes())
        self.num_rows, self.width = self.num_rows + len(rows), rows.shape[1]

    def header(self) -> bytes:
        """The header of a file of the rows so far; it has the same size for any number of them."""
        if self.is_npy:
            text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.num_rows}, {self.width}), }}"
            length = NPY_HEADER - 10
            return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"
        shape = [self.num_rows, self.width]
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * self.num_rows * self.width]}
        length = SAFETENSORS_HEADER - 8
        return length.to_bytes(8, "little") + json.dumps({TENSOR: entry}).ljust(length).encode()


@contextmanager
def _replacing(path: Path, mode: str) -> Iterator[IO[Any]]:
    """A file that replaces ``path`` once all is written; what was there stays until then."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        remove(partial)
