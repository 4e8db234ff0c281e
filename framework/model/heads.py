"""Output heads: the next token, a class or numbers for the whole sequence, or numbers for every token.

Every head returns one loss per token, 0 where there is no label, so that losses are summed alike for all heads. A head
for the whole sequence pools it by a scan, whose state crosses ranks and blocks as that of a mixer does; its answer is
at the sequence's last token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...kernels.state import StatefulOp
from ...parallel.span import Span
from ..data.labels import IGNORE
from ..layers import RMSNorm

IGNORED = IGNORE
CPU_LOGIT_BYTES = 1 << 24  # of the fp32 logits that the loss holds at a time
GPU_LOGIT_SHARE = 32  # on a GPU, one part in so many of its memory


def labelled(labels: Tensor) -> Tensor:
    """Which tokens have a label, ``[B, L]``: int64 labels ``[B, L]`` other than `IGNORED`, numbers ``[B, L, C]`` other
    than NaN.
    """
    return ~labels.isnan().any(-1) if labels.is_floating_point() else labels != IGNORED


class Head(nn.Module):
    """The layers after the blocks.

    Attributes:
        metrics: names of the columns of `measure`.
    """

    metrics: tuple[str, ...] = ()

    def collect(self, x: Tensor, span: Span) -> Tensor:
        """The features that `forward` takes, from ``x [B, L, D]`` and the rest of the sequence."""
        return x

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The output for the features of `collect`, or with labels each token's loss ``[B, L]``, 0 without a label."""
        raise NotImplementedError

    def measure(self, x: Tensor, labels: Tensor) -> Tensor:
        """Metrics ``[B, L, metrics]`` of each labelled token; 0 elsewhere."""
        raise NotImplementedError


class TokenHead(Head):
    """The next token: final norm and logits by the embedding's own matrix.

    With labels it returns each token's loss, without the logits of all tokens in memory.
    """

    metrics = ("accuracy",)

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
        return token_losses(x.flatten(0, 1), self.weight, labels.flatten()).view(labels.shape)

    def measure(self, x: Tensor, labels: Tensor) -> Tensor:
        known = labelled(labels)
        right = torch.zeros(labels.shape, dtype=torch.float32, device=x.device)
        right[known] = (self(x[known]).argmax(-1) == labels[known]).float()
        return right.unsqueeze(-1)


class SequenceHead(Head):
    """One output for the whole sequence, from the mean of its tokens, or from the means of its first documents.

    The first ``documents`` documents count (``span.segments`` 0, 1, ...); tokens after them are padding. Two documents
    are compared: the output is a function of both means, their difference and their product.

    Args:
        width: D.
        outputs: classes, or numbers.
        documents: how many.
    """

    def __init__(self, width: int, outputs: int, documents: int = 1) -> None:
        super().__init__()
        self.documents, self.total = documents, Total()
        self.norm = RMSNorm(width)
        self.compare = nn.Linear(4 * width, width) if documents == 2 else None
        self.answer = nn.Linear(width, outputs)

    def collect(self, x: Tensor, span: Span) -> Tensor:
        """``[B, L, D]`` -> ``[B, documents, D]``, the documents' means over all tokens up to the end of this shard."""
        if span.segments is None:
            member = x.new_ones(*x.shape[:2], 1)
        else:
            number = torch.arange(self.documents, device=x.device)
            member = (span.segments.unsqueeze(-1) == number).to(x.dtype)
        counted = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        total = span.for_layer("pool", segments=None).scan(self.total, counted, member)
        return (total[..., :-1] / total[..., -1:].clamp(min=1)).to(x.dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[B, documents, D]`` -> ``[B, outputs]``; with labels, whose last one counts, losses ``[B, L]``."""
        x = self.norm(x)
        if self.compare is not None:
            one, other = x.unbind(1)
            both = torch.cat([one, other, (one - other).abs(), one * other], dim=-1)
            x = F.gelu(self.compare(both)).unsqueeze(1)
        answer = self.answer(x.squeeze(1))
        if labels is None:
            return answer
        if not labels.shape[1]:  # a rank without tokens takes part in the backward pass
            return answer.sum(-1, keepdim=True)[:, :0]
        return F.pad(self.loss(answer, labels[:, -1]).unsqueeze(1), (labels.shape[1] - 1, 0))

    def measure(self, x: Tensor, labels: Tensor) -> Tensor:
        found = torch.zeros(*labels.shape[:2], len(self.metrics), device=x.device)
        if labels.shape[1]:
            known = labelled(labels[:, -1:])[:, 0]
            found[known, -1] = self.check(self(x)[known].float(), labels[known, -1])
        return found

    def loss(self, answer: Tensor, label: Tensor) -> Tensor:
        """``[B, outputs]`` and the last labels -> ``[B]``."""
        raise NotImplementedError

    def check(self, answer: Tensor, label: Tensor) -> Tensor:
        """``[n, outputs]`` and as many labels -> ``[n, metrics]``."""
        raise NotImplementedError


class ClassHead(SequenceHead):
    """A class for the whole sequence; labels ``[B, L]`` int64."""

    metrics = ("accuracy",)

    def loss(self, answer: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(_wide(answer), label, ignore_index=IGNORED, reduction="none")

    def check(self, answer: Tensor, label: Tensor) -> Tensor:
        return (answer.argmax(-1) == label).float().unsqueeze(-1)


class NumberHead(SequenceHead):
    """Numbers for the whole sequence; labels ``[B, L, outputs]``."""

    metrics = ("mse", "mae")

    def loss(self, answer: Tensor, label: Tensor) -> Tensor:
        return _squared_error(answer, label)

    def check(self, answer: Tensor, label: Tensor) -> Tensor:
        return _errors(answer, label)


class SeriesHead(Head):
    """Numbers for every token, such as the next values of a series; labels ``[B, L, outputs]``."""

    metrics = ("mse", "mae")

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.answer = RMSNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[B, L, D]`` -> ``[B, L, outputs]``, or with labels the mean squared errors ``[B, L]``."""
        answer = self.answer(self.norm(x))
        return answer if labels is None else _squared_error(answer, labels)

    def measure(self, x: Tensor, labels: Tensor) -> Tensor:
        known = labelled(labels)
        found = torch.zeros(*labels.shape[:2], len(self.metrics), device=x.device)
        found[known] = _errors(self(x[known]).float(), labels[known])
        return found


def make_head(kind: str, width: int, outputs: int, documents: int) -> Head:
    """A new head of the kind "class", "numbers" or "series"."""
    if kind == "series":
        return SeriesHead(width, outputs)
    return (ClassHead if kind == "class" else NumberHead)(width, outputs, documents)


class Total(StatefulOp):
    """The sum over all tokens up to the end of this shard of ``x [B, L, D]`` weighted by ``member [B, L, S]``: ``[B, S,
    D]`` in fp32 or better.
    """

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        x, member = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in inputs)
        return x.new_ones(1, 1, 1), member.transpose(1, 2) @ x

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return initial + self.local_transition(inputs, segments)[1], ()


