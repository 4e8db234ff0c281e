"""The model: embedding, pre-norm residual blocks, tied head. Plain single-device code that takes a `Span`.

Whether the tokens it sees are a whole sequence, one rank's piece, the next streamed block or the next generated
token is the span's business alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.errors import InputError
from ..parallel.span import Span
from .layers import RMSNorm, SwiGLU
from .mixers import (
    ChelaConfig,
    ElementwiseConfig,
    FeedforwardKernelConfig,
    SoftmaxConfig,
    build_mixer,
)

IGNORED = -100  # the label of a token that the loss leaves out
LOGITS_AT_ONCE = 2**22  # logits that the loss holds at a time (16 MiB in fp32)


@dataclass
class ModelConfig:
    """The shape of the model.

    Attributes:
        vocab: tokens in the vocabulary; 0 to take it from the data.
        width: D, channels of the residual stream.
        depth: number of blocks.
        mixers: token mixers by name; the pattern is repeated over the depth.
        causal: tokens see only their past.
        ffn_ratio: hidden width of the feed-forward layers over the width.
        elementwise, chela, feedforward_kernel, softmax: the mixers' options.
    """

    vocab: int = 0
    width: int = 128
    depth: int = 4
    mixers: list[str] = field(default_factory=lambda: ["elementwise", "chela"])
    causal: bool = True
    ffn_ratio: float = 8 / 3
    elementwise: ElementwiseConfig = field(default_factory=ElementwiseConfig)
    chela: ChelaConfig = field(default_factory=ChelaConfig)
    feedforward_kernel: FeedforwardKernelConfig = field(default_factory=FeedforwardKernelConfig)
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, mixer: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width)
        self.mixer = mixer
        self.ffn_norm = RMSNorm(width)
        self.ffn = SwiGLU(width, hidden)

    def forward(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """``[B, L, D]`` -> ``[B, L, D]``, and the mixer's penalty on its weights (a scalar, 0 for most)."""
        mixed = self.mixer(self.mixer_norm(x), span)
        mixed, penalty = mixed if isinstance(mixed, tuple) else (mixed, x.new_zeros(()))
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x)), penalty


class Head(nn.Module):
    """Final norm and logits. With labels it returns each token's loss and never holds all logits at once."""

    def __init__(self, width: int, embedding: nn.Embedding) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.weight = embedding.weight  # tied

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[B, L, D]`` -> logits ``[B, L, vocab]``, or with ``labels [B, L]`` the negative log-likelihoods ``[B,
        L]`` in nats.
        """
        x = self.norm(x)
        if labels is None:
            return F.linear(x, self.weight)
        rows, wanted = x.flatten(0, 1), labels.flatten()
        size = max(1, LOGITS_AT_ONCE // self.weight.shape[0])
        losses = [
            checkpoint(_token_loss, part, self.weight, ids, use_reentrant=False)
            for part, ids in zip(rows.split(size), wanted.split(size), strict=True)
        ]
        return torch.cat(losses).view(labels.shape) if losses else x.sum(-1)


def _token_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


class Model(nn.Module):
    """A sequence model over token ids.

    Attributes:
        recompute: keep only each block's input for backward, and compute the block again then.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check(config)
        self.config, self.recompute = config, False
        self.embedding = nn.Embedding(config.vocab, config.width)
        hidden = int(-(-config.width * config.ffn_ratio // 8)) * 8
        self.blocks = nn.ModuleList()
        for number in range(config.depth):
            name = config.mixers[number % len(config.mixers)]
            mixer = build_mixer(name, config.width, getattr(config, name, None), causal=config.causal)
            self.blocks.append(Block(mixer, config.width, hidden))
        self.head = Head(config.width, self.embedding)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal(0, 1/sqrt(fan in)); what writes to the residual stream is divided by sqrt(2 depth)."""
        nn.init.normal_(self.embedding.weight, std=0.3 * self.config.width**-0.5)  # tied: the first logits are small
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith((".out", ".down")):
                    std /= (2 * self.config.depth) ** 0.5
                nn.init.normal_(module.weight, std=std)

    def forward(
        self, tokens: Tensor, span: Span | None = None, labels: Tensor | None = None, *, head: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict every next token of this piece.

        Args:
            tokens: ``[B, L]`` int64 ids of this rank's piece.
            span: the piece and the way to the rest of its sequence; None for a whole sequence.
            labels: ``[B, L]`` int64 wanted ids, `IGNORED` where there is none.
            head: False returns what the head would see, ``[B, L, D]``; enough to move the span's carry on.

        Returns:
            Logits ``[B, L, vocab]``; with labels, the negative log-likelihoods ``[B, L]`` in nats (0 where ignored)
            and the penalty on the weights, a scalar to be added to the loss once.
        """
        x, penalty = self.features(tokens, span if span is not None else Span())
        if not head:
            return x
        return self.head(x) if labels is None else (self.head(x, labels), penalty)

    def features(self, tokens: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """What the head sees, ``[B, L, D]``, and the penalty on the weights (a scalar)."""
        x = self.embedding(tokens) * self.config.width**0.5
        penalty = x.new_zeros(())
        for number, block in enumerate(self.blocks):
            x, cost = self._run(block, x, span, f"blocks.{number}")
            penalty = penalty + cost
        return x, penalty

    def _run(self, block: nn.Module, x: Tensor, span: Span, name: str) -> tuple[Tensor, Tensor]:
        if not (self.recompute and torch.is_grad_enabled()):
            return block(x, span.at(name))

        def again(x: Tensor) -> tuple[Tensor, Tensor]:
            return block(x, span.at(name, remember=True))

        # Dropout is a hash of positions, so no state of a random generator is kept.
        return checkpoint(again, x, use_reentrant=False, preserve_rng_state=False)


def build_model(config: ModelConfig) -> Model:
    """The model that ``config`` describes, on the current default device, with weights drawn from torch's global seed.

    Raises:
        InputError: a size or name that does not fit.
    """
    return Model(config)


def _check(config: ModelConfig) -> None:
    for name in ("vocab", "width", "depth"):
        if getattr(config, name) < 1:
            raise InputError(f"model.{name}", getattr(config, name), "at least 1")
    if not config.mixers:
        raise InputError("model.mixers", config.mixers, "at least one mixer", "for example [elementwise, chela]")
