"""Runs a function on N gloo ranks (`run_distributed`, with a time-out); compares tensors."""

from __future__ import annotations

from collections.abc import Iterable
from logging import LogRecord
from typing import TYPE_CHECKING

from longreach.parallel.local_ranks import run_on_ranks as run_distributed

if TYPE_CHECKING:  # a rank's process sets the number of threads before it imports torch
    from torch import Tensor

__all__ = ["assert_close", "run_distributed"]


def assert_close(
    name: str,
    actual: Tensor | None,
    expected: Tensor | None,
    *,
    max_abs: float | Tensor | None = None,
    rel_rms: float | None = None,
    rms_floor: float = 0.0,
) -> None:
    """Raise `AssertionError`, with the tensor's name, its errors and their limits, unless two tensors are close.

    Args:
        name: of the tensor.
        actual, expected: of one shape, compared in fp64 (complex128). None is equal to None only. ``actual`` must be
            finite.
        max_abs: limit of the largest absolute error; None for no limit.
        rel_rms: limit of the RMS error as a share of the RMS of ``expected``; None for no limit.
        rms_floor: the RMS of ``expected`` counts as this where it is smaller.
    """
    import torch

    if actual is None or expected is None:
        assert actual is expected, f"{name}: {actual} instead of {expected}"
        return
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    if not expected.numel():
        return
    wide = torch.complex128 if actual.is_complex() or expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    number = int((~actual.isfinite()).sum())
    assert not number, f"{name}: {number} of {actual.numel()} elements are not finite"
    error = (actual - expected).abs()
    if isinstance(max_abs, torch.Tensor):
        max_abs = max_abs.item()
    size = max(expected.abs().square().mean().sqrt().item(), rms_floor)
    limits = (
        ("largest error", error.max().item(), max_abs),
        ("RMS error", error.square().mean().sqrt().item(), None if rel_rms is None else rel_rms * size),
    )
    lines = [f"{what} {value:.3e}, limit {limit:.3e}" for what, value, limit in limits if limit is not None]
    place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    told = f"{name}: {'; '.join(lines)} (largest at {place}; RMS of what is expected {size:.3e})"
    assert all(limit is None or value <= limit for _, value, limit in limits), told


def messages(records: Iterable[LogRecord]) -> list[str]:
    """The messages of `pytest.LogCaptureFixture.records`; a record that two handlers captured counts once."""
    return [record.getMessage() for record in {id(record): record for record in records}.values()]
