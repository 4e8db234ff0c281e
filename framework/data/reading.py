"""Reads the documents of a split, and leaves out as many bad ones as a user allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from numpy.typing import NDArray

from ...errors import InputError
from .corpus import File
from .holdout import Holdout
from .progress import Callback, progress
from .records import documents, kind_of
from .tar import BadSample

log = logging.getLogger("longreach.data")


class Reader:
    """The documents of some files, split.

    Args:
        files: see `corpus.list_files`.
        valid_fraction: see `Holdout`.
        field: see `records.documents`.
        callback: told of the bytes that are looked through for the names of documents; see `progress`.
    """

    def __init__(self, files: list[File], valid_fraction: float, field: str, callback: Callback | None = None) -> None:
        self.files, self.field = files, field
        self.num_bytes = sum(file.num_bytes for file in files)
        if all(kind_of(file) == "file" for file in files):  # then no file is opened
            self.holdout = Holdout((file.key for file in files), valid_fraction)
            return
        with progress("finding documents", self.num_bytes, callback) as advance:
            self.holdout = Holdout(self._keys(advance), valid_fraction)

    def read(
        self,
        split: str,
        bad: BadSamples,
        check: Callable[[NDArray[Any]], str],
        advance: Callable[[int], None] = lambda _: None,
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield key and content of each document of a split that has any, as `Document.read` gives it.

        Args:
            split: ``train`` or ``valid``.
            bad: takes those that cannot be read, or cannot be encoded.
            check: says why a content cannot be encoded, or nothing; see `Bytes.check`.
            advance: told of the bytes read.
        """
        for document in self.holdout.part(documents(self.files, self.field), split):
            try:
                content = document.read()
                if why := check(content):
                    raise BadSample("document", document.key, why)
            except BadSample as error:
                bad.add(error)
            else:
                if len(content):
                    yield document.key, content
            advance(document.num_bytes)

    def _keys(self, advance: Callable[[int], None]) -> Iterator[str]:
        for document in documents(self.files, self.field):
            advance(document.num_bytes)
            yield document.key


class BadSamples:
    """Counts documents that cannot be read, and tells them.

    Args:
        most: one more of them raises InputError.
        tell: say which are left out.
    """

    def __init__(self, most: float, tell: bool = True) -> None:
        self.most, self.tell, self.count = most, tell, 0

    def add(self, error: BadSample) -> None:
        self.count += 1
        if self.count > self.most:
            count = f"{self.count} bad sample{'s' * (self.count > 1)}, {self.most} allowed"
            fix = error.fix or "mend it, or leave such samples out: data.max_bad_samples=N, or pack --max-bad N"
            raise InputError(error.field, error.value, f"{error.allowed} ({count})", fix) from None
        if self.tell:
            log.warning("left out: %s", error)
