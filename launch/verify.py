"""`longreach verify`: two training steps of a model on several ranks and streamed, against one rank and one pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..framework.config import RunConfig
from ..framework.data import Batch
from ..framework.deepspeed.engine import Engine
from ..framework.mixers.registry import run_files
from ..framework.model import ModelConfig, build_model
from ..framework.model.directory import directory_of, fill
from ..framework.model.heads import labelled
from ..framework.trainer import accumulate_gradients
from ..parallel.local_ranks import RankFailed, run_on_ranks, sum_over_ranks
from ..parallel.mesh import Axis, Mesh
from ..parallel.traffic import Traffic
from .dry_run import sample_batch
from .exit_codes import CommandFailed
from .mixer_check import relative_error, to_dtype

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = 101  # of a sequence: on 2 to 4 ranks and in blocks, shards of different lengths
BATCH_SIZE, STEPS = 2, 2
DOCUMENTS = 6  # that begin in a sequence, on average
STEP_LEN = 0.1  # by which a step moves all weights together
TURNS = 3  # of a streamed sequence
LOSS_SCALE = 1024.0  # of fp16
FP64_LIMIT, LIMIT = 1e-10, 1e-5
ROUNDINGS = 4.0  # two runs that round independently differ by about 1.4 times the rounding error of one
SMALL = 1e-4  # a tensor's gradient that is a smaller share of its group's is compared with that

Step = tuple[float, dict[str, Tensor]]
"""The loss of a step, and the gradients by name, in fp64 and summed over ranks."""


@dataclass(frozen=True)
class Row:
    """The differences of one way to compute two steps from one rank that computes each in one pass.

    Attributes:
        precision: fp64, or the config's.
        data: "dense" (one document), "documents" (several, packed), or the name of a task.
        ranks: that share each sequence.
        streamed: whether each sequence is processed block by block.
        errors: the largest relative differences, of the loss and of the gradients of each group of tensors.
        limits: of the errors.
    """

    precision: str
    data: str
    ranks: int
    streamed: bool
    errors: dict[str, float]
    limits: dict[str, float]

    @property
    def worst(self) -> str:
        """The group whose error is the largest share of its limit, or is NaN."""
        shares = {group: error / self.limits[group] for group, error in self.errors.items()}
        return max(shares, key=lambda group: math.inf if math.isnan(shares[group]) else shares[group])

    @property
    def good(self) -> bool:
        """Whether all errors are within their limits; NaN is not."""
        return all(error <= self.limits[group] for group, error in self.errors.items())

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return f"{self.precision}, {self.data}, {ranks}{', streamed' if self.streamed else ''}"


def verify(config: RunConfig, ranks: int, say: Callable[[Row], object] = lambda row: None) -> list[Row]:
    """Train two steps on 1 to ``ranks`` ranks of this machine's processor, and compare losses and gradients.

    The steps are those of training without DeepSpeed: gradient descent, on two micro-batches of one sequence each of
    ``config.data.seq_len`` tokens, which are random for the language task, else examples of the task.

    Args:
        config: of the model; its data section says how many tokens.
        ranks: at least 1.
        say: called with each row as it is known.

    Raises:
        InputError: something in the config does not fit.
        CommandFailed: a rank failed, or waits for ever.
    """
    config = copy.deepcopy(config)
    config.data.batch_size = BATCH_SIZE
    config.train.micro_batch_size = BATCH_SIZE
    batches = _batches(config)
    config.train.micro_batch_size = 1
    build_model(config.model)  # a mistake in its options is told here
    precisions = list(dict.fromkeys(["fp64", config.train.precision]))
    rows = []
    for size in range(1, ranks + 1):
        try:
            found: list[Row] = run_on_ranks(
                _compare, size, config, batches, precisions, timeout=config.parallel.timeout
            )[0]
        except (RankFailed, TimeoutError) as error:
            reason = f"rank {error.rank} fails: {error.summary}" if isinstance(error, RankFailed) else str(error)
            raise CommandFailed(f"verify on {size} ranks: {reason}") from error
        for row in found:
            say(row)
        rows += found
    return rows


def table_head(config: RunConfig) -> str:
    """The names above the columns of the table."""
    return _line(config, "largest relative difference", [f"{group} " for group in groups(config)])


def as_line(row: Row, config: RunConfig) -> str:
    """A row of the table; ``!`` marks what is beyond its limit."""
    errors = [(row.errors[group], row.limits[group]) for group in groups(config)]
    return _line(config, str(row), [f"{error:.1e}{' ' if error <= limit else '!'}" for error, limit in errors])


def limit_lines(rows: list[Row], config: RunConfig) -> list[str]:
    """The largest limits of each precision, as rows of the table."""
    found = []
    for precision in dict.fromkeys(row.precision for row in rows):
        limits = [row.limits for row in rows if row.precision == precision]
        numbers = [f"{max(one[group] for one in limits):.1e} " for group in groups(config)]
        found.append(_line(config, f"limit, {precision}", numbers))
    return found


def groups(config: RunConfig) -> list[str]:
    """The columns of the table: the loss, and groups of tensors."""
    model = config.model
    if directory_of(model) is not None:
        return ["loss", *_foreign_groups(model.pretrained or model.architecture)]
    mixers = dict.fromkeys(model.mixers[: model.depth])
    return ["loss", "embedding", *mixers, "norms", "feed-forward", *([] if model.head == "token" else ["head"])]


def _line(config: RunConfig, first: str, rest: list[str]) -> str:
    widths = (max(10, len(group) + 2) for group in groups(config))
    return f"{first:<34}" + "".join(f"{text:>{width}}" for text, width in zip(rest, widths, strict=True))


def _batches(config: RunConfig) -> dict[str, list[Batch]]:
    """By name, micro-batches of one sequence each; for the language task also with documents of random lengths."""
    torch.manual_seed(config.run.seed)
    whole = sample_batch(config)
    found: dict[str, Batch] = {config.task.name: whole}
    if config.task.name == "language":
        ids = (torch.rand(whole.tokens.shape) < DOCUMENTS / config.data.seq_len).cumsum(1)
        found = {"dense": replace(whole, segments=None), "documents": replace(whole, segments=ids)}
    rows = [slice(row, row + 1) for row in range(len(whole.tokens))]
    return {name: [_rows_of(batch, row) for row in rows] for name, batch in found.items()}


def _rows_of(batch: Batch, rows: slice) -> Batch:
    segments = None if batch.segments is None else batch.segments[rows]
    return Batch(batch.tokens[rows], batch.labels[rows], segments, batch.indices[rows])


def _compare(axis: Axis, config: RunConfig, batches: dict[str, list[Batch]], precisions: list[str]) -> list[Row]:
    """The rows of the ranks of ``axis``; on the first rank, nothing on the others."""
    config.parallel.block_len = 0
    run_files(config.model.code)
    turn = -(-config.data.seq_len // TURNS)
    streamed = replace(config, parallel=replace(config.parallel, block_len=-(-turn // axis.size)))
    ways = [(way, way is streamed) for way in (config, streamed) if axis.size > 1 or way is streamed]
    axis = replace(axis, relay=config.parallel.relay if config.parallel.relay != "hierarchical" else "auto")
    rows, exact = [], dict[str, list[Step]]()
    for data, batch in batches.items():
        for precision in precisions:
            dtype, expected = DTYPES[precision], list[Step]()
            if axis.rank == 0:
                expected = list(_steps(Axis(), config, batch, dtype))
                exact[data] = exact.get(data, expected)
            limits = _limits(config, dtype, expected, exact.get(data, []))
            for way, is_streamed in ways if config.model.causal else ways[:-1]:
                errors = _errors(config, list(_steps(axis, way, batch, dtype)), expected)
                rows.append(Row(precision, data, axis.size, is_streamed, errors, limits))
    return rows if axis.rank == 0 else []


def _limits(config: RunConfig, dtype: torch.dtype, expected: list[Step], exact: list[Step]) -> dict[str, float]:
    """What two computations may differ by: a multiple of what one rounds, which is its difference from fp64."""
    if dtype == torch.float64:
        return dict.fromkeys(groups(config), FP64_LIMIT)
    least = max(LIMIT, torch.finfo(dtype).eps)
    return {group: max(least, ROUNDINGS * error) for group, error in _errors(config, expected, exact).items()}


def _errors(config: RunConfig, actual: list[Step], expected: list[Step]) -> dict[str, float]:
    """By group, the largest relative error of a loss or a tensor's gradient (RMS) in all steps."""
    found = dict.fromkeys(groups(config), 0.0)

    def add(group: str, error: float) -> None:
        found[group] = max(found[group], error) if error == error else math.nan

    for (loss, grads), (expected_loss, wanted) in zip(actual, expected, strict=False):
        add("loss", abs(loss - expected_loss) / abs(expected_loss))
        largest: dict[str, float] = {}
        for name, grad in wanted.items():
            group = _group(name, config)
            largest[group] = max(largest.get(group, 0.0), grad.abs().square().mean().sqrt().item())
        for name, grad in wanted.items():
            group = _group(name, config)
            add(group, relative_error(grads[name], grad, floor=SMALL * largest[group]))
    return found


