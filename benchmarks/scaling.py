"""What the cost model predicts for one training step of a large model on many GPUs. Nothing here was measured.

    python benchmarks/scaling.py

Prints Markdown tables for docs/scaling.md: the step's time by work, states and ZeRO, for 8 to 4,096 GPUs that share one
sequence of 128k to 16M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from longreach.parallel import cost
from longreach.parallel.relay import SLICES

NODE_SIZE = 8
RANKS = [8, 64, 512, 4096]
TOKENS = [2**17, 2**20, 2**24]


@dataclass(frozen=True)
class Shape:
    """A model of `elementwise` and modal `chela` blocks in turn, as in configs/lm-1b-1m.yaml.

    Attributes:
        width, depth, heads, order, modes: as in the config.
        parameters: of the whole model.
        flops: of a GPU, a second, in matrix products.
        share: of these that a step reaches.
    """

    width: int = 2048
    depth: int = 24
    heads: int = 16
    order: int = 6
    modes: int = 8
    parameters: float = 1.3e9
    flops: float = 989e12
    share: float = 0.4

    @property
    def states(self) -> list[int]:
        """Bytes (fp32) of each state of a pair of blocks, for one sequence."""
        key, value = self.width // 2 // self.heads, 2 * self.width // self.heads
        elementwise = 4 * 2 * (self.order + 1) * self.width
        return [elementwise, 4 * self.heads * key * value, 8 * self.width * self.modes]

    def work(self, tokens: float) -> float:
        """Seconds of one rank's ``tokens``: 6 operations a token and parameter."""
        return 6 * self.parameters * tokens / (self.flops * self.share)

    def travel(self, ranks: int) -> tuple[float, str]:
        """Seconds in which all states go there and back, none beside work; and the ways they take."""
        near, far = cost.links("cuda")
        node_size = NODE_SIZE if ranks > NODE_SIZE else None
        total, ways = 0.0, set()
        for num_bytes in self.states:
            way = cost.fastest(num_bytes, ranks, SLICES, near, far, node_size)
            link = near if node_size is None else far
            seconds = {
                "gather": cost.gather_seconds(num_bytes, ranks, link),
                "pipeline": cost.pipeline_seconds(num_bytes, ranks, SLICES, link),
                "doubling": cost.doubling_seconds(num_bytes, ranks, link),
                "two_level": cost.two_level_seconds(num_bytes, ranks, node_size or 1, near, far),
            }[way]
            ways.add(way)
            total += 2 * seconds * self.depth / 2
        return total, " and ".join(sorted(ways))

    def zero(self, ranks: int) -> float:
        """Seconds in which ZeRO-2 reduces gradients and gathers weights, 16 bits each, none beside work."""
        near, far = cost.links("cuda")
        link = near if ranks <= NODE_SIZE else far
        return cost.seconds("all_reduce", 2 * self.parameters, ranks, link)


def main() -> None:
    shape = Shape()
    near, far = cost.links("cuda")
    print(f"{shape}")
    print(f"links: {near} within nodes of {NODE_SIZE}, {far} between them")
    print("| tokens of the sequence | GPUs | tokens of each | work | states travel | by | ZeRO | share of work |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in TOKENS:
        for ranks in RANKS:
            work, (travel, ways), zero = shape.work(tokens / ranks), shape.travel(ranks), shape.zero(ranks)
            print(
                f"| {tokens:,} | {ranks:,} | {tokens // ranks:,} | {work * 1e3:,.1f} ms | {travel * 1e3:,.1f} ms "
                f"| {ways} | {zero * 1e3:,.1f} ms | {work / (work + travel + zero):.0%} |"
            )


if __name__ == "__main__":
    main()
