"""From packed shards to micro-batches, in an order that is a function of (seed, position) alone.

The documents of a split form one stream of tokens. Window ``i`` of length ``seq_len`` is the tokens
``[i*L, (i+1)*L)`` of that stream; each epoch visits all windows once, in its own order. The position, the
number of sequences consumed since the beginning, says everything: two runs at the same position read the
same, whatever the number of ranks, workers and restarts.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import InputError
from .index import Index
from .stall import TIMEOUT, within

IGNORE = -100  # the label that torch's cross-entropy leaves out
KILLED = "DataLoader worker"  # so begins what torch's handler of SIGCHLD raises, wherever the program then is
FILLER = -1  # the index of a sequence that only fills up the last validation batch
PACKINGS = ("stream", "documents")


@dataclass
class Batch:
    """A micro-batch of whole sequences, before any splitting over sequence ranks.

    Args:
        tokens: int64 [b, L]; or [b, L, channels] numbers.
        labels: int64 [b, L], the token after each token, or another class; ``IGNORE`` where there is none. Or [b, L,
            outputs] numbers, NaN where there is none.
        segments: int64 [b, L], the number of each token's document in its split, never falling along L;
            None where sequences run through document ends.
        indices: int64 [b], the number of each window in the stream; ``FILLER`` for one that is not real.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None
    indices: Tensor


