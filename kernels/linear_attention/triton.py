"""Linear attention in Triton: one recurrence, run by spans that need nothing of each other but their sums.

A piece is cut into spans of 256 to 4096 tokens, and a span into chunks of 16 or 32.

1. ``_sums_kernel``: every span's own ``sum_j w_j key_j^T value_j``, all spans at once.
2. ``_scan_kernel``: from these, in their place, what enters each span; sums in fp64.
3. ``_read_kernel``: every span walks its chunks, the state in registers: ``(x key^T * mask) value + x S`` and
   ``S <- decay S + key^T value``. States of chunks never reach memory.

The third serves four roles, as the state is read by a key (``key S``) or by a value (``value S^T``):

==== ======= ====== ====== ===== =========
role reader  key    value  state direction
==== ======= ====== ====== ===== =========
y    q       k      v      S     forward
dq   dy      v      k      S^T   forward
dv   k       q      dy     R     reverse
dk   v       dy     q      R^T   reverse
==== ======= ====== ====== ===== =========

With ``normalize``, ``z = sum w_j k_j``, the last column of the state, is a vector of its own, so that tiles stay
aligned. The gradient of ``q_i S`` is ``a_i dy_i`` and that of ``q_i z`` is ``c_i``; ``a_i`` and ``c_i`` multiply
products of dy in fp32, and dy itself is never scaled.

Matrix products take bf16 operands from bf16 inputs, with sums in fp32. Inputs of fp16 are multiplied as TF32, which
holds them exactly and whose range their sums do not leave; those of fp32 (or of several dtypes) as three products in
TF32. AMD multiplies both in fp32. States and z are fp32 inside a span.

Bytes per token and head in bf16, with spans of T tokens: a direction's states take ``12 K V / T``, and each role that
reads them ``4 K V / T``. Forward ``6 (K + V)`` and states: 1792 for K = V = 128 and T = 1024, where q, k, v and y alone
are 1024. Backward ``16 (K + V)`` and states: 4672. States of every chunk of 64 tokens in bf16, written and read, would
be 1024 for each direction instead of 256. Tiles of a span run side by side and share reader and key in the cache.
"""

# Kernels have Triton's types, which mypy does not know.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import TYPES, Tiling, Variant, launch, launch_fastest
from ..scan import FusedForward, StatefulOp
from .settings import Settings

# Programs that keep every multiprocessor of a large GPU busy; a piece with fewer spans than that has shorter ones.
PROGRAMS = 2048
MIN_SPAN, MAX_SPAN = 256, 4096
SCAN_BLOCK = 256
TINY = 1e-30  # stands for a scale of 0, by which the gradient of the state is divided


