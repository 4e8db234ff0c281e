"""How far decoding token by token drifts from streaming: a whole model, over tens of thousands of tokens.

    python benchmarks/drift.py [--tokens 65536] [--mixers chela mamba2]

One model of each mixer in fp32 reads the same random tokens twice, in blocks of 1,024 and one by one, and once in fp64
in blocks. Printed, at powers of two: the largest difference of the logits from those of fp64 over the last 64 tokens,
streamed and decoded, as a share of the largest logit, and their ratio. Written to ``results/drift.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from longreach.framework.model import Model, ModelConfig, build_model
from longreach.parallel.span import Span

MIXERS = ("elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet")
BLOCK, LAST = 1024, 64
VOCAB, WIDTH, DEPTH = 64, 32, 2


def small_model(mixer: str) -> Model:
    config = ModelConfig(vocab=VOCAB, width=WIDTH, depth=DEPTH, mixers=[mixer])
    config.mamba2.head_width = 16
    torch.manual_seed(0)
    return build_model(config).eval()


@torch.no_grad()
def logits(model: Model, tokens: Tensor, step: int, marks: list[int]) -> list[Tensor]:
    """The logits of the last `LAST` tokens before each of ``marks``, in fp64; ``step`` tokens at a time."""
    span, found, kept = Span(keep_carry=True), [], torch.empty(0, VOCAB, dtype=torch.float64)
    for start in range(0, marks[-1], step):
        y = model(tokens[:, start : start + step], span)
        kept = torch.cat([kept, y[0].double()])[-LAST:]
        span = span.next_block(step)
        if start + step in marks:
            found.append(kept)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536, help="a power of two from 1,024 on (default 65,536)")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS, help="which (default all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "drift.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    marks = [1 << bit for bit in range(10, arguments.tokens.bit_length())]
    rows = []
    print("| mixer | tokens | streamed | decoded | ratio |\n|---|---|---|---|---|")
    for mixer in arguments.mixers:
        torch.manual_seed(1)
        tokens, model, started = torch.randint(0, VOCAB, (1, marks[-1])), small_model(mixer), time.perf_counter()
        streamed, decoded = (logits(model, tokens, step, marks) for step in (BLOCK, 1))
        exact = logits(model.double(), tokens, BLOCK, marks)
        for mark, *given in zip(marks, streamed, decoded, exact, strict=True):
            errors = [float((x - given[2]).abs().max() / given[2].abs().max()) for x in given[:2]]
            rows.append({"mixer": mixer, "tokens": mark, "streamed": errors[0], "decoded": errors[1]})
            print(
                f"| {mixer} | {mark:,} | {errors[0]:.1e} | {errors[1]:.1e} | {errors[1] / errors[0]:.2f} |", flush=True
            )
        print(f"{mixer}: {time.perf_counter() - started:.0f} s", flush=True)
    report = {"torch": torch.__version__, "processor": platform.processor() or platform.machine(), "rows": rows}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
