"""Element-wise attention on GPUs: a program reads the tokens of a channel in order, the sums in registers.

Axes: B batch, L tokens, D channels, t order, N chunks of `CHUNK` tokens, and 2 for the pair of sums, ``(S, Z)``
forward and their gradients ``(R, U)`` backward. README.md beside this file has the formulas.

The recurrence is sequential: the sums of a channel are 2 (t+1) numbers, which fit registers, and each token costs about
3 (t+1) multiply-adds. A parallel scan over a tile of tokens would cost several times that, and a product with a mask
would not keep fp32. A program is one warp for `COLS` channels of one chunk; it loads `ROWS` tokens at once, to have
many loads in flight, and processes them one by one. Chunks run in parallel; the state before each comes from the totals
of the chunks before it, which a small kernel sums in fp64. A sum in fp32 thus has at most `CHUNK` tokens: its relative
error, for terms of one sign, stays below ``2 CHUNK 2^-24`` = 1.5e-5, and near 3e-7 for terms that vary.

Instructions are as scarce as bytes, so whole groups of tokens have no masks, pointers walk from row to row, and powers
and reciprocals do without denormals.

Forward: totals of keys, states before the chunks, output. Backward: query gradient (which recomputes y and the
denominator from the saved states, and computes the totals of queries), states from the right, key and value gradient.
Non-causal with documents, a token's sums have a part from each side: one launch stores its part, the second adds its
own.

Traffic in units of one ``[B, L, D]`` tensor of 16 bits, where s = (t+1) 4 / `CHUNK` is a set of states (order 6: 0.22):

| pass | reads | writes |
|---|---|---|
| totals | k, v: 2 | s |
| chunk states | s | s |
| output | q, k, v: 3, s | y: 1 |
| query gradient | q, k, v, g: 4, s | dq: 1, g / den and y in fp32: 4, s |
| chunk states | s | s |
| key and value gradient | q, k, v: 3, g / den and y: 4, s | dk, dv: 2 |

Forward 6 + 4 s, backward 18 + 5 s; saved for the backward pass: s. ``g / den`` and y stay fp32, for ``v R + U``
cancels.
"""

# Kernels have Triton's types, which mypy does not know.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..chunks import to_chunks
from ..gpu import TYPES, Tiling, Variant, launch, launch_fastest
from ..state import FusedForward, StatefulOp
from .chunked import Chunked
from .reference import DEN_FLOOR, GRAD_LIMIT, Q_LIMIT

CHUNK = 128  # tokens whose sum is fp32

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_Q_LIMIT = tl.constexpr(Q_LIMIT)
_DEN_FLOOR = tl.constexpr(DEN_FLOOR)
_GRAD_LIMIT = tl.constexpr(GRAD_LIMIT)


@triton.jit
def _exposed(x):
    """``x`` with NaN for infinities, which a clamp, an exponential or a quotient would turn into finite numbers."""
    return x + 0.0 * x


@triton.jit
def _clamped(x, LIMIT: tl.constexpr):
    """``x`` clamped to +-`LIMIT`; NaN stays NaN."""
    return tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _query(q):
    """q in fp32, clamped to +-`Q_LIMIT`; NaN where it is not finite."""
    return _clamped(_exposed(q.to(tl.float32)), _Q_LIMIT)


@triton.jit
def _floored(den):
    return tl.maximum(den, _DEN_FLOOR, propagate_nan=tl.PropagateNan.ALL)


# The interpreter lacks libdevice. On a GPU that takes one instruction for a power or a reciprocal, exact to 2 units in
# the last place; Triton's own functions take up to six more, for denormals. A weight below 1e-38 is 0, and no
# denominator leaves [1e-30, 1e38].


@triton.jit
def _weight(k):
    """``exp(-k^2)``."""
    if INTERPRETED:
        return tl.exp(-k * k)
    else:
        return libdevice.exp2(k * (k * -1.4426950408889634))


@triton.jit
def _divided(x, den):
    if INTERPRETED:
        return x / den
    else:
        return libdevice.fast_dividef(x, den)


