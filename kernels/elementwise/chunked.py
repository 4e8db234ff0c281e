"""Element-wise attention in portable PyTorch: linear time, hand-written adjoints, ``O(L D)`` memory.

Axes: B batch, L tokens, D channels, t order, N blocks of C tokens, and 2 for the pair of sums, ``(S, Z)`` forward and
their gradients ``(R, U)`` backward. README.md beside this file has the formulas.

Everything here is one operation used in both directions: for every token, the sum of terms over the tokens that
it may see (forward) or that may see it (backward). Within a block that is a product with a mask ``[C, C]``; what
lies outside the block enters as one state from the left, from the right, or from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chunks import Documents, from_chunks, to_chunks
from ..scan import StatefulOp, exclusive_chunk_scan
from .reference import DEN_FLOOR, GRAD_LIMIT, Q_LIMIT, finite, state_dtype

BLOCK_LEN = 64

# Blocks are worked on in slabs of about so many elements of [B, L, D]: temporaries stay in the cache of a CPU, and
# small beside the inputs on a GPU.
SLAB_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


@dataclass(frozen=True)
class Chunked(StatefulOp):
    """The EA-series as two passes and their adjoints; inputs ``(q, k, v)``, each ``[B, L, D]`` of one dtype.

    The state is ``(S, Z)``, ``[B, 2, t+1, D]`` with ``A = 1``. It and all sums are fp32 (fp64 for fp64 inputs);
    the sums of blocks are added in fp64. The guards are those of `reference.reference_elementwise_attention`.

    Attributes:
        order: the highest power t, even.
        causal: whether a token sees only the tokens before it and itself, or all.
    """

    order: int = 6
    causal: bool = True

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        cut = _Cut.of(inputs[0])
        if inputs[0].shape[1] == 1:
            state = self._single(cut, inputs)
            state = state if self.causal else state.expand(2, -1, -1, -1, -1)
        else:
            ends = None if segments is None else [segments == segments[:, -1:], segments == segments[:, :1]]
            state = self._ends(cut, self._keys(cut, inputs), ends)
        return state.new_ones(1, 1, 1, 1), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        cut = _Cut.of(inputs[0])
        if inputs[0].shape[1] == 1:
            return self._attend_single(cut, inputs, past)
        left, right = (past, None) if self.causal else past
        seen = _Sums.of(cut, self._keys(cut, inputs), left, right, segments)
        y, den = (torch.empty_like(inputs[0], dtype=cut.dtype) for _ in range(2))
        for slab in cut.slabs:
            q = cut.blocks(inputs[0], slab).clamp(-Q_LIMIT, Q_LIMIT)
            total: Tensor | None = None
            for power, pair in zip(_query_powers(q, self.order), seen.at(slab)):
                # At n = 0 the power is 1.
                total = pair.expand(*q.shape[:3], 2, -1).clone() if total is None else total.addcmul_(pair, power)
            assert total is not None
            num, bottom = (from_chunks(x, slab.num_tokens) for x in total.unbind(-2))
            den[:, slab.tokens] = bottom
            y[:, slab.tokens] = finite(num / bottom.clamp(min=DEN_FLOOR), cut.dtype)
        return y if y.dtype == inputs[0].dtype else finite(y, inputs[0].dtype), (y, den)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        cut = _Cut.of(inputs[0])
        ends = None if segments is None else [segments == segments[:, :1], segments == segments[:, -1:]]
        return self._ends(cut, self._queries(cut, inputs, saved, grad), ends)

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        future: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        q, k, v = inputs
        cut = _Cut.of(q)
        from_left, from_right = (past, None) if self.causal else past
        seen = _Sums.of(cut, self._keys(cut, inputs), from_left, from_right, segments)
        to_left, to_right = (None, future) if self.causal else future.flip(0)
        seeing = _Sums.of(cut, self._queries(cut, inputs, saved, grad), to_left, to_right, segments)
        grads = tuple(torch.empty_like(x) for x in inputs)
        for slab in cut.slabs:
            parts = (
                self._query_grad(cut, slab, q, seen, saved, grad),
                *self._key_value_grad(cut, slab, k, v, seeing),
            )
            for whole, part in zip(grads, parts):
                whole[:, slab.tokens] = finite(from_chunks(part, slab.num_tokens), whole.dtype)
        return grads

    def _single(self, cut: _Cut, inputs: tuple[Tensor, ...]) -> Tensor:
        """What the only token of a piece gives, ``[B, 2, t+1, D]``: all orders at once, for decoding."""
        k, v = (x.to(cut.dtype) for x in inputs[1:])
        powers = torch.cat([torch.exp(-k * k), k.expand(-1, self.order, -1)], dim=1).cumprod(dim=1)
        return torch.stack([powers * v, powers], dim=1)

    def _attend_single(self, cut: _Cut, inputs: tuple[Tensor, ...], past: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`apply_state` for the only token of a piece."""
        sums = self._single(cut, inputs) + (past if self.causal else past[0] + past[1])
        q = inputs[0].to(cut.dtype).clamp(-Q_LIMIT, Q_LIMIT)
        ratios = 2 / torch.arange(1, self.order + 1, dtype=cut.dtype, device=cut.device)
        powers = torch.cat([torch.ones_like(q), q * ratios.unsqueeze(-1)], dim=1).cumprod(dim=1)
        num, den = (sums * powers.unsqueeze(1)).sum(dim=2, keepdim=True).unbind(1)
        y = finite(num / den.clamp(min=DEN_FLOOR), cut.dtype)
        return y if y.dtype == inputs[0].dtype else finite(y, inputs[0].dtype), (y, den)

    def _query_grad(
        self, cut: _Cut, slab: _Slab, q: Tensor, seen: _Sums, saved: tuple[Tensor, ...], grad: Tensor
    ) -> Tensor:
        """``dq_i = a_i sum_n n c_n q_i^(n-1) (S_n - y_i Z_n)``; note ``n c_n = 2 c_(n-1)``."""
        raw = cut.blocks(q, slab)
        q = raw.clamp(-Q_LIMIT, Q_LIMIT)
        a, y = _upstream(cut, slab, saved, grad)
        total = torch.zeros_like(q).unsqueeze(-2).repeat_interleave(2, dim=-2)
        for power, pair in zip(_query_powers(q, self.order), seen.at(slab, first=1)):
            total.addcmul_(pair, power)
        top, bottom = total.unbind(-2)
        dq = (2 * a * top.addcmul(y, bottom, value=-1)).clamp_(-GRAD_LIMIT, GRAD_LIMIT)
        return dq.masked_fill_(raw.abs() > Q_LIMIT, 0)

    def _key_value_grad(self, cut: _Cut, slab: _Slab, k: Tensor, v: Tensor, seeing: _Sums) -> tuple[Tensor, Tensor]:
        """``dk_j = w_j sum_n (n k_j^(n-1) - 2 k_j^(n+1)) (v_j R_n + U_n)`` and ``dv_j = w_j sum_n k_j^n R_n``."""
        k, v = cut.blocks(k, slab), cut.blocks(v, slab)
        power = torch.exp(-k * k).unsqueeze(-2)  # k^n w
        rising: Tensor | None = None  # sum of k^n w (R, U)
        falling = torch.zeros_like(k).unsqueeze(-2).repeat_interleave(2, dim=-2)  # sum of n k^(n-1) w (R, U)
        for n, pair in enumerate(seeing.at(slab)):
            if rising is None:
                rising = pair * power
                continue
            falling.addcmul_(pair, power, value=n)
            power.mul_(k.unsqueeze(-2))
            rising.addcmul_(pair, power)
        assert rising is not None
        r, u = (falling - 2 * k.unsqueeze(-2) * rising).unbind(-2)
        return u.addcmul(v, r), rising.select(-2, 0)

    def _keys(self, cut: _Cut, inputs: tuple[Tensor, ...]) -> Terms:
        """What a token gives: ``k^n w (v, 1)``."""

        def terms(slab: _Slab) -> Iterator[Tensor]:
            k, v = (x[:, slab.tokens].to(cut.dtype) for x in inputs[1:])
            weight = torch.exp(-k * k)
            # Filled up after the exponential: a token that is not there has the weight 0.
            x = to_chunks(torch.stack([weight * v, weight], dim=-2), cut.block_len)
            factor = to_chunks(k, cut.block_len).unsqueeze(-2)
            yield x
            for _ in range(self.order):
                yield x.mul_(factor)

        return terms

    def _queries(self, cut: _Cut, inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...], grad: Tensor) -> Terms:
        """What a token gives backward: ``c_n q^n a (1, -y)``."""

        def terms(slab: _Slab) -> Iterator[Tensor]:
            q = cut.blocks(inputs[0], slab).clamp(-Q_LIMIT, Q_LIMIT)
            a, y = _upstream(cut, slab, saved, grad)
            minus_y = -y
            pair = a.new_empty(*a.shape[:-1], 2, a.shape[-1])
            r, u = pair.unbind(-2)
            for power in _query_powers(q, self.order):
                torch.mul(power.squeeze(-2), a, out=r)
                torch.mul(r.clamp_(-GRAD_LIMIT, GRAD_LIMIT), minus_y, out=u)
                u.clamp_(-GRAD_LIMIT, GRAD_LIMIT)
                yield pair

        return terms

    def _ends(self, cut: _Cut, terms: Terms, ends: list[Tensor] | None) -> Tensor:
        """The sums that cross the piece's edges: of the document at each of its ``ends``, or of all tokens.

        ``ends`` are masks ``[B, L]``: the end across which a causal sum leaves, then the other one.
        """
        if ends is not None:
            masks = torch.stack(ends[:1] if self.causal else ends, dim=-1).to(cut.dtype)  # [B, L, ends]
            state = cut.totals(terms, self.order, to_chunks(masks, cut.block_len).mT)
        else:
            state = cut.totals(terms, self.order)
        state = state.sum(dim=1, dtype=torch.float64).to(cut.dtype).movedim(1, 0)
        return state[0] if self.causal else state.expand(2, *state.shape[1:])


