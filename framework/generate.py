"""Recurrent decoding: the carry of what was read and written is all that a new token needs."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..parallel.span import Span
from . import carry, checkpoint
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


class Decoder:
    """A model and where it stands in a text: it reads, it writes, and what it stands at can be saved in between.

    Args:
        model: causal.
        seed: of the draws.
        mark: where to go on, as of `save`; None at the beginning.

    Attributes:
        span: where the text continues; None while nothing was read.
    """

    def __init__(self, model: Model, seed: int = 0, mark: carry.Bookmark | None = None) -> None:
        self.model, self.span = model, None if mark is None else mark.span
        self._logits = None if mark is None else mark.logits
        self._unread: Tensor | None = None  # the last token that was written; read when it matters
        self._generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
        if mark is not None:
            self._generator.set_state(mark.random)

    @classmethod
    def load(cls, model: Model, path: str | Path, seed: int | None = None) -> Decoder:
        """Go on where `save` was called, exactly as if nothing had been in between.

        Args:
            model: the one that wrote the file, or an export of it.
            path: of the file.
            seed: begins other draws; None goes on with those of the file.

        Raises:
            InputError: the file is missing, damaged, of another format, or the carry of another model.
        """
        decoder = cls(model, mark=carry.load(path, model))
        if seed is not None:
            decoder._generator.manual_seed(seed)
        return decoder

    def save(self, path: str | Path) -> None:
        """Write what is needed to go on from here: carry, position, draws.

        Raises:
            InputError: nothing was read yet, or the file cannot be written.
        """
        logits = self._next()
        assert self.span is not None
        carry.save(path, self.model, carry.Bookmark(self.span, logits, self._generator.get_state()))

    def fork(self) -> Decoder:
        """Another decoder that stands here; what one of them does, the other does not see."""
        twin = copy.copy(self)
        twin._generator = self._generator.clone_state()
        return twin

    def read(self, tokens: Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Read ``tokens [B, L]`` int64, L >= 1, after what was read and written so far; see `read_prompt`.

        Raises:
            InputError: the model is not causal, or there are no tokens, or not as many rows as before.
        """
        rows = self.rows
        if rows and rows != tokens.shape[0]:
            raise InputError("tokens", [*tokens.shape], f"{rows} rows, as before")
        if rows:
            self._next()
        self._advance(tokens, progress)

    @property
    def rows(self) -> int:
        """B, how many texts it reads and writes side by side; 0 while nothing was read."""
        return 0 if self._logits is None else self._logits.shape[0]

    @torch.no_grad()
    def write(
        self, num_tokens: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> Iterator[Tensor]:
        """Draw tokens one after another.

        Args:
            num_tokens: how many.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: draw among so many of the most likely tokens; 0 among all.
            top_p: draw among the fewest tokens that make up this probability, more than 0; 1 among all.

        Yields:
            ``[B]`` int64, the next token of each row.

        Raises:
            InputError: nothing was read yet.
        """
        for _ in range(num_tokens):
            token = _draw(self._next().float(), temperature, top_k, top_p, self._generator)
            self._unread = token
            yield token

    def _next(self) -> Tensor:
        """The logits ``[B, vocab]`` of the token that follows."""
        if self._unread is not None:
            self._advance(self._unread.unsqueeze(1))
            self._unread = None
        if self._logits is None:
            raise InputError("prompt", "", "at least one token")
        return self._logits

    def _advance(self, tokens: Tensor, progress: Callable[[int], None] | None = None) -> None:
        # A view of its own: a fork, or a reading that was interrupted, leaves nothing in this span.
        span = None if self.span is None else self.span.entered(self.span.carry)
        self._logits, self.span = read_prompt(self.model, tokens, span, progress)


def generate(
    model: Model,
    prompt: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Continue a prompt, one token at a time: `Decoder` without stops.

    Args:
        model: causal.
        prompt: ``[B, L]`` int64 tokens, L >= 1.
        num_tokens: how many tokens to draw.
        temperature, top_k, top_p: as of `Decoder.write`.
        seed: of the draws.
        progress: called with the number of tokens of the prompt just read.

    Yields:
        ``[B]`` int64, the next token of each row. The cost of a token does not depend on its position, unless a
        mixer's state grows (``softmax``).
    """
    decoder = Decoder(model, seed)
    decoder.read(prompt, progress)
    yield from decoder.write(num_tokens, temperature=temperature, top_k=top_k, top_p=top_p)


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p  # never the first
        probabilities = probabilities.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


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
