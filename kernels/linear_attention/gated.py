"""Linear attention whose decay differs from token to token, in portable PyTorch; README.md has the formulas.

Forward, the recurrence runs over slabs of chunks from left to right. Backward, it runs again and keeps the state that
enters each slab; then slabs are processed from right to left, each with the states from both sides, so that every
product of pairs of tokens is computed once for all gradients.

Heads of a group share q and k: tensors of a slab are ``[B, N, G, H / G, C, ...]``, N chunks of C tokens; those of q and
k have 1 in the place of ``H / G``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..state import FusedForward
from ..transition import exclusive_chunk_scan
from .chunked import Chunked, _chunks, _documents, _slabs
from .settings import LEAST_LOG_DECAY, is_gated, state_dtype


class GatedChunked(Chunked):
    """`Chunked`, which also takes the logarithm of each token's decay, ``[B, L, H]``, as a fourth input."""

    def takes_groups(self, inputs: tuple[Tensor, ...]) -> bool:
        return is_gated(inputs)

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        if not is_gated(inputs):
            return super().local_transition(inputs, segments)
        state = self._zeros(inputs)
        for slab in self._slabs(inputs, segments):
            state = slab.states(state)[:, -1]
        return self.decay_over(inputs, state), state.flatten(1, 2).to(state_dtype(*inputs))

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not is_gated(inputs):
            return super().apply_state(inputs, segments, initial)
        y, saved, _ = self._forward(inputs, segments, initial)
        return y, saved

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        if not is_gated(inputs) or inputs[0].shape[1] == 1:
            return super().fused_forward(inputs, segments, initial)
        dtype = state_dtype(*inputs)
        initial = (self._zeros(inputs).flatten(1, 2) if initial is None else initial).to(dtype)
        y, saved, final = self._forward(inputs, segments, initial)
        return FusedForward(initial, y, saved, self.decay_over(inputs, initial), final)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        if not is_gated(inputs):
            return super().incoming_state_grad(inputs, segments, initial, saved, grad)
        state = self._zeros(inputs)
        for slab in self._slabs(inputs, segments, self._upstream(grad, saved), reverse=True):
            state = slab.state_grads(state)[:, 0]
        return state.flatten(1, 2).to(initial.dtype)

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        if not is_gated(inputs):
            return super().input_grads(inputs, segments, initial, final_grad, saved, grad)
        state, entering = self._grouped(initial, inputs), []
        for slab in self._slabs(inputs, segments):
            entering.append(state.to(initial.dtype))
            state = slab.states(state)[:, -1]
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        state = self._grouped(final_grad, inputs)
        for slab in self._slabs(inputs, segments, self._upstream(grad, saved), reverse=True):
            parts, state = slab.gradients(entering.pop(), state)
            for whole, part in zip(grads, parts, strict=True):
                whole[:, slab.tokens] = part[..., : whole.shape[-1]] if whole is grads[2] else part
        return grads

    def _forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """y, what is saved for backward, and the final state ``[B, H, K, V]``."""
        v = inputs[2]
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        divisor = initial.new_empty(*v.shape[:-1], 1) if self.normalize else None
        state = self._grouped(initial, inputs)
        for slab in self._slabs(inputs, segments):
            out, state = slab.outputs(state)
            y[:, slab.tokens] = self._scaled(out, None if divisor is None else divisor[:, slab.tokens])
        return y, () if divisor is None else (y, divisor), state.flatten(1, 2).to(initial.dtype)

    def _slabs(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        upstream: Tensor | None = None,
        *,
        reverse: bool = False,
    ) -> Iterator[_Slab]:
        """The slabs of a shard, with the gradient of ``q S``, ``[B, L, H, V]``, where it is given."""
        q, k, v, log_decay = inputs
        dtype, values, groups = state_dtype(*inputs), self.values(v), q.shape[2]
        slabs = list(_slabs(k, values))
        for tokens, chunk_len in reversed(slabs) if reverse else slabs:
            keys, queries = (_chunks(x[:, tokens], chunk_len, dtype).unsqueeze(3) for x in (k, q))
            rows = _chunks(values[:, tokens], chunk_len, dtype).unflatten(2, (groups, -1))
            gates = log_decay[:, tokens].unsqueeze(-1)
            gates = _chunks(gates, chunk_len, torch.float64).unflatten(2, (groups, -1)).squeeze(-1)
            total = gates.clamp(min=LEAST_LOG_DECAY).cumsum(-1)
            grads = None
            if upstream is not None:
                grads = _chunks(upstream[:, tokens], chunk_len, dtype).unflatten(2, (groups, -1))
            since, until, over = total.exp(), (total[..., -1:] - total).exp(), total[..., -1:].exp()
            seen = continues = continues_back = None
            if segments is not None:
                documents, continues = _documents(segments, tokens, chunk_len, reverse=False)
                _, continues_back = _documents(segments, tokens, chunk_len, reverse=True)
                since = since * documents.head[:, :, None, None]
                until = until * documents.tail[:, :, None, None]
                over = over * documents.whole[:, :, None, None, None]
                seen = documents.same_document()[:, :, None, None]
            since, until = (x.to(dtype).unsqueeze(-1) for x in (since, until))
            over = over.unsqueeze(-1)
            yield _Slab(tokens, queries, keys, rows, grads, total, since, until, over, seen, continues, continues_back)

    def _zeros(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """A state of zeros, ``[B, G, H / G, K, V]``."""
        q, _, v, _ = inputs
        batch, _, groups, width = q.shape
        sizes = batch, groups, v.shape[2] // groups, width, v.shape[-1] + self.normalize
        return v.new_zeros(sizes, dtype=torch.float64)

    def _grouped(self, state: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """``[B, H, K, V]`` -> ``[B, G, H / G, K, V]``."""
        return state.unflatten(1, (inputs[0].shape[2], -1))


@dataclass(frozen=True)
class _Slab:
    """Consecutive chunks, the weights between their tokens, and what is computed of them.

    Attributes:
        tokens: of the shard.
        q, k, v: ``[..., C, K]`` and ``[..., C, V]``.
        upstream: the gradient of ``q S``, as v, or None.
        total: ``[..., C]`` fp64, the log of the decay from before the chunk to each token.
        since: ``[..., C, 1]``, of the state before the chunk at each token.
        until: ``[..., C, 1]``, of each token in the state after the chunk.
        over: ``[..., 1, 1]`` fp64, of the state before the chunk in the state after it.
        seen: ``[..., C, C]`` bool, whether tokens are of one document, or None.
        continues, continues_back: ``[B, N]`` bool, whether the document goes on from the chunk before, from the chunk
            after; None for always.
    """

    tokens: slice
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor | None
    total: Tensor
    since: Tensor
    until: Tensor
    over: Tensor
    seen: Tensor | None
    continues: Tensor | None
    continues_back: Tensor | None

    def states(self, initial: Tensor) -> Tensor:
        """The state before each chunk and after the last, ``[B, N + 1, G, H / G, K, V]`` fp64."""
        return exclusive_chunk_scan(self.over, (self.k * self.until).mT @ self.v, initial, self.continues)

    def state_grads(self, final: Tensor) -> Tensor:
        """The gradient of the state before the first chunk and after each chunk, as `states`."""
        assert self.upstream is not None
        own = (self.q * self.since).mT @ self.upstream
        return exclusive_chunk_scan(self.over, own, final, self.continues_back, reverse=True)

    def outputs(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """``q S`` of each token, ``[B, tokens, H, V]``, and the state after the slab."""
        states = self.states(initial)
        out = (self.q @ states[:, :-1].to(self.q.dtype)).mul_(self.since)
        out += (self.q @ self.k.mT * self._pairs()) @ self.v
        return _tokens(out), states[:, -1]

    def gradients(self, initial: Tensor, final: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Those of q, k, v and log_decay, ``[B, tokens, ...]``, and that of the state before the slab.

        Args:
            initial: the state before the slab, ``[B, G, H / G, K, V]``.
            final: the gradient of the state after it.
        """
        q, k, v, upstream = self.q, self.k, self.v, self.upstream
        assert upstream is not None
        grads = self.state_grads(final)
        before, after = (x.to(q.dtype) for x in (self.states(initial)[:, :-1], grads[:, 1:]))
        pairs = self._pairs()
        weights, products = q @ k.mT * pairs, upstream @ v.mT
        inside = products * pairs
        from_state = (upstream @ before.mT).mul_(self.since)
        to_state = (v @ after.mT).mul_(self.until)
        dq, dk = from_state + inside @ k, to_state + inside.mT @ q
        dv = (k @ after).mul_(self.until) + weights.mT @ upstream
        # A token's decay weighs all that passes it: from earlier tokens and the state before to later ones and the
        # state after. There is no difference of large sums in this.
        passing = F.pad((weights * products)[..., :-1].cumsum(-1), (1, 0)).tril_().sum(-2)
        passing += (from_state * q).sum(-1).flip(-1).cumsum(-1).flip(-1)
        passing += F.pad((to_state * k).sum(-1)[..., :-1].cumsum(-1), (1, 0))
        passing += (before * after).sum((-2, -1)).mul_(self.over.flatten(-3).to(q.dtype)).unsqueeze(-1)
        dg = _tokens(passing.unsqueeze(-1)).squeeze(-1)
        return (_tokens(dq.sum(3, keepdim=True)), _tokens(dk.sum(3, keepdim=True)), _tokens(dv), dg), grads[:, 0]

    def _pairs(self) -> Tensor:
        """``[..., C, C]``, of token j (column) in the output of token i (row). Of differences, those <= 0 alone."""
        between = (self.total.unsqueeze(-1) - self.total.unsqueeze(-2)).to(self.q.dtype)
        position = torch.arange(between.shape[-1], device=between.device)
        unseen = position.unsqueeze(-1) < position
        if self.seen is not None:
            unseen = unseen | ~self.seen
        return between.masked_fill_(unseen, -torch.inf).exp_()


def _tokens(x: Tensor) -> Tensor:
    """``[B, N, G, H / G, C, n]`` -> ``[B, tokens, H, n]``."""
    return x.flatten(2, 3).transpose(2, 3).flatten(1, 2)
