"""What the bytes of a file are: text, and how it is encoded and compressed, or the binary data of some format."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO, Literal, cast

Binary = Literal["skip", "bytes", "error"]
"""What is done with a file whose content is no text."""

HEAD = 1 << 13  # bytes by which a file is judged
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}  # those of the standard library
MARKS = (  # byte order marks; UTF-32's come first, since one of them begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
    (codecs.BOM_UTF8, "UTF-8 with a byte order mark"),
)
FORMATS = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"RIFF", "RIFF"),
    (b"%PDF-", "PDF"),
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"7z\xbc\xaf", "7z"),
    (b"\x7fELF", "ELF"),
    (b"PAR1", "Parquet"),
    (b"\x93NUMPY", "npy"),
    (b"SQLite format 3", "SQLite"),
    (b"\x89HDF", "HDF5"),
    (b"OggS", "Ogg"),
    (b"ID3", "MP3"),
    (b"fLaC", "FLAC"),
)
CONTROLS = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b"))  # not those of texts and terminals
MAX_CONTROLS = 0.03  # fraction of a text in a legacy encoding; of random bytes they are a tenth
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)  # and an OSError without a number: compressed data cannot be inflated


def compression_of(name: str) -> str:
    """The compression that the end of a file's name says, or an empty string."""
    return next((kind for suffix, kind in COMPRESSIONS.items() if name.lower().endswith(suffix)), "")


def encoding_of(head: bytes) -> str:
    """The encoding that a text's byte order mark says, or an empty string."""
    return next((name for mark, name in MARKS if head.startswith(mark)), "")


def binary_format(head: bytes) -> str:
    """The format of a file whose content is no text, ``unknown`` if it has no known beginning; empty for text.

    Text has no NUL and few control characters once it is decoded; it need not be UTF-8.

    Args:
        head: its first bytes, inflated.
    """
    name = next((name for magic, name in FORMATS if head.startswith(magic)), "unknown")
    if head[257:262] == b"ustar":
        name = "tar"
    try:
        text = utf8(io.BytesIO(head), encoding_of(head), whole=False).read()
    except UnicodeDecodeError:
        return name
    num_controls = len(text) - len(text.translate(None, CONTROLS))
    is_text = b"\0" not in text and num_controls <= MAX_CONTROLS * len(text) and name != "PDF"
    return "" if is_text else name


def inflating(stream: BinaryIO, compression: str) -> BinaryIO:
    """The inflated content of a stream; reading it raises one of `DAMAGED`, or an OSError without a number."""
    if compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if compression == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(stream))
    return cast(BinaryIO, lzma.LZMAFile(stream)) if compression == "xz" else stream


def inflated_head(stream: BinaryIO, compression: str) -> bytes:
    """The first `HEAD` bytes of a stream's inflated content; fewer where it is damaged or ends before."""
    if not compression:
        return stream.read(HEAD)
    head, inflated = b"", cast(gzip.GzipFile, inflating(stream, compression))  # all three classes have read1
    try:
        while len(head) < HEAD and (part := inflated.read1(HEAD)):
            head += part
    except DAMAGED:
        pass
    except OSError as error:
        if error.errno is not None:
            raise
    return head


def utf8(stream: BinaryIO, encoding: str, whole: bool = True) -> BinaryIO:
    """A text as UTF-8 without a byte order mark.

    Args:
        stream: the text, from its beginning.
        encoding: see `encoding_of`; that of a text without a mark is not known, and its bytes are left as they are.
        whole: reading an incomplete character at the end raises UnicodeDecodeError, as other invalid bytes do.
    """
    if not encoding.startswith("UTF-8"):
        return cast(BinaryIO, io.BufferedReader(_Utf8(stream, encoding, whole))) if encoding else stream
    stream.read(len(codecs.BOM_UTF8))
    return stream


class _Utf8(io.RawIOBase):
    """A stream in UTF-16 or UTF-32 with a byte order mark, read as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str, whole: bool) -> None:
        self.stream, self.whole, self.pending = stream, whole, b""
        self.decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        room, ended = memoryview(buffer), False
        while not self.pending and not ended:
            content = self.stream.read(HEAD)
            ended = not content
            self.pending = self.decoder.decode(content, ended and self.whole).encode()
        count = min(len(room), len(self.pending))
        room[:count], self.pending = self.pending[:count], self.pending[count:]
        return count
