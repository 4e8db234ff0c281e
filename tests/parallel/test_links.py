"""Links between ranks: what a measurement makes of times, and what a relay makes of links."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers import run_distributed

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.parallel import cost
from longreach.parallel.link_benchmark import measure
from longreach.parallel.mesh import Axis, Mesh
from longreach.parallel.relay import SLICES, _fastest


def test_two_sizes_tell_a_link() -> None:
    link = cost.Link(2e-4, 3e9)
    found = cost.fit_link((1000, link.seconds(1000)), (2**24, link.seconds(2**24)))
    assert found.latency == pytest.approx(link.latency) and found.bandwidth == pytest.approx(link.bandwidth)
    odd = cost.fit_link((1000, 1e-4), (2**24, 1e-4))  # noise: the larger one was as fast
    assert 0 <= odd.latency <= 1e-4 and odd.bandwidth > 1e12


def measured(axis: Axis) -> cost.Link:
    return measure(Mesh(sequence=axis))


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_link_is_measured_between_ranks(ranks: int) -> None:
    """All ranks find the same, and it is a link."""
    links = run_distributed(measured, ranks)
    assert len(set(links)) == 1
    assert 0 <= links[0].latency < 10 and 0 < links[0].bandwidth < math.inf


def test_one_rank_has_no_link() -> None:
    with pytest.raises(ValueError, match="at least two"):
        measure(Mesh())


def test_links_choose_the_relay() -> None:
    """Where a message costs nothing but its bytes, states go in slices; where it costs its latency, in few steps."""
    axis = Axis(size=64, ranks=tuple(range(64)), relay="auto")
    latent, narrow = cost.Link(1.0, 1e12), cost.Link(0.0, 1e6)
    assert _fastest(replace(axis, near=latent, far=latent), 10**6, True) == "recursive_doubling"
    assert _fastest(replace(axis, near=narrow, far=narrow), 10**6, True) in ("pipeline", "recursive_doubling")
    assert cost.num_slices(1e6, 64, SLICES, narrow) == SLICES and cost.num_slices(1e6, 64, SLICES, latent) == 1
    # Between two ranks, a message; but what leaves the last one has to be told to both.
    two = replace(axis, size=2, ranks=(0, 1), near=latent, far=latent)
    assert _fastest(two, 10**4, False) == "pipeline" and _fastest(two, 10**4, True) == "gather"


def test_a_large_transition_is_not_sent() -> None:
    """A matrix for each head is as large as the state: a pipeline, in which no A travels, is then the fastest."""
    narrow = cost.Link(0.0, 1e6)
    for ranks in (2, 4, 64):
        axis = Axis(size=ranks, ranks=tuple(range(ranks)), relay="auto", near=narrow, far=narrow)
        found = {a: _fastest(axis, 10**6, True, a) for a in (0, 4 * 10**6)}
        assert found[4 * 10**6] == "pipeline" and (ranks > 2 or found[0] == "gather")
    assert cost.fastest(1e6, 4, SLICES, narrow, narrow, 2, transition_bytes=1e9) == "pipeline"


@pytest.mark.parametrize("value", ["[1e-5]", "[1e-5,0]", "[-1,1e9]", "[.inf,1e9]"])
def test_a_link_is_two_numbers(value: str) -> None:
    with pytest.raises(InputError, match=r"parallel.near.*latency in seconds and a bandwidth"):
        load("quickstart", [f"parallel.near={value}"])


def test_links_are_settings() -> None:
    assert load("quickstart", ["parallel.far=[1e-5,1e10]"]).parallel.far == [1e-5, 1e10]
