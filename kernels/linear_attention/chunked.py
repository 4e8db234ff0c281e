"""Linear attention in linear time: portable PyTorch, blocks of tokens, hand-written adjoints.

Everything is one recurrence over a state ``[K, V]``, run from left to right or from right to left,

    S <- decay * S + key_i^T value_i,    read by a key (key S) or by a value (value S^T).

The output is the recurrence of (k, v), read by q. Its adjoint reads the same states by the gradient (dq), and runs the
recurrence of (q, gradient) the other way, read by k (dv) and by v (dk). README.md has the formulas.

A piece is walked in stretches of a few blocks, so that only a bounded workspace is held beside inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chunks import Documents
from ..scan import StatefulOp, exclusive_chunk_scan
from .settings import Settings, state_dtype

MIN_BLOCK, MAX_BLOCK = 64, 256
# Elements of a stretch's temporaries: few enough for a processor's cache, or enough to keep a GPU busy.
CPU_WORKSPACE, GPU_WORKSPACE = 1 << 20, 1 << 26


class Chunked(Settings, StatefulOp):
    """Linear attention by blocks; sums are fp32 inside a block (fp64 for fp64 inputs) and fp64 between blocks."""

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        _, k, v = inputs
        state = self._sums(k, self.values(v), segments, state_dtype(*inputs), adjoint=False)
        return self.decay_over(k.shape[1], state), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = inputs
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        divisor = past.new_empty(*v.shape[:-1], 1) if self.normalize else None
        for tokens, (out,) in self._walk(k, self.values(v), segments, past, adjoint=False, by_key=q):
            if self.scale != 1:
                out *= self.scale
            if divisor is not None:
                out, divisor[:, tokens] = out[..., :-1], out[..., -1:]
                out = out / divisor[:, tokens].clamp(min=self.eps)
            y[:, tokens] = out
        return y, () if divisor is None else (y, divisor)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        return self._sums(inputs[0], self._upstream(grad, saved), segments, past.dtype, adjoint=True)

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
        values, upstream = self.values(v), self._upstream(grad, saved)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        for tokens, (out,) in self._walk(k, values, segments, past, adjoint=False, by_value=upstream):
            dq[:, tokens] = out
        walk = self._walk(q, upstream, segments, future, adjoint=True, by_key=k, by_value=values)
        for tokens, (to_v, to_k) in walk:
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

    def _sums(
        self, keys: Tensor, values: Tensor, segments: Tensor | None, dtype: torch.dtype, *, adjoint: bool
    ) -> Tensor:
        """What leaves the piece: ``[B, H, K, V]``, or both directions' ``[2, B, H, K, V]``.

        States leave to the right first, and gradients of states (``adjoint``) to the left first.
        """
        first = self._sum(keys, values, segments, dtype, to_left=adjoint)
        if self.causal:
            return first
        both = segments is not None
        return torch.stack([first, self._sum(keys, values, segments, dtype, to_left=not adjoint) if both else first])

    def _sum(
        self, keys: Tensor, values: Tensor, segments: Tensor | None, dtype: torch.dtype, *, to_left: bool
    ) -> Tensor:
        """``sum_j w_j keys_j^T values_j`` over the document at the piece's end (its beginning if ``to_left``).

        ``w_j`` is ``decay^(L - 1 - j)``, or ``decay^(j + 1)`` if ``to_left``.
        """
        length, decays = keys.shape[1], self.decays(keys.device)
        total = keys.new_zeros(keys.shape[0], *keys.shape[2:], values.shape[-1], dtype=torch.float64)
        for tokens, block_len in _stretches(keys, values):
            x = _blocks(keys[:, tokens], block_len, dtype)
            if decays is not None:
                position = torch.arange(tokens.start, tokens.stop, device=keys.device)
                exponent = position + 1 if to_left else length - 1 - position
                weight = decays ** exponent.view(1, -1, 1)
                x = x * _blocks(weight.unsqueeze(-1), block_len, dtype)
            if segments is not None:
                end = segments[:, :1] if to_left else segments[:, -1:]
                x = x * _blocks((segments[:, tokens] == end)[..., None, None], block_len, dtype)
            total += (x.mT @ _blocks(values[:, tokens], block_len, dtype)).sum(1, dtype=torch.float64)
        return total.to(dtype)

    def _walk(
        self,
        keys: Tensor,
        values: Tensor,
        segments: Tensor | None,
        ends: Tensor,
        *,
        adjoint: bool,
        by_key: Tensor | None = None,
        by_value: Tensor | None = None,
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """What each token reads of the states, stretch by stretch.

        Args:
            keys, values: ``[B, L, H, K]`` and ``[B, L, H, V]``, which make up the states.
            segments: ``[B, L]`` or None.
            ends: what enters the piece: from the left, or both that and what enters from the right, stacked. If
                ``adjoint``, from the right, or both that and what enters from the left.
            adjoint: run the recurrence's adjoint, against its direction.
            by_key, by_value: ``[B, L, H, K]`` and ``[B, L, H, V]``, the tokens that read.

        Returns:
            Slices of tokens, and what they read by key ``[B, tokens, H, V]`` and by value ``[B, tokens, H, K]``.
        """
        readers = _Readers(keys, values, by_key, by_value)
        if self.causal:
            yield from self._flow(readers, segments, ends, reverse=adjoint)
        elif segments is None:
            state = ends[0] + ends[1] + self._sum(keys, values, None, ends.dtype, to_left=False)
            for tokens, _ in _stretches(keys, values):
                yield tokens, readers.read_all(tokens, state)
        else:
            first = [ends.new_empty(shape) for shape in readers.shapes()]
            for tokens, outs in self._flow(readers, segments, ends[0], reverse=adjoint):
                for whole, out in zip(first, outs, strict=True):
                    whole[:, tokens] = out
            for tokens, outs in self._flow(readers, segments, ends[1], reverse=not adjoint, inside=False):
                yield tokens, [whole[:, tokens] + out for whole, out in zip(first, outs, strict=True)]

    def _flow(
        self, readers: _Readers, segments: Tensor | None, state: Tensor, *, reverse: bool, inside: bool = True
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """The recurrence in one direction, from the ``state`` at its beginning. See `_walk`.

        Without ``inside``, tokens read only what enters their block.
        """
        dtype = state.dtype
        stretches = list(_stretches(readers.keys, readers.values))
        weights: dict[int, _Weights] = {}
        for tokens, block_len in reversed(stretches) if reverse else stretches:
            if block_len not in weights:
                weights[block_len] = _Weights.of(self.decays(state.device), block_len, dtype, reverse)
            weight = weights[block_len]
            reads, writes, through, mask = weight.reads, weight.writes, weight.through, weight.inside
            gate = None
            if segments is not None:
                documents, gate = _documents(segments, tokens, block_len, reverse)
                head, tail = documents.head[:, :, None, :, None], documents.tail[:, :, None, :, None]
                enters, leaves = (tail, head) if reverse else (head, tail)
                reads, writes = _times(reads, enters, dtype), _times(writes, leaves, dtype)
                through = _times(through, documents.whole[:, :, None, None, None], dtype)
                mask = _times(mask, documents.together().unsqueeze(2), dtype)
            keys = _blocks(readers.keys[:, tokens], block_len, dtype)
            values = _blocks(readers.values[:, tokens], block_len, dtype)
            if through is not None:
                through = through.expand(-1, keys.shape[1], -1, -1, -1)
            written = (keys if writes is None else keys * writes).mT @ values
            entering = exclusive_chunk_scan(through, written, state, gate, reverse=reverse)
            state, entering = (entering[:, 0], entering[:, 1:]) if reverse else (entering[:, -1], entering[:, :-1])
            entering = entering.to(dtype)
            outs = []
            for reader, mine, theirs, states in (
                (readers.by_key, keys, values, entering),
                (readers.by_value, values, keys, entering.mT),
            ):
                if reader is None:
                    continue
                x = _blocks(reader[:, tokens], block_len, dtype)
                out = (x if reads is None else x * reads) @ states
                if inside:
                    pairs = x @ mine.mT
                    if self.causal and self.decay is None:
                        pairs = pairs.triu_() if reverse else pairs.tril_()
                    if mask is not None:
                        pairs *= mask
                    out += pairs @ theirs
                outs.append(out.transpose(2, 3).flatten(1, 2))
            yield tokens, outs


@dataclass(frozen=True)
class _Readers:
    """What makes up the states, and who reads them; all ``[B, L, H, K or V]``."""

    keys: Tensor
    values: Tensor
    by_key: Tensor | None
    by_value: Tensor | None

    def shapes(self) -> list[torch.Size]:
        """The shapes of what is read."""
        pairs = (self.by_key, self.values), (self.by_value, self.keys)
        return [read.shape for reader, read in pairs if reader is not None]

    def read_all(self, tokens: slice, state: Tensor) -> list[Tensor]:
        """What ``tokens`` read of one ``state [B, H, K, V]``."""
        pairs = (self.by_key, state), (self.by_value, state.mT)
        return [
            torch.einsum("blhk,bhkv->blhv", reader[:, tokens].to(state.dtype), seen)
            for reader, seen in pairs
            if reader is not None
        ]


@dataclass(frozen=True)
class _Weights:
    """Powers of the decays inside a block of C tokens, None where all are 1.

    Attributes:
        reads: ``[H, C, 1]``, of what enters the block at each of its tokens.
        writes: ``[H, C, 1]``, of each token in what leaves the block.
        inside: ``[H, C, C]``, of token j for token i; 0 where j does not reach i.
        through: ``[1, 1, H, 1, 1]``, over the whole block.
    """

    reads: Tensor | None
    writes: Tensor | None
    inside: Tensor | None
    through: Tensor | None

    @classmethod
    def of(cls, decays: Tensor | None, block_len: int, dtype: torch.dtype, reverse: bool) -> _Weights:
        if decays is None:
            return cls(None, None, None, None)
        decays = decays.view(-1, 1, 1)
        position = torch.arange(block_len, device=decays.device)
        distance = position.unsqueeze(1) - position
        since = (decays ** (position + 1).unsqueeze(1)).to(dtype)
        until = (decays ** (block_len - 1 - position).unsqueeze(1)).to(dtype)
        inside = (decays ** distance.clamp(min=0)).to(dtype).tril_()
        through = (decays**block_len).to(dtype).view(1, 1, -1, 1, 1)
        # The adjoint of a read is a write.
        return cls(until, since, inside.mT, through) if reverse else cls(since, until, inside, through)


def _times(weight: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight * mask``, where no weight is 1."""
    return mask.to(dtype) if weight is None else weight * mask


