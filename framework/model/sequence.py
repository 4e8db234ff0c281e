"""What training and inference need of a model, whatever its layers are."""

from __future__ import annotations

from torch import Tensor, nn

from ...parallel.span import Span
from .config import ModelConfig
from .heads import Head


class SequenceModel(nn.Module):
    """What training and inference need of a model, whatever its layers are.

    Attributes:
        config: its shape.
        recompute: keep only each layer's input for backward, and recompute the layer then (activation checkpointing).
        head: the layers after the blocks.
    """

    config: ModelConfig
    head: Head

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False

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
        raise NotImplementedError
