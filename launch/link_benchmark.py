"""What lies between ranks, measured: the setting parallel.far, of ranks on two nodes. `longreach doctor` tells
parallel.near, that of ranks on one.

The same line on both nodes, of which HOST is one:
torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m longreach.launch.link_benchmark
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..parallel.cost import Link
from .train import leave

LOCAL_RANKS = 2  # that doctor starts
_PROGRAM = "python -m longreach.launch.link_benchmark"


def join_and_measure() -> Link:
    """The link between the ranks of the joined world; a collective. For each rank."""
    from ..parallel.link_benchmark import measure
    from ..parallel.mesh import init_mesh, join_world, leave_world, world_size

    join_world(timeout_seconds=60)
    link = measure(init_mesh(world_size()))
    leave_world()
    return link


def as_text(link: Link, key: str) -> str:
    """A link in words, and as the setting that tells it to a run."""
    return (
        f"a message takes {link.latency * 1e6:,.0f} us and 1 s for each {link.bandwidth / 1e9:.2f} GB: "
        f"{key}=[{link.latency:.2g},{link.bandwidth:.3g}]"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of every rank; the first says what all found."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(_PROGRAM, description=__doc__, formatter_class=formatter).parse_args(words)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        why = "a link lies between two ranks: start this with torchrun on two or more"
        print(f"longreach: {why}; see {_PROGRAM} --help", file=sys.stderr)
        return 2
    link = join_and_measure()
    if os.environ.get("RANK") == "0":
        print(as_text(link, "parallel.far"))
    return 0


if __name__ == "__main__":
    leave(main())
