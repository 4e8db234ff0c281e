"""Element-wise attention in portable PyTorch: linear time, hand-written adjoints, ``O(L D)`` memory.

Axes: B batch, L tokens, D channels, t order, N chunks of C tokens, and 2 for the pair of sums, ``(S, Z)`` forward and
their gradients ``(R, U)`` backward. README.md beside this file has the formulas.

Both directions are one operation: for every token, a sum of terms over the tokens that it sees (forward) or that see it
(backward). Within a chunk it is a product with a mask ``[C, C]``; tokens outside the chunk contribute one state from
the left, from the right, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..backends import is_traced
from ..chunks import Documents, from_chunks, to_chunks
from ..state import StatefulOp
from ..transition import exclusive_chunk_scan
from .reference import DEN_FLOOR, GRAD_LIMIT, Q_LIMIT, exposed, finite, state_dtype

CHUNK_LEN = 64

# Elements of [B, L, D] in a slab, the chunks processed at once: temporaries stay in the cache of a CPU, and small
# relative to the inputs on a GPU.
SLAB_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


@dataclass(frozen=True)
class Chunked(StatefulOp):
    """The EA-series as two passes and their adjoints; inputs ``(q, k, v)``, each ``[B, L, D]`` of one dtype.

    The state is ``(S, Z)``, ``[B, 2, t+1, D]`` with ``A = 1``. It and all sums are fp32 (fp64 for fp64 inputs);
    the sums over chunks are added in fp64. The guards are those of `reference.reference_elementwise_attention`.

    Attributes:
        order: the highest power t, even.
        causal: whether a token sees only the tokens before it and itself, or all.
    """

    order: int = 6
    causal: bool = True
    plain_sum = True

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        if segments is not None and _is_spoilt(*inputs):
            state = self._leaving(segments, lambda one: self.local_transition(one.of(*inputs), None)[1], adjoint=False)
            return state.new_ones(1, 1, 1, 1), state
        layout = _Layout.of(inputs[0])
        if inputs[0].shape[1] == 1:
            state = self._single(layout, inputs)
            state = state if self.causal else state.expand(2, -1, -1, -1, -1)
        else:
            ends = None if segments is None else [segments == segments[:, -1:], segments == segments[:, :1]]
            state = self._ends(layout, self._keys(layout, inputs), ends)
        return state.new_ones(1, 1, 1, 1), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if segments is not None and _is_spoilt(*inputs, initial):
            y, *saved = (torch.empty_like(inputs[0], dtype=x) for x in (inputs[0].dtype, *[initial.dtype] * 2))
            for one in _documents(segments):
                part, kept = self.apply_state(one.of(*inputs), None, self._entering(initial, one, adjoint=False))
                one.put((y, *saved), (part, *kept))
            return y, tuple(saved)
        layout = _Layout.of(inputs[0])
        if inputs[0].shape[1] == 1:
            return self._apply_single(layout, inputs, initial)
        left, right = (initial, None) if self.causal else initial
        key_sums = _Sums.of(layout, self._keys(layout, inputs), left, right, segments)
        y, den = (torch.empty_like(inputs[0], dtype=layout.dtype) for _ in range(2))
        for slab in layout.slabs:
            q = layout.chunks(inputs[0], slab).clamp(-Q_LIMIT, Q_LIMIT)
            total: Tensor | None = None
            for power, pair in zip(_query_powers(q, self.order), key_sums.at(slab)):
                # At n = 0 the power is 1.
                total = pair.expand(*q.shape[:3], 2, -1).clone() if total is None else total.addcmul_(pair, power)
            assert total is not None
            num, bottom = (from_chunks(x, slab.num_tokens) for x in total.unbind(-2))
            den[:, slab.tokens] = bottom
            y[:, slab.tokens] = finite(num / bottom.clamp(min=DEN_FLOOR), layout.dtype)
        return y if y.dtype == inputs[0].dtype else finite(y, inputs[0].dtype), (y, den)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        if segments is not None and _is_spoilt(*inputs, *saved, grad):

            def of_one(one: _Document) -> Tensor:
                start = self._entering(initial, one, adjoint=False)
                return self.incoming_state_grad(one.of(*inputs), None, start, one.of(*saved), *one.of(grad))

            return self._leaving(segments, of_one, adjoint=True)
        layout = _Layout.of(inputs[0])
        ends = None if segments is None else [segments == segments[:, :1], segments == segments[:, -1:]]
        return self._ends(layout, self._queries(layout, inputs, saved, grad), ends)

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        q, k, v = inputs
        if segments is not None and _is_spoilt(*inputs, initial, final_grad, *saved, grad):
            grads = tuple(torch.empty_like(x) for x in inputs)
            for one in _documents(segments):
                ends = self._entering(initial, one, adjoint=False), self._entering(final_grad, one, adjoint=True)
                one.put(grads, self.input_grads(one.of(*inputs), None, *ends, one.of(*saved), *one.of(grad)))
            return grads
        layout = _Layout.of(q)
        from_left, from_right = (initial, None) if self.causal else initial
        key_sums = _Sums.of(layout, self._keys(layout, inputs), from_left, from_right, segments)
        to_left, to_right = (None, final_grad) if self.causal else final_grad.flip(0)
        query_sums = _Sums.of(layout, self._queries(layout, inputs, saved, grad), to_left, to_right, segments)
        grads = tuple(torch.empty_like(x) for x in inputs)
        for slab in layout.slabs:
            parts = (
                self._query_grad(layout, slab, q, key_sums, saved, grad),
                *self._key_value_grad(layout, slab, k, v, query_sums),
            )
            for whole, part in zip(grads, parts):
                whole[:, slab.tokens] = finite(from_chunks(part, slab.num_tokens), whole.dtype)
        return grads

    def _entering(self, state: Tensor, one: _Document, *, adjoint: bool) -> Tensor:
        """What of the shard's ``state`` enters a document; of the gradient of its final state if ``adjoint``."""
        sides = (one.is_last, one.is_first) if adjoint else (one.is_first, one.is_last)
        states = [
            x[one.row] if side else torch.zeros_like(x[one.row])
            for x, side in zip((state,) if self.causal else state, sides)
        ]
        return states[0] if self.causal else torch.stack(states)

    def _leaving(self, segments: Tensor, of_one: Callable[[_Document], Tensor], *, adjoint: bool) -> Tensor:
        """The shard's final state, given each document's; the gradient of its initial state if ``adjoint``."""
        first, last = ([one for one in _documents(segments) if getattr(one, end)] for end in ("is_first", "is_last"))
        here, there = (first, last) if adjoint else (last, first)
        if self.causal:
            return torch.cat([of_one(one) for one in here])
        return torch.stack([torch.cat([of_one(one)[i] for one in ends]) for i, ends in enumerate((here, there))])

    def _single(self, layout: _Layout, inputs: tuple[Tensor, ...]) -> Tensor:
        """The terms of a shard of one token, ``[B, 2, t+1, D]``: all orders at once, for decoding."""
        k, v = (exposed(x.to(layout.dtype)) for x in inputs[1:])
        powers = torch.cat([torch.exp(-k * k), k.expand(-1, self.order, -1)], dim=1).cumprod(dim=1)
        return torch.stack([powers * v, powers], dim=1)

    def _apply_single(
        self, layout: _Layout, inputs: tuple[Tensor, ...], initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`apply_state` of a shard of one token."""
        sums = self._single(layout, inputs) + exposed(initial if self.causal else initial[0] + initial[1])
        q = exposed(inputs[0].to(layout.dtype)).clamp(-Q_LIMIT, Q_LIMIT)
        ratios = 2 / torch.arange(1, self.order + 1, dtype=layout.dtype, device=layout.device)
        powers = torch.cat([torch.ones_like(q), q * ratios.unsqueeze(-1)], dim=1).cumprod(dim=1)
        num, den = (sums * powers.unsqueeze(1)).sum(dim=2, keepdim=True).unbind(1)
        y = finite(num / den.clamp(min=DEN_FLOOR), layout.dtype)
        return y if y.dtype == inputs[0].dtype else finite(y, inputs[0].dtype), (y, den)

    def _query_grad(
        self, layout: _Layout, slab: _Slab, q: Tensor, key_sums: _Sums, saved: tuple[Tensor, ...], grad: Tensor
    ) -> Tensor:
        """``dq_i = a_i sum_n n c_n q_i^(n-1) (S_n - y_i Z_n)``; note ``n c_n = 2 c_(n-1)``."""
        raw = layout.chunks(q, slab)
        q = raw.clamp(-Q_LIMIT, Q_LIMIT)
        a, y = _upstream(layout, slab, saved, grad)
        total = torch.zeros_like(q).unsqueeze(-2).repeat_interleave(2, dim=-2)
        for power, pair in zip(_query_powers(q, self.order), key_sums.at(slab, first=1)):
            total.addcmul_(pair, power)
        top, bottom = total.unbind(-2)
        dq = (2 * a * top.addcmul(y, bottom, value=-1)).clamp_(-GRAD_LIMIT, GRAD_LIMIT)
        return dq.masked_fill_(raw.abs() > Q_LIMIT, 0)

    def _key_value_grad(
        self, layout: _Layout, slab: _Slab, k: Tensor, v: Tensor, query_sums: _Sums
    ) -> tuple[Tensor, Tensor]:
        """``dk_j = w_j sum_n (n k_j^(n-1) - 2 k_j^(n+1)) (v_j R_n + U_n)`` and ``dv_j = w_j sum_n k_j^n R_n``."""
        k, v = layout.chunks(k, slab), layout.chunks(v, slab)
        power = torch.exp(-k * k).unsqueeze(-2)  # k^n w
        rising: Tensor | None = None  # sum of k^n w (R, U)
        falling = torch.zeros_like(k).unsqueeze(-2).repeat_interleave(2, dim=-2)  # sum of n k^(n-1) w (R, U)
        for n, pair in enumerate(query_sums.at(slab)):
            if rising is None:
                rising = pair * power
                continue
            falling.addcmul_(pair, power, value=n)
            power.mul_(k.unsqueeze(-2))
            rising.addcmul_(pair, power)
        assert rising is not None
        r, u = (falling - 2 * k.unsqueeze(-2) * rising).unbind(-2)
        return u.addcmul(v, r), rising.select(-2, 0)

    def _keys(self, layout: _Layout, inputs: tuple[Tensor, ...]) -> Terms:
        """A token's terms of ``(S_n, Z_n)``: ``k^n w (v, 1)``."""

        def terms(slab: _Slab) -> Iterator[Tensor]:
            k, v = (exposed(x[:, slab.tokens].to(layout.dtype)) for x in inputs[1:])
            weight = torch.exp(-k * k)
            # Padded after the exponential, so that the weight of padding is 0.
            x = to_chunks(torch.stack([weight * v, weight], dim=-2), layout.chunk_len)
            factor = to_chunks(k, layout.chunk_len).unsqueeze(-2)
            yield x
            for _ in range(self.order):
                yield x.mul_(factor)

        return terms

    def _queries(self, layout: _Layout, inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...], grad: Tensor) -> Terms:
        """A token's terms of ``(R_n, U_n)``: ``c_n q^n a (1, -y)``."""

        def terms(slab: _Slab) -> Iterator[Tensor]:
            q = layout.chunks(inputs[0], slab).clamp(-Q_LIMIT, Q_LIMIT)
            a, y = _upstream(layout, slab, saved, grad)
            minus_y = -y
            pair = a.new_empty(*a.shape[:-1], 2, a.shape[-1])
            r, u = pair.unbind(-2)
            for power in _query_powers(q, self.order):
                torch.mul(power.squeeze(-2), a, out=r)
                torch.mul(r.clamp_(-GRAD_LIMIT, GRAD_LIMIT), minus_y, out=u)
                u.clamp_(-GRAD_LIMIT, GRAD_LIMIT)
                yield pair

        return terms

    def _ends(self, layout: _Layout, terms: Terms, ends: list[Tensor] | None) -> Tensor:
        """The shard's final states: sums over the document at each of its ``ends``, or over all tokens.

        ``ends`` are masks ``[B, L]``: of the document at the end where a causal sum leaves, then at the other end.
        """
        if ends is not None:
            masks = torch.stack(ends[:1] if self.causal else ends, dim=-1).to(layout.dtype)  # [B, L, ends]
            state = layout.totals(terms, self.order, to_chunks(masks, layout.chunk_len).mT)
        else:
            state = layout.totals(terms, self.order)
        state = state.sum(dim=1, dtype=torch.float64).to(layout.dtype).movedim(1, 0)
        return state[0] if self.causal else state.expand(2, *state.shape[1:])


