"""Where documents come from: a file, a folder, or the sources of this Python's own library.

A document is one file: a key (its path below the source, with ``/``) and its bytes. Documents come in the
byte order of their keys, so the same files give the same order on every machine and in every locale.
"""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...kernels.errors import InputError

CPYTHON = "cpython"  # ./cpython is a folder of that name


@dataclass(frozen=True)
class Document:
    """One file of a corpus: its key, where it lies, its size in bytes and the time of its last change."""

    key: str
    path: Path
    num_bytes: int
    mtime_ns: int


def list_documents(source: str) -> list[Document]:
    """List the documents of ``source`` in the byte order of their keys; no content is read.

    A folder is searched recursively for regular files. Names that begin with a dot are left out (``.git``),
    and so are links: inside the folder they would repeat a document, outside they would leave it.
    Empty files hold no token and are left out too.

    Args:
        source: the path of a file or of a folder, or ``cpython``: every ``.py`` file of this Python's
            standard library, its tests included, installed packages not.

    Raises:
        InputError: ``source`` is missing, unreadable, or holds nothing but empty files.
    """
    root = Path(sysconfig.get_path("stdlib") if source == CPYTHON else source).expanduser()
    try:
        mode = root.stat().st_mode
        if stat.S_ISDIR(mode):
            found = [_document(path.relative_to(root).as_posix(), path) for path in _files(root, source)]
        elif stat.S_ISREG(mode):
            found = [_document(root.name, root)]
        else:
            raise InputError("data.source", source, "must be a regular file or a folder")
    except OSError as error:
        raise _unreadable(source, error) from None
    documents = [document for document in found if document.num_bytes > 0]
    if not documents:
        raise InputError(
            "data.source",
            source,
            f"holds no document: {len(found)} files, all empty" if found else "holds no regular file",
            "links and names that begin with a dot are not read",
        )
    return sorted(documents, key=lambda document: os.fsencode(document.key))


def read_document(document: Document) -> bytes:
    """Read one document.

    Raises:
        InputError: it cannot be read, or its size is no longer the listed one.
    """
    try:
        content = document.path.read_bytes()
    except OSError as error:
        raise _unreadable(str(document.path), error) from None
    if len(content) != document.num_bytes:
        allowed = f"had {document.num_bytes} bytes when it was listed and {len(content)} when it was read"
        raise InputError("data.source", str(document.path), allowed, "pack it while nothing writes to it")
    return content


def documents(source: str) -> Iterator[tuple[str, bytes]]:
    """Yield (key, bytes) of every document of ``source``, in order; see `list_documents`."""
    for document in list_documents(source):
        yield document.key, read_document(document)


def _files(root: Path, source: str) -> Iterator[Path]:
    """Yield the regular files below ``root``; an unreadable folder raises OSError, or it would go missing."""

    def fail(error: OSError) -> None:
        raise error

    left_out = {"site-packages", "dist-packages", "__pycache__"} if source == CPYTHON else set()
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            wanted = name.endswith(".py") if source == CPYTHON else not name.startswith(".")
            if wanted and stat.S_ISREG(path.lstat().st_mode):
                yield path


def _document(key: str, path: Path) -> Document:
    status = path.stat()
    return Document(key, path, status.st_size, status.st_mtime_ns)


def _unreadable(path: str, error: OSError) -> InputError:
    where = f" ({error.filename})" if error.filename and str(error.filename) != path else ""
    fix = "give the path of a file or folder, or cpython" if isinstance(error, FileNotFoundError) else ""
    return InputError("data.source", path, f"cannot be read: {error.strerror}{where}", fix)
