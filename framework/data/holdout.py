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
from .document import Document

MIN_LEN = 2  # tokens of either part of a document that is split: an input and its label


class Holdout:
    """Splits documents into ``train`` and ``valid``.

    A document is held out if the hash of its key, as a number in [0, 1), is below ``fraction``: adding or removing
    other documents does not move it. If either split would be empty, the document nearest to the threshold moves there.
    If more would be held out than trained on, or there is a single document, the largest document is cut instead: its
    end is held out, from a character boundary on if it is UTF-8, and all else is trained on.

    Args:
        sizes: key and size of every document, in bytes.
        fraction: part of the documents, or of the single one, that is held out, in [0, 1); 0 holds out none.

    Raises:
        InputError: there is no document.
    """

    def __init__(self, sizes: Iterable[tuple[str, int]], fraction: float) -> None:
        self.fraction, num_documents, num_valid, num_bytes, valid_bytes = fraction, 0, 0, 0, 0
        lowest, highest, largest = (1.0, "", 0), (-1.0, "", 0), (-1, "")
        for key, size in sizes:
            at = _hash_fraction(key)
            num_documents, num_bytes = num_documents + 1, num_bytes + size
            if at < fraction:
                num_valid, valid_bytes = num_valid + 1, valid_bytes + size
            lowest, highest, largest = (
                min(lowest, (at, key, size)),
                max(highest, (at, key, size)),
                max(largest, (size, key)),
            )
        if not num_documents:
            raise InputError("data.source", "no document", "must hold at least one")
        self.moved = self.cut = ""  # keys: of one moved into the split that would be empty; of one that is cut
        if fraction and num_valid in (0, num_documents):
            _, self.moved, size = highest if num_valid else lowest
            valid_bytes += -size if num_valid else size
        self.share = fraction  # of the document that is cut
        if fraction and num_documents == 1:
            self.cut = largest[1]
        elif 0 < fraction < 0.5 and 2 * valid_bytes > num_bytes:
            self.cut, self.share = largest[1], min(0.5, fraction * num_bytes / max(1, largest[0]))

    def select(self, documents: Iterable[Document], split: str) -> Iterator[Document]:
        """Yield the documents of a split, ``train`` or ``valid``, in the order given."""
        for document in documents:
            if self.cut:
                if document.key == self.cut:
                    yield self._part(document, split)
                elif split == "train":
                    yield document
            elif (split == "valid") == self._is_valid(document.key):
                yield document

    def _is_valid(self, key: str) -> bool:
        return (_hash_fraction(key) < self.fraction) != (bool(self.moved) and key == self.moved)

    def _part(self, document: Document, split: str) -> Document:
        """The beginning of the document that is cut (``train``) or end (``valid``)."""

        def read() -> NDArray[Any]:
            content = document.read()
            if len(content) < 2 * MIN_LEN:
                where = f"the largest document, {document.key!r}, of {len(content)} tokens"
                fix = "set data.valid_fraction=0, or give more"
                raise InputError("data.source", where, f"must hold {2 * MIN_LEN} or more to be split", fix)
            cut = len(content) - round(len(content) * self.share)
            cut = _character_start(content, min(max(cut, MIN_LEN), len(content) - MIN_LEN))
            return content[cut:] if split == "valid" else content[:cut]

        return replace(document, num_bytes=document.num_bytes if split == "train" else 0, read=read)


def _character_start(content: NDArray[Any], cut: int) -> int:
    """The first byte of the UTF-8 character that contains byte ``cut``, or of the next one where that leaves too little
    before it; ``cut`` where ``content`` is not UTF-8.
    """
    if content.dtype == np.uint8:
        before, after = range(cut, max(MIN_LEN, cut - 3) - 1, -1), range(cut, min(len(content) - MIN_LEN, cut + 3) + 1)
        for begin in (*before, *after):
            if content[begin] & 0xC0 != 0x80:
                return begin
    return cut


def _hash_fraction(key: str) -> float:
    """Map a key to a number in [0, 1): the first 48 bits of its SHA-256."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return math.ldexp(int.from_bytes(digest[:6], "big"), -48)
