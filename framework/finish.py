"""What a user sees when a run ends: the result beside what simple compressors need, a sample, where to look."""

from __future__ import annotations

import logging

from rich.console import Console

from .config import RunConfig
from .data import BASELINES, Index, packed_dir
from .generate import decode_stream, encode, generate, load_run
from .monitor import BITS
from .trainer import Result

log = logging.getLogger("longreach.finish")
PROMPT = "def "


def report(config: RunConfig, result: Result) -> None:
    """Print the end of a run; on the first rank only."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if result.held_out is not None:
        index = Index.load(packed_dir(config.data), verify=False)
        console.print(f"held-out bits per byte, {index.name}:")
        known = [(name, index.baselines[key]) for key, name in BASELINES.items() if key in index.baselines]
        for name, bits in [*known, ("this model", result.held_out * BITS)]:
            console.print(f"  {name:<18} {bits:6.3f}")
    if config.monitor.sample_len and config.model.causal:
        console.print(f"a sample, after {PROMPT!r}:")
        console.print(sample(config, result))
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
