"""The table of docs/results.md is what the committed results say."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any

import pytest

from longreach.framework.config import load

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    """benchmarks/tasks.py."""
    spec = spec_from_file_location("benchmark_tasks", ROOT / "benchmarks" / "tasks.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tasks: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tasks.RESULTS.read_text(encoding="utf-8"))
    return found


def test_the_page_shows_the_committed_results(tasks: ModuleType, rows: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition("<!-- table -->\n")[2].partition("\n<!-- end -->")[0] == tasks.table(rows)


def test_each_mixer_of_the_papers_is_on_two_tasks_or_more(rows: dict[str, Any]) -> None:
    for mixer in ("elementwise", "chela", "feedforward_kernel"):
        assert len({row["config"] for row in rows.values() if row["mixer"].startswith(mixer)}) >= 2, mixer


def test_speakers_are_told_apart_as_well_as_in_the_paper(tasks: ModuleType, rows: dict[str, Any]) -> None:
    found = [result["accuracy"] for result in rows[f"japanese-vowels / {tasks.EA6}"]["results"]]
    assert len(found) == 5
    assert mean(found) >= tasks.PAPERS["japanese-vowels", tasks.EA6] - stdev(found)


def test_the_runs_are_of_configs_that_load(tasks: ModuleType) -> None:
    for config, (mixers, seeds, words) in tasks.RUNS.items():
        assert seeds >= 1
        for mixer in mixers:
            load(config, [*words, *tasks.MIXERS[mixer]])
