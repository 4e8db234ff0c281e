"""Reads the documents of a split; up to a limit, documents that cannot be decoded are logged and skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from numpy.typing import NDArray

from ...errors import InputError
from .corpus import File
from .document import Chat
from .holdout import Holdout
from .progress import Callback, progress
from .records import documents
from .tally import Tally
from .tar import BadSample

log = logging.getLogger("longreach.data")


class Reader:
    """The documents of some files, split into ``train`` and ``valid``.

    Args:
        files: see `corpus.list_files`.
        valid_fraction: see `Holdout`.
        field, chat: see `records.documents`.
        callback: reports the bytes scanned for the keys of documents; see `progress`.
        tally, upper: see `records.documents`.
    """

    def __init__(
        self,
        files: list[File],
        valid_fraction: float,
        field: str,
        callback: Callback | None = None,
        chat: Chat | None = None,
        tally: Tally | None = None,
        upper: bool = True,
    ) -> None:
        self.files, self.field, self.chat, self.upper = files, field, chat, upper
        self.num_bytes = sum(file.num_bytes for file in files)
        if all(file.kind == "text" for file in files):  # the names of files are the keys: none is opened
            self.holdout = Holdout(((file.key, file.num_bytes) for file in files), valid_fraction)
            return
        with progress("finding documents", self.num_bytes, callback) as advance:
            self.holdout = Holdout(self._sizes(advance, tally), valid_fraction)

    def read(
        self,
        split: str,
        bad: BadSamples,
        check: Callable[[NDArray[Any]], str],
        advance: Callable[[int], None] = lambda _: None,
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield key and content (as `Document.read` returns it) of each document of a split that is not empty.

        Args:
            split: ``train`` or ``valid``.
            bad: counts the documents that cannot be read or encoded, and those that are empty.
            check: returns why a content cannot be encoded, or an empty string; see `Vocabulary.check`.
            advance: called with the number of bytes just read.
        """
        for document in self.holdout.select(documents(self.files, self.field, self.chat, upper=self.upper), split):
            try:
                content = document.read()
                if why := check(content):
                    raise BadSample("document", document.key, why, reason="not UTF-8")
            except BadSample as error:
                if split == "train" or document.key != self.holdout.cut:  # that one is in both splits
                    bad.add(error)
            else:
                if len(content):
                    yield document.key, content
                else:
                    bad.tally.add("skipped", "empty")
            advance(document.num_bytes)

    def _sizes(self, advance: Callable[[int], None], tally: Tally | None) -> Iterator[tuple[str, int]]:
        for document in documents(self.files, self.field, self.chat, tally):
            advance(document.num_bytes)
            yield document.key, document.num_bytes


class BadSamples:
    """Counts documents that cannot be read or encoded, up to a limit.

    Args:
        limit: one more raises InputError.
        report: log a warning for each.
        tally: counts them by their reasons, too.
    """

    def __init__(self, limit: float, report: bool = True, tally: Tally | None = None) -> None:
        self.limit, self.report, self.count = limit, report, 0
        self.tally = Tally() if tally is None else tally

    def add(self, error: BadSample) -> None:
        """Count one; raise InputError, with its field, value and reason, if it exceeds the limit."""
        self.count += 1
        self.tally.add("bad", error.reason)
        if self.count > self.limit:
            count = f"{self.count} bad sample{'s' * (self.count > 1)}, {self.limit} allowed"
            fix = error.fix or "mend it, or leave such samples out: data.max_bad_samples=N, or pack --max-bad N"
            raise InputError(error.field, error.value, f"{error.allowed} ({count})", fix) from None
        if self.report:
            log.warning("left out: %s", error)