@dataclass(frozen=True)
class _Slab:
    """Some neighbouring blocks and the tokens in them."""

    blocks: slice
    tokens: slice

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start


Terms = Callable[[_Slab], Iterator[Tensor]]
"""For n = 0..t in turn, what every token of a slab adds to the pair of sums, ``[B, blocks, C, 2, D]``; the next one may
overwrite it."""


@dataclass(frozen=True)
class _Cut:
    """How a piece ``[B, L, D]`` is cut into blocks and slabs, and the dtype of its sums."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    block_len: int
    num_blocks: int
    slabs: list[_Slab]

    @classmethod
    def of(cls, x: Tensor) -> _Cut:
        batch, length, width = x.shape
        block_len = max(1, min(BLOCK_LEN, length))
        num_blocks = -(-length // block_len)
        step = max(1, SLAB_ELEMENTS.get(x.device.type, 2**18) // max(1, batch * block_len * width))
        slabs = [
            _Slab(
                slice(first, min(first + step, num_blocks)),
                slice(first * block_len, min((first + step) * block_len, length)),
            )
            for first in range(0, num_blocks, step)
        ]
        return cls(x.shape, state_dtype(x.dtype), x.device, block_len, num_blocks, slabs)

    def blocks(self, x: Tensor, slab: _Slab) -> Tensor:
        """A slab of ``x [B, L, D]`` as ``[B, blocks, C, D]`` in the dtype of the sums, filled up with zeros."""
        return to_chunks(x[:, slab.tokens].to(self.dtype), self.block_len)

    def totals(self, terms: Terms, order: int, weights: Tensor | None = None) -> Tensor:
        """Every block's sum of terms ``[B, N, W, 2, t+1, D]``, its tokens weighted by ``weights [B, N, W, C]``."""
        batch, _, width = self.shape
        num = 1 if weights is None else weights.shape[2]
        out = torch.empty(batch, self.num_blocks, num, 2, order + 1, width, dtype=self.dtype, device=self.device)
        for slab in self.slabs:
            for n, x in enumerate(terms(slab)):
                if weights is None:
                    out[:, slab.blocks, 0, :, n] = x.sum(dim=2)
                else:
                    out[:, slab.blocks, :, :, n] = (weights[:, slab.blocks] @ x.flatten(-2)).unflatten(-1, (2, -1))
        return out


