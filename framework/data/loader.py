"""From packed shards to micro-batches, in an order that is a function of (seed, position) alone.

The documents of a split form one stream of tokens. Window ``i`` of length L is the tokens ``[i*L, (i+1)*L)`` of that
stream; each epoch reads all windows once, in a permutation of its own. The position is the number of sequences read
since the beginning of training: two runs at the same position read the same sequences next, independent of the number
of ranks, workers and restarts.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import InputError
from .index import Index
from .labels import IGNORE, next_token_labels
from .nucleotides import complement_of
from .stall import TIMEOUT, run_with_timeout

WORKER_DIED = "DataLoader worker"  # how the message begins that torch raises, from a signal handler, if a worker dies
SCAN_LEN = 1 << 20  # tokens that are read at a time to find windows with labels
FILLER = -1  # the number of a sequence without labels, which completes the last validation batch
Packing = Literal["stream", "documents"]


@dataclass
class Batch:
    """A micro-batch of b whole sequences of L tokens, before it is split over sequence ranks.

    Args:
        tokens: int64 ``[b, L]`` ids, or float32 ``[b, L, channels]``.
        labels: int64 ``[b, L]``: the next token or another class; ``IGNORE`` for no label. Or float32
            ``[b, L, outputs]``, NaN for no label.
        segments: document ids, int64 ``[b, L]``, non-decreasing along L; None if documents are not kept apart.
        indices: int64 ``[b]``, the number of each sequence in its dataset; ``FILLER`` for one without labels.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None
    indices: Tensor


