"""Modal long convolution: per channel, a kernel that is a sum of damped complex exponentials."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ...errors import InputError
from .. import gpu
from ..backends import Backends, Option
from ..state import StatefulOp
from . import cpu
from .centred import Centred
from .chunked import Chunked, modal_kernel
from .reference import reference_modal_conv

__all__ = ["CentredModalConv", "ModalConv", "modal_kernel", "reference_modal_conv"]

MAX_TRITON_MODES = 16


def _triton() -> type[Chunked]:
    from .triton import Triton

    return Triton


def _triton_unsupported(device: str, dtype: torch.dtype, parameter_dtype: torch.dtype, modes: int) -> str:
    most = f"up to {MAX_TRITON_MODES} modes, not {modes}"
    return gpu.unsupported_reason(device, dtype, parameter_dtype) or ("" if modes <= MAX_TRITON_MODES else most)


BACKENDS: Backends[type[Chunked]] = Backends(
    "modal_conv",
    {
        "cpu": Option(lambda: cpu.Native, cpu.unsupported_reason),
        "triton": Option(_triton, _triton_unsupported),
        "chunked": Option(lambda: Chunked),
    },
)


@dataclass(frozen=True)
class ModalConv(StatefulOp):
    """Causal modal convolution as `scan` runs it: ``y = scan(ModalConv(), x, log_decay, angle, re, im)``.

    With ``c = re + i im``, ``lambda = exp(-exp(log_decay) + i angle)`` (NaN where log_decay or angle is not finite) and
    s zero at the start of every document::

        s_i = lambda s_(i-1) + x_i          y_i = sum_n Re(c_n s_i)

    Inputs: ``x [B, L, D]`` and ``log_decay, angle, re, im``, each ``[D, N]``, floating. Output ``[B, L, D]`` in the
    dtype of x. State ``[B, D, N]`` in complex64, or complex128 where an input is fp64; ``A = lambda^L``, ``[1, D, N]``.
    A decoding step (L = 1) costs O(D N), whatever came before.

    Attributes:
        causal: must be True; `CentredModalConv` is the bidirectional operator.
        backend: "auto", "cpu" (C++), "triton" (GPUs) or "chunked" (portable PyTorch).

    Raises:
        InputError: ``causal`` is False, or (when it is run) shapes or the backend do not fit.
    """

    causal: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not self.causal:
            fix = "for both directions run CentredModalConv"
            raise InputError("ModalConv: causal", self.causal, "True", fix)

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        x, *parameters = inputs
        shape = parameters[0].shape
        if x.dim() != 3 or len(shape) != 2 or shape[0] != x.shape[2] or any(p.shape != shape for p in parameters):
            given = [list(t.shape) for t in inputs]
            raise InputError("ModalConv: inputs", given, "x [B, L, D] and log_decay, angle, re, im, each [D, N]")
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters))
        return BACKENDS.choose(self.backend, x.device, x.dtype, dtype, shape[1])()


@dataclass(frozen=True)
class CentredModalConv(StatefulOp):
    """Bidirectional modal convolution: one causal convolution from the left, and one from the right.

    ``y_i = sum_(m>=0) h_0[m] x_(i-m) + h_1[m] x_(i+m)``, with the kernels of `ModalConv` for the amplitudes
    ``re[0], im[0]`` and ``re[1], im[1]``, within i's document.

    Inputs: ``x [B, L, D]``, ``log_decay, angle [D, N]`` and ``re, im [2, D, N]``. States ``[2, B, D, N]`` complex: from
    the left, from the right.

    Attributes:
        backend: as of `ModalConv`.

    Raises:
        InputError: (when it is run) shapes or the backend do not fit.
    """

    backend: str = "auto"
    causal = False

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        x, log_decay, angle, re, im = inputs
        one_way, inputs = ModalConv(backend=self.backend), (x, log_decay, angle, re[0], im[0])
        return Centred(one_way.resolve_backend(inputs), one_way.resolve_backend(inputs))