@triton.jit
def _place(num_chunks, length, width, CHUNK: tl.constexpr, COLS: tl.constexpr):
    """This program's row of the batch, chunk, first token, number of tokens, and channels."""
    num_tiles = tl.cdiv(width, COLS)
    program = tl.program_id(0)
    chunk = program // num_tiles % num_chunks
    first = chunk * CHUNK
    cols = program % num_tiles * COLS + tl.arange(0, COLS)
    row = (program // num_tiles // num_chunks).to(tl.int64)
    return row, chunk.to(tl.int64), first.to(tl.int64), tl.minimum(length - first, CHUNK), cols


@triton.jit
def _token(step, first, num, REVERSE: tl.constexpr):
    """The token of a step."""
    if REVERSE:
        return first + (num - 1 - step)
    else:
        return first + step


@triton.jit
def _walk(x, first, num, stride, cols, REVERSE: tl.constexpr):
    """Pointers to the row of the first step's token, and the distance to that of the next one."""
    stride = tl.full([], stride, tl.int64)
    return x + _token(0, first, num, REVERSE) * stride + cols, -stride if REVERSE else stride


@triton.jit
def _continues(document_starts, token, REVERSE: tl.constexpr):
    """Whether a token is of the same document as the token processed before it."""
    return tl.load(document_starts + token + REVERSE) == 0


@triton.jit
def _zeros(COUNT: tl.constexpr, COLS: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.full((COLS,), 0.0, tl.float32),)
    return sums


@triton.jit
def _load_sums(states, width, cols, COUNT: tl.constexpr):
    sums = ()
    for n in tl.static_range(COUNT):
        sums += (tl.load(states + n * width + cols, mask=cols < width, other=0.0),)
    return sums


@triton.jit
def _store_sums(states, sums, width, cols, COUNT: tl.constexpr):
    for n in tl.static_range(COUNT):
        tl.store(states + n * width + cols, sums[n], mask=cols < width)


@triton.jit
def _reset(sums, keep, COUNT: tl.constexpr):
    """The sums, or zeros where a document begins."""
    kept = ()
    for n in tl.static_range(COUNT):
        kept += (tl.where(keep, sums[n], 0.0),)
    return kept


@triton.jit
def _add_key(sums, k, v, ORDER: tl.constexpr):
    """``S_n + k^n w v`` for n = 0..t, then ``Z_n + k^n w``; NaN for n > 0 where k or v is not finite."""
    power = _weight(k)
    v = _exposed(v)
    s, z = (), ()
    for n in tl.static_range(ORDER + 1):
        s += (sums[n] + power * v,)
        z += (sums[ORDER + 1 + n] + power,)
        power = power * k
    return s + z


@triton.jit
def _add_query(sums, q, a, y, ORDER: tl.constexpr):
    """``R_n + c_n q^n a`` for n = 0..t, then ``U_n - c_n q^n a y``."""
    power = a
    r, u = (), ()
    for n in tl.static_range(ORDER + 1):
        term = _clamped(power, _GRAD_LIMIT)
        r += (sums[n] + term,)
        u += (sums[ORDER + 1 + n] - _clamped(term * y, _GRAD_LIMIT),)
        power = power * (q * (2.0 / (n + 1)))
    return r + u


@triton.jit
def _at_query(sums, q, ORDER: tl.constexpr):
    """``sum_n c_n q^n (S_n, Z_n)``, by Horner's rule."""
    num, den = sums[ORDER], sums[2 * ORDER + 1]
    for m in tl.static_range(ORDER):
        factor = q * (2.0 / (ORDER - m))
        num = num * factor + sums[ORDER - 1 - m]
        den = den * factor + sums[2 * ORDER - m]
    return num, den


@triton.jit
def _slope_at_query(sums, q, ORDER: tl.constexpr):
    """``sum_(n>0) c_(n-1) q^(n-1) (S_n, Z_n)``: half the derivative of `_at_query`."""
    num, den = sums[ORDER], sums[2 * ORDER + 1]
    for m in tl.static_range(ORDER - 1):
        factor = q * (2.0 / (ORDER - 1 - m))
        num = num * factor + sums[ORDER - 1 - m]
        den = den * factor + sums[2 * ORDER - m]
    return num, den


@triton.jit
def _at_key(sums, k, v, ORDER: tl.constexpr):
    """``sum_n (n k^(n-1) - 2 k^(n+1)) w (v R_n + U_n)`` and ``sum_n k^n w R_n``.

    Powers are built upwards from w: where w is 0, so are they.
    """
    power = _weight(k)
    v = _exposed(v)
    dv = power * sums[0]
    rising = power * (v * sums[0] + sums[ORDER + 1])
    falling = tl.full(k.shape, 0.0, tl.float32)
    for n in tl.static_range(1, ORDER + 1):
        both = v * sums[n] + sums[ORDER + 1 + n]
        falling += (n * power) * both
        power = power * k
        rising += power * both
        dv += power * sums[n]
    return falling - 2.0 * k * rising, dv


@triton.jit
def _total_tokens(
    sums,
    x,
    v,
    y,
    document_starts,
    token,
    x_step,
    v_step,
    y_step,
    mask,
    KEYS: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums of `_elementwise_totals_kernel` after `ROWS` more tokens, of which ``token`` is the first."""
    xs, vs, ys = (), (), ()
    for i in tl.static_range(ROWS):
        xs += (tl.load(x + i * x_step, mask=mask),)
        vs += (tl.load(v + i * v_step, mask=mask),)
        if not KEYS:
            ys += (tl.load(y + i * y_step, mask=mask),)
    for i in tl.static_range(ROWS):
        if DOCUMENTS:
            keep = _continues(document_starts, token - i if REVERSE else token + i, REVERSE)
            sums = _reset(sums, keep, 2 * ORDER + 2)
        if KEYS:
            sums = _add_key(sums, _exposed(xs[i].to(tl.float32)), vs[i].to(tl.float32), ORDER)
        else:
            sums = _add_query(sums, _query(xs[i]), vs[i], ys[i], ORDER)
    return sums


@triton.jit
def _elementwise_totals_kernel(
    x,  # [B, L, D], k or q
    v,  # [B, L, D], v or a
    y,  # [B, L, D], unused with KEYS
    document_starts,  # [B, L + 1] int8, whether a document begins; unused without DOCUMENTS
    totals,  # [B, N, 2, t+1, D] fp32
    num_chunks,
    length,
    width,
    x_batch,
    x_token,
    v_batch,
    v_token,
    KEYS: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    ORDER: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Each chunk's sum over its last document (the first if REVERSE): of the terms of keys, or of queries."""
    COUNT: tl.constexpr = 2 * ORDER + 2
    row, chunk, first, num, cols = _place(num_chunks, length, width, CHUNK, COLS)
    x += row * x_batch
    v += row * v_batch
    y += row * length * width
    document_starts += row * (length + 1)
    sums = _zeros(COUNT, COLS)
    x, x_step = _walk(x, first, num, x_token, cols, REVERSE)
    v, v_step = _walk(v, first, num, v_token, cols, REVERSE)
    y, y_step = _walk(y, first, num, width, cols, REVERSE)
    mask = cols < width
    whole = num // ROWS * ROWS
    for tail in tl.static_range(2):  # the tail token by token
        for start in range(whole if tail else 0, num if tail else whole, 1 if tail else ROWS):
            sums = _total_tokens(
                sums, x, v, y, document_starts, _token(start, first, num, REVERSE), x_step, v_step, y_step, mask,
                KEYS, REVERSE, DOCUMENTS, ORDER, 1 if tail else ROWS,
            )  # fmt: skip
            x += (1 if tail else ROWS) * x_step
            v += (1 if tail else ROWS) * v_step
            y += (1 if tail else ROWS) * y_step
    _store_sums(totals + (row * num_chunks + chunk) * COUNT * width, sums, width, cols, COUNT)


@triton.jit
def _elementwise_chunk_states_kernel(
    states,  # [B, N, C] fp32, C = 2 (t+1) D: the chunks' totals, replaced by the states before the chunks if WRITE
    initial,  # [B, C] fp32, the state before the first chunk
    decays,  # [B, N] fp32, 0 where a document begins in a chunk, else 1; unused without DOCUMENTS
    final,  # [B, C] fp32, the state after the last chunk
    num_chunks,
    size,
    WRITE: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """An exclusive scan of the chunks' affine maps, in fp64."""
    num_tiles = tl.cdiv(size, COLS)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    cols = tl.program_id(0) % num_tiles * COLS + tl.arange(0, COLS)
    inside = cols < size
    first = tl.full((), 0, tl.int64)
    states += row * num_chunks * size
    decays += row * num_chunks
    state = _exposed(tl.load(initial + row * size + cols, mask=inside, other=0.0).to(tl.float64))
    for start in range(0, num_chunks, ROWS):
        totals, kept = (), ()
        for i in tl.static_range(ROWS):
            chunk = _token(start + i, first, num_chunks, REVERSE)
            end = tl.where(start + i < num_chunks, size, 0)
            totals += (tl.load(states + chunk * size + cols, mask=cols < end, other=0.0),)
            if DOCUMENTS:
                kept += (tl.load(decays + chunk, mask=end > 0, other=1.0) > 0,)
        for i in tl.static_range(ROWS):
            if WRITE:
                here = states + _token(start + i, first, num_chunks, REVERSE) * size + cols
                tl.store(here, state.to(tl.float32), mask=cols < tl.where(start + i < num_chunks, size, 0))
            if DOCUMENTS:
                state = tl.where(kept[i], state, 0.0)
            state += totals[i].to(tl.float64)
    tl.store(final + row * size + cols, state.to(tl.float32), mask=inside)


@triton.jit
def _output_tokens(
    sums,
    q,
    k,
    v,
    document_starts,
    part,
    part_size,
    out,
    token,
    q_step,
    k_step,
    v_step,
    step,
    mask,
    RUNNING: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums of `_elementwise_output_kernel` after `ROWS` more tokens, of which ``token`` is the first."""
    qs, ks, vs = (), (), ()
    for i in tl.static_range(ROWS):
        qs += (tl.load(q + i * q_step, mask=mask),)
        if RUNNING:
            ks += (tl.load(k + i * k_step, mask=mask),)
            vs += (tl.load(v + i * v_step, mask=mask),)
    for i in tl.static_range(ROWS):
        if DOCUMENTS:
            keep = _continues(document_starts, token - i if REVERSE else token + i, REVERSE)
            sums = _reset(sums, keep, 2 * ORDER + 2)
        if RUNNING and not REVERSE:
            sums = _add_key(sums, ks[i].to(tl.float32), vs[i].to(tl.float32), ORDER)
        num_i, den = _at_query(sums, _query(qs[i]), ORDER)
        if PARTS and REVERSE:
            tl.store(part + i * step, num_i, mask=mask)
            tl.store(part + part_size + i * step, den, mask=mask)
        else:
            if PARTS:
                num_i += tl.load(part + i * step, mask=mask)
                den += tl.load(part + part_size + i * step, mask=mask)
            y = _clamped(_divided(num_i, _floored(den)), LIMIT)
            tl.store(out + i * step, y.to(out.dtype.element_ty), mask=mask)
        if RUNNING and REVERSE:
            sums = _add_key(sums, ks[i].to(tl.float32), vs[i].to(tl.float32), ORDER)
    return sums


@triton.jit
def _elementwise_output_kernel(
    q,  # [B, L, D], as k and v
    k,
    v,
    document_starts,  # [B, L + 1] int8
    states,  # [B, N, 2, t+1, D] fp32, the states before the chunks (the sum over all tokens if not RUNNING)
    part,  # [2, B, L, D] fp32: numerator and denominator of the other side; written if REVERSE, else read, with PARTS
    out,  # [B, L, D]
    num_chunks,
    length,
    width,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    state_batch,
    state_chunk,
    part_size,
    RUNNING: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    ORDER: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The output, from the sums up to and including each token; if REVERSE from the right, without the token."""
    COUNT: tl.constexpr = 2 * ORDER + 2
    row, chunk, first, num, cols = _place(num_chunks, length, width, CHUNK, COLS)
    q += row * q_batch
    k += row * k_batch
    v += row * v_batch
    document_starts += row * (length + 1)
    part += row * length * width
    out += row * length * width
    sums = _load_sums(states + row * state_batch + chunk * state_chunk, width, cols, COUNT)
    q, q_step = _walk(q, first, num, q_token, cols, REVERSE)
    k, k_step = _walk(k, first, num, k_token, cols, REVERSE)
    v, v_step = _walk(v, first, num, v_token, cols, REVERSE)
    part, step = _walk(part, first, num, width, cols, REVERSE)
    out, step = _walk(out, first, num, width, cols, REVERSE)
    mask = cols < width
    whole = num // ROWS * ROWS
    for tail in tl.static_range(2):  # the tail token by token
        for start in range(whole if tail else 0, num if tail else whole, 1 if tail else ROWS):
            sums = _output_tokens(
                sums, q, k, v, document_starts, part, part_size, out, _token(start, first, num, REVERSE),
                q_step, k_step, v_step, step, mask,
                RUNNING, REVERSE, DOCUMENTS, PARTS, LIMIT, ORDER, 1 if tail else ROWS,
            )  # fmt: skip
            q += (1 if tail else ROWS) * q_step
            k += (1 if tail else ROWS) * k_step
            v += (1 if tail else ROWS) * v_step
            part += (1 if tail else ROWS) * step
            out += (1 if tail else ROWS) * step


@triton.jit
def _query_grad_tokens(
    sums,
    seeing,
    leading,
    q,
    k,
    v,
    grad,
    document_starts,
    part,
    part_size,
    dq,
    a,
    y,
    start,
    token,
    q_step,
    k_step,
    v_step,
    grad_step,
    step,
    mask,
    RUNNING: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The state of `_elementwise_query_grad_kernel` after `ROWS` more tokens, of which ``token`` is the first."""
    FLOAT_MAX: tl.constexpr = 3.4028234663852886e38
    qs, ks, vs, gs = (), (), (), ()
    for i in tl.static_range(ROWS):
        qs += (tl.load(q + i * q_step, mask=mask),)
        if not (PARTS and REVERSE):
            gs += (tl.load(grad + i * grad_step, mask=mask),)
        if RUNNING:
            ks += (tl.load(k + i * k_step, mask=mask),)
            vs += (tl.load(v + i * v_step, mask=mask),)
    for i in tl.static_range(ROWS):
        if DOCUMENTS:
            keep = _continues(document_starts, token - i if REVERSE else token + i, REVERSE)
            leading = leading & (keep | (start + i == 0))
            sums = _reset(sums, keep, 2 * ORDER + 2)
        if RUNNING and not REVERSE:
            sums = _add_key(sums, ks[i].to(tl.float32), vs[i].to(tl.float32), ORDER)
        raw = _exposed(qs[i].to(tl.float32))
        bounded = _clamped(raw, _Q_LIMIT)
        num_i, den = _at_query(sums, bounded, ORDER)
        top, bottom = _slope_at_query(sums, bounded, ORDER)
        if PARTS and REVERSE:
            tl.store(part + i * step, num_i, mask=mask)
            tl.store(part + part_size + i * step, den, mask=mask)
            tl.store(part + 2 * part_size + i * step, top, mask=mask)
            tl.store(part + 3 * part_size + i * step, bottom, mask=mask)
        else:
            if PARTS:
                num_i += tl.load(part + i * step, mask=mask)
                den += tl.load(part + part_size + i * step, mask=mask)
                top += tl.load(part + 2 * part_size + i * step, mask=mask)
                bottom += tl.load(part + 3 * part_size + i * step, mask=mask)
            scale = _divided(1.0, _floored(den))
            y_i = tl.where(den < _DEN_FLOOR, 0.0, _clamped(num_i * scale, FLOAT_MAX))
            a_i = _exposed(gs[i].to(tl.float32)) * scale
            slope = _clamped(2.0 * a_i * (top - y_i * bottom), _GRAD_LIMIT)
            slope = tl.where(tl.abs(raw) > _Q_LIMIT, 0.0, _clamped(slope, LIMIT))
            tl.store(dq + i * step, slope.to(dq.dtype.element_ty), mask=mask)
            tl.store(a + i * step, a_i, mask=mask)
            tl.store(y + i * step, y_i, mask=mask)
            if not PARTS:
                if DOCUMENTS:  # no product with 0, which may be NaN
                    bounded, a_i = tl.where(leading, bounded, 0.0), tl.where(leading, a_i, 0.0)
                    y_i = tl.where(leading, y_i, 0.0)
                seeing = _add_query(seeing, bounded, a_i, y_i, ORDER)
        if RUNNING and REVERSE:
            sums = _add_key(sums, ks[i].to(tl.float32), vs[i].to(tl.float32), ORDER)
    return sums, seeing, leading


@triton.jit
def _elementwise_query_grad_kernel(
    q,  # [B, L, D], as k, v and grad
    k,
    v,
    grad,
    document_starts,  # [B, L + 1] int8
    states,  # [B, N, 2, t+1, D] fp32, the states before the chunks (the sum over all tokens if not RUNNING)
    part,  # [4, B, L, D] fp32: `_at_query` and `_slope_at_query` of the other side, see `_elementwise_output_kernel`
    dq,  # [B, L, D]
    a,  # [B, L, D] fp32: grad over the denominator
    y,  # [B, L, D] fp32: the output, 0 where the denominator is floored
    totals,  # [B, N, 2, t+1, D] fp32: each chunk's sum of the terms of queries, in its first document
    num_chunks,
    length,
    width,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    grad_batch,
    grad_token,
    state_batch,
    state_chunk,
    part_size,
    RUNNING: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    ORDER: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The gradient of q, by the recurrence of `_elementwise_output_kernel`, and the terms and totals of queries.

    With PARTS no totals are computed: the sides have different documents.
    """
    COUNT: tl.constexpr = 2 * ORDER + 2
    row, chunk, first, num, cols = _place(num_chunks, length, width, CHUNK, COLS)
    q += row * q_batch
    k += row * k_batch
    v += row * v_batch
    grad += row * grad_batch
    document_starts += row * (length + 1)
    part += row * length * width
    part_size = tl.full([], part_size, tl.int64)  # three times it may exceed 32 bits where it does not itself
    dq += row * length * width
    a += row * length * width
    y += row * length * width
    sums = _load_sums(states + row * state_batch + chunk * state_chunk, width, cols, COUNT)
    seeing = _zeros(COUNT, COLS)
    leading = num > 0  # whether the token is in the chunk's first document
    q, q_step = _walk(q, first, num, q_token, cols, REVERSE)
    k, k_step = _walk(k, first, num, k_token, cols, REVERSE)
    v, v_step = _walk(v, first, num, v_token, cols, REVERSE)
    grad, grad_step = _walk(grad, first, num, grad_token, cols, REVERSE)
    part, step = _walk(part, first, num, width, cols, REVERSE)
    dq, step = _walk(dq, first, num, width, cols, REVERSE)
    a, step = _walk(a, first, num, width, cols, REVERSE)
    y, step = _walk(y, first, num, width, cols, REVERSE)
    mask = cols < width
    whole = num // ROWS * ROWS
    for tail in tl.static_range(2):  # the tail token by token
        for start in range(whole if tail else 0, num if tail else whole, 1 if tail else ROWS):
            sums, seeing, leading = _query_grad_tokens(
                sums, seeing, leading, q, k, v, grad, document_starts, part, part_size, dq, a, y, start,
                _token(start, first, num, REVERSE), q_step, k_step, v_step, grad_step, step, mask,
                RUNNING, REVERSE, DOCUMENTS, PARTS, LIMIT, ORDER, 1 if tail else ROWS,
            )  # fmt: skip
            q += (1 if tail else ROWS) * q_step
            k += (1 if tail else ROWS) * k_step
            v += (1 if tail else ROWS) * v_step
            grad += (1 if tail else ROWS) * grad_step
            part += (1 if tail else ROWS) * step
            dq += (1 if tail else ROWS) * step
            a += (1 if tail else ROWS) * step
            y += (1 if tail else ROWS) * step
    if not PARTS:
        _store_sums(totals + (row * num_chunks + chunk) * COUNT * width, seeing, width, cols, COUNT)


@triton.jit
def _key_grad_tokens(
    sums,
    q,
    k,
    v,
    a,
    y,
    document_starts,
    part,
    part_size,
    dk,
    dv,
    token,
    q_step,
    k_step,
    v_step,
    step,
    mask,
    RUNNING: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums of `_elementwise_key_grad_kernel` after `ROWS` more tokens, of which ``token`` is the first."""
    qs, ks, vs, a_s, ys = (), (), (), (), ()
    for i in tl.static_range(ROWS):
        ks += (tl.load(k + i * k_step, mask=mask),)
        vs += (tl.load(v + i * v_step, mask=mask),)
        if RUNNING:
            qs += (tl.load(q + i * q_step, mask=mask),)
            a_s += (tl.load(a + i * step, mask=mask),)
            ys += (tl.load(y + i * step, mask=mask),)
    for i in tl.static_range(ROWS):
        if DOCUMENTS:
            keep = _continues(document_starts, token - i if REVERSE else token + i, REVERSE)
            sums = _reset(sums, keep, 2 * ORDER + 2)
        if RUNNING and REVERSE:
            sums = _add_query(sums, _query(qs[i]), a_s[i], ys[i], ORDER)
        dk_i, dv_i = _at_key(sums, ks[i].to(tl.float32), vs[i].to(tl.float32), ORDER)
        if PARTS and not REVERSE:
            tl.store(part + i * step, dk_i, mask=mask)
            tl.store(part + part_size + i * step, dv_i, mask=mask)
        else:
            if PARTS:
                dk_i += tl.load(part + i * step, mask=mask)
                dv_i += tl.load(part + part_size + i * step, mask=mask)
            tl.store(dk + i * step, _clamped(dk_i, LIMIT).to(dk.dtype.element_ty), mask=mask)
            tl.store(dv + i * step, _clamped(dv_i, LIMIT).to(dv.dtype.element_ty), mask=mask)
        if RUNNING and not REVERSE:
            sums = _add_query(sums, _query(qs[i]), a_s[i], ys[i], ORDER)
    return sums


@triton.jit
def _elementwise_key_grad_kernel(
    q,  # [B, L, D], as k and v
    k,
    v,
    a,  # [B, L, D] fp32, as y: of `_elementwise_query_grad_kernel`
    y,
    document_starts,  # [B, L + 1] int8
    states,  # [B, N, 2, t+1, D] fp32, the states before the chunks (the sum over all tokens if not RUNNING)
    part,  # [2, B, L, D] fp32: dk and dv of the other side; written if not REVERSE, else read, with PARTS
    dk,  # [B, L, D], as dv
    dv,
    num_chunks,
    length,
    width,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    state_batch,
    state_chunk,
    part_size,
    RUNNING: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    ORDER: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The gradients of k and v, from the sums over the queries that see a token; if not REVERSE, without the token."""
    COUNT: tl.constexpr = 2 * ORDER + 2
    row, chunk, first, num, cols = _place(num_chunks, length, width, CHUNK, COLS)
    q += row * q_batch
    k += row * k_batch
    v += row * v_batch
    a += row * length * width
    y += row * length * width
    document_starts += row * (length + 1)
    part += row * length * width
    dk += row * length * width
    dv += row * length * width
    sums = _load_sums(states + row * state_batch + chunk * state_chunk, width, cols, COUNT)
    q, q_step = _walk(q, first, num, q_token, cols, REVERSE)
    k, k_step = _walk(k, first, num, k_token, cols, REVERSE)
    v, v_step = _walk(v, first, num, v_token, cols, REVERSE)
    a, step = _walk(a, first, num, width, cols, REVERSE)
    y, step = _walk(y, first, num, width, cols, REVERSE)
    part, step = _walk(part, first, num, width, cols, REVERSE)
    dk, step = _walk(dk, first, num, width, cols, REVERSE)
    dv, step = _walk(dv, first, num, width, cols, REVERSE)
    mask = cols < width
    whole = num // ROWS * ROWS
    for tail in tl.static_range(2):  # the tail token by token
        for start in range(whole if tail else 0, num if tail else whole, 1 if tail else ROWS):
            sums = _key_grad_tokens(
                sums, q, k, v, a, y, document_starts, part, part_size, dk, dv, _token(start, first, num, REVERSE),
                q_step, k_step, v_step, step, mask,
                RUNNING, REVERSE, DOCUMENTS, PARTS, LIMIT, ORDER, 1 if tail else ROWS,
            )  # fmt: skip
            q += (1 if tail else ROWS) * q_step
            k += (1 if tail else ROWS) * k_step
            v += (1 if tail else ROWS) * v_step
            a += (1 if tail else ROWS) * step
            y += (1 if tail else ROWS) * step
            part += (1 if tail else ROWS) * step
            dk += (1 if tail else ROWS) * step
            dv += (1 if tail else ROWS) * step


def _tilings(rows: int, cols: int) -> tuple[Tiling, ...]:
    """Tilings of one warp, which loads ``rows`` tokens at once.

    ``cols`` channels share the address arithmetic and fit the registers at every order; half as many let about twice as
    many warps reside, which hide each other's loads.
    """
    return tuple(Tiling({"ROWS": rows, "COLS": num}, num_warps=1) for num in (cols, cols // 2))


TILINGS = {
    "_elementwise_totals_kernel": _tilings(4, 128),
    "_elementwise_output_kernel": _tilings(3, 128),
    "_elementwise_query_grad_kernel": _tilings(3, 64),
    "_elementwise_key_grad_kernel": _tilings(3, 128),
}
CHUNK_STATES_TILE = {"ROWS": 16, "COLS": 32}
ONE_WARP = {"num_warps": 1, "num_stages": 1}


class QueryGrad(NamedTuple):
    """The results of `_Kernels.query_grad`.

    Attributes:
        dq: ``[B, L, D]`` in the dtype of q.
        a: ``[B, L, D]`` fp32, the gradient of y over the denominator.
        y: ``[B, L, D]`` fp32, 0 where the denominator is floored.
        totals: ``[B, N, 2, t+1, D]`` fp32, each chunk's sum of the terms of queries over its first document.
    """

    dq: Tensor
    a: Tensor
    y: Tensor
    totals: Tensor


class Triton(Chunked):
    """`Chunked` by Triton's kernels, for fp16, bf16 and fp32; same states, same guards.

    Saved for the backward pass: the states before the chunks, ``[B, N, 2, t+1, D]`` fp32. A single token runs in
        PyTorch.

    Across ranks, both passes of a direction need the same sums, and the signatures of passes do not transfer them. So
    one object serves one `scan`: the first pass leaves the sums in an attribute, and the second takes them from it, or
    computes them where it is None.

    Attributes:
        key_totals: of `local_transition`, for `apply_state`: ``[B, N, 2, t+1, D]`` fp32.
        query_grad: of `incoming_state_grad`, for `input_grads`.
    """

    key_totals: Tensor | None = None
    query_grad: QueryGrad | None = None

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        return Triton(self.order, self.causal)

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        if _is_small(inputs):
            return super().local_transition(inputs, segments)
        kernels = _Kernels.of(self, inputs, segments)
        self.key_totals = kernels.key_totals()
        state = kernels.final_state(self.key_totals)
        if not self.causal:
            to_left = state
            if segments is not None:
                to_left = kernels.final_state(kernels.key_totals(reverse=True), reverse=True)
            state = torch.stack([state, to_left])
        return state.new_ones(1, 1, 1, 1), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if _is_small(inputs):
            return super().apply_state(inputs, segments, initial)
        kernels = _Kernels.of(self, inputs, segments)
        totals = kernels.key_totals() if self.key_totals is None else self.key_totals
        self.key_totals = None
        if self.causal:
            kernels.scan_chunks(totals, initial)
            saved: tuple[Tensor, ...] = (totals,)
        elif segments is None:
            saved = (kernels.expand_to_chunks(kernels.final_state(totals, initial[0] + initial[1])),)
        else:
            from_right = kernels.key_totals(reverse=True)
            kernels.scan_chunks(totals, initial[0])
            kernels.scan_chunks(from_right, initial[1], reverse=True)
            saved = (totals, from_right)
        return kernels.output(saved), saved

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        if _is_small(inputs):
            return super().fused_forward(inputs, segments, initial)
        kernels = _Kernels.of(self, inputs, segments)
        totals = kernels.key_totals()
        initial = torch.zeros_like(totals[:, 0]) if initial is None else initial.float()
        final = kernels.scan_chunks(totals, initial)
        return FusedForward(initial, kernels.output((totals,)), (totals,), initial.new_ones(1, 1, 1, 1), final)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        if _is_small(inputs):
            return super().incoming_state_grad(inputs, segments, initial, saved, grad)
        kernels = _Kernels.of(self, inputs, segments)
        self.query_grad = kernels.query_grad(saved, grad)
        state = kernels.final_state(self.query_grad.totals, reverse=True)
        if self.causal:
            return state
        to_right = state
        if segments is not None:
            to_right = kernels.final_state(kernels.query_totals(self.query_grad.a, self.query_grad.y))
        return torch.stack([state, to_right])

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        if _is_small(inputs):
            return super().input_grads(inputs, segments, initial, final_grad, saved, grad)
        kernels = _Kernels.of(self, inputs, segments)
        dq, a, y, totals = kernels.query_grad(saved, grad) if self.query_grad is None else self.query_grad
        self.query_grad = None
        if self.causal:
            kernels.scan_chunks(totals, final_grad, reverse=True)
            states: tuple[Tensor, ...] = (totals,)
        elif segments is None:
            states = (kernels.expand_to_chunks(kernels.final_state(totals, final_grad[0] + final_grad[1])),)
        else:
            from_left = kernels.query_totals(a, y)
            kernels.scan_chunks(totals, final_grad[0], reverse=True)
            kernels.scan_chunks(from_left, final_grad[1])
            states = (from_left, totals)
        return dq, *kernels.key_grad(a, y, states)


def _is_small(inputs: tuple[Tensor, ...]) -> bool:
    return inputs[0].shape[1] <= 1 or not inputs[0].numel()


@dataclass(frozen=True)
class _Kernels:
    """The kernels, launched on one shard ``(q, k, v)``.

    Sums run from one side (causal), from both (non-causal with documents), or are the same for all tokens.

    Attributes:
        inputs: q, k, v, ``[B, L, D]`` with contiguous channels.
        order: the highest power t.
        causal: whether a token sees only the tokens before it and itself, or all.
        document_starts: ``[B, L + 1]`` int8, 1 where a document begins after another one; None for one document.
    """

    inputs: tuple[Tensor, ...]
    order: int
    causal: bool
    document_starts: Tensor | None

    @classmethod
    def of(cls, op: Chunked, inputs: tuple[Tensor, ...], segments: Tensor | None) -> _Kernels:
        starts = None
        if segments is not None:
            starts = F.pad((segments[:, 1:] != segments[:, :-1]).to(torch.int8), (1, 1))
        return cls(tuple(_rows(x) for x in inputs), op.order, op.causal, starts)

    @property
    def num_chunks(self) -> int:
        return -(-self.inputs[0].shape[1] // CHUNK)

    def states(self, *chunks: int) -> Tensor:
        """Uninitialized states ``[B, *chunks, 2, t+1, D]``."""
        batch, _, width = self.inputs[0].shape
        return self._empty(batch, *chunks, 2, self.order + 1, width)

    def expand_to_chunks(self, state: Tensor) -> Tensor:
        """One state ``[B, 2, t+1, D]`` for every chunk."""
        return state.unsqueeze(1).expand(-1, self.num_chunks, -1, -1, -1)

    def key_totals(self, *, reverse: bool = False) -> Tensor:
        """Each chunk's sum of the terms of keys over its last document (first if reverse): ``[B, N, 2, t+1, D]``."""
        _, k, v = self.inputs
        return self._totals(k, v, v, keys=True, reverse=reverse)

    def query_totals(self, a: Tensor, y: Tensor, *, reverse: bool = False) -> Tensor:
        """Each chunk's sum of the terms of queries, likewise."""
        return self._totals(self.inputs[0], a, y, keys=False, reverse=reverse)

    def _totals(self, x: Tensor, v: Tensor, y: Tensor, *, keys: bool, reverse: bool) -> Tensor:
        totals = self.states(self.num_chunks)
        flags = {"KEYS": keys, "REVERSE": reverse, "DOCUMENTS": self.document_starts is not None}
        strides = (*x.stride()[:2], *v.stride()[:2])
        self._launch(_elementwise_totals_kernel, (x, v, y, self._starts(), totals), strides, flags)
        return totals

    def final_state(self, totals: Tensor, initial: Tensor | None = None, *, reverse: bool = False) -> Tensor:
        """The state after the shard, ``[B, 2, t+1, D]``, given the one before it (None for zeros)."""
        return self._scan_chunks(totals, initial, reverse=reverse, write=False)

    def scan_chunks(self, totals: Tensor, initial: Tensor, *, reverse: bool = False) -> Tensor:
        """`final_state`; and ``totals`` are replaced by the states before the chunks."""
        return self._scan_chunks(totals, initial, reverse=reverse, write=True)

    def _scan_chunks(self, totals: Tensor, initial: Tensor | None, *, reverse: bool, write: bool) -> Tensor:
        initial = torch.zeros_like(totals[:, 0]) if initial is None else initial.float().contiguous()
        final, decays = self.states(), totals
        if self.document_starts is not None:
            starts = self.document_starts[:, 1:] if reverse else self.document_starts[:, :-1]
            decays = 1 - to_chunks(starts, CHUNK).amax(dim=2).float()
        size = initial[0].numel()
        flags = {"WRITE": write, "REVERSE": reverse, "DOCUMENTS": self.document_starts is not None}
        launch(
            _elementwise_chunk_states_kernel, triton.cdiv(size, CHUNK_STATES_TILE["COLS"]) * len(initial),
            totals, initial, decays, final, self.num_chunks, size, **flags, **CHUNK_STATES_TILE, **ONE_WARP,
        )  # fmt: skip
        return final

    def output(self, states: tuple[Tensor, ...]) -> Tensor:
        """y, given the states before the chunks: from the left; from the left and from the right; or the one of all."""
        y = self._empty(*self.inputs[0].shape, dtype=self.inputs[0].dtype)
        self._launch_directions(_elementwise_output_kernel, self.inputs, states, 2, (y,), reverse_first=True)
        return y

    def query_grad(self, states: tuple[Tensor, ...], grad: Tensor) -> QueryGrad:
        """The gradient of q and the terms and totals of queries, given the gradient of y; ``states`` as of `output`."""
        dq = self._empty(*grad.shape, dtype=grad.dtype)
        a, y = self._empty(*grad.shape), self._empty(*grad.shape)
        totals = self.states(self.num_chunks)
        kernel = _elementwise_query_grad_kernel
        self._launch_directions(kernel, (*self.inputs, _rows(grad)), states, 4, (dq, a, y, totals), reverse_first=True)
        if len(states) == 2:
            totals = self.query_totals(a, y, reverse=True)
        return QueryGrad(dq, a, y, totals)

    def key_grad(self, a: Tensor, y: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """dk and dv, given the states before the chunks: from the right; from both sides; or the one of all."""
        grads = tuple(self._empty(*x.shape, dtype=x.dtype) for x in self.inputs[1:])
        self._launch_directions(
            _elementwise_key_grad_kernel, self.inputs, states, 2, grads, reverse_first=False, extra=(a, y)
        )
        return grads[0], grads[1]

    def _launch_directions(
        self,
        kernel: Any,
        inputs: tuple[Tensor, ...],
        states: tuple[Tensor, ...],
        num_parts: int,
        outputs: tuple[Tensor, ...],
        *,
        reverse_first: bool,
        extra: tuple[Tensor, ...] = (),
    ) -> None:
        """Launch ``kernel`` from the side of the states; for two, from both sides, the second adding its part."""
        shape, dtype = inputs[0].shape, inputs[0].dtype
        paired = len(states) == 2
        part = self._empty(num_parts, *shape) if paired else states[0]
        directions = [(states[0], False), (states[1], True)] if paired else [(states[0], not reverse_first)]
        for state, reverse in reversed(directions) if reverse_first else directions:
            strides = [s for x in inputs for s in x.stride()[:2]]
            flags = {
                "RUNNING": self.causal or paired,
                "REVERSE": reverse,
                "DOCUMENTS": self.document_starts is not None,
                "PARTS": paired,
                "LIMIT": torch.finfo(dtype).max,
            }
            strides += [state.stride(0), state.stride(1), shape.numel()]
            self._launch(kernel, (*inputs, *extra, self._starts(), state, part, *outputs), strides, flags)

    def _launch(self, kernel: Any, tensors: tuple[Tensor, ...], strides: Sequence[int], flags: dict[str, Any]) -> None:
        batch, length, width = self.inputs[0].shape
        sizes = (self.num_chunks, length, width)
        launch_fastest(
            kernel, TILINGS[kernel.__name__], lambda tile: triton.cdiv(width, tile["COLS"]) * self.num_chunks * batch,
            *tensors, *sizes, *strides, **flags, ORDER=self.order, CHUNK=CHUNK,
        )  # fmt: skip

    def _starts(self) -> Tensor:
        """`document_starts`, or any tensor where no kernel reads them."""
        return self.inputs[0] if self.document_starts is None else self.document_starts

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.inputs[0].device)


def _rows(x: Tensor) -> Tensor:
    """``x`` with contiguous channels, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def variants() -> Iterator[Variant]:
    """Every kernel as it is launched: causal; with documents; from both sides; and with one state for all tokens.

    The tilings that are not the usual ones: with the highest order, and with all that a kernel can do.
    """
    for order in (6, 8):
        yield from _variants(torch.bfloat16, order, running=True, documents=False, parts=False)
    yield from _variants(torch.float32, 6, running=True, documents=True, parts=False)
    yield from _variants(torch.bfloat16, 6, running=True, documents=True, parts=True)
    yield from _variants(torch.bfloat16, 6, running=False, documents=False, parts=False)
    types = dict.fromkeys(("states", "initial", "decays", "final"), "*fp32") | dict.fromkeys(
        ("num_chunks", "size"), "i32"
    )
    for documents in (False, True):
        flags = {"WRITE": True, "REVERSE": documents, "DOCUMENTS": documents, **CHUNK_STATES_TILE}
        signature = types | dict.fromkeys(flags, "constexpr")
        yield Variant(f"chunk states documents={documents}", _elementwise_chunk_states_kernel, signature, flags, 1, 1)


def _variants(dtype: torch.dtype, order: int, *, running: bool, documents: bool, parts: bool) -> Iterator[Variant]:
    common = {"DOCUMENTS": documents, "ORDER": order, "CHUNK": CHUNK}
    sums = common | {"RUNNING": running, "PARTS": parts, "LIMIT": torch.finfo(dtype).max}
    cases: list[tuple[str, Any, dict[str, Any]]] = []
    if running:
        cases.append(("key totals", _elementwise_totals_kernel, common | {"KEYS": True, "REVERSE": parts}))
    if parts:
        cases.append(("query totals", _elementwise_totals_kernel, common | {"KEYS": False, "REVERSE": True}))
    for reverse in (False, True) if parts else (False,):
        cases.append(("output", _elementwise_output_kernel, sums | {"REVERSE": reverse}))
        cases.append(("query grad", _elementwise_query_grad_kernel, sums | {"REVERSE": reverse}))
    for reverse in (False, True) if parts else (True,):
        cases.append(("key grad", _elementwise_key_grad_kernel, sums | {"REVERSE": reverse}))
    case = f"{str(dtype)[6:]} order={order} running={running} documents={documents} parts={parts}"
    for name, kernel, constants in cases:
        keys = constants.get("KEYS", True)
        wide = {"states", "totals", "part", "a", "y"}
        signature = {}
        for arg in kernel.arg_names:
            if arg in constants or arg in ("ROWS", "COLS"):
                signature[arg] = "constexpr"
            elif arg in ("num_chunks", "length", "width"):
                signature[arg] = "i32"
            elif arg.endswith(("_batch", "_token", "_chunk", "_size")):
                signature[arg] = "i64"
            elif arg == "document_starts":
                signature[arg] = "*i8"
            elif arg in wide or (arg == "v" and not keys):
                signature[arg] = "*fp32"
            else:
                signature[arg] = TYPES[dtype]
        tilings = TILINGS[kernel.__name__]
        for tiling, num_warps, num_stages in tilings if order > 6 or parts else tilings[:1]:
            full = f"{name} {case} reverse={constants['REVERSE']} cols={tiling['COLS']}"
            yield Variant(full, kernel, signature, constants | tiling, num_warps, num_stages)
