"""Modal convolution on GPUs: a program reads the tokens of a channel in order, the states of its modes in registers.

Axes: B batch, L tokens, D channels, N modes, n chunks of C tokens, and 2 for real and imaginary parts. README.md beside
this file has the formulas.

The recurrence itself, about 6 N multiply-adds a token and channel forward; the tables of `chunked` take more than twice
that. A program is one warp for `COLS` channels of one chunk; it loads `STEP` tokens at once, to have many loads in
flight. Above 8 modes, kernels that need no sum over the modes divide them between two programs. Chunks run in parallel:

1. ``_modal_totals_kernel``: each chunk's own state after it, from zero before it. The states between are not needed, so
   four tokens are one step: ``lambda^4 s + lambda^3 x_1 + lambda^2 x_2 + lambda x_3 + x_4``.
2. ``_modal_chunk_states_kernel``: replaces these by the states before the chunks; sums in fp64.
3. ``_modal_output_kernel``: the recurrence from there, and y.

Backward: the same three from right to left, then ``_modal_parameter_grads_kernel``, from left to right again. With ~
for conjugates, g the gradient of y, t that of the state after a token, and r the derivative of the state by lambda,
from zero before the chunk:

    ~t_i = lambda ~t_(i+1) + c g_i              dx_i = Re sum_n ~t_i
    r_i = lambda r_(i-1) + s_(i-1)              ~dc = sum_i g_i s_i      ~dlambda = c sum_i g_i r_i + ~t r

where the last term has the t that enters a chunk from the right, and r after the chunk's last token. Kernels keep
gradients as conjugates, so that lambda is the factor in both directions.

Precision: a chunk is fp32, its states are summed in fp64. Rounding lambda to fp32 moves its m-th power by m 2^-25, 8e-6
at the end of 256 tokens: far below the rounding of inputs in 16 bits. For x in fp32, chunks have 64 tokens, and what
rounding took from lambda multiplies the state too (EXACT).

Traffic in bytes per element of x in 16 bits, where a set of states is s = 8 N / C (N = 8: 0.25):

| pass | reads | writes |
|---|---|---|
| totals | x: 2 | s |
| chunk states | s | s |
| output | x: 2, s | y: 2 |
| totals of gradients, chunk states, output | g: 4, 2 s | dx: 2, 2 s |
| gradients of parameters, and their sum | x, g: 4, 2.5 s | s / 2 |

Forward 6 + 4 s, backward 10 + 7 s; saved for the backward pass: s.
"""

# Kernels have Triton's types, which mypy does not know.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, misc"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..chunks import Documents
from ..gpu import TYPES, Tiling, Variant, launch, launch_fastest
from ..state import FusedForward
from .chunked import Chunked, Modes

CHUNKS = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 64}  # tokens of a chunk, by the dtype of x
STEP = tl.constexpr(4)  # tokens loaded at once