class TokenStream:
    """The documents of a split as one array of tokens that is read where it is needed.

    Files are read with ``pread``, not mapped into memory: a shard that is cut while a run reads it then gives
    an error with its name, where a mapping would kill the process.

    Args:
        index: of the packed corpus.
        split: ``train`` or ``valid``.
        timeout: seconds that a read of a shard may take.
    """

    def __init__(self, index: Index, split: str, timeout: float = TIMEOUT) -> None:
        self.index, self.split, self.name, self.timeout = index, index.splits[split], split, timeout
        self.dtype = np.dtype(index.dtype).newbyteorder("<")
        self.starts = np.concatenate([[0], np.cumsum(self.split.length)]).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        return self.split.num_documents

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read the tokens [start, stop) of the stream, in the index's dtype.

        Raises:
            InputError: a shard is missing, has been cut, does not answer, or holds a token that is none of the
                vocabulary; it is named.
        """
        assert 0 <= start <= stop <= self.num_tokens
        tokens = np.empty(stop - start, self.dtype)
        content, size = tokens.view(np.uint8).data, self.dtype.itemsize
        at, number = start, int(np.searchsorted(self.starts, start, "right")) - 1
        while at < stop:
            # All that is wanted of one shard, document by document, with the file open once.
            shard, pieces = int(self.split.shard[number]), []
            while at < stop and self.split.shard[number] == shard:
                inside = at - int(self.starts[number])
                count = min(stop, int(self.starts[number + 1])) - at
                pieces.append((int(self.split.offset[number]) + inside * size, content[: count * size]))
                content, at, number = content[count * size :], at + count, number + 1
            path = self.index.directory / self.split.shards[shard].name
            try:
                within(self.timeout, path, partial(_read_pieces, path, pieces))
            except OSError as error:
                raise InputError("shard", str(path), f"cannot be read: {error.strerror}") from None
        self._check_tokens(tokens, start)
        return tokens

    def _check_tokens(self, tokens: NDArray[Any], start: int) -> None:
        """Raise InputError where one is none of the vocabulary; the embedding would read elsewhere."""
        size = int(self.index.vocabulary["size"])
        if size > np.iinfo(self.dtype).max or not tokens.size or (tokens < size).all():
            return
        place = int((tokens >= size).argmax())
        number = int(np.searchsorted(self.starts, start + place, "right")) - 1
        path = self.index.directory / self.split.shards[int(self.split.shard[number])].name
        allowed = f"must be less than {size}, the size of the vocabulary of its index"
        field = f"token in {self.split.keys[number]!r} in {path}"
        raise InputError(field, int(tokens[place]), allowed, "pack the corpus again")

    def documents(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the document number of each of the tokens [start, stop): int64 [stop - start]."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        last = int(np.searchsorted(self.starts, stop, "left"))
        bounds = np.clip(self.starts[first : last + 1], start, stop)
        return np.repeat(np.arange(first, last, dtype=np.int64), np.diff(bounds))


class Sequences:
    """A split as numbered sequences, and the order in which they are read.

    Args:
        seed: of the order, at least 0: each epoch reads all of them once, in an order of its own; None reads them once,
            as they are numbered.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    def sequence(self, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, labels and segments (or None) of one sequence, without the batch dimension of `Batch`; for `FILLER`,
        a sequence without labels.
        """
        raise NotImplementedError

    def window(self, position: int) -> int:
        """Return which sequence is read at ``position``, counted over all epochs; ``FILLER`` past the end."""
        if self.seed is None:
            return position if position < len(self) else FILLER
        epoch, place = divmod(position, len(self))
        return int(_order(len(self), self.seed, epoch)[place])


class SequenceDataset(Sequences):
    """Windows of ``seq_len`` tokens over a stream, each with the labels of its tokens.

    The label of a token is the next one of the stream, also across the end of a window, so every token but
    the first is a label once an epoch. The last window is filled up with token 0, labels ``IGNORE`` and, in
    ``documents`` packing, a segment of its own; no token is lost, for a rest of a single token is already
    the label that ends the window before.

    Args:
        stream: the tokens.
        seq_len: L, tokens.
        seed: of the order, at least 0; None keeps the order of the stream, once, for validation.
        packing: ``stream``: sequences run through document ends. ``documents``: no label reaches into the
            next document, and batches tell the documents apart by their segments.

    Raises:
        InputError: the stream has no token that follows another one, or ``packing`` is unknown.
    """

    def __init__(self, stream: TokenStream, seq_len: int, *, seed: int | None, packing: str = "stream") -> None:
        if packing not in PACKINGS:
            raise InputError("data.packing", packing, f"must be one of {', '.join(PACKINGS)}")
        if seq_len < 1:
            raise InputError("data.seq_len", seq_len, "must be at least 1 token")
        if stream.num_tokens < 2:
            where = f"{stream.index.directory} holds {stream.num_tokens} tokens in its split {stream.name}"
            fix = "pack more documents, or another data.valid_fraction"
            raise InputError("data.source", where, "must hold at least 2", fix)
        if packing == "documents" and stream.num_tokens == stream.num_documents:
            where = f"{stream.index.directory} holds only documents of one token in its split {stream.name}"
            fix = "set data.packing=stream, or pack longer documents"
            raise InputError("data.source", where, "must hold a token that has a next one in its document", fix)
        super().__init__(seed)
        self.stream, self.seq_len, self.packing = stream, seq_len, packing

    def __len__(self) -> int:
        return -(-(self.stream.num_tokens - 1) // self.seq_len)

    def sequence(self, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read a window: tokens, labels, segments (or None), each int64 [L]; all masked for ``FILLER``."""
        stream, by_document = self.stream, self.packing == "documents"
        tokens, labels = np.zeros(self.seq_len, np.int64), np.full(self.seq_len, IGNORE, np.int64)
        segments = np.full(self.seq_len, stream.num_documents, np.int64) if by_document else None
        if window != FILLER:
            start = window * self.seq_len
            stop = min(start + self.seq_len, stream.num_tokens)
            after = min(stop + 1, stream.num_tokens)
            content = stream.read(start, after)
            tokens[: stop - start] = content[: stop - start]
            labels[: after - start - 1] = content[1:]
            if segments is not None:
                numbers = stream.documents(start, after)
                segments[: stop - start] = numbers[: stop - start]
                labels[: after - start - 1][numbers[1:] != numbers[:-1]] = IGNORE
        rest = None if segments is None else torch.from_numpy(segments)
        return torch.from_numpy(tokens), torch.from_numpy(labels), rest


class WorkerFailed(RuntimeError):
    """A process that reads ahead has died."""


def worker_failure(error: Exception) -> WorkerFailed:
    """Say in one line that a worker failed, and why."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    fix = "was there enough memory? data.workers=0 reads in a thread instead"
    return WorkerFailed(f"a data worker failed: {reason}; {fix}")


class Batches:
    """The micro-batches of one data rank.

    A step takes the next ``batch_size`` positions. Data rank d of n takes the d-th of n contiguous parts, in
    micro-batches; the ranks that share a sequence are one data rank and read the same.

    Args:
        dataset: sequences, and their order.
        batch_size: sequences per step over all data ranks.
        micro_batch_size: sequences per micro-batch.
        data_rank, num_data_ranks: d and n.
        workers: processes that read ahead; 0 reads one micro-batch ahead in a thread.

    Raises:
        InputError: ``batch_size`` is no multiple of ``num_data_ranks * micro_batch_size``.
    """

    def __init__(
        self,
        dataset: Sequences,
        batch_size: int,
        *,
        micro_batch_size: int = 1,
        data_rank: int = 0,
        num_data_ranks: int = 1,
        workers: int = 0,
    ) -> None:
        assert 0 <= data_rank < num_data_ranks
        unit = num_data_ranks * micro_batch_size
        if batch_size < 1 or batch_size % unit:
            allowed = f"must be a multiple of {num_data_ranks} data ranks x {micro_batch_size} sequences"
            raise InputError("data.batch_size", batch_size, allowed, f"for example {unit}")
        self.dataset, self.batch_size, self.micro_batch_size = dataset, batch_size, micro_batch_size
        self.data_rank, self.num_data_ranks, self.workers = data_rank, num_data_ranks, workers

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of this rank in a step."""
        return self.batch_size // (self.num_data_ranks * self.micro_batch_size)

    def windows(self, position: int) -> list[int]:
        """Which windows the step that begins at ``position`` reads, on all data ranks."""
        return [self.dataset.window(position + number) for number in range(self.batch_size)]

    def load(self, position: int) -> Batch:
        """Read the micro-batch whose first sequence stands at ``position``."""
        windows = [self.dataset.window(position + i) for i in range(self.micro_batch_size)]
        tokens, labels, segments = zip(*map(self.dataset.sequence, windows), strict=True)
        segments_bl = None
        if any(ids is not None for ids in segments):  # a sequence without padding may have none
            none = torch.zeros(tokens[0].shape[:1], dtype=torch.int64)
            segments_bl = torch.stack([none if ids is None else ids for ids in segments])
        return Batch(torch.stack(tokens), torch.stack(labels), segments_bl, torch.tensor(windows))

    def iterate(self, position: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """Yield this rank's micro-batches from ``position`` on, ``num_micro_batches`` for each step.

        Args:
            position: sequences consumed so far over all ranks, a multiple of nothing.
            num_steps: None for no end. A dataset without a seed ends by itself once every window was read;
                fillers complete its last step, so every rank gets the same number of micro-batches.
        """
        if self.dataset.seed is None:
            steps_left = max(0, -(-(len(self.dataset) - position) // self.batch_size))
            num_steps = steps_left if num_steps is None else min(num_steps, steps_left)
        positions = self._positions(position, num_steps)
        return self._from_workers(positions) if self.workers else self._from_thread(positions)

    def _positions(self, position: int, num_steps: int | None) -> Iterator[int]:
        share = self.batch_size // self.num_data_ranks
        for step in itertools.count() if num_steps is None else range(num_steps):
            first = position + step * self.batch_size + self.data_rank * share
            yield from range(first, first + share, self.micro_batch_size)

    def _from_thread(self, positions: Iterator[int]) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, "read-ahead") as pool:
            ahead = None
            for position in positions:
                now = ahead and ahead.result()  # before the next is begun: its end would be waited for, if this fails
                ahead = pool.submit(self.load, position)
                if now is not None:
                    yield now
            if ahead is not None:
                yield ahead.result()

    def _from_workers(self, positions: Iterator[int]) -> Iterator[Batch]:
        # Its own generator: the loader would draw its workers' seed from torch's, which dropout uses.
        loader: DataLoader[Any] = DataLoader(
            _ByPosition(self),
            batch_size=None,
            sampler=positions,
            num_workers=self.workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),
        )
        items = iter(loader)
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:
                raise worker_failure(_cause(error)) from error
            if not isinstance(item, Batch):
                raise InputError(*item)
            yield item


class _ByPosition(Dataset[Batch | tuple[Any, ...]]):
    """`Batches` in the shape that torch's DataLoader asks for.

    A worker hands an InputError over as its parts: raised there, it would arrive as another exception whose
    message is a whole traceback.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, position: int) -> Batch | tuple[Any, ...]:
        try:
            return self.batches.load(position)
        except InputError as error:
            return error.field, error.value, error.allowed, error.fix


def _unchanged(item: Any) -> Any:
    return item


def _cause(error: Exception) -> Exception:
    """Why reading from a worker failed, which shows as its name, a reset connection or half a pickle."""
    try:
        # torch's handler of SIGCHLD raises too, and knows most; not here, it would break into the traceback.
        time.sleep(1)
    except RuntimeError as named:
        return named
    return error


def _read_pieces(path: Path, pieces: list[tuple[int, memoryview]]) -> None:
    """Fill each piece with what the file holds from its byte on."""
    with open(path, "rb", buffering=0) as file:
        for offset, content in pieces:
            while content:
                count = os.preadv(file.fileno(), [content], offset)
                if count == 0:
                    allowed = f"ends at byte {os.fstat(file.fileno()).st_size}, and byte {offset} is wanted"
                    raise InputError("shard", str(path), allowed, "it was cut: pack the corpus again")
                content, offset = content[count:], offset + count


@lru_cache(maxsize=2)  # a batch can lie across the border of two epochs
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of one epoch's windows, int64 [count].

    RandomState, because NumPy promises that its streams never change: torch's and NumPy's newer generators
    may give another order after an update, and a resumed run would then read other data.
    """
    words = [part >> shift & 0xFFFFFFFF for part in (seed, epoch) for shift in (0, 32)]
    return np.random.RandomState(words).permutation(count)
