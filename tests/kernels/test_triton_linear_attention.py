"""Linear attention in Triton against the definition: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import interpreted
import triton.language as tl
from helpers import assert_close
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from longreach.kernels.gpu import Tiling
from longreach.kernels.linear_attention import reference_linear_attention
from longreach.kernels.linear_attention.reference import Reference
from longreach.kernels.scan import Carry, StatefulOp, scan

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PASSES = ("A", "state", "y", "initial state's gradient", "dq", "dk", "dv", "dlog_decay")
# The largest error as a share of the largest value (or of 1), and the relative RMS error.
TOLERANCES = {torch.float32: (2e-6, 1e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (1e-2, 8e-3)}
# The gradient of a weighted mean holds v - y, a small difference early in a document, and y is kept as it is returned.
MEAN_TOLERANCES = {torch.float32: (4e-6, 4e-6), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}
# On a GPU, a product of fp32 is three of TF32, and sums of 8 products are cut off and not rounded: in a split of 256
# tokens 3 * 256 / 8 times, each by up to 2^-23. With fp16, states, scores, weighted values and y are each rounded to 10
# bits of mantissa (those of TF32 and of fp16), by up to 2^-11.
CUT_OFF, ROUNDED = 3 * 256 / 8 * 2**-23, 4 * 2**-11
GPU_TOLERANCES = TOLERANCES | {torch.float32: (CUT_OFF, CUT_OFF / 2), torch.float16: (ROUNDED, ROUNDED / 2)}
# The gradient of log_decay is a running sum over up to 256 tokens of a split, whose errors add up as a random walk.
GPU_RUNNING_SUM = 16
# Twice as much, in the difference.
GPU_MEAN_TOLERANCES = MEAN_TOLERANCES | {
    torch.float32: (2 * CUT_OFF, CUT_OFF),
    torch.float16: (2 * ROUNDED, 2 * ROUNDED),
}

PLAIN: dict[str, Any] = {"causal": True, "decay": None, "normalize": False}
DECAY, MEAN = PLAIN | {"decay": (1.0, 0.5, 0.97)}, PLAIN | {"normalize": True}
SETTINGS = {
    "plain": PLAIN,
    "decay": DECAY,
    "mean": MEAN,
    "decayed-mean": DECAY | MEAN | {"decay": DECAY["decay"]},
    "gated": PLAIN | {"gated": True},
    "gated-mean": MEAN | {"gated": True},
    "both": PLAIN | {"causal": False},
    "mean-of-both": MEAN | {"causal": False},
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The interpreted kernels, with splits of one or two chunks.

    The interpreter holds bf16 as bits: it would multiply those, and cuts off what a GPU rounds.
    """
    module = interpreted.load("linear_attention")
    monkeypatch.setattr(module, "MIN_SPLIT", 32)
    monkeypatch.setattr(module, "SCAN_COLUMNS", 1024)
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def rounded_cast(self: Any, x: TensorHandle, dtype: Any) -> TensorHandle:
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(bits, tl.bfloat16)
        return cast(self, x, dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded_cast)
    yield module


def make(
    shape: tuple[int, int, int, int, int], documents: str, causal: bool, normalize: bool
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor, Tensor, Tensor]:
    """Inputs, documents, initial state, gradients of final state and y; positive features with ``normalize``."""
    batch, length, heads, width, values = shape
    q, k = torch.randn(2, batch, length, heads, width)
    v, grad = torch.randn(2, batch, length, heads, values)
    state = (batch, heads, width, values + normalize)
    initial, final_grad = torch.randn(2, *(state if causal else (2, *state)))
    if normalize:
        q, k = F.softplus(q), F.softplus(k)
        initial[..., -1] = F.softplus(initial[..., -1])
    segments = None
    if documents != "none":
        segments = (torch.rand(batch, length) < {"many": 0.3, "few": 0.02}[documents]).cumsum(1) + (1 << 40)
    return (q, k, v), segments, initial, final_grad, grad