@triton.jit
def _place(program, num_chunks, length, width, CHUNK: tl.constexpr, COLS: tl.constexpr):
    """A program's row of the batch, chunk, first token, number of tokens, and channels."""
    num_tiles = tl.cdiv(width, COLS)
    chunk = program // num_tiles % num_chunks
    first = chunk * CHUNK
    cols = program % num_tiles * COLS + tl.arange(0, COLS)
    row = (program // num_tiles // num_chunks).to(tl.int64)
    return row, chunk.to(tl.int64), first.to(tl.int64), tl.minimum(length - first, CHUNK), cols


@triton.jit
def _token(step, first, num, width, REVERSE: tl.constexpr):
    """The token of a step, and the width of its row: 0 if there is no such token."""
    end = tl.where(step < num, width, 0)
    if REVERSE:
        return first + (num - 1 - step), end
    else:
        return first + step, end


@triton.jit
def _continues(document_starts, token, end, REVERSE: tl.constexpr):
    """Whether a token is of the same document as the token processed before it."""
    return tl.load(document_starts + token + REVERSE, mask=end > 0, other=0) == 0


@triton.jit
def _load(numbers, plane, width, cols, MODES: tl.constexpr):
    """Complex numbers, one of each mode: the real parts, then the imaginary ones, ``plane`` elements behind them."""
    parts = ()
    for n in tl.static_range(MODES):
        parts += (tl.load(numbers + n * width + cols, mask=cols < width, other=0.0),)
    for n in tl.static_range(MODES):
        parts += (tl.load(numbers + plane + n * width + cols, mask=cols < width, other=0.0),)
    return parts


@triton.jit
def _store(numbers, parts, plane, width, cols, MODES: tl.constexpr):
    for n in tl.static_range(MODES):
        tl.store(numbers + n * width + cols, parts[n], mask=cols < width)
        tl.store(numbers + plane + n * width + cols, parts[MODES + n], mask=cols < width)


@triton.jit
def _zeros(MODES: tl.constexpr, COLS: tl.constexpr):
    parts = ()
    for _ in tl.static_range(2 * MODES):
        parts += (tl.full((COLS,), 0.0, tl.float32),)
    return parts


@triton.jit
def _reset(state, keep, MODES: tl.constexpr):
    """The state, or zeros where a document begins."""
    parts = ()
    for n in tl.static_range(2 * MODES):
        parts += (tl.where(keep, state[n], 0.0),)
    return parts


@triton.jit
def _add_scaled(sums, factor, x, MODES: tl.constexpr):
    """``sums + factor x`` for real x."""
    parts = ()
    for n in tl.static_range(2 * MODES):
        parts += (sums[n] + factor[n] * x,)
    return parts


@triton.jit
def _add_product(sums, factor, rest, state, EXACT: tl.constexpr, MODES: tl.constexpr):
    """``sums + (factor + rest) state``; without the rest if not EXACT."""
    real, imaginary = (), ()
    for n in tl.static_range(MODES):
        re, im = sums[n], sums[MODES + n]
        if EXACT:
            re = re + rest[n] * state[n] - rest[MODES + n] * state[MODES + n]
            im = im + rest[n] * state[MODES + n] + rest[MODES + n] * state[n]
        real += (re + factor[n] * state[n] - factor[MODES + n] * state[MODES + n],)
        imaginary += (im + factor[n] * state[MODES + n] + factor[MODES + n] * state[n],)
    return real + imaginary


@triton.jit
def _advance(state, power, rest, x, EXACT: tl.constexpr, MODES: tl.constexpr):
    """``lambda s + x`` for real x."""
    zero = tl.full(x.shape, 0.0, tl.float32)
    added = ()
    for n in tl.static_range(2 * MODES):
        added += (x if n < MODES else zero,)
    return _add_product(added, power, rest, state, EXACT, MODES)


@triton.jit
def _modal_totals_kernel(
    x,  # [B, L, D]: x, or the gradient of y if REVERSE
    edges,  # [B, n] int32: a chunk's first token of its last document, or its number of tokens of the first if REVERSE
    powers,  # [4, 2, N, D] fp32: lambda, lambda^2, lambda^3, lambda^4
    rests,  # [2, 2, N, D] fp32: what lambda and lambda^4 lack, with EXACT
    amplitude,  # [2, N, D] fp32: c
    totals,  # [B, n, 2, N, D] fp32
    num_chunks,
    length,
    width,
    x_batch,
    x_token,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    EXACT: tl.constexpr,
    MODES: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    """Each chunk's ``sum_j lambda^(C-1-j) x_j`` over its last document, of `GROUP` modes.

    If REVERSE, ``sum_i c lambda^(i+1) g_i`` over its first one.
    """
    row, chunk, first, num, cols = _place(tl.program_id(0) // (MODES // GROUP), num_chunks, length, width, CHUNK, COLS)
    plane = MODES * width
    group = tl.program_id(0) % (MODES // GROUP) * (GROUP * width)
    x += row * x_batch + (first + (num - 1 if REVERSE else 0)) * x_token
    x_token = tl.full([], x_token, tl.int64) * (-1 if REVERSE else 1)
    powers += group
    rests += group
    power = _load(powers, plane, width, cols, GROUP)
    square = _load(powers + 2 * plane, plane, width, cols, GROUP)
    cube = _load(powers + 4 * plane, plane, width, cols, GROUP)
    fourth = _load(powers + 6 * plane, plane, width, cols, GROUP)
    rest = power
    if EXACT:
        rest = _load(rests + 2 * plane, plane, width, cols, GROUP)
    edge = 0  # the first step that counts
    if DOCUMENTS:
        edge = tl.load(edges + row * num_chunks + chunk)
        if REVERSE:
            edge = num - tl.minimum(num, edge)
    state = _zeros(GROUP, COLS)
    left = num % STEP
    # The first step has what is left of a whole one at its end; without tokens, the state stays zero.
    for part in tl.static_range(2):
        for start in range(left if part else left - STEP, num if part else 0, STEP):
            xs = ()
            for i in tl.static_range(STEP):
                mask = cols < width
                if DOCUMENTS or not part:
                    mask = cols < tl.where(start + i < edge, 0, width)
                xs += (tl.load(x + (start + i) * x_token + cols, mask=mask, other=0.0).to(tl.float32),)
            added = ()
            for n in tl.static_range(2 * GROUP):
                last = power[n] * xs[2] + xs[3] if n < GROUP else power[n] * xs[2]
                added += (last + square[n] * xs[1] + cube[n] * xs[0],)
            state = _add_product(added, fourth, rest, state, EXACT, GROUP)
    if REVERSE:
        zeros = _zeros(GROUP, COLS)
        factor = _load(amplitude + group, plane, width, cols, GROUP)
        state = _add_product(zeros, factor, factor, state, False, GROUP)
        if EXACT:
            rest = _load(rests, plane, width, cols, GROUP)
        state = _add_product(zeros, power, rest, state, EXACT, GROUP)
    _store(totals + (row * num_chunks + chunk) * (2 * plane) + group, state, plane, width, cols, GROUP)


@triton.jit
def _modal_chunk_states_kernel(
    states,  # [B, n, 2, M] fp32, M = N D: the chunks' totals, replaced by the states before the chunks if WRITE
    initial,  # [B, 2, M] fp32, the state before the first chunk
    decays,  # [2, 2, M] fp64: lambda^C, and the power for the last chunk
    passes,  # [B, n] int8, whether the state before a chunk reaches the one after it; unused without DOCUMENTS
    final,  # [B, 2, M] fp32, the state after the last chunk
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
    first = tl.full((), 0, tl.int64)
    states += row * num_chunks * 2 * size
    passes += row * num_chunks
    re, im = _load(initial + row * 2 * size, size, size, cols, 1)
    re, im = re.to(tl.float64), im.to(tl.float64)
    decay, last = _load(decays, size, size, cols, 1), _load(decays + 2 * size, size, size, cols, 1)
    for start in range(0, num_chunks, ROWS):
        real, imaginary = (), ()
        for i in tl.static_range(ROWS):
            chunk, end = _token(start + i, first, num_chunks, size, REVERSE)
            here = states + chunk * 2 * size + cols
            real += (tl.load(here, mask=cols < end, other=0.0),)
            imaginary += (tl.load(here + size, mask=cols < end, other=0.0),)
        for i in tl.static_range(ROWS):
            chunk, end = _token(start + i, first, num_chunks, size, REVERSE)
            if WRITE:
                here = states + chunk * 2 * size + cols
                tl.store(here, re.to(tl.float32), mask=cols < end)
                tl.store(here + size, im.to(tl.float32), mask=cols < end)
            is_last = chunk == num_chunks - 1
            a, b = tl.where(is_last, last[0], decay[0]), tl.where(is_last, last[1], decay[1])
            passed_re, passed_im = a * re - b * im, a * im + b * re
            if DOCUMENTS:
                keep = tl.load(passes + chunk, mask=end > 0, other=0) != 0
                passed_re, passed_im = tl.where(keep, passed_re, 0.0), tl.where(keep, passed_im, 0.0)
            re = tl.where(end > 0, passed_re + real[i].to(tl.float64), re)
            im = tl.where(end > 0, passed_im + imaginary[i].to(tl.float64), im)
    _store(final + row * 2 * size, (re.to(tl.float32), im.to(tl.float32)), size, size, cols, 1)


@triton.jit
def _modal_output_kernel(
    x,  # [B, L, D]: x, or the gradient of y if REVERSE
    document_starts,  # [B, L + 1] int8, whether a document begins; unused without DOCUMENTS
    states,  # [B, n, 2, N, D] fp32, the states before the chunks
    powers,  # [4, 2, N, D] fp32: lambda, ...
    rests,  # [2, 2, N, D] fp32: what lambda lacks, ...
    amplitude,  # [2, N, D] fp32: c
    out,  # [B, L, D]: y, or the gradient of x
    num_chunks,
    length,
    width,
    x_batch,
    x_token,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    EXACT: tl.constexpr,
    MODES: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    """The output from left to right, or the gradient of x from right to left."""
    row, chunk, first, num, cols = _place(tl.program_id(0), num_chunks, length, width, CHUNK, COLS)
    plane = MODES * width
    x += row * x_batch
    document_starts += row * (length + 1)
    out += row * length * width
    power, factor = _load(powers, plane, width, cols, GROUP), _load(amplitude, plane, width, cols, GROUP)
    rest = power
    if EXACT:
        rest = _load(rests, plane, width, cols, GROUP)
    state = _load(states + (row * num_chunks + chunk) * (2 * plane), plane, width, cols, GROUP)
    for start in range(0, num, STEP):
        xs = ()
        for i in tl.static_range(STEP):
            token, end = _token(start + i, first, num, width, REVERSE)
            xs += (tl.load(x + token * x_token + cols, mask=cols < end, other=0.0),)
        for i in tl.static_range(STEP):
            token, end = _token(start + i, first, num, width, REVERSE)
            if DOCUMENTS:
                state = _reset(state, _continues(document_starts, token, end, REVERSE), GROUP)
            y = tl.full((COLS,), 0.0, tl.float32)
            if REVERSE:
                state = _add_scaled(state, factor, xs[i].to(tl.float32), GROUP)
                for n in tl.static_range(GROUP):
                    y += state[n]
                state = _advance(state, power, rest, tl.full((COLS,), 0.0, tl.float32), EXACT, GROUP)
            else:
                state = _advance(state, power, rest, xs[i].to(tl.float32), EXACT, GROUP)
                for n in tl.static_range(GROUP):
                    y = y + factor[n] * state[n] - factor[GROUP + n] * state[GROUP + n]
            tl.store(out + token * width + cols, y.to(out.dtype.element_ty), mask=cols < end)


@triton.jit
def _modal_parameter_grads_kernel(
    x,  # [B, L, D], as grad
    grad,
    document_starts,  # [B, L + 1] int8
    states,  # [B, n, 2, N, D] fp32, the states before the chunks
    ends,  # [B, n, 2, N, D] fp32, the gradients that enter the chunks from the right, as conjugates
    powers,  # [4, 2, N, D] fp32: lambda, ...
    rests,  # [2, 2, N, D] fp32: what lambda lacks, ...
    amplitude,  # [2, N, D] fp32: c
    sums,  # [B, ceil(n / SPAN), 2, 2, N, D] fp32: parts of the gradients of lambda and c, as conjugates
    num_chunks,
    length,
    width,
    x_batch,
    x_token,
    grad_batch,
    grad_token,
    DOCUMENTS: tl.constexpr,
    EXACT: tl.constexpr,
    MODES: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    """The states again from left to right, their derivatives by lambda, and the sums of both, of `GROUP` modes.

    A program has `SPAN` chunks, one after the other.
    """
    num_spans = tl.cdiv(num_chunks, SPAN)
    row, span, first, num, cols = _place(
        tl.program_id(0) // (MODES // GROUP), num_spans, length, width, SPAN * CHUNK, COLS
    )
    plane = MODES * width
    group = tl.program_id(0) % (MODES // GROUP) * (GROUP * width)
    x += row * x_batch
    grad += row * grad_batch
    document_starts += row * (length + 1)
    states += (row * num_chunks + span * SPAN) * (2 * plane) + group
    ends += (row * num_chunks + span * SPAN) * (2 * plane) + group
    power = _load(powers + group, plane, width, cols, GROUP)
    rest = power
    if EXACT:
        rest = _load(rests + group, plane, width, cols, GROUP)
    to_power, to_amplitude = _zeros(GROUP, COLS), _zeros(GROUP, COLS)
    for chunk_start in range(0, num, CHUNK):
        state, slope, to_slope = _load(states, plane, width, cols, GROUP), _zeros(GROUP, COLS), _zeros(GROUP, COLS)
        stop = tl.minimum(num, chunk_start + CHUNK)
        whole = stop - (stop - chunk_start) % STEP
        # What is left of a step goes by single tokens: the slope is needed after the last one.
        for part in tl.static_range(2):
            for start in range(whole if part else chunk_start, stop if part else whole, 1 if part else STEP):
                xs, gs = (), ()
                for i in tl.static_range(1 if part else STEP):
                    token = first + start + i
                    xs += (tl.load(x + token * x_token + cols, mask=cols < width, other=0.0),)
                    gs += (tl.load(grad + token * grad_token + cols, mask=cols < width, other=0.0),)
                for i in tl.static_range(1 if part else STEP):
                    if DOCUMENTS:
                        keep = _continues(document_starts, first + start + i, width, False)
                        state, slope = _reset(state, keep, GROUP), _reset(slope, keep, GROUP)
                    g = gs[i].to(tl.float32)
                    slope = _add_product(state, power, rest, slope, EXACT, GROUP)
                    state = _advance(state, power, rest, xs[i].to(tl.float32), EXACT, GROUP)
                    to_slope = _add_scaled(to_slope, slope, g, GROUP)
                    to_amplitude = _add_scaled(to_amplitude, state, g, GROUP)
        factor, end = _load(amplitude + group, plane, width, cols, GROUP), _load(ends, plane, width, cols, GROUP)
        if DOCUMENTS:
            end = _reset(end, tl.load(document_starts + first + stop) == 0, GROUP)
        to_power = _add_product(to_power, factor, factor, to_slope, False, GROUP)
        to_power = _add_product(to_power, end, end, slope, False, GROUP)
        states += 2 * plane
        ends += 2 * plane
    sums += (row * num_spans + span) * (4 * plane) + group
    _store(sums, to_power, plane, width, cols, GROUP)
    _store(sums + 2 * plane, to_amplitude, plane, width, cols, GROUP)


MAX_GROUP = 8  # modes of a program that needs no sum over them: more would not fit its registers
MAX_SPAN = 4  # chunks of a program of the parameters' gradients, where that leaves `PROGRAMS`
PROGRAMS = 2048  # programs that keep every multiprocessor of a large GPU busy
ONE_WARP = {"num_warps": 1, "num_stages": 1}
CHUNK_STATES_TILE = {"ROWS": 8, "COLS": 32}


def _group(kernel: Any, modes: int) -> int:
    """How many modes a program has; y is the sum over all."""
    return modes if modes <= MAX_GROUP or kernel is _modal_output_kernel else modes // 2


def _tilings(kernel: Any, modes: int, exact: bool) -> tuple[Tiling, ...]:
    """Tilings of one warp, which has one or two channels a thread as registers allow."""
    each = {_modal_output_kernel: 6, _modal_totals_kernel: 10, _modal_parameter_grads_kernel: 12}[kernel] + 2 * exact
    numbers = _group(kernel, modes) * each  # of a channel
    return tuple(Tiling({"COLS": cols}, num_warps=1) for cols in ((64, 32) if numbers <= 64 else (32,)))


class Walk(NamedTuple):
    """What the first of two passes in one direction leaves for the second one: `_Kernels`, and their totals."""

    kernels: _Kernels
    totals: Tensor


class Triton(Chunked):
    """`Chunked` by Triton's kernels, for x and parameters in fp16, bf16 and fp32 and up to 16 modes.

    Saved for the backward pass: the states before the chunks, ``[B, n, 2, N, D]`` fp32. A single token runs in PyTorch.

    Across ranks, both passes of a direction need the same totals. One object serves one `scan`: the first pass leaves
    them in an attribute, and the second takes them from it, or computes them where it is None.

    Attributes:
        to_right: of `local_transition`, for `apply_state`.
        to_left: of `incoming_state_grad`, for `input_grads`.
    """

    to_right: Walk | None = None
    to_left: Walk | None = None

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        if _is_small(inputs):
            return super().local_transition(inputs, segments)
        kernels, totals = self.to_right = _walk_right(inputs, segments)
        return kernels.decay(), kernels.scan_chunks(totals, None, write=False)

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if _is_small(inputs):
            return super().apply_state(inputs, segments, initial)
        kernels, states = self.to_right or _walk_right(inputs, segments)
        self.to_right = None
        kernels.scan_chunks(states, initial)
        return kernels.output(kernels.x, states), (states,)

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        if _is_small(inputs):
            return super().fused_forward(inputs, segments, initial)
        kernels, states = _walk_right(inputs, segments)
        initial = kernels.modes.state(len(states)) if initial is None else initial.to(torch.complex64)
        final = kernels.scan_chunks(states, initial)
        return FusedForward(initial, kernels.output(kernels.x, states), (states,), kernels.decay(), final)

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
        kernels, totals = self.to_left = _walk_left(inputs, segments, grad)
        return kernels.scan_chunks(totals, None, reverse=True, write=False)

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
        kernels, ends = self.to_left or _walk_left(inputs, segments, grad)
        self.to_left = None
        kernels.scan_chunks(ends, final_grad, reverse=True)
        grads = kernels.parameter_grads(grad, saved[0], ends)
        return kernels.output(grad, ends, reverse=True), *(x.to(p.dtype) for x, p in zip(grads, inputs[1:]))


def _is_small(inputs: tuple[Tensor, ...]) -> bool:
    return inputs[0].shape[1] <= 1 or not inputs[0].numel() or not inputs[1].numel()


def _walk_right(inputs: tuple[Tensor, ...], segments: Tensor | None) -> Walk:
    kernels = _Kernels.of(inputs, segments)
    return Walk(kernels, kernels.totals(kernels.x))


def _walk_left(inputs: tuple[Tensor, ...], segments: Tensor | None, grad: Tensor) -> Walk:
    kernels = _Kernels.of(inputs, segments)
    return Walk(kernels, kernels.totals(grad, reverse=True))


class Boundaries(NamedTuple):
    """Where documents begin in a shard.

    Attributes:
        starts: ``[B, L + 1]`` int8, 1 where a document begins after another one.
        chunks: the documents of chunks.
    """

    starts: Tensor
    chunks: Documents

    @classmethod
    def of(cls, segments: Tensor, chunk_len: int) -> Boundaries:
        starts = F.pad((segments[:, 1:] != segments[:, :-1]).to(torch.int8), (1, 1))
        return cls(starts, Documents.of(segments, chunk_len))

    def edges(self, *, reverse: bool) -> Tensor:
        """``[B, n]`` int32: in each chunk the tokens before its last document, or those of its first if reverse."""
        counted = self.chunks.head if reverse else ~self.chunks.tail
        return counted.sum(dim=2, dtype=torch.int32)

    def passes(self, *, reverse: bool) -> Tensor:
        """``[B, n]`` int8: whether the state that comes to a chunk leaves it on the other side."""
        entered = self.chunks.continues
        if reverse:
            entered = F.pad(entered[:, 1:], (0, 1), value=True)
        return (self.chunks.whole & entered).to(torch.int8)


@dataclass(frozen=True)
class _Kernels:
    """The kernels, launched on one shard.

    Attributes:
        x: ``[B, L, D]`` with contiguous channels.
        modes: the parameters.
        powers: ``[4, 2, N, D]`` fp32: lambda to the powers 1, 2, 3, 4.
        rests: ``[2, 2, N, D]`` fp32, what rounding took from powers 1 and 4; for 16 bits any tensor.
        amplitude: ``[2, N, D]`` fp32.
        decays: ``[2, 2, N, D]`` fp64, lambda to the power of C, and of the number of tokens of the last chunk.
        documents: None for one document.
    """

    x: Tensor
    modes: Modes
    powers: Tensor
    rests: Tensor
    amplitude: Tensor
    decays: Tensor
    documents: Boundaries | None

    @classmethod
    def of(cls, inputs: tuple[Tensor, ...], segments: Tensor | None) -> _Kernels:
        x, *parameters = inputs
        modes = Modes.of(x, [p.detach() for p in parameters])
        length, chunk_len = x.shape[1], CHUNKS[x.dtype]
        power = modes.power(1)
        square = power * power
        powers = [power, square, square * power, square * square]
        decays = [modes.power(chunk_len), modes.power(length - (length - 1) // chunk_len * chunk_len)]
        exact = _planes(torch.stack([*powers, modes.amplitude, *decays]))
        rounded = exact[:5].float()
        rests = (exact[:4:3] - rounded[:4:3]).float() if x.dtype == torch.float32 else rounded
        documents = None if segments is None else Boundaries.of(segments, chunk_len)
        return cls(_rows(x), modes, rounded[:4], rests, rounded[4], exact[5:], documents)

    @property
    def chunk_len(self) -> int:
        return CHUNKS[self.x.dtype]

    @property
    def num_chunks(self) -> int:
        return -(-self.x.shape[1] // self.chunk_len)

    def decay(self) -> Tensor:
        """``lambda^L [1, D, N]``, complex64."""
        return self.modes.power(self.x.shape[1]).to(torch.complex64).unsqueeze(0)

    def states(self, *sizes: int) -> Tensor:
        """Uninitialized states ``[B, *sizes, 2, N, D]`` fp32."""
        return self.powers.new_empty(self.x.shape[0], *sizes, *self.amplitude.shape)

    def totals(self, x: Tensor, *, reverse: bool = False) -> Tensor:
        """Each chunk's own state after it ``[B, n, 2, N, D]``; before it if reverse, for x the gradient of y."""
        x, totals = _rows(x), self.states(self.num_chunks)
        edges = totals if self.documents is None else self.documents.edges(reverse=reverse)
        tensors = (x, edges, self.powers, self.rests, self.amplitude, totals)
        self._launch(_modal_totals_kernel, tensors, x.stride()[:2], {"REVERSE": reverse})
        return totals

    def scan_chunks(
        self, totals: Tensor, initial: Tensor | None, *, reverse: bool = False, write: bool = True
    ) -> Tensor:
        """The state after the shard ``[B, D, N]`` complex64, given the one before it (None for zeros).

        If reverse, the gradient of the state before the shard, given that of the state after it. If write, ``totals``
        are replaced by the states before the chunks (the gradients that enter them, as conjugates, if reverse).
        """
        final = self.states()
        if initial is None:
            start = torch.zeros_like(final)
        else:
            start = _planes(initial.conj() if reverse else initial).float()
        passes = final if self.documents is None else self.documents.passes(reverse=reverse)
        size = final[0, 0].numel()
        flags = {"WRITE": write, "REVERSE": reverse, "DOCUMENTS": self.documents is not None}
        launch(
            _modal_chunk_states_kernel, triton.cdiv(size, CHUNK_STATES_TILE["COLS"]) * len(final),
            totals, start, self.decays, passes, final, self.num_chunks, size, **flags, **CHUNK_STATES_TILE, **ONE_WARP,
        )  # fmt: skip
        state = _complex(final, self.modes.rate.shape[1])
        return state.conj().resolve_conj() if reverse else state

    def output(self, x: Tensor, states: Tensor, *, reverse: bool = False) -> Tensor:
        """y; or the gradient of x if reverse, for x the gradient of y. ``states`` as written by `scan_chunks`."""
        x = _rows(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        tensors = (x, self._starts(), states, self.powers, self.rests, self.amplitude, out)
        self._launch(_modal_output_kernel, tensors, x.stride()[:2], {"REVERSE": reverse})
        return out

    def parameter_grads(self, grad: Tensor, states: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
        """The gradients of log_decay, angle, re and im, ``[D, N]`` fp64.

        Args:
            grad: of y.
            states, ends: as written by `scan_chunks` from the left and from the right.
        """
        grad = _rows(grad)
        programs = len(grad) * self.num_chunks * triton.cdiv(grad.shape[2], 32)
        span = MAX_SPAN if programs >= PROGRAMS * MAX_SPAN else 1
        sums = self.states(triton.cdiv(self.num_chunks, span), 2)
        tensors = (self.x, grad, self._starts(), states, ends, self.powers, self.rests, self.amplitude, sums)
        strides = (*self.x.stride()[:2], *grad.stride()[:2])
        self._launch(_modal_parameter_grads_kernel, tensors, strides, {"SPAN": span})
        sums = sums.sum(dim=(0, 1), dtype=torch.float64)
        to_power, to_amplitude = _complex(sums, self.modes.rate.shape[1])
        to_rate = to_power * self.modes.power(1)
        return to_rate.real * self.modes.rate.real, -to_rate.imag, to_amplitude.real, -to_amplitude.imag

    def _launch(
        self, kernel: Any, tensors: tuple[Tensor, ...], strides: tuple[int, ...], flags: dict[str, Any]
    ) -> None:
        batch, length, width = self.x.shape
        exact = self.x.dtype == torch.float32
        modes = self.amplitude.shape[1]
        group = _group(kernel, modes)
        rows = batch * triton.cdiv(self.num_chunks, flags.get("SPAN", 1)) * (modes // group)
        flags |= {"DOCUMENTS": self.documents is not None, "EXACT": exact, "MODES": modes, "GROUP": group}
        launch_fastest(
            kernel, _tilings(kernel, modes, exact), lambda tile: triton.cdiv(width, tile["COLS"]) * rows,
            *tensors, self.num_chunks, length, width, *strides, **flags, CHUNK=self.chunk_len,
        )  # fmt: skip

    def _starts(self) -> Tensor:
        """`Boundaries.starts`, or any tensor where no kernel reads them."""
        return self.x if self.documents is None else self.documents.starts


def _rows(x: Tensor) -> Tensor:
    """``x`` with contiguous channels, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _planes(x: Tensor) -> Tensor:
    """``[..., D, N]`` complex -> ``[..., 2, N', D]`` real, N' the modes that kernels have: an even number above 8."""
    planes = torch.stack([x.real.mT, x.imag.mT], dim=-3)
    return F.pad(planes, (0, 0, 0, 1)) if x.shape[-1] > MAX_GROUP and x.shape[-1] % 2 else planes


def _complex(planes: Tensor, modes: int) -> Tensor:
    """Inverse of `_planes`."""
    return torch.view_as_complex(planes[..., :modes, :].movedim(-3, -1).transpose(-3, -2).contiguous())


def variants() -> Iterator[Variant]:
    """Every kernel in 16 bits and, exact, in fp32, with and without documents, with 8 modes and with the most, 16."""
    yield from _variants(torch.bfloat16, MAX_GROUP, documents=False)
    yield from _variants(torch.float32, MAX_GROUP, documents=False)
    yield from _variants(torch.bfloat16, 2 * MAX_GROUP, documents=False)
    yield from _variants(torch.float32, 2 * MAX_GROUP, documents=True)
    types = dict.fromkeys(("states", "initial", "final"), "*fp32") | {"decays": "*fp64", "passes": "*i8"}
    types |= dict.fromkeys(("num_chunks", "size"), "i32")
    for documents in (False, True):
        flags = {"WRITE": True, "REVERSE": documents, "DOCUMENTS": documents, **CHUNK_STATES_TILE}
        kernel = _modal_chunk_states_kernel
        signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
        yield Variant(f"chunk states documents={documents}", kernel, signature, flags, 1, 1)


def _variants(dtype: torch.dtype, modes: int, *, documents: bool) -> Iterator[Variant]:
    exact = dtype == torch.float32
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        (f"{name} reverse={reverse}", kernel, {"REVERSE": reverse})
        for name, kernel in (("totals", _modal_totals_kernel), ("output", _modal_output_kernel))
        for reverse in (False, True)
    ]
    span = MAX_SPAN if exact else 1
    cases.append(("parameter grads", _modal_parameter_grads_kernel, {"SPAN": span}))
    types = dict.fromkeys(("x", "grad", "out"), TYPES[dtype]) | {"edges": "*i32", "document_starts": "*i8"}
    types |= dict.fromkeys(("num_chunks", "length", "width"), "i32")
    types |= dict.fromkeys(("x_batch", "x_token", "grad_batch", "grad_token"), "i64")
    for name, kernel, flags in cases:
        fixed = {"DOCUMENTS": documents, "EXACT": exact, "MODES": modes, "GROUP": _group(kernel, modes)}
        for tiling, num_warps, num_stages in _tilings(kernel, modes, exact):
            constants = flags | fixed | tiling | {"CHUNK": CHUNKS[dtype]}
            signature = {arg: "constexpr" if arg in constants else types.get(arg, "*fp32") for arg in kernel.arg_names}
            full = f"{name} {str(dtype)[6:]} modes={modes} documents={documents} cols={tiling['COLS']}"
            yield Variant(full, kernel, signature, constants, num_warps, num_stages)
