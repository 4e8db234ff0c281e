"""The class of an image that is read pixel by pixel, line after line."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..data import DataConfig, Sequences
from ..model import ModelConfig
from .task import Examples, Rows, Task, TaskConfig, check_fits, digest_of, held_out, settle, whole

DIGITS = "digits"  # as data.source: the 1,797 handwritten digits of 8 x 8 pixels in scikit-learn
TEST_SHARE = 0.2


class Images(Task):
    """Grey images of ``data.source``: `DIGITS`, or a folder with a folder of images for each class, which are scaled to
    ``task.size`` pixels a side. Every fifth image of a class is for the test.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = data.name or Path(data.source).name
        pixels, labels = _digits() if data.source == DIGITS else _folder(Path(data.source).expanduser(), task.size)
        check_fits(pixels.shape[1], data, "the pixels of an image")
        self.pixels, self.labels = (pixels - pixels.mean()) / (pixels.std() or 1), labels
        self.num_classes = int(labels.max()) + 1
        known, self.test = _split(labels, TEST_SHARE)
        train, valid = held_out(len(known), data.valid_fraction)
        self.numbers = {"train": known[train], "valid": known[valid], "test": self.test}
        common = np.bincount(labels[known]).argmax()
        self.baseline_metrics = {"accuracy": float((labels[self.test] == common).mean())}

    @cached_property
    def fingerprint(self) -> str:
        return digest_of(self.task, self.data.seq_len, self.data.valid_fraction, self.pixels, self.labels)

    def fit(self, model: ModelConfig) -> None:
        settle(model, "images", channels=1, vocab=0, head="class", outputs=self.num_classes, documents=1)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        numbers = self.numbers[split]

        def make(number: int) -> Rows:
            which = numbers[number]
            return whole([self.pixels[which, :, None]], int(self.labels[which]), self.data.seq_len)

        return Examples(make, len(numbers), seed)


def _split(labels: NDArray[np.int64], share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers of the images without those of the test, and these: the same share of each class."""
    parts = []
    for label in range(int(labels.max()) + 1):
        own = np.flatnonzero(labels == label)
        parts.append([own[chosen] for chosen in held_out(len(own), share)])
    known, test = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    return known, test


def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        fix = "pip install 'longreach[tasks]'"
        raise InputError("data.source", DIGITS, "needs the package scikit-learn, which is not installed", fix) from None
    found = load_digits()
    return found.data.astype(np.float32), found.target.astype(np.int64)


def _folder(root: Path, size: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Grey pixels ``[n, size * size]`` of the images below ``root``, and the numbers of their folders."""
    image = _pillow()
    folders = sorted(path for path in root.glob("*") if path.is_dir()) if root.is_dir() else []
    files = [(path, number) for number, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    if len(folders) < 2 or not files:
        allowed = f"a folder with one folder of images for each class, or {DIGITS}"
        raise InputError("data.source", str(root), allowed)
    pixels = []
    for path, _ in files:
        try:
            with image.open(path) as opened:
                pixels.append(np.asarray(opened.convert("L").resize((size, size)), np.float32).ravel())
        except (OSError, ValueError, image.DecompressionBombError) as error:
            raise InputError("data.source", str(path), f"cannot be read as an image: {error}") from None
    return np.stack(pixels), np.array([number for _, number in files])


def _pillow() -> Any:
    from PIL import Image  # matplotlib brings it

    return Image
