"""Inspects a model while it validates: long convolution kernels, and the range of element-wise attention's products."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.modal_conv import modal_kernel
from ..mixers.chela import Chela, ModalKernel, TapKernel
from ..mixers.elementwise import Elementwise

TOLERANCE = 0.1  # relative error of the series up to which its range counts as safe
QUANTILES = (0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999)
SAMPLED = 64  # tokens of a shard whose pairs are sampled, evenly spaced
CHANNELS = 4  # of a layer that are shown
TAPS = 4096  # of a kernel that are shown


@dataclass
class Products:
    """``2 q k`` of one layer of element-wise attention, over channels and pairs of a token and one of its past.

    Attributes:
        order: of the layer's series.
        quantiles: its `QUANTILES`.
        outside: part of the pairs where the series is wrong by more than `TOLERANCE`.
    """

    order: int
    quantiles: list[float]
    outside: float


@dataclass
class Probe:
    """Inspects the first forward pass of ``with probe:``, once, on the rank where it is enabled. It exchanges nothing.

    It sees this rank's shard (its first block, where it is streamed) and the parameters as they are gathered there,
    in any stage of ZeRO. A compiled model runs that pass uncompiled: its graphs call no hooks.

    Args:
        model: a `Model`.
        enabled: whether this rank inspects.

    Attributes:
        products: by block of the model, of element-wise attention.
        kernels: by block, ``[channels, taps]`` of long convolutions, fp32, the tap of the token itself first.
    """

    model: nn.Module
    enabled: bool = True
    products: dict[str, Products] = field(default_factory=dict)
    kernels: dict[str, Tensor] = field(default_factory=dict)
    _hooks: ExitStack | None = None

    @property
    def outside_range(self) -> float | None:
        """Part of all pairs for which the series is inaccurate; None without element-wise attention."""
        parts = [products.outside for products in self.products.values()]
        return sum(parts) / len(parts) if parts else None

    def __enter__(self) -> None:
        if not self.enabled:
            return
        self._hooks = ExitStack()
        for name, module in self.model.named_modules():
            block = name.removesuffix(".mixer")
            if isinstance(module, Elementwise):
                seen: dict[str, Tensor] = {}
                watch = partial(self._watch, block, module.attention.order, seen)
                for key, norm in (("q", module.q_norm), ("k", module.k_norm)):
                    self._hooks.callback(norm.register_forward_hook(partial(watch, key)).remove)
            elif isinstance(module, Chela):
                hook = module.long.register_forward_pre_hook(partial(self._take_kernel, block))
                self._hooks.callback(hook.remove)
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            self._hooks.enter_context(torch.compiler.set_stance("force_eager"))

    def __exit__(self, *failure: object) -> None:
        if self._hooks is not None:
            self._hooks.close()
        self.enabled, self._hooks = False, None

    def _watch(
        self, block: str, order: int, seen: dict[str, Tensor], key: str, _: nn.Module, __: Any, x: Tensor
    ) -> None:
        seen[key] = x
        if block not in self.products and len(seen) == 2 and x.shape[1]:
            self.products[block] = products(seen["q"], seen["k"], order)
            seen.clear()

    def _take_kernel(self, block: str, module: nn.Module, _: Any) -> None:
        if block not in self.kernels:
            assert isinstance(module, (ModalKernel, TapKernel))
            self.kernels[block] = kernel_taps(module)


@torch.no_grad()
def products(q: Tensor, k: Tensor, order: int) -> Products:
    """``2 q k`` over pairs of `SAMPLED` tokens of each row, the later one's q with the earlier one's k.

    Args:
        q, k: ``[B, L, D]``, L >= 1.
        order: of the series.
    """
    sampled = torch.linspace(0, q.shape[1] - 1, min(SAMPLED, q.shape[1]), device=q.device).long()
    pairs = torch.tril_indices(len(sampled), len(sampled), device=q.device)
    found = (2.0 * q[0, sampled[pairs[0]]].float() * k[0, sampled[pairs[1]]].float()).flatten()
    low, high = safe_range(order)
    outside = float(((found < low) | (found > high)).double().mean())
    ranks = [round(part * (found.numel() - 1)) for part in QUANTILES]
    return Products(order, found.sort().values[ranks].tolist(), outside)


def safe_range(order: int, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """Where ``sum_{n <= order} x^n / n!`` is ``exp(x)`` to a relative ``tolerance``: the ends of the range around 0."""

    def error(x: float) -> float:
        return abs(sum(x**n / math.factorial(n) for n in range(order + 1)) * math.exp(-x) - 1)

    ends = []
    for sign in (-1, 1):
        near, far = 0.0, 1.0  # the error grows with the distance
        while error(sign * far) < tolerance:
            near, far = far, 2 * far
        for _ in range(50):
            middle = (near + far) / 2
            near, far = (middle, far) if error(sign * middle) < tolerance else (near, middle)
        ends.append(sign * near)
    return ends[0], ends[1]


@torch.no_grad()
def kernel_taps(module: ModalKernel | TapKernel) -> Tensor:
    """The first taps of a few channels, evenly spaced, ``[channels, taps]`` fp32 on the CPU: what looks at the past."""
    width = len(module.skip)
    channels = torch.linspace(0, width - 1, min(CHANNELS, width)).long()
    if isinstance(module, ModalKernel):
        parameters = (module.log_decay, module.angle, module.real[0], module.imag[0])
        log_decay, angle, real, imag = (p[channels.to(p.device)] for p in parameters)
        taps = modal_kernel(log_decay, angle, real, imag, TAPS)
    else:
        taps = module.kernel()[channels.to(module.skip.device)]
        taps = taps if module.causal else taps[:, module.taps // 2 :]
    return taps[:, :TAPS].float().cpu()
