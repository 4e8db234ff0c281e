"""`longreach lr`: what a range test suggests, where it ends, and that it leaves the run itself alone."""

from __future__ import annotations

import json
import math
import re

import pytest
from deepspeed_world import run_world
from programs import Job, longreach

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.runtime.lr_range import _end, _result, check_range, range_test


def test_a_tenth_of_the_rate_with_the_lowest_loss_is_suggested() -> None:
    """On a curve that is known: flat, falling to its lowest at 1e-2, rising; with noise that no single step decides."""
    rates = [1e-6 * 10 ** (step / 10) for step in range(61)]
    losses = [3 + abs(math.log10(rate) + 2) for rate in rates]
    assert _result(rates, losses, "").suggested == pytest.approx(1e-3)
    losses[10] -= 3.5  # one lucky batch: the mean with its neighbours stays above the valley
    found = _result(rates, losses, "ended")
    assert [found.lowest, found.suggested] == pytest.approx([1e-2, 1e-3])
    assert (found.note, found.ended) == ("", "ended") and len(found.losses) == 61


def test_a_lowest_loss_at_an_end_of_the_range_is_said() -> None:
    rates = [10.0**step for step in range(12)]
    falling = [12.0 - step for step in range(12)]
    assert "raise --to" in _result(rates, falling, "").note
    assert _result(rates, falling, "the loss diverged").note == ""
    assert "lower --from" in _result(rates, falling[::-1], "").note


def test_the_test_ends_where_the_loss_diverges() -> None:
    assert _end(8.0, 2.0, 7, 0.1) == ""
    assert _end(8.1, 2.0, 7, 0.125) == "the loss diverged at step 7, at a learning rate of 0.12: 8.1"
    assert "nan" in _end(math.nan, math.inf, 1, 1.0) and "inf" in _end(math.inf, 2.0, 1, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1e-3, 1e-4, 100), "--from, --to = "),
        ((0.0, 1.0, 100), "--from, --to = "),
        ((1e-6, math.inf, 100), "--from, --to = "),
        ((1e-6, 1.0, 9), "--steps = 9"),
    ],
)
def test_what_is_no_range(values: tuple[float, float, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_range(*values)


def losses_of_one_rank(rank: int, config: str, directory: str) -> list[float]:
    words = ["parallel.ranks=1", f"data.source={directory}/packed", f"run.dir={directory}/runs/alone"]
    return range_test(load(config, words), 1e-5, 1e4, 30).losses


@pytest.mark.timeout(300)
def test_the_command_writes_a_run_of_its_own_with_the_losses_of_one_rank(job: Job) -> None:
    """Until the loss diverges, at a rate that is absurd."""
    before = sorted(path.name for path in (job.directory / "runs" / "tiny" / "checkpoints").iterdir())
    words = ["run.dir=runs/range", "--from", "1e-5", "--to", "1e4", "--steps", "30"]
    done = longreach("lr", "tiny.yaml", *words, cwd=job.directory)
    assert done.returncode == 0, done.stderr
    place = job.directory / "runs" / "range-lr"
    found = json.loads((place / "lr.json").read_text())
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(found["rates"]) + bool(found["ended"]) <= 30
    assert [row["lr"] for row in rows] == pytest.approx([1e-5 * 1e9 ** (step / 29) for step in range(len(rows))])
    assert found["suggested"] == pytest.approx(0.1 * found["lowest"])
    assert found["rates"][found["losses"].index(min(found["losses"]))] == found["lowest"]
    assert f"suggested: optim.lr={found['suggested']:.2g}\n" in done.stdout
    assert re.search(rf"{found['lowest']:.2e} +{min(found['losses']):.4f}  lowest\n", done.stdout)
    assert (place / "plots" / "lr.png").stat().st_size > 1000
    assert not (place / "checkpoints").exists() and not (job.directory / "runs" / "range").exists()
    (losses,) = run_world(losses_of_one_rank, 1, str(job.directory / "tiny.yaml"), str(job.directory))
    assert losses[:10] == pytest.approx(found["losses"][:10], rel=1e-4)
    assert sorted(path.name for path in (job.directory / "runs" / "tiny" / "checkpoints").iterdir()) == before
