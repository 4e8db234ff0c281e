"""Reads pictures as sequences of pixels. What cannot be read is counted by its reason."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..data.tar import BadSample
from .archive import is_hidden

BROKEN = (ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
MAX_16, MAX_8 = 65535.0, 255.0


@dataclass
class Picture:
    """One picture.

    Attributes:
        pixels: float32 ``[size * size, channels]``, row by row, from 0 to 1 for integers of 8 or 16 bits.
        depth: what the pixels were in the file.
        num_frames: 1, or 2 for more than one, of which the first was read.
    """

    pixels: NDArray[np.float32]
    depth: str
    num_frames: int = 1


@dataclass
class Pictures:
    """Pictures of one form.

    Attributes:
        pixels: float32 ``[n, size * size, channels]``.
        files: int64 ``[n]``, the numbers of the files that could be read.
        depths: number of pictures of each depth.
        num_animated: pictures of several frames, of which the first was read.
        skipped: number of files that could not be read, by the reason: ``no picture``, ``broken picture``, ...
    """

    pixels: NDArray[np.float32]
    files: NDArray[np.int64]
    depths: Counter[str] = field(default_factory=Counter)
    num_animated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def list_pictures(folder: Path) -> tuple[list[Path], int]:
    """The files in a folder and its subfolders, sorted, and the number of hidden ones, which are left out."""

    def fail(error: OSError) -> None:
        raise InputError("data.source", str(error.filename), f"cannot be read: {error.strerror}")

    found, hidden = [], 0
    for place, folders, names in os.walk(folder, onerror=fail):
        inner = Path(place)
        hidden += sum(is_hidden(inner / name) for name in (*names, *folders))
        folders[:] = [name for name in folders if not is_hidden(inner / name)]
        found += [inner / name for name in names if not is_hidden(inner / name)]
    return sorted(found), hidden


def read_pictures(files: Sequence[Path], size: int, channels: int, max_bad: int) -> Pictures:
    """Read pictures.

    Args:
        files: their paths.
        size: height and width to which they are scaled, in pixels.
        channels: 1 (grey), 3 (red, green, blue), or 0: 3 if any of them has a color.
        max_bad: so many files that are no picture, or a broken one, are left out.

    Raises:
        InputError: more files than ``max_bad`` cannot be read, or all of them.
    """
    numbers, read, bad = [], [], []
    for number, file in enumerate(files):
        try:
            read.append(read_picture(file, size, channels))
            numbers.append(number)
        except BadSample as error:
            bad.append(error)
    reasons = Counter(error.allowed.partition(":")[0].removeprefix("is ").removeprefix("a ") for error in bad)
    if len(bad) > max_bad or not read:
        first, count = bad[0], f"{len(bad):,} of {len(files):,} files are no picture, or a broken one"
        named = ", ".join(f"{Path(str(error.value)).name!r}" for error in bad[:5]) + ", ..." * (len(bad) > 5)
        fix = f"remove or mend them, or leave them out: data.max_bad_samples={len(bad)}" if read else ""
        raise InputError("data.source", first.value, f"{first.allowed} ({count}: {named}; {max_bad} allowed)", fix)
    most = max(picture.pixels.shape[1] for picture in read)
    pixels = np.stack([np.broadcast_to(picture.pixels, (size * size, most)) for picture in read])
    depths = Counter(picture.depth for picture in read)
    return Pictures(pixels, np.array(numbers), depths, sum(p.num_frames > 1 for p in read), reasons)


def read_picture(source: Any, size: int, channels: int = 0) -> Picture:
    """Read one picture: its first frame, upright as its EXIF data say, what is transparent on white.

    Args:
        source: its path, the content of its file, or an image of Pillow.
        size: height and width to which it is scaled, in pixels.
        channels: 1 (grey), 3 (red, green, blue), or 0: 3 if any pixel has a color.

    Raises:
        BadSample: it cannot be read; it starts with the kind of reason, followed by a colon and more.
    """
    from PIL import Image, UnidentifiedImageError  # a dependency of matplotlib

    name = "a picture" if isinstance(source, (bytes, Image.Image)) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            if isinstance(source, Image.Image):
                return _picture(source, size, channels)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                return _picture(opened, size, channels)
    except UnidentifiedImageError:
        why = "is no picture: Pillow does not know its format"
    except Image.DecompressionBombError as error:
        why = f"is too large: {error}"
    except OSError as error:
        why = f"cannot be opened: {error.strerror}" if error.errno else f"is a broken picture: {error}"
    except BROKEN as error:
        why = f"is a broken picture: {error}"
    raise BadSample("data.source", name, why)


def _picture(opened: Any, size: int, channels: int) -> Picture:
    from PIL import Image, ImageOps

    num_frames = 1 + bool(getattr(opened, "is_animated", False))
    reduced = ";16" in str(getattr(opened, "tile", ""))
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I") or upright.mode == "F":
        depth, scale = ("float", 1.0) if upright.mode == "F" else ("16 bits", MAX_16)
        values = np.asarray(upright, np.float32) / scale
        if not np.isfinite(values).all():
            raise ValueError("it has values that are not finite")
        pixels = np.asarray(Image.fromarray(values).resize((size, size)), np.float32).reshape(-1, 1)
        return Picture(np.repeat(pixels, max(channels, 1), axis=1), depth, num_frames)
    if upright.mode in ALPHA or "transparency" in upright.info:
        above = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    is_color = channels == 3 or (channels == 0 and upright.mode not in ("1", "L") and _has_color(upright))
    scaled = upright.convert("RGB" if is_color else "L").resize((size, size))
    pixels = np.asarray(scaled, np.float32).reshape(size * size, -1) / np.float32(MAX_8)
    return Picture(pixels, "16 bits a color read as 8" if reduced else "8 bits", num_frames)


def _has_color(picture: Any) -> bool:
    red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB")), 2, 0)
    return bool((red != green).any() or (green != blue).any())
