"""`longreach bench kernels`: checks the operators and times them beside copies, matrix products and attention.

Every figure is a median, and its ratio to something that was timed in the same run: a copy of the bytes that the
operator must read and write, the matrix products or FFTs that it is made of, or what a user would run instead.
benchmarks/README.md says how to read it.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...framework.runtime.machine import Machine
from ...kernels.delta_rule import delta_rule
from ...kernels.elementwise import elementwise_attention
from ...kernels.linear_attention import linear_attention
from ...kernels.long_conv import long_conv
from ...kernels.long_conv.chunked import fft_size
from ...kernels.short_conv import short_conv
from ..process import freed_memory_is_kept
from . import check_out, environment, median, table_header, table_line, write_report

BUDGET = 2.0  # seconds for which a measurement is repeated
LENGTHS = [2**n for n in range(10, 21)]
GRADIENT = "forward + backward"
FEW_TENSORS, MANY_TENSORS = 8, 18  # of the size of an input: what an operator and its inputs take at least, at most


@dataclass
class Sizes:
    """Sizes of the inputs on a kind of device: tokens, channels, heads and their width, and the dtype."""

    length: int
    width: int
    heads: int
    head: int
    dtype: torch.dtype


SIZES = {"cpu": Sizes(16_384, 512, 8, 64, torch.float32), "cuda": Sizes(131_072, 2_048, 16, 128, torch.bfloat16)}


@dataclass
class Row:
    """One comparison: ``ratio = seconds / other_seconds``; ``wanted`` is a limit of the ratio, or empty."""

    operator: str
    what: str
    seconds: float
    against: str
    other_seconds: float
    ratio: float
    wanted: str = ""


class Bench:
    """Times on one device.

    Args:
        device: "cpu" or "cuda".
        sizes: what to time.
    """

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes, self.rows = device, sizes, list[Row]()

    def seconds(self, run: Callable[[], object]) -> float:
        """Median time of ``run`` after a first, untimed call."""
        self._once(run)
        times: list[float] = []
        while len(times) < 3 or (sum(times) < BUDGET and len(times) < 200):
            times.append(self._once(run))
            if times[-1] > 2 * BUDGET:
                break
        return median(times)

    def _once(self, run: Callable[[], object]) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def random(self, *shape: int, scale: float = 0.5) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.sizes.dtype)

    def copy(self, num_tensors: float) -> float:
        """Seconds of a copy that reads and writes as many bytes as ``num_tensors`` tensors ``[L, D]`` have."""
        elements = int(num_tensors * self.sizes.length * self.sizes.width / 2)
        source = self.random(elements)
        target = torch.empty_like(source)
        return self.seconds(lambda: target.copy_(source))

    def add(self, operator: str, what: str, seconds: float, against: str, other: float, wanted: str = "") -> None:
        row = Row(operator, what, seconds, against, other, seconds / other, wanted)
        self.rows.append(row)
        print(as_line(row), flush=True)

    def both(self, run: Callable[..., Tensor], *inputs: Tensor) -> tuple[float, float]:
        """Seconds of ``run(*inputs)`` without gradients, and with those of all inputs."""
        with torch.no_grad():
            forward = self.seconds(lambda: run(*inputs))
        return forward, self.gradient(run, *inputs)

    def gradient(self, run: Callable[..., Tensor], *inputs: Tensor) -> float:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        upstream = torch.randn_like(run(*leaves))
        return self.seconds(lambda: torch.autograd.grad(run(*leaves), leaves, upstream))

    # The comparisons, operator by operator.

    def elementwise(self) -> None:
        s = self.sizes
        q, k, v = (self.random(1, s.length, s.width) for _ in range(3))
        forward, gradient = self.both(lambda *x: elementwise_attention(*x)[0], q, k, v)
        limits = ("<= 4", "<= 8") if self.device == "cpu" else ("<= 2", "<= 2")
        self.add("elementwise", "forward", forward, "copy of q, k, v -> y", self.copy(4), limits[0])
        # Forward q, k, v -> y; backward q, k, v, y's gradient and y -> the gradients of q, k, v.
        self.add("elementwise", GRADIENT, gradient, "copy of the 12 tensors", self.copy(12), limits[1])
        paper = self._paper_fits(s)
        with torch.no_grad():
            if paper:
                other = self.seconds(lambda: paper_formulation(q, k, v))
                self.add("elementwise", "forward", forward, "the paper's cumsum", other, "<= 1/60")
            heads = [x.view(1, s.length, s.heads, -1) for x in (q, k, v)]
            other = self.seconds(lambda: softmax_attention(*heads))
        self.add(
            "elementwise", "forward", forward, "softmax attention", other, "<= 1/40" if self.device == "cpu" else ""
        )
        other = self.gradient(softmax_attention, *heads)
        self.add("elementwise", GRADIENT, gradient, "softmax attention", other)

    def _on_cpu(self, wanted: str) -> str:
        return wanted if self.device == "cpu" else ""

    @staticmethod
    def _paper_fits(s: Sizes) -> bool:
        return 40 * s.length * s.width * 4 < 20e9

    def linear(self) -> None:
        s = self.sizes
        q, k, v = (self.random(1, s.length, s.heads, s.head) for _ in range(3))
        forward, gradient = self.both(lambda *x: linear_attention(*x)[0], q, k, v)
        block, blocks = 64, s.length // 64 * s.heads
        a = self.random(blocks, block, s.head)
        # Four products a block forward (q k', (qk') v, q S, k' v), each 2 * block * block * head at these widths.
        product = self.seconds(lambda: torch.bmm(a, a.mT)) * s.head / block
        wanted = self._on_cpu("<= 2")
        self.add("linear_attention", "forward", forward, "its 4 matrix products a block", 4 * product, wanted)
        self.add("linear_attention", GRADIENT, gradient, "its 14 matrix products a block", 14 * product, wanted)
        rates = -torch.rand(1, s.length, s.heads, device=self.device)
        gated = self.gradient(lambda *x: linear_attention(*x[:3], log_decay=x[3])[0], q, k, v, rates)
        wanted = self._on_cpu("<= 1.3")
        self.add("linear_attention", f"{GRADIENT}, log_decay", gated, "the same without decays", gradient, wanted)
        other = self.gradient(softmax_attention, q, k, v)
        self.add("linear_attention", GRADIENT, gradient, "softmax attention", other, self._on_cpu("<= 1/10"))
        if self.device == "cuda" and (fla := _optional("fla.ops.linear_attn")):

            def theirs(*x: Tensor) -> Tensor:
                return fla.chunk_linear_attn(*x, scale=1.0, normalize=False)[0]

            self.add(
                "linear_attention", GRADIENT, gradient, "flash-linear-attention", self.gradient(theirs, q, k, v), "<= 1"
            )

    def delta(self) -> None:
        s = self.sizes
        q, k, v = (self.random(1, s.length, s.heads, s.head) for _ in range(3))
        beta, rates = torch.rand(2, 1, s.length, s.heads, device=self.device).to(s.dtype)
        inputs = q, k, v, beta, -0.1 * rates

        def ours(*x: Tensor) -> Tensor:
            return delta_rule(*x[:4], log_decay=x[4], normalize_qk=True)[0]

        forward, gradient = self.both(ours, *inputs)
        a = self.random(s.length // 64 * s.heads, 64, s.head)
        # Products of 64 tokens, each 2 * 64 * 64 * head at these widths: forward the two of keys and queries, three
        # with the inverse or the pairs, three with the state; backward, six of these again and 14 of the adjoint.
        product, wanted = self.seconds(lambda: torch.bmm(a, a.mT)) * s.head / 64, self._on_cpu("<= 2")
        self.add("delta_rule", "forward", forward, "its 8 matrix products a block", 8 * product, wanted)
        self.add("delta_rule", GRADIENT, gradient, "its 28 matrix products a block", 28 * product, wanted)
        if qwen := _optional("transformers.models.qwen3_next.modeling_qwen3_next"):
            torch_chunk = qwen.torch_chunk_gated_delta_rule

            def theirs(*x: Tensor) -> Tensor:
                return torch_chunk(*x[:3], g=x[4], beta=x[3], use_qk_l2norm_in_kernel=True)[0]

            other = self.gradient(theirs, *inputs)
            self.add("delta_rule", GRADIENT, gradient, "transformers, torch_chunk_gated_delta_rule", other, "<= 1/5")

    def short(self) -> None:
        s = self.sizes
        x, weight, bias = self.random(1, s.length, s.width), self.random(s.width, 4), self.random(s.width)
        forward, gradient = self.both(lambda *a: short_conv(*a, activation="silu")[0], x, weight, bias)
        self.add(
            "short_conv",
            "forward, SiLU",
            forward,
            "copy of x -> y",
            self.copy(2),
            "<= 4" if self.device == "cpu" else "",
        )
        self.add("short_conv", GRADIENT, gradient, "copy of the 5 tensors", self.copy(5))
        plain, _ = self.both(lambda *a: short_conv(*a)[0], x, weight, bias)
        self.add("short_conv", "forward", plain, "copy of x -> y", self.copy(2), self._on_cpu("<= 4"))
        if self.device == "cuda" and (fla := _optional("fla.modules.causal_conv1d")):

            def theirs(*a: Tensor) -> Tensor:
                return fla.causal_conv1d(*a, activation="silu", backend="triton")[0]

            other_forward, other_gradient = self.both(theirs, x, weight, bias)
            self.add("short_conv", "forward, SiLU", forward, "flash-linear-attention", other_forward, "<= 1")
            self.add("short_conv", GRADIENT, gradient, "flash-linear-attention", other_gradient, "<= 1")

    def long(self) -> None:
        s = self.sizes
        width = min(s.width, 512)
        x, kernel = self.random(1, s.length, width), self.random(width, s.length, scale=0.01)
        forward, gradient = self.both(lambda *a: long_conv(*a)[0], x, kernel)
        size = fft_size(2 * s.length - 1)
        rows = torch.randn(
            min(width, 128), size, device=self.device
        )  # as many as fit the cache: with more, each takes longer
        part = width / len(rows)
        to = self.seconds(lambda: torch.fft.rfft(rows)) * part
        spectrum = torch.fft.rfft(rows)
        back = self.seconds(lambda: torch.fft.irfft(spectrum, size)) * part
        self.add("long_conv", "forward", forward, "its 3 FFTs", 2 * to + back, "<= 1.2")
        self.add("long_conv", GRADIENT, gradient, "its 8 FFTs", 5 * to + 3 * back, "<= 1.2")

    def long_sequence(self, longest: int) -> None:
        """Compare the time per token of a long sequence with that of a short one; both are timed in turns.

        The tensors of the short one together are at least twice as large as the last-level cache. The gradient is that
        of the longest sequence of which memory holds as many tensors as it takes.
        """
        short = self.sizes.length
        while 4 * short * self._token < 2 * last_level_cache() and 4 * short < longest:
            short *= 2
        for operator, options, inputs, run in self._linear_operators():
            forward = torch.no_grad()(run)
            self._long_sequence(operator, f"forward{options}", inputs, forward, short, longest)
        long = longest
        while long > 2 * short and MANY_TENSORS * long * self._token > self._memory():
            long //= 2
        for operator, options, inputs, run in self._linear_operators():
            self._long_sequence(operator, f"{GRADIENT}{options}", inputs, partial(_gradient, run), short, long)

    @property
    def _token(self) -> int:
        """Bytes of one token of a tensor ``[1, L, D]``."""
        return self.sizes.width * self.sizes.dtype.itemsize

    def _memory(self) -> float:
        """Bytes that this device has free; infinite if unknown."""
        return torch.cuda.mem_get_info()[0] if self.device == "cuda" else Machine().available_memory() or math.inf

    def _linear_operators(self) -> Iterator[tuple[str, str, Callable[[int], list[Tensor]], Callable[..., Tensor]]]:
        """Name, options, inputs of so many tokens, and the function of them."""
        s = self.sizes

        def rows(length: int) -> list[Tensor]:
            return [self.random(1, length, s.width) for _ in range(3)]

        def gated(length: int) -> list[Tensor]:
            heads = [self.random(1, length, s.heads, s.head) for _ in range(3)]
            return [*heads, -self.random(1, length, s.heads).abs()]

        def delta(*x: Tensor) -> Tensor:
            q, k, v, gate = x
            return delta_rule(q, k, v, gate.exp(), log_decay=gate, normalize_qk=True)[0]

        yield "elementwise", "", rows, lambda *x: elementwise_attention(*x)[0]
        yield "linear_attention", ", log_decay", gated, lambda q, k, v, g: linear_attention(q, k, v, log_decay=g)[0]
        yield "delta_rule", ", log_decay", gated, delta

    def _long_sequence(
        self,
        operator: str,
        what: str,
        inputs: Callable[[int], list[Tensor]],
        run: Callable[..., object],
        short: int,
        longest: int,
    ) -> None:
        times: tuple[list[float], ...] = [], []
        with freed_memory_is_kept():  # new memory is not what is timed
            size = int(min(FEW_TENSORS * longest * self._token, 0.9 * self._memory()))
            torch.ones(size, dtype=torch.uint8, device=self.device)
            runs = [partial(run, *(x.requires_grad_() for x in inputs(length))) for length in (short, longest)]
            for _ in range(2):
                self._once(runs[1])
            for _ in range(3):
                times[0].append(self.seconds(runs[0]) * longest / short)
                times[1].append(self._once(runs[1]))
            del runs
        of_short, of_long = (median(some) for some in times)
        against = f"{longest / short:g} times {short:,} tokens"
        self.add(operator, f"{what}, {longest:,} tokens", of_long, against, of_short, "<= 1.15")

    def by_length(self, longest: int) -> dict[str, list[tuple[int, float]]]:
        """Seconds of a forward pass at each length; softmax attention only up to the first that exceeds `BUDGET`."""
        s = self.sizes
        found: dict[str, list[tuple[int, float]]] = {"elementwise": [], "linear_attention": [], "softmax attention": []}
        for length in [n for n in LENGTHS if n <= longest]:
            q, k, v = (self.random(1, length, s.width) for _ in range(3))
            heads = [x.view(1, length, -1, s.head) for x in (q, k, v)]
            runs: dict[str, Callable[[], object]] = {
                "elementwise": partial(elementwise_attention, q, k, v),
                "linear_attention": partial(linear_attention, *heads),
            }
            known = found["softmax attention"]
            if not known or known[-1][1] < BUDGET:
                runs["softmax attention"] = partial(softmax_attention, *heads)
            with torch.no_grad():
                for name, run in runs.items():
                    found[name].append((length, self.seconds(run)))
            print(f"  {length:>9,} tokens: " + ", ".join(f"{n} {found[n][-1][1]:.4f} s" for n in runs), flush=True)
        return found


def _gradient(run: Callable[..., Tensor], *leaves: Tensor) -> object:
    y = run(*leaves)
    return torch.autograd.grad(y, leaves, y.detach())


def last_level_cache() -> int:
    """Bytes of this processor's largest cache, which cores share; 0 if unknown."""
    places = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)K", place.read_text().strip()) for place in places]
    return max((int(size[1]) * 1024 for size in sizes if size), default=0)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of ``[B, L, H, K]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def paper_formulation(q: Tensor, k: Tensor, v: Tensor, order: int = 6) -> Tensor:
    """The EA-series as its paper writes it: powers ``[B, t+1, L, D]`` and cumulative sums over the whole length."""
    n = torch.arange(order + 1, device=q.device, dtype=q.dtype).view(1, -1, 1, 1)
    keys = k.unsqueeze(1) ** n * torch.exp(-k * k).unsqueeze(1)
    sums = (keys * v.unsqueeze(1)).cumsum(2), keys.cumsum(2)
    coefficients = torch.exp(n * math.log(2) - torch.lgamma(n + 1))
    queries = q.unsqueeze(1) ** n * coefficients
    num, den = ((queries * x).sum(1) for x in sums)
    return num / den


