"""What is not finite stays visible: in every operator, NaN and infinities reach all that depends on them, and no more.

The training loop finds a broken step by looking at its loss and gradients, so no kernel may turn NaN into a number: a
comparison, a clamp or a quotient easily does. Nor may it enter another document.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.kernels import delta_rule, elementwise, linear_attention, long_conv, modal_conv, native, short_conv
from longreach.kernels.gpu import OPTIONS, Tiling, Variant
from longreach.kernels.long_conv.chunked import LongConv
from longreach.kernels.scan import AffineMap, Carry, Diagonal, Matrix, scan
from longreach.kernels.short_conv.autograd import ConvBackend

VALUES = (math.nan, math.inf, -math.inf)
DOCUMENTS = (0.3, 0.8)  # where the second and the third one begin, as shares of the length
UPSTREAM = ("gradient of y", "gradient of state")

Run = Callable[..., tuple[Tensor, Carry]]


class Case(NamedTuple):
    """An operator in one setting.

    Attributes:
        reference: the definition, ``(*inputs, carry=, segments=) -> (y, carry)``.
        backends: the implementations by name, alike.
        inputs: makes the inputs, given a length and a number of lanes.
        state: makes the state of a carry, given a number of lanes.
        lanes: the dimension of activations along which nothing is mixed: one lane for each value.
        state_lanes: that of states.
        parameters: names of the inputs that have no tokens; their first dimension has the lanes.
        carries_tokens: whether the state is the last tokens, in the dtype of the activations.
        leaks: backends in which what is not finite may enter other documents, as tokens share a matrix product with a
            mask: 0 times NaN is NaN.
    """

    reference: Run
    backends: dict[str, Run]
    inputs: Callable[[int, int], dict[str, Tensor]]
    state: Callable[[int], Tensor]
    lanes: int = -1
    state_lanes: int = -1
    parameters: tuple[str, ...] = ()
    carries_tokens: bool = False
    leaks: tuple[str, ...] = ()


def _elementwise_case(causal: bool) -> Case:
    options: dict[str, Any] = {"order": 4, "causal": causal}

    def interpreted_triton(*inputs: Tensor, **given: Any) -> tuple[Tensor, Carry]:
        return scan(interpreted("elementwise").Triton(4, causal), *inputs, **given)

    return Case(
        partial(elementwise.reference_elementwise_attention, **options),
        _backends(elementwise.elementwise_attention, options, interpreted_triton),
        lambda length, lanes: dict(zip("qkv", torch.randn(3, 1, length, lanes).mul(0.7))),
        lambda lanes: torch.rand(1, 2, 5, lanes) + 1,
    )


def _linear_attention_case(**options: Any) -> Case:
    def interpreted_triton(*inputs: Tensor, **given: Any) -> tuple[Tensor, Carry]:
        settings = {"causal": True, "decay": None, "normalize": False, "eps": 1e-6, "scale": 1.0, **options}
        return scan(interpreted("linear_attention").Triton(**settings), *inputs, **given)

    def inputs(length: int, lanes: int) -> dict[str, Tensor]:
        q, k, v = torch.randn(3, lanes, length, 1, 4)
        return {"q": F.softplus(q), "k": F.softplus(k), "v": v}

    return Case(
        partial(linear_attention.reference_linear_attention, **options),
        _backends(linear_attention.linear_attention, options, interpreted_triton),
        inputs,
        lambda lanes: torch.rand(lanes, 1, 4, 4 + options.get("normalize", False)) + 0.1,
        lanes=0,
        state_lanes=0,
        leaks=("triton",),
    )


def _delta_rule_case() -> Case:
    def adapt(rule: Run, **options: Any) -> Run:
        def run(*inputs: Tensor, **given: Any) -> tuple[Tensor, Carry]:
            return rule(*inputs[:4], log_decay=inputs[4], **given, **options)

        return run

    def inputs(length: int, lanes: int) -> dict[str, Tensor]:
        q, k, v = torch.randn(3, lanes, length, 1, 4)
        beta, rate = torch.rand(2, lanes, length, 1) + 0.5
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": beta, "log_decay": -0.1 * rate}

    return Case(
        adapt(delta_rule.reference_delta_rule),
        {name: adapt(delta_rule.delta_rule, backend=name) for name in ("reference", "chunked", "cpu")},
        inputs,
        lambda lanes: torch.rand(lanes, 1, 4, 4) + 0.1,
        lanes=0,
        state_lanes=0,
    )


def _gated_linear_attention_case() -> Case:
    def by_name(run: Run) -> Run:
        return lambda q, k, v, log_decay, **given: run(q, k, v, log_decay=log_decay, **given)

    def inputs(length: int, lanes: int) -> dict[str, Tensor]:
        return plain.inputs(length, lanes) | {"log_decay": -torch.rand(lanes, length, 1)}

    plain = _linear_attention_case()
    backends = {name: run if name == "triton" else by_name(run) for name, run in plain.backends.items()}
    return plain._replace(reference=by_name(plain.reference), backends=backends, inputs=inputs)


def _short_conv_case(**options: Any) -> Case:
    def interpreted_triton(*inputs: Tensor, **given: Any) -> tuple[Tensor, Carry]:
        module = interpreted("short_conv")
        return ConvBackend(module.forward, module.backward)(*inputs, **given, **options)

    def inputs(length: int, lanes: int) -> dict[str, Tensor]:
        return {"x": torch.randn(1, length, lanes), "weight": torch.randn(lanes, 4), "bias": torch.randn(lanes)}

    return Case(
        partial(short_conv.reference_short_conv, **options),
        _backends(short_conv.short_conv, options, interpreted_triton),
        inputs,
        lambda lanes: torch.randn(1, 3, lanes),
        parameters=("weight", "bias"),
        carries_tokens=True,
    )


def _long_conv_case(causal: bool) -> Case:
    def interpreted_triton(*inputs: Tensor, **given: Any) -> tuple[Tensor, Carry]:
        module = interpreted("long_conv")
        return LongConv(module.forward, module.backward)(*inputs, **given, causal=causal)

    def inputs(length: int, lanes: int) -> dict[str, Tensor]:
        return {"x": torch.randn(1, length, lanes), "kernel": torch.randn(lanes, 20), "skip": torch.randn(lanes)}

    return Case(
        partial(long_conv.reference_long_conv, causal=causal),
        _backends(long_conv.long_conv, {"causal": causal}, interpreted_triton),
        inputs,
        lambda lanes: torch.randn(1, 19, lanes),
        parameters=("kernel", "skip"),
        carries_tokens=True,
    )


def _modal_conv_case() -> Case:
    def inputs(length: int, lanes: int) -> dict[str, Tensor]:
        parameters = zip(("log_decay", "angle", "re", "im"), torch.randn(4, lanes, 2))
        return {"x": torch.randn(1, length, lanes), **dict(parameters)}

    def backend(name: str) -> Run:
        return lambda *inputs, **given: scan(modal_conv.ModalConv(backend=name), *inputs, **given)

    return Case(
        modal_conv.reference_modal_conv,
        {
            "reference": modal_conv.reference_modal_conv,
            "chunked": backend("chunked"),
            "cpu": backend("cpu"),
            "triton": lambda *inputs, **given: scan(interpreted("modal_conv").Triton(), *inputs, **given),
        },
        inputs,
        lambda lanes: torch.randn(1, lanes, 2, dtype=torch.complex64),
        state_lanes=1,
        parameters=("log_decay", "angle", "re", "im"),
    )


def _backends(public: Run, options: dict[str, Any], triton: Run) -> dict[str, Run]:
    return {name: partial(public, backend=name, **options) for name in ("reference", "chunked", "cpu")} | {
        "triton": triton
    }


def interpreted(operator: str) -> Any:
    from interpreted import load

    return load(operator)


CASES = {
    "elementwise": _elementwise_case(causal=True),
    "elementwise both": _elementwise_case(causal=False),
    "linear_attention": _linear_attention_case(),
    "linear_attention decay": _linear_attention_case(decay=(0.9,)),
    "linear_attention log_decay": _gated_linear_attention_case(),
    "linear_attention normalize": _linear_attention_case(normalize=True),
    "linear_attention both normalize": _linear_attention_case(causal=False, normalize=True),
    "delta_rule": _delta_rule_case(),
    "short_conv": _short_conv_case(),
    "short_conv both silu": _short_conv_case(causal=False, activation="silu"),
    "long_conv": _long_conv_case(causal=True),
    "long_conv both": _long_conv_case(causal=False),
    "modal_conv": _modal_conv_case(),
}


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Chunks so short that a few tokens fill several."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(elementwise.chunked, "CHUNK_LEN", 8)
        patch.setattr(linear_attention.chunked, "MIN_CHUNK", 8)
        if find_spec("triton"):
            tile = {"ROWS": 2, "COLS": 64}
            patch.setattr(interpreted("elementwise"), "CHUNK", 4)
            patch.setattr(interpreted("elementwise"), "CHUNK_STATES_TILE", tile)
            tilings = dict.fromkeys(interpreted("elementwise").TILINGS, (Tiling(tile, num_warps=1),))
            patch.setattr(interpreted("elementwise"), "TILINGS", tilings)
            patch.setattr(interpreted("linear_attention"), "MIN_SPLIT", 32)
            patch.setattr(interpreted("short_conv"), "MIN_CHUNK", 16)
            patch.setattr(interpreted("short_conv"), "CHANNELS", 64)
            patch.setattr(interpreted("long_conv"), "TILINGS", (Tiling({"TOKENS": 32, "CHANNELS": 64}, 4),))
            patch.setattr(interpreted("long_conv"), "POINTS", 128)
        yield


# Interpreted in seconds: with documents, or without.
SLOW = {
    "linear_attention": False,
    "linear_attention decay": True,
    "linear_attention log_decay": True,
    "linear_attention normalize": False,
    "linear_attention both normalize": True,
}


class Spoil(NamedTuple):
    """What is not finite in one lane: one number of a tensor."""

    tensor: str
    which: int  # the first (0) or the last (-1) number of the second document, of a state or of a parameter
    value: float


def results(run: Run, tensors: dict[str, Tensor], segments: Tensor | None, ids: Tensor | None) -> dict[str, Tensor]:
    """y, the final state, and the gradients of the inputs and of the state before them, by name.

    Args:
        run: an implementation.
        tensors: the inputs, "state", and those of `UPSTREAM`.
        segments: the document ids of the inputs, or None.
        ids: those of the state.
    """
    given = {name: x for name, x in tensors.items() if name not in UPSTREAM}
    leaves = [x.detach().clone().requires_grad_() for x in given.values()]
    y, after = run(*leaves[:-1], carry=Carry(leaves[-1], ids), segments=segments)
    upstream = [tensors[name].to(x.dtype) for name, x in zip(UPSTREAM, (y, after.state))]
    grads = torch.autograd.grad([y, after.state], leaves, upstream, materialize_grads=True)
    found = {"y": y, "final state": after.state, **{f"gradient of {name}": x for name, x in zip(given, grads)}}
    return {name: x.detach() for name, x in found.items()}


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(torch.complex128 if x.is_complex() else torch.float64) for name, x in tensors.items()}


def problems(case: Case, backend: str, *, documents: bool, length: int) -> list[str]:
    """Every result that is finite where it depends on what is not, or not finite in another document.

    What depends on a number is found by the definition: what changes where that number is moved a little.
    """
    names = [*case.inputs(1, 1), "state", *UPSTREAM]
    ends = dict.fromkeys(names, (0, -1)) | dict.fromkeys(case.parameters, (-1,))
    if backend in case.leaks:  # which makes the end of a document a place like any other
        ends = {name: which if "state" in name else (0,) for name, which in ends.items()}
    spoils = [
        Spoil(name, which, value)
        for name in names
        for which in ends[name]
        for value in VALUES
        if not (name == "log_decay" and math.isinf(value))  # a decay of 0, or of 1
    ]
    tensors = case.inputs(length, len(spoils)) | {"state": case.state(len(spoils))}
    tokens_like = tensors["v" if "v" in tensors else "x"]
    tensors |= {UPSTREAM[0]: torch.randn_like(tokens_like), UPSTREAM[1]: torch.randn_like(tensors["state"])}
    second = slice(*(int(share * length) for share in DOCUMENTS))
    segments = ids = None
    if documents:
        position = torch.arange(length).expand(tokens_like.shape[0], -1)
        segments = 3 + (position >= second.start).long() + (position >= second.stop)
        ids = segments[:, :1].expand(case.state(1).shape[:2]) if case.carries_tokens else segments[:, 0]

    def lanes(name: str) -> int:
        return case.state_lanes if "state" in name else 0 if name in case.parameters else case.lanes

    moved, spoilt = ({name: x.clone() for name, x in tensors.items()} for _ in range(2))
    for lane, (name, which, value) in enumerate(spoils):
        index = torch.arange(tensors[name].numel()).view(tensors[name].shape)
        if name not in case.parameters and "state" not in name:
            index = index[:, second]
        place = index.select(lanes(name), lane).flatten()[which]
        moved[name].view(-1)[place] += 0.3
        spoilt[name].view(-1)[place] = value

    before, after = (results(case.reference, wide(x), segments, ids) for x in (tensors, moved))
    told = []
    for name, x in results(case.backends[backend], spoilt, segments, ids).items():
        of = name.removeprefix("gradient of ")
        changed = (after[name] - before[name]).abs() > 1e-9
        for lane, spoil in enumerate(spoils):
            depends, finite = (mask.select(lanes(of), lane) for mask in (changed, x.isfinite()))
            hidden = int((finite & depends).sum())
            if hidden:
                told.append(f"{spoil} is hidden in {hidden} of {int(depends.sum())} numbers of {name}")
            if segments is None or backend in case.leaks or {of, spoil.tensor} & set(case.parameters):
                continue
            if "state" in of and "state" in spoil.tensor:
                continue
            foreign = ~depends
            if "state" not in of:
                own = {"state": 0, "gradient of state": -1}.get(spoil.tensor, second.start)
                other = segments[0] != segments[0, own]  # all rows have the same documents
                foreign &= other.view(-1, *(1 for _ in foreign.shape[1:])) if case.lanes == 0 else other
            entered = int((foreign & ~finite).sum())
            if entered:
                told.append(f"{spoil} enters {entered} of {int(foreign.sum())} foreign numbers of {name}")
    return told


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_finite_stays_visible(name: str, backend: str, documents: bool) -> None:
    """Catches clamps, floors, exponentials and quotients that hide NaN or an infinity, and masks that multiply by 0."""
    case = CASES[name]
    if backend not in case.backends:
        pytest.skip("there is none")
    if backend == "triton":
        pytest.importorskip("triton")
        if name in SLOW and documents != SLOW[name]:
            pytest.skip("slow when interpreted")
    if backend == "cpu" and native.compiler() == []:
        pytest.skip("no C++ compiler")
    for length in (20,) if backend == "triton" else (12, 80):
        assert not problems(case, backend, documents=documents, length=length)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("linear_attention", "delta_rule"))])
def test_documents_beside_it_do_not_change(name: str, backend: str) -> None:
    """NaN or an infinity in the first document: outputs, gradients and states of the others keep every bit."""
    if backend == "cpu" and native.compiler() == []:
        pytest.skip("no C++ compiler")
    case, length = CASES[name], 150
    tensors = case.inputs(length, 1) | {"state": case.state(1)}
    tensors |= {UPSTREAM[0]: torch.randn_like(tensors["v"]), UPSTREAM[1]: torch.randn_like(tensors["state"])}
    position = torch.arange(length)
    segments = sum((position >= start).long() for start in (37, 41, 70, 128)).unsqueeze(0)
    ids, others = segments[:, 0], segments[0] > 0
    before = results(case.backends[backend], tensors, segments, ids)
    for spoilt in (*case.inputs(1, 1), "state", UPSTREAM[0]):
        if spoilt == "log_decay" and backend != "cpu":
            continue  # sums of logarithms go through documents, and round to other last bits
        for token, value in product((0, 36), (math.nan, math.inf)):
            given = {one: x.clone() for one, x in tensors.items()}
            given[spoilt].select(1, 0 if spoilt == "state" else token).flatten()[0] = value
            found = results(case.backends[backend], given, segments, ids)
            if math.isnan(value):
                assert not all(x.isfinite().all() for x in found.values()), (spoilt, token)
            for result, x in found.items():
                if result != "gradient of state":
                    kept = (x, before[result]) if "state" in result else (x[:, others], before[result][:, others])
                    assert torch.equal(*kept), (spoilt, token, value, result)


def test_a_transition_of_zero_stops_it() -> None:
    """A is 0 where a document begins; a state before it, or another A, may hold anything."""
    spoilt, bias = torch.full((1, 2, 3, 3), math.nan), torch.randn(1, 2, 3, 3)
    for one in (Diagonal(torch.zeros(1, 1, 1, 1)), Matrix(torch.zeros(1, 2, 3, 3))):
        assert torch.equal(AffineMap(one, bias).apply(spoilt), bias)
        assert torch.equal(type(one)(one.tensor + math.nan).then(one).tensor, one.tensor)
        out = torch.empty(bias.numel())
        for piece, part in one.sections(spoilt, 2):
            part.affine(spoilt.flatten()[piece], bias.flatten()[piece], out[piece])
        assert torch.equal(out, bias.flatten())
        passing = type(one)(one.tensor + 1)
        assert not AffineMap(passing, bias).apply(spoilt).isfinite().any()


def test_complex_states_may_lie_anywhere_in_memory() -> None:
    """Catches torch's `where`, which ends the process where a complex number begins between multiples of 16 bytes."""
    memory = bytearray(8 * 129)
    for offset in (0, 8):  # a storage of its own begins there, as that of a tensor in a file
        numbers = torch.frombuffer(memory, dtype=torch.float64, offset=offset, count=128)
        state = torch.view_as_complex(numbers.copy_(torch.arange(128)).view(1, 64, 2))
        for a in (torch.zeros(1, 64, dtype=torch.complex128), torch.ones(1, 64, dtype=torch.complex128)):
            assert torch.equal(Diagonal(a).apply(state), a * state)


def test_compiled_clamps_keep_nan() -> None:
    """Catches ``max.f32``, which returns the number beside NaN; the interpreter has no instructions."""
    pytest.importorskip("triton")
    for operator, start in (
        ("elementwise", "output bfloat16 order=6 running=False"),
        ("linear_attention", "mean-grad"),
    ):
        module = importlib.import_module(f"longreach.kernels.{operator}.triton")
        (variant,) = (one for one in module.variants() if one.name.startswith(start))
        assert not re.findall(r"m(?:ax|in)\.(?!NaN)[.\w]*f32", text := ptx(variant))
        assert "max.NaN.f32" in text


def ptx(variant: Variant) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants))
    options = {"num_warps": variant.num_warps, **OPTIONS}
    text: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return text
