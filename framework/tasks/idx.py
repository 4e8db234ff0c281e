"""Reads IDX files, the format of MNIST and of sets like it: arrays of bytes, whole or compressed by gzip."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

PARTS = [(split, kind) for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
BYTES = 8  # the type of the values, as the third byte of a file
PACKAGES = Path("/usr/share/datasets")  # where Debian's packages dataset-NAME have their files


def find_idx(folder: Path) -> list[Path]:
    """The files of `PARTS` in a folder: pictures and labels to train on, then those of the test; none if it has none.

    Raises:
        InputError: it has some of them, but not all; or it is one of a package of Debian that is not installed.
    """
    if not folder.exists() and folder.parent == PACKAGES:
        fix = f"apt-get install dataset-{folder.name}"
        raise InputError("data.source", str(folder), "there is no such folder: the package is not installed", fix)
    names = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    found, missing = [], []
    for split, kind in PARTS:
        pattern = re.compile(rf"{split}-{kind.replace('-', '[-.]')}-ubyte(\.gz)?")
        matches = sorted(path for name, path in names.items() if pattern.fullmatch(name))
        found += matches[:1]
        missing += [] if matches else [f"{split}-{kind}-ubyte"]
    if found and missing:
        raise InputError("data.source", str(folder), f"must have {', '.join(missing)}(.gz) beside {found[0].name}")
    return found


def read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an array of bytes.

    Args:
        file: its path; compressed if it ends in ``.gz``.
        dimensions: so many it must have.

    Raises:
        InputError: it cannot be read, or is no such file.
    """

    def error(allowed: str) -> InputError:
        return InputError("data.source", str(file), allowed)

    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as failure:
        raise error(f"is no whole file of gzip: {failure}") from None
    except OSError as failure:
        raise error(f"cannot be read: {failure.strerror}") from None
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, BYTES, dimensions]):
        raise error(f"is no IDX file of bytes with {dimensions} dimension{'s' * (dimensions > 1)}")
    shape: Sequence[int] = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    if len(content) - start != math.prod(shape):
        size = " x ".join(f"{one:,}" for one in shape)
        raise error(f"must have {size} bytes after its head, and has {len(content) - start:,}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
