"""The delta rule in Triton: the passes of `chunked.py` that go from chunk to chunk, and the inverses inside chunks.

What is inside a chunk and is a product of matrices is left to PyTorch's batched products. Two kernels do the rest:

1. ``_inverse_kernel``: ``T = (I + X)^-1``, one program for each chunk and head. With F the inverse of the blocks of s
   tokens on the diagonal, and Q the part of X that couples two neighbouring blocks, ``F - F Q F`` is that of blocks of
   2 s. Unlike a product of powers of X, it does not blow up where keys repeat.
2. ``_pass_kernel``: one program for each head and some columns of the state, from the first chunk to the last. The
   state stays in registers, in fp64: ``R = U - W S``, then ``S <- decay S + (key to end)^T R``. The adjoint is the same
   kernel, from the last chunk to the first, with W and (key to end) exchanged.

Factors are fp32; products are three in TF32 each (on AMD, one in fp32). Bytes of the second per token and head, with
chunks of C tokens: ``4 (2 K + 2 V + K V / C)``, and ``4 K V / C`` more in the adjoint.
"""

# Kernels have Triton's types, which mypy does not know.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import Tiling, Variant, launch
from .chunked import Chunked, Chunks

LEAST = 16  # rows and columns of a factor of a product
MAX_COLUMNS = 32  # of the state in a program
MAX_WIDTH = 128  # K, in at most two blocks of 64 rows; wider states would spill registers
PRECISION = None if torch.version.hip else "tf32x3"


