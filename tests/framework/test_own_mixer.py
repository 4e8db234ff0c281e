"""A mixer of the user's own file: docs/write-a-mixer.md, as a user would do it. Parity is in test_parity.py."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from programs import longreach, python

from longreach.errors import InputError
from longreach.framework.config import load
from longreach.framework.mixers import CONFIGS, MIXERS
from longreach.framework.mixers.registry import run_files
from longreach.framework.model import Model, ModelConfig, build_model
from longreach.kernels.scan import scan

DOCS = Path(__file__).parent.parent.parent / "docs"
EXAMPLE = DOCS / "examples" / "ema.py"
CONFIG = """
model: {width: 16, depth: 2, code: [ema.py], mixers: [ema, elementwise], options: {ema: {longest: 64}}}
data: {source: SOURCE, seq_len: 129, batch_size: 2}
optim: {lr: 1.0e-2, warmup_steps: 1}
train: {steps: 3, threads: 1, validate_batches: 1}
monitor: {tensorboard: false, plot: false}
"""
EXPORTED = """
import sys
from longreach.framework.inference.export import load_exported
from longreach.errors import InputError
try:
    load_exported("exported")
except InputError as error:
    print(error)
assert "longreach_code_ema" not in sys.modules
import ema
import torch
print(list(load_exported("exported")(torch.zeros(1, 5, dtype=torch.int64)).shape))
"""
CHECKS = """
if __name__ == "__main__":
    import test_of_ema
    import parts_reused
    from longreach.testing import check_mixer
    test_of_ema.test_ema()
    for causal in (True, False):
        check_mixer("convolved", 16, causal=causal)
"""


def test_the_page_shows_the_example_which_is_short() -> None:
    code = EXAMPLE.read_text(encoding="utf-8")
    page = (DOCS / "write-a-mixer.md").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in page
    assert len(code.splitlines()) < 70


def test_the_mixer_of_reused_parts_and_the_test_of_the_page(tmp_path: Path) -> None:
    """As a user would do it: files beside one another, imported by name; the test by a function that pytest calls."""
    page = (DOCS / "write-a-mixer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (parts,) = (block for block in blocks if "class Convolved" in block)
    (test,) = (block for block in blocks if "check_mixer" in block)
    for name, code in {"ema": EXAMPLE.read_text(encoding="utf-8"), "parts_reused": parts, "test_of_ema": test}.items():
        write(tmp_path, code, f"{name}.py")
    said(python(write(tmp_path, CHECKS, "checks.py"), cwd=tmp_path))


def test_a_long_piece_is_as_exact_as_a_short_one() -> None:
    """100,000 tokens, of which some channels remember thousands: fp32 against fp64, output and gradients."""
    run_files([str(EXAMPLE)])
    average = MIXERS["ema"](4, CONFIGS["ema"]()).average
    x, gate = torch.randn(1, 100_000, 4), torch.randn(1, 100_000, 4) + torch.linspace(0, 4096, 4).log1p()
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, gate)]
        y, after = scan(average, *inputs)
        found.append([y, after.state, *torch.autograd.grad(y.square().sum() + after.state.sum(), inputs)])
    for got, expected in zip(*found):
        assert (got - expected).norm() / expected.norm() < 1e-5


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A directory with ``ema.py`` and three runs with it: on one rank, on two, and streamed."""
    directory = tmp_path_factory.mktemp("own")
    (directory / "ema.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    (directory / "my.yaml").write_text(CONFIG.replace("SOURCE", str(corpus)), encoding="utf-8")
    for run, words in {"one": [], "two": ["parallel.ranks=2"], "streamed": ["parallel.block_len=48"]}.items():
        done = longreach("train", "my.yaml", f"run.dir=runs/{run}", *words, cwd=directory)
        assert done.returncode == 0, done.stderr
    return directory


def test_it_trains_alike_on_one_rank_on_two_and_streamed(trained: Path) -> None:
    expected = rows_of(trained / "runs" / "one")
    assert len(expected) == 3
    for run in ("two", "streamed"):
        rows = rows_of(trained / "runs" / run)
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], rel=1e-5, abs=0), run


