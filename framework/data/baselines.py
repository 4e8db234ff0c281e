"""What a model has to beat: bits per byte of simple compressors."""

from __future__ import annotations

import lzma
import zlib
from typing import IO, Any

import numpy as np

from .progress import Callback, progress

SAMPLE_BLOCK = 1 << 20
SAMPLE_BLOCKS = 8
BASELINES = {"order0": "order-0 entropy", "gzip": "gzip -9", "xz": "xz -9"}  # what `baselines` measures, and its name


def baselines(held_out: IO[bytes], callback: Callback | None = None) -> dict[str, Any]:
    """Measure what a model has to beat on the held-out bytes, in bits per byte.

    ``order0``: the entropy of a byte under the held-out bytes' own histogram, over all of them. ``gzip`` and
    ``xz``: what ``gzip -9`` and ``xz -9`` need for the held-out documents in one piece; of more than 8 MiB
    they get eight blocks of 1 MiB, evenly spaced (``num_compressed_bytes`` says how much that was).

    Args:
        held_out: the held-out documents, one behind the other.
        callback: told of the progress in bytes; see `progress`.

    Returns:
        order0, gzip, xz: floats, bits per byte; num_bytes, num_compressed_bytes: ints. Nothing where no
        document is held out.
    """
    size = held_out.seek(0, 2)
    if size == 0:
        return {}

    def block(start: int) -> bytes:
        held_out.seek(start)
        return held_out.read(min(SAMPLE_BLOCK, size - start))

    counts = np.zeros(256, np.int64)
    for start in range(0, size, SAMPLE_BLOCK):
        counts += np.bincount(np.frombuffer(block(start), np.uint8), minlength=256)
    shares = counts[counts > 0] / size
    starts = range(0, size, SAMPLE_BLOCK)
    if len(starts) > SAMPLE_BLOCKS:
        starts = range(0, size - SAMPLE_BLOCK + 1, (size - SAMPLE_BLOCK) // (SAMPLE_BLOCKS - 1))
    pieces = [block(start) for start in starts]
    num_sampled = sum(map(len, pieces))
    # wbits 31 is gzip's own header; xz's dictionary need not be larger than what it is given.
    gzip_coder = zlib.compressobj(9, zlib.DEFLATED, 31)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": SAMPLE_BLOCKS * SAMPLE_BLOCK}]
    xz_coder = lzma.LZMACompressor(filters=filters)
    num_gzip = num_xz = 0
    with progress("compressing held-out bytes", num_sampled, callback) as advance:
        for piece in pieces:
            num_gzip += len(gzip_coder.compress(piece))
            num_xz += len(xz_coder.compress(piece))
            advance(len(piece))
        num_gzip, num_xz = num_gzip + len(gzip_coder.flush()), num_xz + len(xz_coder.flush())
    return {
        "order0": -float(shares @ np.log2(shares)),
        "gzip": 8 * num_gzip / num_sampled,
        "xz": 8 * num_xz / num_sampled,
        "num_bytes": size,
        "num_compressed_bytes": num_sampled,
    }
