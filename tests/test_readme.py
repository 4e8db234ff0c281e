"""What README promises to be there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from longreach.launch.arguments import parse
from longreach.launch.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")


def test_the_five_files_to_read_exist() -> None:
    files = re.findall(r"^\d\. `([^`]+)`", README, re.MULTILINE)
    assert len(files) == 5
    for file in files:
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", re.findall(r"^longreach (.+)", README, re.MULTILINE))
def test_commands_are_understood(line: str) -> None:
    arguments = parse(build_parser(), shlex.split(line, comments=True))
    assert callable(arguments.command)


@pytest.mark.parametrize("page", re.findall(r"\]\(([^)#:]+)\)", README))
def test_pages_exist(page: str) -> None:
    assert (ROOT / page).is_file()
