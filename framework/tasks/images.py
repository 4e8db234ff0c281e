"""Image classification: an image is a sequence of its pixels, row by row."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..data import DataConfig, Sequences
from ..model import ModelConfig
from .task import (
    Examples,
    Rows,
    Task,
    TaskConfig,
    check_fits,
    digest_of,
    holdout_split,
    padded_sequence,
    set_model_fields,
)

DIGITS = "digits"  # as data.source: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels
TEST_FRACTION = 0.2


class Images(Task):
    """Classifies the grey-scale images of ``data.source``: `DIGITS`, or a folder with one folder of images per class.

    The images of a folder are scaled to ``task.size`` x ``task.size`` pixels. Every fifth image of a class is for the
    test. Pixels are standardized by the mean and deviation of all images.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = data.name or Path(data.source).name
        pixels, labels = _digits() if data.source == DIGITS else _folder(Path(data.source).expanduser(), task.size)
        check_fits(pixels.shape[1], data, "the pixels of an image")
        self.pixels, self.labels = (pixels - pixels.mean()) / (pixels.std() or 1), labels
        self.num_classes = int(labels.max()) + 1
        rest, self.test = _stratified_split(labels, TEST_FRACTION)
        train, valid = holdout_split(len(rest), data.valid_fraction)
        self.numbers = {"train": rest[train], "valid": rest[valid], "test": self.test}
        most_common = np.bincount(labels[rest]).argmax()
        self.baseline_metrics = {"accuracy": float((labels[self.test] == most_common).mean())}

    @cached_property
    def fingerprint(self) -> str:
        return digest_of(self.task, self.data.seq_len, self.data.valid_fraction, self.pixels, self.labels)

    def configure_model(self, model: ModelConfig) -> None:
        set_model_fields(model, "images", channels=1, vocab=0, head="class", outputs=self.num_classes, documents=1)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        numbers = self.numbers[split]

        def make(number: int) -> Rows:
            image = numbers[number]
            return padded_sequence([self.pixels[image, :, None]], int(self.labels[image]), self.data.seq_len)

        return Examples(make, len(numbers), seed)


def _stratified_split(labels: NDArray[np.int64], fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the numbers of all images into those kept and those held out, the same fraction of each class."""
    parts = []
    for label in range(int(labels.max()) + 1):
        of_class = np.flatnonzero(labels == label)
        parts.append([of_class[numbers] for numbers in holdout_split(len(of_class), fraction)])
    kept, held_out = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    return kept, held_out


def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels ``[n, 64]`` and labels ``[n]`` of scikit-learn's digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        fix = "pip install 'longreach[tasks]'"
        raise InputError("data.source", DIGITS, "needs the package scikit-learn, which is not installed", fix) from None
    found = load_digits()
    return found.data.astype(np.float32), found.target.astype(np.int64)


def _folder(root: Path, size: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Grey-scale pixels ``[n, size * size]`` of the images below ``root``, and the numbers ``[n]`` of their folders."""
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
    from PIL import Image  # a dependency of matplotlib

    return Image
