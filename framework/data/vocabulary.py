"""Vocabularies: what a token stands for. A byte, a subword of a ``tokenizers`` file, or an id without a text.

A packed directory and a run's directory both hold the vocabulary of their tokens: the first in its index, the second
in ``vocabulary.json``, each with a ``tokenizer.json`` beside it if tokens are subwords, and a
``tokenizer_config.json`` if the tokenizer has a chat template.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ...errors import InputError
from ..runtime.files import replace_text
from .chat import TOKENIZER_CONFIG, ChatTemplate

# If unset, the library warns when a process that has used its threads starts a data worker.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

FILE_NAME, TOKENIZER = "vocabulary.json", "tokenizer.json"
KINDS = ("bytes", "tokens", "ids")
MAX_FILE = 128 << 20  # bytes of a tokenizer's file
MAX_SIZE = 1 << 24  # tokens of a vocabulary
WINDOW = 1 << 18  # characters; longer texts are encoded in windows of this length, which overlap
OVERLAP = 1 << 12
NUM_AGREED = 16  # tokens in a row that two windows have in common where they are joined
BATCH_WINDOWS = 16  # encoded at once
MAX_STARTS = 8  # at which a window is encoded anew where it does not agree with the one before
DECODE_LEN = 1 << 14  # tokens decoded by one call
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
        """Return why a document's content cannot be encoded; an empty string if it can."""
        return ""

    def encode(self, contents: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the tokens ``[n]`` of each content; those that are no text (uint8) are tokens already."""
        return contents

    def text_of(self, content: NDArray[Any]) -> Iterator[bytes | memoryview]:
        """Yield the text that a document's content is or stands for, in parts; special tokens stand for none."""
        yield content.data

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

    def text_of(self, content: NDArray[Any]) -> Iterator[bytes | memoryview]:
        return iter(())

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

    No special token is added to a text, and none is recognized in one, but in the chats that a template writes.

    Args:
        content: of a ``tokenizer.json``.
        path: where it comes from, for messages.
        chat: the chat template that belongs to it.

    Raises:
        InputError: the tokenizers library does not accept it.
    """

    kind = "tokens"

    def __init__(self, content: bytes, path: str, chat: ChatTemplate | None = None) -> None:
        try:
            self.tokenizer = _tokenizer(content, encode_special_tokens=True)
            self.size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        except BaseException as error:  # the library's Rust panics do not derive from Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            why = (str(error).splitlines() or [""])[0][:200]
            raise _tokenizer_error(path, f"is no file of the tokenizers library: {why}") from None
        if not 1 <= self.size <= MAX_SIZE:
            raise _tokenizer_error(path, f"has ids up to {self.size - 1}; from 1 to {MAX_SIZE} tokens are allowed")
        self.content, self.chat = content, chat

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
        if (path := Path(path)).exists() and not path.is_file():
            raise _tokenizer_error(path, "must be a regular file")
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_FILE + 1)
        except OSError as error:
            fix = "longreach tokenizer SOURCE FILE trains one" if isinstance(error, FileNotFoundError) else ""
            raise _tokenizer_error(path, f"cannot be read: {error.strerror}", fix) from None
        if len(content) > MAX_FILE:
            raise _tokenizer_error(path, f"is larger than {MAX_FILE >> 20} MiB")
        return cls(content, str(path), ChatTemplate.beside(path))

    @property
    def files(self) -> dict[str, str]:
        """The names and contents of its files."""
        return {TOKENIZER: self.content.decode("utf-8"), **({TOKENIZER_CONFIG: self.chat.content} if self.chat else {})}

    @staticmethod
    def check(content: NDArray[Any]) -> str:
        if content.dtype != np.uint8:
            return ""
        try:
            codecs.utf_8_decode(content.data, "strict", True)
        except UnicodeDecodeError as error:
            return f"is not UTF-8 from byte {error.start} on, and a tokenizer reads text"
        return ""

    def encode(self, contents: list[NDArray[Any]]) -> list[NDArray[Any]]:
        found, short = list(contents), list[tuple[int, str]]()
        for at, content in enumerate(contents):
            if content.dtype == np.uint8:
                text = str(content.data, "utf-8")
                if len(text) > WINDOW:
                    found[at] = self._encode_long(text)
                else:
                    short.append((at, text))
        for (at, _), one in zip(short, self._encode([text for _, text in short]), strict=True):
            found[at] = np.array(one.ids, np.uint32)
        return found

    def encode_chat(self, messages: list[dict[str, Any]], place: str) -> NDArray[np.uint32]:
        """The tokens ``[n]`` of a chat, the special tokens of the template among them; see `ChatTemplate.render`.

        Raises:
            InputError: the tokenizer has no chat template.
        """
        if self.chat is None:
            fix = f"put one into {TOKENIZER_CONFIG} beside the tokenizer"
            raise InputError("record", place, "has chat messages, and the tokenizer has no chat template", fix)
        text = self.chat.render(messages, place)
        return np.array(self._with_special_tokens.encode(text, add_special_tokens=False).ids, np.uint32)

    def text_of(self, content: NDArray[Any]) -> Iterator[bytes | memoryview]:
        if content.dtype == np.uint8:
            yield content.data
            return
        start, size = 0, len(content)
        while start < size:
            stop = min(size, start + DECODE_LEN)
            text = self.tokenizer.decode(content[start:stop].tolist())
            for shorter in range(stop - 1, max(start, stop - MAX_PENDING), -1):  # part of a character waits
                if stop == size or not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    break
                stop, text = shorter, self.tokenizer.decode(content[start:shorter].tolist())
            yield text.encode()
            start = stop

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
        chat = {"chat_template": hashlib.sha256(self.chat.content.encode()).hexdigest()} if self.chat else {}
        return {**super().describe(), "sha256": self.sha256, **chat}

    @cached_property
    def _with_special_tokens(self) -> tokenizers.Tokenizer:
        return _tokenizer(self.content, encode_special_tokens=False)

    def _encode_long(self, text: str) -> NDArray[np.uint32]:
        """The tokens of a text of any length, the same as if it were encoded at once.

        It is encoded in windows. Two of them are joined in the middle of `NUM_AGREED` tokens that both have at the same
        places of the same words, since what a tokenizer makes of a text depends on its neighbourhood only: BPE before
        any token (tokens are those of the whole text if each pair of neighbours is), other models at the beginning of a
        word. Where two windows do not agree, as in a long run of one letter, the second is encoded from a token of the
        first on; where that does not help, all are made longer.
        """
        length = WINDOW
        while length < len(text):
            if (found := self._encode_windows(text, length)) is not None:
                return found
            length *= 2
        return np.array(self._encode([text])[0].ids, np.uint32)

    def _encode_windows(self, text: str, length: int) -> NDArray[np.uint32] | None:
        """The tokens of a text, from windows of ``length + OVERLAP`` characters; None if two of them do not agree."""
        starts = range(0, max(1, len(text) - OVERLAP), length)
        found, before, begin = list[NDArray[np.uint32]](), _Tokens(np.zeros(0, np.uint32), [], []), 0
        for first in range(0, len(starts), BATCH_WINDOWS):
            batch = starts[first : first + BATCH_WINDOWS]
            encoded = self._encode([text[start : start + length + OVERLAP] for start in batch], with_places=True)
            for start, one in zip(batch, encoded, strict=True):
                tokens, stop = self._tokens(one, start), start + OVERLAP
                if start:
                    joint = _joint(before, tokens, start, stop)
                    cuts = zip(before.places, before.is_cut, strict=True)
                    others = sorted({begin for (begin, _, _), is_cut in cuts if is_cut and begin > start})[:MAX_STARTS]
                    while joint is None and others:
                        other = others.pop(0)
                        (one,) = self._encode([text[other : stop + length]], with_places=True)
                        tokens = self._tokens(one, other)
                        joint = _joint(before, tokens, other, stop)
                    if joint is None:
                        return None
                    found.append(before.ids[begin : joint[0]])
                    begin = joint[1]
                before = tokens
        return np.concatenate([*found, before.ids[begin:]])

    def _tokens(self, encoded: Any, start: int) -> _Tokens:
        """The tokens of the encoding of a window that begins at the character ``start``."""
        words = [None, *encoded.word_ids]
        begins_word = [word != last for word, last in zip(words[1:], words, strict=False)]
        offsets = zip(encoded.offsets, begins_word, strict=True)
        places = [(start + begin, start + end, begins) for (begin, end), begins in offsets]
        is_bpe = isinstance(self.tokenizer.model, tokenizers.models.BPE)
        return _Tokens(np.array(encoded.ids, np.uint32), places, [is_bpe or begins for begins in begins_word])

    def _encode(self, batch: list[str], with_places: bool = False) -> list[Any]:
        encode = self.tokenizer.encode_batch if with_places else self.tokenizer.encode_batch_fast
        try:
            return encode(batch, add_special_tokens=False)
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
    ours = {"chat_template": None, **found.describe()}
    if any(ours[key] != described[key] for key in {"sha256", "size", *described} & ours.keys()):
        allowed = "does not have the SHA-256 that is written beside it"
        raise _tokenizer_error(directory / TOKENIZER, allowed, "it was changed")
    return found


def save_vocabulary(vocabulary: Vocabulary, directory: Path) -> None:
    """Write a vocabulary's files into a run's or an export's directory.

    Raises:
        OSError: they cannot be written.
    """
    if isinstance(vocabulary, SubwordVocabulary):
        for name, content in vocabulary.files.items():
            replace_text(directory / name, content)
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


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a window: ids ``[n]``; of each, its first and last (exclusive) character in the text, whether it
    begins a word, and whether windows may be joined before it.
    """

    ids: NDArray[np.uint32]
    places: list[tuple[int, int, bool]]
    is_cut: list[bool]


def _joint(before: _Tokens, after: _Tokens, start: int, stop: int) -> tuple[int, int] | None:
    """The numbers, in two windows, of a token by which they can be joined; None if they do not agree.

    Args:
        before, after: the windows, both of which have the characters from ``start`` to ``stop``.
    """
    first = len(before.places)
    while first and before.places[first - 1][0] >= start:
        first -= 1
    ours = list(zip(before.places[first:], before.ids[first:].tolist(), strict=True))
    last = next((at for at, (_, end, _) in enumerate(after.places) if end > stop), len(after.places))
    theirs = list(zip(after.places[:last], after.ids[:last].tolist(), strict=True))
    number_of = {token: number for number, token in enumerate(theirs)}
    for number in range(len(ours) - NUM_AGREED + 1):
        other = number_of.get(ours[number])
        if other is not None and ours[number : number + NUM_AGREED] == theirs[other : other + NUM_AGREED]:
            joint = first + number + NUM_AGREED // 2, other + NUM_AGREED // 2
            if before.is_cut[joint[0]] and after.is_cut[joint[1]]:
                return joint
    return None


def _tokenizer(content: bytes, encode_special_tokens: bool) -> tokenizers.Tokenizer:
    """Make a tokenizer that reads special tokens in a text as text (``encode_special_tokens``), or as themselves."""
    found = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    found.encode_special_tokens = encode_special_tokens
    found.no_padding()
    found.no_truncation()
    return found


def _tokenizer_error(path: str | Path, allowed: str, fix: str = "") -> InputError:
    return InputError("tokenizer", str(path), allowed, fix)