@dataclass(frozen=True)
class _Slab:
    """Consecutive chunks, and their tokens."""

    chunks: slice
    tokens: slice

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start


@dataclass(frozen=True)
class _Document:
    """A document's row of the batch and tokens, and whether it is the row's first and its last one."""

    row: slice
    tokens: slice
    is_first: bool
    is_last: bool

    def of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[self.row, self.tokens] for x in tensors)

    def put(self, whole: Iterable[Tensor], parts: Iterable[Tensor | None]) -> None:
        for x, part in zip(whole, parts, strict=True):
            assert part is not None
            x[self.row, self.tokens] = part


def _documents(segments: Tensor) -> Iterator[_Document]:
    """The documents of ``segments [B, L]``, row by row."""
    length = segments.shape[1]
    for row, ids in enumerate(segments):
        starts = [0, *(ids.diff().nonzero().flatten() + 1).tolist(), length]
        for start, stop in pairwise(starts):
            yield _Document(slice(row, row + 1), slice(start, stop), start == 0, stop == length)


def _is_spoilt(*tensors: Tensor) -> bool:
    """Whether any number is not finite: then documents are computed one by one.

    Elsewhere they share products with masks, and 0 times NaN is NaN. A GPU is not waited for: there it spreads.
    """
    return tensors[0].is_cpu and not is_traced(tensors[0]) and not all(x.isfinite().all() for x in tensors)


