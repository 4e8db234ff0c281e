"""The figures that TensorBoard shows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from .charts import PARTS
from .hosts import HostReport
from .probe import QUANTILES, Products, safe_range

MAX_ROWS = 6  # blocks of a model that a figure shows, evenly spaced
MAX_POINTS = 200  # along the steps: more steps are averaged to so many points


def by_position(bins: Sequence[tuple[int, float]], title: str) -> Figure:
    """Loss over the position in the sequence: (position, bits a token) of each bin."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*bins))
    axes.set(xlabel="position in the sequence", ylabel="bits per token", title=title)
    axes.grid(alpha=0.3)
    return figure


def time_parts(steps: Sequence[Mapping[str, Any]]) -> Figure:
    """The seconds of a step by part, stacked; from rows of ``metrics.jsonl``."""
    width = -(-len(steps) // MAX_POINTS)
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    last = []
    for first in range(0, len(steps), width):
        rows = steps[first : first + width]
        last.append(rows[-1]["step"])
        for part, means in parts.items():
            means.append(sum(row.get(f"{part}_seconds", 0.0) for row in rows) / len(rows))
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(last, *parts.values(), labels=[part.replace("_", " ") for part in parts])
    axes.set(xlabel="step", ylabel="seconds", title="a step on rank 0")
    axes.legend(fontsize=7, loc="upper right")
    return figure


def waits(report: HostReport, title: str) -> Figure:
    """The seconds of a step that each rank waits for others, a colour for each host; the slowest rank is named."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    for name, host in report.hosts.items():
        axes.bar(host.ranks, host.wait_seconds, width=0.9, label=name)
    slowest = f"slowest: rank {report.slowest_rank} on {report.slowest_host}"
    axes.set(xlabel="rank", ylabel="seconds waited in a step")
    axes.set_title(f"{title}\n{slowest}, {report.waited_for_slowest_seconds:.3g} s", fontsize=8)
    if len(report.hosts) <= MAX_ROWS:
        axes.legend(fontsize=7)
    return figure


def long_kernels(kernels: Mapping[str, Tensor], title: str) -> Figure:
    """The kernels of long convolutions by block, ``[channels, taps]``."""
    figure, rows = _rows(kernels, title)
    for axes, (block, taps) in rows:
        for kernel in taps:
            axes.plot(range(1, len(kernel) + 1), kernel, lw=0.8)
        axes.set(xscale="log", ylabel=block)
        axes.grid(alpha=0.3)
    rows[-1][0].set(xlabel="1 + tokens back")
    return figure


def products(found: Mapping[str, Products], title: str) -> Figure:
    """Quantiles of ``2 q k`` by block of element-wise attention, on the range (green) where its series is accurate to
    `TOLERANCE`.
    """
    figure, rows = _rows(found, title, height=0.9)
    for axes, (block, row) in rows:
        low, high = safe_range(row.order)
        axes.axvspan(low, high, color="tab:green", alpha=0.15)
        for first, last, width in ((0, 6, 1), (1, 5, 4), (2, 4, 9)):
            axes.plot(row.quantiles[first : last + 1 : last - first], [0, 0], lw=width, color="tab:blue", alpha=0.6)
        axes.plot(row.quantiles[3], 0, "k|")
        axes.set(yticks=[], ylabel=block, ylim=(-1, 1))
        axes.set_title(f"order {row.order}: {row.outside:.2%} outside [{low:.2f}, {high:.2f}]", fontsize=8)
    parts = [f"{QUANTILES[last] - QUANTILES[first]:.1%}" for first, last in ((0, 6), (1, 5), (2, 4))]
    rows[-1][0].set(xlabel=f"2 q k of {', '.join(parts)} of the pairs")
    return figure


def _rows(items: Mapping[str, Any], title: str, height: float = 1.6) -> tuple[Figure, list[tuple[Any, Any]]]:
    """A figure with a row for each block, or for some of them; and the rows' axes, with the blocks and their items."""
    step = max(1, -(-len(items) // MAX_ROWS))
    shown = list(items.items())[::step]
    figure = Figure(figsize=(4.5, 1.2 + height * len(shown)), layout="constrained")
    figure.suptitle(title)
    return figure, list(zip(figure.subplots(len(shown), squeeze=False, sharex=True)[:, 0], shown))
