"""Launches, operations of PyTorch, bytes, registers and instructions of an operator's passes, and estimated times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .. import table_header, table_line
from .capture import Gpu, Launch, footprint
from .cases import Case, Pass, Shape, passes
from .disassembly import SCHEDULERS, Usage, usage
from .ir import Evaluation, evaluate


@dataclass(frozen=True)
class KernelRow:
    """One kernel of a pass, and how often it is launched alike.

    Attributes:
        kernel: its name.
        role: the role and direction, where it has several.
        launches: how often.
        programs: of a launch.
        memory_bytes: of a launch, see `Evaluation.memory_bytes`.
        requested_bytes: of a launch, repeated accesses included.
        multiplications: multiply-adds of a launch's matrix products.
        usage: what it takes; None where it was not compiled.
        seconds: of a launch: for its bytes or for its instructions, whichever takes longer.
        limit: "bytes" or "instructions", whichever that is.
    """

    kernel: str
    role: str
    launches: int
    programs: int
    memory_bytes: int
    requested_bytes: int
    multiplications: int
    usage: Usage | None
    seconds: float
    limit: str


@dataclass(frozen=True)
class PassRow:
    """One pass of an operator's variant.

    Attributes:
        operator, variant, name: such as "linear_attention", "decay", "forward".
        launches: of Triton kernels.
        operations: of PyTorch that launch kernels, by name.
        operation_bytes: that these read and write.
        bytes: between memory and chip, of kernels and operations.
        least_bytes: of the tensors that the pass must at least read and write; a copy moves as many.
        elements: B L D.
        instructions: that all warps of all kernels execute, about.
        seconds: of kernels (see `KernelRow`) and operations of PyTorch (by their bytes).
        copy_seconds: of a copy of ``least_bytes``.
        kernels: each kernel.
    """

    operator: str
    variant: str
    name: str
    launches: int
    operations: dict[str, int]
    operation_bytes: int
    bytes: int
    least_bytes: int
    elements: int
    instructions: int
    seconds: float
    copy_seconds: float
    kernels: list[KernelRow]

    @property
    def ratio(self) -> float:
        return self.seconds / self.copy_seconds

    @property
    def num_operations(self) -> int:
        return sum(self.operations.values())

    def figure(self, name: str, pick: Callable[..., int]) -> int:
        """A figure of the kernels' usages, such as the most registers; 0 without any."""
        values = [getattr(kernel.usage, name) for kernel in self.kernels if kernel.usage is not None]
        return pick(values) if values else 0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio_to_copy": self.ratio, "bytes_per_element": self.bytes / self.elements}


def pass_rows(case: Case, shape: Shape, gpu: Gpu, *, compile_kernels: bool = True) -> list[PassRow]:
    """The forward and the backward pass of a case; without compiling, kernels have no usage and take their bytes."""
    return [pass_row(one, shape, gpu, compile_kernels=compile_kernels) for one in passes(case, shape, gpu)]


def pass_row(one: Pass, shape: Shape, gpu: Gpu, *, compile_kernels: bool = True) -> PassRow:
    """The figures of one pass."""
    kernels = list(_kernel_rows(one.recording.launches, gpu, compile_kernels))
    operation_bytes = sum(operation.num_bytes for operation in one.recording.operations)
    return PassRow(
        one.case.operator,
        one.case.variant,
        one.name,
        sum(kernel.launches for kernel in kernels),
        dict(one.recording.operation_counts),
        operation_bytes,
        operation_bytes + sum(kernel.memory_bytes * kernel.launches for kernel in kernels),
        one.least_bytes,
        shape.numel,
        sum(_executed(kernel) * kernel.launches for kernel in kernels),
        operation_bytes / gpu.bandwidth + sum(kernel.seconds * kernel.launches for kernel in kernels),
        one.least_bytes / gpu.bandwidth,
        kernels,
    )