Terms = Callable[[_Slab], Iterator[Tensor]]
"""Yields for n = 0..t the terms of a slab's tokens, ``[B, chunks, C, 2, D]``; each may overwrite the one before."""


@dataclass(frozen=True)
class _Layout:
    """The chunks and slabs of a shard ``[B, L, D]``, and the dtype of its sums."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    chunk_len: int
    num_chunks: int
    slabs: list[_Slab]

    @classmethod
    def of(cls, x: Tensor) -> _Layout:
        batch, length, width = x.shape
        chunk_len = max(1, min(CHUNK_LEN, length))
        num_chunks = -(-length // chunk_len)
        step = max(1, SLAB_ELEMENTS.get(x.device.type, 2**18) // max(1, batch * chunk_len * width))
        slabs = [
            _Slab(
                slice(first, min(first + step, num_chunks)),
                slice(first * chunk_len, min((first + step) * chunk_len, length)),
            )
            for first in range(0, num_chunks, step)
        ]
        return cls(x.shape, state_dtype(x.dtype), x.device, chunk_len, num_chunks, slabs)

    def chunks(self, x: Tensor, slab: _Slab) -> Tensor:
        """A slab of ``x [B, L, D]``, `exposed`, as ``[B, chunks, C, D]`` in the dtype of the sums, zero-padded."""
        return to_chunks(exposed(x[:, slab.tokens].to(self.dtype)), self.chunk_len)

    def totals(self, terms: Terms, order: int, weights: Tensor | None = None) -> Tensor:
        """Every chunk's sum of terms ``[B, N, W, 2, t+1, D]``, its tokens weighted by ``weights [B, N, W, C]``."""
        batch, _, width = self.shape
        num = 1 if weights is None else weights.shape[2]
        out = torch.empty(batch, self.num_chunks, num, 2, order + 1, width, dtype=self.dtype, device=self.device)
        for slab in self.slabs:
            for n, x in enumerate(terms(slab)):
                if weights is None:
                    out[:, slab.chunks, 0, :, n] = x.sum(dim=2)
                else:
                    out[:, slab.chunks, :, :, n] = (weights[:, slab.chunks] @ x.flatten(-2)).unflatten(-1, (2, -1))
        return out


