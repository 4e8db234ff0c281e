"""What tokens stand for: bytes, pieces of text by a ``tokenizers`` file, or nothing but their numbers.

A packed directory and a run's directory both keep what is needed to tell: the first in its index, the second in
``vocabulary.json``, each with ``tokenizer.json`` beside it where there is one.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ...errors import InputError
from ..runtime.files import replace_text

# In any way but unset, it keeps the library from a warning when a process that used its threads starts a worker.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

FILE_NAME, TOKENIZER = "vocabulary.json", "tokenizer.json"
KINDS = ("bytes", "tokens", "ids")
MAX_FILE = 128 << 20  # bytes of a tokenizer's file
MAX_SIZE = 1 << 24  # tokens of a vocabulary
PIECE = 4 << 20  # characters that are encoded in one go; longer texts are cut behind a line
MAX_HELD = 8  # tokens that wait for the rest of a character


class Bytes:
    """A token is a byte."""

    kind, size = "bytes", 256

    @staticmethod
    def check(content: NDArray[Any]) -> str:
        """Why a document's content cannot be encoded, if it cannot."""
        return ""

    def encode(self, contents: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the tokens of each content, ``[n]``."""
        return contents

    def prompt(self, text: bytes) -> NDArray[Any]:
        """Return the tokens ``[n]`` of what a user typed, or of a file."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Iterable[int], after: Sequence[int] | None = ()) -> Iterator[str]:
        """Yield tokens as text, as soon as a character is whole; what is none shows as the replacement character.

        Args:
            tokens: what is yielded.
            after: the last ones before, which are not yielded, but may decide how the first of these is written; None
                for ones that are not known.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(bytes([token & 0xFF]))
        yield decoder.decode(b"", final=True)

    def describe(self) -> dict[str, Any]:
        """What an index or ``vocabulary.json`` says."""
        return {"kind": self.kind, "size": self.size}


class Ids(Bytes):
    """A token is a number that means nothing here, below ``size``; as text, decimal numbers."""

    kind = "ids"

    def __init__(self, size: int) -> None:
        self.size = size

    def prompt(self, text: bytes) -> NDArray[Any]:
        words = re.split(rb"[\s,]+", text.strip())
        if not all(re.fullmatch(rb"[0-9]{1,9}", word) and int(word) < self.size for word in words):
            raise InputError("prompt", text[:200], f"must be token ids below {self.size}", "such as '17 4 203'")
        return np.array([int(word) for word in words], np.int64)

    def decode(self, tokens: Iterable[int], after: Sequence[int] | None = ()) -> Iterator[str]:
        for token in tokens:
            yield f" {token}"


class Pieces(Bytes):
    """A token is a piece of text, by a tokenizer.

    No special token is added, and none is read from a text: what looks like one is encoded as text.

    Args:
        content: of a ``tokenizer.json``.
        where: its name, for messages.

    Raises:
        InputError: the library does not take it.
    """

    kind = "tokens"

    def __init__(self, content: bytes, where: str) -> None:
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
            self.tokenizer.encode_special_tokens = True
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self.size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        except BaseException as error:  # the library raises Exception itself, and its panics are not even that
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            why = (str(error).splitlines() or [""])[0][:200]
            raise _refused(where, f"is no file of the tokenizers library: {why}") from None
        if not 1 <= self.size <= MAX_SIZE:
            raise _refused(where, f"has ids up to {self.size - 1}; from 1 to {MAX_SIZE} tokens are allowed")
        self.content = content

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @classmethod
    def read(cls, path: str | Path) -> Pieces:
        """Read a ``tokenizer.json``.

        Raises:
            InputError: it is missing, too large, or none.
        """
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_FILE + 1)
        except OSError as error:
            fix = "longreach tokenizer SOURCE FILE trains one" if isinstance(error, FileNotFoundError) else ""
            raise _refused(path, f"cannot be read: {error.strerror}", fix) from None
        if len(content) > MAX_FILE:
            raise _refused(path, f"is larger than {MAX_FILE >> 20} MiB")
        return cls(content, str(path))

    @staticmethod
    def check(content: NDArray[Any]) -> str:
        try:
            codecs.utf_8_decode(content.data, "strict", True)
        except UnicodeDecodeError as error:
            return f"is not UTF-8 from byte {error.start} on, and a tokenizer reads text"
        return ""

    def encode(self, contents: list[NDArray[Any]]) -> list[NDArray[Any]]:
        cut = [list(_cut(str(content.data, "utf-8"))) for content in contents]
        batch = [piece for pieces in cut for piece in pieces]
        found = iter([np.array(one.ids, np.uint32) for one in self._encode(batch)])
        return [np.concatenate([next(found) for _ in pieces]) for pieces in cut]

    def prompt(self, text: bytes) -> NDArray[Any]:
        content = np.frombuffer(text, np.uint8)
        if why := self.check(content):
            raise InputError("text", text[:200], why)
        return self.encode([content])[0].astype(np.int32)

    def decode(self, tokens: Iterable[int], after: Sequence[int] | None = ()) -> Iterator[str]:
        # What a token adds depends on those before: decoding goes from where the last but one text was given.
        held = [*(after or ())]
        given = len(held)
        for token in tokens:
            if after is None and not held:
                held, given = [token], 1  # any will do, so that the first is not taken for the beginning of a text
            held.append(token)
            before, text = self._text(held[:given]), self._text(held)
            if text.endswith("\N{REPLACEMENT CHARACTER}") and len(held) - given < MAX_HELD:
                yield ""
                continue
            yield text[len(before) :]
            held, given = held[given:], len(held) - given
        yield self._text(held)[len(self._text(held[:given])) :]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "sha256": self.sha256}

    def _encode(self, batch: list[str]) -> list[Any]:
        try:
            return self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        except BaseException as error:  # as above
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise _refused(TOKENIZER, f"cannot encode: {str(error).splitlines()[0][:200]}") from None

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


def open_vocabulary(directory: Path, described: dict[str, Any]) -> Bytes:
    """Return the vocabulary that `Bytes.describe` described.

    Args:
        directory: in which ``tokenizer.json`` lies, if there is one.
        described: fields of an index or of ``vocabulary.json``.

    Raises:
        InputError: the tokenizer is missing, damaged or another one.
    """
    if described["kind"] == Ids.kind:
        return Ids(int(described["size"]))
    if described["kind"] != Pieces.kind:
        return Bytes()
    pieces = Pieces.read(directory / TOKENIZER)
    if pieces.sha256 != described["sha256"] or pieces.size != described["size"]:
        raise _refused(directory / TOKENIZER, "does not have the SHA-256 that is written beside it", "it was changed")
    return pieces


def save_vocabulary(vocabulary: Bytes, directory: Path) -> None:
    """Keep a vocabulary in a run's directory; OSError where that cannot be written."""
    if isinstance(vocabulary, Pieces):
        replace_text(directory / TOKENIZER, vocabulary.content.decode("utf-8"))
    replace_text(directory / FILE_NAME, json.dumps(vocabulary.describe()) + "\n")


def load_vocabulary(directory: str | Path) -> Bytes:
    """Return what `save_vocabulary` or an export kept; bytes where nothing was.

    Raises:
        InputError: a file is damaged or missing.
    """
    path = Path(directory) / FILE_NAME
    try:
        described = json.loads(path.read_bytes())
        if not isinstance(described, dict) or described["kind"] not in KINDS:
            raise ValueError
        return open_vocabulary(path.parent, described)
    except FileNotFoundError:
        return Bytes()
    except OSError as error:
        raise InputError("vocabulary", str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("vocabulary", str(path), "is damaged: it does not hold the expected fields") from None


def _cut(text: str) -> Iterator[str]:
    """Cut a very long text into pieces, behind the end of a line where there is one."""
    start = 0
    while len(text) - start > PIECE:
        stop = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def _refused(path: str | Path, allowed: str, fix: str = "") -> InputError:
    return InputError("tokenizer", str(path), allowed, fix)
