"""Which documents are held out: a choice by their names alone, the same everywhere and for ever."""

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

LEAST = 2  # tokens of a part: one to read, and one to predict


class Holdout:
    """Splits documents into ``train`` and ``valid``.

    Whole documents are held out, by a hash of their keys: a document stays on its side when others come or go. Each
    side gets at least one. Where there is only one document, its end is held out, of a text from the next character on.

    Args:
        keys: of all documents.
        fraction: part of the documents, or of the only one, that is held out, in [0, 1); 0 holds out none.

    Raises:
        InputError: there is no document.
    """

    def __init__(self, keys: Iterable[str], fraction: float) -> None:
        self.fraction, self.num_documents, num_valid = fraction, 0, 0
        lowest, highest = (1.0, ""), (-1.0, "")
        for key in keys:
            at = _place(key)
            self.num_documents += 1
            num_valid += at < fraction
            lowest, highest = min(lowest, (at, key)), max(highest, (at, key))
        if not self.num_documents:
            raise InputError("data.source", "no document", "must hold at least one")
        self.moved = ""  # the document that is on the other side, or one of them had none
        if fraction and num_valid in (0, self.num_documents):
            self.moved = highest[1] if num_valid else lowest[1]

    def part(self, documents: Iterable[Document], split: str) -> Iterator[Document]:
        """Yield the documents of a split, ``train`` or ``valid``, in the order given."""
        for document in documents:
            if self.fraction and self.num_documents == 1:
                yield self._end(document, split)
            elif (split == "valid") == self._is_valid(document.key):
                yield document

    def _is_valid(self, key: str) -> bool:
        return (_place(key) < self.fraction) != (bool(self.moved) and key == self.moved)

    def _end(self, document: Document, split: str) -> Document:
        def read() -> NDArray[Any]:
            content = document.read()
            if len(content) < 2 * LEAST:
                where = f"the only document, {document.key!r}, of {len(content)} tokens"
                fix = "set data.valid_fraction=0, or give more"
                raise InputError("data.source", where, f"must hold {2 * LEAST} or more to be split", fix)
            cut = len(content) - round(len(content) * self.fraction)
            cut = _character(content, min(max(cut, LEAST), len(content) - LEAST))
            return content[cut:] if split == "valid" else content[:cut]

        return replace(document, num_bytes=document.num_bytes if split == "train" else 0, read=read)


def _character(content: NDArray[Any], cut: int) -> int:
    """Where the character of UTF-8 begins in which ``cut`` lies; it stays as it is where that is no text."""
    if content.dtype == np.uint8:
        for begin in range(cut, max(LEAST, cut - 3) - 1, -1):
            if content[begin] & 0xC0 != 0x80:
                return begin
    return cut


def _place(key: str) -> float:
    """Map a key to a number in [0, 1)."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return math.ldexp(int.from_bytes(digest[:6], "big"), -48)
