"""Modal long convolution in C++ for CPUs (`cpu.cpp`): the recurrence itself, in fp64."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..backends import is_traced
from ..scan import FusedForward, StatefulOp
from .chunked import ModalConv, Modes, check

SOURCE = Path(__file__).with_name("cpu.cpp")
LANES, GROUP = 8, 4  # channels and modes are filled up to multiples of these
SAVED = 256  # tokens between the states that are saved for backward, as in cpu.cpp


def unsupported_reason(device: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> str:
    """Why the C++ kernels do not serve such inputs; "" if they do."""
    return native.unsupported_reason(SOURCE, device, dtype, parameter_dtype)


class Native(ModalConv):
    """The passes of `ModalConv` for ``x [B, L, D]`` and parameters in fp32 or bf16; states travel as complex64.

    Saved for backward is the state at every 256th token.
    """

    def resolve_backend(self, inputs: tuple[Tensor, ...]) -> StatefulOp:
        return self

    def local_transition(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
        if inputs[0].shape[1] <= 1:
            return super().local_transition(inputs, segments)
        modes, end = _modes(inputs), _states(inputs)
        _call(inputs, segments, modes, end=end)
        return modes.power(inputs[0].shape[1]).to(torch.complex64).unsqueeze(0), _narrow(end, inputs)

    def apply_state(
        self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if inputs[0].shape[1] <= 1:
            return super().apply_state(inputs, segments, past)
        y, saved = _tokens(inputs[0]), _saved(inputs)
        _call(inputs, segments, _modes(inputs), past=_wide(past), y=y, saved=saved)
        return y[..., : inputs[0].shape[2]], (saved,)

    def fused_forward(self, inputs: tuple[Tensor, ...], segments: Tensor | None, start: Tensor | None) -> FusedForward:
        if inputs[0].shape[1] <= 1:
            return super().fused_forward(inputs, segments, start)
        modes, end, y, saved = _modes(inputs), _states(inputs), _tokens(inputs[0]), _saved(inputs)
        past = modes.state(inputs[0].shape[0]) if start is None else start.to(torch.complex64)
        _call(inputs, segments, modes, past=_wide(past), y=y, end=end, saved=saved)
        decay = modes.power(inputs[0].shape[1]).to(torch.complex64).unsqueeze(0)
        return FusedForward(past, y[..., : inputs[0].shape[2]], (saved,), decay, _narrow(end, inputs))

    def incoming_state_grad(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> Tensor:
        if inputs[0].shape[1] <= 1:
            return super().incoming_state_grad(inputs, segments, past, saved, grad)
        end = _states(inputs)
        _call(inputs, segments, _modes(inputs), grad=grad, end=end)
        return _narrow(end, inputs)

    def input_grads(
        self,
        inputs: tuple[Tensor, ...],
        segments: Tensor | None,
        past: Tensor,
        future: Tensor,
        saved: tuple[Tensor, ...],
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        if inputs[0].shape[1] <= 1:
            return super().input_grads(inputs, segments, past, future, saved, grad)
        x, *parameters = inputs
        dx, to_power, to_amplitude = _tokens(x), _states(inputs), _states(inputs)
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in parameters]
            modes = Modes.of(x, leaves)
            power = torch.exp(modes.rate)
        _call(
            inputs,
            segments,
            _modes(inputs),
            grad=grad,
            future=_wide(future),
            dx=dx,
            saved=saved[0],
            dlambda=to_power,
            dc=to_amplitude,
        )
        sums = [_complex(total, inputs).sum(0) for total in (to_power, to_amplitude)]
        return dx[..., : x.shape[2]], *torch.autograd.grad([power, modes.amplitude], leaves, sums)


def _modes(inputs: tuple[Tensor, ...]) -> Modes:
    x, *parameters = inputs
    check(x, parameters)
    return Modes.of(x, [p.detach() for p in parameters])


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _tokens(x: Tensor) -> Tensor:
    """An output like ``x [B, L, D]``, filled up to whole vectors of channels."""
    return x.new_empty(*x.shape[:2], _up(x.shape[2], LANES))


def _states(inputs: tuple[Tensor, ...]) -> Tensor:
    """Room for a state as cpu.cpp has it: fp64 ``[B, 2, N, D]``, filled up, real parts first."""
    x, modes = inputs[0], inputs[1].shape[1]
    return x.new_empty(x.shape[0], 2, _up(modes, GROUP), _up(x.shape[2], LANES), dtype=torch.float64)


def _saved(inputs: tuple[Tensor, ...]) -> Tensor:
    state = _states(inputs)
    return state.new_empty(state.shape[0], -(-inputs[0].shape[1] // SAVED), *state.shape[1:])


def _wide(state: Tensor) -> Tensor:
    """``[.., D, N]`` complex -> fp64 ``[.., 2, N, D]``, filled up with zeros."""
    x = torch.view_as_real(state.resolve_conj()).double().movedim(-1, -3).transpose(-1, -2)
    return F.pad(x, (0, -x.shape[-1] % LANES, 0, -x.shape[-2] % GROUP)).contiguous()


def _complex(state: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The reverse, in complex128."""
    width, modes = inputs[1].shape
    real, imaginary = state[..., :modes, :width].transpose(-1, -2).unbind(-3)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def _narrow(state: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    return _complex(state, inputs).to(torch.complex64)


def _call(
    inputs: tuple[Tensor, ...], segments: Tensor | None, modes: Modes, *, grad: Tensor | None = None, **places: Tensor
) -> None:
    """Run `cpu.cpp` forward, or backward given ``grad [B, L, D]``; ``places`` are its other arguments by name."""
    if is_traced(inputs[0]):
        return
    x = inputs[0]
    width = x.shape[2]
    tokens = [None if t is None else F.pad(t, (0, -width % LANES)) if width % LANES else t for t in (x, grad)]
    tokens = native.rows(*tokens)
    powers = _wide(modes.power(1)), _wide(modes.amplitude)
    names = "past", "future", "end", "saved", "dlambda", "dc"
    begins, rest = native.begins(segments), [places.get(name) for name in names]
    native.load(SOURCE).modal_conv(
        x.dtype == torch.bfloat16,
        native.integers(*x.shape[:2], *powers[0].shape[:-3:-1], *native.strides(*tokens)),
        native.pointers(*tokens, places.get("y"), places.get("dx"), *powers, begins, *rest),
    )
