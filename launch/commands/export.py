"""`longreach export`: write the newest model of a run as safetensors."""

from __future__ import annotations

import argparse

SUMMARY = "write a run's newest model as safetensors, to be loaded anywhere"
DESCRIPTION = """Write the newest model of a run as model.safetensors and config.json, which can be loaded without the
run, its data and DeepSpeed: names of classes and columns, standardization and tokenizer are exported too."""
EXAMPLES = """
  longreach export runs/quickstart exported
The other commands take it as they take a run (longreach predict exported --source new-photos). In Python:
from longreach import load_exported; model = load_exported("exported")"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach export``."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, such as runs/quickstart")
    out_help = "directory to create; an earlier export in it is replaced"
    parser.add_argument("out_dir", metavar="OUT_DIR", help=out_help)


def run(arguments: argparse.Namespace) -> int:
    """Export a model and print its size; returns the exit code."""
    from ...framework.inference.export import export

    model, step = export(arguments.run_dir, arguments.out_dir)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"step {step}, {num_parameters:,} parameters: exported to {arguments.out_dir}")
    return 0
