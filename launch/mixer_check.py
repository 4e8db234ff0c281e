"""`check_mixer`: whether a mixer of your own computes the same however its sequence is processed.

A mixer is the same code split over ranks, streamed and token by token; here each of these is compared with one pass
over the whole sequence, outputs and all gradients.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..framework.mixers import CONFIGS, MIXERS, build_mixer, options
from ..framework.model import ModelConfig
from ..kernels.state import Carry
from ..parallel import streaming
from ..parallel.local_ranks import TIMEOUT_SECONDS, RankFailed, in_worker, run_on_ranks
from ..parallel.mesh import Axis, Mesh
from ..parallel.span import Span

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHARDS = ([9, 6], [8, 8, 1], [3, 3, 3, 1], [2, 2, 1, 0])  # uneven, shorter than a convolution's reach, empty
DOCUMENTS = [6, 1, 10]  # tokens of each, packed into a sequence
BATCH, LENGTH, PAST_LEN, BLOCK_LEN = 2, sum(DOCUMENTS), 6, 5
STEP = 1e-5  # of the finite differences, whose error is that of the third derivative times its square
GRADIENT_TOLERANCE = 1e-5

CAUSES = {
    "shape": "it must return [B, L, D], or that and a scalar",
    "finite": "an overflow, or a division by 0",
    "repeat": "random numbers, as in nn.Dropout (framework.layers.dropout is a function of positions), or a state that "
    "the module keeps between calls",
    "no gradient": "forward does not use it, or detaches what it computes from it",
    "gradient": "a detach() or no_grad() on the way to it, or a wrong backward pass or adjoint of its own",
    "causality": "a sum, norm or convolution over all tokens, or span.halo with right > 0; where the mixer is meant to "
    "see later tokens, pass causal=False",
    "empty": "a rank may hold no token (L = 0)",
    "deadlock": "some ranks call a verb of the span that others do not call, forward or backward",
    "carry": "the carry depends on the rank",
    "elsewhere": "it reaches only the tokens that it is given in one call; those of other {} are reached by span.scan, "
    "span.halo and span.by_channel; or it keeps something besides the carry, or counts positions from 0 and not from "
    "span.position",
    "documents": "tokens see those of other documents: reset states where span.segments changes, and mask what a halo "
    "brings by span.halo_segments",
}

Results = dict[str, tuple[str, Tensor]]
"""By name, each with how the ranks' parts make the whole: "tokens" in a row, "sum" over ranks, "same" on all."""


