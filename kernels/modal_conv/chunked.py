"""Modal long convolution: the kernel is a sum of N damped complex exponentials, hence a recurrence of N numbers.

    h[m] = sum_n Re(c_n lambda_n^m),    c = re + i im,    lambda = exp(-exp(log_decay) + i angle), |lambda| < 1
    s_i = lambda s_{i-1} + x_i,         y_i = sum_n Re(c_n s_i)

A shard is cut into chunks of C tokens. Tokens of a chunk reach each other through the taps h[0..C-1], and earlier
tokens through the state before the chunk; both are matrix products per channel. A few consecutive chunks, a slab, are
processed at once, so that the workspace does not grow with the shard. README.md has the formulas. Axes:

    D channels,  B rows of the batch,  M = B n chunks of a slab,  C tokens of a chunk,  N modes (2N: real, imaginary)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import Documents
from ..state import StatefulOp

CHUNK_LEN = 64
# Elements of a slab of tokens: few enough for a processor's cache, or enough to keep a GPU busy.
CPU_SLAB, GPU_SLAB = 1 << 21, 1 << 26


class Chunked(StatefulOp):
    """The passes of `ModalConv` in chunks of `CHUNK_LEN` tokens.

    Computed in fp32 (powers of lambda in fp64), or in fp64 where an input is. Saved for the backward pass: the state
    before each slab.
    """

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        x, *parameters = inputs
        modes = Modes.of(x, parameters)
        state = modes.state(x.shape[0])
        if x.shape[1] == 1:  # decoding: the recurrence itself, without tables
            return modes.power(1).to(state.dtype).unsqueeze(0), state + x[:, 0].unsqueeze(-1)
        for slab in _slabs(x, segments):
            chunk_states = slab.chunk_states(slab.rows(x, modes.dtype), modes.token_to_state(slab))
            _, state = slab.scan(chunk_states, modes.chunk_decays(slab), state)
        return modes.power(x.shape[1]).to(state.dtype).unsqueeze(0), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, *parameters = inputs
        modes = Modes.of(x, parameters)
        if x.shape[1] == 1:
            state = modes.power(1) * initial + x[:, 0].unsqueeze(-1)
            y = (modes.amplitude * state).real.sum(-1).to(x.dtype).unsqueeze(1)
            return y, (torch.stack([initial, state.to(initial.dtype)]),)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        starts = [initial]
        for slab in _slabs(x, segments):
            out, state = slab.forward(slab.rows(x, modes.dtype), modes.tables(slab), starts[-1])
            y[:, slab.tokens] = slab.tokens_of(out)
            starts.append(state)
        return y, (torch.stack(starts),)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        x, *parameters = inputs
        modes = Modes.of(x, parameters)
        initial_grad = torch.zeros_like(initial)
        for slab in reversed(list(_slabs(x, segments))):
            with torch.enable_grad():
                start = torch.zeros_like(initial).requires_grad_()
                initial_states, final_state = slab.scan(None, modes.chunk_decays(slab), start)
                out = slab.state_outputs(initial_states, modes.state_to_token(slab))
            upstream = slab.rows(grad, modes.dtype)
            (initial_grad,) = torch.autograd.grad([out, final_state], [start], [upstream, initial_grad])
        return initial_grad

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, *parameters = inputs
        (starts,) = saved
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in parameters]
            modes = Modes.of(x, leaves)
        slabs = list(_slabs(x, segments))
        tables: dict[int, _Tables] = {}
        to_tables: dict[int, list[Tensor]] = {}
        for slab, start in zip(reversed(slabs), reversed(starts[:-1])):
            chunk_len = slab.chunk_len
            with torch.enable_grad():
                if chunk_len not in tables:
                    tables[chunk_len] = modes.tables(slab)
                    to_tables[chunk_len] = [torch.zeros_like(t) for t in tables[chunk_len]]
                rows = slab.rows(x, modes.dtype).requires_grad_()
                start = start.detach().requires_grad_()
                used = _Tables(*(t.detach().requires_grad_() for t in tables[chunk_len]))
                out, state = slab.forward(rows, used, start)
            upstream = slab.rows(grad, modes.dtype)
            to_rows, final_grad, *parts = torch.autograd.grad(
                [out, state], [rows, start, *used], [upstream, final_grad]
            )
            dx[:, slab.tokens] = slab.tokens_of(to_rows)
            for total, part in zip(to_tables[chunk_len], parts, strict=True):
                total += part
        pairs = [
            (table, part)
            for chunk_len, some in tables.items()
            for table, part in zip(some, to_tables[chunk_len], strict=True)
            if table.requires_grad  # for chunks of one token, token_to_state is the constant 1
        ]
        if not pairs:
            return dx, *(torch.zeros_like(p) for p in parameters)
        made, upstreams = zip(*pairs, strict=True)
        return dx, *torch.autograd.grad(made, leaves, upstreams)


def modal_kernel(log_decay: Tensor, angle: Tensor, re: Tensor, im: Tensor, length: int) -> Tensor:
    """The taps ``h[d, m] = sum_n Re((re + i im)_dn lambda_dn^m)`` of `ModalConv`, for `long_conv`; differentiable.

    Args:
        log_decay, angle, re, im: ``[D, N]``.
        length: how many taps.

    Returns:
        ``[D, length]`` in fp32, or fp64 where a parameter is; computed in fp64.
    """
    parameters = [log_decay, angle, re, im]
    modes = Modes.of(log_decay, parameters)
    # lambda^(m + step k) = lambda^m lambda^(step k): two short tables and a matrix product.
    step = max(1, math.isqrt(length))
    fine = modes.to_step(step, 1) * modes.amplitude.unsqueeze(1)
    coarse = modes.to_step(-(-length // step), step)
    taps = _as_real(coarse) @ _as_real(fine.conj()).mT
    return taps.flatten(1)[:, :length].to(modes.dtype)


class _Tables(NamedTuple):
    """The matrices by which the tokens and states of a slab are multiplied.

    Attributes:
        token_to_token: ``[D, C, C]``, row j, column i: ``h[i - j]`` for i >= j, else 0 (Toeplitz).
        token_to_state: ``[D, C, 2N]``, row j: ``lambda^(C-1-j)``.
        state_to_token: ``[D, 2N, C]``, column i: ``c lambda^(i+1)``.
        chunk_decays: ``[D, G + 1, N]`` complex, ``lambda^(C g)`` for g = 0..G.
    """

    token_to_token: Tensor
    token_to_state: Tensor
    state_to_token: Tensor
    chunk_decays: Tensor


@dataclass(frozen=True)
class Modes:
    """The parameters as complex numbers in fp64.

    Attributes:
        rate: ``[D, N]``, the logarithm of lambda.
        amplitude: ``[D, N]``.
        dtype: of the computation with tokens, fp32 or fp64.
        _cache: powers and tables that several slabs use.
    """

    rate: Tensor
    amplitude: Tensor
    dtype: torch.dtype
    _cache: dict[tuple[str | int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, x: Tensor, parameters: list[Tensor]) -> Modes:
        log_decay, angle, re, im = (p.double() for p in parameters)
        # NaN where either is not finite: exp(-inf + i NaN) would be 0, and hide it.
        log_decay = torch.add(log_decay, log_decay + angle, alpha=0)
        dtype = torch.float32
        for tensor in (x, *parameters):
            dtype = torch.promote_types(dtype, tensor.dtype)
        return cls(torch.complex(-log_decay.exp(), angle), torch.complex(re, im), dtype)

    def power(self, exponent: int) -> Tensor:
        """``lambda^exponent``, ``[D, N]``."""
        return self._cached(("power", exponent), lambda: torch.exp(self.rate * exponent))

    def to_step(self, count: int, step: int) -> Tensor:
        """``lambda^(step m)`` for ``m < count``, ``[D, count, N]``."""

        def make() -> Tensor:
            table = torch.ones_like(self.rate).unsqueeze(1)
            while table.shape[1] < count:
                table = torch.cat([table, table * self.power(step * table.shape[1]).unsqueeze(1)], dim=1)
            return table[:, :count]

        return self._cached(("step", count, step), make)

    def state(self, batch: int) -> Tensor:
        """The state ``[B, D, N]`` before any token: zeros."""
        return self.rate.new_zeros(batch, *self.rate.shape, dtype=self.dtype.to_complex())

    def tables(self, slab: _Slab) -> _Tables:
        """The tables for the chunks of ``slab``."""
        return _Tables(
            self.token_to_token(slab), self.token_to_state(slab), self.state_to_token(slab), self.chunk_decays(slab)
        )

    def token_to_token(self, slab: _Slab) -> Tensor:
        def make() -> Tensor:
            length = slab.chunk_len
            taps = (self.to_step(length, 1) * self.amplitude.unsqueeze(1)).real.sum(-1).to(self.dtype)
            # Row j is the taps shifted by j to the right.
            return F.pad(taps, (length - 1, 0)).unfold(1, length, 1).flip(1)

        return self._cached(("token_to_token", slab.chunk_len), make)

    def token_to_state(self, slab: _Slab) -> Tensor:
        def make() -> Tensor:
            return _as_real(self.to_step(slab.chunk_len, 1).flip(1)).to(self.dtype)

        return self._cached(("token_to_state", slab.chunk_len), make)

    def state_to_token(self, slab: _Slab) -> Tensor:
        def make() -> Tensor:
            taken = self.to_step(slab.chunk_len, 1) * (self.amplitude * self.power(1)).unsqueeze(1)
            return _as_real(taken.conj()).mT.to(self.dtype).contiguous()

        return self._cached(("state_to_token", slab.chunk_len), make)

    def chunk_decays(self, slab: _Slab) -> Tensor:
        def make() -> Tensor:
            return self.to_step(slab.group_len + 1, slab.chunk_len).to(self.dtype.to_complex())

        return self._cached(("chunk_decays", slab.chunk_len), make)

    def _cached(self, key: tuple[str | int, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


@dataclass(frozen=True)
class _Slab:
    """Consecutive chunks of all rows of a shard.

    Attributes:
        tokens: the tokens of each row.
        num_rows: B.
        chunk_len: C; it divides the slab's length, so there is no padding.
        group_len: G, the chunks of a group, see `scan`.
        documents: the documents of the chunks, or None.
        gate: ``[B, n]``, whether a chunk continues the document of the chunk before it, that of the slab before
            included; None for one document.
    """

    tokens: slice
    num_rows: int
    chunk_len: int
    group_len: int
    documents: Documents | None
    gate: Tensor | None

    @property
    def num_chunks(self) -> int:
        return (self.tokens.stop - self.tokens.start) // self.chunk_len

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x [B, L, D]`` -> the slab's tokens ``[D, M, C]``, channels first, in ``dtype``."""
        tokens = x[:, self.tokens].to(dtype).reshape(-1, x.shape[2])
        return tokens.t().contiguous().view(x.shape[2], -1, self.chunk_len)

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Inverse of `rows`: ``[D, M, C]`` -> ``[B, tokens, D]``."""
        return rows.flatten(1).t().unflatten(0, (self.num_rows, -1))

    def forward(self, rows: Tensor, tables: _Tables, initial: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs ``[D, M, C]`` and the state ``[B, D, N]`` after the slab; ``initial`` is the state before it."""
        chunk_states = self.chunk_states(rows, tables.token_to_state)
        initial_states, final_state = self.scan(chunk_states, tables.chunk_decays, initial)
        out = torch.bmm(rows, tables.token_to_token)
        if self.documents is not None:
            ids = self.documents.ids.flatten(0, 1)
            mixed = (ids[:, 0] != ids[:, -1]).nonzero().squeeze(1)
            if mixed.numel():
                out = out.index_copy(1, mixed, _within_documents(rows[:, mixed], tables.token_to_token, ids[mixed]))
        return out + self.state_outputs(initial_states, tables.state_to_token), final_state

    def chunk_states(self, rows: Tensor, token_to_state: Tensor) -> Tensor:
        """Each chunk's own contribution to the state after it: ``[D, B, n, N]``."""
        if self.documents is not None:
            rows = _kept(rows, self.documents.tail.flatten(0, 1))
        return _as_complex(torch.bmm(rows, token_to_state)).unflatten(1, (self.num_rows, -1))

    def state_outputs(self, initial_states: Tensor, state_to_token: Tensor) -> Tensor:
        """The outputs ``[D, M, C]`` of the states before the chunks, ``[D, B, n, N]``."""
        out = torch.bmm(_as_real(initial_states).flatten(1, 2), state_to_token)
        if self.documents is not None:
            out = _kept(out, self.documents.head.flatten(0, 1))
        return out

    def scan(self, chunk_states: Tensor | None, chunk_decays: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """The states before the chunks ``[D, B, n, N]``, and the state ``[B, D, N]`` after the last chunk.

        In groups of G chunks: first a scan from zero within all groups in parallel, then a scan over the groups.

        Args:
            chunk_states: ``[D, B, n, N]`` of `chunk_states`, None for zeros.
            chunk_decays: ``[D, G + 1, N]``.
            initial: ``[B, D, N]``, the state before the first chunk.
        """
        missing = -self.num_chunks % self.group_len
        if chunk_states is None:
            chunk_states = chunk_decays.new_zeros(
                chunk_decays.shape[0], self.num_rows, self.num_chunks, chunk_decays.shape[2]
            )
        groups = F.pad(chunk_states, (0, 0, 0, missing)).unflatten(2, (-1, self.group_len))
        decay, whole, gates = chunk_decays[:, 1, None, None], None, None
        if self.documents is not None and self.gate is not None:
            gates, whole = (
                F.pad(mask, (0, missing)).unflatten(1, (-1, self.group_len)).unsqueeze(-1)
                for mask in (self.gate, self.documents.whole)
            )
        state = torch.zeros_like(groups[:, :, :, 0])
        local_states = []  # before each chunk of a group, from zero before the group
        for chunk in range(self.group_len):
            state = _kept(state, None if gates is None else gates[:, :, chunk])
            local_states.append(state)
            state = decay * _kept(state, None if whole is None else whole[:, :, chunk]) + groups[:, :, :, chunk]
        reach = passes = None
        if gates is not None and whole is not None:
            reach = (gates & F.pad(whole[:, :, :-1], (0, 0, 1, 0), value=True)).cumprod(2).bool()
            passes = reach[:, :, -1] & whole[:, :, -1]
        start, group_starts = initial.transpose(0, 1), []  # in fp64, so that a sum of many groups keeps its digits
        for group, total in enumerate(state.unbind(2)):
            group_starts.append(start)
            passed = _kept(start, None if passes is None else passes[:, group])
            start = chunk_decays[:, -1, None].to(torch.complex128) * passed + total
        starts = torch.stack(group_starts, dim=2).to(initial.dtype).unsqueeze(3)
        initial_states = torch.stack(local_states, dim=3) + _kept(chunk_decays[:, None, None, :-1] * starts, reach)
        initial_states = initial_states.flatten(2, 3)[:, :, : self.num_chunks]
        last = initial_states[:, :, -1]
        if self.documents is not None:
            last = _kept(last, self.documents.whole[:, -1:])
        final_state = chunk_decays[:, 1, None] * last + chunk_states[:, :, -1]
        return initial_states, final_state.transpose(0, 1)


def _slabs(x: Tensor, segments: Tensor | None) -> Iterator[_Slab]:
    """Cut a shard into slabs; a shorter last chunk is a slab of its own."""
    batch, length, width = x.shape
    elements = CPU_SLAB if x.device.type == "cpu" else GPU_SLAB
    num_chunks = max(1, min(elements // max(1, batch * width), length) // CHUNK_LEN)
    aligned = length - length % CHUNK_LEN
    edges = [*range(0, aligned, num_chunks * CHUNK_LEN), aligned]
    if aligned < length:
        edges.append(length)
    for start, stop in pairwise(edges):
        whole = stop <= aligned
        group_len = math.isqrt(num_chunks - 1) + 1 if whole else 1
        documents = gate = None
        if segments is not None:
            documents = Documents.of(segments[:, start:stop], CHUNK_LEN if whole else stop - start)
            gate = documents.continues
            if start:
                continues = segments[:, start : start + 1] == segments[:, start - 1 : start]
                gate = torch.cat([continues, gate[:, 1:]], dim=1)
        yield _Slab(slice(start, stop), batch, CHUNK_LEN if whole else stop - start, group_len, documents, gate)


def _within_documents(rows: Tensor, token_to_token: Tensor, ids: Tensor) -> Tensor:
    """``rows token_to_token`` for chunks in which documents begin, ``[D, M', C]``.

    By halves of 1, 2, 4, ... tokens: only the last document of a left half reaches its right half.

    Args:
        rows: ``[D, M', C]``.
        token_to_token: ``[D, C, C]``.
        ids: ``[M', C]``.
    """
    length = rows.shape[2]
    out = rows * token_to_token[:, :1, :1]
    missing = (1 << (length - 1).bit_length()) - length
    if missing:
        rows, out, token_to_token = (F.pad(t, (0, missing)) for t in (rows, out, token_to_token))
        ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], dim=1)
    half = 1
    while half < length:
        left, right = ids.unflatten(1, (-1, 2, half)).flatten(0, 1).unbind(1)
        last_id = left[:, -1:]
        pairs = _kept(rows.flatten(1).unflatten(1, (-1, 2, half))[:, :, 0], left == last_id)
        seen = _kept(torch.bmm(pairs, token_to_token[:, :half, half : 2 * half]), right == last_id)
        out = out + F.pad(seen, (half, 0)).view(out.shape)
        half *= 2
    return out[:, :, :length]


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` where ``mask`` is set, else 0; no product, as 0 times what is not finite is NaN. None keeps all."""
    return x if mask is None else x.masked_fill(~mask, 0)


def _as_real(x: Tensor) -> Tensor:
    """``[..., N]`` complex -> ``[..., 2N]``; the product of two such rows is ``Re(x y*)``."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
