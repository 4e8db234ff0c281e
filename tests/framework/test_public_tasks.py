"""Tasks by public rules: ListOps, Pathfinder and the files of MNIST: what their rules say is found in the examples."""

from __future__ import annotations

import gzip
import statistics
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.data import DataConfig
from longreach.framework.model import ModelConfig
from longreach.framework.tasks.images import Images
from longreach.framework.tasks.listops import ListOps
from longreach.framework.tasks.pathfinder import DASHES, DISTRACTOR_DASHES, Pathfinder, Scene, draw_scene
from longreach.framework.tasks.task import TaskConfig

Tree = int | tuple[int, list[Any]]
OPERATIONS = {10: max, 11: min, 12: lambda values: int(statistics.median(values)), 13: lambda values: sum(values) % 10}


def listops(seq_len: int, **options: Any) -> ListOps:
    return ListOps(TaskConfig(name="listops", **options), DataConfig(seq_len=seq_len))


def expressions(task: ListOps, split: str, count: int) -> Iterator[tuple[list[int], int]]:
    """The tokens of the first examples without padding, and their labels."""
    for number in range(count):
        tokens, labels, segments = task.sequences(split, None).sequence(number)
        end = len(tokens) if segments is None else int((segments == 0).sum())
        assert not tokens[end:].any()
        yield tokens[:end].tolist(), int(labels[-1])


def parsed(tokens: list[int]) -> Tree:
    """The tree of an expression, read from left to right."""
    whole: list[Any] = []
    opened = [whole]
    operations: list[int] = []
    for token in tokens:
        if 10 <= token < 14:
            operations.append(token)
            opened.append([])
        elif token == 14:
            opened[-2].append((operations.pop(), opened.pop()))
        else:
            assert 0 <= token < 10
            opened[-1].append(token)
    assert len(opened) == len(whole) == 1 and not operations
    return whole[0]


def value_of(tree: Tree) -> int:
    return tree if isinstance(tree, int) else OPERATIONS[tree[0]]([value_of(one) for one in tree[1]])


def nodes(tree: Tree, depth: int = 1) -> Iterator[tuple[Tree, int]]:
    yield tree, depth
    for one in () if isinstance(tree, int) else tree[1]:
        yield from nodes(one, depth + 1)


def test_the_value_of_an_expression_is_as_published() -> None:
    """The examples of the papers: of Nangia and Bowman, and of the Long Range Arena."""
    words = {"[MAX": 10, "[MIN": 11, "[MED": 12, "[SM": 13, "]": 14}
    for text, value in (("[MAX 2 9 [MIN 4 7 ] 0 ]", 9), ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5)):
        assert value_of(parsed([words[word] if word in words else int(word) for word in text.split()])) == value


@pytest.mark.parametrize("seq_len", [2000, 2048])
def test_expressions_follow_the_rules_of_the_long_range_arena(seq_len: int) -> None:
    task = listops(seq_len)
    assert task.title == "ListOps (rules of the Long Range Arena)"
    counts, depths, labels, seen = Counter[int](), Counter[int](), Counter[int](), set()
    digits, operations = Counter[int](), Counter[int]()
    for split in ("train", "test"):
        for tokens, label in expressions(task, split, 100):
            tree = parsed(tokens)
            assert 500 < len(tokens) < 2000
            assert value_of(tree) == label
            labels[label] += 1
            seen.add(tuple(tokens))
            for node, depth in nodes(tree):
                depths[depth] += 1
                if isinstance(node, int):
                    digits[node] += 1
                else:
                    operations[node[0]] += 1
                    counts[len(node[1])] += 1
    assert len(seen) == 200, "all are different, also of two splits"
    assert set(counts) == set(range(2, 11)) and max(depths) == 10
    assert set(digits) == set(labels) == set(range(10)) and set(operations) == set(OPERATIONS)
    assert max(digits.values()) < 1.1 * min(digits.values())
    assert max(operations.values()) < 1.1 * min(operations.values())


def drawn(random: Random, depth: int = 1) -> Tree:
    """An expression of any length, by the rules, one argument after another."""
    if depth == 10 or random.random() > 0.25:
        return random.randrange(10)
    return random.choice([*OPERATIONS]), [drawn(random, depth + 1) for _ in range(random.randint(2, 10))]


def length_of(tree: Tree) -> int:
    return 1 if isinstance(tree, int) else 2 + sum(map(length_of, tree[1]))


