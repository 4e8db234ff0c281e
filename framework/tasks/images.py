"""Image classification: an image is a sequence of its pixels, row by row."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..data import DataConfig, Sequences
from ..model import ModelConfig
from .archive import is_hidden
from .description import TaskDescription
from .pictures import list_pictures, read_pictures
from .task import (
    SPLITS,
    TEST_FRACTION,
    Examples,
    Rows,
    Task,
    TaskConfig,
    check_fits,
    counted_classes,
    digest_of,
    holdout_split,
    padded_sequence,
    set_model_fields,
    stratified_split,
)

DIGITS = "digits"  # as data.source: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels
log = logging.getLogger("longreach.data")


class Images(Task):
    """Classifies the images of ``data.source``: `DIGITS`, or a folder with one folder of images per class.

    The images of a folder are read as `read_pictures` says, scaled to ``task.size`` x ``task.size`` pixels. Every fifth
    image of a class is for the test. Pixels are standardized by the mean and deviation of all images, for each channel.

    Attributes:
        classes: their names, by number.
        pixels: float32 ``[images, pixels, channels]``, standardized.
        mean, deviation: float32 ``[channels]``, of the pixels as `read_picture` returns them.
        summary: one line: what was taken.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = data.name or Path(data.source).name
        if task.channels not in (0, 1, 3):
            raise InputError("task.channels", task.channels, "1 (grey), 3 (colors), or 0 for what the pictures have")
        if data.source == DIGITS:
            pixels, self.labels = _digits()
            pixels = np.repeat(pixels, max(task.channels, 1), axis=2)
            self.classes, notes = [str(digit) for digit in range(10)], ["17 shades"]
        else:
            pixels, self.labels, self.classes, notes = _folder(Path(data.source).expanduser(), task, data)
        check_fits(pixels.shape[1], data, "the pixels of an image")
        self.channels = pixels.shape[2]
        each = [pixels[..., channel] for channel in range(self.channels)]
        self.mean = np.array([one.mean() for one in each], np.float32)
        self.deviation = np.array([one.std() or 1 for one in each], np.float32)
        self.pixels = self.standardized(pixels)
        rest, self.test = stratified_split(self.labels, TEST_FRACTION)
        train, valid = holdout_split(len(rest), data.valid_fraction)
        self.numbers = {"train": rest[train], "valid": rest[valid], "test": self.test}
        most_common = np.bincount(self.labels[rest]).argmax()
        self.baseline_metrics = {"accuracy": float((self.labels[self.test] == most_common).mean())}
        self.summary = self._summary(notes)
        log.info("%s", self.summary)

    def standardized(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pixels ``[..., channels]`` as `read_picture` returns them, in standard deviations from the mean."""
        return (pixels - self.mean) / self.deviation

    def describe(self) -> TaskDescription:
        side, scale = round(self.pixels.shape[1] ** 0.5), 16 if self.data.source == DIGITS else 1  # of white
        return TaskDescription(
            "images",
            self.data.seq_len,
            classes=self.classes,
            mean=[float(value) / scale for value in self.mean],
            deviation=[float(value) / scale for value in self.deviation],
            size=side,
            colors=self.channels,
        )

    @cached_property
    def fingerprint(self) -> str:
        pixels = self.pixels.reshape(len(self.pixels), -1)
        return digest_of(self.task, self.data.seq_len, self.data.valid_fraction, pixels, self.labels)

    def configure_model(self, model: ModelConfig) -> None:
        outputs = len(self.classes)
        set_model_fields(model, "images", channels=self.channels, vocab=0, head="class", outputs=outputs, documents=1)

    def sequences(self, split: str, seed: int | None) -> Sequences:
        numbers = self.numbers[split]

        def make(number: int) -> Rows:
            image = numbers[number]
            return padded_sequence([self.pixels[image]], int(self.labels[image]), self.data.seq_len)

        return Examples(make, len(numbers), seed)

    def _summary(self, notes: list[str]) -> str:
        size = round(self.pixels.shape[1] ** 0.5)
        channels = "1 channel (grey)" if self.channels == 1 else f"{self.channels} channels (colors)"
        return (
            f"{self.title}: {len(self.labels):,} pictures of {len(self.classes):,} classes "
            f"({counted_classes(self.classes, self.labels)}); {size} x {size} pixels; {channels}; {'; '.join(notes)}"
        )


def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels ``[n, 64, 1]`` and labels ``[n]`` of scikit-learn's digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        fix = "pip install 'longreach[tasks]'"
        raise InputError("data.source", DIGITS, "needs the package scikit-learn, which is not installed", fix) from None
    found = load_digits()
    return found.data.astype(np.float32)[:, :, None], found.target.astype(np.int64)


def _folder(
    root: Path, task: TaskConfig, data: DataConfig
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str], list[str]]:
    """Pixels ``[n, size * size, channels]`` of the images below ``root``, their classes' numbers ``[n]`` and names.

    Returns:
        Also what else to say of them: depth, and what was left out.
    """
    entries = sorted(root.iterdir()) if root.is_dir() else []
    hidden = [path for path in entries if is_hidden(path)]
    folders = [path for path in entries if path.is_dir() and path not in hidden]
    listed = {folder: list_pictures(folder) for folder in folders}
    classes = [folder for folder in folders if listed[folder][0]]
    if len(classes) < 2:
        allowed = f"a folder with one folder of images for each class, or {DIGITS}"
        raise InputError("data.source", str(root), allowed)
    if {folder.name.lower() for folder in classes} <= SPLITS:
        allowed = f"has folders of splits ({', '.join(folder.name for folder in classes)}), where classes are expected"
        raise InputError("data.source", str(root), allowed, f"give one of them: data.source={classes[0]}")
    files = [path for folder in classes for path in listed[folder][0]]
    owners = np.repeat(np.arange(len(classes)), [len(listed[folder][0]) for folder in classes])
    check_fits(task.size**2, data, "the pixels of an image")  # before they are read
    found = read_pictures(files, task.size, task.channels, data.max_bad_samples)
    unread = {
        "hidden folder": sum(path.is_dir() for path in hidden),
        "hidden file": sum(not path.is_dir() for path in hidden) + sum(count for _, count in listed.values()),
        "empty folder": len(folders) - len(classes),
        "stray file": len(entries) - len(hidden) - len(folders),
    }
    notes = [", ".join(f"{depth}" + f" ({n:,})" * (len(found.depths) > 1) for depth, n in found.depths.items())]
    notes += [f"the first frame of {found.num_animated:,} with several"] if found.num_animated else []
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in found.skipped.items())
    notes += [f"skipped files: {skipped}"] if skipped else []
    others = ", ".join(f"{count:,} {name}{'s' * (count > 1)}" for name, count in unread.items() if count)
    notes += [f"not read: {others}"] if others else []
    return found.pixels, owners[found.files], [folder.name for folder in classes], notes
