"""Shells complete what the parser knows, configs and runs; the examples of ``--help`` are of its language."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from longreach.launch import cli
from longreach.launch.arguments import parse
from longreach.launch.commands import completion


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``bash`` and ``zsh``, a run, and a config."""
    directory = tmp_path_factory.mktemp("completion")
    for shell in completion.SHELLS:
        (directory / shell).write_text(completion.script(cli.build_parser(), shell))
    for run in ("quick", "quiet"):
        (directory / "runs" / run).mkdir(parents=True)
        (directory / "runs" / run / "config.yaml").touch()
    (directory / "my.yaml").touch()
    return directory


def completed(scripts: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words of a command line."""
    line = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}"
    function = "$(complete -p longreach | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
    code = f'source ./bash; {line}; {function} longreach {shlex.join(words[-1:])}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], cwd=scripts, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    "words, expected",
    [
        (["e"], {"embed", "evaluate", "export"}),
        (["generate", "--te"], {"--temperature"}),
        (["train", "quick"], {"quickstart"}),
        (["train", "my"], {"my.yaml"}),
        (["evaluate", ""], {"runs/quick", "runs/quiet"}),
        (["export", "runs/quic"], {"runs/quick"}),
        (["bench", "m"], {"memory", "models"}),
    ],
    ids=lambda item: " ".join(sorted(item)) if isinstance(item, set) else " ".join(item),
)
def test_bash_completes(scripts: Path, words: list[str], expected: set[str]) -> None:
    assert completed(scripts, "longreach", *words) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_accepts_the_script(scripts: Path) -> None:
    subprocess.run(["zsh", "-n", "zsh"], cwd=scripts, check=True)


def test_the_zsh_script_names_the_configs(scripts: Path) -> None:
    text = (scripts / "zsh").read_text()
    (names,) = re.findall(r"^  compadd ([^-].+)$", text, re.MULTILINE)
    assert text.startswith("#compdef longreach")
    assert set(names.split()) == {file.stem for file in completion.CONFIGS.glob("*.yaml")}


def test_the_command_prints_the_script(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.rstrip() == (scripts / "bash").read_text().rstrip()


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_shows_examples_that_are_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    text, examples = capsys.readouterr().out, cli.COMMANDS[name].EXAMPLES
    assert ended.value.code == 0 and examples.rstrip() in text
    lines = re.findall(r"^  longreach (.+)", examples, re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        assert parse(cli.build_parser(), words).command and words[0] == name