@triton.jit
def _inverse(x, C: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + x)^-1`` of ``x [C, C]``, of which the strictly lower triangle counts; C is at most 32."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    # Blocks of one token: the inverse is 1, and one number couples two neighbours.
    pair = (row // 2 == column // 2) & (row > column)
    found = tl.where(row == column, 1.0, 0.0) - tl.where(pair, x, 0.0)
    size: tl.constexpr = 2
    for _ in tl.static_range(4):
        if size < C:
            coupled = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
            half = tl.dot(found, tl.where(coupled, x, 0.0), input_precision=PRECISION)
            found -= tl.dot(half, found, input_precision=PRECISION)
        size = 2 * size
    return found


@triton.jit
def _inverse_kernel(x, inverse, C: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """``x [M, C, C]`` -> ``(I + x)^-1``; HALF is C where that is at most 32, else C / 2."""
    row, column = tl.arange(0, HALF)[:, None], tl.arange(0, HALF)[None, :]
    place = tl.program_id(0).to(tl.int64) * (C * C) + row * C + column
    first = _inverse(tl.load(x + place), HALF, PRECISION)
    tl.store(inverse + place, first)
    if HALF < C:
        below, right = HALF * C, HALF
        coupled = tl.load(x + place + below)
        second = _inverse(tl.load(x + place + below + right), HALF, PRECISION)
        half = tl.dot(second, coupled, input_precision=PRECISION)
        tl.store(inverse + place + below + right, second)
        tl.store(inverse + place + below, -tl.dot(half, first, input_precision=PRECISION))
        tl.store(inverse + place + right, tl.zeros_like(first))


@triton.jit
def _read(
    current,
    states,
    w,
    place,
    column,
    rows,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keeps rows of the state in ``states`` and returns their part of ``w S``, ``[C, COLUMNS]``."""
    row, token = rows + tl.arange(0, ROWS), tl.arange(0, C)
    narrow = current.to(tl.float32)
    inside = (row[:, None] < K) & (column < V)
    tl.store(states + place * (K * V) + row[:, None] * V + column, narrow, mask=inside)
    factor = tl.load(w + place * (C * K) + token[:, None] * K + row[None, :], mask=(row < K)[None, :], other=0.0)
    return tl.dot(factor, narrow, input_precision=PRECISION)


@triton.jit
def _decayed(current, decay, place, rows, ROWS: tl.constexpr, K: tl.constexpr, DECAYS: tl.constexpr):
    """Rows of the state behind a chunk, but for what the chunk adds."""
    if DECAYS == 1:
        return current * tl.load(decay + place)
    row = rows + tl.arange(0, ROWS)
    return current * tl.load(decay + place * K + row, mask=row < K, other=0.0)[:, None]


@triton.jit
def _product(x, values, place, rows, ROWS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """``x^T values`` for some of the columns of ``x [C, K]``, ``[ROWS, COLUMNS]``."""
    row, token = rows + tl.arange(0, ROWS), tl.arange(0, C)
    factor = tl.load(x + place * (C * K) + token[None, :] * K + row[:, None], mask=(row < K)[:, None], other=0.0)
    return tl.dot(factor, values, input_precision=PRECISION)


@triton.jit
def _load_state(state, head, column, rows, ROWS: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    row = rows + tl.arange(0, ROWS)[:, None]
    return tl.load(state + head * (K * V) + row * V + column, mask=(row < K) & (column < V), other=0.0)


@triton.jit
def _store_state(state, current, head, column, rows, ROWS: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    row = rows + tl.arange(0, ROWS)[:, None]
    tl.store(state + head * (K * V) + row * V + column, current, mask=(row < K) & (column < V))


@triton.jit
def _pass_kernel(
    state,
    reader,
    writer,
    own,
    decay,
    states,
    values,
    num_chunks,
    heads,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADJOINT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for each head and COLUMNS columns of the state ``[heads, K, V]`` (fp64, in place), which it keeps in
    registers, in blocks of ROWS rows.

    Forward, with reader W, writer (key to end) and values U: ``values -= reader S``,
    ``S <- decay S + writer^T values``.
    Adjoint, from the last chunk to the first, with reader (key to end), writer W and values the gradients of R:
    ``values += reader S``, ``S <- decay S + own - writer^T values``. ``states`` receives S before each chunk (adjoint:
    behind it).

    Args:
        reader, writer: ``[N, heads, C, K]``.
        own: ``[N, heads, K, V]``, the gradients of the states by the chunks' outputs.
        decay: ``[N, heads, DECAYS]`` fp64, over the chunks, of heads (DECAYS is 1) or of rows (K).
        states: ``[N, heads, K, V]``.
        values: ``[N, heads, C, V]``, in place.
    """
    tiles: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    blocks: tl.constexpr = (K + ROWS - 1) // ROWS
    sign: tl.constexpr = -1.0 if ADJOINT else 1.0
    head = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    of_values, in_values = tl.arange(0, C)[:, None] * V + column, (tl.arange(0, C)[:, None] < C) & (column < V)
    s0 = _load_state(state, head, column, 0, ROWS, K, V)
    if blocks > 1:
        s1 = _load_state(state, head, column, ROWS, ROWS, K, V)
    place = head + (tl.cast(num_chunks - 1, tl.int64) * heads if ADJOINT else 0)
    for _ in range(num_chunks):
        value = tl.load(values + place * (C * V) + of_values, mask=in_values, other=0.0)
        value -= sign * _read(s0, states, reader, place, column, 0, ROWS, C, K, V, PRECISION)
        if blocks > 1:
            value -= sign * _read(s1, states, reader, place, column, ROWS, ROWS, C, K, V, PRECISION)
        tl.store(values + place * (C * V) + of_values, value, mask=in_values)
        s0 = _decayed(s0, decay, place, 0, ROWS, K, DECAYS)
        s0 += (sign * _product(writer, value, place, 0, ROWS, C, K, PRECISION)).to(tl.float64)
        if ADJOINT:
            s0 += _load_state(own, place, column, 0, ROWS, K, V).to(tl.float64)
        if blocks > 1:
            s1 = _decayed(s1, decay, place, ROWS, ROWS, K, DECAYS)
            s1 += (sign * _product(writer, value, place, ROWS, ROWS, C, K, PRECISION)).to(tl.float64)
            if ADJOINT:
                s1 += _load_state(own, place, column, ROWS, ROWS, K, V).to(tl.float64)
        place += -heads if ADJOINT else heads
    _store_state(state, s0, head, column, 0, ROWS, K, V)
    if blocks > 1:
        _store_state(state, s1, head, column, ROWS, ROWS, K, V)


class GpuChunks(Chunks):
    """`Chunks` in fp32 on a GPU. Chunks shorter than a tile, and states wider than `MAX_WIDTH`, are left to PyTorch."""

    exact_gates = False  # it takes 12 operations more in each slab

    @staticmethod
    def inverse(x: Tensor) -> Tensor:
        length = x.shape[-1]
        if length < LEAST:
            return Chunks.inverse(x)
        found = torch.empty_like(x, memory_format=torch.contiguous_format)
        how = {"C": length, "HALF": min(length, 32), "PRECISION": PRECISION, "num_warps": 4}
        launch(_inverse_kernel, x.numel() // length**2, x.contiguous(), found, **how)
        return found

    def pass_state(self, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        if not self._fits():
            return super().pass_state(state, u)
        values = u.clone(memory_format=torch.contiguous_format)
        return self._launch(state, self.w, self.key_to_end, None, values), values

    def pass_grad(self, state_grad: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if not self._fits():
            return super().pass_grad(state_grad, grad)
        value_grads = self.query_pairs.mT @ grad
        own = self.query_from_start.mT @ grad
        return self._launch(state_grad, self.key_to_end, self.w, own, value_grads), value_grads

    def _fits(self) -> bool:
        return self.chunk_len >= LEAST and self.w.shape[-1] <= MAX_WIDTH

    def _launch(self, state: Tensor, reader: Tensor, writer: Tensor, own: Tensor | None, values: Tensor) -> Tensor:
        """`_pass_kernel`, the adjoint given ``own``; the states before (behind) all chunks ``[N, B * H, K, V]``."""
        heads, width, columns = state.shape
        states = values.new_empty(len(values), *state.shape)
        tile = tiling(width, columns)
        constants = {"C": self.chunk_len, "K": width, "V": columns, "DECAYS": self.decay.shape[-2], **tile.constants}
        how = {"ADJOINT": own is not None, "PRECISION": PRECISION, "num_warps": tile.num_warps}
        tensors = (state, reader, writer, states if own is None else own, self.decay.contiguous(), states, values)
        programs = heads * -(-columns // tile.constants["COLUMNS"])
        launch(_pass_kernel, programs, *tensors, len(values), heads, **constants, **how, num_stages=1)
        return states


class Triton(Chunked):
    """`Chunked` with `GpuChunks`; for fp32 and narrower inputs."""

    chunks = GpuChunks


def tiling(width: int, columns: int) -> Tiling:
    """Of `_pass_kernel`, for states ``[width, columns]``."""
    rows = min(64, max(LEAST, triton.next_power_of_2(width)))
    most = MAX_COLUMNS if width <= 64 else LEAST  # more would spill registers
    return Tiling({"ROWS": rows, "COLUMNS": min(most, max(LEAST, triton.next_power_of_2(columns)))}, 4)


def variants() -> Iterator[Variant]:
    """Every kernel, with states of each width and with decays of heads and of channels."""
    for length in (16, 32, 64):
        signature = {"x": "*fp32", "inverse": "*fp32", "C": "constexpr", "HALF": "constexpr", "PRECISION": "constexpr"}
        constants = {"C": length, "HALF": min(length, 32), "PRECISION": "tf32x3"}
        yield Variant(f"inverse-{length}", _inverse_kernel, signature, constants, 4, 1)
    kinds = {"state": "*fp64", "decay": "*fp64", "num_chunks": "i32", "heads": "i32"}
    for width, columns, decays in ((16, 16, 1), (64, 64, 1), (64, 128, 64), (128, 128, 1), (128, 256, 128)):
        for adjoint in (False, True):
            tile = tiling(width, columns)
            sizes = {"C": 64, "K": width, "V": columns, "DECAYS": decays, **tile.constants}
            constants = sizes | {"ADJOINT": adjoint, "PRECISION": "tf32x3"}
            names = _pass_kernel.arg_names
            signature = {x: "constexpr" if x in constants else kinds.get(x, "*fp32") for x in names}
            name = f"{'grad' if adjoint else 'state'}-{width}x{columns}-{decays}"
            yield Variant(name, _pass_kernel, signature, constants, tile.num_warps, 1)
