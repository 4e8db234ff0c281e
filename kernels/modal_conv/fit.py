"""Fits a long convolution's taps by damped modes: the recurrence of `ModalConv` that is nearest to a learned kernel.

A kernel of K taps is 0 from tap K on, and the modes go on: what is minimized is the squared error over all taps to
infinity. For given poles it is quadratic in the amplitudes, with inner products in closed form::

    sum_m lambda_i^m conj(lambda_j)^m = 1 / (1 - lambda_i conj(lambda_j))

so the amplitudes are those of linear least squares, and only the poles are searched for (variable projection, Golub and
Pereyra 1973): first those of the Hankel matrix ``h[i + j]``, whose largest eigenvectors shift by them (Kung 1978,
ESPRIT), then Adam, on all channels at once, keeping the best of each. All of it is fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FASTEST = math.log(3.0)  # largest log_decay: |lambda| of 0.05
RIDGE = 1e-9  # of least squares with normalized columns: amplitudes stay small enough for fp32
SPARE = 8  # eigenvectors of the Hankel matrix beyond those that are wanted
ELEMENTS = 1 << 24  # of the eigenvectors of the channels that are processed at once


def fit_modes(taps: Tensor, modes: int, steps: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Modes whose kernel ``h[m] = sum_n Re(c_n lambda_n^m)`` is nearest to ``taps``, and to 0 behind them.

    Args:
        taps: ``[D, K]``, K >= 2.
        modes: N.
        steps: of Adam on the poles; 0 leaves them as the Hankel matrix has them.

    Returns:
        ``log_decay, angle, re, im``, each ``[D, N]`` fp64, with ``lambda = exp(-exp(log_decay) + i angle)``, as of
        `ModalConv`: all ``|lambda| < 1``. The poles are numbers of fp32, for which the amplitudes were found.
    """
    scale = taps.norm(dim=1, keepdim=True).clamp(min=1e-30).double()
    taps, parts = taps.double() / scale, []
    at_once = max(1, ELEMENTS // (taps.shape[1] * (2 * modes + SPARE)))
    for some in taps.split(at_once):
        log_decay, angle = _refined(some, *_hankel_poles(some, modes), steps)
        log_decay, angle = log_decay.float().double(), angle.float().double()
        amplitude = _project(some, log_decay, angle)[0]
        parts.append((log_decay, angle, amplitude.real, amplitude.imag))
    log_decay, angle, re, im = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_decay, angle, re * scale, im * scale


def squared_error(taps: Tensor, log_decay: Tensor, angle: Tensor, re: Tensor, im: Tensor) -> Tensor:
    """``sum_m (taps[m] - h[m])^2`` of each channel over all m to infinity, where taps are 0 from K on: ``[D]`` fp64.

    Args:
        taps: ``[D, K]``.
        log_decay, angle, re, im: ``[D, N]``, as of `ModalConv`.
    """
    taps, log_decay, angle = taps.double(), log_decay.double(), angle.double()
    weights = torch.cat([re.double(), im.double()], dim=1)
    gram, inner = _gram(log_decay, angle), _inner(taps, log_decay, angle)
    model = (weights.unsqueeze(1) @ gram @ weights.unsqueeze(2)).flatten()
    return (taps.square().sum(1) - 2 * (weights * inner).sum(1) + model).clamp(min=0.0)


def _poles(log_decay: Tensor, angle: Tensor) -> Tensor:
    """Logarithms of lambda, complex."""
    return torch.complex(-log_decay.exp(), angle)


def _inner(taps: Tensor, log_decay: Tensor, angle: Tensor) -> Tensor:
    """Inner products ``[D, 2N]`` of taps with ``Re(lambda^m)`` and ``-Im(lambda^m)``, by two short tables of powers."""
    log_poles, length = _poles(log_decay, angle), taps.shape[1]
    step = max(1, math.isqrt(length))
    rows = -(-length // step)
    table = torch.nn.functional.pad(taps, (0, rows * step - length)).unflatten(1, (rows, step))
    fine = torch.exp(log_poles.unsqueeze(1) * torch.arange(step, device=taps.device).view(1, -1, 1))
    coarse = torch.exp(log_poles.unsqueeze(1) * (step * torch.arange(rows, device=taps.device)).view(1, -1, 1))
    sums = ((table.to(fine.dtype) @ fine) * coarse).sum(1)
    return torch.cat([sums.real, -sums.imag], dim=1)


def _gram(log_decay: Tensor, angle: Tensor) -> Tensor:
    """Inner products ``[D, 2N, 2N]`` of these functions with each other, over all m >= 0."""
    log_poles = _poles(log_decay, angle)
    row, column = log_poles.unsqueeze(2), log_poles.unsqueeze(1)
    mixed, plain = (-1 / _expm1(row + other) for other in (column.conj(), column))
    both, ends = 0.5 * (mixed + plain), 0.5 * (mixed - plain)
    top = torch.cat([both.real, ends.imag], dim=2)
    return torch.cat([top, torch.cat([ends.imag.mT, ends.real], dim=2)], dim=1)


def _expm1(z: Tensor) -> Tensor:
    """``exp(z) - 1`` of complex z, without cancellation near 0."""
    real = torch.expm1(z.real) - 2 * z.real.exp() * torch.sin(z.imag / 2).square()
    return torch.complex(real, z.real.exp() * torch.sin(z.imag))


def _project(taps: Tensor, log_decay: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The best amplitudes for these poles, ``[D, N]`` complex, and what they explain of the sum of squares, ``[D]``."""
    gram, inner = _gram(log_decay, angle), _inner(taps, log_decay, angle)
    squares = gram.diagonal(dim1=1, dim2=2)
    whole = squares.unflatten(1, (2, -1)).sum(1).repeat(1, 2)  # a pole near the real axis has almost no imaginary part
    norms = (squares + 1e-5 * whole).sqrt()
    gram = gram / (norms.unsqueeze(1) * norms.unsqueeze(2))
    gram = gram + RIDGE * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    right = inner / norms
    weights = torch.cholesky_solve(right.unsqueeze(2), torch.linalg.cholesky(gram)).squeeze(2)
    re, im = (weights / norms).chunk(2, dim=1)
    return torch.complex(re, im), (weights * right).sum(1)


def _hankel_poles(taps: Tensor, modes: int) -> tuple[Tensor, Tensor]:
    """The N strongest poles of each channel's Hankel matrix ``h[i + j]``, as ``log_decay, angle [D, N]``.

    A mode is a pair of conjugate poles, so 2N are computed, of the eigenvectors that subspace iteration finds with
    products by FFT.
    """
    channels, length = taps.shape
    order = min(2 * modes, length - 1)
    spectrum = torch.fft.rfft(taps, 2 * length).unsqueeze(2)

    def hankel(x: Tensor) -> Tensor:
        return torch.fft.irfft(spectrum * torch.fft.rfft(x, 2 * length, dim=1).conj(), 2 * length, dim=1)[:, :length]

    generator = torch.Generator().manual_seed(0)
    width = min(order + SPARE, length)
    start = torch.randn(channels, length, width, dtype=taps.dtype, generator=generator).to(taps.device)
    basis = torch.linalg.qr(start)[0]
    for _ in range(6):
        basis = torch.linalg.qr(hankel(basis))[0]
    values, vectors = torch.linalg.eigh(basis.mT @ hankel(basis))
    strongest = values.abs().argsort(dim=1, descending=True)[:, :order]
    vectors = basis @ vectors.gather(2, strongest.unsqueeze(1).expand(-1, vectors.shape[1], -1))
    # The first rows of the eigenvectors, shifted by one, are the rows behind them: least squares gives the shift.
    first, second = vectors[:, :-1], vectors[:, 1:]
    square = first.mT @ first + RIDGE * torch.eye(order, dtype=taps.dtype, device=taps.device)
    poles = torch.linalg.eigvals(torch.linalg.solve(square, first.mT @ second))
    # Of each conjugate pair the one above the real axis; the rest are put where a pole costs nothing.
    log_decay = (-poles.abs().clamp(1e-6, 1 - 1e-9).log()).log().clamp(-math.log(16.0 * length), FASTEST)
    angle = poles.angle()
    below = angle < -1e-9
    log_decay, angle = log_decay.masked_fill(below, FASTEST), angle.masked_fill(below, 0.0)
    if order < modes:
        log_decay = torch.nn.functional.pad(log_decay, (0, modes - order), value=FASTEST)
        angle = torch.nn.functional.pad(angle, (0, modes - order))
    amplitude = _project(taps, log_decay, angle)[0]
    energy = amplitude.abs().square() / -torch.expm1(-2 * log_decay.exp())
    energy[:, :order] = energy[:, :order].masked_fill(below, -1.0)
    kept = energy.argsort(dim=1, descending=True)[:, :modes]
    return log_decay.gather(1, kept), angle.gather(1, kept)


@torch.enable_grad()
def _refined(taps: Tensor, log_decay: Tensor, angle: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The poles after Adam: moves of the logarithm of a decay, and of an angle in units of the decay."""
    unit, slowest = log_decay.exp(), -math.log(64.0 * taps.shape[1])
    moves = [torch.zeros_like(log_decay, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.Adam(moves, lr=0.05, betas=(0.9, 0.99))
    best = torch.full_like(taps[:, 0], -math.inf)
    kept = [log_decay.clone(), angle.clone()]
    for step in range(steps + 1):
        poles = (log_decay + moves[0]).clamp(slowest, FASTEST), angle + unit * moves[1]
        explained = _project(taps, *poles)[1]
        with torch.no_grad():
            better = explained > best
            best = torch.where(better, explained, best)
            kept = [torch.where(better.unsqueeze(1), new, old) for new, old in zip(poles, kept, strict=True)]
        if step < steps:
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            (-explained.sum()).backward()
            optimizer.step()
    return kept[0].detach(), kept[1].detach()
