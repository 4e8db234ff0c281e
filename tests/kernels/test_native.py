"""C++ kernels for CPUs: how they are compiled, and that they read and write nothing but what they should."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import finish, python, start
from torch import Tensor

from longreach.errors import InputError
from longreach.kernels.elementwise import ElementwiseAttention, elementwise_attention
from longreach.kernels.elementwise import cpu as elementwise_cpu
from longreach.kernels.linear_attention import LinearAttention, linear_attention
from longreach.kernels.linear_attention import cpu as linear_cpu
from longreach.kernels.scan import Carry, scan
from longreach.kernels.short_conv import cpu as short_cpu
from longreach.kernels.short_conv import short_conv

TIMEOUT = 120.0

# What a user sees who looks at no log: warnings and errors.
THREE_OPERATORS = """
import torch
from longreach.kernels.elementwise import elementwise_attention
from longreach.errors import InputError
from longreach.kernels.linear_attention import linear_attention
from longreach.kernels.short_conv import short_conv

q = torch.randn(1, 70, 3, 16)
x, weight = q.flatten(2), torch.randn(48, 4)
for _ in range(2):
    for operator, inputs in (
        (elementwise_attention, (x, x, x)), (linear_attention, (q, q, q)), (short_conv, (x, weight))
    ):
        assert operator(*inputs)[0].equal(operator(*inputs, backend="chunked")[0])
try:
    elementwise_attention(x, x, x, backend="cpu")
except InputError as error:
    print(error)
"""

# That of the kernels which compiles fast.
COMPILED = """
import torch
from longreach.kernels.linear_attention import linear_attention