def _kernel_rows(launches: list[Launch], gpu: Gpu, compile_kernels: bool) -> Iterator[KernelRow]:
    alike: dict[tuple[str, ...], list[Launch]] = {}
    for launch in launches:
        sizes = [x for x in launch.arguments.values() if isinstance(x, int)]
        key = (launch.name, *map(str, (launch.grid, launch.signature, launch.constants, launch.attributes, sizes)))
        alike.setdefault(key, []).append(launch)
    for some in alike.values():
        launch = some[0]
        # A program in the middle of the sequence: those at its ends may have fewer tokens.
        evaluation = evaluate(launch, launch.ttir(gpu.target), launch.programs // 2)
        found = usage(launch.compiled(gpu.target), gpu, evaluation) if compile_kernels else None
        yield _kernel_row(launch, len(some), gpu, evaluation, found)


def _kernel_row(launch: Launch, count: int, gpu: Gpu, evaluation: Evaluation, found: Usage | None) -> KernelRow:
    tensors = {name: footprint(x) for name, x in launch.arguments.items() if isinstance(x, Tensor)}
    memory_bytes = evaluation.memory_bytes(launch, tensors)
    times = {"bytes": memory_bytes / gpu.bandwidth}
    if found is not None:
        warps = launch.programs * found.num_warps
        times["instructions"] = warps * found.executed / (gpu.multiprocessors * SCHEDULERS * gpu.clock)
    limit = max(times, key=lambda name: times[name])
    role = [str(launch.arguments[name]) for name in ("ROLE",) if name in launch.arguments]
    role += [
        name.lower() for name in ("KEYS", "REVERSE", "WRITE", "ADD", "PARTS") if launch.arguments.get(name) is True
    ]
    return KernelRow(
        launch.name.strip("_").removesuffix("_kernel"),
        " ".join(role),
        count,
        launch.programs,
        memory_bytes,
        evaluation.requested,
        evaluation.multiplications,
        found,
        times[limit],
        limit,
    )


def _executed(kernel: KernelRow) -> int:
    return 0 if kernel.usage is None else kernel.programs * kernel.usage.num_warps * kernel.usage.executed


PASS_HEADER = table_header(
    [
        "operator",
        "variant",
        "pass",
        "launches",
        "torch operations",
        "bytes / element",
        "instructions / element",
        "registers",
        "shared KiB",
        "spilled",
        "warps / SM",
        "WGMMA (A in registers)",
        "HMMA",
        "ms",
        "ratio to copy",
    ]
)
KERNEL_HEADER = table_header(
    [
        "kernel",
        "launches",
        "programs",
        "bytes / element",
        "requested",
        "instructions / element",
        "registers",
        "shared KiB",
        "spilled",
        "blocks / SM",
        "warps / SM",
        "WGMMA (A in registers)",
        "HMMA",
        "ms",
        "limit",
    ]
)


def pass_line(row: PassRow) -> str:
    """A row of the table of passes: of the kernels the most registers and shared memory, and the fewest warps."""
    return table_line(
        [
            row.operator,
            row.variant,
            row.name,
            row.launches,
            row.num_operations,
            f"{row.bytes / row.elements:.2f}",
            f"{32 * row.instructions / row.elements:.1f}",
            row.figure("registers", max),
            f"{row.figure('shared', max) / 1024:.0f}",
            row.figure("spilled", sum),
            row.figure("warps_per_sm", min),
            f"{row.figure('wgmma', sum)} ({row.figure('wgmma_a_in_registers', sum)})",
            row.figure("hmma", sum),
            f"{row.seconds * 1e3:.3f}",
            f"{row.ratio:.2f}",
        ]
    )


def kernel_line(row: KernelRow, elements: int) -> str:
    """A row of the table of kernels."""
    name = f"{row.kernel} {row.role}".strip()
    found = row.usage
    if found is None:
        return table_line([name, row.launches, row.programs, f"{row.memory_bytes / elements:.2f}"])
    return table_line(
        [
            name,
            row.launches,
            f"{row.programs:,}",
            f"{row.memory_bytes / elements:.2f}",
            f"{row.requested_bytes / elements:.2f}",
            f"{32 * _executed(row) / elements:.1f}",
            found.registers,
            f"{found.shared / 1024:.0f}",
            found.spilled,
            found.blocks_per_sm,
            found.warps_per_sm,
            f"{found.wgmma} ({found.wgmma_a_in_registers})",
            found.hmma,
            f"{row.seconds * 1e3:.3f}",
            row.limit,
        ]
    )
