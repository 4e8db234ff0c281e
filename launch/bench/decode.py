"""`longreach bench decode`: tokens per second and bytes of state against the position at which a text is continued.

Models of two blocks with one mixer each. Those with a state read as many tokens as the position says; then the decoders
of all positions generate in turns, so that other load on the machine slows all of them alike. Softmax attention is
measured twice: as this package's mixer, whose carry is copied with every token, and with a cache of keys and values
that is allocated once, which is the least that it can cost. Both begin with random keys and values: the time of a step
does not depend on them, and a prefill of so many tokens would take days.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...framework.data.progress import progress
from ...framework.inference.carry_file import SavedCarry
from ...framework.inference.generate import PREFILL_BLOCK_LEN, Decoder
from ...framework.mixers.softmax import Softmax, rotate
from ...framework.model import Block, Model, ModelConfig
from ...kernels.scan import Carry
from ...parallel.span import Span
from . import Bound, check_out, environment, median, report_bounds, table_header, table_line, write_report

SHORTEST = 1024  # the first position; each next one is four times as far
LONGEST = 2**20
WIDTH, DEPTH = 128, 2  # of the models, as in the quickstart
STATES = ("elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet")
OWN, CACHED = "softmax, its carry", "softmax, cache allocated once"
METHODS = (*STATES, OWN, CACHED)
TURNS = 20  # in each, every position is measured once
TOKENS = 10  # in a turn, after one that is not counted
TURN_SECONDS = 1.0  # after which a turn ends before its last token
BATCHES = (1, 4, 16)  # sizes of the batches that elementwise continues
RATIO = (0.9, 1.1)  # tokens/s at the last position over those at the first
HEADER = table_header(["mixer", "position", "tokens/s", "ms a token", "bytes of state"])


@dataclass(frozen=True)
class Row:
    """Decoding at one position.

    Attributes:
        way: a name in `METHODS`.
        position: number of tokens before.
        seconds: of a token, the median.
        carry_bytes: size of the state, or of the cache, after those tokens.
        num_tokens: how many were time_tokens.
    """

    way: str
    position: int
    seconds: float
    carry_bytes: int
    num_tokens: int

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds


class CachedSoftmax(nn.Module):
    """`Softmax` that decodes with a cache of keys and values, which is allocated once and never copied.

    Attributes:
        mixer: the weights.
        keys, values: ``[1, H, capacity, K]``.
    """

    def __init__(self, mixer: Softmax, width: int, capacity: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.keys, self.values = (torch.randn(1, mixer.heads, capacity, width // mixer.heads) for _ in range(2))

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """One token ``[1, 1, D]`` -> ``[1, 1, D]``."""
        q, k, v = self.mixer.qkv(x).unflatten(-1, (3, self.mixer.heads, -1)).unbind(2)
        position = torch.tensor([span.position])
        q, k = (rotate(part, position, self.mixer.base) for part in (q, k))
        self.keys[:, :, span.position], self.values[:, :, span.position] = k[:, 0], v[:, 0]
        stop = span.position + 1
        y = F.scaled_dot_product_attention(q.transpose(1, 2), self.keys[:, :, :stop], self.values[:, :, :stop])
        return self.mixer.out(y.transpose(1, 2).flatten(-2))


def model_of(mixer: str) -> Model:
    """A model with the same mixer in all blocks and random weights from a fixed seed."""
    torch.manual_seed(0)
    return Model(ModelConfig(vocab=256, width=WIDTH, depth=DEPTH, mixers=[mixer])).eval()


def decoders_at(way: str, positions: Sequence[int], memory_bytes: float) -> tuple[dict[int, Decoder], dict[int, int]]:
    """A decoder at each position, and the bytes of its state or cache, by position.

    Positions where these would take more than ``memory_bytes`` are left out.
    """
    if way in STATES:
        decoders = _prefilled_decoders(model_of(way), way, positions)
        return decoders, {position: decoder.carry_bytes for position, decoder in decoders.items()}
    model = model_of("softmax")
    per_token = DEPTH * WIDTH * next(model.parameters()).element_size()
    # A step holds the carry before and after it, and once with room for queries.
    kept, needed = (2 * per_token, 7 * per_token) if way == OWN else (2 * per_token, 2 * per_token)
    some = [position for position in positions if position * needed <= memory_bytes]
    if way == CACHED and some:
        for block in model.blocks:
            assert isinstance(block, Block) and isinstance(block.mixer, Softmax)
            block.mixer = CachedSoftmax(block.mixer, WIDTH, some[-1] + TOKENS + 2)
    return {position: _decoder_with_random_carry(model, position) for position in some}, {
        position: position * kept for position in some
    }


def _prefilled_decoders(model: Model, name: str, positions: Sequence[int]) -> dict[int, Decoder]:
    """Decoders after a prefill with random tokens, by position."""
    decoder, found, draws = Decoder(model), {}, torch.Generator().manual_seed(0)
    with progress(f"reading for {name}", positions[-1], unit="tokens") as advance:
        for before, position in zip([0, *positions], positions):
            for length in torch.arange(position - before).split(PREFILL_BLOCK_LEN):
                decoder.prefill(torch.randint(0, 256, (1, len(length)), generator=draws), advance)
            found[position] = decoder.fork()
    return found


def _decoder_with_random_carry(model: Model, position: int) -> Decoder:
    """A decoder at ``position`` whose carry holds random numbers in the shapes of a real one."""
    one = Decoder(model)
    one.prefill(torch.zeros(1, 1, dtype=torch.int64))
    assert one.span is not None
    carry = {key: Carry(torch.randn(1, position, *past.state.shape[2:])) for key, past in one.span.carry.items()}
    span = Span(start=position, carry=carry, keep_carry=True)
    return Decoder(model, saved=SavedCarry(span, torch.zeros(1, 256), torch.Generator().get_state()))


def time_tokens(decoders: dict[int, Decoder]) -> dict[int, list[float]]:
    """Seconds of single tokens that each decoder generates; the decoders take turns and keep their positions."""
    seconds: dict[int, list[float]] = {key: [] for key in decoders}
    for turn in range(TURNS):
        for key in list(decoders)[:: 1 if turn % 2 else -1]:
            tokens = decoders[key].fork().generate(TOKENS + 2)
            next(tokens)  # sampled from logits that were computed already
            next(tokens)
            ends = time.perf_counter() + TURN_SECONDS
            for _ in range(TOKENS):
                began = time.perf_counter()
                next(tokens)
                now = time.perf_counter()
                seconds[key].append(now - began)
                if now > ends:
                    break
    return seconds


def batched_speeds(decoder: Decoder) -> dict[int, float]:
    """Tokens per second of a whole batch, for each size in `BATCHES`."""
    stacks = {size: Decoder.stack([decoder] * size) for size in BATCHES}
    seconds = time_tokens({size: stack for size, stack in stacks.items() if stack is not None})
    return {size: size / median(some) for size, some in seconds.items()}


def as_line(row: Row) -> str:
    """A row of the Markdown table."""
    cells = f"{row.position:,}", f"{row.tokens_per_second:,.1f}", f"{row.seconds * 1e3:,.2f}", f"{row.carry_bytes:,}"
    return table_line([row.way, *cells])


def ratio(rows: Sequence[Row], way: str) -> float:
    """Tokens per second at the last position over those at the first."""
    some = [row.tokens_per_second for row in rows if row.way == way]
    return some[-1] / some[0]


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Plot tokens per second, and bytes of state, against the position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for way in dict.fromkeys(row.way for row in rows):
        some = [row for row in rows if row.way == way]
        positions, style = [row.position for row in some], "o-" if way in STATES else "s--"
        panels[0].loglog(positions, [row.tokens_per_second for row in some], style, label=way)
        panels[1].loglog(positions, [row.carry_bytes for row in some], style, label=way)
    ticks = sorted({row.position for row in rows})
    for axes, label in zip(panels, ("tokens per second", "bytes of state"), strict=True):
        axes.set(xlabel="position", ylabel=label)
        axes.set_xticks(ticks, [f"{tick / 1024:g}k" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(True, which="major", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(out: Path, threads: int = 1, longest: int = LONGEST, memory_gib: float = 4.0) -> int:
    """Decode at every position; writes ``decode-cpu.json`` and ``.png`` into ``out``.

    Args:
        out: directory of the results.
        threads: number of CPU threads, 1 by default, as a token is little work; 0 takes all.
        longest: the last position is at most this.
        memory_gib: limit of the keys and values of softmax attention.

    Returns:
        The exit code: 1 where a bound does not hold.
    """
    check_out(out)
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    where = environment("cpu", threads)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    positions = [SHORTEST]
    while positions[-1] * 4 <= longest:
        positions.append(positions[-1] * 4)
    print(HEADER)
    rows: list[Row] = []
    batches: dict[int, float] = {}
    for way in METHODS:
        decoders, kept = decoders_at(way, positions, memory_gib * 2**30)
        for position, seconds in time_tokens(decoders).items():
            rows.append(Row(way, position, median(seconds), kept[position], len(seconds)))
            print(as_line(rows[-1]), flush=True)
        if way == STATES[0]:
            batches = batched_speeds(decoders[SHORTEST])
    print(table_header([f"{STATES[0]}, texts side by side", "tokens/s of all"]))
    for size, speed in batches.items():
        print(table_line([size, f"{speed:,.1f}"]))
    bounds = _bounds(rows)
    report = {
        "command": f"longreach bench decode --threads {threads} --longest {longest} --memory-gib {memory_gib:g}",
        "environment": where,
        "width": WIDTH,
        "depth": DEPTH,
        "rows": [{**asdict(row), "tokens_per_second": row.tokens_per_second} for row in rows],
        "left_out": {
            way: [p for p in positions if (way, p) not in {(r.way, r.position) for r in rows}] for way in METHODS
        },
        "texts_side_by_side": {str(size): speed for size, speed in batches.items()},
        "bounds": [bound.as_json() for bound in bounds],
    }
    path = out / "decode-cpu.json"
    write_report(report, path)
    plot(rows, path.with_suffix(".png"), where["device"])
    print(f"written: {path}, {path.with_suffix('.png')}")
    return report_bounds(bounds)


def _bounds(rows: Sequence[Row]) -> list[Bound]:
    first, last = rows[0].position, max(row.position for row in rows if row.way in STATES)
    bounds = []
    for way in STATES:
        what, found = f"{way}, tokens/s at position {last:,} over those at {first:,}", ratio(rows, way)
        bounds += [Bound(what, found, ">=", RATIO[0]), Bound(what, found, "<=", RATIO[1])]
        kept = [row.carry_bytes for row in rows if row.way == way]
        bounds.append(
            Bound(f"{way}, most bytes of state at any position over the least", max(kept) / min(kept), "<=", 1)
        )
    return bounds
