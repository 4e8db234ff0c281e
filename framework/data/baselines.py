"""Compression baselines of a corpus: bits per byte of its entropy, gzip and xz on the held-out documents."""

from __future__ import annotations

import lzma
import zlib
from typing import IO, Any

import numpy as np

from .progress import Callback, progress

SAMPLE_BLOCK = 1 << 20
SAMPLE_BLOCKS = 8
BASELINES = {"order0": "order-0 entropy", "gzip": "gzip -9", "xz": "xz -9"}  # key in the result of `baselines` -> label


def baselines(held_out: IO[bytes], callback: Callback | None = None) -> dict[str, Any]:
    """Compress the held-out bytes; a trained model should need fewer bits per byte.

    ``order0``: the entropy of the histogram of all held-out bytes. ``gzip`` and ``xz``: the sizes by ``gzip -9`` and
    ``xz -9`` of all held-out bytes as one stream; of more than 8 MiB, of a sample: eight evenly spaced blocks of 1 MiB.

    Args:
        held_out: the concatenated held-out documents, seekable.
        callback: reports the progress in bytes; see `progress`.

    Returns:
        order0, gzip, xz: floats, bits per byte. num_bytes, num_compressed_bytes: ints, all held-out bytes, and those
        of the sample. Empty if no document is held out.
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
    frequencies = counts[counts > 0] / size
    starts = range(0, size, SAMPLE_BLOCK)
    if len(starts) > SAMPLE_BLOCKS:
        starts = range(0, size - SAMPLE_BLOCK + 1, (size - SAMPLE_BLOCK) // (SAMPLE_BLOCKS - 1))
    blocks = [block(start) for start in starts]
    num_sampled = sum(map(len, blocks))
    # wbits 31 writes gzip's header. A dictionary larger than the input would only take memory.
    gzip_coder = zlib.compressobj(9, zlib.DEFLATED, 31)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": SAMPLE_BLOCKS * SAMPLE_BLOCK}]
    xz_coder = lzma.LZMACompressor(filters=filters)
    num_gzip = num_xz = 0
    with progress("compressing held-out bytes", num_sampled, callback) as advance:
        for content in blocks:
            num_gzip += len(gzip_coder.compress(content))
            num_xz += len(xz_coder.compress(content))
            advance(len(content))
        num_gzip, num_xz = num_gzip + len(gzip_coder.flush()), num_xz + len(xz_coder.flush())
    return {
        "order0": -float(frequencies @ np.log2(frequencies)),
        "gzip": 8 * num_gzip / num_sampled,
        "xz": 8 * num_xz / num_sampled,
        "num_bytes": size,
        "num_compressed_bytes": num_sampled,
    }