def said(done: CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_with_it_writes_and_is_exported_and_the_export_runs_nothing(trained: Path) -> None:
    assert said(longreach("generate", "runs/two", "--prompt", "span", "--tokens", "3", cwd=trained)).startswith("span")
    said(longreach("export", "runs/two", "exported", cwd=trained))
    refused, shape = said(python("-c", EXPORTED, cwd=trained)).splitlines()
    assert "import ema.py first" in refused
    assert shape == "[1, 5, 256]"


def write(place: Path, code: str, name: str = "mine.py") -> str:
    (place / name).write_text(code, encoding="utf-8")
    return str(place / name)


BAD_FILES = {
    "not there": (None, "there is no such file"),
    "fails": ("import torch\n\n1 / 0\n", r"ZeroDivisionError: division by zero \(line 3\)"),
    "is no Python": ("x = = 1\n", r"SyntaxError: .*\(line 1\)"),
    "takes a name": (
        "from longreach.framework.mixers import register, SoftmaxConfig\n"
        "@register('chela', SoftmaxConfig)\nclass Chela: pass\n",
        "'chela': is the name of another mixer",
    ),
    "has no options": (
        "from longreach.framework.mixers import register\n@register('x', int)\nclass X: pass\n",
        r"register\('x'\): config = .*int.*: must be the dataclass",
    ),
    "has an option without default": (
        "from dataclasses import dataclass\nfrom longreach.framework.mixers import register\n"
        "@dataclass\nclass C:\n    rate: float\n@register('x', C)\nclass X: pass\n",
        "C without defaults of rate.*: must have a default for every option",
    ),
}


@pytest.mark.parametrize("code, message", BAD_FILES.values(), ids=BAD_FILES)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, code: str | None, message: str) -> None:
    path = str(tmp_path / "mine.py") if code is None else write(tmp_path, code)
    overrides = ["data.source=x", f"model.code=[{path}]"]
    with pytest.raises(InputError, match=message):
        load("quickstart", overrides)
    assert "longreach_code_mine" not in sys.modules


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write(place, "", "twin.py") for place in (tmp_path, tmp_path / "other")]
    run_files([paths[0], paths[0]])
    with pytest.raises(InputError, match="rename one of them"):
        run_files(paths)


def test_a_file_runs_once(tmp_path: Path) -> None:
    path = write(tmp_path, "", "once.py")
    run_files([path])
    module = sys.modules["longreach_code_once"]
    run_files([path])
    assert sys.modules["longreach_code_once"] is module


def test_a_file_may_be_run_and_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration names it, and a program imports it: one mixer."""
    path = write(tmp_path, EXAMPLE.read_text().replace('"ema"', '"ema_again"'), "ema_again.py")
    run_files([path])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("ema_again")
    with pytest.raises(InputError, match="is the name of another mixer"):
        run_files([write(tmp_path, Path(path).read_text(), "ema_stolen.py")])


def build(**fields: Any) -> Model:
    run_files([str(EXAMPLE)])
    return build_model(ModelConfig(vocab=8, width=8, depth=1, **fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixers": ["ema"], "options": {"ema": {"longset": 3}}}, r"model.options.ema.longset = 3: is no option"),
        ({"mixers": ["ema"], "options": {"ema": {"longest": "x"}}}, r"model.options.ema = .*Float"),
        ({"mixers": ["ema"], "options": {"ema": 3}}, r"model.options.ema = 3: a mapping"),
        ({"mixers": ["chela"], "options": {"chela": {}}}, r"model.options.chela = {}: no file"),
        ({"mixers": ["amy"]}, r"model.mixers = 'amy': one of .*, ema; name the file"),
        ({"mixers": ["ema"], "causal": False}, r"model.causal = False"),
    ],
)
def test_what_is_wrong_with_the_options_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.compile(message)):
        build(**fields)


def test_an_option_reaches_the_mixer() -> None:
    keep = build(mixers=["ema"], options={"ema": {"longest": 7}}).state_dict()["blocks.0.mixer.keep"]
    assert keep[-1].exp() == pytest.approx(8)
