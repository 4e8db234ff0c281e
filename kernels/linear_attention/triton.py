"""Linear attention in Triton: one recurrence, in splits of the shard that run in parallel.

A shard is cut into splits of 256 to 4096 tokens, and a split into chunks of 16, 32 or 64.

1. ``_split_states_kernel``: each split's own state ``sum_j w_j key_j^T value_j``, all splits in parallel.
2. ``_scan_kernel``: replaces these by the states before the splits; sums in fp64.
3. ``_output_kernel``: each split runs over its chunks, the state in registers: ``(query key^T * mask) value + query S``
   and ``S <- decay S + key^T value``. States of chunks are never stored.

The third has four roles, as queries have the width of keys (``query S``) or of values (``query S^T``):

==== ======= ====== ====== ===== =========
role query   key    value  state direction
==== ======= ====== ====== ===== =========
y    q       k      v      S     forward
dq   dy      v      k      S^T   forward
dv   k       q      dy     R     reverse
dk   v       dy     q      R^T   reverse
==== ======= ====== ====== ===== =========

With ``normalize``, ``z = sum w_j k_j``, the last column of the state, is a vector of its own, so that tiles stay
aligned. The gradient of ``q_i S`` is ``a_i dy_i`` and that of ``q_i z`` is ``a_i c_i``; ``a_i`` multiplies products of
dy in fp32, and dy itself is never scaled.

With ``log_decay`` (``GATED``) decays are made in each chunk, from fp64 sums of their logarithms; those of a split by
the first kernel. The roles dq and dk also give q.dq and k.dk of each token, which ``_gate_grad_kernel`` sums over a
split.

On sm_90, chunks of 64 in bf16 make all of them products of a warp group (WGMMA). The first factor of each is loaded as
it is and stays in shared memory: ptxas up to 12.9 may overwrite a first factor in registers before it is read (Triton's
pull request 11781). So weights multiply values and not keys, and scores are transposed, ``[key, query]``, and the
second factor: ``(value^T scores)^T``.

Matrix products take bf16 operands from bf16 inputs, with sums in fp32. Inputs of fp16 are multiplied as TF32, which
holds them exactly and whose range their sums do not leave; states, scores and weighted values are rounded to its 10
bits of mantissa. Those of fp32 (or of several dtypes) are multiplied as three products in TF32. AMD multiplies both in
fp32. States and z are fp32 inside a split.

Bytes per token and head in bf16, with splits of T tokens: a direction's states take ``12 K V / T``, and each role that
reads them ``4 K V / T``. Forward ``6 (K + V)`` and states: 1792 for K = V = 128 and T = 1024, where q, k, v and y alone
are 1024. Backward ``16 (K + V)`` and states: 4672. States of every chunk of 64 tokens in bf16, written and read, would
be 1024 for each direction instead of 256. Tiles of a split run concurrently and share query and key in the cache.
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
from triton.runtime.driver import driver

from ..backends import is_traced
from ..gpu import TYPES, Tiling, Variant, launch, launch_fastest
from ..state import FusedForward, StatefulOp
from .settings import LEAST_LOG_DECAY, Settings, is_gated, powers

# Programs that keep every multiprocessor of a large GPU busy; a shard with fewer splits than that has shorter ones.
PROGRAMS = 2048
MIN_SPLIT, MAX_SPLIT = 256, 4096
SCAN_COLUMNS = 256
MAX_CHUNK = 64
# Exponents of the decays inside a chunk, below 0 for tokens that are not seen, and of those that make up a split's.
IN_CHUNK = tuple(range(-MAX_CHUNK, MAX_CHUNK + 1))
IN_SPLIT = tuple(1 << bit for bit in range(MAX_SPLIT.bit_length()))
LEAST = tl.constexpr(LEAST_LOG_DECAY)
ZERO, ROW, BITS = tl.constexpr(MAX_CHUNK), tl.constexpr(len(IN_CHUNK)), tl.constexpr(len(IN_SPLIT))
PRECISIONS = {torch.bfloat16: None, torch.float16: "tf32", torch.float32: "tf32x3"}
TINY = 1e-30  # stands for a scale of 0, by which the gradient of the state is divided


@triton.jit
def _load_rows(x, stride, begin, count, column, CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows ``[begin, begin + count)`` of ``x``, ``[CHUNK, BLOCK_W]``: zero outside of them and of the columns.

    Offsets inside a chunk take 32 bits, and registers accordingly.
    """
    row = tl.arange(0, CHUNK)
    mask = (row < count)[:, None]
    if WIDTH % BLOCK_W:
        mask &= (column < WIDTH)[None, :]
    return tl.load(x + begin.to(tl.int64) * stride + (row[:, None] * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _rounded(x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """``x``, fp32, as a factor of a matrix product. Of TF32, of which a GPU would cut off bits, the nearest."""
    if PRECISION == "tf32":
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return x.to(OPERAND)


@triton.jit
def _columns(x, OPERAND: tl.constexpr):
    """``x [N]`` as columns that sum to it, ``[N, 16]``, for a matrix product: the second is what bf16 cuts off."""
    column = tl.arange(0, 16)[None, :]
    high = x.to(OPERAND).to(tl.float32)
    return tl.where(column == 0, high[:, None], tl.where(column == 1, (x - high)[:, None], 0.0)).to(OPERAND)


@triton.jit
def _weighted_sum(x, weights, OPERAND: tl.constexpr):
    """``weights [CHUNK]`` times ``x [CHUNK, WIDTH]``, ``[WIDTH]``."""
    if tl.bfloat16 == OPERAND and x.shape[0] >= 64:  # x stays in shared memory
        return tl.sum(tl.dot(tl.trans(x), _columns(weights, OPERAND)), 1)
    return tl.sum(x.to(tl.float32) * weights[:, None], 0)


@triton.jit
def _times_vector(x, vector, OPERAND: tl.constexpr):
    """``x [CHUNK, WIDTH]`` times ``vector [WIDTH]``, ``[CHUNK]``."""
    if tl.bfloat16 == OPERAND and x.shape[0] >= 64:
        return tl.sum(tl.dot(x, _columns(vector, OPERAND)), 1)
    return tl.sum(x.to(tl.float32) * vector[None, :], 1)


@triton.jit
def _chunk_weights(
    segments,
    decays,
    batch,
    head,
    heads,
    begin,
    count,
    length,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    GATED: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Decays of a chunk's ``count`` tokens, 0 between documents.

    Returns:
        ``state_to_token [CHUNK]``, of the state before the chunk in each token's output; ``token_to_state [CHUNK]``, of
        each token in the state after the chunk; ``decay_over_chunk``, a number; the document ids ``[CHUNK]``; and
        ``GATED``, ``total [CHUNK]`` fp64, the log of the decay from before the chunk to each token.
    """
    row = tl.arange(0, CHUNK)
    state_to_token = tl.full([CHUNK], 1.0, tl.float32)
    token_to_state = tl.full([CHUNK], 1.0, tl.float32)
    decay_over_chunk = 1.0
    ids = row
    total = row
    if DECAY:
        if GATED:
            decays += (batch * length + begin) * heads + head
            own = tl.load(decays + row * heads, mask=row < count, other=0.0).to(tl.float64)
            own = tl.maximum(own, LEAST, propagate_nan=tl.PropagateNan.ALL)
            total = tl.cumsum(own, 0)
            whole = tl.sum(own, 0)
            since, until = tl.exp(total.to(tl.float32)), tl.exp((whole - total).to(tl.float32))
            decay_over_chunk = tl.exp(whole.to(tl.float32))
        else:
            decays += head * ROW + ZERO
            since = tl.load(decays + tl.minimum(row + 1, count))
            until = tl.load(decays + tl.maximum(count - 1 - row, 0))
            decay_over_chunk = tl.load(decays + count)
        # In the adjoint, states and tokens change places.
        if REVERSE:
            state_to_token, token_to_state = until, since
        else:
            state_to_token, token_to_state = since, until
    if SEGMENTS:
        segments += batch * length
        # The state is of the document of the token next to the chunk; at the end of the shard, of the first one inside.
        if REVERSE:
            outside, edge = tl.minimum(begin + count, length - 1), begin
        else:
            outside, edge = tl.maximum(begin - 1, 0), begin + count - 1
        entering = tl.load(segments + outside)
        leaving = tl.load(segments + edge)
        ids = tl.load(segments + begin + row, mask=row < count, other=-1)
        state_to_token = tl.where(ids == entering, state_to_token, 0.0)
        token_to_state = tl.where(ids == leaving, token_to_state, 0.0)
        decay_over_chunk = tl.where(entering == leaving, decay_over_chunk, 0.0)
    return state_to_token, token_to_state, decay_over_chunk, ids, total


@triton.jit
def _pair_decays(total, distance, NEGATED: tl.constexpr):
    """Decays between the tokens of a chunk, 0 where ``distance`` is below 0, from the logs of those up to each token.

    Differences of sums in fp64, by the high and low parts in fp32.
    """
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    if NEGATED:
        between = -between
    return tl.where(distance >= 0, tl.exp(between), 0.0)


@triton.jit
def _split_states_kernel(
    keys,
    values,
    weights,
    extras,
    segments,
    decays,
    split_decays,
    states,
    key_batch,
    key_token,
    key_head,
    value_batch,
    value_token,
    value_head,
    heads,
    length,
    split_len,
    num_splits,
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
    GATED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MEAN: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """``states [B, N, H, K V (+ K)]``: each split's own contribution to the state (and z) after it.

    ``GATED``, also ``split_decays [B, N, H]`` fp64, without regard to documents.
    """
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    tile = program % TILES
    place = (program // TILES).to(tl.int64)
    head = place % heads
    index = place // heads % num_splits
    batch = place // heads // num_splits
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    row, column_k, column_v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    first = (index * split_len).to(tl.int32)
    last = first + tl.minimum(split_len, length - first)
    chunks = tl.cdiv(last - first, CHUNK)

    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_K], tl.float32)
    log_decay = tl.full([], 0.0, tl.float64)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        begin = first + chunk * CHUNK
        count = tl.minimum(last - begin, CHUNK)
        key = _load_rows(keys, key_token, begin, count, column_k, CHUNK, K, BLOCK_K)
        value = _load_rows(values, value_token, begin, count, column_v, CHUNK, V, BLOCK_V)
        if DECAY or SEGMENTS:
            _, token_to_state, decay_over_chunk, _, total = _chunk_weights(
                segments,
                decays,
                batch,
                head,
                heads,
                begin,
                count,
                length,
                CHUNK,
                REVERSE,
                DECAY,
                GATED,
                SEGMENTS,
            )
            if GATED:
                log_decay += tl.sum(tl.where(row == CHUNK - 1, total, 0.0), 0)
            state *= decay_over_chunk
            z *= decay_over_chunk
        else:
            token_to_state = tl.full([CHUNK], 1.0, tl.float32)
        if MEAN and ADJOINT:
            token = (batch * length + begin) * heads + head
            extra = tl.load(extras + token + row * heads, mask=row < count, other=0.0)
            token_to_state *= tl.load(weights + token + row * heads, mask=row < count, other=0.0)
            z += _weighted_sum(key, extra * token_to_state, OPERAND)
        elif MEAN:
            z += _weighted_sum(key, token_to_state, OPERAND)
        if DECAY or SEGMENTS or (MEAN and ADJOINT):
            term = _rounded(value.to(tl.float32) * token_to_state[:, None], OPERAND, PRECISION)
        else:
            term = value.to(OPERAND)
        state = tl.dot(tl.trans(key.to(OPERAND)), term, state, input_precision=PRECISION)

    split = (batch * num_splits + index) * heads + head
    if GATED and tile == 0:
        tl.store(split_decays + split, tl.exp(log_decay))
    states += split * (K * V + (K if MEAN else 0))
    mask = (column_k < K)[:, None] & (column_v < V)[None, :]
    tl.store(states + column_k[:, None] * V + column_v[None, :], state * scale, mask=mask)
    if MEAN and tile == 0:
        tl.store(states + K * V + column_k, z, mask=column_k < K)


@triton.jit
def _decay_over(powers, num_tokens):
    """A head's decay over ``num_tokens`` <= MAX_SPLIT tokens, fp64: the product of those over powers of 2."""
    decay = tl.full([], 1.0, tl.float64)
    for bit in tl.static_range(BITS):
        decay *= tl.where((num_tokens >> bit) & 1 != 0, tl.load(powers + bit), 1.0)
    return decay


@triton.jit
def _scan_kernel(
    states,
    initial,
    final,
    segments,
    powers,
    split_decays,
    heads,
    length,
    split_len,
    num_splits,
    width,
    BLOCK_W: tl.constexpr,
    INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    GATED: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Replaces ``states [B, N, H, W]`` by the states before the splits, from ``initial [B, H, W]`` to ``final``."""
    num_tiles = tl.cdiv(width, BLOCK_W)
    column = tl.program_id(0) % num_tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    place = (tl.program_id(0) // num_tiles).to(tl.int64)
    head = place % heads
    batch = place // heads
    mask = column < width
    state = tl.zeros([BLOCK_W], tl.float64)
    if INITIAL:
        state += tl.load(initial + place * width + column, mask=mask, other=0.0)
    states += (batch * num_splits * heads + head) * width + column
    if SEGMENTS:
        segments += batch * length
    stride = tl.full([], heads * width, tl.int64)
    if DECAY and not GATED:
        powers += head * BITS
        over_split = _decay_over(powers, split_len)
        over_last = _decay_over(powers, length - (num_splits - 1) * split_len)
    for step in tl.range(0, num_splits, num_stages=4):
        index = num_splits - 1 - step if REVERSE else step
        begin = index * split_len
        stop = begin + tl.minimum(split_len, length - begin)
        own = tl.load(states + index * stride, mask=mask, other=0.0)
        tl.store(states + index * stride, state.to(tl.float32), mask=mask)
        if GATED:
            state *= tl.load(split_decays + (batch * num_splits + index) * heads + head)
        elif DECAY:
            state *= tl.where(index == num_splits - 1, over_last, over_split)
        if SEGMENTS:
            if REVERSE:
                entering, leaving = tl.minimum(stop, length - 1), begin
            else:
                entering, leaving = tl.maximum(begin - 1, 0), stop - 1
            same = tl.load(segments + entering) == tl.load(segments + leaving)
            state = tl.where(same, state, 0.0)
        state += own
    tl.store(final + place * width + column, state.to(tl.float32), mask=mask)


@triton.jit
def _per_query(x, TRANSPOSED: tl.constexpr):
    """``x`` of the queries of scores."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def _per_key(x, TRANSPOSED: tl.constexpr):
    """``x`` of the keys of scores."""
    return x[:, None] if TRANSPOSED else x[None, :]


@triton.jit
def _output_kernel(
    queries,
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
    decays,
    owners,
    dots,
    query_batch,
    query_token,
    query_head,
    key_batch,
    key_token,
    key_head,
    value_batch,
    value_token,
    value_head,
    owner_batch,
    owner_token,
    owner_head,
    heads,
    length,
    split_len,
    num_splits,
    scale,
    state_scale,
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
    RUNNING: tl.constexpr,
    WITHIN_CHUNK: tl.constexpr,
    ADD: tl.constexpr,
    DIVIDE: tl.constexpr,
    DECAY: tl.constexpr,
    GATED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MEAN: tl.constexpr,
):
    """``out [B, L, H, V]``, the product of each token's query with the state ``[K, V]`` that it sees, in one of the
    four roles.

    Without ``RUNNING`` all tokens see the state before the first split. Without ``WITHIN_CHUNK`` tokens see the state
    before their chunk. ``ADD`` adds ``partial``, the output of the other direction; ``DIVIDE`` divides at the end.

    ``GATED``, dq and dk also fill ``dots [B, L, H, tiles]``: of each token, its ``owners`` (q or k) times their
    gradient, without what the token contributes to its own output, which cancels.
    """
    DOTS: tl.constexpr = GATED and (ROLE == "dq" or ROLE == "dk")
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    WEIGHTED: tl.constexpr = DECAY or SEGMENTS
    TRANSPOSED: tl.constexpr = CHUNK >= 64  # scores, see the module's docstring
    program = tl.program_id(0)
    tile = program % TILES
    place = (program // TILES).to(tl.int64)
    head = place % heads
    index = place // heads % num_splits
    batch = place // heads // num_splits
    queries += batch * query_batch + head * query_head
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    if DOTS:
        owners += batch * owner_batch + head * owner_head
    row, column_k, column_v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    first = (index * split_len).to(tl.int32)
    last = first + tl.minimum(split_len, length - first)
    chunks = tl.cdiv(last - first, CHUNK)

    # `states` is [B, N, H, ...], the matrix and then z; dq and dk load the transposed matrix.
    BY_VALUE: tl.constexpr = ROLE == "dq" or ROLE == "dk"
    width = K * V
    if MEAN:
        width += V if BY_VALUE else K
    which = batch * num_splits + index if RUNNING else batch
    states += (which * heads + head) * width
    if BY_VALUE:
        entry = column_k[:, None] + column_v[None, :] * K
    else:
        entry = column_k[:, None] * V + column_v[None, :]
    state = tl.load(states + entry, mask=(column_k < K)[:, None] & (column_v < V)[None, :], other=0.0)
    state *= state_scale
    if MEAN:
        if ROLE == "y":
            z = tl.load(states + K * V + column_k, mask=column_k < K, other=0.0)
        elif ROLE != "dv":
            z = tl.load(states + K * V + column_v, mask=column_v < V, other=0.0)

    distance = row[:, None] - row[None, :]
    if REVERSE != TRANSPOSED:
        distance = -distance
    if DECAY and not GATED:
        pairs = tl.load(decays + head * ROW + ZERO + distance)

    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        begin = first + chunk * CHUNK
        count = tl.minimum(last - begin, CHUNK)
        present = row < count
        token = (batch * length + begin) * heads + head
        query = _load_rows(queries, query_token, begin, count, column_k, CHUNK, K, BLOCK_K).to(OPERAND)
        if RUNNING:
            key = _load_rows(keys, key_token, begin, count, column_k, CHUNK, K, BLOCK_K)
            value = _load_rows(values, value_token, begin, count, column_v, CHUNK, V, BLOCK_V)
        if WEIGHTED:
            state_to_token, token_to_state, decay_over_chunk, ids, total = _chunk_weights(
                segments,
                decays,
                batch,
                head,
                heads,
                begin,
                count,
                length,
                CHUNK,
                REVERSE,
                DECAY,
                GATED,
                SEGMENTS,
            )
        else:
            state_to_token = tl.full([CHUNK], 1.0, tl.float32)
            token_to_state = tl.full([CHUNK], 1.0, tl.float32)
            decay_over_chunk = 1.0
        if MEAN and ROLE != "y":
            weight = tl.load(weights + token + row * heads, mask=present, other=0.0)
            extra = tl.load(extras + token + row * heads, mask=present, other=0.0)
        if RUNNING:
            # What the state takes in. Early, so that it waits in shared memory and not in registers.
            if MEAN and (ROLE == "dv" or ROLE == "dk"):
                term = _rounded(value.to(tl.float32) * (token_to_state * weight)[:, None], OPERAND, PRECISION)
            elif WEIGHTED:
                term = _rounded(value.to(tl.float32) * token_to_state[:, None], OPERAND, PRECISION)
            else:
                term = value.to(OPERAND)

        if WITHIN_CHUNK:
            if TRANSPOSED:
                scores = tl.dot(key.to(OPERAND), tl.trans(query), input_precision=PRECISION)
            else:
                scores = tl.dot(query, tl.trans(key.to(OPERAND)), input_precision=PRECISION)
            if MEAN and ROLE == "dq":
                scores += _per_query(extra, TRANSPOSED)
            if MEAN and ROLE == "dk":
                scores = (scores + _per_key(extra, TRANSPOSED)) * _per_key(weight, TRANSPOSED)
            if MEAN and ROLE == "dv":
                scores *= _per_key(weight, TRANSPOSED)
            if GATED:
                scores *= _pair_decays(total, distance, REVERSE != TRANSPOSED)
            elif DECAY:
                scores *= pairs
            elif CAUSAL:
                scores = tl.where(distance >= 0, scores, 0.0)
            if SEGMENTS:
                scores = tl.where(ids[:, None] == ids[None, :], scores, 0.0)
            if MEAN and ROLE == "y":
                divisor = tl.sum(scores, 0 if TRANSPOSED else 1)
            scores = _rounded(scores, OPERAND, PRECISION)
        output = tl.dot(query, _rounded(state, OPERAND, PRECISION), input_precision=PRECISION)
        if WEIGHTED:
            output *= state_to_token[:, None]
        if MEAN and ROLE == "dq":
            of_z = extra * state_to_token
        if MEAN and ROLE == "dk":
            of_z = state_to_token
        if TRANSPOSED and WITHIN_CHUNK:
            inside = tl.dot(tl.trans(value.to(OPERAND)), scores, input_precision=PRECISION)
            if MEAN and (ROLE == "dq" or ROLE == "dk"):
                inside += z[:, None] * of_z[None, :]
            output += tl.trans(inside)
        else:
            if MEAN and (ROLE == "dq" or ROLE == "dk"):
                output += of_z[:, None] * z[None, :]
            if WITHIN_CHUNK:
                output = tl.dot(scores, value.to(OPERAND), output, input_precision=PRECISION)
        if MEAN and ROLE == "y":
            before = _times_vector(query, z, OPERAND) * state_to_token
            divisor = divisor + before if WITHIN_CHUNK else before

        if DOTS:
            own = tl.sum(tl.where(distance == 0, scores.to(tl.float32), 0.0), 1)
            rest = output - own[:, None] * value.to(OPERAND).to(tl.float32)
            owner = _load_rows(owners, owner_token, begin, count, column_v, CHUNK, V, BLOCK_V).to(tl.float32)
            dot = tl.sum(rest * owner, 1) * scale
            if MEAN and ROLE == "dq":
                dot *= weight
            tl.store(dots + (token + row * heads) * TILES + tile, dot, mask=present)
        if MEAN and ROLE == "dq":
            output *= (weight * scale)[:, None]
        else:
            output *= scale
        target = row[:, None] * (heads * V) + column_v[None, :]
        filled = present[:, None] & (column_v < V)[None, :]
        if ADD:
            output += tl.load(partial + token * V + target, mask=filled, other=0.0)
        if MEAN and ROLE == "y":
            divisor *= scale
            if ADD:
                divisor += tl.load(partial_divisors + token + row * heads, mask=present, other=0.0)
            divisor += 0.0 * divisor  # NaN for an infinity, by which quotients would be 0
            if tile == 0:
                tl.store(divisors + token + row * heads, divisor, mask=present)
            if DIVIDE:
                output /= tl.maximum(divisor, eps, propagate_nan=tl.PropagateNan.ALL)[:, None]
        tl.store(out + token * V + target, output.to(out.dtype.element_ty), mask=filled)

        if RUNNING:
            if MEAN:
                if ROLE == "y":
                    z = z * decay_over_chunk + _weighted_sum(key, token_to_state, OPERAND)
                elif ROLE == "dq":
                    z = z * decay_over_chunk + _weighted_sum(value, token_to_state, OPERAND)
                elif ROLE == "dk":
                    z = z * decay_over_chunk + _weighted_sum(value, extra * weight * token_to_state, OPERAND)
            if WEIGHTED:
                state *= decay_over_chunk
            state = tl.dot(tl.trans(key.to(OPERAND)), term, state, input_precision=PRECISION)


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
    """``weights`` a and ``extras`` c, ``[B, L, H]``: the gradient of ``q S`` is ``a dy`` and that of ``q z`` is a c."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_V)
    head, place = row % heads, row // heads
    mask = (row < num_rows)[:, None] & (column < V)[None, :]
    offset = place // length * grad_batch + place % length * grad_token + head * grad_head
    upstream = tl.load(grad + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(y + row[:, None] * V + column[None, :], mask=mask, other=0.0).to(tl.float32)
    divisor = tl.load(divisors + row, mask=row < num_rows, other=1.0)
    weight = scale / tl.maximum(divisor, eps, propagate_nan=tl.PropagateNan.ALL)
    extra = tl.where(divisor < eps, 0.0, -tl.sum(upstream * mean, 1))
    tl.store(weights + row, weight, mask=row < num_rows)
    tl.store(extras + row, extra, mask=row < num_rows)


@triton.jit
def _gate_grad_kernel(
    query_dots,
    key_dots,
    states,
    final,
    state_grads,
    segments,
    grads,
    heads,
    length,
    split_len,
    num_splits,
    width,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """``grads [B, L, H]`` of log_decay: sums of the dots of queries less those of keys, from each token to the end of
    its split, and the product of the state after the split, of ``states [B, N, H, width]`` or ``final``, with its
    gradient.
    """
    place = tl.program_id(0).to(tl.int64)
    head = place % heads
    index = place // heads % num_splits
    batch = place // heads // num_splits
    first = (index * split_len).to(tl.int32)
    last = first + tl.minimum(split_len, length - first)
    row = tl.arange(0, ROWS)
    later = row[None, :] >= row[:, None]
    state_grads += place * width
    if index == num_splits - 1:
        state = final + (batch * heads + head) * width
    else:
        state = states + (place + heads) * width
    products = tl.zeros([BLOCK_W], tl.float64)
    for start in range(0, width, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        entry = tl.load(state + column, mask=column < width, other=0.0).to(tl.float64)
        products += entry * tl.load(state_grads + column, mask=column < width, other=0.0)
    from_after = tl.sum(products, 0)
    if SEGMENTS:
        segments += batch * length
        after = tl.load(segments + tl.minimum(last, length - 1))
    blocks = tl.cdiv(last - first, ROWS)
    for step in range(blocks):
        begin = first + (blocks - 1 - step) * ROWS
        present = row < last - begin
        token = (batch * length + begin) * heads + head
        terms = tl.zeros([ROWS], tl.float64)
        for tile in tl.static_range(TILES):
            terms += tl.load(query_dots + (token + row * heads) * TILES + tile, mask=present, other=0.0)
            terms -= tl.load(key_dots + (token + row * heads) * TILES + tile, mask=present, other=0.0)
        if SEGMENTS:
            ids = tl.load(segments + begin + row, mask=present, other=-1)
            before = tl.load(segments + tl.maximum(begin + row - 1, 0), mask=present, other=-1)
            seen = later & (ids[:, None] == ids[None, :])
            grad = tl.sum(tl.where(seen, terms[None, :], 0.0), 1) + tl.where(ids == after, from_after, 0.0)
            grad = tl.where(ids == before, grad, 0.0)  # nothing passes where a document begins
            after = tl.load(segments + begin)
        else:
            grad = tl.sum(tl.where(later, terms[None, :], 0.0), 1) + from_after
        tl.store(grads + token + row * heads, grad.to(tl.float32), mask=present)
        from_after = tl.sum(tl.where(row == 0, grad, 0.0), 0)


class Triton(Settings, StatefulOp):
    """Linear attention on a GPU; see the module's docstring."""

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        _, k, v, *_ = inputs
        _, state = _Kernels.of(self, inputs, segments).states(_Terms(k, v), None)
        return self.decay_over(inputs, state), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v, *_ = inputs
        kernels, terms = _Kernels.of(self, inputs, segments), _Terms(k, v)
        split_states, _ = kernels.states(terms, initial)
        return kernels.outputs(q, terms, split_states)

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        q, k, v, *_ = inputs
        kernels, terms = _Kernels.of(self, inputs, segments), _Terms(k, v)
        split_states, final = kernels.states(terms, initial)
        decay = self.decay_over(inputs, final)
        y, saved = kernels.outputs(q, terms, split_states)
        initial = torch.zeros_like(final) if initial is None else initial.to(final.dtype)
        return FusedForward(initial, y, saved, decay, final)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        kernels = _Kernels.of(self, inputs, segments)
        _, state = kernels.states(kernels.upstream(inputs[0], grad, saved), None)
        return state

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        q, k, v, *gates = inputs
        kernels = _Kernels.of(self, inputs, segments)
        upstream = kernels.upstream(q, grad, saved)
        grad = upstream.values
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3])
        query_dots, key_dots = kernels.dots(q), kernels.dots(k)
        split_states, final = kernels.states(_Terms(k, v), initial)
        kernels.output("dq", grad, _Terms(v, k, upstream.weights, upstream.extras), split_states, dq, q, query_dots)
        split_grads, _ = kernels.states(upstream, final_grad)
        kernels.output("dv", k, upstream, split_grads, dv)
        kernels.output("dk", v, upstream._replace(keys=grad, values=q), split_grads, dk, k, key_dots)
        if query_dots is None or key_dots is None:
            return dq, dk, dv
        gate_grads = kernels.gate_grads(query_dots, key_dots, split_states[0], final, split_grads[0])
        return dq, dk, dv, gate_grads.to(gates[0].dtype)


class _Terms(NamedTuple):
    """The tokens' terms of a state, ``keys^T values``.

    Attributes:
        keys, values: ``[B, L, H, K]`` and ``[B, L, H, V]``.
        weights, extras: a and c of the module's docstring, ``[B, L, H]`` fp32; None forward and without ``normalize``.
        adjoint: whether the state is the gradient of a state.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor | None = None
    extras: Tensor | None = None
    adjoint: bool = False


class _Weights(NamedTuple):
    """What makes the weights of pairs of tokens differ from 1: decays, documents, a divisor."""

    decay: bool
    documents: bool
    mean: bool


def _tilings(
    width: int, values: int, narrow: bool, weights: _Weights, wgmma: bool, output: bool, gated: bool = False
) -> tuple[Tiling, ...]:
    """Tilings of `_output_kernel` (``output``) or `_split_states_kernel`, the usual one first.

    A tile of the state, ``[BLOCK_K, BLOCK_V]``, stays in registers, of which none are spilled, except in fp32 wider
    than 64. Beside it chunks of 32 tokens fit without weights; with weights, operands of 32 bits or keys of 256, chunks
    of 16 do. Tiles of 64 columns have an alternative of 32: twice the programs, each with half the state, which load
    keys twice. With ``wgmma`` (sm_90) chunks of 64 come first, where they fit: its products have at least 64 rows.

    Args:
        width, values: columns of keys and of values.
        narrow: whether operands are bf16.
        gated: whether each token has its own decay. One tiling, so that the number of tiles is known.
    """
    block_k, block_v = (max(16, triton.next_power_of_2(x)) for x in (width, values))
    roomy = narrow and not any(weights) and max(block_k, block_v) <= 128
    columns = min(block_v, 64 if narrow and block_k <= 128 else 32)
    if gated and output and weights.mean:
        columns = min(columns, 32 if narrow else 16)
    choices = [(32 if roomy else 16, columns, 4 if block_k <= 128 else 8, 3 if roomy else 2)]
    if columns == 64 and (output or not any(weights)):
        choices.append((choices[0][0], 32, *choices[0][2:]))
    if wgmma and narrow and min(block_k, block_v) >= 64:
        wide = min(block_v, 128 if block_k <= 128 else 64)
        if not output or sum(weights) <= (block_k <= 128):
            choices.insert(0, (64, wide, 8 if max(block_k, wide) > 64 else 4, 2))
        elif block_k <= (64 if gated else 128) and weights == (True, True, False):
            choices.insert(0, (64, 64, 8 if block_k > 64 else 4, 2))
        if output and not any(weights) and wide == 128:
            choices.insert(1, (64, 64, 4, 2))
    if gated:
        chunk, num, num_warps, num_stages = choices[0]
        choices = [(chunk, min(num, 64), 8 if chunk == 64 else num_warps, num_stages)]
    return tuple(
        Tiling({"CHUNK": chunk, "BLOCK_K": block_k, "BLOCK_V": num}, num_warps, num_stages)
        for chunk, num, num_warps, num_stages in choices
    )


@dataclass(frozen=True)
class _Kernels:
    """The kernels, launched on one shard.

    Attributes:
        op: the operator's settings.
        documents: ``[B, L]`` int32, the documents numbered from 0, or None.
        shape: B, L, H, K, V.
        split_len: tokens of a split.
        weights: of pairs of tokens.
        gated: whether each token has its own decay.
        decays: ``[H, len(IN_CHUNK)]`` fp32, of tokens of a chunk; None for 1. With ``gated`` their own, ``[B, L, H]``
            fp32, as logarithms.
        powers: ``[H, len(IN_SPLIT)]`` fp64, of which those of splits are made; None for 1.
        operand: the dtype of the operands of matrix products.
        precision: of products of 32 bits on NVIDIA, see `PRECISIONS`.
        wgmma: whether the GPU has matrix products of a warp group, as sm_90 does.
    """

    op: Settings
    documents: Tensor | None
    shape: tuple[int, int, int, int, int]
    split_len: int
    weights: _Weights
    gated: bool
    decays: Tensor | None
    powers: Tensor | None
    operand: tl.dtype
    precision: str | None
    wgmma: bool

    @classmethod
    def of(cls, op: Settings, inputs: tuple[Tensor, ...], segments: Tensor | None) -> _Kernels:
        q, k, v, *gates = inputs
        batch, length, heads, width = q.shape
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        split_len = MIN_SPLIT
        while split_len < MAX_SPLIT and batch * heads * length >= 2 * split_len * PROGRAMS:
            split_len *= 2
        weights = _Weights(op.decay is not None or is_gated(inputs), segments is not None, op.normalize)
        in_chunk = in_split = None
        if gates:
            in_chunk = gates[0].to(torch.float32, memory_format=torch.contiguous_format)
        elif op.decay is not None:
            in_chunk = powers(op.decay, IN_CHUNK, q.device, torch.float32)
            in_split = powers(op.decay, IN_SPLIT, q.device)
        operand = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
        # AMD and the interpreter multiply operands of 32 bits as they are.
        precision = None if torch.version.hip or not (q.is_cuda or q.is_meta) else PRECISIONS[dtype]
        documents = None if segments is None else _numbers(segments)
        shape = (batch, length, heads, width, v.shape[-1])
        return cls(
            op, documents, shape, split_len, weights, bool(gates), in_chunk, in_split, operand, precision, _has_wgmma(q)
        )

    @property
    def running(self) -> bool:
        """Whether tokens see different states; if not, all see the sum over all tokens."""
        return self.op.causal or self.documents is not None

    def upstream(self, q: Tensor, grad: Tensor, saved: tuple[Tensor, ...]) -> _Terms:
        """The terms of the gradient of the state."""
        grad = _rows(grad)
        if not self.op.normalize:
            return _Terms(q, grad, adjoint=True)
        y, divisors = saved
        weights, extras = torch.empty_like(divisors), torch.empty_like(divisors)
        _, length, heads, _, values = self.shape
        num_rows, block_v = divisors.numel(), triton.next_power_of_2(values)
        rows = max(1, 4096 // block_v)
        launch(
            _mean_grad_kernel, triton.cdiv(num_rows, rows),
            grad, y, divisors, weights, extras, *grad.stride()[:3], heads, length, num_rows,
            self._scale, self.op.eps, values, rows, block_v,
        )  # fmt: skip
        return _Terms(q, grad, weights, extras, adjoint=True)

    def states(self, terms: _Terms, initial: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """The state in each direction.

        Args:
            terms: of the state.
            initial: the state that enters the shard (None for zeros): ``[B, H, K, V]`` if causal, otherwise
                ``[2, B, H, K, V]``, that of the state's own direction first.

        Returns:
            The states before the splits, ``[B, N, H, K V (+ K)]`` for each direction, and the final state, of the shape
            of ``initial``. Where all tokens see one state, that state alone, N = 1.
        """
        if self.op.causal:
            split_states, final = self._scan(terms, initial, reverse=terms.adjoint)
            return [split_states], final
        if self.documents is None:
            _, final = self._scan(terms, None, reverse=False)
            total = final if initial is None else initial[0] + initial[1] + final
            return [self._pack(total).unsqueeze(1)], torch.stack([final, final])
        both = [None, None] if initial is None else initial.unbind()
        scans = [self._scan(terms, one, reverse=way != terms.adjoint) for way, one in zip((False, True), both)]
        return [split_states for split_states, _ in scans], torch.stack([final for _, final in scans])

    def _scan(self, terms: _Terms, initial: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """One direction: the states before the splits, and the final state ``[B, H, K, V (+ 1)]``."""
        batch, length, heads, width, values = self.shape
        num_splits, mean = triton.cdiv(length, self.split_len), self.op.normalize
        packed = width * (values + mean)
        keys, rows = _rows(terms.keys), _rows(terms.values)
        states = torch.empty(batch, num_splits, heads, packed, dtype=torch.float32, device=keys.device)
        final = states.new_empty(batch, heads, packed)
        initial = None if initial is None else self._pack(initial)
        tilings = self._tilings(width, values, output=False)
        flags = {"REVERSE": reverse, "DECAY": self.weights.decay, "GATED": self.gated}
        flags["SEGMENTS"] = self.weights.documents
        split_decays = states.new_empty(states.shape[:3], dtype=torch.float64) if self.gated else None
        # The terms of a gradient include the scale: in the weights, or else in the sums.
        scale = self._scale if terms.adjoint and not mean else 1.0
        if states.numel():
            launch_fastest(
                _split_states_kernel, tilings,
                lambda tile: states.shape[:3].numel() * triton.cdiv(values, tile["BLOCK_V"]),
                keys, rows, terms.weights, terms.extras, self.documents, self.decays, split_decays, states,
                *keys.stride()[:3], *rows.stride()[:3], heads, length, self.split_len, num_splits, scale,
                width, values, OPERAND=self.operand, PRECISION=self.precision, **flags, MEAN=mean,
                ADJOINT=terms.adjoint,
            )  # fmt: skip
        if final.numel():
            launch(
                _scan_kernel, batch * heads * triton.cdiv(packed, SCAN_COLUMNS),
                states, initial, final, self.documents, self.powers, split_decays, heads, length, self.split_len,
                num_splits, packed, SCAN_COLUMNS, initial is not None, **flags, num_warps=2,
            )  # fmt: skip
        return states, self._unpack(final)

    def outputs(self, q: Tensor, terms: _Terms, split_states: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y, and the tensors saved for backward."""
        y = torch.empty_like(terms.values, memory_format=torch.contiguous_format)
        divisors = self.output("y", q, terms, split_states, y)
        return y, () if divisors is None else (y, divisors)

    def output(
        self,
        role: str,
        queries: Tensor,
        terms: _Terms,
        split_states: list[Tensor],
        out: Tensor,
        owners: Tensor | None = None,
        dots: Tensor | None = None,
    ) -> Tensor | None:
        """Fill ``out [B, L, H, V]`` with the output of a role; returns y's divisors ``[B, L, H]`` with ``normalize``.

        Args:
            role: y, dq, dv or dk; see the module's docstring.
            queries: ``[B, L, H, K]``.
            terms: keys and values as the role names them.
            split_states: of `states`.
            out: contiguous.
            owners, dots: with ``dots [B, L, H, tiles]`` it is filled with the products of ``owners`` and ``out``.
        """
        batch, length, heads, _, _ = self.shape
        width, values, mean = queries.shape[-1], out.shape[-1], self.op.normalize
        adjoint = role in ("dv", "dk")
        queries, keys, rows = _rows(queries), _rows(terms.keys), _rows(terms.values)
        tilings = self._tilings(width, values, output=True)
        owners = None if dots is None or owners is None else _rows(owners)
        owner_strides = (0, 0, 0) if owners is None else owners.stride()[:3]
        num_splits = triton.cdiv(length, self.split_len)
        # Without `normalize`, the scale multiplies the output, and the gradient of the state includes it already.
        scale = 1.0 if mean and role != "y" else self._scale
        state_scale = 1.0 / scale if adjoint else 1.0
        partial = partial_divisors = divisors = None
        for way, states in enumerate(split_states):
            last = way == len(split_states) - 1
            target = out if last else torch.empty_like(out, dtype=torch.float32)
            divisors = states.new_empty(batch, length, heads) if mean and role == "y" else None
            launch_fastest(
                _output_kernel, tilings,
                lambda tile: batch * num_splits * heads * triton.cdiv(values, tile["BLOCK_V"]),
                queries, keys, rows, states, target, partial, divisors, partial_divisors, terms.weights,
                terms.extras, self.documents, self.decays, owners, dots, *queries.stride()[:3], *keys.stride()[:3],
                *rows.stride()[:3], *owner_strides, heads, length, self.split_len, num_splits, scale, state_scale,
                self.op.eps, width, values,
                OPERAND=self.operand, PRECISION=self.precision, ROLE=role, REVERSE=(way == 1) != adjoint,
                CAUSAL=self.op.causal, RUNNING=self.running, WITHIN_CHUNK=self.running and way == 0, ADD=way > 0,
                DIVIDE=last, DECAY=self.weights.decay, GATED=self.gated, SEGMENTS=self.weights.documents, MEAN=mean,
            )  # fmt: skip
            partial, partial_divisors = target, divisors
        return divisors

    def dots(self, x: Tensor) -> Tensor | None:
        """Room for the products of x, q or k, and its gradient, ``[B, L, H, tiles]``; None without gates."""
        if not self.gated:
            return None
        _, _, _, width, values = self.shape
        (tiling,) = self._tilings(values, width, output=True)
        return x.new_empty(*x.shape[:3], triton.cdiv(width, tiling.constants["BLOCK_V"]), dtype=torch.float32)

    def gate_grads(
        self, query_dots: Tensor, key_dots: Tensor, states: Tensor, final: Tensor, state_grads: Tensor
    ) -> Tensor:
        """The gradient of log_decay, ``[B, L, H]`` fp32.

        Args:
            query_dots, key_dots: of `output`.
            states: before the splits, ``[B, N, H, K V (+ K)]``.
            final: the state after the last split.
            state_grads: the gradients of the states after the splits, as ``states``.
        """
        batch, length, heads, _, _ = self.shape
        grads = query_dots.new_empty(batch, length, heads)
        num_splits = states.shape[1]
        if grads.numel():
            launch(
                _gate_grad_kernel, batch * num_splits * heads,
                query_dots, key_dots, states, self._pack(final), state_grads, self.documents, grads, heads, length,
                self.split_len, num_splits, states.shape[3], query_dots.shape[3], 32, 512, self.weights.documents,
                num_warps=4,
            )  # fmt: skip
        return grads

    def _tilings(self, width: int, values: int, *, output: bool) -> tuple[Tiling, ...]:
        return _tilings(width, values, self.operand == tl.bfloat16, self.weights, self.wgmma, output, self.gated)

    @property
    def _scale(self) -> float:
        return self.op.scale or TINY

    def _pack(self, state: Tensor) -> Tensor:
        """``[B, H, K, V (+ 1)]`` -> ``[B, H, K V (+ K)]``: the matrix, then z."""
        if self.op.normalize:
            return torch.cat([state[..., :-1].flatten(2), state[..., -1]], dim=-1)
        return state.flatten(2).contiguous()

    def _unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `_pack`."""
        _, _, _, width, values = self.shape
        matrix = packed[..., : width * values].unflatten(-1, (width, values))
        return torch.cat([matrix, packed[..., width * values :].unsqueeze(-1)], -1) if self.op.normalize else matrix


def _has_wgmma(x: Tensor) -> bool:
    if x.device.type == "cpu" or is_traced(x):
        return False
    if x.is_cuda:
        return not torch.version.hip and torch.cuda.get_device_capability(x.device)[0] == 9
    return bool(driver.active.get_current_target().arch == 90)  # tensors without data


def _numbers(segments: Tensor) -> Tensor:
    """Documents numbered from 0 in each row, int32: ids of 64 bits would take twice the registers."""
    numbers = torch.zeros(segments.shape, dtype=torch.int32, device=segments.device)
    torch.cumsum(segments[:, 1:] != segments[:, :-1], dim=1, dtype=torch.int32, out=numbers[:, 1:])
    return numbers


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def variants() -> Iterator[Variant]:
    """Every kernel at common widths: plain, with decays, documents, a mean, and with decays or a mean of documents.

    Those whose name ends in sm_90 are launched there alone.
    """
    plain: dict[str, object] = {"DECAY": False, "GATED": False, "SEGMENTS": False, "MEAN": False}
    documents = plain | {"SEGMENTS": True}
    labels = {
        "plain": plain,
        "decay": plain | {"DECAY": True},
        "mean": plain | {"MEAN": True},
        "documents": documents,
        "decayed-documents": documents | {"DECAY": True},
        "means-of-documents": documents | {"MEAN": True},
    }
    gated = plain | {"DECAY": True, "GATED": True}
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    flags: dict[str, object] = {"CAUSAL": True, "RUNNING": True, "WITHIN_CHUNK": True, "ADD": False, "DIVIDE": True}
    roles = [(bf16, 128, label, role) for label in labels for role in ("y", "dq", "dv", "dk")]
    both, means = "decayed-documents", "means-of-documents"
    roles += [(bf16, 64, label, "dq") for label in labels]
    roles += [(bf16, 64, "plain", "y"), (bf16, 256, "plain", "y"), (bf16, 256, both, "dk"), (bf16, 256, means, "dk")]
    roles += [
        (fp16, 128, "plain", "y"),
        (fp16, 128, both, "dk"),
        (fp16, 128, means, "dk"),
        (fp32, 64, both, "dv"),
        (fp32, 64, means, "dk"),
        (fp32, 64, means, "y"),
    ]
    gates, all_weights = "gated", "gated-means-of-documents"
    labels |= {gates: gated, "gated-means": gated | {"MEAN": True}, "gated-documents": gated | {"SEGMENTS": True}}
    labels[all_weights] = labels["gated-documents"] | {"MEAN": True}
    roles += [(bf16, size, gates, role) for size in (64, 128) for role in ("y", "dq", "dk")]
    roles += [(bf16, 128, label, "dk") for label in ("gated-documents", "gated-means", all_weights)]
    roles += [(fp16, 128, all_weights, "dk"), (fp32, 64, gates, "dk")]
    roles += [(fp32, 64, all_weights, role) for role in ("y", "dq", "dk")]
    for dtype, size, label, role in roles:
        name = f"{dtype}-{size}-{label}".removeprefix("torch.")
        settings = flags | labels[label] | {"ROLE": role, "REVERSE": role in ("dv", "dk")}
        yield from _variants(f"{role}-{name}", _output_kernel, dtype, size, settings)
        if role in ("y", "dk"):  # dq and dv do not do more
            settings = labels[label] | {"REVERSE": role == "dk", "ADJOINT": role == "dk"}
            yield from _variants(f"{role}-split-states-{name}", _split_states_kernel, dtype, size, settings)
    flags = labels[means] | {"ROLE": "y", "CAUSAL": False, "WITHIN_CHUNK": False, "DIVIDE": True}
    back, still = {"RUNNING": True, "REVERSE": True, "ADD": True}, {"RUNNING": False, "REVERSE": False, "ADD": False}
    yield from _variants("y-from-the-right", _output_kernel, bf16, 128, flags | back)
    yield from _variants("y-of-one-state", _output_kernel, bf16, 128, flags | still | {"SEGMENTS": False})
    scan = labels[both] | {"BLOCK_W": SCAN_COLUMNS, "INITIAL": True, "REVERSE": True}
    yield from _variants("scan", _scan_kernel, fp32, 128, scan)
    grads: dict[str, object] = {"V": 128, "ROWS": 32, "BLOCK_V": 128}
    gate_grads: dict[str, object] = {"TILES": 2, "ROWS": 32, "BLOCK_W": 512, "SEGMENTS": True}
    yield from _variants("gate-grad", _gate_grad_kernel, fp32, 128, gate_grads)
    yield from _variants("mean-grad", _mean_grad_kernel, bf16, 128, grads)


def _variants(name: str, kernel: Any, dtype: torch.dtype, size: int, constants: dict[str, object]) -> Iterator[Variant]:
    """In all of its tilings."""
    narrow = dtype == torch.bfloat16
    constants = {
        "K": size,
        "V": size,
        "OPERAND": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": PRECISIONS[dtype],
    } | constants
    given = dict.fromkeys(("queries", "keys", "values", "out", "grad", "y"), TYPES[dtype])
    fp32 = ("weights", "extras", "decays", "states", "partial", "divisors", "partial_divisors", "initial", "final")
    given |= dict.fromkeys(fp32, "*fp32") | dict.fromkeys(("scale", "state_scale", "eps"), "fp32")
    given |= {"segments": "*i32", "powers": "*fp64", "split_decays": "*fp64", "owners": TYPES[dtype]}
    given |= dict.fromkeys(("dots", "query_dots", "key_dots", "state_grads", "grads"), "*fp32")
    given |= dict.fromkeys(("CHUNK", "BLOCK_K", "BLOCK_V", *constants), "constexpr")
    signature = {x: given.get(x, "i32") for x in kernel.arg_names}
    constants = {x: value for x, value in constants.items() if x in signature}
    if kernel not in (_split_states_kernel, _output_kernel):
        yield Variant(name, kernel, signature, constants, 2 if kernel is _scan_kernel else 4, 3)
        return
    weights = _Weights(*(bool(constants[x]) for x in ("DECAY", "SEGMENTS", "MEAN")))
    case = size, size, narrow, weights
    usual, hopper = (
        _tilings(*case, wgmma, kernel is _output_kernel, bool(constants["GATED"])) for wgmma in (False, True)
    )
    for tiling in (*hopper, *(x for x in usual if x not in hopper)):
        label = "-".join(str(x) for x in (name, tiling.constants["CHUNK"], tiling.constants["BLOCK_V"]))
        label += "" if tiling in usual else "-sm_90"
        yield Variant(label, kernel, signature, constants | tiling.constants, tiling.num_warps, tiling.num_stages)
