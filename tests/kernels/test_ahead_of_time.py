"""Every Triton kernel compiles for the GPUs we aim at, without spilling registers: none of them need be there.

``python tests/kernels/test_ahead_of_time.py [operator ...]`` prints what each kernel takes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from longreach.kernels.gpu import OPTIONS, Variant

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes a program may have
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Usage(NamedTuple):
    """What one compiled kernel takes: registers per thread, bytes of shared memory, bytes (AMD: registers) spilled, and
    matrix products of a warp group whose first factor is in registers.
    """

    registers: int
    shared: int
    spilled: int
    wgmma_a_in_registers: int = 0


def variants(operator: str) -> Iterator[Variant]:
    yield from importlib.import_module(f"longreach.kernels.{operator}.triton").variants()


def is_for(name: str, target: str) -> bool:
    """Whether a variant is launched on ``target``; one whose name ends in a target is launched there alone."""
    last = name.rpartition("-")[2]
    return last == target or last not in TARGETS


def compiled(variant: Variant, target: str) -> Usage:
    """What ``variant`` takes on ``target`` where pointers, sizes and strides are multiples of 16."""
    aligned = [i for i, kind in enumerate(variant.signature.values()) if kind[0] == "*" or kind in ("i32", "i64")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    # AMD's matrix units have no tf32; launchers ask for its own precision there.
    hip = TARGETS[target].backend == "hip"
    constants = {name: None if hip and x in ("tf32", "tf32x3") else x for name, x in variant.constants.items()}
    source = ASTSource(variant.kernel, dict(variant.signature), constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **OPTIONS}
    kernel = triton.compile(source, target=TARGETS[target], options=options)
    if hip:
        assembly = kernel.asm["amdgcn"]
        registers, *spills = (_number(rf"\.{x}:\s+(\d+)", assembly) for x in _HIP_COUNTS)
        return Usage(registers, kernel.metadata.shared, sum(spills))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        words = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    spilled = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    products = re.findall(r"wgmma\.mma_async[^;]*;", kernel.asm["ptx"])
    # Operands in braces are registers: first the sum, then A, whose other form is a descriptor.
    from_registers = sum(re.search(r"\}\s*,\s*\{", text) is not None for text in products)
    return Usage(_number(r"REG:(\d+)", usage), kernel.metadata.shared, spilled, from_registers)


_HIP_COUNTS = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in the compiler's report"
    return int(found[1])


def _compiled(case: tuple[str, int, str]) -> Usage:
    operator, number, target = case
    return compiled(list(variants(operator))[number], target)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_fits_the_target(operator: str, target: str) -> None:
    """Catches code that only the interpreter takes, spilled registers, and more shared memory than there is.

    Linear attention: also products in bf16 whose first factor ptxas up to 12.9 may overwrite before it is read.
    """
    names = {number: variant.name for number, variant in enumerate(variants(operator)) if is_for(variant.name, target)}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        each = pool.map(_compiled, [(operator, number, target) for number in names])
        usages = dict(zip(names.values(), each, strict=True))
    assert usages
    assert not {name: usage for name, usage in usages.items() if usage.spilled}
    assert not {name: usage for name, usage in usages.items() if usage.shared > SHARED_LIMIT[target]}
    if operator == "linear_attention":
        assert not [name for name, usage in usages.items() if "bfloat16" in name and usage.wgmma_a_in_registers]


def report(operators: list[str]) -> None:
    """Prints a table of what each variant of some operators takes on each target."""
    names = "".join(f"{target:>16}" for target in TARGETS)
    print(f"{'registers / shared bytes / spilled':90}{names}")
    for operator in operators:
        for variant in variants(operator):
            cells = (
                "/".join(map(str, compiled(variant, target)[:3])) if is_for(variant.name, target) else ""
                for target in TARGETS
            )
            print(f"{operator + ' ' + variant.name:90}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    report(sys.argv[1:] or OPERATORS)