@dataclass(frozen=True)
class _Sums:
    """For every token, the sum of its own terms and of those to its left, to its right, or on both sides.

    Attributes:
        layout, terms: what is summed.
        left: ``[B, N, 2, t+1, D]``, the state that enters each chunk from the left; None if none does.
        right: the same from the right.
        everything: ``[B, 1, 2, t+1, D]``, the sum over all tokens, where every token has the same; else None.
        mask: ``[C, C]``, 1 where the terms of token j (column) count for token i (row) of the same chunk.
        documents: the chunks' documents, or None for one document.
    """

    layout: _Layout
    terms: Terms
    left: Tensor | None
    right: Tensor | None
    everything: Tensor | None
    mask: Tensor
    documents: Documents | None

    @classmethod
    def of(
        cls, layout: _Layout, terms: Terms, left: Tensor | None, right: Tensor | None, segments: Tensor | None
    ) -> _Sums:
        """Sums over a shard's tokens and the states that enter it, ``left`` and ``right [B, 2, t+1, D]`` or None."""
        mask = torch.ones(layout.chunk_len, layout.chunk_len, dtype=layout.dtype, device=layout.device)
        left, right = (None if x is None else exposed(x) for x in (left, right))
        everything = documents = None
        start = left if left is not None else right
        assert start is not None
        order = start.shape[2] - 1
        if left is not None and right is not None:
            if segments is None:
                everything = layout.totals(terms, order)[:, :, 0].sum(dim=1, dtype=torch.float64) + left + right
                everything = everything.to(layout.dtype).unsqueeze(1)
                return cls(layout, terms, None, None, everything, mask, None)
        else:
            mask = mask.tril_() if right is None else mask.triu_()
        if segments is not None and segments.shape[1]:
            documents = Documents.of(segments, layout.chunk_len)
        if left is not None:
            left = cls._chunk_states(layout, terms, order, left, documents, reverse=False)
        if right is not None:
            right = cls._chunk_states(layout, terms, order, right, documents, reverse=True)
        return cls(layout, terms, left, right, everything, mask, documents)

    @staticmethod
    def _chunk_states(
        layout: _Layout, terms: Terms, order: int, start: Tensor, documents: Documents | None, *, reverse: bool
    ) -> Tensor:
        """The state that enters each chunk from the left, or from the right if ``reverse``: ``[B, N, 2, t+1, D]``."""
        if layout.num_chunks <= 1:
            return start.unsqueeze(1)
        if documents is None:
            totals = layout.totals(terms, order)[:, :, 0]
            states = exclusive_chunk_scan(None, totals, start, reverse=reverse)
        else:
            tail, continues = documents.tail, documents.continues
            if reverse:
                tail = documents.head
                continues = torch.cat([continues[:, 1:], torch.ones_like(continues[:, :1])], dim=1)
            totals = layout.totals(terms, order, tail.to(layout.dtype).unsqueeze(2))[:, :, 0]
            decay = documents.whole[:, :, None, None, None]
            states = exclusive_chunk_scan(decay, totals, start, continues, reverse=reverse)
        return (states[:, 1:] if reverse else states[:, :-1]).to(layout.dtype)

    def at(self, slab: _Slab, first: int = 0) -> Iterator[Tensor]:
        """For n = ``first``..t in turn, the sums of a slab's tokens: ``[B, chunks or 1, C or 1, 2, D]``."""
        if self.everything is not None:
            for n in range(first, self.everything.shape[3]):
                yield self.everything[:, :, :, n].unsqueeze(2)
            return
        mask, head, tail = self.mask, None, None
        if self.documents is not None:
            ids = self.documents.ids[:, slab.chunks]
            mask = (ids.unsqueeze(-1) == ids.unsqueeze(-2)) * mask
            head, tail = (
                x[:, slab.chunks, :, None, None].to(mask.dtype) for x in (self.documents.head, self.documents.tail)
            )
        for n, x in enumerate(self.terms(slab)):
            if n < first:
                continue
            outside: Tensor | None = None
            for states, reached in ((self.left, head), (self.right, tail)):
                if states is not None:
                    state = states[:, slab.chunks, :, n].unsqueeze(2)
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


def _upstream(layout: _Layout, slab: _Slab, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor]:
    """``a = g / den``, and ``y`` where the denominator has a gradient (0 where it is floored)."""
    y, den, grad = (layout.chunks(x, slab) for x in (*saved, grad))
    return grad / den.clamp(min=DEN_FLOOR), y.masked_fill(den < DEN_FLOOR, 0)
