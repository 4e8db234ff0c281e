"""What README promises to be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_five_files_to_read_exist() -> None:
    files = re.findall(r"^\d\. `([^`]+)`", README, re.MULTILINE)
    assert len(files) == 5
    for file in files:
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
