"""Vocabularies: what a token stands for. A byte, a subword of a ``tokenizers`` file, or an id without a text.

A packed directory and a run's directory both hold the vocabulary of their tokens: the first in its index, the second
in ``vocabulary.json``, each with a ``tokenizer.json`` beside it if tokens are subwords.
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

# If unset, the library warns when a process that has used its threads starts a data worker.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

FILE_NAME, TOKENIZER = "vocabulary.json", "tokenizer.json"
KINDS = ("bytes", "tokens", "ids")
MAX_FILE = 128 << 20  # bytes of a tokenizer's file
MAX_SIZE = 1 << 24  # tokens of a vocabulary
MAX_ENCODE_LEN = 4 << 20  # characters encoded by one call; longer texts are split, after a line if possible
MAX_PENDING = 8  # decoded tokens that are held back until their last character is complete


class Vocabulary:
    """What a token stands for.

    Attributes:
        kind: one of `KINDS`, as in an index or ``vocabulary.json``.
        size: number of tokens; ids are below it.
    """

    kind: str
    size: int

    @staticmethod
    def check(content: NDArray[Any]) -> str:
        """Return why a document's content (uint8 ``[n]``) cannot be encoded; an empty string if it can."""
        return ""

    def encode(self, contents: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the tokens ``[n]`` of each content; contents that are tokens already are returned as they are."""
        return contents

    def encode_text(self, text: bytes) -> NDArray[Any]:
        """Return the tokens ``[n]`` of a prompt or of a file's content.

        Raises:
            InputError: ``text`` is not in this vocabulary's notation.
        """
        raise NotImplementedError

    def decode(self, tokens: Iterable[int], prefix: Sequence[int] | None = ()) -> Iterator[str]:
        """Yield the text of tokens as a stream: one string a token, and a last one.

        A string is empty while a character is incomplete; invalid bytes give the replacement character.

        Args:
            tokens: to be decoded.
            prefix: the tokens just before them, which are not yielded but may decide how the first of ``tokens`` is
                written; None where they are not known.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The fields of an index or of ``vocabulary.json``; see `open_vocabulary`."""
        return {"kind": self.kind, "size": self.size}


class ByteVocabulary(Vocabulary):
    """A token is a byte."""

    kind, size = "bytes", 256

    def encode_text(self, text: bytes) -> NDArray[Any]:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Iterable[int], prefix: Sequence[int] | None = ()) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(bytes([token & 0xFF]))
        yield decoder.decode(b"", final=True)


class IdVocabulary(Vocabulary):
    """A token is an id below ``size``, without a text of its own; shown as a decimal number."""

    kind = "ids"

    def __init__(self, size: int) -> None:
        self.size = size

    def encode_text(self, text: bytes) -> NDArray[Any]:
        words = re.split(rb"[\s,]+", text.strip())
        if not all(re.fullmatch(rb"[0-9]{1,9}", word) and int(word) < self.size for word in words):
            raise InputError("prompt", text[:200], f"must be token ids below {self.size}", "such as '17 4 203'")
        return np.array([int(word) for word in words], np.int64)

    def decode(self, tokens: Iterable[int], prefix: Sequence[int] | None = ()) -> Iterator[str]:
        for token in tokens:
            yield f" {token}"


class SubwordVocabulary(Vocabulary):
    """A token is a subword of a tokenizer.

    No special token is added to a text, and none is recognized in one: its characters are encoded as text.

    Args:
        content: of a ``tokenizer.json``.
        path: where it comes from, for messages.

    Raises:
        InputError: the tokenizers library does not accept it.
    """

    kind = "tokens"

    def __init__(self, content: bytes, path: str) -> None:
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
            self.tokenizer.encode_special_tokens = True
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self.size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        except BaseException as error:  # the library's Rust panics do not derive from Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            why = (str(error).splitlines() or [""])[0][:200]
            raise _tokenizer_error(path, f"is no file of the tokenizers library: {why}") from None
        if not 1 <= self.size <= MAX_SIZE:
            raise _tokenizer_error(path, f"has ids up to {self.size - 1}; from 1 to {MAX_SIZE} tokens are allowed")
        self.content = content

    @property
    def sha256(self) -> str:
        """Of `content`, hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    @classmethod
    def read(cls, path: str | Path) -> SubwordVocabulary:
        """Read a ``tokenizer.json``.

        Raises:
            InputError: it is missing, too large, or not a tokenizer.
        """
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_FILE + 1)
        except OSError as error:
            fix = "longreach tokenizer SOURCE FILE trains one" if isinstance(error, FileNotFoundError) else ""
            raise _tokenizer_error(path, f"cannot be read: {error.strerror}", fix) from None
        if len(content) > MAX_FILE:
            raise _tokenizer_error(path, f"is larger than {MAX_FILE >> 20} MiB")
        return cls(content, str(path))

    @staticmethod
    def check(content: NDArray[Any]) -> str:
        try:
            codecs.utf_8_decode(content.data, "strict", True)
        except UnicodeDecodeError as error:
            return f"is not UTF-8 from byte {error.start} on, and a tokenizer reads text"
        return ""

    def encode(self, contents: list[NDArray[Any]]) -> list[NDArray[Any]]:
        parts = [list(_split_text(str(content.data, "utf-8"))) for content in contents]
        batch = [part for parts_of_one in parts for part in parts_of_one]
        encoded = iter([np.array(one.ids, np.uint32) for one in self._encode(batch)])
        return [np.concatenate([next(encoded) for _ in parts_of_one]) for parts_of_one in parts]

    def encode_text(self, text: bytes) -> NDArray[Any]:
        content = np.frombuffer(text, np.uint8)
        if why := self.check(content):
            raise InputError("text", text[:200], why)
        return self.encode([content])[0].astype(np.int32)

    def decode(self, tokens: Iterable[int], prefix: Sequence[int] | None = ()) -> Iterator[str]:
        # The text of a token can depend on those before it. So each string is the difference between the texts of
        # `window` with and without its new tokens, where `window` begins at the tokens of the last string yielded.
        window = [*(prefix or ())]
        num_yielded = len(window)
        for token in tokens:
            if prefix is None and not window:
                window, num_yielded = [token], 1  # any token: the first one is not the beginning of a text
            window.append(token)
            before, text = self._text(window[:num_yielded]), self._text(window)
            if text.endswith("\N{REPLACEMENT CHARACTER}") and len(window) - num_yielded < MAX_PENDING:
                yield ""
                continue
            yield text[len(before) :]
            window, num_yielded = window[num_yielded:], len(window) - num_yielded
        yield self._text(window)[len(self._text(window[:num_yielded])) :]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "sha256": self.sha256}

    def _encode(self, batch: list[str]) -> list[Any]:
        try:
            return self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        except BaseException as error:  # a panic of the library, as in the constructor
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise _tokenizer_error(TOKENIZER, f"cannot encode: {str(error).splitlines()[0][:200]}") from None

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


