"""The train/valid split of documents: by a hash of their keys, hence the same on every machine and in every run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .records import Document

MIN_LEN = 2  # tokens of either part of a document that is split: an input and its label


class Holdout:
    """Splits documents into ``train`` and ``valid``.

    A document is held out if the hash of its key, as a number in [0, 1), is below ``fraction``: adding or removing
    other documents does not move it. If either split would be empty, the document nearest to the threshold moves there.
    A single document is cut instead: its end is held out, from a character boundary on if it is UTF-8.

    Args:
        keys: of all documents.
        fraction: part of the documents, or of the single one, that is held out, in [0, 1); 0 holds out none.

    Raises:
        InputError: there is no document.
    """

    def __init__(self, keys: Iterable[str], fraction: float) -> None:
        self.fraction, self.num_documents, num_valid = fraction, 0, 0
        lowest, highest = (1.0, ""), (-1.0, "")
        for key in keys:
            at = _hash_fraction(key)
            self.num_documents += 1
            num_valid += at < fraction
            lowest, highest = min(lowest, (at, key)), max(highest, (at, key))
        if not self.num_documents:
            raise InputError("data.source", "no document", "must hold at least one")
        self.moved = ""  # key of the document that is moved into the split that would be empty
        if fraction and num_valid in (0, self.num_documents):
            self.moved = highest[1] if num_valid else lowest[1]

    def select(self, documents: Iterable[Document], split: str) -> Iterator[Document]:
        """Yield the documents of a split, ``train`` or ``valid``, in the order given."""
        for document in documents:
            if self.fraction and self.num_documents == 1:
                yield self._part(document, split)
            elif (split == "valid") == self._is_valid(document.key):
                yield document

    def _is_valid(self, key: str) -> bool:
        return (_hash_fraction(key) < self.fraction) != (bool(self.moved) and key == self.moved)

    def _part(self, document: Document, split: str) -> Document:
        """The single document's beginning (``train``) or end (``valid``)."""

        def read() -> NDArray[Any]:
            content = document.read()
            if len(content) < 2 * MIN_LEN:
                where = f"the only document, {document.key!r}, of {len(content)} tokens"
                fix = "set data.valid_fraction=0, or give more"
                raise InputError("data.source", where, f"must hold {2 * MIN_LEN} or more to be split", fix)
            cut = len(content) - round(len(content) * self.fraction)
            cut = _character_start(content, min(max(cut, MIN_LEN), len(content) - MIN_LEN))
            return content[cut:] if split == "valid" else content[:cut]

        return replace(document, num_bytes=document.num_bytes if split == "train" else 0, read=read)


def _character_start(content: NDArray[Any], cut: int) -> int:
    """The first byte of the UTF-8 character that contains byte ``cut``; ``cut`` where ``content`` is not UTF-8."""
    if content.dtype == np.uint8:
        for begin in range(cut, max(MIN_LEN, cut - 3) - 1, -1):
            if content[begin] & 0xC0 != 0x80:
                return begin
    return cut


def _hash_fraction(key: str) -> float:
    """Map a key to a number in [0, 1): the first 48 bits of its SHA-256."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return math.ldexp(int.from_bytes(digest[:6], "big"), -48)