@dataclass(frozen=True)
class _Sums:
    """For every token, the sums of its own terms and those of the tokens on its left, on its right, or on both sides.

    Attributes:
        cut, terms: what is summed.
        left: ``[B, N, 2, t+1, D]``, the sums that enter each block from the left; None if none do.
        right: the same from the right.
        everything: ``[B, 1, 2, t+1, D]``, the only sum there is, where every token is summed for every token.
        mask: ``[C, C]``, whose terms (columns) a token (row) takes within its block.
        documents: the blocks' documents, or None for one document.
    """

    cut: _Cut
    terms: Terms
    left: Tensor | None
    right: Tensor | None
    everything: Tensor | None
    mask: Tensor
    documents: Documents | None

    @classmethod
    def of(cls, cut: _Cut, terms: Terms, left: Tensor | None, right: Tensor | None, segments: Tensor | None) -> _Sums:
        """Sums over the tokens of a piece and what enters it, ``left`` and ``right``: ``[B, 2, t+1, D]`` or None."""
        mask = torch.ones(cut.block_len, cut.block_len, dtype=cut.dtype, device=cut.device)
        everything = documents = None
        start = left if left is not None else right
        assert start is not None
        order = start.shape[2] - 1
        if left is not None and right is not None:
            if segments is None:
                everything = cut.totals(terms, order)[:, :, 0].sum(dim=1, dtype=torch.float64) + left + right
                everything = everything.to(cut.dtype).unsqueeze(1)
                return cls(cut, terms, None, None, everything, mask, None)
        else:
            mask = mask.tril_() if right is None else mask.triu_()
        if segments is not None and segments.shape[1]:
            documents = Documents.of(segments, cut.block_len)
        if left is not None:
            left = cls._entering(cut, terms, order, left, documents, reverse=False)
        if right is not None:
            right = cls._entering(cut, terms, order, right, documents, reverse=True)
        return cls(cut, terms, left, right, everything, mask, documents)

    @staticmethod
    def _entering(
        cut: _Cut, terms: Terms, order: int, start: Tensor, documents: Documents | None, *, reverse: bool
    ) -> Tensor:
        """``[B, N, 2, t+1, D]``: what enters each block from the left, or from the right if ``reverse``."""
        if cut.num_blocks <= 1:
            return start.unsqueeze(1)
        if documents is None:
            totals = cut.totals(terms, order)[:, :, 0]
            states = exclusive_chunk_scan(None, totals, start, reverse=reverse)
        else:
            leaving, gate = documents.tail, documents.continues
            if reverse:
                leaving = documents.head
                gate = torch.cat([gate[:, 1:], torch.ones_like(gate[:, :1])], dim=1)
            totals = cut.totals(terms, order, leaving.to(cut.dtype).unsqueeze(2))[:, :, 0]
            decay = documents.whole[:, :, None, None, None]
            states = exclusive_chunk_scan(decay, totals, start, gate, reverse=reverse)
        return (states[:, 1:] if reverse else states[:, :-1]).to(cut.dtype)

    def at(self, slab: _Slab, first: int = 0) -> Iterator[Tensor]:
        """For n = ``first``..t in turn, the sums of a slab's tokens: ``[B, blocks or 1, C or 1, 2, D]``."""
        if self.everything is not None:
            for n in range(first, self.everything.shape[3]):
                yield self.everything[:, :, :, n].unsqueeze(2)
            return
        mask, head, tail = self.mask, None, None
        if self.documents is not None:
            ids = self.documents.ids[:, slab.blocks]
            mask = (ids.unsqueeze(-1) == ids.unsqueeze(-2)) * mask
            head, tail = (
                x[:, slab.blocks, :, None, None].to(mask.dtype) for x in (self.documents.head, self.documents.tail)
            )
        for n, x in enumerate(self.terms(slab)):
            if n < first:
                continue
            outside: Tensor | None = None
            for states, reached in ((self.left, head), (self.right, tail)):
                if states is not None:
                    state = states[:, slab.blocks, :, n].unsqueeze(2)
                    state = state if reached is None else state * reached
                    outside = state if outside is None else outside + state
            assert outside is not None
            yield _masked_sum(mask, x, outside)


