"""What the tests of faults share: a small corpus that the program packed, and a config that trains on it for ever."""

from __future__ import annotations

import pytest
from places import Place, make_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))