def test_expressions_are_as_frequent_as_where_the_rules_are_followed_one_by_one() -> None:
    """Their lengths, depths, numbers of operations and values: the largest difference of the shares of 600 examples."""
    count, random = 600, Random(0)
    expected: list[Tree] = []
    while len(expected) < count:
        tree = drawn(random)
        expected += [tree] if 500 < length_of(tree) < 2000 else []
    found = [parsed(tokens) for tokens, _ in expressions(listops(2000), "train", count)]

    def figures(tree: Tree) -> list[float]:
        by_depth = Counter(depth for one, depth in nodes(tree) if not isinstance(one, int))
        outermost = 0 if isinstance(tree, int) else len(tree[1])
        return [length_of(tree), by_depth.total(), outermost, value_of(tree), *(by_depth[n] for n in range(2, 10))]

    for ours, theirs in zip(*(np.array([*map(figures, trees)]).T for trees in (found, expected)), strict=True):
        every = np.union1d(ours, theirs)
        shares = [np.searchsorted(np.sort(each), every, "right") / count for each in (ours, theirs)]
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * (2 / count) ** 0.5  # 1 of 1,000 draws is beyond


@pytest.mark.parametrize("seq_len", [16, 48, 1999])
def test_shorter_expressions_are_named_otherwise(seq_len: int) -> None:
    task = listops(seq_len)
    assert task.title == "ListOps-style expressions"
    for tokens, label in expressions(task, "train", 20):
        assert seq_len // 4 < len(tokens) < seq_len and value_of(parsed(tokens)) == label
    with pytest.raises(InputError, match=r"data\.seq_len = 15: at least 16"):
        listops(15)


def test_listops_configs_have_the_splits_of_the_long_range_arena() -> None:
    for name in ("listops", "listops-feedforward-kernel"):
        config = load(name)
        task = ListOps(config.task, config.data)
        assert [len(task.sequences(split, None)) for split in task.splits] == [96_000, 2_000, 2_000]
        assert config.data.seq_len == 2000 and 0.1 < task.baseline_metrics["accuracy"] < 0.25


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(np.random.RandomState(number)) for number in range(60)]


def test_the_label_says_whether_the_circles_are_on_one_path(scenes: list[Scene]) -> None:
    for scene in scenes:
        begin, end = (
            {number for number in (0, 1) if np.array_equal(scene.paths[number, place], circle)}
            for place, circle in zip((0, -1), scene.circles, strict=True)
        )
        assert len(begin) == 1, "paths begin apart; their ends may meet"
        assert begin & end if scene.is_connected else end - begin
    assert 15 < sum(scene.is_connected for scene in scenes) < 45


