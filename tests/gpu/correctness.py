"""Every operator in every variant and dtype against its definition in fp64, and against itself, bit by bit."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from findings import Findings
from torch import Tensor

from longreach.kernels import gpu, modal_conv
from longreach.kernels.dropout import dropout, reference_dropout
from longreach.kernels.elementwise import elementwise_attention, reference_elementwise_attention
from longreach.kernels.linear_attention import linear_attention, reference_linear_attention
from longreach.kernels.long_conv import long_conv, reference_long_conv
from longreach.kernels.modal_conv import ModalConv, reference_modal_conv
from longreach.kernels.rms_norm import reference_rms_norm, rms_norm
from longreach.kernels.scan import scan
from longreach.kernels.short_conv import reference_short_conv, short_conv

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DECAYS = (1.0, 0.97, 0.9, 0.5)


@dataclass(frozen=True)
class Limits:
    """Of the relative RMS error of an output or a gradient, by dtype, and why they are so."""

    bf16: float
    fp16: float
    fp32: float
    reason: str


ROUNDED = Limits(4e-3, 5e-4, 2e-6, "computed in fp32, and each result rounded once to a dtype of 8, 11 or 24 bits")
PRODUCTS = Limits(8e-3, 1e-3, 2e-6, "the operands of matrix products are rounded too, and rounding errors add up")
SUMS = Limits(4e-3, 1e-3, 2e-6, "computed in fp32; a parameter's gradient sums terms of both signs over all tokens")
MEAN = Limits(3e-2, 4e-3, 4e-6, "dq has v - y, a small difference early in a document, of a y that was rounded")

GATES = Limits(3e-2, 4e-3, 1e-5, "the gradient of log_decay is a running sum of a difference of dots, over a split")


@dataclass(frozen=True)
class Sizes:
    """Of the inputs: rows, tokens, channels, heads, taps of the long convolution, modes, and channels of a norm."""

    batch: int
    length: int
    width: int
    heads: int
    taps: int
    modes: int
    group: int


LARGE = Sizes(2, 1000, 256, heads=4, taps=300, modes=8, group=64)  # K and V of 64: the most that fp32 has kernels for
SMALL = Sizes(1, 21, 8, heads=1, taps=9, modes=2, group=4)
SMALL_TILES: dict[str, dict[str, Any]] = {  # of interpreted kernels, so that a few tokens fill several chunks
    "elementwise": {"CHUNK": 16},
    "linear_attention": {"MIN_SPLIT": 32, "SCAN_COLUMNS": 1024},
    "short_conv": {"MIN_CHUNK": 16, "CHANNELS": 8},
    "modal_conv": {"CHUNKS": dict.fromkeys(DTYPES.values(), 8)},
}

Run = Callable[..., Tensor]
Made = tuple[list[Tensor], Run, Run]
"""Inputs in fp32, the operator by its Triton kernels, and its definition."""


def _random(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.7


def _segments(s: Sizes, device: str) -> Tensor:
    """Documents that begin at random; at least one ends inside."""
    begins = torch.rand(s.batch, s.length) < 0.02
    begins[:, s.length // 3] = True
    return begins.cumsum(dim=1).to(device)


def _options(s: Sizes, device: str, documents: bool) -> dict[str, Any]:
    return {"segments": _segments(s, device) if documents else None}


def _elementwise(s: Sizes, device: str, documents: bool = False) -> Made:
    options = _options(s, device, documents)
    return (
        [_random(s.batch, s.length, s.width) for _ in range(3)],
        lambda *x: elementwise_attention(*x, **options, backend="triton")[0],
        lambda *x: reference_elementwise_attention(*x, **options)[0],
    )


def _linear(s: Sizes, device: str, documents: bool = False, **settings: Any) -> Made:
    options = _options(s, device, documents) | settings
    if "decay" in options:
        options["decay"] = options["decay"][-s.heads :]
    q, k, v = (_random(s.batch, s.length, s.heads, s.width // s.heads) for _ in range(3))
    if options.get("normalize"):
        q, k = F.softplus(q), F.softplus(k)
    options["scale"] = q.shape[-1] ** -0.5
    return (
        [q, k, v],
        lambda *x, **more: linear_attention(*x, **options, **more, backend="triton")[0],
        lambda *x, **more: reference_linear_attention(*x, **options, **more)[0],
    )


def _gated_linear(s: Sizes, device: str) -> Made:
    inputs, run, truth = _linear(s, device)
    rates = -torch.rand(s.batch, s.length, s.heads)
    return (
        [*inputs, rates],
        lambda *x: run(*x[:3], log_decay=x[3]),
        lambda *x: truth(*x[:3], log_decay=x[3]),
    )


def _short(s: Sizes, device: str, documents: bool = False, activation: str | None = "silu") -> Made:
    options = _options(s, device, documents) | {"activation": activation}
    return (
        [_random(s.batch, s.length, s.width), _random(s.width, 4), _random(s.width)],
        lambda *x: short_conv(*x, **options, backend="triton")[0],
        lambda *x: reference_short_conv(*x, **options)[0],
    )


def _long(s: Sizes, device: str, documents: bool = False) -> Made:
    options = _options(s, device, documents)
    return (
        [_random(s.batch, s.length, s.width), _random(s.width, s.taps) / s.taps**0.5, _random(s.width)],
        lambda *x: long_conv(*x, **options, backend="triton")[0],
        lambda *x: reference_long_conv(*x, **options)[0],
    )


def _modal(s: Sizes, device: str, documents: bool = False) -> Made:
    options = _options(s, device, documents)
    log_decay, angle, re, im = torch.randn(4, s.width, s.modes)
    return (
        # Modes that forget within 2 to 2,000 tokens; so small that fp16 has the range of their angles' gradients.
        [_random(s.batch, s.length, s.width), -7.5 * log_decay.sigmoid(), 3 * angle, 0.05 * re, 0.05 * im],
        lambda *x: scan(ModalConv(backend="triton"), *x, **options)[0],
        lambda *x: reference_modal_conv(*x, **options)[0],
    )


def _dropout(s: Sizes, device: str) -> Made:
    seeds = torch.arange(s.batch, device=device) + 5
    return (
        [_random(s.batch, s.length, s.width)],
        partial(_dropped, dropout, seeds),
        partial(_dropped, reference_dropout, seeds),
    )


def _dropped(fn: Run, seeds: Tensor, x: Tensor) -> Tensor:
    return fn(x, 0.3, seeds, 2**33 + 7, 11)


def _norm(s: Sizes, device: str) -> Made:
    inputs = [_random(s.batch, s.length, s.width), _random(s.width)]
    return inputs, lambda x, w: rms_norm(x, w, s.group), lambda x, w: reference_rms_norm(x, w, s.group)


Maker = Callable[[Sizes, str], Made]
DOCUMENTS: dict[str, Any] = {"documents": True}
CASES: dict[tuple[str, str], tuple[Maker, Limits]] = {
    ("elementwise_attention", "plain"): (_elementwise, ROUNDED),
    ("elementwise_attention", "documents"): (partial(_elementwise, **DOCUMENTS), ROUNDED),
    ("linear_attention", "plain"): (_linear, PRODUCTS),
    ("linear_attention", "decay"): (partial(_linear, decay=DECAYS), PRODUCTS),
    ("linear_attention", "log_decay"): (_gated_linear, GATES),
    ("linear_attention", "documents"): (partial(_linear, **DOCUMENTS), PRODUCTS),
    ("linear_attention", "mean"): (partial(_linear, normalize=True), MEAN),
    ("short_conv", "plain"): (partial(_short, activation=None), ROUNDED),
    ("short_conv", "SiLU"): (_short, ROUNDED),
    ("short_conv", "documents"): (partial(_short, **DOCUMENTS), ROUNDED),
    ("long_conv", "plain"): (_long, ROUNDED),
    ("long_conv", "documents"): (partial(_long, **DOCUMENTS), ROUNDED),
    ("modal_conv", "plain"): (_modal, SUMS),
    ("modal_conv", "documents"): (partial(_modal, **DOCUMENTS), SUMS),
    ("dropout", "plain"): (_dropout, ROUNDED),
    ("rms_norm", "plain"): (_norm, ROUNDED),
}


def run(findings: Findings) -> None:
    """Check every case; on a GPU in many processes, as compiling its kernels takes most of the time."""
    device, sizes = findings.device, SMALL if findings.small else LARGE
    findings.data = {"sizes": vars(sizes)}
    jobs = [(*case, dtype, device) for case in CASES for dtype in DTYPES]
    if "triton" not in modal_conv.BACKENDS.options:
        findings.data["without_kernels"] = ["modal_conv"]
        jobs = [job for job in jobs if job[0] != "modal_conv"]
    if device == "cpu":
        for job in jobs:
            _note(findings, checked(*job))
        return
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(checked, *job) for job in jobs]):
            _note(findings, done.result())


def _note(findings: Findings, row: dict[str, Any]) -> None:
    name = f"{row['operator']} {row['variant']} {row['dtype']}"
    findings.check(not row["error"], f"{name}: {row['error']}")
    for result, error in row["errors"].items():
        findings.check(error <= row["limit"], f"{name}, {result}: relative RMS error {error:.1e} > {row['limit']:g}")
    findings.check(row["equal_bits"] or bool(row["error"]), f"{name}: two runs differ")
    findings.add(row)


def checked(operator: str, variant: str, dtype: str, device: str) -> dict[str, Any]:
    """The errors of a case, of its output and every gradient; an exception is part of the row."""
    maker, limits = CASES[operator, variant]
    row: dict[str, Any] = {"operator": operator, "variant": variant, "dtype": dtype}
    row |= {"limit": getattr(limits, dtype), "reason": limits.reason}
    row |= {"errors": {}, "equal_bits": False, "error": ""}
    started = time.monotonic()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made, run, truth = maker(SMALL if device == "cpu" else LARGE, device)
            inputs = [x.to(device, DTYPES[dtype]) for x in made]
            grad = torch.randn(inputs[0].shape).to(device, DTYPES[dtype])
        _prepare(operator, device)
        first, second = (_differentiate(run, inputs, grad) for _ in range(2))
        want = _differentiate(truth, [x.double() for x in inputs], grad.double())
        names = ["y", *(f"gradient of input {number}" for number in range(len(inputs)))]
        row["errors"] = {name: _error(x, w) for name, x, w in zip(names, first, want, strict=True)}
        row["equal_bits"] = all(a.equal(b) for a, b in zip(first, second, strict=True))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    return row | {"seconds": time.monotonic() - started}


def _prepare(operator: str, device: str) -> None:
    """The first tiling of every kernel: others would be measured while other processes use the GPU, and be kept."""
    gpu._is_compiled = lambda kernel: False
    if device == "cpu":
        name = "elementwise" if operator == "elementwise_attention" else operator
        module = import_module(f"longreach.kernels.{name}.triton")
        for constant, value in SMALL_TILES.get(name, {}).items():
            setattr(module, constant, value)


def _differentiate(run: Run, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _error(x: Tensor, truth: Tensor) -> float:
    """The RMS error as a share of the RMS of what is expected."""
    return float((x.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())
