"""Letters whose tokens are out of the loss, and the reverse complement of nucleotides."""

from __future__ import annotations

import string
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from .vocabulary import ByteVocabulary, SubwordVocabulary, Vocabulary

Case = Literal["upper", "keep", "mask"]
"""Of lower-case (soft-masked) letters of FASTA: make them capitals, keep them, or keep them out of the loss."""

COUNT_LEN = 1 << 20  # tokens that are counted at a time

# IUPAC's codes (Cornish-Bowden 1985), each above its complement; gaps are their own.
CODES = "ACGTURYSWKMBDHVN.-"
COMPLEMENTS = "TGCAAYRSWMKVHDBN.-"


def masked_letters(mask: str, case: Case) -> str:
    """The letters whose tokens are no labels: those of ``mask`` in either case, and with ``case=mask`` all small ones.

    Raises:
        InputError: ``mask`` has something else than ASCII letters.
    """
    if set(mask) - set(string.ascii_letters):
        raise InputError("data.mask", mask, "must be letters, such as N")
    small = string.ascii_lowercase if case == "mask" else ""
    return "".join(sorted({*mask.upper(), *mask.lower(), *small}))


def masked_tokens(vocabulary: Vocabulary, letters: str) -> tuple[int, ...]:
    """The tokens that stand for nothing but ``letters``.

    Raises:
        InputError: tokens are ids, which stand for no letters.
    """
    if not letters or isinstance(vocabulary, ByteVocabulary):
        return tuple(map(ord, letters))
    if not isinstance(vocabulary, SubwordVocabulary):
        raise InputError("data.mask", letters, "must be empty where the source holds token ids, which have no letters")
    texts = ("".join(vocabulary.decode([token])) for token in range(vocabulary.size))
    return tuple(token for token, text in enumerate(texts) if text and not set(text) - set(letters))


class LetterCount:
    """Counts the masked tokens of a split, and notes which bytes occur.

    Args:
        vocabulary: of the tokens.
        letters: see `masked_letters`.

    Attributes:
        masked: see `masked_tokens`.
        num_masked: how many of the tokens so far are among them.
    """

    def __init__(self, vocabulary: Vocabulary, letters: str) -> None:
        self.masked, self.num_masked = masked_tokens(vocabulary, letters), 0
        self._sizes = np.zeros(vocabulary.size if self.masked else 0, np.int64)  # in bytes, of each masked token
        for token in self.masked:
            self._sizes[token] = len("".join(vocabulary.decode([token])))
        self._occurs = np.zeros(256, bool) if isinstance(vocabulary, ByteVocabulary) else None

    def add(self, tokens: NDArray[Any]) -> int:
        """Count the tokens ``[n]`` of a document; returns the size in bytes of the masked ones."""
        num_bytes = 0
        for start in range(0, len(tokens), COUNT_LEN):  # an index of bytes takes eight times their memory
            part = tokens[start : start + COUNT_LEN]
            if self._occurs is not None:
                self._occurs[part] = True
            if self.masked:
                sizes = self._sizes[part]
                self.num_masked += int(np.count_nonzero(sizes))
                num_bytes += int(sizes.sum())
        return num_bytes

    @property
    def alphabet(self) -> list[int] | None:
        """The bytes that occur; None where tokens are no bytes."""
        return None if self._occurs is None else np.flatnonzero(self._occurs).tolist()


def complement_of(alphabet: list[int] | None, corpus: str) -> Tensor:
    """The complement of each byte, int64 ``[256]``, in the case of its letter; of RNA, that of A is U.

    Args:
        alphabet: the bytes that the corpus has; None if its tokens are no bytes.
        corpus: its name, for the message.

    Raises:
        InputError: one of them is no code of a nucleotide.
    """
    codes = [*map(ord, CODES + CODES.lower())]
    if alphabet is None:
        raise InputError(
            "data.reverse_complement", True, f"needs the bytes of nucleotides, and {corpus} has other tokens"
        )
    if others := [chr(letter) for letter in alphabet if letter not in codes]:
        shown = "".join(others)[:20]
        raise InputError(
            "data.reverse_complement", True, f"needs a corpus of nucleotides, and {corpus} holds {shown!r}"
        )
    table = torch.arange(256)
    table[codes] = torch.tensor([*map(ord, COMPLEMENTS + COMPLEMENTS.lower())])
    for a, u, t in ("AUT", "aut"):
        if ord(u) in alphabet and ord(t) not in alphabet:
            table[ord(a)] = ord(u)
    return table
