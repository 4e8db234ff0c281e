"""What a user sees when a run ends: the result beside what simple compressors need, a sample, where to look."""

from __future__ import annotations

import logging

from rich.console import Console

from .config import RunConfig
from .data import Index, packed_dir
from .generate import decode_stream, encode, generate, load_run
from .monitor import BITS
from .trainer import Result

log = logging.getLogger("longreach.finish")
PROMPT = "def "


def report(config: RunConfig, result: Result) -> None:
    """Print the end of a run; on the first rank only."""
    console = Console(stderr=False, highlight=False, soft_wrap=True)
    if result.held_out is not None:
        index = Index.load(packed_dir(config.data), verify=False)
        console.print(f"held-out bits per byte, {index.name}:")
        for name, bits in [*_baselines(index), ("this model", result.held_out * BITS)]:
            console.print(f"  {name:<18} {bits:6.3f}")
    if config.monitor.sample_len and config.model.causal:
        console.print(f"a sample, after {PROMPT!r}:")
        console.print(sample(config, result), markup=False)
    console.print(f"run:          {result.run_dir}")
    if result.plot is not None:
        console.print(f"loss curve:   {result.plot}")
    if config.monitor.tensorboard:
        console.print(f"TensorBoard:  tensorboard --logdir {result.run_dir / 'tensorboard'}")


def sample(config: RunConfig, result: Result) -> str:
    """Text that the run's saved model writes after a short prompt."""
    _, model = load_run(result.run_dir)
    tokens = generate(model, encode(PROMPT), config.monitor.sample_len, temperature=0.8, top_k=40, seed=config.run.seed)
    return PROMPT + "".join(decode_stream(int(token) for token in tokens))


def _baselines(index: Index) -> list[tuple[str, float]]:
    names = {
        "order0_bits_per_byte": "order-0 entropy",
        "gzip_bits_per_byte": "gzip -9",
        "xz_bits_per_byte": "xz -9",
    }
    return [(label, index.baselines[key]) for key, label in names.items() if key in index.baselines]