def passes(
    op: StatefulOp,
    inputs: tuple[Tensor, ...],
    segments: Tensor | None,
    initial: Tensor,
    final_grad: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    """What the two passes and their adjoints give."""
    transition, state = op.local_transition(inputs, segments)
    y, saved = op.apply_state(inputs, segments, initial)
    initial_grad = op.incoming_state_grad(inputs, segments, initial, saved, grad)
    grads = op.input_grads(inputs, segments, initial, final_grad, saved, grad)
    return [transition, state, y, initial_grad, *(x for x in grads if x is not None)]


def assert_all_close(
    got: list[Tensor], want: list[Tensor], tolerance: tuple[float, float], names: Any = PASSES
) -> None:
    for name, x, truth in zip(names[: len(want)], got, want, strict=True):
        largest = truth.abs().max().clamp(min=1) if truth.numel() else 0.0
        floor = 0.1 / max(1, truth.numel()) ** 0.5
        assert_close(name, x, truth, max_abs=tolerance[0] * largest, rel_rms=tolerance[1], rms_floor=floor)


def compare(
    module: ModuleType,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    documents: str,
    settings: dict[str, Any],
    scale: float = 0.7,
) -> None:
    settings = dict(settings)
    gated = settings.pop("gated", False)
    if settings["decay"] is not None:
        settings = settings | {"decay": settings["decay"][: shape[2]]}
    inputs, segments, initial, final_grad, grad = make(shape, documents, settings["causal"], settings["normalize"])
    inputs, grad = tuple(x.to(device, dtype) for x in inputs), grad.to(device, dtype)
    if gated:
        rates = torch.tensor([0.01, 1.0, 20.0])[: shape[2]]
        inputs = *inputs, (-torch.rand(*shape[:2], shape[2]) * rates).to(device)
    initial, final_grad, segments = (None if x is None else x.to(device) for x in (initial, final_grad, segments))
    got = passes(module.Triton(**settings, scale=scale), inputs, segments, initial, final_grad, grad)
    assert got[1].dtype == torch.float32 and all(x.dtype == dtype for x in (got[2], *got[4:7]))
    wide = tuple(x.double() for x in inputs), segments, initial.double(), final_grad.double(), grad.double()
    truth = passes(Reference(**settings, scale=scale), *wide)
    plain, mean = (GPU_TOLERANCES, GPU_MEAN_TOLERANCES) if device == "cuda" else (TOLERANCES, MEAN_TOLERANCES)
    limit = (mean if settings["normalize"] else plain)[dtype]
    assert_all_close(got[:7], truth[:7], limit)
    if gated:
        more = GPU_RUNNING_SUM if device == "cuda" else 1
        assert_all_close(got[7:], truth[7:], (more * limit[0], more * limit[1]), ("dlog_decay",))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("documents", ["none", "many", "few"])
def test_interpreted_is_the_definition(tiny: ModuleType, documents: str, name: str) -> None:
    """Every pass of a shard in the middle of a sequence, with states from outside, over two splits."""
    compare(tiny, "cpu", torch.float32, (1, 37, 2, 24, 18), documents, SETTINGS[name])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "length, width, values, documents, name",
    [(1, 3, 16, "none", "decayed-mean"), (2, 16, 3, "many", "mean-of-both"), (5, 40, 24, "many", "decay")],
)
def test_interpreted_dtypes(
    tiny: ModuleType, length: int, width: int, values: int, documents: str, name: str, dtype: torch.dtype
) -> None:
    compare(tiny, "cpu", dtype, (2, length, 3, width, values), documents, SETTINGS[name])


def test_interpreted_bf16_over_chunks_and_splits(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "MIN_SPLIT", 64)
    compare(tiny, "cpu", torch.bfloat16, (1, 130, 1, 16, 70), "none", PLAIN)


def through_scan(
    op: StatefulOp | None, data: list[Tensor], ids: Tensor | None, segments: Tensor | None
) -> list[Tensor]:
    """Outputs and gradients of a whole sequence; ``op`` None for the definition."""
    leaves = [x.clone().requires_grad_() for x in data[:4]]
    carry = Carry(leaves[3], ids)
    if op is None:
        y, after = reference_linear_attention(*leaves[:3], carry=carry, segments=segments, **DECAYED_MEAN)
    else:
        y, after = scan(op, *leaves[:3], carry=carry, segments=segments)
    return [y, after.state, *torch.autograd.grad([y, after.state], leaves, data[4:])]


DECAYED_MEAN: dict[str, Any] = {"decay": (0.9,), "normalize": True, "scale": 0.7}


