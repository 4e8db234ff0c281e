"""`longreach bench`: measure kernels, memory, parallelism or decoding on this machine; see `launch.bench`."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import InputError

SUMMARY = "check and measure on this machine: kernels, memory, parallel, network, decode, models or static"
DESCRIPTION = """Measure on this machine: a table, JSON and a plot, with machine, commit and date. NAME is one of

  kernels   (the default) checks the operators, then times them beside copies, matrix products and softmax attention
  memory    peak memory of a training step against the sequence's length: softmax, whole, and streamed in blocks
  parallel  ranks on gloo: training speed of two against one, and the bytes and time that a layer exchanges, beside
            DeepSpeed's Ulysses and ring attention
  network   as root: training speed, bytes and waiting of two hosts over 1 Gbit/s and 100 Mbit/s, beside Ulysses and
            ring attention
  decode    tokens per second and bytes of state against the position, beside softmax attention with its cache
  models    models of transformers, alone and adapted: speed of their layers, and memory of a step over a long sequence
  static    what can be known of the GPU kernels without a GPU: launches, bytes, registers, occupancy, instructions"""
EXAMPLES = """
  longreach bench kernels --longest 65536
  longreach bench memory --memory-gib 4 --seconds 60
  longreach bench parallel
  longreach bench network --longest 32768"""

BENCHES: dict[str, dict[str, Any]] = {  # modules of `launch.bench`: the options of each, and their least values
    "kernels": {"threads": 0, "longest": 16_384},
    "memory": {"threads": 0, "longest": 1, "seconds": 1, "memory_gib": 0},
    "parallel": {},
    "network": {"longest": 1},
    "decode": {"threads": 0, "longest": 4096, "memory_gib": 0},
    "models": {"threads": 0, "longest": 1, "memory_gib": 0},
    "static": {"target": ""},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach bench``."""
    names = ", ".join(BENCHES)
    parser.add_argument("name", metavar="NAME", nargs="?", default="kernels", choices=list(BENCHES), help=names)
    out_help = "directory of the results (default: benchmarks/results in the current directory)"
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help=out_help)
    threads_help = "number of CPU threads; 0: all (default: all; decode: 1; not for parallel, network and static)"
    parser.add_argument("--threads", type=int, help=threads_help)
    longest_help = "longest sequence to measure, in tokens (default 2^20; models: 2^18; network: 2^17; not for "
    longest_help += "parallel and static)"
    parser.add_argument("--longest", type=int, help=longest_help)
    seconds_help = "memory: the most seconds that a step may take, unless it is streamed (default 300)"
    parser.add_argument("--seconds", type=float, help=seconds_help)
    memory_help = (
        "memory: the most resident memory of such a step (default 12); decode: the most memory of the keys and "
    )
    memory_help += "values of softmax attention (default 4); models: the most of transformers alone (default 12)"
    parser.add_argument("--memory-gib", type=float, help=memory_help)
    target_help = "static: what to compile for (default sm_90)"
    parser.add_argument("--target", choices=["sm_80", "sm_90"], help=target_help)


def run(arguments: argparse.Namespace) -> int:
    """Run a benchmark; returns the exit code: 1 where a bound does not hold."""
    options: dict[str, Any] = {}
    for name in sorted(set().union(*BENCHES.values())):
        value, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if name not in BENCHES[arguments.name]:
            raise InputError(option, value, f"an option that `bench {arguments.name}` does not have", "leave it out")
        low = BENCHES[arguments.name][name]
        if not value >= low:  # NaN is refused too
            raise InputError(option, value, f"at least {low}")
        options[name] = value
    bench = import_module(f"..bench.{arguments.name}", __package__)
    exit_code: int = bench.run(arguments.out, **options)
    return exit_code
