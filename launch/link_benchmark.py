"""Measures latency and bandwidth between two ranks on two nodes: the setting parallel.far. `longreach doctor` measures
parallel.near, that of two ranks on one node.

Run the same line on both nodes; HOST is one of them:
torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m longreach.launch.link_benchmark
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..parallel.cost import Link
from .exit_codes import INPUT_ERROR
from .process import exit_process

LOCAL_RANKS = 2  # that `longreach doctor` starts
_PROGRAM = "python -m longreach.launch.link_benchmark"


def join_and_measure() -> Link:
    """Join the world that a launcher started and measure the link between its ranks; a collective."""
    from ..parallel.link_benchmark import measure
    from ..parallel.mesh import init_mesh, join_world, leave_world, world_size

    join_world(timeout_seconds=60)
    link = measure(init_mesh(world_size()))
    leave_world()
    return link


def as_text(link: Link, key: str) -> str:
    """A link in words, and as the setting ``key`` of a config."""
    return (
        f"latency {link.latency * 1e6:,.0f} us, bandwidth {link.bandwidth / 1e9:.2f} GB/s: "
        f"{key}=[{link.latency:.2g},{link.bandwidth:.3g}]"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of every rank; the first prints what all measured. Returns the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(_PROGRAM, description=__doc__, formatter_class=formatter).parse_args(words)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        reason = "a link lies between two ranks: start this with torchrun on two or more"
        print(f"longreach: {reason}; see {_PROGRAM} --help", file=sys.stderr)
        return INPUT_ERROR
    link = join_and_measure()
    if os.environ.get("RANK") == "0":
        print(as_text(link, "parallel.far"))
    return 0


if __name__ == "__main__":
    exit_process(main())