def _group(name: str, config: RunConfig) -> str:
    """The column of a parameter."""
    if directory_of(config.model) is not None:
        return _foreign_group(name)
    if name.startswith("embedding."):
        return "embedding"
    part = name.split(".")
    if part[0] == "blocks" and part[2] == "mixer":
        return config.model.mixers[int(part[1]) % len(config.model.mixers)]
    return "norms" if "norm" in part[-2] else "feed-forward" if part[0] == "blocks" else "head"


@cache
def _foreign_groups(place: str) -> list[str]:
    """The columns of a model of transformers."""
    config = ModelConfig(architecture=place)
    fill(config)
    with torch.device("meta"):
        names = [name for name, _ in build_model(config).named_parameters()]
    return list(dict.fromkeys(map(_foreign_group, names)))


def _foreign_group(name: str) -> str:
    """The column of a parameter of a model of transformers: the part of the layer that it belongs to."""
    *modules, last, _ = name.split(".")
    number = next((at for at, part in enumerate(modules) if part.isdecimal()), None)
    if "norm" in last:
        return "norms"
    if number is None:
        return "embedding" if "embed" in name else "head"
    return [*modules, last][number + 1]


class _Engine:
    """As `Engine`, without DeepSpeed: gradients add up in fp32 or better in each rank's parameters."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.model, self.scale = model, scale
        for parameter in model.parameters():
            parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor, *, is_last: bool = False) -> None:
        (loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.scale).backward()


class _Wide(TorchFunctionMode):
    """Reads float32 as float64 wherever a dtype is named: norms, decays and softmax of transformers convert to fp32
    whatever comes in, which would leave nothing to compare beyond that.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        named = {name: _no_fp32(value) for name, value in (kwargs or {}).items()}
        return func(*map(_no_fp32, args), **named)