q = torch.randn(1, 70, 3, 16)
y, want = (linear_attention(q, q, q, backend=backend)[0] for backend in ("cpu", "chunked"))
assert torch.allclose(y, want, rtol=1e-4, atol=1e-3)
"""


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


compiles = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the processes that a test starts keep what they compile; empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "longreach"


def assert_one_library(place: Path) -> None:
    (library,) = place.iterdir()
    assert library.name.startswith("linear_attention-") and library.suffix == ".so"


def test_no_compiler(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once for all operators; the portable implementations run; whoever insists is told in one line."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = python("-c", THREE_OPERATORS, cwd=tmp_path, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("CPU kernels need a C++ compiler (g++ or clang++ in PATH, or named by CXX);")
    (told,) = done.stdout.splitlines()
    assert told.startswith("elementwise_attention: backend = 'cpu': CPU kernels need a C++ compiler")
    assert told.endswith("pass backend='auto'")


@pytest.mark.parametrize("words", [b"out of luck", b"out of luck \xe9\xff"], ids=["ascii", "no utf-8"])
def test_a_compiler_that_fails(words: bytes, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once for each source, with the compiler's own words; nothing half-made is left."""
    compiler = tmp_path / "compiler"
    compiler.write_bytes(b"#!/bin/sh\necho '" + words + b"' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    done = python("-c", THREE_OPERATORS, cwd=tmp_path, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    warnings = done.stderr.splitlines()
    assert len(warnings) == 3
    for line in (*warnings, *done.stdout.splitlines()):
        assert "CPU kernels need a C++ compiler that works" in line and "out of luck" in line
    assert done.stdout.count("\n") == 1
    assert list(cache.iterdir()) == []


@compiles
def test_the_next_process_compiles_nothing(tmp_path: Path, cache: Path) -> None:
    listings = []
    for _ in range(2):
        done = python("-c", COMPILED, cwd=tmp_path, timeout=TIMEOUT)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert_one_library(cache)
        listings.append([(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.iterdir()])
    assert listings[0] == listings[1]


@compiles
def test_processes_that_compile_at_once(tmp_path: Path, cache: Path) -> None:
    processes = [start("-c", COMPILED, cwd=tmp_path) for _ in range(2)]
    for done in [finish(process, TIMEOUT) for process in processes]:
        assert done.returncode == 0 and done.stderr == "", done.stderr
    assert_one_library(cache)


@compiles
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_written(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    done = python("-c", COMPILED, cwd=tmp_path, timeout=TIMEOUT)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "file").read_bytes() == b""


# What follows runs the kernels in this process.


def skip_unless_compiled() -> None:
    lacks = (
        elementwise_cpu.unsupported_reason("cpu", torch.float32, 6),
        linear_cpu.unsupported_reason("cpu", torch.float32, torch.float32, 5, 6),
        short_cpu.unsupported_reason("cpu", torch.float32, torch.float32, 4),
    )
    for lack in filter(None, lacks):
        pytest.skip(lack)


def lay(x: Tensor, kind: str) -> Tensor:
    """``x`` in another layout, NaN where nothing should be read; "expanded" has the values of its first token only."""
    nothing = torch.full_like(x, torch.nan)
    if kind == "elements apart":
        return torch.stack([x, nothing], dim=-1)[..., 0]
    if kind == "tokens apart":
        return torch.stack([x, nothing], dim=2)[:, :, 0]
    if kind == "rows apart":
        return torch.stack([x, nothing], dim=1)[:, 0]
    if kind == "channels first":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if kind == "tokens first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    assert kind == "expanded"
    return x[:, :1].expand_as(x)


def results(run: Callable[..., tuple[Tensor, Carry]], inputs: Sequence[Tensor], state: Tensor, grad: Tensor) -> Any:
    leaves = [x.detach().requires_grad_() for x in (*inputs, state)]
    y, end = run(*leaves[:-1], carry=Carry(leaves[-1]))
    return [y, end.state, *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize(
    "kind", ["elements apart", "tokens apart", "rows apart", "channels first", "tokens first", "expanded"]
)
@pytest.mark.parametrize("operator", ["elementwise", "elementwise, padded", "linear_attention", "short_conv"])
def test_any_layout(operator: str, kind: str) -> None:
    """Inputs, what was carried and the upstream gradient may lie in memory as they like."""
    skip_unless_compiled()
    width = 20 if operator == "elementwise, padded" else 16
    tokens = torch.randn(3, 2, 70, width) * 0.5
    run: Callable[..., tuple[Tensor, Carry]] = elementwise_attention
    views, state = [lay(x, kind) for x in tokens], torch.rand(2, 2, 7, width)
    if operator == "linear_attention":
        run = linear_attention
        views, state = [lay(x.unflatten(-1, (2, -1)), kind) for x in tokens], torch.randn(2, 2, 8, 8)
    elif operator == "short_conv":
        run = short_conv
        views, state = [views[0], torch.randn(4, width).t(), torch.randn(2 * width)[::2]], torch.randn(2, 3, width)
    state, grad = lay(state, kind), lay(torch.randn(views[0].shape), kind)
    assert not views[0].is_contiguous() and not state.is_contiguous() and not grad.is_contiguous()

    def by(backend: str, *given: Any) -> Any:
        return results(lambda *x, carry: run(*x, carry=carry, backend=backend), *given)

    plain = [x.contiguous() for x in views], state.contiguous(), grad.contiguous()
    got, same, want = by("cpu", views, state, grad), by("cpu", *plain), by("chunked", *plain)
    for number, (x, other, truth) in enumerate(zip(got, same, want, strict=True)):
        name = ("y", "final state")[number] if number < 2 else f"gradient of input {number - 2}"
        assert x.equal(other), name
        told = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(x, truth, rtol=1e-4, atol=1e-4, msg=told)


NANS = {
    torch.float32: [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001],
    torch.bfloat16: [0x7FC0, 0x7FFF, -1, 0x7F81],
}
every_nan = pytest.mark.parametrize(
    "nan",
    [
        torch.tensor(bits, dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
        for dtype, patterns in NANS.items()
        for bits in patterns
    ],
    ids=[f"{dtype}-{bits & 0xFFFFFFFF:x}" for dtype, patterns in NANS.items() for bits in patterns],
)
PLACES = [0, 45, 66, 69]  # tokens: the first, in a chunk, in the next one, the last


def where(x: Tensor, *index: Any) -> Tensor:
    """What is NaN if nothing but ``x[index]`` is."""
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[index] = True
    return mask


@every_nan
@pytest.mark.parametrize("width", [16, 20])
def test_nan_in_elementwise(nan: Tensor, width: int) -> None:
    """Shows in its channel: of q at its token, of k and v from its token on or everywhere; gradients likewise."""
    skip_unless_compiled()
    for token in PLACES:
        for name in range(4):
            tensors = (torch.randn(4, 2, 70, width) * 0.5).to(nan.dtype).unbind()
            tensors[name][1, token, 7] = nan
            *inputs, grad = (x.clone() for x in tensors)
            if name < 3:
                for causal in (True, False):
                    y, _ = elementwise_attention(*inputs, causal=causal, backend="cpu")
                    seen = token if name == 0 else slice(token if causal else 0, None)
                    assert y.isnan().equal(where(y, 1, seen, 7)), (token, name, causal)
                continue
            leaves = [x.requires_grad_() for x in inputs]
            y, _ = elementwise_attention(*leaves, backend="cpu")
            dq, dk, dv = torch.autograd.grad(y, leaves, grad)
            assert dq.isnan().equal(where(y, 1, token, 7))
            for dx in (dk, dv):
                assert dx.isnan().equal(where(y, 1, slice(token + 1), 7))


@every_nan
@pytest.mark.parametrize("normalize", [False, True])
def test_nan_in_linear_attention(nan: Tensor, normalize: bool) -> None:
    """Shows in its head from its token on, and in no chunk of 32 tokens before: a masked product of it is NaN too."""
    skip_unless_compiled()
    for token in PLACES:
        chunk = token // 32 * 32
        for name, width in enumerate((5, 5, 6)):
            inputs = [torch.rand(2, 70, 3, n).to(nan.dtype) for n in (5, 5, 6)]
            inputs[name][1, token, 2, width - 1] = nan
            y, _ = linear_attention(*inputs, normalize=normalize, backend="cpu")
            channels = slice(5, None) if name == 2 else slice(None)
            tokens = token if name == 0 else slice(token, None)
            must = where(y, 1, tokens, 2, channels)
            may = must if name == 0 else where(y, 1, slice(chunk, None), 2, channels)
            assert y.isnan()[must].all() and not y.isnan()[~may].any(), (token, name)


@every_nan
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [16, 21])
def test_nan_in_short_conv(nan: Tensor, width: int, activation: str | None) -> None:
    """Shows in its channel, at the tokens that a tap reaches it from; a NaN in a channel's taps shows everywhere."""
    skip_unless_compiled()
    channel = width - 1
    for token in PLACES:
        x, weight = torch.randn(2, 70, width).to(nan.dtype), torch.randn(width, 4).to(nan.dtype)
        x[1, token, channel] = nan
        y, _ = short_conv(x, weight, activation=activation, backend="cpu")
        assert y.isnan().equal(where(y, 1, slice(token, token + 4), channel))
    x, weight = torch.randn(2, 70, width).to(nan.dtype), torch.randn(width, 4).to(nan.dtype)
    weight[channel, 3] = nan
    y, _ = short_conv(x, weight, activation=activation, backend="cpu")
    assert y.isnan().equal(where(y, slice(None), slice(None), channel))


ONE_IS_WRONG = {"k": {1: 50}, "v": {1: 50}, "q": {1: 50}, "k, rows": {0: 1}, "v, rows": {0: 3}, "k, channels": {-1: 8}}


@pytest.mark.parametrize("backend", ["auto", "cpu", "chunked"])
@pytest.mark.parametrize("name", ONE_IS_WRONG)
def test_shapes_that_do_not_fit(name: str, backend: str) -> None:
    """Given straight to `scan`, as a mixer does: refused rather than read beyond their end."""
    if backend == "cpu":
        skip_unless_compiled()
    for op, shape in (
        (ElementwiseAttention(backend=backend), [2, 70, 16]),
        (LinearAttention(backend=backend), [2, 70, 3, 16]),
    ):
        wrong = list(shape)
        for dim, size in ONE_IS_WRONG[name].items():
            wrong[dim] = size
        inputs = [torch.randn(wrong if name[0] == own else shape) for own in "qkv"]
        with pytest.raises(InputError, match="shapes of q, k, v"):
            scan(op, *inputs)
        with pytest.raises(InputError, match="shapes of q, k, v"):
            scan(op, *(torch.randn(shape[1:]) for _ in range(3)))


@pytest.mark.parametrize("shape", [[2, 69], [1, 70], [3, 70], [70], [2, 70, 1]], ids=str)
def test_documents_that_do_not_fit(shape: list[int]) -> None:
    for op, inputs in (
        (ElementwiseAttention(), torch.randn(3, 2, 70, 16)),
        (LinearAttention(), torch.randn(3, 2, 70, 3, 16)),
    ):
        with pytest.raises(InputError, match="segments"):
            scan(op, *inputs, segments=torch.zeros(shape, dtype=torch.int64))


def test_decays_that_do_not_fit() -> None:
    skip_unless_compiled()
    with pytest.raises(InputError, match="decay"):
        scan(LinearAttention(decay=(0.9,), backend="cpu"), *torch.randn(3, 2, 70, 3, 16))
