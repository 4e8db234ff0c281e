"""`longreach completion`: print what a shell needs to complete commands, options, configs and runs."""

from __future__ import annotations

import argparse

from .train import CONFIGS

SUMMARY = "print what a shell needs to complete these commands"
DESCRIPTION = """Print what bash or zsh needs to complete commands, options, configs and runs."""
EXAMPLES = """
  longreach completion bash > ~/.local/share/bash-completion/completions/longreach
  longreach completion zsh > ~/.zfunc/_longreach    # a directory of $fpath"""

SHELLS = ("bash", "zsh")
FUNCTIONS = {"config": "_longreach_configs", "run_dir": "_longreach_runs"}  # by argument: what completes it
FILES = ("source", "deepspeed_config", "carry_in", "carry_out", "out_dir", "out")  # arguments that are paths
DIRECTORIES = ("directory",)
PREAMBLE = {
    "bash": """\
_longreach_configs() {
  compgen -W "CONFIGS" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -d -S / -- "$1"
}
_longreach_runs() {
  local config found=
  for config in "$1"*/config.yaml "$1"*/*/config.yaml; do
    [ -f "$config" ] && found=yes && echo "${config%/config.yaml}"
  done
  [ -n "$found" ] || compgen -d -- "$1"
}""",
    "zsh": """\
_longreach_configs() {
  compadd CONFIGS
  _files -g '*.yaml'
}
_longreach_runs() {
  local -a runs
  runs=(${PREFIX}*/config.yaml(N:h) ${PREFIX}*/*/config.yaml(N:h))
  compadd -a runs || _files -/
}""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach completion``."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash or zsh")


def run(arguments: argparse.Namespace) -> int:
    """Print the completion script of a shell; returns the exit code."""
    print(script(arguments.whole_parser, arguments.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a parser's commands.

    Args:
        parser: of the whole command line.
        shell: one of `SHELLS`.
    """
    import shtab

    for command in _subparsers(parser):
        for argument in command._actions:
            if argument.dest in FUNCTIONS:
                argument.complete = dict.fromkeys(SHELLS, FUNCTIONS[argument.dest])  # type: ignore[attr-defined]
            elif argument.dest in FILES:
                argument.complete = shtab.FILE  # type: ignore[attr-defined]
            elif argument.dest in DIRECTORIES:
                argument.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    names = " ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    return shtab.complete(parser, shell, preamble=PREAMBLE[shell].replace("CONFIGS", names))


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    return [
        command
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for command in action.choices.values()
    ]