def check_mixer(
    mixer: nn.Module | type[nn.Module] | str,
    width: int = 16,
    config: Any = None,
    *,
    causal: bool = True,
    ranks: int = 4,
    documents: bool = True,
    dtype: torch.dtype = torch.float64,
    timeout: float = TIMEOUT_SECONDS,
) -> None:
    """Check that a mixer computes the same however its sequence is processed.

    In this order: the output's shape, and that a second pass repeats it; every gradient, by finite differences;
    causality; shards on 2 to ``ranks`` processes, uneven and empty ones, from a carry and with documents, against the
    whole; streaming in blocks; decoding token by token; documents packed in one sequence against each alone. Inputs are
    random, weights are those of the mixer with random numbers added, both the same in each call. A module that is
    passed is copied.

    Args:
        mixer: a module whose ``forward(x [B, L, D], span)`` returns ``[B, L, D]``, or that and a penalty (a scalar);
            its class, which is made by ``(width, config, causal=causal)``; or the name of a registered mixer.
        width: D, of the module that is passed or to be made.
        config: options of a class or a name: its dataclass, or a mapping of its fields; None for the defaults.
        causal: whether tokens see only earlier ones. If not, causality, streaming and decoding are not checked.
        ranks: of the processes, 1 to 4; 1 starts none.
        documents: whether the mixer supports packed documents (``span.segments``).
        dtype: ``torch.float64``, with differences up to 1e-10 (relative RMS), or ``torch.float32``, up to 1e-5 and
            without finite differences.
        timeout: seconds after which ranks that wait for one another fail the check.

    Raises:
        AssertionError: in one line what differs, by how much, and the likely cause.
        InputError: the mixer cannot be made, or is not defined at the top level of a file, from which ranks import it.
    """
    if in_worker():  # a program's main file runs again in its ranks' processes
        return
    if dtype not in TOLERANCE:
        raise InputError("dtype", dtype, "torch.float64 or torch.float32")
    if not 1 <= ranks <= len(SHARDS[-1]):
        raise InputError("ranks", ranks, f"1 to {len(SHARDS[-1])}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = to_dtype(_made(mixer, width, config, causal).cpu(), dtype)
        for parameter in module.parameters():  # so that no gradient is zero by a zero weight
            parameter.data += 0.1 * torch.randn_like(parameter)
        check = _Check(mixer if isinstance(mixer, str) else type(module).__name__, module, width, causal, dtype)
        check.forward()
        check.gradients()
        packings = (False, True) if documents else (False,)
        if causal:
            check.causality()
        check.shards([shards for shards in SHARDS if len(shards) <= ranks], packings, timeout)
        if causal:
            for packed in packings:
                check.streaming(packed)
                check.decoding(packed)
        if documents:
            check.documents()


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The RMS error as a share of the RMS of ``expected``, which counts as ``floor`` where it is smaller."""
    if not expected.numel():
        return 0.0
    actual, expected = (torch.view_as_real(x) if x.is_complex() else x for x in (actual, expected))
    error, size = (x.double().square().mean().sqrt().item() for x in (actual.double() - expected, expected))
    return error / max(size, floor, 1e-300)


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a module's parameters and buffers in place: real ones to ``dtype``, complex ones to complex128 for fp64,
    else to complex64 (`torch.nn.Module.to` drops the imaginary parts).
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_complex():
            tensor.data = tensor.data.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
        elif tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module


def _made(mixer: nn.Module | type[nn.Module] | str, width: int, config: Any, causal: bool) -> nn.Module:
    if isinstance(mixer, nn.Module):
        return copy.deepcopy(mixer)
    name = mixer if isinstance(mixer, str) else next((name for name, made in MIXERS.items() if made is mixer), None)
    if name is None and not isinstance(mixer, str):
        return mixer(width, config, causal=causal)
    if name not in MIXERS:
        raise InputError("mixer", name, f"one of {', '.join(MIXERS)}", "import the file that registers it first")
    if config is None or isinstance(config, Mapping):
        given = config or {}
        config = options(name, given) if name in CONFIGS else dataclasses.replace(getattr(ModelConfig(), name), **given)
    return build_mixer(name, width, config, causal=causal)


@dataclass(frozen=True)
class _Check:
    """The checks of one mixer; each raises an `AssertionError` of one line."""

    name: str
    mixer: nn.Module
    width: int
    causal: bool
    dtype: torch.dtype

    def fail(self, what: str, cause: str) -> NoReturn:
        raise AssertionError(f"{self.name}: {what}; likely cause: {cause}")

    def compare(self, place: str, actual: Results, expected: Results, cause: str) -> None:
        for name, (how, wanted) in expected.items():
            found = actual[name][1]
            if found.shape != wanted.shape:
                self.fail(f"{place}: {name} has shape {list(found.shape)} instead of {list(wanted.shape)}", cause)
            error, limit = self.error(found, wanted), TOLERANCE[self.dtype]
            if not error <= limit:
                token = f", first at token {_first_difference(found, wanted)}" if how == "tokens" else ""
                self.fail(f"{place}: {name} differs by {error:.1e} (relative RMS, limit {limit:g}){token}", cause)

    def error(self, actual: Tensor, expected: Tensor) -> float:
        """Within the tolerance where it is that of rounding values of about 1."""
        return relative_error(actual, expected, 4 * torch.finfo(self.dtype).eps / TOLERANCE[self.dtype])

    def forward(self) -> None:
        x, _ = _data(self.width, LENGTH, self.dtype)
        found: list[Results] = []
        for _ in range(2):
            with torch.no_grad():
                y, penalty = _output(self.mixer(x, _span()))
            if y.shape != x.shape or penalty.dim():
                shapes = f"{list(y.shape)}" + (f" and a penalty {list(penalty.shape)}" if penalty.dim() else "")
                self.fail(f"for x {list(x.shape)}, forward returns {shapes}", CAUSES["shape"])
            if number := int((~y.isfinite()).sum()):
                self.fail(f"{number} of {y.numel()} outputs are not finite", CAUSES["finite"])
            found.append({"the output": ("tokens", y)})
        self.compare("a second pass", found[1], found[0], CAUSES["repeat"])

    def gradients(self) -> None:
        """Each gradient along a random direction, against central differences."""
        x, upstream = _data(self.width, LENGTH, self.dtype)
        trained = {f"parameter {key!r}": p for key, p in self.mixer.named_parameters() if p.requires_grad}
        tensors = {"x": x.requires_grad_(), **trained}

        def value() -> Tensor:
            y, penalty = _output(self.mixer(x, _span()))
            return (y * upstream).sum() + penalty

        total = value()
        if not total.requires_grad:
            self.fail("the output has no gradient", CAUSES["no gradient"])
        grads = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
        for (name, tensor), grad in zip(tensors.items(), grads, strict=True):
            if grad is None:
                self.fail(f"{name} has no gradient", CAUSES["no gradient"])
            if self.dtype != torch.float64:
                continue
            direction, values = torch.randn_like(tensor), []
            with torch.no_grad():
                for step in (STEP, -2 * STEP, STEP):
                    tensor += step * direction
                    values.append(value().item())
            numeric, terms = (values[0] - values[1]) / (2 * STEP), (grad.conj() * direction).real
            analytic = terms.sum().item()
            if not abs(numeric - analytic) <= GRADIENT_TOLERANCE * max(abs(numeric), terms.norm().item(), 1e-3):
                what = f"the gradient of {name}, along a random direction, is {analytic:.6g}"
                self.fail(f"{what}, but {numeric:.6g} by finite differences", CAUSES["gradient"])

    def causality(self) -> None:
        """Later tokens are replaced."""
        x, other = _data(self.width, LENGTH, self.dtype)
        with torch.no_grad():
            y = _output(self.mixer(x, _span()))[0]
            for length in range(LENGTH - 1, 0, -1):
                changed = _output(self.mixer(torch.cat([x[:, :length], other[:, length:]], 1), _span()))[0]
                error = self.error(changed[:, :length], y[:, :length])
                if not error <= TOLERANCE[self.dtype]:
                    token = _first_difference(changed[:, :length], y[:, :length])
                    what = f"causality: another token {length} changes the output of token {token}"
                    self.fail(f"{what}, by {error:.1e} (relative RMS of all before it)", CAUSES["causality"])

    def shards(self, layouts: Sequence[list[int]], packings: Sequence[bool], timeout: float) -> None:
        arguments = self.mixer, self.width, self.causal, self.dtype
        for shards in layouts:
            place = f"split over {len(shards)} ranks, shards of {shards} tokens"
            cases = [(shards, packed) for packed in packings]
            try:
                found = run_on_ranks(_run_shards, len(shards), *arguments, cases, timeout=timeout)
            except RankFailed as error:
                cause = CAUSES["elsewhere"].format("shards") if shards[error.rank] else CAUSES["empty"]
                self.fail(f"{place}: rank {error.rank} fails: {error.summary}", cause)
            except TimeoutError:
                self.fail(f"{place}: not all ranks returned within {timeout:g} s", CAUSES["deadlock"])
            for number, (_, packed) in enumerate(cases):
                whole = _run_shard(Axis(), *arguments, [sum(shards)], packed)
                ranks = [results[number] for results in found]
                where = place + _packed(packed)
                for rank, results in enumerate(ranks):
                    same = {name: results[name] for name, (how, _) in whole.items() if how == "same"}
                    self.compare(f"{where}, rank {rank}", same, {key: ranks[0][key] for key in same}, CAUSES["carry"])
                self.compare(where, _joined(ranks), whole, CAUSES["elsewhere"].format("shards"))

    def streaming(self, packed: bool) -> None:
        x, upstream = _data(self.width, LENGTH, self.dtype)
        ids = _documents() if packed else None
        whole = _run_blocks(self.mixer, x, upstream, [_span(segments=ids)])
        blocks = streaming.blocks(Mesh(), LENGTH, BLOCK_LEN, segments=ids, dropout_seeds=_SEEDS)
        place = f"streamed in blocks of {BLOCK_LEN} tokens{_packed(packed)}"
        self.compare(place, _run_blocks(self.mixer, x, upstream, blocks), whole, CAUSES["elsewhere"].format("blocks"))

    def decoding(self, packed: bool) -> None:
        x, _ = _data(self.width, LENGTH, self.dtype)
        ids = _documents() if packed else None
        with torch.no_grad():
            whole = _output(self.mixer(x, _span(segments=ids)))[0]
            span, rows = _span(keep_carry=True), []
            for token in range(LENGTH):
                span.segments = None if ids is None else ids[:, token : token + 1]
                rows.append(_output(self.mixer(x[:, token : token + 1], span))[0])
                span = span.next_block(1)
        found: Results = {"the output": ("tokens", torch.cat(rows, 1))}
        expected: Results = {"the output": ("tokens", whole)}
        self.compare(f"token by token{_packed(packed)}", found, expected, CAUSES["elsewhere"].format("calls"))

    def documents(self) -> None:
        x, upstream = _data(self.width, LENGTH, self.dtype)
        stops = list(accumulate(DOCUMENTS))
        packed = _run_blocks(self.mixer, x, upstream, [_span(segments=_documents())])
        spans = [_span(start=stop - length, lengths=[length]) for stop, length in zip(stops, DOCUMENTS, strict=True)]
        alone = [_run_blocks(self.mixer, x, upstream, [span], penalties=len(spans)) for span in spans]
        place = f"documents of {DOCUMENTS} tokens, packed in a sequence instead of each alone"
        self.compare(place, packed, _joined(alone), CAUSES["documents"])


_SEEDS = torch.tensor([5, 6])  # of dropout, for each row of the batch


def _span(**fields: Any) -> Span:
    return Span(dropout_seeds=_SEEDS, **fields)


def _data(width: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two random ``[B, length, D]``, the same in each call: inputs, and gradients of outputs."""
    draw = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, BATCH, length, width, dtype=dtype, generator=draw)
    return first, second


