"""`longreach.testing.check_mixer`: right mixers pass, and each mistake is told with its place and its cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from programs import python
from torch import Tensor, nn

from longreach.errors import InputError
from longreach.framework.layers import dropout
from longreach.parallel.local_ranks import RankFailed, run_on_ranks
from longreach.parallel.mesh import Axis
from longreach.parallel.span import Span
from longreach.testing import check_mixer


class Mixer(nn.Module):
    """A matrix product of each token; `mix` is added."""

    def __init__(self, width: int, config: object = None, *, causal: bool = True) -> None:
        super().__init__()
        self.matrix = nn.Linear(width, width)

    def forward(self, x: Tensor, span: Span) -> Tensor | tuple[Tensor, Tensor]:
        return self.matrix(x) + self.mix(x, span)

    def mix(self, x: Tensor, span: Span) -> Tensor:
        """The token before, of the same document."""
        y, ids = span.halo(x, 1)[:, :-1], span.halo_segments(1)
        return y if ids is None else y * (ids[:, 1:] == ids[:, :-1]).unsqueeze(-1)


class Dropout(Mixer):
    def forward(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        return dropout(super().forward(x, span), 0.5, span, "mixer"), self.matrix.weight.square().sum()


class Complex(Mixer):
    """A complex parameter and a buffer, as in some state-space models."""

    def __init__(self, width: int, config: object = None, *, causal: bool = True) -> None:
        super().__init__(width)
        self.mode = nn.Parameter(torch.randn(width, dtype=torch.complex64))
        self.register_buffer("count", torch.ones(1, dtype=torch.int64))

    def mix(self, x: Tensor, span: Span) -> Tensor:
        return (super().mix(x, span) * self.mode * self.mode).real * self.count


class NoParameters(Mixer):
    def __init__(self, width: int, config: object = None, *, causal: bool = True) -> None:
        super().__init__(width)
        self.matrix = nn.Identity()


class InsideTheShard(Mixer):
    def mix(self, x: Tensor, span: Span) -> Tensor:
        return F.pad(x, (0, 0, 1, 0))[:, :-1]


class InsideTheBlock(Mixer):
    """As `InsideTheShard`, but right across ranks."""

    def mix(self, x: Tensor, span: Span) -> Tensor:
        return Span(span.axis, span.lengths).halo(x, 1)[:, :-1]


class AcrossDocuments(Mixer):
    def mix(self, x: Tensor, span: Span) -> Tensor:
        return span.halo(x, 1)[:, :-1]


class Ahead(Mixer):
    def mix(self, x: Tensor, span: Span) -> Tensor:
        return span.halo(x, 0, 1)[:, 1:]


class Detached(Mixer):
    def mix(self, x: Tensor, span: Span) -> Tensor:
        return x * torch.sigmoid(x).detach()


class Unused(Mixer):
    def __init__(self, width: int, config: object = None, *, causal: bool = True) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))


class Random(Mixer):
    def mix(self, x: Tensor, span: Span) -> Tensor:
        return F.dropout(x)


class LocalPositions(Mixer):
    def mix(self, x: Tensor, span: Span) -> Tensor:
        return x * torch.arange(x.shape[1]).unsqueeze(-1)


class NoEmptyShard(Mixer):
    def mix(self, x: Tensor, span: Span) -> Tensor:
        return x * x.detach().abs().amax().sign()


class Deadlock(Mixer):
    def mix(self, x: Tensor, span: Span) -> Tensor:
        return span.halo(x, 1)[:, :-1] if span.axis.rank != 1 else x


class Shape(Mixer):
    def forward(self, x: Tensor, span: Span) -> Tensor:
        return self.matrix(x)[..., :-1]


class NotFinite(Mixer):
    def mix(self, x: Tensor, span: Span) -> Tensor:
        return x / 0


BROKEN = {
    InsideTheShard: r"split over 2 ranks, shards of \[9, 6\] tokens: the output differs by .*, first at token 9;"
    " likely cause: it reaches only the tokens that it is given",
    InsideTheBlock: r"streamed in blocks of 5 tokens: the output .*, first at token 5; likely cause: .* other blocks",
    AcrossDocuments: r"documents of \[6, 1, 10\] tokens.*: the output .*, first at token 6; .* other documents",
    Ahead: r"causality: another token 16 changes the output of token 15, by .*; .* span.halo with right > 0",
    Detached: r"the gradient of x, along a random direction, is \S+, but \S+ by finite differences; .* detach\(\)",
    Unused: r"parameter 'bias' has no gradient; likely cause: forward does not use it",
    Random: r"a second pass: the output differs by .* nn.Dropout",
    LocalPositions: r".*shards of \[9, 6\] tokens: the output differs by .*, first at token 9; .* span.position",
    Shape: r"for x \[2, 17, 8\], forward returns \[2, 17, 7\]; .* must return \[B, L, D\]",
    NotFinite: r"272 of 272 outputs are not finite; .* division by 0",
    NoEmptyShard: r".*shards of \[2, 2, 1, 0\] tokens: rank 3 fails: .*amax.*; .* a rank may hold no token",
}


@pytest.mark.parametrize("mixer", [Mixer, Dropout, Complex, NoParameters])
def test_a_right_mixer_passes(mixer: type[nn.Module]) -> None:
    before = torch.get_rng_state()
    check_mixer(mixer, 8)
    assert torch.equal(torch.get_rng_state(), before)
    check_mixer(mixer, 8, dtype=torch.float32)


@pytest.mark.parametrize("mixer", BROKEN, ids=lambda mixer: mixer.__name__)
def test_a_mistake_is_told_with_its_place_and_cause(mixer: type[nn.Module]) -> None:
    with pytest.raises(AssertionError, match=f"{mixer.__name__}: {BROKEN[mixer]}") as caught:
        check_mixer(mixer, 8)
    assert "\n" not in str(caught.value)


def test_ranks_that_wait_for_one_another_fail_the_check() -> None:
    with pytest.raises(AssertionError, match=r"not all ranks returned within 3 s; .* a verb .* others do not call"):
        check_mixer(Deadlock, 8, timeout=3)


def test_what_is_not_asked_for_is_not_checked() -> None:
    check_mixer(Ahead, 8, causal=False, ranks=1, documents=False)
    check_mixer(AcrossDocuments, 8, ranks=1, documents=False)
    check_mixer(InsideTheShard, 8, causal=False, ranks=1, documents=False)


def test_a_module_is_left_as_it_was() -> None:
    module = Mixer(8)
    weight = module.matrix.weight.clone()
    check_mixer(module, 8, ranks=1)
    assert torch.equal(module.matrix.weight, weight) and module.matrix.weight.grad is None


def test_a_name_takes_options() -> None:
    check_mixer("elementwise", 8, {"order": 2, "conv_len": 0}, ranks=1)
    with pytest.raises(InputError, match="mixer = 'nothing': one of elementwise"):
        check_mixer("nothing", 8)


@pytest.mark.parametrize("arguments", [{"ranks": 5}, {"ranks": 0}, {"dtype": torch.bfloat16}], ids=str)
def test_wrong_arguments_are_told(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        check_mixer(Mixer, 8, **arguments)  # type: ignore[arg-type]


def test_a_mixer_that_ranks_cannot_import_is_told() -> None:
    class Local(Mixer):
        pass

    with pytest.raises(InputError, match="must be defined at the top level of a file"):
        check_mixer(Local, 8)


SCRIPT = """
import torch
from torch import nn
from longreach.testing import check_mixer
from neighbour import shifted

class Mine(nn.Module):
    def __init__(self, width, config=None, *, causal=True):
        super().__init__()
        self.matrix = nn.Linear(width, width)

    def forward(self, x, span):
        return self.matrix(shifted(x, span))

check_mixer(Mine, 8, documents=False)
if __name__ == "__main__":
    print("fine")
"""


def test_a_script_checks_its_mixer(tmp_path: Path) -> None:
    """The ranks' processes run the script's top level again, and do not check in turn."""
    (tmp_path / "neighbour.py").write_text("def shifted(x, span):\n    return span.halo(x, 1)[:, :-1]\n")
    (tmp_path / "mine.py").write_text(SCRIPT)
    done = python("mine.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def die(axis: Axis) -> None:
    if axis.rank == 1:
        raise SystemExit


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankFailed, match="rank 1 of 3: its process died") as caught:
        run_on_ranks(die, 3)
    assert caught.value.rank == 1
