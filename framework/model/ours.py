"""Our own model: embedding, pre-norm residual blocks, a head. Plain single-device code that takes a `Span`.

The same code runs on a whole sequence, on one rank's shard, on a streamed block and on the next generated token: the
span alone knows which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...parallel.span import Span
from ..layers import Embedding, RMSNorm, SwiGLU, dropout
from ..mixers import CONFIGS, MIXERS, build_mixer, options
from .config import ModelConfig
from .heads import Head, TokenHead, make_head
from .sequence import SequenceModel


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, mixer: nn.Module, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.mixer_norm = RMSNorm(width)
        self.mixer = mixer
        self.ffn_norm = RMSNorm(width)
        self.ffn = SwiGLU(width, hidden)

    def forward(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """``[B, L, D]`` -> ``[B, L, D]``, and the mixer's penalty on its weights (a scalar, 0 for most)."""
        mixed = self.mixer(self.mixer_norm(x), span)
        mixed, penalty = mixed if isinstance(mixed, tuple) else (mixed, x.new_zeros(()))
        x = x + dropout(mixed, self.dropout, span, "mixer")
        return x + dropout(self.ffn(self.ffn_norm(x)), self.dropout, span, "ffn"), penalty


class Model(SequenceModel):
    """A sequence model over token ids, or over vectors of numbers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.embedding = nn.Linear(config.channels, config.width) if config.channels else _embedding(config)
        hidden = int(-(-config.width * config.ffn_ratio // 8)) * 8
        self.blocks = nn.ModuleList()
        for number in range(config.depth):
            name = config.mixers[number % len(config.mixers)]
            mixer = build_mixer(name, config.width, _options(config, name), causal=config.causal)
            self.blocks.append(Block(mixer, config.width, hidden, config.dropout))
        self.head: Head = (
            TokenHead(config.width, self.embedding)
            if isinstance(self.embedding, nn.Embedding) and config.head == "token"
            else make_head(config.head, config.width, config.outputs, config.documents)
        )
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal(0, 1/sqrt(fan in)); what writes to the residual stream is divided by sqrt(2 depth)."""
        if isinstance(self.embedding, nn.Embedding):
            nn.init.normal_(
                self.embedding.weight, std=0.3 * self.config.width**-0.5
            )  # tied: the first logits are small
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith((".out", ".down")):
                    std /= (2 * self.config.depth) ** 0.5
                nn.init.normal_(module.weight, std=std)

    def features(self, tokens: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """The head's input (``[B, L, D]``, or what it pooled over the whole sequence), and the penalty on the weights
        (a scalar).
        """
        x = self._embed(tokens, span)
        penalty = x.new_zeros(())
        for number, block in enumerate(self.blocks):
            x, cost = self._run(block, x, span, f"blocks.{number}")
            penalty = penalty + cost
        return self.head.collect(x, span), penalty

    def _embed(self, tokens: Tensor, span: Span) -> Tensor:
        width = self.config.width
        if self.config.channels:
            x = self.embedding(tokens.to(self.embedding.weight.dtype))
        else:
            x = self.embedding(tokens) * width**0.5
        if self.config.positions == "none":
            return x
        return x + _sinusoids(span.position, x.shape[1], width, x.device).to(x)

    def _run(self, block: nn.Module, x: Tensor, span: Span, name: str) -> tuple[Tensor, Tensor]:
        if not (self.recompute and torch.is_grad_enabled()):
            return block(x, span.for_layer(name))

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            return block(x, span.for_layer(name, cache_collectives=True))

        # Dropout is a hash of positions: there is no random state to keep.
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


def _embedding(config: ModelConfig) -> nn.Embedding:
    return Embedding(config.vocab, config.width)


def _sinusoids(start: int, length: int, width: int, device: torch.device) -> Tensor:
    """``[length, width]`` sines and cosines of positions from ``start`` on, fp64, wavelengths from 2 pi to 2e4 pi."""
    rates = 1e-4 ** (torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.arange(start, start + length, dtype=torch.float64, device=device).unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]


def _check(config: ModelConfig) -> None:
    needed = ["width", "depth"]
    needed += [] if config.channels else ["vocab"]
    needed += [] if config.head == "token" else ["outputs"]
    for name in needed:
        if getattr(config, name) < 1:
            raise InputError(f"model.{name}", getattr(config, name), "at least 1")
    if not config.mixers:
        raise InputError("model.mixers", config.mixers, "at least one mixer", "for example [elementwise, chela]")
    if config.head == "token" and config.channels:
        raise InputError("model.head", "token", "class, numbers or series, where tokens are numbers (model.channels)")
    if not 0 <= config.dropout < 1:
        raise InputError("model.dropout", config.dropout, "at least 0 and less than 1")
    if config.documents not in (1, 2):
        raise InputError("model.documents", config.documents, "1, or 2 documents to be compared")
    for name in config.mixers:
        if name not in MIXERS:
            fix = "name the file of one of your own in model.code"
            if config.code:
                fix = f"import {' and '.join(config.code)} first, if that registers it"
            raise InputError("model.mixers", name, f"one of {', '.join(MIXERS)}", fix)
    for name, given in config.options.items():
        if name not in CONFIGS:
            raise InputError(f"model.options.{name}", given, "no file of model.code registers a mixer of this name")


def _options(config: ModelConfig, name: str) -> Any:
    """The options of the mixer ``name``."""
    return options(name, config.options.get(name, {})) if name in CONFIGS else getattr(config, name)
