"""The launches of every operator, seen without a GPU: budgets that may fall but not rise, and sums of 32 bits that fit.

``python tests/kernels/test_static.py`` prints the budgets as they are now.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from longreach.kernels import gpu
from longreach.launch.bench.static.capture import GPUS, Launch, footprint, recorded
from longreach.launch.bench.static.cases import STANDARD, Case, Shape, cases, long_conv_documents, passes
from longreach.launch.bench.static.disassembly import kind
from longreach.launch.bench.static.ir import Interval, evaluate, overflows
from longreach.launch.bench.static.report import PassRow, pass_rows

GPU = GPUS["sm_90"]

# Of a pass at `STANDARD`: Triton launches, operations of PyTorch that launch kernels, and bytes between memory and chip
# per element of [B, L, D], rounded up to tenths. Lower a figure when it falls.
BUDGETS = {
    ("elementwise plain", "forward"): (3, 2, 13.8),
    ("elementwise plain", "backward"): (3, 1, 38.2),
    ("elementwise documents", "forward"): (3, 14, 13.8),
    ("elementwise documents", "backward"): (3, 7, 38.3),
    ("elementwise non-causal", "forward"): (4, 9, 9.4),
    ("elementwise non-causal", "backward"): (3, 4, 22.9),
    ("elementwise non-causal documents", "forward"): (9, 33, 46.9),
    ("elementwise non-causal documents", "backward"): (8, 12, 128.4),
    ("linear_attention plain", "forward"): (3, 2, 14.1),
    ("linear_attention plain", "backward"): (7, 1, 36.6),
    ("linear_attention decay", "forward"): (3, 6, 14.1),
    ("linear_attention decay", "backward"): (7, 1, 36.6),
    ("linear_attention log_decay", "forward"): (3, 4, 14.2),
    ("linear_attention log_decay", "backward"): (8, 1, 42.0),
    ("linear_attention log_decay documents", "forward"): (3, 13, 14.2),
    ("linear_attention log_decay documents", "backward"): (8, 4, 42.0),
    ("linear_attention normalize", "forward"): (3, 3, 14.1),
    ("linear_attention normalize", "backward"): (8, 7, 41.0),
    ("linear_attention documents", "forward"): (3, 11, 14.1),
    ("linear_attention documents", "backward"): (7, 4, 36.6),
    ("linear_attention non-causal", "forward"): (5, 10, 15.2),
    ("linear_attention non-causal", "backward"): (7, 9, 23.2),
    ("linear_attention non-causal normalize documents", "forward"): (10, 28, 45.4),
    ("linear_attention non-causal normalize documents", "backward"): (15, 20, 95.9),
    ("delta_rule log_decay", "forward"): (90, 2252, 282.5),
    ("delta_rule log_decay", "backward"): (135, 5042, 744.9),
    ("delta_rule log_decay documents", "forward"): (90, 3197, 291.8),
    ("delta_rule log_decay documents", "backward"): (135, 5985, 754.2),
    ("short_conv SiLU", "forward"): (1, 2, 4.1),
    ("short_conv SiLU", "backward"): (1, 3, 6.2),
    ("short_conv plain", "forward"): (1, 2, 4.1),
    ("short_conv plain", "backward"): (1, 3, 6.2),
    ("short_conv SiLU documents", "forward"): (1, 4, 4.1),
    ("short_conv SiLU documents", "backward"): (1, 3, 6.2),
    ("dropout plain", "forward"): (1, 0, 4.1),
    ("dropout plain", "backward"): (1, 0, 4.1),
    ("rms_norm plain", "forward"): (1, 0, 4.1),
    ("rms_norm plain", "backward"): (1, 2, 6.2),
    ("rms_norm groups of 64", "forward"): (1, 0, 4.1),
    ("rms_norm groups of 64", "backward"): (1, 2, 6.1),
    ("chela block dropout", "forward"): (12, 54, 182.8),
    ("chela block dropout", "backward"): (17, 89, 371.0),
    ("long_conv plain", "forward"): (78, 184, 112.9),
    ("long_conv plain", "backward"): (130, 312, 190.9),
    ("long_conv non-causal", "forward"): (57, 135, 90.6),
    ("long_conv non-causal", "backward"): (95, 228, 154.6),
    ("modal_conv plain", "forward"): (3, 26, 7.1),
    ("modal_conv plain", "backward"): (4, 35, 11.9),
    ("modal_conv fp32", "forward"): (3, 28, 16.1),
    ("modal_conv fp32", "backward"): (4, 37, 27.2),
    ("modal_conv documents", "forward"): (3, 46, 7.2),
    ("modal_conv documents", "backward"): (4, 49, 11.9),
}

# Estimated times of a pass at `STANDARD`, as multiples of a copy's: instructions count too. Lower one when it falls.
RATIOS = {("elementwise plain", "forward"): 1.77, ("elementwise plain", "backward"): 2.78}

# Sizes below 2^31 are passed in 32 bits: what is computed from them is largest just below that.
BELOW = Shape(8, 2**17 - 1, 2048)
BEYOND = Shape(2, 10_000_000, 2048)
LONGEST = Shape(1, 2**31 - 129, 1)
# A slice of the channels at a time, of which these have few.
FEW_CHANNELS = [Shape(1, 2**25 - 1, 64), Shape(4, 2**25, 64), LONGEST]


def case_of(name: str) -> Case:
    return {case.name: case for case in [*cases(), long_conv_documents()]}[name]


@cache
def rows(name: str) -> list[PassRow]:
    return pass_rows(case_of(name), STANDARD, GPU, compile_kernels=False)


TTIR: dict[tuple[str, ...], str] = {}


def ttir(launch: Launch) -> str:
    """Made once for launches that differ in the values of their arguments only."""
    parts = launch.signature, launch.constants, launch.attributes, launch.options
    key = (launch.name, *map(str, parts))
    if key not in TTIR:
        TTIR[key] = launch.ttir(GPU.target)
    return TTIR[key]


OVERFLOWS: dict[tuple[str, ...], list[str]] = {}


def found_overflows(case: Case, shape: Shape) -> set[str]:
    found: set[str] = set()
    launches = [launch for one in passes(case, shape, GPU) for launch in one.recording.launches]
    assert launches
    for launch in launches:
        numbers = [x for x in launch.arguments.values() if isinstance(x, int)]
        parts = launch.grid, launch.signature, launch.constants, numbers
        key = (launch.name, *map(str, parts))
        if key not in OVERFLOWS:  # variants have launches in common
            OVERFLOWS[key] = [str(overflow) for overflow in overflows(launch, ttir(launch))]
        found.update(OVERFLOWS[key])
    return found


@pytest.mark.parametrize("name", [case.name for case in cases()])
def test_budgets(name: str) -> None:
    """Catches a launch, an operation of PyTorch or a pass over memory more than there was."""
    for row in rows(name):
        found = row.launches, row.num_operations, row.bytes / row.elements
        within = all(figure <= most for figure, most in zip(found, BUDGETS[name, row.name], strict=True))
        assert within, f"{row.name}: {found}; torch: {row.operations}"


def test_decays_are_copied_to_the_device_once() -> None:
    """Catches copies from the host at every call, which a CUDA graph cannot capture."""
    case = case_of("linear_attention decay")
    passes(case, STANDARD, GPU)
    found = [one.recording.operation_counts for one in passes(case, STANDARD, GPU)]
    plain = [one.recording.operation_counts for one in passes(case_of("linear_attention plain"), STANDARD, GPU)]
    # The decay over the whole sequence is computed on the device, in fp64.
    more = [counts - other for counts, other in zip(found, plain)]
    assert more == [{"pow.Tensor_Scalar": 1, "_to_copy.default": 1}, {}]


def overflow_cases() -> list[tuple[str, Shape]]:
    found = []
    for case in [*cases(), long_conv_documents()]:
        if case.operator == "chela block":  # operators that are here already
            continue
        if case.operator == "long_conv":
            shapes = FEW_CHANNELS[:1] if case.variant == "documents" else FEW_CHANNELS
        elif case.operator == "delta_rule":
            shapes = [STANDARD]  # launches are of slabs, whose size is bounded
        else:
            shapes = [BELOW, BEYOND, LONGEST]
            if case.operator == "linear_attention" and "documents" in case.variant:
                shapes.remove(LONGEST)  # cumsum refuses as long a tensor without data
        found += [(case.name, shape) for shape in shapes]
    return found


@pytest.mark.parametrize(("name", "shape"), overflow_cases(), ids=str)
def test_sizes_fit_32_bits(name: str, shape: Shape) -> None:
    """Catches products of sizes that wrap around from 2^31 on: Triton computes with 32 bits what is passed in 32."""
    assert not found_overflows(case_of(name), shape)


@triton.jit
def _product_kernel(x, size, rows_each, first, WIDE: tl.constexpr, COUNT: tl.constexpr):
    if WIDE:
        size = tl.full([], size, tl.int64)
    for row in range(rows_each):
        tl.store(x + 3 * size + first + row * COUNT + tl.arange(0, COUNT), 1.0)


def product_launch(size: int, wide: bool, programs: int = 7) -> Launch:
    with recorded(GPU.target) as recording:
        gpu.launch(_product_kernel, programs, torch.empty(16, device="meta"), size, 5, size // 2, wide, 16)
    (launch,) = recording.launches
    return launch


@pytest.mark.parametrize(
    ("size", "wide", "wanted"),
    [(715_827_882, False, 0), (715_827_883, False, 1), (715_827_883, True, 0), (2**31, False, 0)],
)
def test_overflows_from_the_first_size_on(size: int, wide: bool, wanted: int) -> None:
    """3 size fits 32 bits up to 715,827,882; from 2^31 on, sizes have 64 bits."""
    launch = product_launch(size, wide)
    found = [overflow for overflow in overflows(launch, launch.ttir(GPU.target)) if overflow.is_product]
    assert len(found) == wanted
    assert all(overflow.found == Interval(3 * size, 3 * size) and "size" in overflow.terms for overflow in found)


def test_stores_of_loops_are_counted() -> None:
    launch = product_launch(1000, wide=False)
    found = evaluate(launch, launch.ttir(GPU.target))
    assert (found.trips, found.loop_accesses, found.requested) == (5, (0, 64), 7 * 5 * 64)
    assert found.memory_bytes(launch, {"x": 64}) == 64  # what is written again stays in a cache


def test_driver_is_restored() -> None:
    """Catches kernels that run on no GPU after a recording, and recordings that a real device's cache returns."""
    before = driver._active, JITFunction.run, torch.autocast, gpu._is_compiled, gpu.unsupported_reason
    with pytest.raises(ZeroDivisionError), recorded(GPU.target):
        raise ZeroDivisionError
    assert before == (driver._active, JITFunction.run, torch.autocast, gpu._is_compiled, gpu.unsupported_reason)
    first, again = (product_launch(1000, wide=False) for _ in range(2))
    assert first.signature == again.signature and 0 not in _product_kernel.device_caches


