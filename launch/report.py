"""What is printed when a run ends: its score beside baselines, a sample of text, and where its files are."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..framework.config import RunConfig
from ..framework.data import BASELINES, Index, TokenStream, Vocabulary, corpora, load_vocabulary, packed_dir
from ..framework.data.corpus import CPYTHON
from ..framework.inference.generate import decode_stream, encode, generate
from ..framework.inference.loading import load_run
from ..framework.monitoring.monitor import BITS, add_sample
from ..framework.runtime.process import set_decoding_threads
from ..framework.trainer import Result

PROMPT_LEN = 8  # tokens of the sample's prompt


def report(config: RunConfig, result: Result) -> None:
    """Print the end of a run; on the first rank only."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if result.test is not None:
        console.print(f"test, {result.test.num_labels:,} answers:")
        for name, value in result.test.metrics.items():
            console.print(f"  {name:<18} {value:6.4f}   (baseline: {result.baseline_metrics[name]:.4f})")
    elif result.held_out is not None:
        for source, loss in (result.held_out_by_source or {"": result.held_out}).items():
            index = Index.load(packed_dir(corpora(config.data)[source]), verify=False)
            bits = index.bits_per_byte(loss)
            unit, bits = ("token", loss * BITS) if bits is None else ("byte", bits)
            console.print(f"held-out bits per {unit}, {source or index.name}:")
            known = [(name, index.baselines[key]) for key, name in BASELINES.items() if key in index.baselines]
            for name, bits_per_unit in [*known, ("this model", bits)]:
                console.print(f"  {name:<18} {bits_per_unit:6.3f}")
        if result.held_out_by_source:
            nats = result.held_out
            console.print(f"held-out, mean by weight: {nats:.4f} nats, {nats * BITS:.4f} bits/token")
    if config.monitor.sample_len and config.model.causal and config.task.name == "language":
        prompt, text = sample(config, result)
        console.print(f"a sample, after {prompt!r}:")
        console.print(text)
        if config.monitor.tensorboard:
            try:
                add_sample(result.run_dir, result.step, prompt, text)
            except OSError as error:
                console.print(f"warning: the sample is not in TensorBoard ({error.strerror or error})")
    console.print(f"run:          {result.run_dir}")
    if result.plot is not None:
        console.print(f"loss curve:   {result.plot}")
    if config.monitor.tensorboard:
        console.print(f"TensorBoard:  tensorboard --logdir {result.run_dir / 'tensorboard'}")


def _prompt(config: RunConfig, vocabulary: Vocabulary | None) -> Tensor:
    """``[1, n]``: for Python's library the word that begins a function; else the first `PROMPT_LEN` tokens held out, or
    of the training data.
    """
    source = next(iter(corpora(config.data).values()))
    if source.source == CPYTHON:
        return encode("def ", vocabulary)
    index = Index.load(packed_dir(source), verify=False)
    split = "valid" if index.splits["valid"].num_tokens else "train"
    stream = TokenStream(index, split)
    return torch.from_numpy(stream.read(0, min(PROMPT_LEN, stream.num_tokens)).astype(np.int64)).unsqueeze(0)


def sample(config: RunConfig, result: Result) -> tuple[str, str]:
    """A short prompt, and the prompt with what the run's saved model generates after it."""
    _, model = load_run(result.run_dir)
    vocabulary = load_vocabulary(result.run_dir)
    ids = _prompt(config, vocabulary)
    prompt = "".join(decode_stream(ids[0].tolist(), vocabulary, None))
    set_decoding_threads(0, model)
    tokens = generate(model, ids, config.monitor.sample_len, temperature=0.8, top_k=40, seed=config.run.seed)
    return prompt, prompt + "".join(decode_stream((int(token) for token in tokens), vocabulary, ids))
