"""Softmax attention over ranks, for comparison: DeepSpeed's Ulysses, and ring attention. On CPUs.

Ring attention is written for these measurements alone: blocks of keys and values pass from rank to rank, and every
rank merges what its queries see in each (Liu et al. 2023, arXiv 2310.01889). Both are exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...framework.deepspeed.engine import avoid_compiling
from ...parallel.mesh import Axis
from .kernels import softmax_attention

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_grad = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def show_world_to_deepspeed() -> None:
    """DeepSpeed's own interface to the process group that was joined."""
    import deepspeed

    avoid_compiling()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def ulysses(axis: Axis, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention: all-to-alls give each rank the whole sequence of some heads, and take it back.

    Args:
        axis: the ranks that share the sequence; at most as many as heads.
        q, k, v: ``[B, n, H, K]``, this rank's tokens.

    Returns:
        ``[B, n, H, K]``.
    """
    from deepspeed.sequence.layer import DistributedAttention

    attention = DistributedAttention(softmax_attention, axis.group, scatter_idx=2, gather_idx=1)
    y: Tensor = attention(q, k, v, 0)
    return y


def ring(axis: Axis, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention: blocks of k and v pass around a ring of ranks; backward, so do their gradients.

    Args and returns as `ulysses`; any number of heads.
    """
    y: Tensor = _Ring.apply(axis, *(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    return y.transpose(1, 2)


class _Ring(torch.autograd.Function):
    """On ``[B, H, n, K]``. In step s a rank holds the block of the rank s before it."""

    @staticmethod
    def forward(ctx: Any, axis: Axis, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block = torch.stack([k, v])
        out, total = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
        for step in range(axis.size):
            passing = _Passing(block, axis) if step + 1 < axis.size else None
            source = (axis.rank - step) % axis.size
            if source <= axis.rank:
                part, part_total = _attend(q, block[0], block[1], 0.0, source == axis.rank)
                merged = torch.logaddexp(total, part_total)
                out = out * (total - merged).exp().unsqueeze(-1) + part * (part_total - merged).exp().unsqueeze(-1)
                total = merged
            if passing is not None:
                block = passing.arrived()
        ctx.axis = axis
        ctx.save_for_backward(q, k, v, out, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        axis = ctx.axis
        q, k, v, out, total = ctx.saved_tensors
        grad = grad.contiguous()
        block, grad_q = torch.stack([k, v]), torch.zeros_like(q)
        grad_block = torch.zeros_like(block)
        for step in range(axis.size):
            passing = _Passing(block, axis) if step + 1 < axis.size else None
            source = (axis.rank - step) % axis.size
            if source <= axis.rank:
                # By the output and sum over all blocks, this block's part of every gradient is its own.
                dq, dk, dv = _attend_grad(grad, q, block[0], block[1], out, total, 0.0, source == axis.rank)
                grad_q += dq
                grad_block += torch.stack([dk, dv])
            grad_block = _Passing(grad_block, axis).arrived()  # stays with its block; the last step takes it home
            if passing is not None:
                block = passing.arrived()
        return None, grad_q, grad_block[0], grad_block[1]


class _Passing:
    """A tensor on its way to the next rank of the ring, and the one of the rank before on its way here."""

    def __init__(self, x: Tensor, axis: Axis) -> None:
        self._sent, self._came = x.contiguous(), torch.empty_like(x)
        after, before = (axis.ranks[(axis.rank + step) % axis.size] for step in (1, -1))
        self._requests = [
            dist.isend(self._sent, after, group=axis.group),
            dist.irecv(self._came, before, group=axis.group),
        ]

    def arrived(self) -> Tensor:
        for request in self._requests:
            assert request is not None
            request.wait()
        return self._came