@pytest.mark.parametrize("length", [0, 19])
def test_a_whole_sequence_with_a_carry(tiny: ModuleType, length: int) -> None:
    """`fused_forward` alone, from a projection's views, with a carry that row 1 does not continue."""
    rows = torch.randn(2, length, 1, 3 * 8)
    q, k, v = rows.abs().chunk(3, dim=-1)
    state, upstream = torch.rand(2, 2, 1, 8, 9)
    data = [q, k, v, state, torch.randn(2, length, 1, 8), upstream]
    segments = (torch.arange(length) // 7).expand(2, length)
    ids = torch.tensor([0, 5])
    got = through_scan(tiny.Triton(causal=True, **DECAYED_MEAN), data, ids, segments)
    want = through_scan(None, [x.double() for x in data], ids, segments)
    assert_all_close(got, want, MEAN_TOLERANCES[torch.float32], ("y", "carry", "dq", "dk", "dv", "dcarry"))


def test_a_scale_of_zero(tiny: ModuleType) -> None:
    """The gradient of the state, which the scale divides, comes from outside alone."""
    compare(tiny, "cpu", torch.float32, (1, 5, 1, 4, 4), "none", PLAIN, scale=0.0)


def one_tiling(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **constants: int) -> None:
    monkeypatch.setattr(module, "_tilings", lambda *case, **options: (Tiling(constants, num_warps=4),))


@pytest.mark.parametrize("documents", ["none", "few"])
def test_tilings_give_the_same(tiny: ModuleType, documents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow tiles, and values that are no multiple of either."""
    for columns in (64, 32):
        one_tiling(monkeypatch, tiny, CHUNK=16, BLOCK_K=128, BLOCK_V=columns)
        compare(tiny, "cpu", torch.bfloat16, (1, 35, 2, 16, 72), documents, SETTINGS["decayed-mean"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", ["none", "many"])
@pytest.mark.parametrize("name", SETTINGS)
def test_transposed_scores_are_the_definition(
    tiny: ModuleType, name: str, documents: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 64, as where there are products of a warp group: two and a half of them, in two splits."""
    monkeypatch.setattr(tiny, "MIN_SPLIT", 128)
    one_tiling(monkeypatch, tiny, CHUNK=64, BLOCK_K=32, BLOCK_V=32)
    compare(tiny, "cpu", dtype, (1, 165, 2, 24, 18), documents, SETTINGS[name])


def test_a_clamped_divisor_passes_no_gradient(tiny: ModuleType) -> None:
    q, k, v = torch.rand(3, 1, 6, 1, 4)
    data = [q * (torch.arange(6) % 2).view(1, 6, 1, 1), k, v, torch.rand(1, 1, 4, 5), v, torch.rand(1, 1, 4, 5)]
    got = through_scan(tiny.Triton(causal=True, **DECAYED_MEAN), data, None, None)
    want = through_scan(None, [x.double() for x in data], None, None)
    assert (got[0][:, ::2] == 0).all()
    # A token with no divisor takes its upstream gradient a million times.
    assert_all_close(got, want, (1e-5, 1e-5), ("y", "carry", "dq", "dk", "dv", "dcarry"))


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("documents", ["none", "many", "few"])
@pytest.mark.parametrize("name", SETTINGS)
def test_compiled_is_the_definition(name: str, documents: str, dtype: torch.dtype) -> None:
    module = importlib.import_module("longreach.kernels.linear_attention.triton")
    for shape in (
        (2, 0, 3, 16, 16),
        (2, 1, 3, 3, 20),
        (2, 700, 3, 64, 40),
        (1, 1025, 2, 128, 128),
        (1, 300, 3, 250, 256),
    ):
        if dtype == torch.bfloat16 or max(shape[3:]) <= 64:
            compare(module, "cuda", dtype, shape, documents, SETTINGS[name])


@needs_gpu
def test_compiled_sums_of_a_long_sequence() -> None:
    """Sums between splits in fp64: 2^18 terms without decay are right to what is cut off in one split."""
    module = importlib.import_module("longreach.kernels.linear_attention.triton")
    k, v = torch.rand(2, 1, 1 << 18, 2, 64, device="cuda")
    _, state = module.Triton(**PLAIN).local_transition((k, k, v), None)
    truth = torch.einsum("blhk,blhv->bhkv", k.double(), v.double())
    assert ((state - truth).abs() / truth).max() < CUT_OFF
