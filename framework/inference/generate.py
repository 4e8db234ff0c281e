"""Recurrent decoding: the carry of what was read and written is all that a new token needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.scan import Carry
from ...parallel.span import Span
from .. import checkpoint
from ..config import RunConfig, load
from ..data import Bytes
from ..data.vocabulary import MAX_HELD
from ..model import Model, build_model
from . import carry_file as carry

PROMPT_BLOCK = 8192  # prompt tokens read at a time, so that memory does not grow with the prompt


def load_run(place: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, Model]:
    """The newest trained model of a run, or an exported one, on the CPU, ready for inference.

    Args:
        place: directory of a run, or one that `export` wrote.
        overrides: of the run's config, as of `config.load`.

    Returns:
        The run's config (an export has none), and the model.

    Raises:
        InputError: there is neither, the run has saved nothing yet, or the export is damaged.
    """
    from .export import CONFIG, load_exported  # which imports this module

    if (Path(place) / CONFIG).is_file():
        if overrides:
            raise InputError("key=value", " ".join(overrides), "for a run: an export has no configuration of one")
        return None, load_exported(place)
    return load_step(place, overrides)[:2]


def load_step(run_dir: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Model, int]:
    """What `load_run` gives of a run, and the step after which the model was saved."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        allowed = "is no run and no export: it holds neither config.yaml nor config.json"
        fix = "train first (longreach train quickstart makes runs/quickstart), or go to where runs/ is"
        raise InputError("RUN_DIR", str(run_dir), allowed, fix)
    config = load(run_dir / "config.yaml", overrides)
    saved = checkpoint.newest(run_dir / "checkpoints")
    if saved is None:
        fix = f"longreach train {run_dir}/config.yaml run.dir={run_dir}"
        raise InputError("RUN_DIR", str(run_dir), "no checkpoint was saved there yet", fix)
    model = build_model(config.model)
    state = checkpoint.load_model(model, saved)
    return config, model.eval(), state["step"]


@torch.inference_mode()
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
    if model.config.head != "token":
        raise InputError("model.head", model.config.head, "token: only such a model can continue a text")
    if not model.config.causal:
        raise InputError("model.causal", False, "only a causal model can continue a text")
    if not prompt.shape[1]:
        raise InputError("prompt", "", "at least one token")
    span = span if span is not None else Span(keep_carry=True)
    for block in prompt.split(PROMPT_BLOCK, dim=1):
        features = model.features(block, span)[0]
        span = span.next_block(block.shape[1])
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
        self._generators = [torch.Generator(device=next(model.parameters()).device).manual_seed(seed)]
        if mark is not None:
            self._generators[0].set_state(mark.random)

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
            decoder._generators[0].manual_seed(seed)
        return decoder

    @classmethod
    def stack(cls, decoders: Sequence[Decoder]) -> Decoder | None:
        """One decoder that goes on with several texts side by side, each by its own draws, or None where that cannot
        be: the texts are not of one length, and a mixer keeps the tokens themselves (``softmax``), or positions count
        (``model.positions``).

        Args:
            decoders: of one model; each has read something. They are not changed.
        """
        marks = [(decoder._next(), decoder.span) for decoder in decoders]
        spans = [span for _, span in marks if span is not None]
        first = spans[0]
        placed = decoders[0].model.config.positions != "none"
        for span in spans[1:]:
            grows = any(span.carry[key].state.shape[1:] != left.state.shape[1:] for key, left in first.carry.items())
            if grows or (placed and span.position != first.position):
                return None
        carry = {key: Carry(torch.cat([span.carry[key].state for span in spans])) for key in first.carry}
        together = cls(decoders[0].model)
        # Whoever asks for positions has refused texts at several.
        together.span = first.with_carry(carry)
        together._logits = torch.cat([logits for logits, _ in marks])
        together._generators = [own.clone_state() for decoder in decoders for own in decoder._generators]
        return together

    def save(self, path: str | Path) -> None:
        """Write what is needed to go on from here: carry, position, draws.

        Raises:
            InputError: nothing was read yet, the file cannot be written, or these are several texts (`stack`).
        """
        logits = self._next()
        assert self.span is not None
        if len(self._generators) > 1:
            raise InputError("carry", str(path), "one text, not several side by side")
        carry.save(path, self.model, carry.Bookmark(self.span, logits, self._generators[0].get_state()))

    def fork(self) -> Decoder:
        """Another decoder that stands here; what one of them does, the other does not see."""
        twin = copy.copy(self)
        twin._generators = [own.clone_state() for own in self._generators]
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

    @property
    def carry_bytes(self) -> int:
        """Bytes of all that it keeps of what was read and written but the last token's logits."""
        return sum(part.nbytes for part in carry.pack({} if self.span is None else self.span.carry).values())

    @torch.inference_mode()
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
            InputError: nothing was read yet, or what follows is not finite.
        """
        for _ in range(num_tokens):
            logits = self._next().float()
            if not logits.isfinite().all():
                assert self.span is not None
                field = f"logits after {self.span.position:,} tokens"
                worst = float(logits.abs().max())
                raise InputError(field, worst, "must be finite", "the weights or the carry are damaged")
            token = _draw(logits, temperature, top_k, top_p, self._generators)
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
        span = None if self.span is None else self.span.with_carry(self.span.carry)
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


def continuations(decoders: Sequence[Decoder], num_tokens: int, **how: Any) -> Iterator[Iterator[int]]:
    """Continue several texts, each as if it were alone: side by side where `Decoder.stack` can, else in turn.

    Args:
        decoders: one text each. A single one stands behind its text afterwards.
        num_tokens, how: as of `Decoder.write`.

    Yields:
        The new tokens of each text, in order, to be taken before the next text is asked for: the first ones as they
        are written.
    """
    together = Decoder.stack(decoders) if len(decoders) > 1 else None
    for decoder in decoders if together is None else [together]:
        rows: list[list[int]] = [[] for _ in range(decoder.rows)]
        yield _first_row(decoder.write(num_tokens, **how), rows)
        yield from map(iter, rows[1:])


def _first_row(tokens: Iterable[Tensor], rows: list[list[int]]) -> Iterator[int]:
    """The first row's tokens as they come; all rows' are added to ``rows``."""
    for token in tokens:
        for row, one in zip(rows, token.tolist(), strict=True):
            row.append(one)
        yield rows[0][-1]


def _draw(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
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
    rows = zip(probabilities.chunk(len(generators)), generators, strict=True)
    return torch.cat([torch.multinomial(some, 1, generator=own) for some, own in rows]).squeeze(1)


def encode(text: str | bytes, vocabulary: Bytes | None = None) -> Tensor:
    """A text as tokens ``[1, L]`` int64, bytes unless a vocabulary is given; see `Bytes.prompt`."""
    data = text.encode() if isinstance(text, str) else text
    return torch.from_numpy((vocabulary or Bytes()).prompt(data).astype(np.int64)).unsqueeze(0)


def decode_stream(
    tokens: Iterable[int], vocabulary: Bytes | None = None, prompt: Tensor | None = None, *, goes_on: bool = False
) -> Iterator[str]:
    """Tokens as text, as soon as a character is whole; see `Bytes.decode`.

    Args:
        tokens: what was drawn.
        vocabulary: of the model; bytes unless one is given.
        prompt: ``[1, L]``, what lies just before them.
        goes_on: they continue a text, known or not.
    """
    unknown = None if goes_on else ()
    after = unknown if prompt is None else prompt[0, -MAX_HELD:].tolist()
    return (vocabulary or Bytes()).decode(tokens, after)
