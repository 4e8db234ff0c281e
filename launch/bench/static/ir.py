"""Reads Triton's representation of a kernel (TTIR, as text) with the arguments of a real launch.

`evaluate` runs through a kernel once, with an interval for every integer: of the arguments it knows the values, of
program ids the range or one value. It finds

- arithmetic in 32 bits that leaves their range (`Overflow`). Numbers that were loaded from memory are unknown, and
  what is computed from them is not judged. `overflows` asks for products with the range of all programs, and for sums
  too with the first and with the last program, whose indices are the largest along every axis: ranges do not know which
  numbers belong together, as in ``last - first``;
- how many bytes each argument's loads and stores move (`Access`), at the trip counts of the loops.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import NamedTuple

from torch import Tensor

from .capture import Launch

LOWEST, HIGHEST = -(2**31), 2**31 - 1
ITEM_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}


class Interval(NamedTuple):
    """Integers from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __or__(self, other: Interval) -> Interval:
        return Interval(min(self.low, other.low), max(self.high, other.high))

    @property
    def is_point(self) -> bool:
        return self.low == self.high


class Pointer(NamedTuple):
    """An address in one of some arguments."""

    arguments: frozenset[str]


Value = Interval | Pointer | None  # None: unknown


class Overflow(NamedTuple):
    """Arithmetic whose result may not fit 32 bits.

    Attributes:
        kernel: its name.
        line: of TTIR.
        found: the range of the result.
        terms: the operands, with the names of arguments.
    """

    kernel: str
    line: str
    found: Interval
    terms: str

    @property
    def is_product(self) -> bool:
        return not any(f"arith.{name} " in self.line for name in ("addi", "subi"))

    def __str__(self) -> str:
        return f"{self.kernel}: {self.terms} is up to {self.found.high:,}: {self.line}"


@dataclass
class Access:
    """Bytes that all programs of a launch read from and write to an argument, repeated accesses included."""

    read: int = 0
    written: int = 0


@dataclass
class Evaluation:
    """What `evaluate` finds.

    Attributes:
        overflows: those of 32 bits, each line once.
        accesses: by the names of the arguments; a load from one of several counts for each.
        requested: bytes that all programs load and store, repeated accesses included.
        multiplications: floating multiply-adds of all matrix products.
        trips: how often the body of the longest loop runs in a program, 0 without loops.
        loop_accesses: bytes that a pass through that loop (loads, stores) moves in a program.
    """

    overflows: list[Overflow] = field(default_factory=list)
    accesses: dict[str, Access] = field(default_factory=lambda: defaultdict(Access))
    requested: int = 0
    multiplications: int = 0
    trips: int = 0
    loop_accesses: tuple[int, int] = (0, 0)

    def memory_bytes(self, launch: Launch, footprints: dict[str, int]) -> int:
        """Bytes between memory and chip: each argument's accesses, but at most its size, as caches keep the rest."""
        total = 0
        for name, access in self.accesses.items():
            size = footprints.get(name, 0)
            total += min(access.read, size) + min(access.written, size)
        return total


def evaluate(launch: Launch, text: str, program: int | None = None) -> Evaluation:
    """Run through a kernel.

    Args:
        launch: gives the arguments.
        text: TTIR.
        program: the number of the program; None for the range of all.
    """
    return _Evaluator(launch, text, program).run()


def overflows(launch: Launch, text: str) -> list[Overflow]:
    """Arithmetic of a launch that leaves the range of 32 bits, each line of TTIR once."""
    found = {overflow.line: overflow for overflow in evaluate(launch, text).overflows if overflow.is_product}
    for program in (0, launch.programs - 1):
        found |= {overflow.line: overflow for overflow in evaluate(launch, text, program).overflows}
    return list(found.values())


_RESULT = re.compile(r'(%[\w-]+)(?::\d+)? = "?([\w.]+)"?(.*)')
_NAMES = re.compile(r"%[\w#-]+")
_SHAPE = re.compile(r"tensor<((?:\d+x)*)(.*)>$")
_FLOATING = {
    f"arith.{name}"
    for names in (
        "addf subf mulf divf negf cmpf maximumf minimumf maxnumf minnumf",
        "extf truncf sitofp uitofp fptosi fptoui",
    )
    for name in names.split()
}
_SAME = {
    f"{dialect}.{name}"
    for dialect, names in {
        "tt": "splat expand_dims broadcast reshape trans",
        "arith": "extsi extui index_cast",
    }.items()
    for name in names.split()
}