@triton.jit
def _load_rows(x, stride, begin, count, column, CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``[begin, begin + count)`` of ``x``, ``[CHUNK, BLOCK]``: zero outside of them and of the columns.

    Offsets inside a chunk take 32 bits, and registers accordingly.
    """
    row = tl.arange(0, CHUNK)
    mask = (row < count)[:, None]
    if WIDTH % BLOCK:
        mask &= (column < WIDTH)[None, :]
    return tl.load(x + begin.to(tl.int64) * stride + (row[:, None] * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _crossing(
    segments,
    powers,
    batch,
    head,
    begin,
    count,
    length,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """How tokens ``[begin, end)`` read what enters their chunk, write what leaves it, and what passes through.

    ``[CHUNK]``, ``[CHUNK]``, a number, and the tokens' document ids ``[CHUNK]``.
    """
    row = tl.arange(0, CHUNK)
    reads = tl.full([CHUNK], 1.0, tl.float32)
    writes = tl.full([CHUNK], 1.0, tl.float32)
    through = 1.0
    ids = row
    if DECAY:
        powers += head * (CHUNK + 3)
        since = tl.load(powers + tl.minimum(row + 1, count)).to(tl.float32)
        until = tl.load(powers + tl.maximum(count - 1 - row, 0)).to(tl.float32)
        through = tl.load(powers + count).to(tl.float32)
        # The adjoint of a read is a write.
        if REVERSE:
            reads, writes = until, since
        else:
            reads, writes = since, until
    if SEGMENTS:
        segments += batch * length
        # The token next to the chunk, of whose document the state is; where the piece ends, the first inside.
        if REVERSE:
            outside, edge = tl.minimum(begin + count, length - 1), begin
        else:
            outside, edge = tl.maximum(begin - 1, 0), begin + count - 1
        entering = tl.load(segments + outside)
        leaving = tl.load(segments + edge)
        ids = tl.load(segments + begin + row, mask=row < count, other=-1)
        reads = tl.where(ids == entering, reads, 0.0)
        writes = tl.where(ids == leaving, writes, 0.0)
        through = tl.where(entering == leaving, through, 0.0)
    return reads, writes, through, ids


@triton.jit
def _sums_kernel(
    keys,
    values,
    weights,
    extras,
    segments,
    powers,
    sums,
    key_batch,
    key_token,
    key_head,
    value_batch,
    value_token,
    value_head,
    heads,
    length,
    span,
    num_spans,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MEAN: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """``sums [B, N, H, K V (+ K)]``: what each span alone adds to the state (and to z) that leaves it."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    tile = program % TILES
    place = (program // TILES).to(tl.int64)
    head = place % heads
    index = place // heads % num_spans
    batch = place // heads // num_spans
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    row, column_k, column_v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    first = (index * span).to(tl.int32)
    last = tl.minimum(first + span, length)
    chunks = tl.cdiv(last - first, CHUNK)

    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_K], tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        begin = first + chunk * CHUNK
        count = tl.minimum(last - begin, CHUNK)
        key = _load_rows(keys, key_token, begin, count, column_k, CHUNK, K, BLOCK_K)
        value = _load_rows(values, value_token, begin, count, column_v, CHUNK, V, BLOCK_V)
        if DECAY or SEGMENTS:
            _, writes, through, _ = _crossing(
                segments,
                powers,
                batch,
                head,
                begin,
                count,
                length,
                CHUNK,
                REVERSE,
                DECAY,
                SEGMENTS,
            )
            state *= through
            z *= through
        else:
            writes = tl.full([CHUNK], 1.0, tl.float32)
        if MEAN and ADJOINT:
            token = (batch * length + begin) * heads + head
            extra = tl.load(extras + token + row * heads, mask=row < count, other=0.0)
            z += tl.sum(key.to(tl.float32) * (extra * writes)[:, None], 0)
            writes *= tl.load(weights + token + row * heads, mask=row < count, other=0.0)
        elif MEAN:
            z += tl.sum(key.to(tl.float32) * writes[:, None], 0)
        if DECAY or SEGMENTS or (MEAN and ADJOINT):
            key = key.to(tl.float32) * writes[:, None]
        state = tl.dot(tl.trans(key.to(OPERAND)), value.to(OPERAND), state, input_precision=PRECISION)

    sums += ((batch * num_spans + index) * heads + head) * (K * V + (K if MEAN else 0))
    mask = (column_k < K)[:, None] & (column_v < V)[None, :]
    tl.store(sums + column_k[:, None] * V + column_v[None, :], state * scale, mask=mask)
    if MEAN and tile == 0:
        tl.store(sums + K * V + column_k, z, mask=column_k < K)


@triton.jit
def _scan_kernel(
    sums,
    start,
    end,
    segments,
    powers,
    heads,
    length,
    span,
    num_spans,
    width,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    START: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Replaces ``sums [B, N, H, W]`` by what enters each span, from ``start [B, H, W]``; ``end`` is what leaves all."""
    blocks = tl.cdiv(width, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    head = place % heads
    batch = place // heads
    mask = column < width
    state = tl.zeros([BLOCK], tl.float64)
    if START:
        state += tl.load(start + place * width + column, mask=mask, other=0.0)
    sums += (batch * num_spans * heads + head) * width + column
    if SEGMENTS:
        segments += batch * length
    stride = tl.full([], heads * width, tl.int64)
    for step in tl.range(0, num_spans, num_stages=4):
        index = num_spans - 1 - step if REVERSE else step
        begin = index * span
        stop = tl.minimum(begin + span, length)
        own = tl.load(sums + index * stride, mask=mask, other=0.0)
        tl.store(sums + index * stride, state.to(tl.float32), mask=mask)
        if DECAY:
            # Powers of a whole span and of the last one stand behind those of a chunk.
            state *= tl.load(powers + head * (CHUNK + 3) + CHUNK + 1 + (index == num_spans - 1).to(tl.int32))
        if SEGMENTS:
            if REVERSE:
                entering, leaving = tl.minimum(stop, length - 1), begin
            else:
                entering, leaving = tl.maximum(begin - 1, 0), stop - 1
            same = tl.load(segments + entering) == tl.load(segments + leaving)
            state = tl.where(same, state, 0.0)
        state += own
    tl.store(end + place * width + column, state.to(tl.float32), mask=mask)


@triton.jit
def _read_kernel(
    readers,
    keys,
    values,
    states,
    out,
    partial,
    divisors,
    partial_divisors,
    weights,
    extras,
    segments,
    powers,
    reader_batch,
    reader_token,
    reader_head,
    key_batch,
    key_token,
    key_head,
    value_batch,
    value_token,
    value_head,
    heads,
    length,
    span,
    num_spans,
    scale,
    enter,
    eps,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROLE: tl.constexpr,
    REVERSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WALK: tl.constexpr,
    INSIDE: tl.constexpr,
    ADD: tl.constexpr,
    DIVIDE: tl.constexpr,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MEAN: tl.constexpr,
):
    """``out [B, L, H, V]``, what each token reads of the state ``[K, V]`` in one of the four roles.

    Without ``WALK`` all read the one state that enters. Without ``INSIDE`` tokens read only what enters their chunk.
    ``ADD`` adds ``partial``, what the other direction gave; ``DIVIDE`` ends with the division.
    """
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    CROSSING: tl.constexpr = DECAY or SEGMENTS
    program = tl.program_id(0)
    tile = program % TILES
    place = (program // TILES).to(tl.int64)
    head = place % heads
    index = place // heads % num_spans
    batch = place // heads // num_spans
    readers += batch * reader_batch + head * reader_head
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    row, column_k, column_v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    first = (index * span).to(tl.int32)
    last = tl.minimum(first + span, length)
    chunks = tl.cdiv(last - first, CHUNK)

    # `states` is [B, N, H, ...], the matrix and then z; dq and dk read the matrix by its columns.
    BY_VALUE: tl.constexpr = ROLE == "dq" or ROLE == "dk"
    width = K * V
    if MEAN:
        width += V if BY_VALUE else K
    which = batch * num_spans + index if WALK else batch
    states += (which * heads + head) * width
    if BY_VALUE:
        entry = column_k[:, None] + column_v[None, :] * K
    else:
        entry = column_k[:, None] * V + column_v[None, :]
    state = tl.load(states + entry, mask=(column_k < K)[:, None] & (column_v < V)[None, :], other=0.0)
    state *= enter
    if MEAN:
        if ROLE == "y":
            z = tl.load(states + K * V + column_k, mask=column_k < K, other=0.0)
        elif ROLE != "dv":
            z = tl.load(states + K * V + column_v, mask=column_v < V, other=0.0)

    distance = row[None, :] - row[:, None] if REVERSE else row[:, None] - row[None, :]
    if DECAY:
        decays = tl.load(powers + head * (CHUNK + 3) + tl.maximum(distance, 0)).to(tl.float32)
        decays = tl.where(distance >= 0, decays, 0.0)

    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        begin = first + chunk * CHUNK
        count = tl.minimum(last - begin, CHUNK)
        inside = row < count
        token = (batch * length + begin) * heads + head
        reader = _load_rows(readers, reader_token, begin, count, column_k, CHUNK, K, BLOCK_K).to(OPERAND)
        if WALK:
            key = _load_rows(keys, key_token, begin, count, column_k, CHUNK, K, BLOCK_K)
            value = _load_rows(values, value_token, begin, count, column_v, CHUNK, V, BLOCK_V)
        if CROSSING:
            reads, writes, through, ids = _crossing(
                segments,
                powers,
                batch,
                head,
                begin,
                count,
                length,
                CHUNK,
                REVERSE,
                DECAY,
                SEGMENTS,
            )
        else:
            reads = tl.full([CHUNK], 1.0, tl.float32)
            writes = tl.full([CHUNK], 1.0, tl.float32)
            through = 1.0
        if MEAN and ROLE != "y":
            weight = tl.load(weights + token + row * heads, mask=inside, other=0.0)
            extra = tl.load(extras + token + row * heads, mask=inside, other=0.0)

        if INSIDE:
            pairs = tl.dot(reader, tl.trans(key.to(OPERAND)), input_precision=PRECISION)
            if MEAN and ROLE == "dq":
                pairs = pairs * weight[:, None] + extra[:, None]
            if MEAN and ROLE == "dk":
                pairs = pairs * weight[None, :] + extra[None, :]
            if MEAN and ROLE == "dv":
                pairs *= weight[None, :]
            if DECAY:
                pairs *= decays
            elif CAUSAL:
                pairs = tl.where(distance >= 0, pairs, 0.0)
            if SEGMENTS:
                pairs = tl.where(ids[:, None] == ids[None, :], pairs, 0.0)
            if MEAN and ROLE == "y":
                divisor = tl.sum(pairs, 1)
            pairs = pairs.to(OPERAND)
        read = tl.dot(reader, state.to(OPERAND), input_precision=PRECISION)
        if MEAN and ROLE == "dq":
            read = read * weight[:, None] + extra[:, None] * z[None, :]
        if MEAN and ROLE == "dk":
            read += z[None, :]
        if CROSSING:
            read *= reads[:, None]
        if INSIDE:
            read = tl.dot(pairs, value.to(OPERAND), read, input_precision=PRECISION)
        if MEAN and ROLE == "y":
            before = tl.sum(reader.to(tl.float32) * z[None, :], 1) * reads
            divisor = divisor + before if INSIDE else before

        read *= scale
        target = row[:, None] * (heads * V) + column_v[None, :]
        filled = inside[:, None] & (column_v < V)[None, :]
        if ADD:
            read += tl.load(partial + token * V + target, mask=filled, other=0.0)
        if MEAN and ROLE == "y":
            divisor *= scale
            if ADD:
                divisor += tl.load(partial_divisors + token + row * heads, mask=inside, other=0.0)
            if tile == 0:
                tl.store(divisors + token + row * heads, divisor, mask=inside)
            if DIVIDE:
                read /= tl.maximum(divisor, eps)[:, None]
        tl.store(out + token * V + target, read.to(out.dtype.element_ty), mask=filled)

        if WALK:
            if MEAN:
                if ROLE == "y":
                    z = z * through + tl.sum(key.to(tl.float32) * writes[:, None], 0)
                elif ROLE == "dq":
                    z = z * through + tl.sum(value.to(tl.float32) * writes[:, None], 0)
                elif ROLE == "dk":
                    z = z * through + tl.sum(value.to(tl.float32) * (extra * writes)[:, None], 0)
            if MEAN and (ROLE == "dv" or ROLE == "dk"):
                writes *= weight
                key = key.to(tl.float32) * writes[:, None]
            elif CROSSING:
                key = key.to(tl.float32) * writes[:, None]
            if CROSSING:
                state *= through
            state = tl.dot(tl.trans(key.to(OPERAND)), value.to(OPERAND), state, input_precision=PRECISION)


@triton.jit
def _mean_grad_kernel(
    grad,
    y,
    divisors,
    weights,
    extras,
    grad_batch,
    grad_token,
    grad_head,
    heads,
    length,
    num_rows,
    scale,
    eps,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``weights`` a and ``extras`` c, ``[B, L, H]``: the gradient of ``q S`` is ``a dy``, and that of ``q z`` is c."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_V)
    head, place = row % heads, row // heads
    mask = (row < num_rows)[:, None] & (column < V)[None, :]
    offset = place // length * grad_batch + place % length * grad_token + head * grad_head
    upstream = tl.load(grad + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(y + row[:, None] * V + column[None, :], mask=mask, other=0.0).to(tl.float32)
    divisor = tl.load(divisors + row, mask=row < num_rows, other=1.0)
    weight = scale / tl.maximum(divisor, eps)
    extra = tl.where(divisor >= eps, -weight * tl.sum(upstream * mean, 1), 0.0)
    tl.store(weights + row, weight, mask=row < num_rows)
    tl.store(extras + row, extra, mask=row < num_rows)


class Triton(Settings, StatefulOp):
    """Linear attention on a GPU; see the module's docstring."""

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = inputs
        _, state = _Piece.of(self, inputs, segments).states(_Source(k, v), None)
        return self.decay_over(q.shape[1], state), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = inputs
        piece, source = _Piece.of(self, inputs, segments), _Source(k, v)
        entering, _ = piece.states(source, past)
        return piece.outputs(q, source, entering)

    def fused_forward(self, inputs: tuple[Tensor, ...], segments: Tensor | None, start: Tensor | None) -> FusedForward:
        q, k, v = inputs
        piece, source = _Piece.of(self, inputs, segments), _Source(k, v)
        entering, end = piece.states(source, start)
        decay = self.decay_over(q.shape[1], end)
        y, saved = piece.outputs(q, source, entering)
        return FusedForward(torch.zeros_like(end) if start is None else start.to(end.dtype), y, saved, decay, end)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        piece = _Piece.of(self, inputs, segments)
        _, state = piece.states(piece.upstream(inputs[0], grad, saved), None)
        return state

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
        piece = _Piece.of(self, inputs, segments)
        upstream = piece.upstream(q, grad, saved)
        grad = upstream.values
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        entering, _ = piece.states(_Source(k, v), past)
        piece.read("dq", grad, _Source(v, k, upstream.weights, upstream.extras), entering, dq)
        entering, _ = piece.states(upstream, future)
        piece.read("dv", k, upstream, entering, dv)
        piece.read("dk", v, upstream._replace(keys=grad, values=q), entering, dk)
        return dq, dk, dv


class _Source(NamedTuple):
    """What makes up a state.

    Attributes:
        keys, values: ``[B, L, H, K]`` and ``[B, L, H, V]``.
        weights, extras: a and c of the module's docstring, ``[B, L, H]`` fp32; None forward and without ``normalize``.
        adjoint: whether the state is the gradient of one.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor | None = None
    extras: Tensor | None = None
    adjoint: bool = False


class _Tiles(NamedTuple):
    """How a kernel is cut: a state's ``[block_k, block_v]`` stays in registers, which sets all of it.

    With nothing but products to do, chunks of 32 tokens fit beside the state; decays, documents, a divisor, operands of
    32 bits or keys of 256 leave room for 16. Then sm_80, sm_90 and gfx942 spill nothing but for fp32 wider than 64.

    Tiles of 64 columns have an alternative of 32: twice the programs, each with half the state, which read keys twice.
    """

    chunk: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, width: int, values: int, narrow: bool, plain: bool) -> _Tiles:
        """For keys and values of these widths; ``narrow`` operands are bf16, a ``plain`` sum has no weights."""
        block_k, block_v = (max(16, triton.next_power_of_2(x)) for x in (width, values))
        roomy = narrow and plain and max(block_k, block_v) <= 128
        widest = 64 if narrow and block_k <= 128 else 32
        return cls(32 if roomy else 16, block_k, min(block_v, widest), 4 if block_k <= 128 else 8, 3 if roomy else 2)

    @property
    def tilings(self) -> tuple[Tiling, ...]:
        """What sums and reads are launched with."""
        columns = (self.block_v, 32) if self.block_v == 64 else (self.block_v,)
        return tuple(Tiling({"BLOCK_V": num}, self.num_warps, self.num_stages) for num in columns)


@dataclass(frozen=True)
class _Piece:
    """A piece of a sequence and how its kernels are launched.

    Attributes:
        documents: ``[B, L]`` int32, the documents counted, or None.
        shape: B, L, H, K, V.
        span: tokens of a span.
        plain: whether nothing weighs the pairs of tokens.
        powers: ``[H, chunk + 3]`` fp64, powers 0 to chunk of the decays, those of a span and of the last span.
        operand: what dtype matrices are multiplied in.
        precision: how fp32 is multiplied, None for Triton's default.
    """

    op: Settings
    documents: Tensor | None
    shape: tuple[int, int, int, int, int]
    span: int
    plain: bool
    powers: Tensor | None
    operand: tl.dtype
    precision: str | None

    @classmethod
    def of(cls, op: Settings, inputs: tuple[Tensor, ...], segments: Tensor | None) -> _Piece:
        q, k, v = inputs
        batch, length, heads, width = q.shape
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        span = MIN_SPAN
        while span < MAX_SPAN and batch * heads * length >= 2 * span * PROGRAMS:
            span *= 2
        plain = op.decay is None and not op.normalize and segments is None
        tiles = _Tiles.of(width, v.shape[-1], dtype == torch.bfloat16, plain)
        decays, powers = op.decays(q.device), None
        if decays is not None:
            exponents = [*range(tiles.chunk + 1), span, length - (triton.cdiv(length, span) - 1) * span]
            powers = decays.unsqueeze(1) ** torch.tensor(exponents).to(q.device, non_blocking=True)
        operand = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
        # By default, operands of 32 bits are multiplied as TF32 on NVIDIA, and as they are on AMD.
        precision = "tf32x3" if dtype == torch.float32 and not torch.version.hip else None
        documents = None if segments is None else _numbers(segments)
        return cls(op, documents, (batch, length, heads, width, v.shape[-1]), span, plain, powers, operand, precision)

    @property
    def walks(self) -> bool:
        """Whether tokens read different states."""
        return self.op.causal or self.documents is not None

    def upstream(self, q: Tensor, grad: Tensor, saved: tuple[Tensor, ...]) -> _Source:
        """What makes up the gradient of the state."""
        grad = _rows(grad)
        if not self.op.normalize:
            return _Source(q, grad, adjoint=True)
        y, divisors = saved
        weights, extras = torch.empty_like(divisors), torch.empty_like(divisors)
        _, length, heads, _, values = self.shape
        num_rows, block = divisors.numel(), triton.next_power_of_2(values)
        rows = max(1, 4096 // block)
        launch(
            _mean_grad_kernel, triton.cdiv(num_rows, rows),
            grad, y, divisors, weights, extras, *grad.stride()[:3], heads, length, num_rows,
            self._scale, self.op.eps, values, rows, block,
        )  # fmt: skip
        return _Source(q, grad, weights, extras, adjoint=True)

    def states(self, source: _Source, ends: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """The state in each direction.

        Args:
            source: what makes it up.
            ends: what enters the piece from outside (None for nothing): ``[B, H, K, V]`` if causal, otherwise
                ``[2, B, H, K, V]``, the state's direction first and then the other.

        Returns:
            What enters each span, ``[B, N, H, K V (+ K)]`` for each direction, and what leaves the piece, shaped as
            ``ends``. If all tokens read one state, that state, N = 1.
        """
        if self.op.causal:
            entering, end = self._flow(source, ends, reverse=source.adjoint)
            return [entering], end
        if self.documents is None:
            _, end = self._flow(source, None, reverse=False)
            whole = end if ends is None else ends[0] + ends[1] + end
            return [self._pack(whole).unsqueeze(1)], torch.stack([end, end])
        both = [None, None] if ends is None else ends.unbind()
        flows = [self._flow(source, end, reverse=way != source.adjoint) for way, end in zip((False, True), both)]
        return [entering for entering, _ in flows], torch.stack([end for _, end in flows])

    def _flow(self, source: _Source, start: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """One direction's states: what enters each span, and what leaves the piece, ``[B, H, K, V (+ 1)]``."""
        batch, length, heads, width, values = self.shape
        num_spans, mean = triton.cdiv(length, self.span), self.op.normalize
        packed = width * (values + mean)
        keys, rows = _rows(source.keys), _rows(source.values)
        sums = torch.empty(batch, num_spans, heads, packed, dtype=torch.float32, device=keys.device)
        end = sums.new_empty(batch, heads, packed)
        start = None if start is None else self._pack(start)
        tiles = self._tiles(width, values)
        flags = {"REVERSE": reverse, "DECAY": self.powers is not None, "SEGMENTS": self.documents is not None}
        # The source's gradient holds the scale: in the weights, or else in the sums.
        scale = self._scale if source.adjoint and not mean else 1.0
        if sums.numel():
            launch_fastest(
                _sums_kernel, tiles.tilings, lambda tile: sums.shape[:3].numel() * triton.cdiv(values, tile["BLOCK_V"]),
                keys, rows, source.weights, source.extras, self.documents, self.powers, sums,
                *keys.stride()[:3], *rows.stride()[:3], heads, length, self.span, num_spans, scale,
                width, values, tiles.chunk, tiles.block_k, OPERAND=self.operand, PRECISION=self.precision, **flags,
                MEAN=mean, ADJOINT=source.adjoint,
            )  # fmt: skip
        if end.numel():
            launch(
                _scan_kernel, batch * heads * triton.cdiv(packed, SCAN_BLOCK),
                sums, start, end, self.documents, self.powers, heads, length, self.span, num_spans, packed,
                tiles.chunk, SCAN_BLOCK, start is not None, **flags, num_warps=2,
            )  # fmt: skip
        return sums, self._unpack(end)

    def outputs(self, q: Tensor, source: _Source, entering: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y, and what the adjoint wants saved."""
        y = torch.empty_like(source.values, memory_format=torch.contiguous_format)
        divisors = self.read("y", q, source, entering, y)
        return y, () if divisors is None else (y, divisors)

    def read(self, role: str, reader: Tensor, source: _Source, entering: list[Tensor], out: Tensor) -> Tensor | None:
        """Fills ``out`` with what ``reader`` reads, ``[B, L, H, V]``; y's divisors ``[B, L, H]`` with ``normalize``.

        Args:
            role: y, dq, dv or dk; see the module's docstring.
            reader: ``[B, L, H, K]``.
            source: keys and values as the role names them.
            entering: of `states`.
            out: contiguous.
        """
        batch, length, heads, _, _ = self.shape
        width, values, mean = reader.shape[-1], out.shape[-1], self.op.normalize
        adjoint = role in ("dv", "dk")
        reader, keys, rows = _rows(reader), _rows(source.keys), _rows(source.values)
        tiles = self._tiles(width, values)
        num_spans = triton.cdiv(length, self.span)
        spans = batch * num_spans * heads
        # Without `normalize`, the scale multiplies what was read, and the gradient of the state has it already.
        scale = 1.0 if mean and role != "y" else self._scale
        enter = 1.0 / scale if adjoint else 1.0
        partial = partial_divisors = divisors = None
        for way, states in enumerate(entering):
            ends = way == len(entering) - 1
            target = out if ends else torch.empty_like(out, dtype=torch.float32)
            divisors = states.new_empty(batch, length, heads) if mean and role == "y" else None
            launch_fastest(
                _read_kernel, tiles.tilings, lambda tile: spans * triton.cdiv(values, tile["BLOCK_V"]),
                reader, keys, rows, states, target, partial, divisors, partial_divisors, source.weights,
                source.extras, self.documents, self.powers, *reader.stride()[:3], *keys.stride()[:3],
                *rows.stride()[:3], heads, length, self.span,
                num_spans, scale, enter, self.op.eps, width, values, tiles.chunk, tiles.block_k,
                OPERAND=self.operand, PRECISION=self.precision, ROLE=role, REVERSE=(way == 1) != adjoint,
                CAUSAL=self.op.causal, WALK=self.walks, INSIDE=self.walks and way == 0, ADD=way > 0, DIVIDE=ends,
                DECAY=self.powers is not None, SEGMENTS=self.documents is not None, MEAN=mean,
            )  # fmt: skip
            partial, partial_divisors = target, divisors
        return divisors

    def _tiles(self, width: int, values: int) -> _Tiles:
        return _Tiles.of(width, values, self.operand == tl.bfloat16, self.plain)

    @property
    def _scale(self) -> float:
        return self.op.scale or TINY

    def _pack(self, state: Tensor) -> Tensor:
        """``[B, H, K, V (+ 1)]`` -> ``[B, H, K V (+ K)]``: z behind the matrix."""
        if self.op.normalize:
            return torch.cat([state[..., :-1].flatten(2), state[..., -1]], dim=-1)
        return state.flatten(2).contiguous()

    def _unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `_pack`."""
        _, _, _, width, values = self.shape
        matrix = packed[..., : width * values].unflatten(-1, (width, values))
        return torch.cat([matrix, packed[..., width * values :].unsqueeze(-1)], -1) if self.op.normalize else matrix


def _numbers(segments: Tensor) -> Tensor:
    """Documents counted from 0 in each row: ids of 64 bits would take twice the registers."""
    numbers = torch.zeros(segments.shape, dtype=torch.int32, device=segments.device)
    torch.cumsum(segments[:, 1:] != segments[:, :-1], dim=1, dtype=torch.int32, out=numbers[:, 1:])
    return numbers


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def variants() -> Iterator[Variant]:
    """Every kernel at common widths: plain, with decayed documents, and with means of documents."""
    plain: dict[str, object] = {"DECAY": False, "SEGMENTS": False, "MEAN": False}
    decay, mean = plain | {"DECAY": True, "SEGMENTS": True}, plain | {"SEGMENTS": True, "MEAN": True}
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    labels = {"plain": plain, "decay": decay, "mean": mean}
    flags: dict[str, object] = {"CAUSAL": True, "WALK": True, "INSIDE": True, "ADD": False, "DIVIDE": True}
    roles = [(bf16, 128, label, role) for label in labels for role in ("y", "dq", "dv", "dk")]
    roles += [
        (bf16, 64, "plain", "y"),
        (bf16, 256, "plain", "y"),
        (bf16, 256, "decay", "dk"),
        (bf16, 256, "mean", "dk"),
    ]
    roles += [(fp16, 128, "mean", "dk"), (fp32, 64, "decay", "dv"), (fp32, 64, "mean", "dk"), (fp32, 64, "mean", "y")]
    for dtype, size, label, role in roles:
        name = f"{dtype}-{size}-{label}".removeprefix("torch.")
        settings = flags | labels[label] | {"ROLE": role, "REVERSE": role in ("dv", "dk")}
        first, *others = _variants(f"{role}-{name}", _read_kernel, dtype, size, settings)
        yield first
        if role in ("y", "dk"):  # dq and dv do not do more
            settings = labels[label] | {"REVERSE": role == "dk", "ADJOINT": role == "dk"}
            yield from others
            yield from _variants(f"{role}-sums-{name}", _sums_kernel, dtype, size, settings)
    flags = mean | {"ROLE": "y", "CAUSAL": False, "INSIDE": False, "DIVIDE": True}
    back, still = {"WALK": True, "REVERSE": True, "ADD": True}, {"WALK": False, "REVERSE": False, "ADD": False}
    yield from _variants("y-from-the-right", _read_kernel, bf16, 128, flags | back)
    yield from _variants("y-of-one-state", _read_kernel, bf16, 128, flags | still | {"SEGMENTS": False})
    scan = decay | {"BLOCK": SCAN_BLOCK, "START": True, "REVERSE": True, "CHUNK": 16}
    yield from _variants("scan", _scan_kernel, fp32, 128, scan)
    grads: dict[str, object] = {"V": 128, "ROWS": 32, "BLOCK_V": 128}
    yield from _variants("mean-grad", _mean_grad_kernel, bf16, 128, grads)


def _variants(name: str, kernel: Any, dtype: torch.dtype, size: int, constants: dict[str, object]) -> Iterator[Variant]:
    """In all of its tilings, the usual one first."""
    narrow = dtype == torch.bfloat16
    tiles = _Tiles.of(size, size, narrow, not any(constants.get(x) for x in ("DECAY", "SEGMENTS", "MEAN")))
    constants = {
        "K": size,
        "V": size,
        "CHUNK": tiles.chunk,
        "BLOCK_K": tiles.block_k,
        "OPERAND": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "tf32x3" if dtype == torch.float32 else None,
    } | constants
    given = dict.fromkeys(("readers", "keys", "values", "out", "grad", "y"), TYPES[dtype])
    fp32 = ("weights", "extras", "sums", "states", "partial", "divisors", "partial_divisors", "start", "end")
    given |= dict.fromkeys(fp32, "*fp32") | dict.fromkeys(("scale", "enter", "eps"), "fp32")
    given |= {"segments": "*i32", "powers": "*fp64", "BLOCK_V": "constexpr"} | dict.fromkeys(constants, "constexpr")
    signature = {x: given.get(x, "i32") for x in kernel.arg_names}
    constants = {x: value for x, value in constants.items() if x in signature}
    if kernel not in (_sums_kernel, _read_kernel):
        yield Variant(name, kernel, signature, constants, tiles.num_warps, tiles.num_stages)
        return
    for tiling, num_warps, num_stages in tiles.tilings:
        yield Variant(f"{name}-{tiling['BLOCK_V']}", kernel, signature, constants | tiling, num_warps, num_stages)
