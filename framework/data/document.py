"""A document, and how the text of a record is found in one of its fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .tar import BadSample

Chat = Callable[[list[dict[str, Any]], str], NDArray[np.uint32]]
"""Returns the token ids ``[n]`` of a chat's messages; its second argument is their place, for errors."""


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Args:
        key: unique in the corpus.
        num_bytes: its size in its file, compressed if the file is.
        read: returns its content ``[n]``: the bytes of a text as uint8, or token ids as uint32. Raises `BadSample` if
            this document cannot be decoded; other documents of the file may still be.
        label: of a record: returns its class, see `records.documents`. Raises `BadSample` if it has none.
    """

    key: str
    num_bytes: int
    read: Callable[[], NDArray[Any]]
    label: Callable[[], str] | None = None


def content_at(row: Any, field: str, place: str, chat: Chat | None = None) -> NDArray[Any]:
    """The UTF-8 ``[n]`` of the text in a field of a record, or the token ids of the chat in it.

    Args:
        row: of JSON or Parquet, a mapping.
        field: its key, or the keys of nested mappings joined by dots; a key that has the dots itself is preferred.
        place: of the record, for errors.
        chat: encodes a list of messages, ``{"role": ..., "content": ...}``.

    Raises:
        BadSample: there is no such field, or neither a text nor a chat in it.
        InputError: there is a chat, and ``chat`` is None.
    """
    if not isinstance(row, dict):
        raise BadSample("record", place, f'must be an object such as {{"{field}": "..."}}', reason="not an object")
    found = _values_at(row, field)
    if not found:
        fix = "name its field of text: data.field=NAME, or pack --field NAME"
        allowed = f"has no field {field!r}, but {', '.join(map(repr, row)) or 'none'}"
        raise BadSample("record", place, allowed, fix, reason=f"without the field {field!r}")
    value = found[0]
    if (
        value
        and isinstance(value, list)
        and all(isinstance(x, dict) and {"role", "content"} <= x.keys() for x in value)
    ):
        if chat is None:
            fix = "give --tokenizer FILE (data.tokenizer) with a chat template in tokenizer_config.json beside it"
            raise InputError("record", place, f"has chat messages in its field {field!r}, and no chat template", fix)
        return chat(value, place)
    if not isinstance(value, str):
        allowed = f"must have a text in its field {field!r}, not {json.dumps(value, default=repr)[:40]}"
        raise BadSample("record", place, allowed, reason=f"without a text in the field {field!r}")
    try:
        return np.frombuffer(value.encode(), np.uint8)
    except UnicodeEncodeError:
        allowed = f"has half a character (a lone surrogate) in its field {field!r}"
        raise BadSample("record", place, allowed, reason="with half a character") from None


def label_at(row: Any, field: str, place: str) -> str:
    """The class in a field of a record: a text that is not empty, or a whole number.

    Args:
        row, field, place: as of `content_at`.

    Raises:
        BadSample: there is none.
    """
    found = _values_at(row, field) if isinstance(row, dict) else []
    if not found or not isinstance(found[0], (str, int)) or not str(found[0]).strip():
        names = ", ".join(map(repr, row)) if isinstance(row, dict) else "none"
        raise without_label(place, f"has no class in a field {field!r}: its fields are {names}")
    return str(found[0]).strip()


def without_label(place: str, allowed: str) -> BadSample:
    """The error for a record without a class."""
    return BadSample("record", place, allowed, "name the field: task.label=NAME", reason="without a class")


def _values_at(row: dict[str, Any], field: str) -> list[Any]:
    """The value at a field, as the only item of a list; an empty list if there is none."""
    if field in row:
        return [row[field]]
    for at in (at for at, letter in enumerate(field) if letter == "."):
        inner = row.get(field[:at])
        if isinstance(inner, dict) and (found := _values_at(inner, field[at + 1 :])):
            return found
    return []