class TokenStream:
    """The documents of a split as one array of tokens, read from the shards on demand.

    Files are read with ``pread``, not memory-mapped: if a shard is truncated during a run, ``pread`` gives an error
    that names it, while access to a mapping would kill the process.

    Args:
        index: of the packed corpus.
        split: ``train`` or ``valid``.
        timeout: seconds that a read of a shard may take.
    """

    def __init__(self, index: Index, split: str, timeout: float = TIMEOUT) -> None:
        self.index, self.split, self.name, self.timeout = index, index.splits[split], split, timeout
        self.dtype = np.dtype(index.dtype).newbyteorder("<")
        self.starts = np.concatenate([[0], np.cumsum(self.split.length)]).astype(np.int64)
        self._windows: dict[tuple[int, bool, bool], NDArray[np.int64]] = {}

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        return self.split.num_documents

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read the tokens ``[start, stop)`` of the stream, in the index's dtype.

        Raises:
            InputError: a shard is missing, truncated, does not answer a read, or has a token outside the vocabulary;
                names the shard.
        """
        assert 0 <= start <= stop <= self.num_tokens
        tokens = np.empty(stop - start, self.dtype)
        content, size = tokens.view(np.uint8).data, self.dtype.itemsize
        at, number = start, int(np.searchsorted(self.starts, start, "right")) - 1
        while at < stop:
            # All ranges of one shard, one for each document, so that the file is opened once.
            shard, ranges = int(self.split.shard[number]), []
            while at < stop and self.split.shard[number] == shard:
                skipped = at - int(self.starts[number])
                count = min(stop, int(self.starts[number + 1])) - at
                ranges.append((int(self.split.offset[number]) + skipped * size, content[: count * size]))
                content, at, number = content[count * size :], at + count, number + 1
            path = self.index.directory / self.split.shards[shard].name
            try:
                run_with_timeout(self.timeout, path, partial(_read_ranges, path, ranges))
            except OSError as error:
                raise InputError("shard", str(path), f"cannot be read: {error.strerror}") from None
        self._check_tokens(tokens, start)
        return tokens

    def _check_tokens(self, tokens: NDArray[Any], start: int) -> None:
        """Raise InputError for a token outside the vocabulary: indexing the embedding with it is undefined."""
        size = int(self.index.vocabulary["size"])
        if size > np.iinfo(self.dtype).max or not tokens.size or (tokens < size).all():
            return
        place = int((tokens >= size).argmax())
        number = int(np.searchsorted(self.starts, start + place, "right")) - 1
        path = self.index.directory / self.split.shards[int(self.split.shard[number])].name
        allowed = f"must be less than {size}, the size of the vocabulary of its index"
        field = f"token in {self.split.keys[number]!r} in {path}"
        raise InputError(field, int(tokens[place]), allowed, "pack the corpus again")

    def windows_with_labels(self, seq_len: int, by_document: bool, both_strands: bool) -> NDArray[np.int64]:
        """The windows of `SequenceDataset` in which not every label is masked, read in either direction; int64."""
        key = (seq_len, by_document, both_strands)
        if key not in self._windows:
            is_masked = np.zeros(int(self.index.vocabulary["size"]), bool)
            is_masked[list(self.index.masked)] = True
            found = np.zeros(max(0, -(-(self.num_tokens - 1) // seq_len)), bool)
            for start in range(0, self.num_tokens, SCAN_LEN):
                stop = min(start + SCAN_LEN, self.num_tokens)
                is_label = ~is_masked[self.read(start, stop)]
                if start == 0:
                    is_label[0] = False
                if by_document:
                    first, last = np.searchsorted(self.starts, [start, stop])
                    is_label[self.starts[first:last] - start] = False
                places = start + np.flatnonzero(is_label)
                if both_strands:  # inside a window, so that it is a label in both directions
                    places = places[(places % seq_len > 0) & (places < self.num_tokens - 1)]
                found[(places - 1) // seq_len] = True
            self._windows[key] = np.flatnonzero(found)
        return self._windows[key]

    def documents(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the document number of each of the tokens ``[start, stop)``, int64 ``[stop - start]``."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        last = int(np.searchsorted(self.starts, stop, "left"))
        bounds = np.clip(self.starts[first : last + 1], start, stop)
        return np.repeat(np.arange(first, last, dtype=np.int64), np.diff(bounds))


class Sequences:
    """A split as a dataset of numbered sequences, and the order in which they are read.

    Args:
        seed: of the order, at least 0: each epoch reads all sequences once, in a permutation of its own. None reads
            them once, in order.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def num_numbers(self) -> int:
        """The numbers of sequences are below this: their count, or more where a sequence has several forms."""
        return len(self)

    def epochs(self, count: int) -> dict[str, float]:
        """How often the first ``count`` sequences read each source, by name; of a single one the name is empty."""
        return {"": count / max(1, len(self))}

    def sequence(self, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, labels and segments (or None) of sequence ``window``, as in `Batch` without the batch dimension.

        `FILLER` gives a sequence without labels.
        """
        raise NotImplementedError

    def window(self, position: int) -> int:
        """Return the number of the sequence at ``position``, counted over all epochs; ``FILLER`` past the end."""
        if self.seed is None:
            return position if position < len(self) else FILLER
        epoch, index = divmod(position, len(self))
        return int(_epoch_order(len(self), self.seed, epoch)[index])


class SequenceDataset(Sequences):
    """Windows of ``seq_len`` tokens of a stream, with next-token labels.

    The label of a token is the next one of the stream, also at the end of a window: every token but the first is a
    label once per epoch. The last window is padded with token 0, labels ``IGNORE`` and, with ``documents`` packing, a
    segment of its own. A single remaining token gets no window: it already is the last label of the window before.

    Args:
        stream: the tokens.
        seq_len: L, tokens.
        seed: of the order, at least 0; None reads the stream once in order, for validation.
        packing: ``stream``: documents are concatenated and not kept apart. ``documents``: no label is from the next
            document, and batches have the document ids as segments.
        both_strands: in each epoch, half of the sequences on average are the reverse complements of their windows; the
            numbers of these are ``len(self)`` higher.

    Tokens that the index masks are no labels, and windows without any label are left out.

    Raises:
        InputError: the stream has no token with a label, or an argument is out of range.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        *,
        seed: int | None,
        packing: Packing = "stream",
        both_strands: bool = False,
    ) -> None:
        if packing not in get_args(Packing):
            raise InputError("data.packing", packing, f"must be one of {', '.join(get_args(Packing))}")
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
        self.masked = torch.tensor(stream.index.masked)
        self.windows: NDArray[np.int64] | None = None  # those that are read; None for all
        if stream.index.masked:
            self.windows = stream.windows_with_labels(seq_len, packing == "documents", both_strands)
            if not len(self.windows):
                where = f"{stream.index.directory} holds only masked tokens in its split {stream.name}"
                raise InputError("data.source", where, "must hold a token that is a label", "pack it with another mask")
        self.complement = None
        if both_strands:
            self.complement = complement_of(stream.index.source.get("alphabet"), stream.index.name)

    def __len__(self) -> int:
        return -(-(self.stream.num_tokens - 1) // self.seq_len) if self.windows is None else len(self.windows)

    @property
    def num_numbers(self) -> int:
        return len(self) * (1 if self.complement is None else 2)

    def window(self, position: int) -> int:
        number = super().window(position)
        if self.complement is None or self.seed is None:
            return number
        is_other_strand = _epoch_strands(len(self), self.seed, position // len(self))[number]
        return number + len(self) * int(is_other_strand)

    def sequence(self, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read a window: tokens, labels, segments (or None), each int64 ``[L]``."""
        stream, by_document = self.stream, self.packing == "documents"
        tokens, labels = torch.zeros(self.seq_len, dtype=torch.int64), torch.full((self.seq_len,), IGNORE)
        segments = torch.full((self.seq_len,), stream.num_documents) if by_document else None
        if window != FILLER:
            other_strand, number = divmod(window, len(self))
            start = self.seq_len * (number if self.windows is None else int(self.windows[number]))
            stop = min(start + self.seq_len, stream.num_tokens)
            after = min(stop + 1, stream.num_tokens)
            content = torch.from_numpy(stream.read(start, after).astype(np.int64))
            numbers = torch.from_numpy(stream.documents(start, after).astype(np.int64)) if by_document else None
            is_masked = torch.isin(content, self.masked)
            if other_strand and self.complement is not None:
                content, is_masked = self.complement[content.flip(0)], is_masked.flip(0)
                numbers = None if numbers is None else numbers[-1] - numbers.flip(0)
            tokens[: stop - start] = content[: stop - start]
            if segments is not None and numbers is not None:
                segments[: stop - start] = numbers[: stop - start]
            labels[: stop - start] = next_token_labels(content, numbers, is_masked)[: stop - start]
        return tokens, labels, segments


class Parts(Sequences):
    """The sequences of another dataset, each cut into equal parts, which are read one after the other.

    Args:
        whole: the dataset; its sequences have a multiple of ``count`` tokens.
        count: parts of each.
    """

    def __init__(self, whole: Sequences, count: int) -> None:
        super().__init__(whole.seed)
        self.whole, self.count = whole, count
        self._last: tuple[int, tuple[Tensor, Tensor, Tensor | None]] | None = None  # so that it is read once

    def __len__(self) -> int:
        return len(self.whole) * self.count

    @property
    def num_numbers(self) -> int:
        return self.whole.num_numbers * self.count

    def epochs(self, count: int) -> dict[str, float]:
        return self.whole.epochs(count // self.count)

    def window(self, position: int) -> int:
        number, part = divmod(position, self.count)
        window = self.whole.window(number)
        return FILLER if window == FILLER else window * self.count + part

    def sequence(self, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
        number, part = (FILLER, 0) if window == FILLER else divmod(window, self.count)
        if self._last is None or self._last[0] != number:
            self._last = number, self.whole.sequence(number)
        tokens, labels, segments = self._last[1]
        length = len(tokens) // self.count
        cut = slice(part * length, (part + 1) * length)
        return tokens[cut], labels[cut], None if segments is None else segments[cut]


class WorkerFailed(RuntimeError):
    """A data worker, a process that prefetches batches, has died."""


def worker_failure(error: Exception) -> WorkerFailed:
    """The `WorkerFailed` for an error from a data worker: one line with the reason."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    fix = "was there enough memory? data.workers=0 reads in a thread instead"
    return WorkerFailed(f"a data worker failed: {reason}; {fix}")


class Batches:
    """The micro-batches of one data rank.

    A step reads the next ``batch_size`` positions. Data rank d of n reads the d-th of n contiguous parts of them, in
    micro-batches; the ranks that share a sequence form one data rank and read the same.

    Args:
        dataset: sequences, and their order.
        batch_size: sequences per step over all data ranks.
        micro_batch_size: sequences per micro-batch.
        data_rank, num_data_ranks: d and n.
        workers: processes that prefetch; with 0, a thread prefetches one micro-batch.

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
        """The numbers of the sequences that the step at ``position`` reads, over all data ranks."""
        return [self.dataset.window(position + number) for number in range(self.batch_size)]

    def load(self, position: int) -> Batch:
        """Read the micro-batch that begins at ``position``."""
        windows = [self.dataset.window(position + i) for i in range(self.micro_batch_size)]
        tokens, labels, segments = zip(*map(self.dataset.sequence, windows), strict=True)
        segments_bl = None
        if any(ids is not None for ids in segments):  # a sequence of one document without padding may have none
            zeros = torch.zeros(tokens[0].shape[:1], dtype=torch.int64)
            segments_bl = torch.stack([zeros if ids is None else ids for ids in segments])
        return Batch(torch.stack(tokens), torch.stack(labels), segments_bl, torch.tensor(windows))

    def iterate(self, position: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """Yield this rank's micro-batches from ``position`` on, ``num_micro_batches`` for each step.

        Args:
            position: sequences read so far over all ranks; any number.
            num_steps: None for no end. A dataset without a seed ends once every sequence was read; `FILLER` completes
                its last step, so that every rank gets the same number of micro-batches.
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
            prefetched = None
            for position in positions:
                # Before the next load is submitted: if this one failed, leaving the pool would wait for that one.
                batch = prefetched and prefetched.result()
                prefetched = pool.submit(self.load, position)
                if batch is not None:
                    yield batch
            if prefetched is not None:
                yield prefetched.result()

    def _from_workers(self, positions: Iterator[int]) -> Iterator[Batch]:
        # A generator of its own: the loader would take its workers' seed from torch's default one, as dropout does.
        loader: DataLoader[Any] = DataLoader(
            _BatchDataset(self),
            batch_size=None,
            sampler=positions,
            num_workers=self.workers,
            collate_fn=_identity,
            generator=torch.Generator(),
            worker_init_fn=_outlive_signals,
        )
        items = iter(loader)
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:
                raise worker_failure(_failure_cause(error)) from error
            if not isinstance(item, Batch):
                raise InputError(*item)
            yield item


def _outlive_signals(worker: int) -> None:
    """A worker ends by its queue, or when its rank ends it. A scheduler asks every process to end, while the rank still
    has steps to do.
    """
    numbers, rank = (signal.SIGTERM, signal.SIGUSR1), os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def watch() -> None:
        while True:
            found = signal.sigwaitinfo(numbers)
            if found.si_signo == signal.SIGTERM and found.si_pid == rank:  # as multiprocessing does at the rank's exit
                os._exit(0)

    threading.Thread(target=watch, name="signals", daemon=True).start()


class _BatchDataset(Dataset[Batch | tuple[Any, ...]]):
    """`Batches` as a map-style dataset for torch's DataLoader, indexed by position.

    An InputError is returned as a tuple of its fields: if a worker raised it, the DataLoader would raise another
    exception, whose message is the worker's traceback.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, position: int) -> Batch | tuple[Any, ...]:
        try:
            return self.batches.load(position)
        except InputError as error:
            return error.field, error.value, error.allowed, error.fix


def _identity(item: Any) -> Any:
    return item


def _failure_cause(error: Exception) -> Exception:
    """The most informative exception after reading from a worker failed.

    ``error`` may be a mere consequence of a worker's death: a reset connection or a truncated pickle. torch's handler
    of SIGCHLD raises the reason; the sleep lets it do so here, and not while ``error`` is handled.
    """
    try:
        time.sleep(1)
    except RuntimeError as worker_died:
        return worker_died
    return error


def _read_ranges(path: Path, ranges: list[tuple[int, memoryview]]) -> None:
    """Read into each buffer the bytes of the file from its offset on; InputError if the file ends before."""
    with open(path, "rb", buffering=0) as file:
        for offset, content in ranges:
            while content:
                count = os.preadv(file.fileno(), [content], offset)
                if count == 0:
                    allowed = f"ends at byte {os.fstat(file.fileno()).st_size}, and byte {offset} is needed"
                    raise InputError("shard", str(path), allowed, "it was cut: pack the corpus again")
                content, offset = content[count:], offset + count


@lru_cache(maxsize=2)  # a batch can contain sequences of two epochs
def _epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the permutation of one epoch's sequences, int64 ``[count]``.

    By RandomState, whose streams NumPy guarantees never to change: with torch's or NumPy's newer generators, a run
    resumed after an update could read other data.
    """
    return np.random.RandomState(_words(seed, epoch)).permutation(count)


@lru_cache(maxsize=2)
def _epoch_strands(count: int, seed: int, epoch: int) -> NDArray[np.bool_]:
    """Return which of one epoch's sequences are read as the other strand, bool ``[count]``; as `_epoch_order`."""
    return np.random.RandomState([*_words(seed, epoch), 1]).random_sample(count) < 0.5


def _words(*numbers: int) -> list[int]:
    return [number >> shift & 0xFFFFFFFF for number in numbers for shift in (0, 32)]
