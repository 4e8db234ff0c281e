"""Long convolution in C++ for CPUs (`cpu.cpp`): one FFT of as many channels as a vector has lanes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..backends import is_traced
from .chunked import documents, fit

SOURCE = Path(__file__).with_name("cpu.cpp")


def unsupported_reason(device: str, dtype: torch.dtype, kernel_dtype: torch.dtype) -> str:
    """Why the C++ kernels do not serve such inputs; "" if they do."""
    return native.unsupported_reason(SOURCE, device, dtype, kernel_dtype)


def forward(x: Tensor, kernel: Tensor, skip: Tensor | None, past: Tensor, ids: Tensor | None, centre: int) -> Tensor:
    """As `chunked.forward`, for x and kernel in fp32 or bf16."""
    y = _output(x, x.shape[1], ids)
    if not is_traced(x):
        library = native.load(SOURCE)
        for arguments in _arguments(library.lanes(), None, x, kernel, skip, past, ids, centre, y, None):
            library.long_conv_fft(*arguments)
    return y


def backward(
    grad: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None, past: Tensor, ids: Tensor | None, centre: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """As `chunked.backward`: the gradients of x, kernel, skip and past."""
    num_past = past.shape[1]
    dtokens = _output(x, num_past + x.shape[1], ids)
    dtaps = native.empty(kernel, *kernel.shape, dtype=torch.float32)
    if not is_traced(x):
        library = native.load(SOURCE)
        for arguments in _arguments(library.lanes(), grad, x, kernel, skip, past, ids, centre, dtokens, dtaps):
            library.long_conv_fft(*arguments)
    dskip = None if skip is None else dtaps[:, centre].to(skip.dtype)
    dpast = dtokens[:, :num_past].clone()  # outputs of a custom op may not share memory
    return dtokens[:, num_past:], dtaps.to(kernel.dtype), dskip, dpast.to(past.dtype)


def _output(x: Tensor, length: int, ids: Tensor | None) -> Tensor:
    """``[B, length, D]`` in the dtype of x; with ids zeroed, as nothing is written at positions without a token."""
    made = native.empty(x, x.shape[0], length, x.shape[2], dtype=x.dtype)
    return made if ids is None else made.zero_()


def points(least: int) -> int:
    """The size of the real FFT in `cpu.cpp`: the least of 2^n, 3 2^n and 5 2^n, n >= 3, that is at least ``least``."""
    size = 1 << max(3, (least - 1).bit_length())
    return min(n for n in (size, size // 4 * 3, size // 8 * 5) if n >= least and n % 8 == 0)


def _arguments(
    lanes: int,
    grad: Tensor | None,
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    past: Tensor,
    ids: Tensor | None,
    centre: int,
    out: Tensor,
    dtaps: Tensor | None,
) -> Iterator[tuple[Any, ...]]:
    """The arguments of each call of `long_conv_fft` in `cpu.cpp`: one call for all rows of an FFT size.

    Forward ``out`` is y. Given ``grad`` and ``dtaps [D, K]`` fp32, backward, it is the gradient of ``(past, x)``.
    """
    width, num_past = x.shape[2], past.shape[1]
    joined = torch.cat([past.to(x.dtype), x], dim=1) if num_past else x
    tokens, upstream, taps = native.last_dim_contiguous(joined, grad, kernel)
    assert tokens is not None and taps is not None
    bias = None if skip is None else skip.to(torch.float32).contiguous()
    stripes = -(-width // lanes)
    batches = list(_batches(x, num_past, ids)) if stripes else []
    whole = len(batches) == 1 and fit(kernel.shape[1], centre, *batches[0][1:])[0] == slice(0, kernel.shape[1])
    if dtaps is not None and not whole:
        dtaps.zero_()
    for rows, length, before in batches:
        used, used_centre, least = fit(kernel.shape[1], centre, length, before)
        size = points(least)
        threads = min(torch.get_num_threads(), stripes * (len(rows) if dtaps is None else 1))
        buffers = 2 if dtaps is None else 3 if len(rows) == 1 else 4
        room = buffers * size * lanes + (length + before) * lanes * (width % lanes > 0)
        workspace = native.empty(x, threads * room + 16, dtype=torch.float32)
        workspace = workspace[-workspace.data_ptr() % 64 // 4 :]  # aligned to cache lines
        parts = [taps[:, used], None if dtaps is None else dtaps[:, used]]
        yield (
            x.dtype == torch.bfloat16,
            kernel.dtype == torch.bfloat16,
            native.integers(
                size // 2,
                width,
                used.stop - used.start,
                used_centre,
                len(rows),
                *native.strides(tokens, upstream, out),
                num_past,
                *native.strides(*parts, dims=1),
                not whole,
                threads,
                room,
            ),
            native.Pointers(rows, tokens, upstream, out, parts[0], bias, parts[1], workspace),
        )


def _batches(x: Tensor, num_past: int, ids: Tensor | None) -> Iterator[tuple[Tensor, int, int]]:
    """The rows that share an FFT size.

    Returns:
        For each size: the rows ``[R, 3]`` int64 (row of the batch, first token, number of tokens; ``num_past`` tokens
        of past included), the number of tokens of the longest, and the number of tokens before those without an output.
    """
    count = num_past + x.shape[1]
    if ids is None:
        rows = torch.tensor([[b, 0, count] for b in range(x.shape[0])], dtype=torch.int64)
        if len(rows):
            yield rows, x.shape[1], num_past
        return
    for starts, lengths in documents(ids):
        rows = torch.stack([starts // count, starts % count, lengths], dim=1)
        rows = rows[rows[:, 1] + rows[:, 2] > num_past]  # the others have no output
        if len(rows):
            yield rows, int(rows[:, 2].max()), 0