@pytest.mark.parametrize(
    "name", ["elementwise plain", "short_conv SiLU", "linear_attention decay", "linear_attention log_decay"]
)
def test_compiled_launches_spill_nothing(name: str) -> None:
    """As they are launched, forward and backward; tests/kernels/test_ahead_of_time.py compiles more, by hand."""
    for row in pass_rows(case_of(name), STANDARD, GPU):
        for kernel in row.kernels:
            assert kernel.usage is not None and not kernel.usage.spilled, kernel
            assert 0 < kernel.usage.warps_per_sm <= 64 and kernel.usage.executed >= kernel.usage.instructions
            assert kernel.usage.wgmma_a_in_registers <= kernel.usage.wgmma
        assert row.seconds * GPU.bandwidth > row.bytes * 0.999 and 1 < row.ratio < RATIOS.get(
            (name, row.name), math.inf
        )


@pytest.mark.parametrize("name", ["plain", "decay", "log_decay", "normalize"])
def test_linear_attention_multiplies_from_shared_memory(name: str) -> None:
    """All of its products are those of a warp group, and none has a first factor in registers, which ptxas up to 12.9
    may overwrite before it is read.
    """
    for row in pass_rows(case_of(f"linear_attention {name}"), STANDARD, GPU):
        assert row.figure("wgmma", sum) > 0
        assert row.figure("wgmma_a_in_registers", sum) == row.figure("hmma", sum) == 0


def test_expanded_dimensions_count_once() -> None:
    assert footprint(torch.empty(3, 1, device="meta").expand(3, 1000)) == 12
    assert kind("@!P0 LDG.E.128 R4, [R2.64]") == "LDG.E.128"


def budgets() -> None:
    """Print the budgets as they are now."""
    for case in cases():
        for row in rows(case.name):
            figures = row.launches, row.num_operations, math.ceil(row.bytes / row.elements * 10) / 10
            print(f'    ("{case.name}", "{row.name}"): {figures},')


if __name__ == "__main__":
    budgets()
