"""``python -m longreach``."""

from .launch.cli import program

program()