def _type_of(text: str) -> tuple[int, str]:
    """The number of elements of a type, and their type; that pointed to for pointers."""
    kind = text.strip()
    match = _SHAPE.match(kind)
    count = 1
    if match is not None:
        count, kind = prod(int(size) for size in match[1].split("x") if size), match[2]
        kind = kind.split(",")[0]
    pointer = re.match(r"!tt\.ptr<(\w+)", kind)
    return count, pointer[1] if pointer else kind


class _Evaluator:
    def __init__(self, launch: Launch, text: str, program: int | None) -> None:
        self.launch, self.lines = launch, [line.strip() for line in text.splitlines()]
        self.found = Evaluation()
        self.programs = dict(zip("xyz", (*launch.grid, 1, 1)))
        self.program = {}
        for axis, size in self.programs.items():
            number = None if program is None else program % size
            program = None if program is None else program // size
            self.program[axis] = Interval(0, size - 1) if number is None else Interval(number, number)
        self.count, self.quiet, self.seen = launch.programs, 0, set[str]()
        self.loop_bytes = [0, 0]
        self.env: dict[str, Value] = {}
        self.names: dict[str, str] = {}

    def run(self) -> Evaluation:
        start = next(i for i, line in enumerate(self.lines) if line.startswith("tt.func public"))
        names = [name for name, kind in self.launch.signature.items() if kind != "constexpr"]
        for number, name in enumerate(names):
            value = self.launch.arguments[name]
            self.names[f"%arg{number}"] = name
            if isinstance(value, int):
                self.env[f"%arg{number}"] = Interval(int(value), int(value))
            elif isinstance(value, Tensor):
                self.env[f"%arg{number}"] = Pointer(frozenset([name]))
        self.block(start + 1)
        return self.found

    # Regions

    def block(self, position: int) -> tuple[int, list[str]]:
        """Evaluates the lines from ``position`` to the end of their region.

        Returns:
            The position of the line that ends it, and the operands of its last yield.
        """
        yielded: list[str] = []
        while not self.lines[position].startswith("}"):
            line = self.lines[position]
            if line.startswith(("scf.yield", "tt.reduce.return", "tt.scan.return", "scf.condition")):
                yielded = _NAMES.findall(line.split(" : ")[0])
            elif " scf.for " in f" {line}":
                position = self.loop(position)
            elif " scf.if " in f" {line}":
                position = self.branch(position)
            elif line.endswith(("{", "({")):  # a reduction, or a loop without a count: only its own arithmetic
                position, _ = self.block(position + 1)
            elif not line.startswith("^"):
                self.operation(line)
            position += 1
        return position, yielded

    def loop(self, position: int) -> int:
        line = self.lines[position]
        match = re.search(r"scf\.for (?:unsigned )?(%\w+) = (%[\w#-]+) to (%[\w#-]+) step (%[\w#-]+)", line)
        assert match is not None, line
        low, high, step = (self.integer(name) for name in match.groups()[1:])
        arguments = re.search(r"iter_args\((.*?)\) ->", line)
        pairs = [_NAMES.findall(pair) for pair in arguments[1].split(", ")] if arguments else []
        trips = 1
        self.env[match[1]] = None
        if low and high and step and step.low > 0:
            trips = max(0, -(-(high.high - low.low) // step.low))
            last = low.low + (trips - 1) * step.low if low.is_point else high.high - 1
            self.env[match[1]] = Interval(low.low, max(low.low, last))
        initial = {name: self.env.get(value) for name, value in pairs}
        self.env |= initial
        if any(isinstance(value, Interval) for value in initial.values()):
            self.quiet += 1
            _, yielded = self.block(position + 1)
            self.quiet -= 1
            for name, value in zip(initial, yielded):
                self.env[name] = _after(initial[name], self.env.get(value), trips)
        outside, count = self.loop_bytes, self.count
        self.loop_bytes, self.count = [0, 0], count * trips
        end, yielded = self.block(position + 1)
        if not self.quiet and trips > self.found.trips:
            self.found.trips, self.found.loop_accesses = trips, (self.loop_bytes[0], self.loop_bytes[1])
        self.loop_bytes, self.count = outside, count
        if (result := _RESULT.match(line)) is not None:
            values = [self.env.get(value) for value in yielded]
            self.results(result[1], [_join(value, initial[name]) for name, value in zip(initial, values)])
        return end

    def branch(self, position: int) -> int:
        line = self.lines[position]
        names = _NAMES.findall(line)
        condition = self.integer(re.findall(r"scf\.if (%[\w#-]+)", line)[0])
        count = self.count
        both = condition is None or not condition.is_point
        taken = condition is not None and condition.low != 0
        self.count = count if both or taken else 0
        self.quiet += not (both or taken)
        end, yielded = self.block(position + 1)
        self.quiet -= not (both or taken)
        values = [[self.env.get(name) for name in yielded]]
        if "else" in self.lines[end]:
            self.count = count if both or not taken else 0
            self.quiet += not (both or not taken)
            end, yielded = self.block(end + 1)
            self.quiet -= not (both or not taken)
            values.append([self.env.get(name) for name in yielded])
        self.count = count
        if " = scf.if" in line:
            if both:
                self.results(names[0], [_join(*pair) for pair in zip(*values)])
            else:
                self.results(names[0], values[0 if taken else -1])
        return end

    def results(self, name: str, values: list[Value]) -> None:
        self.env[name] = values[0] if len(values) == 1 else None
        self.env |= {f"{name}#{number}": value for number, value in enumerate(values)}

    # Operations

    def operation(self, line: str) -> None:
        result = _RESULT.match(line)
        if result is None:
            if line.startswith("tt.store"):
                self.access(line, written=True)
            return
        target, kind, rest = result.groups()
        if kind.startswith("math.") or kind in _FLOATING:
            self.env[target] = None
            return
        if kind in ("tt.load", "tt.atomic_rmw"):
            self.access(line, written=kind != "tt.load")
            value: Value = None
        elif kind == "tt.dot":
            self.product(rest)
            value = None
        else:
            value = self.value(kind, rest, line)
        self.env[target] = value
        if kind in _SAME:
            self.names[target] = self.term(_NAMES.findall(rest)[0])

    def integer(self, name: str) -> Interval | None:
        value = self.env.get(name)
        return value if isinstance(value, Interval) else None

    def term(self, name: str) -> str:
        value = self.env.get(name)
        if name in self.names:
            return self.names[name]
        return f"{value.low:,}" if isinstance(value, Interval) and value.is_point else "a computed number"

    def value(self, kind: str, rest: str, line: str) -> Value:
        if kind == "arith.constant":
            return _constant(rest)
        if kind == "tt.get_program_id":
            return self.program[rest.split()[0]]
        if kind == "tt.get_num_programs":
            size = self.programs[rest.split()[0]]
            return Interval(size, size)
        if kind == "tt.make_range":
            end, start = (int(re.findall(rf"{name} = (\d+)", rest)[0]) for name in ("end", "start"))
            return Interval(start, end - 1)
        operands, _, _ = rest.partition(" : ")
        names = _NAMES.findall(operands)
        values = [self.env.get(name) for name in names]
        if kind == "tt.addptr" or kind in _SAME:
            return values[0]
        if kind == "arith.select":
            chosen = values[0]
            if isinstance(chosen, Interval) and chosen.is_point:
                return values[1] if chosen.low else values[2]
            return _join(values[1], values[2])
        numbers = [value if isinstance(value, Interval) else None for value in values]
        if kind == "arith.cmpi":
            return _compared(operands.split()[0].strip(","), numbers[0], numbers[1])
        found = _arithmetic(kind, numbers)
        _, item = _type_of(rest.rsplit(" to " if kind == "arith.trunci" else " : ", 1)[-1])
        if found is None or item != "i32" or (found.low >= LOWEST and found.high <= HIGHEST):
            return found
        if not self.quiet and line not in self.seen:
            self.seen.add(line)
            sign = {"arith.muli": " * ", "arith.addi": " + ", "arith.subi": " - "}.get(kind, f" {kind[6:]} ")
            terms = sign.join(map(self.term, names))
            self.found.overflows.append(Overflow(self.launch.name, line, found, terms))
        return None

    def access(self, line: str, *, written: bool) -> None:
        operands, _, types = line.rpartition(" : ")
        pointer = self.env.get(_NAMES.findall(operands.rpartition(" = ")[2])[0])
        count, item = _type_of(re.split(r", (?=tensor|[fib])", types)[0])
        moved = count * ITEM_BYTES.get(item, 4)
        if self.quiet or not self.count:
            return
        self.loop_bytes[written] += moved
        self.found.requested += moved * self.count
        for name in pointer.arguments if isinstance(pointer, Pointer) else ("?",):
            access = self.found.accesses[name]
            if written:
                access.written += moved * self.count
            else:
                access.read += moved * self.count

    def product(self, rest: str) -> None:
        shapes = re.findall(r"tensor<(\d+)x(\d+)x\w+>", rest)
        if not self.quiet and len(shapes) >= 2:
            (rows, inner), (_, columns) = (map(int, shape) for shape in shapes[:2])
            self.found.multiplications += rows * inner * columns * self.count


def _join(one: Value, other: Value) -> Value:
    if isinstance(one, Interval) and isinstance(other, Interval):
        return one | other
    if isinstance(one, Pointer) and isinstance(other, Pointer):
        return Pointer(one.arguments | other.arguments)
    return None


def _after(first: Value, second: Value, trips: int) -> Value:
    """The range of a loop's variable that is ``first`` at first and ``second`` after one pass."""
    if not (isinstance(first, Interval) and isinstance(second, Interval)):
        return first if isinstance(first, Pointer) else None
    low, high = (min(0, second.low - first.low) * trips, max(0, second.high - first.high) * trips)
    return Interval(first.low + low, first.high + high)


def _constant(text: str) -> Interval | None:
    value, _, kind = text.strip().rpartition(" : ")
    if not re.search(r"\bi\d+>?$", kind):
        return None
    if value in ("true", "dense<true>"):
        return Interval(1, 1)
    if value in ("false", "dense<false>"):
        return Interval(0, 0)
    numbers = [int(number) for number in re.findall(r"-?\d+", value)]
    return Interval(min(numbers), max(numbers)) if numbers and "0x" not in value else None


def _compared(sign: str, one: Interval | None, other: Interval | None) -> Interval | None:
    if one is None or other is None:
        return None
    if sign in ("sgt", "sge", "ugt", "uge"):
        one, other, sign = other, one, sign.replace("g", "l")
    always = {
        "eq": one.is_point and one == other,
        "ne": one.high < other.low or other.high < one.low,
    }.get(sign, one.high < other.low or (sign.endswith("e") and one.high == other.low))
    never = {
        "eq": one.high < other.low or other.high < one.low,
        "ne": one.is_point and one == other,
    }.get(sign, one.low > other.high or (sign.endswith("t") and one.low == other.high))
    return Interval(1, 1) if always else Interval(0, 0) if never else None


def _arithmetic(kind: str, numbers: list[Interval | None]) -> Interval | None:
    """The range of an operation's result."""
    name = kind.removeprefix("arith.")
    one, *others = numbers or [None]
    if name == "trunci":
        return one
    other = others[0] if others else None
    if name in ("remsi", "remui") and other is not None and other.low > 0:
        if one is None:
            return Interval(1 - other.high, other.high - 1)
        if one.is_point and other.is_point and one.low >= 0:
            return Interval(one.low % other.low, one.low % other.low)
        return Interval(0 if one.low >= 0 else 1 - other.high, min(max(one.high, 0), other.high - 1))
    if one is None or other is None:
        return None
    corners = list(product(one, other))
    if name == "addi":
        return Interval(one.low + other.low, one.high + other.high)
    if name == "subi":
        return Interval(one.low - other.high, one.high - other.low)
    if name in ("minsi", "maxsi", "minui", "maxui"):
        pick = min if name.startswith("min") else max
        return Interval(pick(one.low, other.low), pick(one.high, other.high))
    found: list[int] = []
    if name == "muli":
        found = [x * y for x, y in corners]
    elif name in ("divsi", "divui", "floordivsi", "ceildivsi") and other.low > 0:
        found = [_quotient(x, y) for x, y in corners]
        if name == "ceildivsi":
            found = [-(-x // y) for x, y in corners]
    elif name == "shli" and other.low >= 0 and other.high < 63:
        found = [x << y for x, y in corners]
    elif name in ("shrsi", "shrui") and other.low >= 0 and one.low >= 0:
        found = [x >> y for x, y in corners]
    elif name == "andi" and one.low >= 0 and other.low >= 0:
        found = [0, min(one.high, other.high)]
        if one.is_point and other.is_point:
            found = [one.low & other.low]
    return Interval(min(found), max(found)) if found else None


def _quotient(x: int, y: int) -> int:
    return abs(x) // y * (1 if x >= 0 else -1)
