"""Pictures: which files and folders are taken, their depth, channels and transparency, and what is said of them."""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import messages
from PIL import Image

from longreach.errors import InputError
from longreach.framework.data import DataConfig
from longreach.framework.data.tar import BadSample
from longreach.framework.model import ModelConfig
from longreach.framework.tasks.images import Images
from longreach.framework.tasks.pictures import read_picture
from longreach.framework.tasks.task import TaskConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of five grey pictures each."""
    for name, shade in (("dark", 10), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("L", (6, 6), shade + number).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def images_of(folder: Path, channels: int = 0, size: int = 4, **options: Any) -> Images:
    data = DataConfig(source=str(folder), seq_len=size**2, batch_size=1, **options)
    return Images(TaskConfig(name="images", size=size, channels=channels), data)


def png_of_16_bit_colors(path: Path, red: int, green: int, blue: int) -> None:
    """A PNG of 2 x 2 pixels that Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + struct.pack(">HHH", red, green, blue) * 2) * 2
    head = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_hidden_files_and_folders_are_no_data(folder: Path) -> None:
    plain = images_of(folder)
    (folder / ".ipynb_checkpoints").mkdir()
    Image.new("L", (6, 6)).save(folder / ".ipynb_checkpoints" / "0.png")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._0.png").write_bytes(b"\0\5\26\7")
    (folder / "nothing").mkdir()
    (folder / "dark" / ".ipynb_checkpoints").mkdir()
    Image.new("L", (6, 6)).save(folder / "dark" / ".ipynb_checkpoints" / "0.png")
    for name in (".DS_Store", "dark/.DS_Store", "light/Thumbs.db", "light/._0.png", "labels.txt"):
        (folder / name).write_bytes(b"\0\1")
    task = images_of(folder)
    assert task.classes == ["dark", "light"]
    assert task.fingerprint == plain.fingerprint
    assert "not read: 2 hidden folders, 5 hidden files, 1 empty folder, 1 stray file" in task.summary
    assert "not read" not in plain.summary


def test_pictures_in_subfolders_belong_to_the_class(folder: Path) -> None:
    (folder / "dark" / "more" / "deep").mkdir(parents=True)
    Image.new("L", (6, 6)).save(folder / "dark" / "more" / "deep" / "a.png")
    task = images_of(folder)
    assert np.bincount(task.labels).tolist() == [6, 5]
    assert "11 pictures of 2 classes (dark: 6, light: 5)" in task.summary


def test_folders_of_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    root = tmp_path / "whole"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for name in ("dark", "light"):
            (root / split / name).mkdir()
            Image.new("L", (6, 6)).save(root / split / name / "0.png")
    with pytest.raises(InputError, match=r"folders of splits \(test, train\)"):
        images_of(root)