def test_a_picture_is_drawn_by_the_rules(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.pixels.shape == (32, 32) and (scene.pixels.min(), scene.pixels.max()) == (0, 255)
        assert scene.paths.shape == (2, DASHES, 2) and len(scene.distractors) <= 5
        assert all(path.shape == (DISTRACTOR_DASHES, 2) for path in scene.distractors)
        assert 6 <= np.linalg.norm(scene.paths[0, 0] - scene.paths[1, 0]) <= 8
        for path in (*scene.paths, *scene.distractors):
            assert path.min() >= 0 and path.max() <= 31 and path[1:].min() >= 2 and path[1:].max() <= 29
            # From the second dash's end on: two gaps of a pixel and a dash of two from end to end, less in a turn.
            steps = np.linalg.norm(np.diff(path[1:], axis=0), axis=1)
            assert steps.min() >= 1 and steps.max() <= 7
            for row, column in path:
                assert scene.pixels[row - 1 : row + 2, column - 1 : column + 2].max() > 40, "a dash ends here"
        for row, column in scene.circles:
            assert scene.pixels[row - 1 : row + 2, column - 1 : column + 2].mean() > 120, "a full circle"
    assert {len(scene.distractors) for scene in scenes} > {0, 1, 2}, "one that fails several times is left out"


def test_a_path_is_seen_in_its_picture(scenes: list[Scene]) -> None:
    """What is not drawn stays dark: beyond the room of all dashes and circles."""
    for scene in scenes:
        places = np.concatenate([*scene.paths, *scene.distractors, scene.circles])
        rows, columns = np.mgrid[:32, :32]
        near = np.hypot(rows[..., None] - places[:, 0], columns[..., None] - places[:, 1]).min(-1) < 4.5
        assert not scene.pixels[~near].any()
        assert 0.06 < (scene.pixels > 60).mean() < 0.3


def test_pathfinder_gives_pixels_and_names() -> None:
    config = load("pathfinder")
    task = Pathfinder(config.task, config.data)
    assert task.title == "Pathfinder, 32 x 32 (by its generator's rules)"
    assert [len(task.sequences(split, None)) for split in task.splits] == [160_000, 20_000, 20_000]
    tokens, labels, segments = task.sequences("valid", None).sequence(19_999)
    scene = draw_scene(np.random.RandomState([0, 1, 19_999]))
    described = task.describe()
    assert (described.classes, described.size, described.colors) == (["apart", "connected"], 32, 1)
    pixels = tokens.numpy()[:, 0] * described.deviation[0] + described.mean[0]
    np.testing.assert_allclose(pixels, scene.pixels.ravel() / 255, atol=1e-6)
    assert segments is None and labels[-1] == scene.is_connected
    model = ModelConfig()
    task.configure_model(model)
    assert (model.channels, model.head, model.outputs) == (1, "class", 2)
    with pytest.raises(InputError, match=r"data\.seq_len = 1000: at least 1024"):
        Pathfinder(TaskConfig(name="pathfinder"), DataConfig(seq_len=1000))


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """Twenty pictures of 3 x 3 pixels to train on and six of the test, of two classes; some files compressed."""
    folder, random = tmp_path / "set", np.random.default_rng(0)
    folder.mkdir()
    for split, count, end in (("train", 20, ""), ("t10k", 6, ".gz")):
        labels = np.arange(count) % 2
        pictures = random.integers(0, 156, (count, 3, 3)) + 100 * labels[:, None, None]
        write_idx(folder / f"{split}-images-idx3-ubyte{end}", pictures.astype(np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels.astype(np.uint8))
    return folder


def images(folder: Path, size: int = 3, channels: int = 0, seq_len: int = 9) -> Images:
    data = DataConfig(source=str(folder), seq_len=seq_len, batch_size=1, valid_fraction=0.1)
    return Images(TaskConfig(name="images", size=size, channels=channels), data)


def test_the_files_of_mnist_bring_their_test(idx: Path) -> None:
    task = images(idx)
    assert [len(task.sequences(split, None)) for split in task.splits] == [18, 2, 6]
    assert "26 pictures of 2 classes (0: 13, 1: 13); 3 x 3 pixels; 1 channel (grey)" in task.summary
    assert "the last 6 are the test of the set" in task.summary
    written = np.frombuffer(gzip.decompress((idx / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    known = np.frombuffer((idx / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16) / 255
    for number in range(6):
        tokens, labels, segments = task.sequences("test", None).sequence(number)
        expected = (written[9 * number :][:9] / 255 - known.mean()) / known.std()
        np.testing.assert_allclose(tokens.numpy()[:, 0], expected, atol=1e-5)
        assert labels[-1] == number % 2 and segments is None
    assert task.describe().mean == pytest.approx([known.mean()], rel=1e-5)
    colors = images(idx, channels=3)
    assert colors.channels == 3 and colors.fingerprint != task.fingerprint == images(idx).fingerprint


def damaged(idx: Path, name: str, change: Any) -> None:
    path = idx / name
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    changed = change(content)
    path.write_bytes(gzip.compress(changed) if path.suffix == ".gz" else changed)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1], "must have 20 x 3 x 3 bytes after its head"),
        ("train-images-idx3-ubyte", lambda content: b"", "is no IDX file of bytes with 3 dimensions"),
        ("t10k-labels-idx1-ubyte.gz", lambda content: b"\0\0\x0d\1" + content[4:], "of bytes with 1 dimension"),
        ("t10k-labels-idx1-ubyte.gz", lambda content: content[:-1] + b"\7", "has a class, 7, that training lacks"),
        (
            "train-labels-idx1-ubyte.gz",
            lambda content: content[:4] + b"\0\0\0\x13" + content[8:-1],
            "has 20 pictures, and 19 labels are beside it",
        ),
    ],
)
def test_damaged_files_are_named(idx: Path, name: str, change: Any, expected: str) -> None:
    damaged(idx, name, change)
    with pytest.raises(InputError) as error:
        images(idx)
    assert expected in str(error.value) and error.value.field == "data.source"


def test_what_is_missing_is_said(idx: Path) -> None:
    with pytest.raises(InputError, match=r"task\.size = 28: must be the size of .*3 x 3 pixels; set task\.size=3"):
        images(idx, size=28, seq_len=784)
    with pytest.raises(InputError, match=r"data\.seq_len = 8: at least 9"):
        images(idx, seq_len=8)
    cut = (idx / "t10k-images-idx3-ubyte.gz").read_bytes()
    (idx / "t10k-images-idx3-ubyte.gz").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(InputError, match="is no whole file of gzip"):
        images(idx)
    (idx / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"must have t10k-images-idx3-ubyte\(\.gz\) beside train-images-idx3-ubyte"):
        images(idx)


def test_fashion_mnist_says_which_package_has_it() -> None:
    config = load("fashion-mnist", ["data.source=/usr/share/datasets/no-such-set"])
    with pytest.raises(InputError) as error:
        Images(config.task, config.data)
    assert error.value.fix == "apt-get install dataset-no-such-set" and "\n" not in str(error.value)
    assert load("fashion-mnist").data.source == "/usr/share/datasets/fashion-mnist"
