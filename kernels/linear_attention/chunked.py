"""Linear attention in portable PyTorch: linear time, chunks of tokens, hand-written adjoints.

Everything is one recurrence over a state ``[K, V]``, run from left to right or from right to left,

    S <- decay * S + key_i^T value_i,    output query S, or query S^T for a query with the width of values.

y is q S of the recurrence of (k, v). In the adjoint, dq is grad S^T of the same states; the recurrence of (q, grad) in
the other direction gives dv = k S and dk = v S^T. README.md has the formulas.

A few consecutive chunks, a slab, are processed at once, so that the workspace does not grow with the shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import Documents
from ..state import FusedForward, StatefulOp
from ..transition import exclusive_chunk_scan
from .settings import Settings, per_head, state_dtype

MIN_CHUNK, MAX_CHUNK = 64, 256
# Elements of a slab's temporaries: few enough for a processor's cache, or enough to keep a GPU busy.
CPU_WORKSPACE, GPU_WORKSPACE = 1 << 20, 1 << 26


class Chunked(Settings, StatefulOp):
    """Linear attention by chunks; sums are fp32 inside a chunk (fp64 for fp64 inputs) and fp64 between chunks."""

    isolates = False  # documents of a chunk share products with masks

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        _, k, v = inputs
        state = self._final_states(k, self.values(v), segments, state_dtype(*inputs), adjoint=False)
        return self.decay_over(inputs, state), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = inputs
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        divisor = initial.new_empty(*v.shape[:-1], 1) if self.normalize else None
        for tokens, (out,) in self._outputs(k, self.values(v), segments, initial, adjoint=False, key_queries=q):
            y[:, tokens] = self._scaled(out, None if divisor is None else divisor[:, tokens])
        return y, () if divisor is None else (y, divisor)

    def _scaled(self, out: Tensor, divisor: Tensor | None) -> Tensor:
        """y of ``out [B, tokens, H, V (+ 1)]``, the products with the state; fills ``divisor`` with ``normalize``."""
        if self.scale != 1:
            out *= self.scale
        if divisor is None:
            return out
        # 0 times an infinite divisor is NaN, where the quotient would be 0.
        torch.add(out[..., -1:], out[..., -1:], alpha=0, out=divisor)
        return out[..., :-1] / divisor.clamp(min=self.eps)

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        if inputs[0].shape[1] != 1:
            return super().fused_forward(inputs, segments, initial)
        # Decoding: the recurrence itself.
        v, dtype = inputs[2], state_dtype(*inputs)
        q, k, values = (per_head(x, v)[:, 0].to(dtype) for x in (*inputs[:2], self.values(v)))
        update = k.unsqueeze(-1) * values.unsqueeze(-2)
        decay = self.decay_over(inputs, update)
        initial = torch.zeros_like(update) if initial is None else initial.to(dtype)
        final = update.addcmul(initial, decay)
        out = (q.unsqueeze(-2) @ final).transpose(1, 2) * self.scale
        if not self.normalize:
            return FusedForward(initial, out.to(v.dtype), (), decay, final)
        out, divisor = out[..., :-1], torch.add(out[..., -1:], out[..., -1:], alpha=0)
        y = (out / divisor.clamp(min=self.eps)).to(v.dtype)
        return FusedForward(initial, y, (y, divisor), decay, final)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        return self._final_states(inputs[0], self._upstream(grad, saved), segments, initial.dtype, adjoint=True)

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
        values, upstream = self.values(v), self._upstream(grad, saved)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        for tokens, (out,) in self._outputs(k, values, segments, initial, adjoint=False, value_queries=upstream):
            dq[:, tokens] = out
        outputs = self._outputs(q, upstream, segments, final_grad, adjoint=True, key_queries=k, value_queries=values)
        for tokens, (to_v, to_k) in outputs:
            dk[:, tokens] = to_k
            dv[:, tokens] = to_v[..., : v.shape[-1]]
        return dq, dk, dv

    def _upstream(self, grad: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        """The gradient of ``q S``: ``[B, L, H, V]`` (``V + 1`` with ``normalize``)."""
        if self.normalize:
            y, divisor = saved
            grad = grad / divisor.clamp(min=self.eps)
            to_divisor = -(grad * y).sum(-1, keepdim=True) * (divisor >= self.eps)
            grad = torch.cat([grad, to_divisor], dim=-1)
        return grad if self.scale == 1 else grad.to(state_dtype(grad)) * self.scale

    def _final_states(
        self, keys: Tensor, values: Tensor, segments: Tensor | None, dtype: torch.dtype, *, adjoint: bool
    ) -> Tensor:
        """The shard's final state ``[B, H, K, V]`` from zeros, or those of both directions, ``[2, B, H, K, V]``.

        That of the state's direction first: from left to right, from right to left if ``adjoint``.
        """
        first = self._final_state(keys, values, segments, dtype, reverse=adjoint)
        if self.causal:
            return first
        if segments is None:
            return torch.stack([first, first])
        return torch.stack([first, self._final_state(keys, values, segments, dtype, reverse=not adjoint)])

    def _final_state(
        self, keys: Tensor, values: Tensor, segments: Tensor | None, dtype: torch.dtype, *, reverse: bool
    ) -> Tensor:
        """``sum_j w_j keys_j^T values_j`` over the shard's last document (the first if ``reverse``).

        ``w_j`` is ``decay^(L - 1 - j)``, or ``decay^(j + 1)`` if ``reverse``.
        """
        length, decays = keys.shape[1], self.decays(keys.device)
        total = keys.new_zeros(keys.shape[0], *keys.shape[2:], values.shape[-1], dtype=torch.float64)
        for tokens, chunk_len in _slabs(keys, values):
            x = _chunks(keys[:, tokens], chunk_len, dtype)
            if decays is not None:
                position = torch.arange(tokens.start, tokens.stop, device=keys.device)
                exponent = position + 1 if reverse else length - 1 - position
                weight = decays ** exponent.view(1, -1, 1)
                x = x * _chunks(weight.unsqueeze(-1), chunk_len, dtype)
            if segments is not None:
                document = segments[:, :1] if reverse else segments[:, -1:]
                x = x * _chunks((segments[:, tokens] == document)[..., None, None], chunk_len, dtype)
            total += (x.mT @ _chunks(values[:, tokens], chunk_len, dtype)).sum(1, dtype=torch.float64)
        return total.to(dtype)

    def _outputs(
        self,
        keys: Tensor,
        values: Tensor,
        segments: Tensor | None,
        initial: Tensor,
        *,
        adjoint: bool,
        key_queries: Tensor | None = None,
        value_queries: Tensor | None = None,
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """The products of queries with the state at each token, slab by slab.

        Args:
            keys, values: ``[B, L, H, K]`` and ``[B, L, H, V]``, of which the states are made.
            segments: ``[B, L]`` or None.
            initial: the state that enters the shard, ``[B, H, K, V]``: from the left, or from the right if ``adjoint``.
                For a non-causal operator ``[2, B, H, K, V]``, that of the other side second.
            adjoint: run the recurrence from right to left.
            key_queries: ``[B, L, H, K]``, multiplied with S; None for no such output.
            value_queries: ``[B, L, H, V]``, multiplied with S^T; None for no such output.

        Yields:
            A slice of tokens, and their outputs: ``[B, tokens, H, V]`` of key queries, then ``[B, tokens, H, K]`` of
            value queries.
        """
        data = _Recurrence(keys, values, key_queries, value_queries)
        if self.causal:
            yield from self._one_direction(data, segments, initial, reverse=adjoint)
        elif segments is None:
            state = initial[0] + initial[1] + self._final_state(keys, values, None, initial.dtype, reverse=False)
            for tokens, _ in _slabs(keys, values):
                yield tokens, data.outputs_of_one_state(tokens, state)
        else:
            first = [initial.new_empty(shape) for shape in data.output_shapes()]
            for tokens, outs in self._one_direction(data, segments, initial[0], reverse=adjoint):
                for whole, out in zip(first, outs, strict=True):
                    whole[:, tokens] = out
            second = self._one_direction(data, segments, initial[1], reverse=not adjoint, within_chunk=False)
            for tokens, outs in second:
                yield tokens, [whole[:, tokens] + out for whole, out in zip(first, outs, strict=True)]

    def _one_direction(
        self,
        data: _Recurrence,
        segments: Tensor | None,
        state: Tensor,
        *,
        reverse: bool,
        within_chunk: bool = True,
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """`_outputs` of the recurrence in one direction, from the ``state`` that enters the shard.

        Without ``within_chunk``, tokens see the state that enters their chunk, and no token of the chunk.
        """
        dtype = state.dtype
        slabs = list(_slabs(data.keys, data.values))
        weights: dict[int, _Weights] = {}
        for tokens, chunk_len in reversed(slabs) if reverse else slabs:
            if chunk_len not in weights:
                weights[chunk_len] = _Weights.of(self.decays(state.device), chunk_len, dtype, reverse)
            state_to_token, token_to_state, token_to_token, decay_over_chunk = weights[chunk_len]
            continues = None
            if segments is not None:
                documents, continues = _documents(segments, tokens, chunk_len, reverse)
                head, tail = documents.head[:, :, None, :, None], documents.tail[:, :, None, :, None]
                first, last = (tail, head) if reverse else (head, tail)
                state_to_token = _times(state_to_token, first, dtype)
                token_to_state = _times(token_to_state, last, dtype)
                token_to_token = _times(token_to_token, documents.same_document().unsqueeze(2), dtype)
                decay_over_chunk = _times(decay_over_chunk, documents.whole[:, :, None, None, None], dtype)
            keys = _chunks(data.keys[:, tokens], chunk_len, dtype)
            values = _chunks(data.values[:, tokens], chunk_len, dtype)
            if decay_over_chunk is not None:
                decay_over_chunk = decay_over_chunk.expand(-1, keys.shape[1], -1, -1, -1)
            chunk_states = (keys if token_to_state is None else keys * token_to_state).mT @ values
            states = exclusive_chunk_scan(decay_over_chunk, chunk_states, state, continues, reverse=reverse)
            state, states = (states[:, 0], states[:, 1:]) if reverse else (states[:, -1], states[:, :-1])
            states = states.to(dtype)
            outs = []
            for queries, own, other, seen in (
                (data.key_queries, keys, values, states),
                (data.value_queries, values, keys, states.mT),
            ):
                if queries is None:
                    continue
                x = _chunks(queries[:, tokens], chunk_len, dtype)
                out = (x if state_to_token is None else x * state_to_token) @ seen
                if within_chunk:
                    scores = x @ own.mT
                    if self.causal and self.decay is None:
                        scores = scores.triu_() if reverse else scores.tril_()
                    if token_to_token is not None:
                        scores *= token_to_token
                    out += scores @ other
                outs.append(out.transpose(2, 3).flatten(1, 2))
            yield tokens, outs


@dataclass(frozen=True)
class _Recurrence:
    """The tokens of a recurrence, and its queries; all ``[B, L, H, K or V]``, see `Chunked._outputs`."""

    keys: Tensor
    values: Tensor
    key_queries: Tensor | None
    value_queries: Tensor | None

    def output_shapes(self) -> list[torch.Size]:
        pairs = (self.key_queries, self.values), (self.value_queries, self.keys)
        return [out.shape for queries, out in pairs if queries is not None]

    def outputs_of_one_state(self, tokens: slice, state: Tensor) -> list[Tensor]:
        """The outputs of ``tokens`` where all see the same ``state [B, H, K, V]``."""
        pairs = (self.key_queries, state), (self.value_queries, state.mT)
        return [
            torch.einsum("blhk,bhkv->blhv", queries[:, tokens].to(state.dtype), seen)
            for queries, seen in pairs
            if queries is not None
        ]


class _Weights(NamedTuple):
    """Powers of the decays inside a chunk of C tokens; None where all are 1.

    Attributes:
        state_to_token: ``[H, C, 1]``, of the state before the chunk in the output of each token.
        token_to_state: ``[H, C, 1]``, of each token in the state after the chunk.
        token_to_token: ``[H, C, C]``, of token j (column) in the output of token i (row); 0 where i does not see j.
        decay_over_chunk: ``[1, 1, H, 1, 1]``, of the state before the chunk in the state after it.
    """

    state_to_token: Tensor | None
    token_to_state: Tensor | None
    token_to_token: Tensor | None
    decay_over_chunk: Tensor | None

    @classmethod
    def of(cls, decays: Tensor | None, chunk_len: int, dtype: torch.dtype, reverse: bool) -> _Weights:
        if decays is None:
            return cls(None, None, None, None)
        decays = decays.view(-1, 1, 1)
        position = torch.arange(chunk_len, device=decays.device)
        distance = position.unsqueeze(1) - position
        since = (decays ** (position + 1).unsqueeze(1)).to(dtype)
        until = (decays ** (chunk_len - 1 - position).unsqueeze(1)).to(dtype)
        pairs = (decays ** distance.clamp(min=0)).to(dtype).tril_()
        over_chunk = (decays**chunk_len).to(dtype).view(1, 1, -1, 1, 1)
        # In the adjoint, states and tokens change places.
        return cls(until, since, pairs.mT, over_chunk) if reverse else cls(since, until, pairs, over_chunk)


def _times(weight: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight * mask``; None is a weight of 1."""
    return mask.to(dtype) if weight is None else weight * mask


