"""The delta rule in portable PyTorch: linear time, chunks of tokens in WY form, a hand-written adjoint.

Inside a chunk everything is a batched matrix product over all chunks of a slab; from one chunk to the next goes the
state alone, through two products. README.md has the formulas. Saved for the backward pass are the states at the
beginnings of slabs; everything else is recomputed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import is_traced
from ..chunks import Documents
from ..state import FusedForward, StatefulOp
from ..transition import Matrix
from .settings import Settings, inverse_norm, log_decays, per_head, state_dtype

MAX_CHUNK = 64  # a power of two
# Elements of a slab's temporaries: few enough for a processor's cache, or enough to keep a GPU busy.
CPU_WORKSPACE, GPU_WORKSPACE = 1 << 22, 1 << 27
Inputs = tuple[Tensor, ...]
Grads = tuple["Tensor | None", ...]


class Chunks:
    """The tokens of a slab in N chunks of C tokens: ``[N, B * H, C, ...]``.

    Attributes:
        tokens: the slice of the shard.
        u, w: ``U = T (beta * V)`` and ``W = T (beta * (E * K))``: the tokens add ``R = U - W S`` to the state S before
            the chunk.
        exact_gates: sum what passes a token for the gradient of its decay, rather than subtract large sums.
    """

    exact_gates: ClassVar[bool] = True

    def __init__(self, op: Settings, inputs: Inputs, segments: Tensor | None, tokens: slice, chunk_len: int) -> None:
        self.op, self.tokens, self.chunk_len, self.inputs = op, tokens, chunk_len, inputs
        self.dtype, self.rows, self.heads = state_dtype(inputs), inputs[2].shape[0], inputs[2].shape[2]
        self.q = self.load(op.features(inputs[0][:, tokens], self.dtype), cut=False).mul_(op.query_scale(inputs[0]))
        self.k = self.load(op.features(inputs[1][:, tokens], self.dtype), cut=False)
        self.v, self.beta = self.load(inputs[2]), self.load(inputs[3].unsqueeze(-1))
        # Sums of logarithms stay in fp64 until their differences are taken: a strong decay must not blur others.
        sums = self.load(log_decays(tuple(x[:, tokens] for x in inputs)), torch.float64, cut=False).cumsum(-2)
        last = sums[..., -1:, :]
        self.from_start, self.to_end = sums.exp().to(self.dtype), (last - sums).exp().to(self.dtype)
        self.decay = last.mT.exp()  # [N, BH, 1 or K, 1], fp64 like the states that it multiplies
        same = None
        if segments is not None:
            documents, continues = _documents(segments, tokens, chunk_len)
            same = self._per_head(documents.same_document()).to(self.dtype)
            head, tail, whole = documents.head & continues, documents.tail, (documents.whole.unsqueeze(-1) & continues)
            self.from_start = self.from_start * self._per_head(head.unsqueeze(-1))
            self.to_end = self.to_end * self._per_head(tail.unsqueeze(-1))
            self.decay = self.decay * self._per_head(whole.unsqueeze(-1))
        self.pairs: _Pairs = (_HeadPairs if sums.shape[-1] == 1 else _ChannelPairs)(sums, same, self.dtype)
        self.key_pairs = self.pairs.products(self.k, self.k).tril_(-1)
        self.t = self.inverse(self.beta * self.key_pairs)
        self.query_from_start, self.key_from_start = self.from_start * self.q, self.from_start * self.k
        self.key_to_end = self.to_end * self.k
        self.u, self.w = self.t @ (self.beta * self.v), self.t @ (self.beta * self.key_from_start)

    @staticmethod
    def inverse(x: Tensor) -> Tensor:
        """``(I + x)^-1`` of strictly lower triangular ``x [..., C, C]``."""
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.linalg.solve_triangular(x, identity.expand_as(x), upper=False, unitriangular=True)

    def load(self, x: Tensor, dtype: torch.dtype | None = None, *, cut: bool = True) -> Tensor:
        """``[B, L, G or H, K]`` -> its slab ``[N, B * H, C, K]``, padded with zeros, which change nothing."""
        x = (x[:, self.tokens] if cut else x).to(dtype or self.dtype)
        x = F.pad(per_head(x, self.heads), (0, 0, 0, 0, 0, -x.shape[1] % self.chunk_len))
        return x.unflatten(1, (-1, self.chunk_len)).permute(1, 0, 3, 2, 4).contiguous().flatten(1, 2)

    def store(self, x: Tensor) -> Tensor:
        """``[N, B * H, C, K]`` -> ``[B, tokens, H, K]``."""
        x = x.unflatten(1, (self.rows, self.heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return x[:, : self.tokens.stop - self.tokens.start]

    def _per_head(self, mask: Tensor) -> Tensor:
        """``[B, N, ...]`` -> ``[N, B * H, ...]``."""
        return mask.transpose(0, 1).repeat_interleave(self.heads, dim=1)

    def pass_state(self, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Move ``state [B * H, K, V]`` (fp64), in place, behind the last chunk.

        Args:
            state: before the first chunk.
            u: `u`, or that of other values.

        Returns:
            The states before all chunks ``[N, B * H, K, V]``, and R ``[N, B * H, C, V]``.
        """
        states, values = u.new_empty(len(u), *state.shape), torch.empty_like(u)
        for n in range(len(u)):
            states[n].copy_(state)
            torch.baddbmm(u[n], self.w[n], states[n], alpha=-1, out=values[n])
            state.mul_(self.decay[n]).add_(torch.bmm(self.key_to_end[n].mT, values[n]))
        return states, values

    def outputs(self, states: Tensor, values: Tensor) -> Tensor:
        """``[B, tokens, H, V]``, of what `pass_state` returned."""
        return self.store(self.query_from_start @ states + self.query_pairs @ values)

    @cached_property
    def query_pairs(self) -> Tensor:
        """P, ``[N, B * H, C, C]``."""
        return self.pairs.products(self.q, self.k)

    def pass_grad(self, state_grad: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Move the gradient ``state_grad [B * H, K, V]`` (fp64), in place, before the first chunk.

        Args:
            state_grad: of the state behind the last chunk.
            grad: of the outputs, ``[N, B * H, C, V]``.

        Returns:
            The gradients of the states behind all chunks ``[N, B * H, K, V]``, and of R.
        """
        value_grads = self.query_pairs.mT @ grad
        own = self.query_from_start.mT @ grad
        state_grads = torch.empty_like(own)
        for n in reversed(range(len(grad))):
            state_grads[n].copy_(state_grad)
            value_grads[n].baddbmm_(self.key_to_end[n], state_grads[n])
            state_grad.mul_(self.decay[n]).add_(own[n].baddbmm_(self.w[n].mT, value_grads[n], alpha=-1))
        return state_grads, value_grads

    def backward(self, state: Tensor, state_grad: Tensor, grad: Tensor) -> list[Tensor]:
        """The gradients of the slab's inputs, each ``[B, tokens, ...]``; `pass_grad` changes ``state_grad``.

        Args:
            state: before the first chunk, in fp64; it is overwritten.
            state_grad, grad: as of `pass_grad`.
        """
        states, values = self.pass_state(state, self.u)
        state_grads, value_grads = self.pass_grad(state_grad, grad)
        written = self.t.mT @ value_grads  # gradient of beta * (v - what the keys read)
        read = written @ states.mT  # minus the gradient of beta * key_from_start
        pair_grad = (written @ values.mT).tril_(-1)  # minus the gradient of beta * key_pairs
        beta_grad = (written * self.v).sum(-1, keepdim=True)
        beta_grad -= (read * self.key_from_start).sum(-1, keepdim=True)
        beta_grad -= (pair_grad * self.key_pairs).sum(-1, keepdim=True)
        minus_beta = -self.beta
        pair_grad.mul_(minus_beta)
        read.mul_(minus_beta)
        # Of keys, as rows of products, which see the decays since a token, and as columns, which see those until it.
        key_rows, key_columns = self.pairs.adjoint(pair_grad, self.k, self.k)
        key_rows.addcmul_(read, self.from_start)
        query_pair_grad, query_read = grad @ values.mT, grad @ states.mT
        queries, columns = self.pairs.adjoint(query_pair_grad, self.q, self.k)
        queries.addcmul_(query_read, self.from_start)
        key_columns += columns
        columns_to_state = (values @ state_grads.mT).mul_(self.to_end)
        key_columns += columns_to_state
        found = [
            self._feature_grad(queries.mul(self.op.query_scale(self.q)), self.inputs[0]),
            self._feature_grad(key_rows + key_columns, self.inputs[1]),
            self.store(written.mul_(self.beta)),
            self.store(beta_grad).squeeze(-1),
        ]
        if len(self.inputs) == 5 and self.inputs[4].dim() == 3 and self.exact_gates:
            # A token's decay weighs all that passes it; no large sums are subtracted.
            between = query_pair_grad.mul_(self.query_pairs).addcmul_(pair_grad, self.key_pairs)
            passing = F.pad(between[..., :-1].cumsum(-1), (1, 0)).tril_().sum(-2)
            from_state = query_read.mul_(self.q).addcmul_(read, self.k).mul_(self.from_start).sum(-1)
            passing += from_state.flip(-1).cumsum(-1).flip(-1)
            passing += F.pad((columns_to_state * self.k).sum(-1)[..., :-1].cumsum(-1), (1, 0))
            passing += self._decay_grad(states, state_grads).sum(-1)
            found.append(self.store(passing.unsqueeze(-1)).squeeze(-1))
        elif len(self.inputs) == 5:
            sums_grad = queries.mul_(self.q).addcmul_(key_rows.sub_(key_columns), self.k)
            at_end = columns_to_state.mul_(self.k).sum(-2, keepdim=True) + self._decay_grad(states, state_grads)
            sums_grad[..., -1:, :] += at_end
            if self.inputs[4].dim() == 3:
                sums_grad = sums_grad.sum(-1, keepdim=True)
            decay_grad = self.store(sums_grad.flip(-2).cumsum(-2).flip(-2))
            found.append(decay_grad if self.inputs[4].dim() == 4 else decay_grad.squeeze(-1))
        return found

    def _decay_grad(self, states: Tensor, state_grads: Tensor) -> Tensor:
        """``[N, B * H, 1, K]``: the gradient of the logarithm of `decay`."""
        return ((states * state_grads).sum(-1, keepdim=True) * self.decay.to(self.dtype)).mT

    def _feature_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of q or k ``[B, tokens, G, K]``, from that of what `Settings.features` makes of it."""
        grad, x = self.store(grad), x[:, self.tokens].to(self.dtype)
        grad = grad.unflatten(2, (x.shape[2], -1)).sum(3)
        if not self.op.normalize_qk:
            return grad
        inverse = inverse_norm(x)
        x = x * inverse
        return inverse * (grad - x * (grad * x).sum(-1, keepdim=True))


class _Pairs(ABC):
    """Decayed products of the tokens of a chunk: ``sum_c exp(G_ic - G_jc) rows_ic columns_jc`` for i >= j, 0 else.

    ``G`` are the sums of the logarithms of the decays, ``sums [N, BH, C, 1 or K]``. Only differences with i >= j are
    exponentiated, which are at most 0.
    """

    @abstractmethod
    def __init__(self, sums: Tensor, same: Tensor | None, dtype: torch.dtype) -> None:
        """``same [N, BH, C, C]``: 1 where two tokens are of the same document; None for always."""

    @abstractmethod
    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``[N, BH, C, C]``, of ``[N, BH, C, K]``."""

    @abstractmethod
    def adjoint(self, grad: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of rows and columns, given that of `products`, of which only i >= j counts."""


class _HeadPairs(_Pairs):
    """One decay a head: a matrix of weights multiplies the products."""

    def __init__(self, sums: Tensor, same: Tensor | None, dtype: torch.dtype) -> None:
        self.weights = (sums - sums.mT).to(dtype).exp_().tril_()
        if same is not None:
            self.weights *= same

    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        return (rows @ columns.mT).mul_(self.weights)

    def adjoint(self, grad: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad * self.weights
        return grad @ columns, grad.mT @ rows


@dataclass
class _Level:
    """Pairs of neighbouring runs of ``size`` tokens, the rows in the later one: ``[N, BH, C / 2 / size, size, K]``.

    Attributes:
        since: decays from the end of the earlier run to each token of the later one.
        until: decays from each token of the earlier run to its end.
    """

    size: int
    since: Tensor
    until: Tensor


class _ChannelPairs(_Pairs):
    """One decay a channel: a product of matrices for each pair of neighbouring runs of 1, 2, 4, ... tokens.

    The decay between two tokens is that until the end of the earlier run times that since then: no factor is above 1.
    """

    def __init__(self, sums: Tensor, same: Tensor | None, dtype: torch.dtype) -> None:
        self.same, self.levels = same, list[_Level]()
        size = 1
        while size < sums.shape[-2]:
            earlier, later = _runs(sums, size)
            end = earlier[..., -1:, :]
            self.levels.append(_Level(size, (later - end).to(dtype).exp_(), (end - earlier).to(dtype).exp_()))
            size *= 2

    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        found = torch.diag_embed((rows * columns).sum(-1))
        for level in self.levels:
            earlier, later = _runs(columns, level.size)[0] * level.until, _runs(rows, level.size)[1] * level.since
            _corners(found, level.size).copy_(later @ earlier.mT)
        return found if self.same is None else found.mul_(self.same)

    def adjoint(self, grad: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad if self.same is None else grad * self.same
        diagonal = grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        row_grad, column_grad = diagonal * columns, diagonal * rows
        for level in self.levels:
            earlier, later = _runs(columns, level.size)[0] * level.until, _runs(rows, level.size)[1] * level.since
            corner = _corners(grad, level.size)
            _runs(row_grad, level.size)[1].addcmul_(corner @ earlier, level.since)
            _runs(column_grad, level.size)[0].addcmul_(corner.mT @ later, level.until)
        return row_grad, column_grad


def _runs(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pairs of neighbouring runs of ``size`` tokens of ``x [..., C, K]``, views ``[..., C / 2 / size, size, K]``."""
    pairs = x.unflatten(-2, (-1, 2, size))
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _corners(x: Tensor, size: int) -> Tensor:
    """Of a matrix ``[..., C, C]``, the blocks whose rows are the later run of a pair, and whose columns the earlier, a
    view ``[..., C / 2 / size, size, size]``.
    """
    blocks = x.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class Chunked(Settings, StatefulOp):
    """The delta rule by chunks: fp32 inside a chunk (fp64 for fp64 inputs), sums over chunks in fp64."""

    transition = Matrix
    isolates = False  # documents of a chunk share products with masks
    chunks: ClassVar[type[Chunks]] = Chunks  # the passes over a slab

    def local_transition(self, inputs: Inputs, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        values = inputs[2].shape[-1]
        state = _zero_state(inputs)
        # K more columns, which start from the identity and are given no values: A beside B.
        identity = torch.eye(state.shape[-2], dtype=state.dtype, device=state.device).expand(*state.shape[:-1], -1)
        both = torch.cat([state, identity], dim=-1)
        wide = both.to(torch.float64, copy=True).flatten(0, 1)
        for tokens, chunk_len in _slabs(inputs):
            chunks = self.chunks(self, inputs, segments, tokens, chunk_len)
            chunks.pass_state(wide, F.pad(chunks.u, (0, state.shape[-2])))
        both = wide.to(state.dtype).view(both.shape)
        return both[..., values:].contiguous(), both[..., :values].contiguous()

    def apply_state(
        self, inputs: Inputs, segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, checkpoints, _ = self._forward(inputs, segments, initial)
        return y, (checkpoints,)

    def fused_forward(self, inputs: Inputs, segments: Tensor | None, initial: Tensor | None) -> FusedForward:
        initial = _zero_state(inputs) if initial is None else initial.to(state_dtype(inputs))
        y, checkpoints, final = (self._step if inputs[0].shape[1] == 1 else self._forward)(inputs, segments, initial)
        return FusedForward(initial, y, (checkpoints,), None, final)

    def incoming_state_grad(
        self, inputs: Inputs, segments: Tensor | None, initial: Tensor, saved: tuple[Tensor, ...], grad: Tensor
    ) -> Tensor:
        state_grad = torch.zeros_like(initial, dtype=torch.float64).flatten(0, 1)
        for tokens, chunk_len in reversed(list(_slabs(inputs))):
            chunks = self.chunks(self, inputs, segments, tokens, chunk_len)
            chunks.pass_grad(state_grad, chunks.load(grad))
        return state_grad.to(initial.dtype).view(initial.shape)

    def input_grads(
        self,
        inputs: Inputs,
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Grads:
        return self.fused_backward(inputs, segments, initial, None, saved, grad, final_grad, False)[0]

    def fused_backward(
        self,
        inputs: Inputs,
        segments: Tensor | None,
        initial: Tensor,
        transition: Tensor | None,
        saved: tuple[Tensor, ...],
        grad: Tensor,
        final_grad: Tensor | None,
        need_initial_grad: bool,
    ) -> tuple[Grads, Tensor | None]:
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        final_grad = torch.zeros_like(initial) if final_grad is None else final_grad
        state_grad = final_grad.to(torch.float64, copy=True).flatten(0, 1)
        starts = [initial, *saved[0]]
        for number, (tokens, chunk_len) in reversed(list(enumerate(_slabs(inputs)))):
            chunks = self.chunks(self, inputs, segments, tokens, chunk_len)
            state = starts[number].to(torch.float64, copy=True).flatten(0, 1)
            found = chunks.backward(state, state_grad, chunks.load(grad))
            for whole, part in zip(grads, found, strict=True):
                whole[:, tokens] = part
        return grads, state_grad.to(initial.dtype).view(initial.shape) if need_initial_grad else None

    def _forward(self, inputs: Inputs, segments: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs, the states before all slabs but the first ``[slabs - 1, B, H, K, V]``, and the final state."""
        slabs = list(_slabs(inputs))
        y = torch.empty_like(inputs[2], memory_format=torch.contiguous_format)
        checkpoints = initial.new_empty(max(0, len(slabs) - 1), *initial.shape)
        if is_traced(y):
            return y, checkpoints, torch.empty_like(initial, memory_format=torch.contiguous_format)
        state = initial.to(torch.float64, copy=True, memory_format=torch.contiguous_format).flatten(0, 1)
        for number, (tokens, chunk_len) in enumerate(slabs):
            if number:
                checkpoints[number - 1] = state.view(initial.shape)
            chunks = self.chunks(self, inputs, segments, tokens, chunk_len)
            y[:, tokens] = chunks.outputs(*chunks.pass_state(state, chunks.u))
        return y, checkpoints, state.to(initial.dtype).view(initial.shape)

    def _step(self, inputs: Inputs, segments: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_forward` of one token, by the recurrence itself."""
        dtype, v = initial.dtype, inputs[2]
        q, k = (per_head(self.features(x, dtype), v.shape[2]).transpose(1, 2) for x in inputs[:2])
        state = log_decays(inputs).exp().to(dtype).squeeze(1).unsqueeze(-1) * initial
        error = (v.transpose(1, 2).to(dtype) - k @ state) * inputs[3].to(dtype).transpose(1, 2).unsqueeze(-1)
        state = state + k.mT @ error
        y = (q @ state).transpose(1, 2) * self.query_scale(q)
        return y.to(v.dtype).contiguous(), initial.new_empty(0, *initial.shape), state


def _zero_state(inputs: Inputs) -> Tensor:
    """``[B, H, K, V]``."""
    q, _, v = inputs[:3]
    return v.new_zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1], dtype=state_dtype(inputs))


def _slabs(inputs: Inputs) -> Iterator[tuple[slice, int]]:
    """Cut a shard into slabs: slices of tokens, and the length of their chunks, a power of two."""
    batch, length, heads, values = inputs[2].shape
    width = inputs[0].shape[-1]
    chunk_len = min(MAX_CHUNK, 1 << max(0, length - 1).bit_length())
    per_chunk = batch * heads * (chunk_len * (4 * chunk_len + 8 * width + 6 * values) + 3 * width * values)
    workspace = CPU_WORKSPACE if inputs[2].device.type == "cpu" else GPU_WORKSPACE
    slab_len = chunk_len * max(1, workspace // max(1, per_chunk))
    for start in range(0, length, slab_len):
        yield slice(start, min(start + slab_len, length)), chunk_len


def _documents(segments: Tensor, tokens: slice, chunk_len: int) -> tuple[Documents, Tensor]:
    """The documents of a slab's chunks, and ``[B, N, 1]`` bool: whether a chunk continues the document before it, that
    of the slab before included.
    """
    documents = Documents.of(segments[:, tokens], chunk_len)
    continues = documents.continues
    if tokens.start:
        continues[:, 0] = segments[:, tokens.start] == segments[:, tokens.start - 1]
    return documents, continues.unsqueeze(-1)
