"""Recurrent decoding: the carry of what was read and written is all that a new token needs."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..parallel.span import Span
from . import checkpoint
from .config import RunConfig, load
from .model import Model, build_model

PROMPT_BLOCK = 8192  # prompt tokens read at a time, so that memory does not grow with the prompt


def load_run(run_dir: str | Path) -> tuple[RunConfig, Model]:
    """The config and the newest trained model of a run, on the CPU, ready for inference.

    Raises:
        InputError: there is no such run, or it has saved nothing yet.
    """
    return load_step(run_dir)[:2]


def load_step(run_dir: str | Path) -> tuple[RunConfig, Model, int]:
    """What `load_run` gives, and the step after which the model was saved."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        fix = "give the directory of a run, such as runs/quickstart"
        raise InputError("RUN_DIR", str(run_dir), "a run's directory, which holds config.yaml", fix)
    config = load(run_dir / "config.yaml")
    saved = checkpoint.newest(run_dir / "checkpoints")
    if saved is None:
        raise InputError("RUN_DIR", str(run_dir), "no checkpoint was saved there yet", "train it first")
    model = build_model(config.model)
    state = checkpoint.load_model(model, saved)
    return config, model.eval(), state["step"]


@torch.no_grad()
def read_prompt(
    model: Model, prompt: Tensor, span: Span | None = None, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, Span]:
    """Read a prompt, block by block: memory does not grow with its length.

    Args:
        model: causal.
        prompt: ``[B, L]`` int64 tokens, L >= 1.
        span: where the prompt continues; None at the beginning.
        progress: called with the number of tokens just read.

    Returns:
        Logits ``[B, vocab]`` of the token that follows, and the span at which it stands.

    Raises:
        InputError: the model is not causal, or the prompt empty.
    """
    if not model.config.causal:
        raise InputError("model.causal", False, "only a causal model can continue a text")
    if not prompt.shape[1]:
        raise InputError("prompt", "", "at least one token")
    span = span if span is not None else Span(keep_carry=True)
    for block in prompt.split(PROMPT_BLOCK, dim=1):
        features = model.features(block, span)[0]
        span = span.following(block.shape[1])
        if progress is not None:
            progress(block.numel())
    return model.head(features[:, -1]), span


@torch.no_grad()
def generate(
    model: Model,
    prompt: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Continue a prompt, one token at a time.

    Args:
        model: causal.
        prompt: ``[B, L]`` int64 tokens, L >= 1.
        num_tokens: how many tokens to draw.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among so many of the most likely tokens; 0 among all.
        seed: of the draws.
        progress: called with the number of tokens of the prompt just read.

    Yields:
        ``[B]`` int64, the next token of each row. The cost of a token does not depend on its position, unless a
        mixer's state grows (``softmax``).
    """
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    logits, span = read_prompt(model, prompt, progress=progress)
    for number in range(num_tokens):
        token = _draw(logits.float(), temperature, top_k, generator)
        yield token
        if number + 1 < num_tokens:
            logits, span = read_prompt(model, token.unsqueeze(1), span)


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


def encode(text: str | bytes) -> Tensor:
    """A text's bytes as tokens ``[1, L]``."""
    data = text.encode() if isinstance(text, str) else text
    return torch.tensor(list(data), dtype=torch.int64).unsqueeze(0)


def decode_stream(tokens: Iterable[int]) -> Iterator[str]:
    """Tokens that are bytes, as text, as soon as a character is whole; what is not UTF-8 shows as the replacement
    character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(bytes([token & 0xFF]))
    yield decoder.decode(b"", final=True)
