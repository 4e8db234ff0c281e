"""Modal long convolution in C++ for CPUs (`cpu.cpp`): the recurrence token by token, in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..backends import is_traced
from ..state import FusedForward
from .chunked import Chunked, Modes

SOURCE = Path(__file__).with_name("cpu.cpp")
LANES, GROUP = 8, 4  # channels and modes are padded to multiples of these
SAVED = 256  # tokens between the states saved for backward, as in cpu.cpp


def unsupported_reason(device: str, dtype: torch.dtype, parameter_dtype: torch.dtype, modes: int) -> str:
    """Why the C++ kernels do not serve such inputs; "" if they do."""
    return native.unsupported_reason(SOURCE, device, dtype, parameter_dtype)


class Native(Chunked):
    """The passes of `ModalConv` for ``x [B, L, D]`` and parameters in fp32 or bf16; states are complex64 outside.

    Saved for the backward pass: the state before every 256th token. A single token runs in PyTorch.
    """

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        x = inputs[0]
        if x.shape[1] <= 1:
            return super().local_transition(inputs, segments)
        modes, final = _modes(inputs), _state(inputs)
        if not is_traced(x):
            native.load(SOURCE).modal_conv(*_arguments(inputs, segments, modes, final=final))
        return modes.power(x.shape[1]).to(torch.complex64).unsqueeze(0), _to_complex64(final, inputs)

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = inputs[0]
        if x.shape[1] <= 1:
            return super().apply_state(inputs, segments, initial)
        modes, y, saved = _modes(inputs), _padded_output(x), _saved_states(inputs)
        if not is_traced(x):
            arguments = _arguments(inputs, segments, modes, initial=_to_fp64(initial), y=y, saved=saved)
            native.load(SOURCE).modal_conv(*arguments)
        return y[..., : x.shape[2]], (saved,)

    def fused_forward(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, initial: Tensor | None
    ) -> FusedForward:
        x = inputs[0]
        if x.shape[1] <= 1:
            return super().fused_forward(inputs, segments, initial)
        modes, final, y, saved = _modes(inputs), _state(inputs), _padded_output(x), _saved_states(inputs)
        initial = modes.state(x.shape[0]) if initial is None else initial.to(torch.complex64)
        if not is_traced(x):
            arguments = _arguments(inputs, segments, modes, initial=_to_fp64(initial), y=y, final=final, saved=saved)
            native.load(SOURCE).modal_conv(*arguments)
        decay = modes.power(x.shape[1]).to(torch.complex64).unsqueeze(0)
        return FusedForward(initial, y[..., : x.shape[2]], (saved,), decay, _to_complex64(final, inputs))

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        if inputs[0].shape[1] <= 1:
            return super().incoming_state_grad(inputs, segments, initial, saved, grad)
        modes, initial_grad = _modes(inputs), _state(inputs)
        if not is_traced(grad):
            arguments = _arguments(inputs, segments, modes, grad=grad, final=initial_grad)
            native.load(SOURCE).modal_conv(*arguments)
        return _to_complex64(initial_grad, inputs)

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        initial: Tensor,
        final_grad: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        if inputs[0].shape[1] <= 1:
            return super().input_grads(inputs, segments, initial, final_grad, saved, grad)
        x, *parameters = inputs
        dx, dpower, damplitude = _padded_output(x), _state(inputs), _state(inputs)
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in parameters]
            modes = Modes.of(x, leaves)
            power = torch.exp(modes.rate)
        if not is_traced(x):
            arguments = _arguments(
                inputs,
                segments,
                _modes(inputs),
                grad=grad,
                final_grad=_to_fp64(final_grad),
                dx=dx,
                saved=saved[0],
                dlambda=dpower,
                dc=damplitude,
            )
            native.load(SOURCE).modal_conv(*arguments)
        sums = [_to_complex128(total, inputs).sum(0) for total in (dpower, damplitude)]
        return dx[..., : x.shape[2]], *torch.autograd.grad([power, modes.amplitude], leaves, sums)


def _arguments(
    inputs: tuple[Tensor, ...],
    segments: Tensor | None,
    modes: Modes,
    *,
    grad: Tensor | None = None,
    y: Tensor | None = None,
    dx: Tensor | None = None,
    initial: Tensor | None = None,
    final_grad: Tensor | None = None,
    final: Tensor | None = None,
    saved: Tensor | None = None,
    dlambda: Tensor | None = None,
    dc: Tensor | None = None,
) -> tuple[Any, ...]:
    """The arguments of `modal_conv` in `cpu.cpp`: forward, or backward given ``grad [B, L, D]``.

    Outputs and states have padded channels and modes; backward, ``final`` receives the gradient of the initial state.
    """
    x = inputs[0]
    width = x.shape[2]
    padded = [None if t is None else F.pad(t, (0, -width % LANES)) if width % LANES else t for t in (x, grad)]
    tokens = native.last_dim_contiguous(*padded)
    power, amplitude = _to_fp64(modes.power(1)), _to_fp64(modes.amplitude)
    starts = native.document_starts(segments)
    return (
        x.dtype == torch.bfloat16,
        native.integers(*x.shape[:2], *power.shape[:-3:-1], *native.strides(*tokens)),
        native.Pointers(*tokens, y, dx, power, amplitude, starts, initial, final_grad, final, saved, dlambda, dc),
    )


def _modes(inputs: tuple[Tensor, ...]) -> Modes:
    x, *parameters = inputs
    return Modes.of(x, [p.detach() for p in parameters])


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _padded_output(x: Tensor) -> Tensor:
    """An output like ``x [B, L, D]``, uninitialized, with channels padded to whole vectors."""
    return x.new_empty(*x.shape[:2], _round_up(x.shape[2], LANES))


def _state(inputs: tuple[Tensor, ...]) -> Tensor:
    """A state in the layout of cpu.cpp, uninitialized: fp64 ``[B, 2, N, D]`` padded, real parts first."""
    x, modes = inputs[0], inputs[1].shape[1]
    return x.new_empty(x.shape[0], 2, _round_up(modes, GROUP), _round_up(x.shape[2], LANES), dtype=torch.float64)


def _saved_states(inputs: tuple[Tensor, ...]) -> Tensor:
    """The states before every `SAVED`-th token, uninitialized: ``[B, S, 2, N, D]``."""
    state = _state(inputs)
    return state.new_empty(state.shape[0], -(-inputs[0].shape[1] // SAVED), *state.shape[1:])


def _to_fp64(state: Tensor) -> Tensor:
    """``[.., D, N]`` complex -> fp64 ``[.., 2, N, D]``, padded with zeros."""
    x = torch.view_as_real(state.resolve_conj()).double().movedim(-1, -3).transpose(-1, -2)
    return F.pad(x, (0, -x.shape[-1] % LANES, 0, -x.shape[-2] % GROUP)).contiguous()


def _to_complex128(state: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Inverse of `_to_fp64`."""
    width, modes = inputs[1].shape
    real, imaginary = state[..., :modes, :width].transpose(-1, -2).unbind(-3)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def _to_complex64(state: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    return _to_complex128(state, inputs).to(torch.complex64)