def _no_fp32(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _wide(x: Tensor) -> Tensor:
    """In fp64 or complex128."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def _steps(axis: Axis, config: RunConfig, batch: list[Batch], dtype: torch.dtype) -> Iterator[Step]:
    """Gradient descent, whose steps do not enlarge rounding errors of small gradients as those of Adam do. Weights are
    kept in fp64, and the model computes with them in ``dtype``.
    """
    torch.manual_seed(config.run.seed)
    model = build_model(config.model)
    weights = {name: _wide(parameter.detach()).clone() for name, parameter in model.named_parameters()}
    to_dtype(model, dtype)
    model.recompute = config.train.recompute
    is_wide = dtype == torch.float64 and directory_of(config.model) is not None
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    engine, mesh = _Engine(model, scale), Mesh(sequence=axis, world=axis)
    num_labels = float(sum(int(labelled(micro.labels).sum()) for micro in batch))
    for step in range(STEPS):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights[name])
            parameter.grad = None
        arguments = mesh, batch, step * BATCH_SIZE, num_labels, Traffic()
        with _Wide() if is_wide else nullcontext():
            sums = sum_over_ranks(accumulate_gradients(config, cast(Engine, engine), *arguments), axis)
        grads = {}
        for name, parameter in model.named_parameters():
            grad = torch.zeros_like(weights[name]) if parameter.grad is None else _wide(parameter.grad) / scale
            grads[name] = sum_over_ranks(grad, axis)
        yield (sums[0] / num_labels + sums[1]).item(), grads
        norm = math.sqrt(sum(grad.abs().square().sum().item() for grad in grads.values()))
        for name, grad in grads.items():
            weights[name] -= STEP_LEN / norm * grad