def test_bad_files_are_counted_by_reason_and_skipped_up_to_a_limit(folder: Path) -> None:
    plain = images_of(folder)
    (folder / "dark" / "notes.txt").write_text("no picture")
    (folder / "dark" / "empty.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "light" / "cut.png")
    Image.fromarray(noise).save(folder / "light" / "cut.jpg")
    for name in ("cut.png", "cut.jpg"):
        content = (folder / "light" / name).read_bytes()
        (folder / "light" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"4 of 14 files are no picture, or a broken one: .*; 3 allowed") as error:
        images_of(folder, max_bad_samples=3)
    assert "data.max_bad_samples=4" in error.value.fix
    assert all(name in str(error.value) for name in ("notes.txt", "empty.png", "cut.png", "cut.jpg"))
    task = images_of(folder, max_bad_samples=4)
    assert "skipped files: 2 no picture, 2 broken picture" in task.summary
    assert task.fingerprint == plain.fingerprint


def test_the_line_says_what_was_taken(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("longreach"), "propagate", True)
    with caplog.at_level(logging.INFO, "longreach"):
        task = images_of(folder)
    assert messages(caplog.records) == [task.summary]
    expected = "photos: 10 pictures of 2 classes (dark: 5, light: 5); 4 x 4 pixels; 1 channel (grey); 8 bits"
    assert task.summary == expected


def test_channels_are_those_of_the_pictures_or_as_asked(folder: Path) -> None:
    for number in range(5):  # grey, but stored as colors
        Image.new("RGB", (6, 6), (number, number, number)).save(folder / "dark" / f"{number}.png")
    assert images_of(folder).channels == 1
    Image.new("RGB", (6, 6), (200, 100, 50)).save(folder / "dark" / "0.png")
    task = images_of(folder)
    model = ModelConfig()
    task.configure_model(model)
    assert task.channels == model.channels == 3 and "3 channels (colors)" in task.summary
    pixels = task.pixels * task.deviation + task.mean
    np.testing.assert_allclose(pixels[0], np.tile(np.float32([200, 100, 50]) / 255, (16, 1)), atol=1e-5)
    np.testing.assert_allclose(pixels[9], np.full((16, 3), 204 / 255), atol=1e-5)
    np.testing.assert_allclose(task.pixels.mean(axis=(0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(task.pixels.std(axis=(0, 1)), 1, atol=1e-5)
    tokens, labels, _ = task.sequences("train", None).sequence(0)
    assert tokens.shape == (16, 3) and labels.shape == (16,)
    grey = images_of(folder, channels=1)
    assert grey.channels == 1 and grey.fingerprint != task.fingerprint
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    np.testing.assert_allclose(grey.pixels[0] * grey.deviation + grey.mean, luma / 255, atol=1e-5)
    with pytest.raises(InputError, match=r"task\.channels = 2"):
        images_of(folder, channels=2)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_kept(suffix: str, tmp_path: Path) -> None:
    """A ramp of which a conversion to 8 bits leaves the first value alone."""
    ramp = np.arange(0, 64000, 4000, np.uint16).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    picture = read_picture(tmp_path / f"a.{suffix}", 4)
    assert picture.depth == "16 bits"
    np.testing.assert_allclose(picture.pixels[:, 0], ramp.ravel() / 65535, atol=1e-6)
    assert read_picture(tmp_path / f"a.{suffix}", 4, channels=3).pixels.shape == (16, 3)


def test_16_bits_a_color_are_said_to_be_reduced(tmp_path: Path) -> None:
    png_of_16_bit_colors(tmp_path / "a.png", 65535, 32768, 0)
    picture = read_picture(tmp_path / "a.png", 2)
    assert picture.depth == "16 bits a color read as 8"
    np.testing.assert_allclose(picture.pixels[0], [1, 128 / 255, 0], atol=1e-6)


def test_depths_are_said_and_comparable(folder: Path) -> None:
    Image.fromarray(np.full((6, 6), 65535, np.uint16)).save(folder / "dark" / "0.png")
    Image.new("L", (6, 6), 255).save(folder / "dark" / "1.png")
    task = images_of(folder)
    assert "16 bits (1), 8 bits (9)" in task.summary
    np.testing.assert_allclose(task.pixels[0], task.pixels[1], atol=1e-5)


def palette(tmp_path: Path) -> Path:
    picture = Image.new("P", (2, 2), 1)
    picture.putpalette([0, 0, 0, 255, 128, 0])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png", transparency=0)
    return tmp_path / "a.png"


def test_palettes_and_transparency(tmp_path: Path) -> None:
    """The first pixel of each is transparent, hence white; those of half alpha are half white."""
    colors = read_picture(palette(tmp_path), 2).pixels
    np.testing.assert_allclose(colors, [[1, 1, 1], *[[1, 128 / 255, 0]] * 3], atol=1e-6)
    for mode, dark in (("RGBA", (0, 0, 0)), ("LA", (0,))):
        picture = Image.new(mode, (2, 2), (*dark, 255))
        picture.putpixel((0, 0), (*dark, 0))
        picture.putpixel((1, 0), (*dark, 128))
        picture.save(tmp_path / "b.png")
        pixels = read_picture(tmp_path / "b.png", 2).pixels
        np.testing.assert_allclose(pixels[:, 0], [1, 127 / 255, 0, 0], atol=1e-6)
        assert pixels.shape == (4, 1), "black on white has no color"
    Image.new("1", (2, 2), 1).save(tmp_path / "c.png")
    assert read_picture(tmp_path / "c.png", 2).pixels.tolist() == [[1.0]] * 4
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "d.tiff")
    np.testing.assert_allclose(read_picture(tmp_path / "d.tiff", 2).pixels[0], [1, 0, 0], atol=1e-6)


def test_the_first_frame_of_several_is_read(folder: Path) -> None:
    frames = [Image.new("L", (6, 6), shade) for shade in (30, 90, 250)]
    frames[0].save(folder / "dark" / "0.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "dark" / "0.tiff", save_all=True, append_images=frames[1:])
    for name in ("0.gif", "0.tiff"):
        np.testing.assert_allclose(read_picture(folder / "dark" / name, 2).pixels, 30 / 255, atol=1e-6)
    assert "the first frame of 2 with several" in images_of(folder).summary


def test_pictures_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    left_half_white = Image.new("L", (8, 8))
    left_half_white.paste(255, (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    left_half_white.save(tmp_path / "a.png", exif=exif)
    pixels = read_picture(tmp_path / "a.png", 8).pixels.reshape(8, 8)
    assert (pixels[:4] == 1).all() and (pixels[4:] == 0).all()


def test_pictures_in_memory_are_read_as_those_of_files(tmp_path: Path) -> None:
    path = palette(tmp_path)
    expected = read_picture(path, 2, 3).pixels
    assert np.array_equal(read_picture(path.read_bytes(), 2, 3).pixels, expected)
    with Image.open(path) as opened:
        assert np.array_equal(read_picture(opened, 2, 3).pixels, expected)
    for content in (b"", b"no picture", path.read_bytes()[:60]):
        with pytest.raises(BadSample):
            read_picture(content, 2)
    with pytest.raises(BadSample, match=r"nowhere\.png.*cannot be opened: No such file"):
        read_picture(tmp_path / "nowhere.png", 2)


def test_the_digits_are_those_of_before() -> None:
    task = images_of(Path("digits"), size=8)
    assert task.classes == [str(number) for number in range(10)] and task.channels == 1
    from sklearn.datasets import load_digits

    found = load_digits().data.astype(np.float32)
    assert np.array_equal(task.pixels[:, :, 0], (found - found.mean()) / found.std())
    described = task.describe()
    assert (described.classes, described.size, described.colors) == (task.classes, 8, 1)