def _masked_sum(mask: Tensor, x: Tensor, outside: Tensor) -> Tensor:
    """``mask [.., C, C]`` times ``x [B, N, C, 2, D]``, plus ``outside [B, N, C or 1, 2, D]``."""
    if x.shape[2] == 1:
        return x + outside
    inside = torch.baddbmm(
        outside.flatten(-2).flatten(0, 1),
        mask.expand(*x.shape[:3], -1).flatten(0, 1),
        x.flatten(-2).flatten(0, 1),
    )
    return inside.view(x.shape)


def _query_powers(q: Tensor, order: int) -> Iterator[Tensor]:
    """``c_n q^n`` for n = 0..t in turn, ``[.., 1, D]``; the next one overwrites it."""
    power = torch.ones_like(q).unsqueeze(-2)
    for n in range(order + 1):
        yield power
        power.mul_(q.unsqueeze(-2)).mul_(2 / (n + 1))


def _upstream(cut: _Cut, slab: _Slab, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor]:
    """``a = g / den``, and ``y`` where the denominator has a gradient (0 where it is floored)."""
    y, den, grad = (cut.blocks(x, slab) for x in (*saved, grad))
    return grad / den.clamp(min=DEN_FLOOR), y.masked_fill(den < DEN_FLOOR, 0)
