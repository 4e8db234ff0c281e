"""Modes that are fitted to taps: known ones are found again, errors are those of the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longreach.kernels.modal_conv import modal_kernel
from longreach.kernels.modal_conv.fit import fit_modes, squared_error

CHANNELS, MODES, LENGTH = 6, 3, 400


def drawn_modes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Modes that forget within 3 to 50 tokens, so that all of them is within `LENGTH` taps."""
    generator = torch.Generator().manual_seed(3)
    log_decay = -(3 + 47 * torch.rand(CHANNELS, MODES, generator=generator)).log()
    angle = torch.rand(CHANNELS, MODES, generator=generator) * math.pi
    re, im = torch.randn(2, CHANNELS, MODES, generator=generator)
    return log_decay.double(), angle.double(), re.double(), im.double()


@pytest.mark.parametrize("modes", [MODES, MODES + 2])
def test_a_sum_of_known_modes_is_found_again(modes: int) -> None:
    """Also with more modes than there are, which make least squares degenerate."""
    taps = modal_kernel(*drawn_modes(), length=LENGTH)
    found = fit_modes(taps, modes, steps=20)
    assert all(x.shape == (CHANNELS, modes) and x.dtype == torch.float64 for x in found)
    error = (modal_kernel(*found, length=LENGTH) - taps).norm(dim=1) / taps.norm(dim=1)
    assert error.max() < 1e-4


def test_the_error_is_that_of_all_taps_to_infinity() -> None:
    """Behind the last tap the kernel to be fitted is 0."""
    log_decay, angle, re, im = drawn_modes()
    taps = torch.randn(CHANNELS, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = modal_kernel(log_decay, angle, re, im, length=4000)
    whole[:, :20] -= taps
    torch.testing.assert_close(squared_error(taps, log_decay, angle, re, im), whole.square().sum(1))


@pytest.mark.parametrize("length", [2, 5, 33, 256])
def test_the_search_lowers_the_error_and_ends_in_stable_modes(length: int) -> None:
    taps = torch.randn(4, length, generator=torch.Generator().manual_seed(2))
    first, last = (fit_modes(taps, 4, steps=steps) for steps in (0, 60))
    before, after = (squared_error(taps, *found) for found in (first, last))
    assert bool((after <= before * (1 + 1e-6) + 1e-12).all())
    assert bool((after < taps.double().square().sum(1)).all())
    if length > 33:
        assert bool((after < 0.995 * before).any()), "the poles did not move"
    assert bool(((-last[0].exp()).exp() < 1).all())
    assert all(bool(x.isfinite().all()) for x in last)


def test_a_channel_of_zeros_and_one_tap_are_fitted() -> None:
    taps = torch.zeros(3, 50)
    taps[1, 0], taps[2, 7] = 2.0, 1.0
    found = fit_modes(taps, 4, steps=5)
    kernel = modal_kernel(*found, length=50)
    assert kernel[0].abs().max() < 1e-20
    torch.testing.assert_close(kernel[1].float(), taps[1], atol=1e-2, rtol=0.0)
    assert bool(kernel.isfinite().all())