def _stretches(keys: Tensor, values: Tensor) -> Iterator[tuple[slice, int]]:
    """Cuts a piece into stretches of blocks: slices of tokens, and the length of their blocks.

    A last block that is shorter is a stretch of its own, so no token is ever padding.
    """
    batch, length, heads, width = keys.shape
    block_len = MIN_BLOCK
    # A block's state is then no larger than its keys or its values.
    while block_len < min(width, values.shape[-1], MAX_BLOCK):
        block_len *= 2
    per_block = batch * heads * (block_len * (block_len + width + values.shape[-1]) + 2 * width * values.shape[-1])
    workspace = CPU_WORKSPACE if keys.device.type == "cpu" else GPU_WORKSPACE
    stretch = block_len * max(1, workspace // max(1, per_block))
    aligned = length - length % block_len
    for start in range(0, aligned, stretch):
        yield slice(start, min(start + stretch, aligned)), block_len
    if aligned < length:
        yield slice(aligned, length), length - aligned


def _blocks(x: Tensor, block_len: int, dtype: torch.dtype) -> Tensor:
    """``[B, tokens, H, K]`` -> contiguous ``[B, N, H, block_len, K]``."""
    return x.to(dtype).unflatten(1, (-1, block_len)).transpose(2, 3).contiguous()


def _documents(segments: Tensor, tokens: slice, block_len: int, reverse: bool) -> tuple[Documents, Tensor]:
    """The documents of a stretch's blocks, and which blocks take what their predecessor left (``[B, N]``)."""
    documents = Documents.of(segments[:, tokens], block_len)
    gate = documents.continues
    if reverse:
        goes_on = torch.ones_like(gate[:, :1])
        if tokens.stop < segments.shape[1]:
            goes_on = (segments[:, tokens.stop] == segments[:, tokens.stop - 1]).unsqueeze(1)
        gate = torch.cat([gate[:, 1:], goes_on], dim=1)
    elif tokens.start:
        goes_on = (segments[:, tokens.start] == segments[:, tokens.start - 1]).unsqueeze(1)
        gate = torch.cat([goes_on, gate[:, 1:]], dim=1)
    return documents, gate
