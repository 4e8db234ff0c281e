"""The sum of stage 0's gradients over all ranks, in buckets that are sent while backward computes the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

LEAST_BUCKET = 1 << 16  # elements: below, latency is what an exchange takes
BUCKETS = 8  # of a model that is smaller than so many of the buckets that were asked for


class GradientReduction:
    """Averages the gradients of parameters over all ranks, once for each step.

        reduction.begin()       # where the next backward pass is the last one of the step
        loss.backward()
        reduction.finish()

    Without `begin`, all is sent in `finish`. The order of the exchanges is the same on all ranks in any case.

    Args:
        parameters: which are trained, in the order of the model; their gradients are in fp32.
        bucket_size: most elements of an exchange, unless a single parameter has more.
        dtype: in which gradients are exchanged and added up.
        world_size: number of ranks.
        overlap: whether `begin` has an effect.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], bucket_size: int, dtype: torch.dtype, world_size: int, overlap: bool
    ) -> None:
        self._dtype, self._world_size = dtype, world_size
        total = sum(p.numel() for p in parameters)
        most = min(bucket_size, max(LEAST_BUCKET, -(-total // BUCKETS))) if overlap else bucket_size
        self._buckets = _buckets(parameters, most)
        self._number = {id(p): number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] = []  # gradients that backward still has to compute, by bucket; empty outside of it
        self._started: list[tuple[Tensor, Any]] = []
        hooks = parameters if overlap and world_size > 1 else []
        self._hooks = [p.register_post_accumulate_grad_hook(self._count) for p in hooks]

    def begin(self) -> None:
        """Send each bucket as soon as its gradients are there, in the backward pass that follows."""
        self._missing = [len(bucket) for bucket in self._buckets] if self._hooks else []

    def finish(self) -> list[Tensor]:
        """Wait until all gradients are averaged; those of parameters that no backward pass reached are zeros.

        Returns:
            The gradients (fp32) of all parameters.
        """
        self._missing = []
        while len(self._started) < len(self._buckets):
            self._start_next()
        for bucket, (flat, work) in zip(self._buckets, self._started, strict=True):
            if work is not None:
                work.wait()
            parts = flat.split([p.numel() for p in bucket])
            for param, part in zip(bucket, parts, strict=True):
                param.grad.copy_(part.view_as(param.grad)).div_(self._world_size)
        self._started = []
        return [param.grad for bucket in self._buckets for param in bucket]

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, param: Tensor) -> None:
        if not self._missing:
            return
        number = self._number[id(param)]
        self._missing[number] -= 1
        assert self._missing[number] >= 0, "a gradient was added to after it was sent"
        while len(self._started) < len(self._buckets) and not self._missing[len(self._started)]:
            self._start_next()

    def _start_next(self) -> None:
        from deepspeed import comm

        bucket = self._buckets[len(self._started)]
        for param in bucket:
            if param.grad is None:  # every rank sends the same ones
                param.grad = torch.zeros_like(param, dtype=torch.float32)
        flat = torch.cat([param.grad.flatten() for param in bucket]).to(self._dtype)
        self._started.append((flat, comm.all_reduce(flat, async_op=True)))


def _buckets(parameters: Sequence[nn.Parameter], most: int) -> list[list[Any]]:
    """Parameters in the order in which backward reaches them, about, in buckets of up to ``most`` elements."""
    buckets: list[list[Any]] = []
    room = 0
    for param in reversed(parameters):
        if param.numel() > room:
            buckets.append([])
            room = most
        buckets[-1].append(param)
        room -= param.numel()
    return buckets
