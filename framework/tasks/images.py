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
from .idx import find_idx, read_idx
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
    """Classifies the images of ``data.source``: `DIGITS`, a folder with one folder of images per class, or one with the
    four IDX files of MNIST or of a set like it.

    The images of a folder are read as `read_pictures` says, scaled to ``task.size`` x ``task.size`` pixels. Every fifth
    image of a class is for the test; IDX files bring theirs. Pixels are standardized by the mean and deviation of all
    images, of IDX files those to train on, for each channel.

    Attributes:
        classes: their names, by number.
        pixels: float32 ``[images, pixels, channels]``, standardized.
        mean, deviation: float32 ``[channels]``, of the pixels before they are standardized.
        summary: one line: what was taken.
    """

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.title = data.name or Path(data.source).name
        if task.channels not in (0, 1, 3):
            raise InputError("task.channels", task.channels, "1 (grey), 3 (colors), or 0 for what the pictures have")
        root, num_rest = Path(data.source).expanduser(), None
        if data.source == DIGITS:
            pixels, self.labels = _digits()
            pixels = np.repeat(pixels, max(task.channels, 1), axis=2)
            self.classes, notes = [str(digit) for digit in range(10)], ["17 shades"]
        elif files := find_idx(root):
            pixels, self.labels, num_rest = _idx(files, task, data)
            self.classes = [str(number) for number in range(int(self.labels.max()) + 1)]
            notes = ["8 bits", f"the last {len(self.labels) - num_rest:,} are the test of the set"]
        else:
            pixels, self.labels, self.classes, notes = _folder(root, task, data)
        check_fits(pixels.shape[1], data, "the pixels of an image")
        self.channels = pixels.shape[2]
        each = [pixels[:num_rest, :, channel] for channel in range(self.channels)]
        self.mean = np.array([one.mean() for one in each], np.float32)
        self.deviation = np.array([one.std() or 1 for one in each], np.float32)
        pixels -= self.mean
        pixels /= self.deviation
        self.pixels = pixels
        if num_rest is None:
            rest, self.test = stratified_split(self.labels, TEST_FRACTION)
        else:
            rest, self.test = np.split(np.arange(len(self.labels)), [num_rest])
        train, valid = holdout_split(len(rest), data.valid_fraction)
        self.numbers = {"train": rest[train], "valid": rest[valid], "test": self.test}
        most_common = np.bincount(self.labels[rest]).argmax()
        self.baseline_metrics = {"accuracy": float((self.labels[self.test] == most_common).mean())}
        self.summary = self._summary(notes)
        log.info("%s", self.summary)

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


def _idx(files: list[Path], task: TaskConfig, data: DataConfig) -> tuple[NDArray[np.float32], NDArray[np.int64], int]:
    """Pixels ``[n, size * size, channels]`` and labels ``[n]`` of IDX files as `find_idx` returns them.

    Returns:
        Pixels from 0 to 1; the pictures of the test are the last. Also how many come before these.
    """
    size = task.size
    images, labels = ([read_idx(file, dimensions) for file in files[part::2]] for part, dimensions in ((0, 3), (1, 1)))
    for file, pictures, classes in zip(files[::2], images, labels, strict=True):
        if pictures.shape[1:] != (size, size):
            high, wide = pictures.shape[1:]
            allowed = f"must be the size of the pictures of {file.name}: {high} x {wide} pixels"
            fix = f"set task.size={high} data.seq_len={high * wide}" if high == wide else "only squares are read"
            raise InputError("task.size", size, allowed, fix)
        if len(pictures) != len(classes) or not len(classes):
            allowed = f"has {len(pictures):,} pictures, and {len(classes):,} labels are beside it"
            raise InputError("data.source", str(file), allowed)
    check_fits(size**2, data, "the pixels of an image")
    if labels[1].max() > labels[0].max():
        raise InputError("data.source", str(files[3]), f"has a class, {labels[1].max()}, that training lacks")
    whole, owners = np.concatenate(images), np.concatenate(labels).astype(np.int64)
    pixels = np.repeat(whole.reshape(len(whole), -1, 1), max(task.channels, 1), axis=2).astype(np.float32)
    pixels /= 255
    return pixels, owners, len(labels[0])


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
        allowed = f"a folder with one folder of images for each class, or with IDX files as MNIST has them, or {DIGITS}"
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
