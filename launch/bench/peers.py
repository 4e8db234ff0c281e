"""Softmax attention over ranks, for comparison: DeepSpeed's Ulysses, and ring attention. On CPUs.

Ring attention is written for these measurements only: shards of keys and values are passed from rank to rank, and every
rank merges the attention of its queries over each (Liu et al. 2023, arXiv 2310.01889). Both are exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...framework.deepspeed.ulysses import ulysses_attention
from ...parallel.mesh import Axis
from ...parallel.traffic import ByteCounter, uncounted
from .kernels import softmax_attention

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_grad = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def ulysses(axis: Axis, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention: an all-to-all gives each rank the whole sequence of some heads, another reverses it.

    Args:
        axis: the ranks that share the sequence; at most as many as heads.
        q, k, v: ``[B, n, H, K]``, this rank's tokens.

    Returns:
        ``[B, n, H, K]``.
    """
    return ulysses_attention(softmax_attention, axis, q, k, v)


def ring(
    axis: Axis, q: Tensor, k: Tensor, v: Tensor, count: ByteCounter = uncounted, count_grads: ByteCounter = uncounted
) -> Tensor:
    """Causal softmax attention: shards of k and v are passed around a ring of ranks; in backward, their gradients too.

    Args and returns as `ulysses`; any number of heads. ``count`` and ``count_grads`` count what is passed, of k and v
    and of their gradients.
    """
    y: Tensor = _Ring.apply(axis, count, count_grads, *(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    return y.transpose(1, 2)


class _Ring(torch.autograd.Function):
    """On ``[B, H, n, K]``. In step s, a rank holds the keys and values of the rank s before it."""

    @staticmethod
    def forward(
        ctx: Any, axis: Axis, count: ByteCounter, count_grads: ByteCounter, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        kv = torch.stack([k, v])
        out, total = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
        for step in range(axis.size):
            exchange = _RingExchange(kv, axis, count) if step + 1 < axis.size else None
            source = (axis.rank - step) % axis.size
            if source <= axis.rank:
                part, part_total = _attend(q, kv[0], kv[1], 0.0, source == axis.rank)
                merged = torch.logaddexp(total, part_total)
                out = out * (total - merged).exp().unsqueeze(-1) + part * (part_total - merged).exp().unsqueeze(-1)
                total = merged
            if exchange is not None:
                kv = exchange.wait()
        ctx.axis, ctx.counts = axis, (count, count_grads)
        ctx.save_for_backward(q, k, v, out, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        axis, (count, count_grads) = ctx.axis, ctx.counts
        q, k, v, out, total = ctx.saved_tensors
        grad = grad.contiguous()
        kv, grad_q = torch.stack([k, v]), torch.zeros_like(q)
        grad_kv = torch.zeros_like(kv)
        for step in range(axis.size):
            exchange = _RingExchange(kv, axis, count) if step + 1 < axis.size else None
            source = (axis.rank - step) % axis.size
            if source <= axis.rank:
                # Given the output and the sum over all shards, the gradients of one shard do not depend on the others.
                dq, dk, dv = _attend_grad(grad, q, kv[0], kv[1], out, total, 0.0, source == axis.rank)
                grad_q += dq
                grad_kv += torch.stack([dk, dv])
            # Travels with its keys and values; the last step returns it to their rank.
            grad_kv = _RingExchange(grad_kv, axis, count_grads).wait()
            if exchange is not None:
                kv = exchange.wait()
        return None, None, None, grad_q, grad_kv[0], grad_kv[1]


class _RingExchange:
    """Sends a tensor to the next rank of the ring, and receives that of the rank before."""

    def __init__(self, x: Tensor, axis: Axis, count: ByteCounter) -> None:
        self._sent, self._received, self._count = x.contiguous(), torch.empty_like(x), count
        after, before = (axis.ranks[(axis.rank + step) % axis.size] for step in (1, -1))
        with count(self._sent.numel() * self._sent.element_size()):
            self._requests = [
                dist.irecv(self._received, before, group=axis.group),
                dist.isend(self._sent, after, group=axis.group),
            ]

    def wait(self) -> Tensor:
        with self._count(0):
            for request in self._requests:
                assert request is not None
                request.wait()
        return self._received
