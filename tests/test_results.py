"""The table of docs/results.md is what the committed results say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any

import pytest

from longreach.framework.config import load
from longreach.framework.model import build_model

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"


@pytest.fixture(scope="module")
def tasks() -> Iterator[ModuleType]:
    """benchmarks/tasks.py, as needle.py beside it imports it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield import_module("tasks")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def needle(tasks: ModuleType) -> ModuleType:
    return import_module("needle")


@pytest.fixture(scope="module")
def rows(tasks: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tasks.RESULTS.read_text(encoding="utf-8"))
    return found


def table_of(page: str, name: str) -> str:
    return page.partition(f"<!-- {name} -->\n")[2].partition("\n<!-- end -->")[0]


def test_the_page_shows_the_committed_results(tasks: ModuleType, needle: ModuleType, rows: dict[str, Any]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert table_of(page, "table") == tasks.table(rows)
    assert table_of(page, "language") == tasks.language_table(rows)
    found = json.loads(needle.RESULTS.read_text(encoding="utf-8"))
    assert table_of(page, "needle") == needle.table(found, needle.SINGLE)


def test_a_needle_is_found_where_it_was_learned(needle: ModuleType) -> None:
    """And in haystacks of four times that length, by one mixer at least."""
    found = {row["mixer"]: row["accuracy"] for row in json.loads(needle.RESULTS.read_text()).values()}
    assert len(found) >= 4 and max(accuracy["4096"] for accuracy in found.values()) > 0.9
    for mixer in ("chela", "elementwise, order 6"):
        assert found[mixer]["1024"] > 0.9 and "1048576" in found[mixer]


def test_each_mixer_of_the_papers_is_on_two_tasks_or_more(rows: dict[str, Any]) -> None:
    for mixer in ("elementwise", "chela", "feedforward_kernel"):
        assert len({row["config"] for row in rows.values() if row["mixer"].startswith(mixer)}) >= 2, mixer


def test_speakers_are_told_apart_as_well_as_in_the_paper(tasks: ModuleType, rows: dict[str, Any]) -> None:
    found = [result["accuracy"] for result in rows[f"japanese-vowels / {tasks.EA6}"]["results"]]
    assert len(found) == 5
    assert mean(found) >= tasks.PAPERS["japanese-vowels", tasks.EA6] - stdev(found)


def test_the_runs_are_of_configs_that_load(tasks: ModuleType) -> None:
    for name, (mixers, seeds, _) in tasks.RUNS.items():
        assert seeds >= 1
        for mixer in mixers:
            config, words = tasks.words_of(name, mixer)
            load(config, [*words, *tasks.MIXERS[mixer]])


def test_the_language_models_have_about_as_many_parameters(tasks: ModuleType, rows: dict[str, Any]) -> None:
    """Within 2% of each other; those of the committed rows, too, which were trained on as many tokens."""
    sizes = {}
    for mixer in tasks.FFN_RATIOS:
        config, words = tasks.words_of(tasks.LANGUAGE, mixer)
        model = build_model(load(config, [*words, *tasks.MIXERS[mixer], "model.vocab=256"]).model)
        sizes[mixer] = sum(p.numel() for p in model.parameters())
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes
    found = [row for row in rows.values() if row["config"] == "quickstart"]
    assert len(found) == len(sizes) and len({row["steps"] for row in found}) == 1
    assert all(row["num_parameters"] == sizes[row["mixer"]] for row in found)