def open_vocabulary(directory: Path, described: dict[str, Any]) -> Vocabulary:
    """Return the vocabulary that `Vocabulary.describe` described.

    Args:
        directory: of ``tokenizer.json``, if tokens are subwords.
        described: the fields of an index or of ``vocabulary.json``.

    Raises:
        InputError: the tokenizer is missing, damaged or not the one described.
    """
    if described["kind"] == IdVocabulary.kind:
        return IdVocabulary(int(described["size"]))
    if described["kind"] != SubwordVocabulary.kind:
        return ByteVocabulary()
    found = SubwordVocabulary.read(directory / TOKENIZER)
    if found.sha256 != described["sha256"] or found.size != described["size"]:
        allowed = "does not have the SHA-256 that is written beside it"
        raise _tokenizer_error(directory / TOKENIZER, allowed, "it was changed")
    return found


def save_vocabulary(vocabulary: Vocabulary, directory: Path) -> None:
    """Write a vocabulary's files into a run's or an export's directory.

    Raises:
        OSError: they cannot be written.
    """
    if isinstance(vocabulary, SubwordVocabulary):
        replace_text(directory / TOKENIZER, vocabulary.content.decode("utf-8"))
    replace_text(directory / FILE_NAME, json.dumps(vocabulary.describe()) + "\n")


def load_vocabulary(directory: str | Path) -> Vocabulary:
    """Read what `save_vocabulary` wrote; a directory without ``vocabulary.json`` has bytes as tokens.

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
        return ByteVocabulary()
    except OSError as error:
        raise InputError("vocabulary", str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("vocabulary", str(path), "is damaged: it does not hold the expected fields") from None


def _split_text(text: str) -> Iterator[str]:
    """Split a text into parts of at most `MAX_ENCODE_LEN` characters, after the end of a line if there is one."""
    start = 0
    while len(text) - start > MAX_ENCODE_LEN:
        stop = text.rfind("\n", start, start + MAX_ENCODE_LEN) + 1 or start + MAX_ENCODE_LEN
        yield text[start:stop]
        start = stop
    yield text[start:]


def _tokenizer_error(path: str | Path, allowed: str, fix: str = "") -> InputError:
    return InputError("tokenizer", str(path), allowed, fix)
