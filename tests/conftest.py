"""What every test starts with."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: the same number of threads everywhere, so that sums are rounded alike.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two workers share the cores
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Where the tests run in the background, a shell has them ignore Ctrl-C, and so would the programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REGISTRY = "longreach.framework.mixers.registry"


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test, or a library that it calls, sets in the environment is gone after it.

    DeepSpeed and accelerate write the variables of a launcher there, which others then take for theirs.
    """
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """The world that a test joined in this process, as `train` does for its engine, is left after it."""
    yield
    if "longreach.parallel.mesh" in sys.modules:
        sys.modules["longreach.parallel.mesh"].leave_world()


@pytest.fixture(autouse=True)
def registered_mixers() -> Iterator[None]:
    """What a test registers as a mixer is gone after it, with the files that were run for it."""
    before, loaded = set(_registered()), set(sys.modules)
    yield
    for name in set(_registered()) - before:
        registry = sys.modules[REGISTRY]
        del registry.MIXERS[name], registry.CONFIGS[name]
    for name in set(sys.modules) - loaded:
        if name.startswith("longreach_code_"):
            del sys.modules[name]


def _registered() -> dict[str, type]:
    return sys.modules[REGISTRY].CONFIGS if REGISTRY in sys.modules else {}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed corpus: 60 documents of 40 to 600 bytes, made of few words."""
    from longreach.framework.data import pack

    source, draw = tmp_path_factory.mktemp("source"), random.Random(0)
    words = ["span", "carry", "halo", "scan", "relay", "past", "future", "piece"]
    for number in range(60):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(8, 110)))
        (source / f"{number:02}.txt").write_text(text, encoding="ascii")
    packed = tmp_path_factory.mktemp("packed") / "words"
    pack(str(source), packed, name="words", valid_fraction=0.1)
    return packed