def _slabs(keys: Tensor, values: Tensor) -> Iterator[tuple[slice, int]]:
    """Cut a shard into slabs: slices of tokens, and the length of their chunks.

    A shorter last chunk is a slab of its own, so there is no padding.
    """
    batch, length, heads, width = *values.shape[:3], keys.shape[-1]
    chunk_len = MIN_CHUNK
    # A chunk's state is then no larger than its keys or its values.
    while chunk_len < min(width, values.shape[-1], MAX_CHUNK):
        chunk_len *= 2
    per_chunk = batch * heads * (chunk_len * (chunk_len + width + values.shape[-1]) + 2 * width * values.shape[-1])
    workspace = CPU_WORKSPACE if keys.device.type == "cpu" else GPU_WORKSPACE
    slab_len = chunk_len * max(1, workspace // max(1, per_chunk))
    aligned = length - length % chunk_len
    for start in range(0, aligned, slab_len):
        yield slice(start, min(start + slab_len, aligned)), chunk_len
    if aligned < length:
        yield slice(aligned, length), length - aligned


def _chunks(x: Tensor, chunk_len: int, dtype: torch.dtype) -> Tensor:
    """``[B, tokens, H, K]`` -> contiguous ``[B, N, H, chunk_len, K]``."""
    return x.to(dtype).unflatten(1, (-1, chunk_len)).transpose(2, 3).contiguous()


def _documents(segments: Tensor, tokens: slice, chunk_len: int, reverse: bool) -> tuple[Documents, Tensor]:
    """The documents of a slab's chunks, and ``[B, N]`` bool: whether a chunk continues the document of the chunk before
    it (after it if ``reverse``), that of the neighbouring slab included.
    """
    documents = Documents.of(segments[:, tokens], chunk_len)
    continues = documents.continues
    if reverse:
        last = torch.ones_like(continues[:, :1])
        if tokens.stop < segments.shape[1]:
            last = (segments[:, tokens.stop] == segments[:, tokens.stop - 1]).unsqueeze(1)
        continues = torch.cat([continues[:, 1:], last], dim=1)
    elif tokens.start:
        first = (segments[:, tokens.start] == segments[:, tokens.start - 1]).unsqueeze(1)
        continues = torch.cat([first, continues[:, 1:]], dim=1)
    return documents, continues