def _documents() -> Tensor:
    """Ids ``[B, LENGTH]`` of documents of `DOCUMENTS` tokens."""
    return torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS)).repeat(BATCH, 1)


def _packed(packed: bool) -> str:
    return ", packed documents" if packed else ""


def _output(y: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A mixer's output, and its penalty or 0."""
    return y if isinstance(y, tuple) else (y, y.new_zeros(()))


def _first_difference(actual: Tensor, expected: Tensor) -> int:
    """The first token of ``[B, L, ...]`` that differs by more than rounding."""
    error = (actual - expected).abs().flatten(2).amax(-1).amax(0)
    return int((error > error.max() * 1e-3).nonzero()[0])


def _run_blocks(mixer: nn.Module, x: Tensor, upstream: Tensor, spans: list[Span], penalties: int = 1) -> Results:
    """A pass, forward and backward, over the tokens of these spans, each of which continues the one before.

    ``penalties``: in how many such calls the penalty counts once.
    """
    x, rows = x.clone().requires_grad_(), {}

    def loss(span: Span) -> Tensor:
        y, penalty = _output(mixer(span.shard(x), span))
        rows[span.position] = y.detach()
        return (y * span.shard(upstream)).sum() + penalty / (penalties * len(spans))

    mixer.zero_grad()
    streaming.train(spans, lambda span: mixer(span.shard(x), span), loss, Tensor.backward)
    results: Results = {"the output": ("tokens", torch.cat([rows[start] for start in sorted(rows)], 1))}
    return results | {"the gradient of x": ("sum", _grad(x))} | _parameter_grads(mixer)


def _run_shards(
    axis: Axis, mixer: nn.Module, width: int, causal: bool, dtype: torch.dtype, cases: list[tuple[list[int], bool]]
) -> list[Results]:
    return [_run_shard(axis, mixer, width, causal, dtype, *case) for case in cases]


def _run_shard(
    axis: Axis, mixer: nn.Module, width: int, causal: bool, dtype: torch.dtype, shards: list[int], packed: bool
) -> Results:
    """A pass, forward and backward, of this rank's shard; of a causal mixer from a carry and to one, with gradients of
    both.
    """
    length = sum(shards)
    past, _ = _data(width, PAST_LEN + length, dtype)
    past, x = past.split([PAST_LEN, length], 1)
    _, upstream = _data(width, length, dtype)
    ids = (
        torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]]).repeat_interleave(-(-length // 4), 1)[:, :length] if packed else None
    )
    before = _span(keep_carry=True, segments=torch.zeros(BATCH, PAST_LEN, dtype=torch.int64) if packed else None)
    if causal:
        with torch.no_grad():
            mixer(past, before)
    carry = {key: Carry(value.state.clone().requires_grad_(), value.segment) for key, value in before.carry_out.items()}
    span = _span(axis=axis, lengths=shards, carry=carry, keep_carry=causal)
    x, upstream = (span.shard(part).clone() for part in (x, upstream))
    span.segments = None if ids is None else span.shard(ids)
    span.start = PAST_LEN if causal else 0
    y, penalty = _output(mixer(x.requires_grad_(), span))
    outputs, grads = [y, penalty / axis.size], [upstream, torch.ones_like(penalty)]
    draw = torch.Generator().manual_seed(3)
    for after in span.carry_out.values():
        outputs.append(after.state)
        grads.append(torch.randn(after.state.shape, dtype=after.state.dtype, generator=draw))
    with_graph = [number for number, output in enumerate(outputs) if output.requires_grad]
    mixer.zero_grad()
    torch.autograd.backward([outputs[number] for number in with_graph], [grads[number] for number in with_graph])
    results: Results = {"the output": ("tokens", y.detach()), "the gradient of x": ("tokens", _grad(x))}
    results |= _parameter_grads(mixer)
    results |= {f"the carry {key!r}": ("same", value.state.detach()) for key, value in span.carry_out.items()}
    return results | {f"the gradient of the carry {key!r}": ("same", _grad(one.state)) for key, one in carry.items()}


def _grad(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _parameter_grads(mixer: nn.Module) -> Results:
    """Every rank has all of them, a rank without tokens too: they are summed over the ranks."""
    results: Results = {}
    for name, parameter in mixer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"parameter {name!r} has no gradient"
            results[f"the gradient of parameter {name!r}"] = "sum", parameter.grad.clone()
    return results


def _joined(parts: Sequence[Results]) -> Results:
    """The whole that the parts make."""

    def join(name: str, how: str) -> Tensor:
        values = [part[name][1] for part in parts]
        return torch.cat(values, 1) if how == "tokens" else torch.stack(values).sum(0) if how == "sum" else values[0]

    return {name: (how, join(name, how)) for name, (how, _) in parts[0].items()}
