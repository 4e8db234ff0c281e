"""The small fused kernels, position-keyed dropout and RMS normalization, by Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import assert_close
from torch import Tensor

pytest.importorskip("triton")

import interpreted

from longreach.kernels import dropout as dropout_package
from longreach.kernels import gpu
from longreach.kernels import rms_norm as rms_norm_package
from longreach.kernels.dropout import dropout, reference_dropout
from longreach.kernels.rms_norm import reference_rms_norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreted kernels in place of the compiled ones."""
    monkeypatch.setattr(gpu, "unsupported_reason", lambda device, *dtypes: "")
    for package in (dropout_package, rms_norm_package):
        name = package.__name__.rsplit(".", 1)[-1]
        monkeypatch.setitem(sys.modules, f"{package.__name__}.triton", interpreted.load(name))
        monkeypatch.setattr(package, "triton", interpreted.load(name), raising=False)
    yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 70, 3, 11), (1, 1, 1), (3, 700, 4)], ids=str)
def test_dropout_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Catches a hash, a position or a row that differs: resuming on a CPU, or with other ranks, would change a run."""
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    seeds = torch.tensor([5, -(2**62), 2**63 - 1])[: shape[0]]
    arguments = 0.3, seeds, 2**33 + 7, 0xFFFFFFFF
    got, want = dropout(x, *arguments), reference_dropout(other, *arguments)
    assert got.grad_fn is not None and "Dropout" in type(got.grad_fn).__name__  # by the kernel
    assert torch.equal(got == 0, want == 0)
    limit = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]  # the interpreter truncates bf16
    assert_close("y", got, want, rel_rms=limit)
    grad = torch.randn_like(x)
    assert_close("dx", *(torch.autograd.grad(y, leaf, grad)[0] for y, leaf in ((got, x), (want, other))), rel_rms=limit)


def test_dropout_of_shards_is_that_of_the_whole() -> None:
    x, seeds = torch.ones(2, 100, 6), torch.tensor([3, 4])
    whole = dropout(x, 0.5, seeds, 10, 1)
    shards = [dropout(x[:, :37], 0.5, seeds, 10, 1), dropout(x[:, 37:], 0.5, seeds, 47, 1)]
    assert torch.equal(torch.cat(shards, dim=1), whole)
    assert 0.4 < float((whole == 0).float().mean()) < 0.6


def norms(x: Tensor, weight: Tensor, group: int, grad: Tensor, fused: bool) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = (rms_norm if fused else reference_rms_norm)(x, weight, group, 1e-3)
    return [y, *torch.autograd.grad(y, [x, weight], grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group"),
    [((2, 33, 24), 24), ((2, 33, 24), 8), ((1, 5, 640), 64), ((0, 7, 16), 16), ((1, 3, 3000), 3000), ((5000, 1), 1)],
    ids=str,
)
def test_norms_are_the_reference_in_fp64(shape: tuple[int, ...], group: int, dtype: torch.dtype) -> None:
    """Catches a channel beyond the group in a mean, a weight of another group, a token that no program sums."""
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    got = norms(x, weight, group, grad, True)
    want = norms(x.double(), weight.double(), group, grad.double(), False)
    limit = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for name, found, wanted in zip(("y", "dx", "dweight"), got, want, strict=True):
        assert found.dtype == dtype
        assert_close(name, found, wanted, rel_rms=limit)


def test_a_norm_keeps_the_dtype_of_x_under_fp32_weights() -> None:
    y = rms_norm(torch.randn(3, 8).bfloat16(), torch.ones(8), 8)
    assert y.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    x = torch.ones(1, 4, 8)
    x[0, 2, 3] = value
    for y in (dropout(x, 0.9, torch.tensor([1])), rms_norm(x, torch.ones(8), 8)):
        assert not y[0, 2].isfinite().all() and y[0, [0, 1, 3]].isfinite().all()