def check(device: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Relative RMS error of each operator's default backend against its reference in fp64, the largest of output and
    gradients.
    """
    from ...kernels.delta_rule import reference_delta_rule
    from ...kernels.linear_attention import reference_linear_attention
    from ...kernels.long_conv import reference_long_conv
    from ...kernels.short_conv import reference_short_conv

    def r(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.5).to(dtype)

    def gated(rule: Callable[..., tuple[Tensor, object]]) -> Callable[..., tuple[Tensor, object]]:
        def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, object]:
            return rule(q, k, v, gate.sigmoid(), log_decay=-gate.exp(), normalize_qk=True)

        return run

    runs: dict[str, tuple[Callable[..., tuple[Tensor, object]], Callable[..., tuple[Tensor, object]], list[Tensor]]] = {
        "elementwise": (
            elementwise_attention,
            lambda *x: elementwise_attention(*x, backend="reference"),
            [r(2, 300, 48) for _ in range(3)],
        ),
        "linear_attention": (linear_attention, reference_linear_attention, [r(2, 300, 3, 32) for _ in range(3)]),
        "delta_rule": (
            gated(delta_rule),
            gated(reference_delta_rule),
            [*(r(2, 300, 3, 32) for _ in range(3)), r(2, 300, 3)],
        ),
        "short_conv": (short_conv, reference_short_conv, [r(2, 300, 48), r(48, 4), r(48)]),
        "long_conv": (long_conv, reference_long_conv, [r(2, 300, 48), r(48, 200)]),
    }
    for name, (run, reference, inputs) in runs.items():
        upstream = r(*inputs[0].shape)
        results = []
        for fn, where, wide in ((run, device, dtype), (reference, "cpu", torch.float64)):
            leaves = [x.to(where, wide).requires_grad_() for x in inputs]
            y, _ = fn(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(where, wide))])
        yield name, _worst(results)


def accuracy(device: str, dtype: torch.dtype, length: int = 2**20) -> dict[str, float]:
    """Relative RMS errors over a long sequence, against fp64 on the same device."""
    q, k, v, g = (torch.randn(1, length, 16, device=device).mul_(0.5).to(dtype) for _ in range(4))
    v, g = v + 1, g + 1  # sums that grow
    k = k + 0.2 * v  # correlated with the values: else dq is 0 but for noise
    errors = {}
    for name in ("elementwise", "linear_attention"):
        results = []
        for wide in (dtype, torch.float64):
            leaves = [x.to(wide, copy=True).requires_grad_() for x in (q, k, v)]
            if name == "elementwise":
                y = elementwise_attention(*leaves)[0]
            else:
                y = linear_attention(*(x.unsqueeze(2) for x in leaves), normalize=False)[0].squeeze(2)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, g.to(wide))])
        errors[f"{name}, forward"] = _error(results[0][0], results[1][0])
        errors[f"{name}, backward"] = _worst([x[1:] for x in results])
    return errors


def _worst(results: list[list[Tensor]]) -> float:
    """The largest error of some tensors against others; NaN if one is."""
    return float(torch.tensor([_error(x, truth) for x, truth in zip(*results, strict=True)]).max())


def _error(x: Tensor, truth: Tensor) -> float:
    x, truth = x.double().cpu(), truth.double().cpu()
    return float((x - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def memory(device: str) -> float:
    """Peak memory of element-wise attention, forward and backward, beyond its inputs, in tensors ``[B, L, D]``."""
    length, width, dtype = (65_536, 512, torch.float32) if device == "cpu" else (131_072, 2_048, torch.bfloat16)
    tensor = length * width * dtype.itemsize
    if device == "cuda":
        leaves, upstream = _memory_inputs(length, width, dtype, device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(elementwise_attention(*leaves)[0], leaves, upstream)
        return (torch.cuda.max_memory_allocated() - before) / tensor
    # In a process of its own: the peak of this one was reached before.
    code = f"from longreach.launch.bench.kernels import _resident; print(_resident({length}, {width}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout) / tensor


def _memory_inputs(length: int, width: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    q, k, v, g = (torch.randn(1, length, width, device=device).mul_(0.5).to(dtype) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], g


def _resident(length: int, width: int) -> int:
    """Bytes by which the resident memory of this process grows in forward and backward."""
    small, grad = _memory_inputs(128, width, torch.float32, "cpu")
    torch.autograd.grad(elementwise_attention(*small)[0], small, grad)  # loads libraries
    leaves, upstream = _memory_inputs(length, width, torch.float32, "cpu")
    before = Machine().resident_memory(peak=True) or 0
    torch.autograd.grad(elementwise_attention(*leaves)[0], leaves, upstream)
    return (Machine().resident_memory(peak=True) or 0) - before


def slope(points: list[tuple[int, float]], start: int = 8192) -> float | None:
    """The exponent p of ``seconds ~ tokens^p``, fitted to the lengths from ``start`` on; None for fewer than two."""
    some = [point for point in points if point[0] >= start]
    if len(some) < 2:
        return None
    x, y = (torch.tensor(t, dtype=torch.float64).log() for t in zip(*some, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def _law(points: list[tuple[int, float]]) -> str:
    exponent = slope(points)
    return "too few lengths to tell" if exponent is None else f"tokens^{exponent:.2f}"


def plot(lengths: dict[str, list[tuple[int, float]]], path: Path, title: str) -> None:
    """Plot seconds against length, on logarithmic axes, with the fitted exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for name, points in lengths.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=f"{name}: {_law(points)}")
    axes.set(xlabel="tokens", ylabel="seconds of a forward pass", title=title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def as_line(row: Row) -> str:
    """A row of the Markdown table."""
    ratio = f"{row.ratio:.2f}" if row.ratio >= 0.5 else f"1/{1 / row.ratio:.1f}"
    cells = [
        row.operator,
        row.what,
        f"{row.seconds * 1e3:.2f} ms",
        row.against,
        f"{row.other_seconds * 1e3:.2f} ms",
        ratio,
    ]
    return table_line([*cells, row.wanted])


HEADER = table_header(["operator", "pass", "time", "against", "its time", "ratio", "wanted"])


def _optional(module: str):  # type: ignore[no-untyped-def]
    """The module, or None where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def run(out: Path, threads: int = 0, longest: int = LENGTHS[-1]) -> int:
    """Check and time every operator; writes ``kernels-DEVICE.json`` and ``.png`` into ``out``.

    Args:
        out: directory of the results.
        threads: number of CPU threads; 0 takes all.
        longest: tokens of the longest sequence.

    Returns:
        The exit code.

    Raises:
        InputError: an operator is wrong; nothing is timed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    check_out(out)
    bench, where = Bench(device, SIZES[device]), environment(device, torch.get_num_threads())
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    checked = dict(check(device, bench.sizes.dtype))
    limit = 1e-5 if bench.sizes.dtype == torch.float32 else 1e-2
    for name, found in checked.items():
        print(f"  {name}: relative error {found:.1e} against the definition")
    if bad := [name for name, found in checked.items() if not found <= limit]:
        raise InputError("kernels", ", ".join(bad), f"a relative error up to {limit:g} against the definition")
    print(HEADER)
    for measure in (bench.elementwise, bench.linear, bench.delta, bench.short, bench.long):
        measure()
    bench.long_sequence(longest)
    with torch.no_grad():
        lengths = bench.by_length(longest)
    for name, points in lengths.items():
        print(f"  {name}: seconds ~ {_law(points)}")
    errors = {str(dtype).removeprefix("torch."): accuracy(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for name, by_pass in errors.items():
        print(f"  {name} over 1,048,576 tokens: " + ", ".join(f"{key} {size:.1e}" for key, size in by_pass.items()))
    extra = memory(device)
    print(f"  elementwise, {GRADIENT}: {extra:.2f} tensors [B, L, D] of memory beside its inputs")
    path = out / f"kernels-{'gpu' if device == 'cuda' else 'cpu'}.json"
    report = {
        "command": "longreach bench kernels",
        "environment": where,
        "sizes": {**asdict(bench.sizes), "dtype": str(bench.sizes.dtype)},
        "checks": checked,
        "rows": [asdict(row) for row in bench.rows],
        "seconds_by_length": lengths,
        "slopes": {name: slope(points) for name, points in lengths.items()},
        "errors_over_2^20_tokens": errors,
        "elementwise_extra_tensors": extra,
    }
    write_report(report, path)
    plot(lengths, path.with_suffix(".png"), where["device"])
    print(f"written: {path}, {path.with_suffix('.png')}")
    return 0
