"""The public interface: what ``import longreach`` offers and costs, and old names that still work."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

import longreach
from longreach import _aliases
from longreach.kernels import scan as scan_module
from longreach.kernels.state import StatefulOp
from longreach.parallel.span import Span

ROOT = Path(longreach.__file__).parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_documented() -> None:
    assert len(longreach.__all__) == 12 and set(longreach.__all__) <= set(dir(longreach))
    for name in longreach.__all__:
        assert getattr(longreach, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = longreach.nothing


def test_the_import_is_light() -> None:
    """Neither torch's compiler nor DeepSpeed, not even where every public name but ``train`` is used."""
    heavy = (
        "[name for name in ('torch._dynamo', 'torch._inductor', 'deepspeed', 'transformers') if name in sys.modules]"
    )
    code = f"""
import sys, longreach
assert 'torch' not in sys.modules
for name in longreach.__all__:
    getattr(longreach, name)
print({heavy})
"""
    assert run(code).strip() == "[]"


def test_the_package_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()


@pytest.mark.parametrize(("old", "new"), _aliases.MODULES.items())
def test_a_module_is_found_by_its_old_name(old: str, new: str) -> None:
    if "huggingface" in old:
        pytest.importorskip("transformers")
    sys.modules.pop(f"longreach.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"longreach.{old} is deprecated: write longreach.{new}"):
        found = import_module(f"longreach.{old}")
    assert found is import_module(f"longreach.{new}")


def test_a_program_is_found_by_its_old_name() -> None:
    words = [sys.executable, "-m", "longreach.launch.links", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "latency" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(module, old, new) for module, names in _aliases.ATTRIBUTES.items() for old, new in names.items()],
)
def test_an_attribute_is_found_by_its_old_name(module: str, old: str, new: str) -> None:
    home = import_module(f"longreach.{module}")
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated: write .*{new}"):
        place, _, last = new.rpartition(".")
        assert getattr(home, old) is getattr(import_module(f"longreach.{place}") if place else home, last)
    with pytest.raises(AttributeError):
        _ = home.never_there


def test_an_operator_with_the_old_methods_scans() -> None:
    """``y_i = s_i = s_{i-1} + x_i``, by the method names of 0.1."""
    with pytest.warns(DeprecationWarning, match=r"Total\.(summarize|attend) is deprecated"):

        class Total(StatefulOp):
            def summarize(self, inputs: tuple[Tensor, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
                return inputs[0].new_ones(1, 1), inputs[0].sum(1)

            def attend(
                self, inputs: tuple[Tensor, ...], segments: Tensor | None, past: Tensor
            ) -> tuple[Tensor, tuple[Tensor, ...]]:
                return past.unsqueeze(1) + inputs[0].cumsum(1), ()

    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    y, carry = scan_module.scan(Total(), x)
    assert torch.equal(y, x.cumsum(1)) and torch.equal(carry.state, x.sum(1))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.arange(5, 0, -1).view(1, 5, 1).expand(2, 5, 3).double())


def test_a_span_takes_the_old_names() -> None:
    seeds = torch.tensor([1, 2])
    with pytest.warns(DeprecationWarning) as warned:
        span = Span(noise=seeds, remember=True)
    assert "Span(noise=...) is deprecated: write Span(dropout_seeds=...)" in [str(one.message) for one in warned]
    assert span.dropout_seeds is seeds and span.cache_collectives
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert span.at("layer").layer == "layer"
        assert span.entered({}).carry == {}
        assert span.following(5).start == 5
        assert span.take(seeds) is seeds
        assert span.noise is seeds and span.remember


def test_carries_of_format_1_have_keys_in_format_2() -> None:
    keys = ["blocks.0.halo0", "blocks.0.scan1", "blocks.1.halo0", "blocks.1.scan1", "blocks.1.scan2", "pool.scan0"]
    keys += ["blocks.2.by_channel0"]
    assert [_aliases.carry_key(key, keys) for key in keys] == [
        "blocks.0.halo",
        "blocks.0.scan",
        "blocks.1.halo",
        "blocks.1.long_conv",
        "blocks.1.scan",
        "pool.scan",
        "blocks.2.by_channel",
    ]
