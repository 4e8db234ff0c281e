"""What a compiled kernel takes: registers, shared memory, occupancy and instructions, from the disassembled program."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from .capture import Gpu
from .ir import Evaluation

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS, WARPS, BLOCKS, SCHEDULERS = 65_536, 64, 32, 4  # of a multiprocessor, sm_80 and sm_90
RESERVED = 1024  # bytes of shared memory that the system takes for each block
MAX_UNROLL = 16

_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory of a block.
        spilled: bytes of stack and local memory per thread.
        num_warps: of a block.
        blocks_per_sm, warps_per_sm: how many reside on a multiprocessor at once.
        instructions: in the program.
        executed: about how many a warp executes, from the trip count of the longest loop.
        wgmma: matrix products of a warp group (sm_90), of which `wgmma_a_in_registers` read A from registers.
        hmma: matrix products of a warp.
    """

    registers: int
    shared: int
    spilled: int
    num_warps: int
    blocks_per_sm: int
    warps_per_sm: int
    instructions: int
    executed: int
    wgmma: int
    wgmma_a_in_registers: int
    hmma: int


def usage(kernel: Any, gpu: Gpu, evaluation: Evaluation) -> Usage:
    """What ``kernel``, of `Launch.compiled`, takes; ``evaluation`` gives the trip count of its longest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _cuobjdump("--dump-resource-usage", file.name)
        program = instructions(_cuobjdump("-sass", file.name))
    registers, metadata = _number(r"REG:(\d+)", resources), kernel.metadata
    products = re.findall(r"wgmma\.mma_async[^;]*;", kernel.asm["ptx"])
    kinds = Counter(kind(text).split(".")[0] for _, text in program)
    blocks = _resident(registers, metadata.shared, metadata.num_warps, gpu.shared_per_sm)
    return Usage(
        registers,
        metadata.shared,
        _number(r"STACK:(\d+)", resources) + _number(r"LOCAL:(\d+)", resources),
        metadata.num_warps,
        blocks,
        blocks * metadata.num_warps,
        len(program),
        executed(program, metadata.num_warps, evaluation),
        len(products),
        # Operands in braces are registers: first the sum, then A, whose other form is a descriptor.
        sum(re.search(r"\}\s*,\s*\{", text) is not None for text in products),
        kinds["HMMA"],
    )


def instructions(sass: str) -> list[tuple[int, str]]:
    """Addresses and texts of a disassembled program, without the padding behind its end."""
    found = []
    for line in sass.splitlines():
        match = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if match:
            found.append((int(match[1], 16), match[2].strip()))
    while found and kind(found[-1][1]) in ("NOP", "BRA"):
        found.pop()
    return found


def kind(text: str) -> str:
    """An instruction's name with its modifiers, such as "LDG.E.128"."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def executed(program: Sequence[tuple[int, str]], num_warps: int, evaluation: Evaluation) -> int:
    """About how many instructions a warp executes: once each, those of the longest loop as often as it runs.

    Where the compiler unrolled that loop, a pass moves a multiple of the bytes of one in Triton's representation.
    """
    longest: list[str] = []
    for address, text in program:
        target = re.search(r"0x([0-9a-f]+)", text)
        if kind(text).startswith("BRA") and target and int(target[1], 16) < address:
            body = [text for at, text in program if int(target[1], 16) <= at <= address]
            longest = max(longest, body, key=len)
    if not longest or not evaluation.trips:
        return len(program)
    unrolled = 1
    for names, expected in zip((("LDG", "LDGSTS"), ("STG",)), evaluation.loop_accesses):
        moved = sum(map(_moved, (text for text in longest if kind(text).split(".")[0] in names))) * 32 * num_warps
        if expected and moved:  # stores, the last, are not repeated by threads
            unrolled = max(1, min(MAX_UNROLL, round(moved / expected)))
    return len(program) + round(len(longest) * (evaluation.trips / unrolled - 1))


def _moved(text: str) -> int:
    """Bytes that a thread loads or stores."""
    modifiers = [part.lstrip("US") for part in kind(text).split(".")[1:]]
    return next((_BYTES[part] for part in modifiers if part in _BYTES), 4)


def _resident(registers: int, shared: int, num_warps: int, shared_per_sm: int) -> int:
    """Blocks that reside on a multiprocessor at once. Registers are handed out 256 at a time to a warp."""
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    warps = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS
    return min(warps // num_warps, shared_per_sm // (shared + RESERVED), BLOCKS, WARPS // num_warps)


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([str(BIN / "cuobjdump"), option, path], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} is not in the compiler's report")
    return int(found[1])
