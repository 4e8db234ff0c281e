"""What the tests on several hosts share: the hosts, and a small corpus with a config that trains on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from fault_helpers import JobDirectory, make_job_directory
from namespaces import Host, network, why_not


@pytest.fixture(scope="session")
def three_hosts() -> Iterator[Sequence[Host]]:
    if why := why_not():
        pytest.skip(why)
    with network() as hosts:
        yield hosts


@pytest.fixture
def hosts(three_hosts: Sequence[Host]) -> Iterator[Sequence[Host]]:
    """Two hosts."""
    yield from _repaired(three_hosts[:2])


@pytest.fixture
def all_hosts(three_hosts: Sequence[Host]) -> Iterator[Sequence[Host]]:
    """Three hosts."""
    yield from _repaired(three_hosts)


def _repaired(hosts: Sequence[Host]) -> Iterator[Sequence[Host]]:
    """The hosts; what a test leaves of its processes and faults is gone after it."""
    try:
        yield hosts
    finally:
        for host in hosts:
            host.repair()


@pytest.fixture(scope="session")
def job_dir(tmp_path_factory: pytest.TempPathFactory) -> JobDirectory:
    return make_job_directory(tmp_path_factory.mktemp("cluster"))
