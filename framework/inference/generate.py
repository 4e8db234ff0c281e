"""Generation: prefill reads the prompt block by block, decoding writes one token at a time from the carry.

The carry holds all that the model needs of earlier tokens, so a token costs the same at every position (unless a
mixer's state grows, as that of ``softmax``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _aliases
from ...errors import InputError
from ...kernels.scan import Carry
from ...parallel.mesh import to_device
from ...parallel.span import Span
from ..data import ByteVocabulary, Vocabulary
from ..data.vocabulary import MAX_PENDING
from ..model import SequenceModel
from ..model.directory import directory_of
from . import carry_file
from .carry_file import SavedCarry

PREFILL_BLOCK_LEN = 8192  # prompt tokens processed at a time: memory does not grow with the prompt


@torch.inference_mode()
def prefill(
    model: SequenceModel, prompt: Tensor, span: Span | None = None, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, Span]:
    """Read a prompt in blocks of `PREFILL_BLOCK_LEN` tokens: memory does not grow with its length.

    Args:
        model: causal, with a ``token`` head.
        prompt: ``[B, L]`` int64 tokens, L >= 1, on any device; blocks of tokens are moved to the model.
        span: of the first prompt token, with the carry of the tokens before it; None if there are none.
        progress: called with the number of tokens just read.

    Returns:
        Logits ``[B, vocab]`` of the next token, and the span of that token, with the carry.

    Raises:
        InputError: the model is not causal or has another head, or the prompt is empty.
    """
    if model.config.head != "token":
        allowed = "must be token: other heads predict no next token"
        raise InputError("model.head", model.config.head, allowed, "longreach predict answers for new data")
    if not model.config.causal:
        raise InputError("model.causal", False, "only a causal model can continue a text")
    if not prompt.shape[1]:
        raise InputError("prompt", "", "at least one token")
    span = span if span is not None else Span(keep_carry=True)
    device = next(model.parameters()).device
    for block in prompt.split(PREFILL_BLOCK_LEN, dim=1):
        features = model.features(to_device(block, device), span)[0]
        span = span.next_block(block.shape[1])
        if progress is not None:
            progress(block.numel())
    return model.head(features[:, -1]), span


@_aliases.with_old_members(_aliases.DECODER_MEMBERS)
class Decoder:
    """A model with the carry of the tokens that it has read and generated; can be saved and loaded at any position.

    Args:
        model: causal, with a ``token`` head.
        seed: of the random generator for sampling.
        saved: the carry to continue from; None to begin without one.

    Attributes:
        span: of the next token to be read, with the carry; None while nothing was read.
    """

    def __init__(self, model: SequenceModel, seed: int = 0, saved: SavedCarry | None = None) -> None:
        self.model, self.span = model, None if saved is None else saved.span
        self._logits = None if saved is None else saved.logits
        self._pending: Tensor | None = None  # [B], the last generated token; read once its next logits are needed
        self._generators = [torch.Generator(device=next(model.parameters()).device).manual_seed(seed)]
        if saved is not None and saved.rng_state is not None:
            self._generators[0].set_state(saved.rng_state)

    @classmethod
    def load(cls, model: SequenceModel, path: str | Path, seed: int | None = None) -> Decoder:
        """Restore a decoder that `save` wrote; it generates exactly the tokens that the saved one would have.

        Args:
            model: the one that wrote the file, or an export of it.
            path: of the file.
            seed: of a new random generator; None continues with the saved state of the generator, which must be of
                the same kind of device.

        Raises:
            InputError: the file is missing, damaged, of another format, or the carry of another model.
        """
        return cls(model, seed or 0, saved=carry_file.load(path, model, keep_rng=seed is None))

    @classmethod
    def stack(cls, decoders: Sequence[Decoder]) -> Decoder | None:
        """Batch several decoders into one, which samples each row with its own random generator.

        Args:
            decoders: of one model; each has read something. They are not changed.

        Returns:
            The decoder; None if the texts have different lengths, and a mixer's state grows with the length
            (``softmax``) or the model has positions (``model.positions``).
        """
        ends = [(decoder._next_logits(), decoder.span) for decoder in decoders]
        spans = [span for _, span in ends if span is not None]
        first = spans[0]
        config = decoders[0].model.config
        has_positions = config.positions != "none" or directory_of(config) is not None
        for span in spans[1:]:
            grows = any(span.carry[key].state.shape[1:] != other.state.shape[1:] for key, other in first.carry.items())
            if grows or (has_positions and span.position != first.position):
                return None
        carry = {key: Carry(torch.cat([span.carry[key].state for span in spans])) for key in first.carry}
        stacked = cls(decoders[0].model)
        # The span has one position for all rows: if the model has positions, they are equal, as checked above.
        stacked.span = first.with_carry(carry)
        stacked._logits = torch.cat([logits for logits, _ in ends])
        stacked._generators = [own.clone_state() for decoder in decoders for own in decoder._generators]
        return stacked

    def save(self, path: str | Path) -> None:
        """Write carry, position, logits and the state of the random generator to a file; see `load`.

        Raises:
            InputError: nothing was read yet, the file cannot be written, or the decoder is the result of `stack`.
        """
        logits = self._next_logits()
        assert self.span is not None
        if len(self._generators) > 1:
            raise InputError("carry", str(path), "one text, not several side by side")
        carry_file.save(path, self.model, SavedCarry(self.span, logits, self._generators[0].get_state()))

    def fork(self) -> Decoder:
        """An independent copy with the same carry and random state; the weights are shared."""
        twin = copy.copy(self)
        twin._generators = [own.clone_state() for own in self._generators]
        return twin

    def prefill(self, tokens: Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Read ``tokens [B, L]`` int64, L >= 1, after those read and generated so far; see `prefill`.

        Raises:
            InputError: the model is not causal, there are no tokens, or the number of rows differs from before.
        """
        rows = self.rows
        if rows and rows != tokens.shape[0]:
            raise InputError("tokens", [*tokens.shape], f"{rows} rows, as before")
        if rows:
            self._next_logits()
        self._advance(tokens, progress)

    @property
    def rows(self) -> int:
        """B, the number of texts in the batch; 0 while nothing was read."""
        return 0 if self._logits is None else self._logits.shape[0]

    @property
    def carry_bytes(self) -> int:
        """Bytes of the carry, without the logits."""
        carry = {} if self.span is None else self.span.carry
        return sum(part.nbytes for part in carry_file.pack(carry).values())

    @torch.inference_mode()
    def generate(
        self, num_tokens: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> Iterator[Tensor]:
        """Sample tokens one after another.

        Args:
            num_tokens: how many.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among this many most likely tokens; 0 for all.
            top_p: sample among the fewest most likely tokens whose probabilities sum to this, in (0, 1]; 1 for all.

        Yields:
            ``[B]`` int64, the next token of each row.

        Raises:
            InputError: nothing was read yet, a setting is out of range, or the logits are not finite.
        """
        if not 0 <= temperature < math.inf:
            raise InputError("temperature", temperature, "a finite number, at least 0")
        if top_k < 0:
            raise InputError("top_k", top_k, "at least 0")
        if not 0 < top_p <= 1:
            raise InputError("top_p", top_p, "more than 0, at most 1")
        for _ in range(num_tokens):
            logits = self._next_logits().float()
            if not logits.isfinite().all():
                assert self.span is not None
                field = f"logits after {self.span.position:,} tokens"
                worst = float(logits.abs().max())
                raise InputError(field, worst, "must be finite", "the weights or the carry are damaged")
            token = _sample(logits, temperature, top_k, top_p, self._generators)
            self._pending = token
            yield token

    def _next_logits(self) -> Tensor:
        """The logits ``[B, vocab]`` of the next token; reads the pending one first."""
        if self._pending is not None:
            self._advance(self._pending.unsqueeze(1))
            self._pending = None
        if self._logits is None:
            raise InputError("prompt", "", "at least one token")
        return self._logits

    def _advance(self, tokens: Tensor, progress: Callable[[int], None] | None = None) -> None:
        # A copy of the span: neither a fork nor an interrupted prefill may change this one's carry.
        span = None if self.span is None else self.span.with_carry(self.span.carry)
        self._logits, self.span = prefill(self.model, tokens, span, progress)


def generate(
    model: SequenceModel,
    prompt: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Continue a prompt by sampling one token at a time, with a new `Decoder`.

    Args:
        model: causal, with a ``token`` head.
        prompt: ``[B, L]`` int64 tokens, L >= 1.
        num_tokens: how many tokens to generate.
        temperature, top_k, top_p: as of `Decoder.generate`.
        seed: of the random generator.
        progress: called with the number of prompt tokens just read.

    Yields:
        ``[B]`` int64, the next token of each row.
    """
    decoder = Decoder(model, seed)
    decoder.prefill(prompt, progress)
    yield from decoder.generate(num_tokens, temperature=temperature, top_k=top_k, top_p=top_p)


def continuations(decoders: Sequence[Decoder], num_tokens: int, **options: Any) -> Iterator[Iterator[int]]:
    """Continue several texts independently: as one batch if `Decoder.stack` allows it, else one after another.

    Args:
        decoders: one text each. A single one is advanced; several may not be.
        num_tokens, options: as of `Decoder.generate`.

    Yields:
        The new tokens of each text, in order; consume them before the next text is requested. Those of the first text
        come as they are generated.
    """
    stacked = Decoder.stack(decoders) if len(decoders) > 1 else None
    for decoder in decoders if stacked is None else [stacked]:
        rows: list[list[int]] = [[] for _ in range(decoder.rows)]
        yield _first_row(decoder.generate(num_tokens, **options), rows)
        yield from map(iter, rows[1:])


def _first_row(tokens: Iterable[Tensor], rows: list[list[int]]) -> Iterator[int]:
    """Yield the first row's tokens as they come; append the tokens of all rows to ``rows``."""
    for token in tokens:
        for row, one in zip(rows, token.tolist(), strict=True):
            row.append(one)
        yield rows[0][-1]


def _sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Sample a token ``[B]`` from logits ``[B, vocab]``; each generator samples an equal number of the rows."""
    if temperature == 0:
        return logits.argmax(-1)
    # In fp64, from the largest logit down: every positive temperature and top_p of Python is one there too.
    logits = logits.double() - logits.max(-1, keepdim=True).values
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(descending=True, stable=True)
        excluded = ranked.cumsum(-1) - ranked >= top_p
        excluded[:, 0] = False
        probabilities = probabilities.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), 0.0)
    rows = zip(probabilities.float().chunk(len(generators)), generators, strict=True)
    return torch.cat([torch.multinomial(some, 1, generator=own) for some, own in rows]).squeeze(1)


def encode(text: str | bytes, vocabulary: Vocabulary | None = None) -> Tensor:
    """A text as tokens ``[1, L]`` int64; see `Vocabulary.encode_text`. Without a vocabulary, tokens are bytes."""
    data = text.encode() if isinstance(text, str) else text
    return torch.from_numpy((vocabulary or ByteVocabulary()).encode_text(data).astype(np.int64)).unsqueeze(0)


def decode_stream(
    tokens: Iterable[int],
    vocabulary: Vocabulary | None = None,
    prompt: Tensor | None = None,
    *,
    is_continuation: bool = False,
) -> Iterator[str]:
    """Tokens as a stream of text, each character once it is complete; see `Vocabulary.decode`.

    Args:
        tokens: generated tokens.
        vocabulary: of the model; bytes unless one is given.
        prompt: ``[1, L]``, the tokens just before them, if known.
        is_continuation: there are tokens before them, even if ``prompt`` is None.
    """
    unknown = None if is_continuation else ()
    prefix = unknown if prompt is None else prompt[0, -MAX_PENDING:].tolist()
    return (vocabulary or ByteVocabulary()).decode(tokens, prefix)


def __getattr__(name: str) -> Any:
    return _aliases.attribute(__name__, name)
