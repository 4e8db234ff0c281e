"""`longreach bench static`: what can be known of the GPU kernels without a GPU.

Every operator runs forward and backward on tensors without data, at a shape that is named; its launches are recorded,
compiled for a target and disassembled. Times are estimates: bytes at a bandwidth, or instructions at the rate at which
schedulers issue them, whichever takes longer. Latencies are not modelled, nor is the time of a launch.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import InputError
from .. import check_out, environment, write_report

if TYPE_CHECKING:
    from .report import PassRow

TARGETS = ("sm_80", "sm_90")


def run(out: Path, target: str = "sm_90") -> int:
    """Print the tables and write ``static-<target>.json`` into ``out``.

    Args:
        out: directory of the results.
        target: what to compile for, in `TARGETS`.

    Returns:
        The exit code, 0.

    Raises:
        InputError: Triton is not installed, or its interpreter is asked for.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET", "1", "unset, as kernels are compiled")
    try:
        from . import peers, report
        from .capture import GPUS
        from .cases import STANDARD, cases
    except ImportError as error:
        raise InputError("bench static", str(error), "Triton", "pip install triton") from None
    check_out(out)
    gpu, where = GPUS[target], environment("cpu", 1)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(
        f"{target}, times for {gpu.name}: {gpu.bandwidth / 1e12:g} TB/s, {gpu.multiprocessors} multiprocessors, "
        f"{gpu.clock / 1e9:g} GHz\nB={STANDARD.batch}, L={STANDARD.length:,}, D={STANDARD.width:,}, bf16\n"
    )
    print(report.PASS_HEADER, flush=True)
    rows: list[PassRow] = []
    # Processes of their own: they compile in parallel, and their stand-in of Triton's driver ends with them.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        numbers = range(len(cases()))
        for some in pool.map(_rows, [(number, target) for number in numbers]):
            rows += some
            print("\n".join(map(report.pass_line, some)), flush=True)
        theirs, skipped = pool.submit(peers.rows, target).result()
    if theirs:
        rows += theirs
        print("\n".join(map(report.pass_line, theirs)))
    for line in skipped:
        print(line)
    for row in rows:
        if row.kernels:
            print(f"\n{row.operator} {row.variant}, {row.name}\n\n{report.KERNEL_HEADER}")
            print("\n".join(report.kernel_line(kernel, row.elements) for kernel in row.kernels))
    in_registers = sorted(_with_a_in_registers(rows))
    print(f"\nWGMMA with A in registers: {', '.join(in_registers) or 'none'}")
    path = out / f"static-{target}.json"
    content: dict[str, Any] = {
        "command": f"longreach bench static --target {target}",
        "environment": where,
        "gpu": {**gpu._asdict(), "target": target},
        "shape": asdict(STANDARD),
        "passes": [row.as_json() for row in rows],
        "wgmma_a_in_registers": in_registers,
        "skipped": skipped,
    }
    write_report(content, path)
    print(f"written: {path}")
    return 0


def _rows(job: tuple[int, str]) -> list[PassRow]:
    from .capture import GPUS
    from .cases import STANDARD, cases
    from .report import pass_rows

    number, target = job
    return pass_rows(cases()[number], STANDARD, GPUS[target])


def _with_a_in_registers(rows: list[PassRow]) -> set[str]:
    return {
        f"{row.operator} {row.variant}: {kernel.kernel} {kernel.role}".strip()
        for row in rows
        for kernel in row.kernels
        if kernel.usage is not None and kernel.usage.wgmma_a_in_registers
    }
