"""A run in TensorBoard in a real browser: the questions and their charts, the table of runs, the figures."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed_world import run_world

from longreach.framework.config import load
from longreach.framework.monitoring.charts import layout
from longreach.framework.trainer import train

browser = pytest.importorskip("browser", reason="selenium is not installed: make dev")

CONFIG = """
model:
  width: 8
  depth: 2
  mixers: [elementwise, chela]
  chela: {heads: 2, modes: 2}
data: {source: CORPUS, seq_len: 64, batch_size: 1}
optim: {lr: 1.0e-2}
train: {steps: 6, threads: 1, validate_every: 2, validate_batches: 1}
monitor: {plot: false}
"""


def train_it(rank: int, config: str) -> None:
    train(load(config))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> str:
    if browser.CHROMIUM is None or browser.DRIVER is None:
        if os.environ.get("LONGREACH_BROWSER") == "required":
            pytest.fail("no Chromium or no chromedriver: apt-get install chromium chromium-driver")
        pytest.skip("no Chromium or no chromedriver on this machine: apt-get install chromium chromium-driver")
    directory = tmp_path_factory.mktemp("browsed")
    path = directory / "small.yaml"
    text = f"{CONFIG.replace('CORPUS', str(corpus))}run: {{dir: {directory}/run}}\n"
    path.write_text(text, encoding="utf-8")
    run_world(train_it, 1, str(path))
    return str(path)


@pytest.fixture(scope="module")
def address(config: str) -> Iterator[str]:
    with browser.tensorboard(Path(load(config).run.dir) / "tensorboard") as found:
        yield found


@pytest.fixture(scope="module")
def page(config: str) -> Iterator[Any]:
    with browser.chromium() as found:
        yield found


def test_every_question_is_answered_by_curves(config: str, address: str, page: Any) -> None:
    wanted = layout(load(config), [socket.gethostname()])
    titles = [title for charts in wanted.values() for title in charts]
    browser.visit(page, address, "custom_scalars")

    def drawn() -> bool:
        found = browser.charts(page)
        return list(found) == titles and all(curves for _, curves in found.values())

    browser.until(drawn, "the charts are drawn")
    found, text = browser.charts(page), browser.shown(page)
    for question, charts in wanted.items():
        assert text.count(question) == 1
        for title, (_, tags) in charts.items():
            said, curves = found[title]
            assert f"Matches ({len(tags)})" in said and len(curves) >= len(tags)
            for tag in tags:
                assert tag.removesuffix("$") in said
    colours = {colour for colour in found["loss, nats per token"][1] if colour != "none"}
    assert len(colours) == 2, "the loss of held-out data has a colour of its own"


def test_the_table_of_runs_has_the_run(address: str, page: Any) -> None:
    """With what it was given and what came out, and without a second run for that."""
    browser.visit(page, address, "hparams")
    browser.until(lambda: "Number of matching session groups: 1 " in browser.shown(page), "the run is in the table")
    text = browser.shown(page)
    for name in ("seq_len", "precision", "zero1", "result/held_out", "result/tokens_per_second"):
        assert name in text, name


def test_the_figures_are_shown(address: str, page: Any) -> None:
    browser.visit(page, address, "images")
    browser.until(lambda: len(browser.figures(page)) == 4, "four figures have arrived")
    assert min(width for size in browser.figures(page) for width in size) > 100
    text = browser.shown(page)
    for tag in ("validation/by_position", "figures/long_kernels", "figures/products", "figures/where_the_time_goes"):
        assert tag in text, tag