def token_losses(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihoods ``[N]`` of ``labels [N]`` under ``softmax(x W^T)``, without all logits in memory.

    They are 0 where a label is `IGNORED`.

    Args:
        x: ``[N, D]``.
        weight: W ``[V, D]``; its gradient is summed in fp32 or better.
    """
    losses: Tensor = _TokenLosses.apply(x, weight, labels)
    return losses


class _TokenLosses(torch.autograd.Function):
    """Negative log-likelihoods ``[N]`` of ``labels [N]`` under ``softmax(x W^T)``; 0 where a label is `IGNORED`.

    ``x [N, D]``, ``W [V, D]``. Rows are processed in slabs, whose logits are recomputed in backward: only one slab of
    logits is held. Losses are in fp32 or better, and so is the sum of the slabs' gradients of W: in 16 bits, each of
    many additions would round.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        normalizers = x.new_empty(len(x), dtype=torch.promote_types(dtype, torch.float32))
        losses = torch.empty_like(normalizers)
        for rows in slabs(x, weight):
            logits = _logits(x[rows], weight, dtype)
            normalizers[rows] = logits.logsumexp(-1)
            ids = labels[rows]
            picked = logits.gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            losses[rows] = (normalizers[rows] - picked).masked_fill_(ids == IGNORED, 0.0)
        ctx.save_for_backward(x, weight, labels, normalizers)
        ctx.dtype = dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, labels, normalizers = ctx.saved_tensors
        to_x = torch.empty_like(x)
        to_weight = torch.zeros_like(weight, dtype=normalizers.dtype)
        for rows in slabs(x, weight):
            ids = labels[rows]
            share = grad[rows].to(normalizers.dtype).masked_fill(ids == IGNORED, 0.0).unsqueeze(-1)
            errors = _logits(x[rows], weight, ctx.dtype).sub_(normalizers[rows].unsqueeze(-1)).exp_().mul_(share)
            errors.scatter_add_(-1, ids.clamp(min=0).unsqueeze(-1), -share)
            errors = errors.to(ctx.dtype)
            to_x[rows] = errors @ weight.to(ctx.dtype)
            to_weight += errors.t() @ x[rows].to(ctx.dtype)
        return to_x, to_weight.to(weight.dtype), None


def _logits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``x W^T`` as a product in ``dtype``, in fp32 or better; a new tensor."""
    logits = x.to(dtype) @ weight.to(dtype).t()
    return logits.to(torch.promote_types(dtype, torch.float32))


def slabs(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Rows of ``x [N, D]`` whose logits are computed at a time."""
    num_bytes = CPU_LOGIT_BYTES
    if x.device.type == "cuda":
        num_bytes = torch.cuda.get_device_properties(x.device).total_memory // GPU_LOGIT_SHARE
    size = max(1, num_bytes // (4 * max(1, weight.shape[0])))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


def _squared_error(answer: Tensor, label: Tensor) -> Tensor:
    """``[..., C]`` -> ``[...]``, the mean over C; 0 where the label is NaN."""
    known = ~label.isnan().any(-1, keepdim=True)
    return (_wide(answer) - label.where(known, answer)).where(known, 0).square().mean(-1)


def _errors(answer: Tensor, label: Tensor) -> Tensor:
    """``[n, C]`` -> ``[n, 2]``: squared and absolute, means over C."""
    error = answer - label
    return torch.stack([error.square().mean(-1), error.abs().mean(-1)], dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
