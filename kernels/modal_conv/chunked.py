"""Modal long convolution: the kernel is a sum of N damped complex exponentials, hence a recurrence of N numbers.

    h[m] = sum_n Re(c_n lambda_n^m),    c = re + i im,    lambda = exp(-exp(log_decay) + i angle), |lambda| < 1
    s_i = lambda s_{i-1} + x_i,         y_i = sum_n Re(c_n s_i)

In blocks of C tokens: a token sees those of its block through the taps h[0..C-1], and earlier ones through the
state that enters the block; both are matrix products per channel. A piece is walked in stretches of blocks, so that
only a bounded workspace is held beside inputs and outputs. README.md has the formulas. Axes of what is computed with:

    D channels,  B rows of the batch,  M blocks of all rows,  C tokens of a block,  N modes (2N: real, imaginary)
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

from ...errors import InputError
from ..backends import Backends, Option
from ..chunks import Documents
from ..scan import StatefulOp, exclusive_chunk_scan

BLOCK_LEN = 64
# Elements of a stretch of tokens: few enough for a processor's cache, or enough to keep a GPU busy.
CPU_STRETCH, GPU_STRETCH = 1 << 21, 1 << 26


@dataclass(frozen=True)
class ModalConv(StatefulOp):
    """The operator for `span.scan`: inputs ``x [B, L, D]`` and ``log_decay, angle, re, im``, each ``[D, N]``.

    Computed in fp32 (powers of lambda in fp64), or in fp64 where an input is. State ``[B, D, N]`` in complex64
    (complex128); ``A = lambda^L``, ``[1, D, N]``. A decoding step (L = 1) costs O(D N), whatever came before.

    Args:
        causal: must be True.
        backend: "auto", or the name of an implementation.

    Raises:
        InputError: ``causal`` is False, or (when it is run) shapes do not fit together.
    """

    causal: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not self.causal:
            fix = "for both directions run CentredModalConv"
            raise InputError("ModalConv: causal", self.causal, "True", fix)

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        x, log_decay = inputs[:2]
        return BACKENDS.choose(self.backend, x.device, x.dtype, log_decay.dtype)(backend=self.backend)

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        x, *parameters = inputs
        check(x, parameters)
        modes = Modes.of(x, parameters)
        state = modes.state(x.shape[0])
        if x.shape[1] == 1:  # decoding: what the blocks come down to, without their tables
            return modes.power(1).to(state.dtype).unsqueeze(0), state + x[:, 0].unsqueeze(-1)
        for stretch in _stretches(x, segments):
            sent = stretch.written(stretch.rows(x, modes.dtype), modes.write(stretch))
            _, state = stretch.enter(sent, modes.powers(stretch), state)
        return modes.power(x.shape[1]).to(state.dtype).unsqueeze(0), state

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, *parameters = inputs
        modes = Modes.of(x, parameters)
        if x.shape[1] == 1:
            state = modes.power(1) * past + x[:, 0].unsqueeze(-1)
            y = (modes.amplitude * state).real.sum(-1).to(x.dtype).unsqueeze(1)
            return y, (torch.stack([past, state.to(past.dtype)]),)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        starts = [past]
        for stretch in _stretches(x, segments):
            out, state = stretch.walk(stretch.rows(x, modes.dtype), modes.tables(stretch), starts[-1])
            y[:, stretch.tokens] = stretch.tokens_of(out)
            starts.append(state)
        return y, (torch.stack(starts),)

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        x, *parameters = inputs
        modes = Modes.of(x, parameters)
        future = torch.zeros_like(past)
        for stretch in reversed(list(_stretches(x, segments))):
            with torch.enable_grad():
                start = torch.zeros_like(past).requires_grad_()
                entering, leaving = stretch.enter(None, modes.powers(stretch), start)
                out = stretch.read(entering, modes.read(stretch))
            upstream = stretch.rows(grad, modes.dtype)
            (future,) = torch.autograd.grad([out, leaving], [start], [upstream, future])
        return future

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        future: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, *parameters = inputs
        (starts,) = saved
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in parameters]
            modes = Modes.of(x, leaves)
        stretches = list(_stretches(x, segments))
        tables: dict[int, _Tables] = {}
        to_tables: dict[int, list[Tensor]] = {}
        for stretch, start in zip(reversed(stretches), reversed(starts[:-1])):
            block_len = stretch.block_len
            with torch.enable_grad():
                if block_len not in tables:
                    tables[block_len] = modes.tables(stretch)
                    to_tables[block_len] = [torch.zeros_like(t) for t in tables[block_len]]
                rows = stretch.rows(x, modes.dtype).requires_grad_()
                start = start.detach().requires_grad_()
                used = _Tables(*(t.detach().requires_grad_() for t in tables[block_len]))
                out, state = stretch.walk(rows, used, start)
            upstream = stretch.rows(grad, modes.dtype)
            to_rows, future, *parts = torch.autograd.grad([out, state], [rows, start, *used], [upstream, future])
            dx[:, stretch.tokens] = stretch.tokens_of(to_rows)
            for total, part in zip(to_tables[block_len], parts, strict=True):
                total += part
        pairs = [
            (table, part)
            for block_len, some in tables.items()
            for table, part in zip(some, to_tables[block_len], strict=True)
            if table.requires_grad  # not the 1 with which a single token is written
        ]
        if not pairs:
            return dx, *(torch.zeros_like(p) for p in parameters)
        made, upstreams = zip(*pairs, strict=True)
        return dx, *torch.autograd.grad(made, leaves, upstreams)


def _native() -> type[ModalConv]:
    from .cpu import Native

    return Native


def _native_unsupported(device: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> str:
    from .cpu import unsupported_reason

    return unsupported_reason(device, dtype, parameter_dtype)


BACKENDS: Backends[type[ModalConv]] = Backends(
    "modal_conv", {"cpu": Option(_native, _native_unsupported), "chunked": Option(lambda: ModalConv)}
)


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
    """What a stretch is multiplied with.

    Attributes:
        inside: ``[D, C, C]``, of token j of a block for its token i.
        write: ``[D, C, 2N]``, of a token in what leaves its block.
        read: ``[D, 2N, C]``, of what enters a block for each of its tokens.
        powers: ``[D, G + 1, N]`` complex, of 0 to G blocks' ``A``.
    """

    inside: Tensor
    write: Tensor
    read: Tensor
    powers: Tensor


@dataclass(frozen=True)
class Modes:
    """The parameters as complex numbers in fp64.

    Attributes:
        rate: ``[D, N]``, the logarithm of lambda.
        amplitude: ``[D, N]``.
        dtype: of the computation with tokens, fp32 or fp64.
        _found: what several stretches use.
    """

    rate: Tensor
    amplitude: Tensor
    dtype: torch.dtype
    _found: dict[tuple[str | int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, x: Tensor, parameters: list[Tensor]) -> Modes:
        log_decay, angle, re, im = (p.double() for p in parameters)
        dtype = torch.float32
        for tensor in (x, *parameters):
            dtype = torch.promote_types(dtype, tensor.dtype)
        return cls(torch.complex(-log_decay.exp(), angle), torch.complex(re, im), dtype)

    def power(self, exponent: int) -> Tensor:
        """``lambda^exponent``, ``[D, N]``."""
        return self._once(("power", exponent), lambda: torch.exp(self.rate * exponent))

    def to_step(self, count: int, step: int) -> Tensor:
        """``lambda^(step m)`` for ``m < count``, ``[D, count, N]``."""

        def make() -> Tensor:
            table = torch.ones_like(self.rate).unsqueeze(1)
            while table.shape[1] < count:
                table = torch.cat([table, table * self.power(step * table.shape[1]).unsqueeze(1)], dim=1)
            return table[:, :count]

        return self._once(("step", count, step), make)

    def state(self, batch: int) -> Tensor:
        """The state ``[B, D, N]`` of no tokens."""
        return self.rate.new_zeros(batch, *self.rate.shape, dtype=self.dtype.to_complex())

    def tables(self, stretch: _Stretch) -> _Tables:
        """The tables of stretches with such blocks."""
        return _Tables(self.inside(stretch), self.write(stretch), self.read(stretch), self.powers(stretch))

    def inside(self, stretch: _Stretch) -> Tensor:
        def make() -> Tensor:
            length = stretch.block_len
            taps = (self.to_step(length, 1) * self.amplitude.unsqueeze(1)).real.sum(-1).to(self.dtype)
            # Row j is the taps moved j places to the right.
            return F.pad(taps, (length - 1, 0)).unfold(1, length, 1).flip(1)

        return self._once(("inside", stretch.block_len), make)

    def write(self, stretch: _Stretch) -> Tensor:
        def make() -> Tensor:
            return _as_real(self.to_step(stretch.block_len, 1).flip(1)).to(self.dtype)

        return self._once(("write", stretch.block_len), make)

    def read(self, stretch: _Stretch) -> Tensor:
        def make() -> Tensor:
            taken = self.to_step(stretch.block_len, 1) * (self.amplitude * self.power(1)).unsqueeze(1)
            return _as_real(taken.conj()).mT.to(self.dtype).contiguous()

        return self._once(("read", stretch.block_len), make)

    def powers(self, stretch: _Stretch) -> Tensor:
        def make() -> Tensor:
            return self.to_step(stretch.group_len + 1, stretch.block_len).to(self.dtype.to_complex())

        return self._once(("powers", stretch.block_len), make)

    def _once(self, key: tuple[str | int, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]


@dataclass(frozen=True)
class _Stretch:
    """Some neighbouring blocks of all rows of a piece.

    Attributes:
        tokens: which tokens of a row.
        num_rows: B.
        block_len: C; it divides the stretch, so no token is ever padding.
        group_len: G, how many blocks make up a group, see `enter`.
        documents: of the blocks, or None.
        gate: ``[B, n]``, whether a block takes what the block before it (of the stretch before, too) left, or None.
    """

    tokens: slice
    num_rows: int
    block_len: int
    group_len: int
    documents: Documents | None
    gate: Tensor | None

    @property
    def num_blocks(self) -> int:
        return (self.tokens.stop - self.tokens.start) // self.block_len

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Channels first: ``x [B, L, D]`` -> ``[D, M, C]``."""
        tokens = x[:, self.tokens].to(dtype).reshape(-1, x.shape[2])
        return tokens.t().contiguous().view(x.shape[2], -1, self.block_len)

    def tokens_of(self, rows: Tensor) -> Tensor:
        """The reverse: ``[D, M, C]`` -> ``[B, tokens, D]``."""
        return rows.flatten(1).t().unflatten(0, (self.num_rows, -1))

    def walk(self, rows: Tensor, tables: _Tables, past: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs ``[D, M, C]`` and the state ``[B, D, N]`` behind the stretch."""
        entering, leaving = self.enter(self.written(rows, tables.write), tables.powers, past)
        out = torch.bmm(rows, tables.inside)
        if self.documents is not None:
            ids = self.documents.ids.flatten(0, 1)
            mixed = (ids[:, 0] != ids[:, -1]).nonzero().squeeze(1)
            if mixed.numel():
                out = out.index_copy(1, mixed, _within_documents(rows[:, mixed], tables.inside, ids[mixed]))
        return out + self.read(entering, tables.read), leaving

    def written(self, rows: Tensor, write: Tensor) -> Tensor:
        """What each block adds to the state: ``[D, B, n, N]``."""
        if self.documents is not None:
            rows = rows * self.documents.tail.flatten(0, 1).to(rows.dtype)
        return _as_complex(torch.bmm(rows, write)).unflatten(1, (self.num_rows, -1))

    def read(self, entering: Tensor, read: Tensor) -> Tensor:
        """What the tokens see of the states ``[D, B, n, N]`` that enter their blocks: ``[D, M, C]``."""
        out = torch.bmm(_as_real(entering).flatten(1, 2), read)
        if self.documents is not None:
            out = out * self.documents.head.flatten(0, 1).to(out.dtype)
        return out

    def enter(self, written: Tensor | None, powers: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """The states that enter the blocks ``[D, B, n, N]``, and the one ``[B, D, N]`` behind the last block.

        By groups of G blocks: first from zero within all groups at once, then from group to group.

        Args:
            written: ``[D, B, n, N]`` as of `written`, None for zeros.
            powers: ``[D, G + 1, N]``.
            past: ``[B, D, N]``.
        """
        missing = -self.num_blocks % self.group_len
        if written is None:
            written = powers.new_zeros(powers.shape[0], self.num_rows, self.num_blocks, powers.shape[2])
        groups = F.pad(written, (0, 0, 0, missing)).unflatten(2, (-1, self.group_len))
        decay, passes, gates = powers[:, 1, None, None], None, None
        if self.documents is not None and self.gate is not None:
            real = decay.real.dtype
            gates = F.pad(self.gate, (0, missing)).to(real).unflatten(1, (-1, self.group_len)).unsqueeze(-1)
            passes = F.pad(self.documents.whole, (0, missing)).to(real).unflatten(1, (-1, self.group_len)).unsqueeze(-1)
        state = torch.zeros_like(groups[:, :, :, 0])
        from_group = []
        for block in range(self.group_len):
            if gates is not None:
                state = state * gates[:, :, block]
            from_group.append(state)
            state = decay * (state if passes is None else state * passes[:, :, block]) + groups[:, :, :, block]
        through = powers[:, -1, None, None]
        since = powers[:, None, None, :-1]
        if gates is not None and passes is not None:
            reach = (gates * torch.cat([torch.ones_like(passes[:, :, :1]), passes[:, :, :-1]], dim=2)).cumprod(2)
            since, through = since * reach, through * (reach[:, :, -1] * passes[:, :, -1])
        starts = exclusive_chunk_scan(
            through.expand(-1, *state.shape[1:3], -1).permute(1, 2, 0, 3), state.permute(1, 2, 0, 3), past
        )[:, :-1]
        starts = starts.to(past.dtype).permute(2, 0, 1, 3)
        entering = torch.stack(from_group, dim=3) + since * starts.unsqueeze(3)
        entering = entering.flatten(2, 3)[:, :, : self.num_blocks]
        last = entering[:, :, -1]
        if self.documents is not None:
            last = last * self.documents.whole[:, -1:].to(last.real.dtype)
        leaving = powers[:, 1, None] * last + written[:, :, -1]
        return entering, leaving.transpose(0, 1)


def _stretches(x: Tensor, segments: Tensor | None) -> Iterator[_Stretch]:
    """Cuts a piece into stretches of blocks; a last block that is shorter is a stretch of its own."""
    batch, length, width = x.shape
    elements = CPU_STRETCH if x.device.type == "cpu" else GPU_STRETCH
    num_blocks = max(1, min(elements // max(1, batch * width), length) // BLOCK_LEN)
    aligned = length - length % BLOCK_LEN
    edges = [*range(0, aligned, num_blocks * BLOCK_LEN), aligned]
    if aligned < length:
        edges.append(length)
    for start, stop in pairwise(edges):
        whole = stop <= aligned
        group_len = math.isqrt(num_blocks - 1) + 1 if whole else 1
        documents = gate = None
        if segments is not None:
            documents = Documents.of(segments[:, start:stop], BLOCK_LEN if whole else stop - start)
            gate = documents.continues
            if start:
                goes_on = segments[:, start : start + 1] == segments[:, start - 1 : start]
                gate = torch.cat([goes_on, gate[:, 1:]], dim=1)
        yield _Stretch(slice(start, stop), batch, BLOCK_LEN if whole else stop - start, group_len, documents, gate)


def _within_documents(rows: Tensor, inside: Tensor, ids: Tensor) -> Tensor:
    """``rows inside`` for blocks in which documents begin, ``[D, M', C]``.

    Halves of 1, 2, 4, ... tokens: what crosses from a left to a right one is of the document that the left ends with.

    Args:
        rows: ``[D, M', C]``.
        inside: ``[D, C, C]``.
        ids: ``[M', C]``.
    """
    length = rows.shape[2]
    out = rows * inside[:, :1, :1]
    missing = (1 << (length - 1).bit_length()) - length
    if missing:
        rows, out, inside = F.pad(rows, (0, missing)), F.pad(out, (0, missing)), F.pad(inside, (0, missing))
        ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], dim=1)
    half = 1
    while half < length:
        left, right = ids.unflatten(1, (-1, 2, half)).flatten(0, 1).unbind(1)
        crosses = left[:, -1:]
        pairs = (rows.flatten(1).unflatten(1, (-1, 2, half))[:, :, 0]) * (left == crosses).to(rows.dtype)
        seen = torch.bmm(pairs, inside[:, :half, half : 2 * half]) * (right == crosses).to(rows.dtype)
        out = out + F.pad(seen, (half, 0)).view(out.shape)
        half *= 2
    return out[:, :, :length]


def _as_real(x: Tensor) -> Tensor:
    """``[..., N]`` complex -> ``[..., 2N]``; the product of two such rows is ``Re(x y*)``."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def check(x: Tensor, parameters: list[Tensor]) -> None:
    shape = parameters[0].shape
    if x.dim() != 3 or len(shape) != 2 or shape[0] != x.shape[2] or any(p.shape != shape for p in parameters):
        given = [list(t.shape) for t in (x, *parameters)]
        raise InputError("ModalConv: inputs", given, "x [B, L, D] and log_decay, angle, re, im, each [D, N]")
