"""The model: embedding, pre-norm residual blocks, a head. Plain single-device code that takes a `Span`.

The same code runs on a whole sequence, on one rank's shard, on a streamed block and on the next generated token: the
span alone knows which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...bounds import bounded
from ...errors import InputError
from ...parallel.span import Span
from ..layers import Embedding, RMSNorm, SwiGLU, dropout
from ..mixers import (
    CONFIGS,
    MIXERS,
    ChelaConfig,
    ElementwiseConfig,
    FeedforwardKernelConfig,
    GatedDeltaNetConfig,
    Mamba2Config,
    SoftmaxConfig,
    build_mixer,
    options,
)
from .heads import IGNORED, ClassHead, Head, NumberHead, SeriesHead, TokenHead
from .trained import LoraConfig

__all__ = ["IGNORED", "Model", "ModelConfig", "build_model"]


@dataclass
class ModelConfig:
    """The shape of the model.

    Attributes:
        vocab: tokens in the vocabulary; 0 to take it from the data.
        width: D, channels of the residual stream.
        depth: number of layers (residual blocks), each a mixer and a feed-forward layer.
        mixers: token mixers by name, of the first, second, ... layer; the list is repeated over the depth.
        causal: whether tokens see only themselves and earlier ones.
        ffn_ratio: hidden width of the feed-forward layers, divided by ``width``.
        dropout: rate at the end of each mixer and feed-forward layer.
        positions: position encoding that is added to the embedded tokens: "sinusoidal" (arXiv 1706.03762), or "none".
        channels: C, where a token is a vector of C numbers; 0 where tokens are ids.
        head: the output: the next "token"; a "class" or "numbers" for the whole sequence; numbers for each token
            ("series").
        outputs: how many classes or numbers the head answers; 0 to take it from the data.
        documents: 2 where a sequence is two documents to be compared, else 1.
        elementwise, chela, feedforward_kernel, mamba2, gated_deltanet, softmax: the mixers' options.
        code: Python files, run by `config.load`, that register mixers of your own; `build_model` runs none.
        options: the options of these mixers, by name.
        init_from: a run or an export from which a new run takes all weights that fit by name and shape.
        pretrained: directory of a model of transformers, in place of our own: its shape, weights and tokenizer.
        architecture: the same without the weights, which are drawn from ``run.seed``.
        lora: adapters of such a model.
    """

    vocab: int = bounded(0, minimum=0)
    width: int = bounded(128, minimum=1)
    depth: int = bounded(4, minimum=1)
    mixers: list[str] = field(default_factory=lambda: ["elementwise", "chela"])
    causal: bool = True
    ffn_ratio: float = 8 / 3
    dropout: float = bounded(0.0, minimum=0)
    positions: Literal["none", "sinusoidal"] = "none"
    channels: int = bounded(0, minimum=0)
    head: Literal["token", "class", "numbers", "series"] = "token"
    outputs: int = bounded(0, minimum=0)
    documents: int = 1
    elementwise: ElementwiseConfig = field(default_factory=ElementwiseConfig)
    chela: ChelaConfig = field(default_factory=ChelaConfig)
    feedforward_kernel: FeedforwardKernelConfig = field(default_factory=FeedforwardKernelConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    gated_deltanet: GatedDeltaNetConfig = field(default_factory=GatedDeltaNetConfig)
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    code: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    init_from: str = ""
    pretrained: str = ""
    architecture: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)


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


class Model(nn.Module):
    """A sequence model over token ids, or over vectors of numbers.

    Attributes:
        recompute: keep only each block's input for backward, and recompute the block then (activation checkpointing).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check(config)
        self.config, self.recompute = config, False
        self.embedding = nn.Linear(config.channels, config.width) if config.channels else _embedding(config)
        hidden = int(-(-config.width * config.ffn_ratio // 8)) * 8
        self.blocks = nn.ModuleList()
        for number in range(config.depth):
            name = config.mixers[number % len(config.mixers)]
            mixer = build_mixer(name, config.width, _options(config, name), causal=config.causal)
            self.blocks.append(Block(mixer, config.width, hidden, config.dropout))
        self.head = _head(config, self.embedding)
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

    def forward(
        self,
        tokens: Tensor,
        span: Span | None = None,
        labels: Tensor | None = None,
        *,
        head: bool = True,
        measure: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """The head's output for this shard: logits of every next token, or what else the head computes.

        Args:
            tokens: ``[B, L]`` int64 ids of this rank's shard, or ``[B, L, channels]`` numbers.
            span: the shard's place and the way to the rest of its sequence; None for a whole sequence.
            labels: ``[B, L]`` int64 wanted ids, `IGNORED` where there is none; for heads that answer numbers ``[B, L,
                outputs]``, NaN where there is none.
            head: False returns the head's input ``[B, L, D]``; enough to write the span's carry.
            measure: with labels, compute the head's metrics, too.

        Returns:
            The head's output: for tokens, logits ``[B, L, vocab]``; with labels, each token's loss ``[B, L]`` (nats
            or squared errors; 0 where there is no label), the penalty on the weights, a scalar to be added to the loss
            once, and with ``measure`` the metrics ``[B, L, metrics]`` of the labelled tokens.
        """
        x, penalty = self.features(tokens, span if span is not None else Span())
        if not head:
            return x
        if labels is None:
            return self.head(x)
        found = self.head(x, labels), penalty
        return (*found, self.head.measure(x, labels)) if measure else found

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


def build_model(config: ModelConfig) -> Model:
    """The model that ``config`` describes, on the current default device, with weights drawn from torch's global seed.

    Raises:
        InputError: a size or name that does not fit.
    """
    return Model(config)


def _embedding(config: ModelConfig) -> nn.Embedding:
    return Embedding(config.vocab, config.width)


def _head(config: ModelConfig, embedding: nn.Module) -> Head:
    if isinstance(embedding, nn.Embedding) and config.head == "token":
        return TokenHead(config.width, embedding)
    if config.head == "series":
        return SeriesHead(config.width, config.outputs)
    kind = ClassHead if config.head == "class" else NumberHead
    return kind(config.width, config.outputs, config.documents)


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
