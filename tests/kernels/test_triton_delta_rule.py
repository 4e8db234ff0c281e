"""The delta rule in Triton against PyTorch's passes: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import interpreted
from helpers import assert_close

from longreach.kernels.delta_rule import DeltaRule
from longreach.kernels.delta_rule.chunked import Chunked, Chunks
from longreach.kernels.scan import Carry, scan

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TOLERANCE = 2e-6  # relative RMS error of fp32
# Lengths around chunks of 16 to 64 tokens; widths around tiles of 16 and blocks of 64; more than one tile of columns.
SIZES = [(70, 5, 6), (33, 16, 16), (70, 20, 33), (130, 8, 40), (65, 70, 20), (9, 5, 6), (1, 4, 4)]


def inputs(length: int, width: int, values: int, decay: str, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v, beta and, of "head" or "channel", log_decay: two rows, four heads in two groups."""
    torch.manual_seed(length + width)
    q, k = torch.randn(2, 2, length, 2, width).unbind()
    v, beta = torch.randn(2, length, 4, values), 2 * torch.rand(2, length, 4)
    shapes = {"none": [], "head": [(2, length, 4)], "channel": [(2, length, 4, width)]}[decay]
    return tuple(x.to(device) for x in (q, k, v, beta, *(-torch.rand(shape) for shape in shapes)))


def passes(op: Chunked, given: tuple[Tensor, ...], packed: bool) -> dict[str, Tensor]:
    """Everything that an operator computes, from one initial state and with gradients of output and final state."""
    torch.manual_seed(0)
    q, v = given[0], given[2]
    segments = (torch.arange(q.shape[1]) // 13).expand(2, -1).to(q.device) if packed else None
    initial, final_grad = (torch.randn(2, 4, q.shape[-1], v.shape[-1]).to(q.device) for _ in range(2))
    grad = torch.randn(v.shape).to(q.device)
    transition, state = op.local_transition(given, segments)
    forward = op.fused_forward(given, segments, initial)
    grads, initial_grad = op.fused_backward(given, segments, initial, None, forward.saved, grad, final_grad, True)
    own = op.incoming_state_grad(given, segments, initial, forward.saved, grad)
    found = {"A": transition, "B": state, "y": forward.y, "final": forward.final, "own": own, "initial": initial_grad}
    names = ("q", "k", "v", "beta", "log_decay")
    return found | dict(zip(names, grads, strict=False))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("size", SIZES)
def test_interpreted_passes_equal_those_of_pytorch(size: tuple[int, int, int], decay: str, packed: bool) -> None:
    given = inputs(*size, decay)
    wanted = passes(Chunked(None, True), given, packed)
    found = passes(interpreted.load("delta_rule").Triton(None, True), given, packed)
    for name, x in wanted.items():
        assert_close(name, found[name], x, rel_rms=TOLERANCE, rms_floor=0.1)


def test_inverse_where_keys_repeat() -> None:
    """Powers of such a matrix reach 1e18; its inverse has entries of at most 2."""
    x = 2 * torch.ones(3, 64, 64).tril(-1)
    found = interpreted.load("delta_rule").GpuChunks.inverse(x)
    eye = torch.eye(64, dtype=torch.float64).expand(3, -1, -1)
    assert_close("inverse", found, torch.linalg.inv(eye + x.double()), rel_rms=1e-6)
    assert found.abs().max() <= 2.0
    assert_close("of PyTorch", Chunks.inverse(x), found, rel_rms=1e-6)


def test_states_wider_than_the_kernels_are_left_to_pytorch() -> None:
    triton = interpreted.load("delta_rule")
    given = inputs(20, triton.MAX_WIDTH + 1, 3, "head")
    wanted, found = (passes(kind(None, True), given, False) for kind in (Chunked, triton.Triton))
    for name, x in wanted.items():
        assert_close(name, found[name], x, rel_rms=TOLERANCE, rms_floor=0.1)


@needs_gpu
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("size", [(1000, 64, 64), (333, 128, 128), (70, 5, 6), (200, 256, 256)])
def test_on_a_gpu(size: tuple[int, int, int], decay: str) -> None:
    """Against fp64 on the CPU; twice, with equal bits."""
    triton = importlib.import_module("longreach.kernels.delta_rule.triton")
    given = inputs(*size, decay, device="cuda")
    found, again = (passes(triton.Triton(None, True), given, True) for _ in range(2))
    wanted = passes(Chunked(None, True), tuple(x.cpu().double() for x in given), True)
    for name, x in wanted.items():
        assert torch.equal(found[name], again[name])
        assert_close(name, found[name].cpu(), x, rel_rms=2e-5, rms_floor=0.1)


@needs_gpu
def test_auto_takes_it_on_a_gpu() -> None:
    given = inputs(64, 16, 16, "head", device="cuda")
    y, carry = scan(DeltaRule(normalize_qk=True), *given)
    wanted, state = scan(DeltaRule(normalize_qk=True, backend="triton"), *given)
    assert torch.equal(y, wanted)
    assert isinstance(carry, Carry) and torch.equal(carry.state, state.state)
