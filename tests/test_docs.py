"""The examples of docs/use-in-your-model.md run as they stand there; links lead somewhere; the reference is built;
docs/config.md has the keys of the config.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from longreach.framework.config import load

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "use-in-your-model.md"
PUBLIC = [  # what other code may call
    "kernels.elementwise.elementwise_attention",
    "kernels.linear_attention.linear_attention",
    "kernels.delta_rule.delta_rule",
    "kernels.short_conv.short_conv",
    "kernels.long_conv.long_conv",
    "kernels.scan.StatefulOp",
    "parallel.mesh.init_mesh",
    "parallel.span.Span",
    "framework.config.load",
    "framework.mixers.register",
    "testing.check_mixer",
    "framework.model.build_model",
    "framework.hf.adapt",
    "framework.inference.export.load_exported",
]


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace; what fails is shown with its line of the page."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text, namespace = PAGE.read_text(encoding="utf-8"), {"__name__": "page"}
    examples = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(examples) == 11
    for number, example in enumerate(examples, start=1):
        lines_above = text.count("\n", 0, example.start(1))
        exec(compile("\n" * lines_above + example[1], str(PAGE), "exec"), namespace)
        if number == 5:
            check_decoding(namespace)
    check_transformers(namespace)


def check_decoding(found: dict[str, Any]) -> None:
    """What was decoded step by step is what one pass over all of it takes for the likeliest."""
    written = torch.cat(found["written"], dim=1)
    tokens = torch.cat([found["tokens"], written], dim=1)
    with torch.no_grad():
        logits = found["model"](tokens[:, :-1], found["Span"]())
    assert written.shape == (1, 20)
    assert torch.equal(logits[:, -20:].argmax(-1), written)


def check_transformers(found: dict[str, Any]) -> None:
    """Both prompts are continued; what goes on from a cache is what reads all anew."""
    assert [text[:7] for text in found["texts"]] == ["a carry", "all tha"] and found["found"].shape == (2, 36)
    anew = found["model"].generate(found["text"], max_new_tokens=20)
    assert torch.equal(found["answer"], anew)
    assert found["cache"].get_seq_length() == 1500


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """docs/build.py, which `make docs` runs."""
    spec = spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_link_leads_nowhere(build: ModuleType) -> None:
    assert len(build.PAGES) > 10
    assert build.broken_links() == []


def test_a_link_that_leads_nowhere_is_found(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `good` place, here\n\n```sh\n# none\n```\n")
    good = "[a](other.md) [b](other.md#a-good-place-here) [c](#top) [d](https://example.org/x) `[e](code)`"
    bad = ["missing.md", "other.md#none", "#nowhere", "http://example.org", "https://nohost"]
    page = tmp_path / "page.md"
    page.write_text(f"# Top\n{good}\n" + "\n".join(f"[x]({link})" for link in bad))
    assert build.broken_links([page]) == [f"{page}:{line}: {link}" for line, link in enumerate(bad, 3)]


def test_the_keys_of_a_config_are_those_of_the_page(build: ModuleType) -> None:
    """Each once; all that a config holds, in every section."""
    text = build.CONFIG_PAGE.read_text(encoding="utf-8")
    assert text == build.config_page(), "write it anew: .venv/bin/python docs/build.py --config"
    named = re.findall(r"^\| `([\w.]+)` \| .+ \| .+ \| .+ \|$", text, re.MULTILINE)
    known = list(keys(dataclasses.asdict(load("quickstart"))))
    assert sorted(named) == sorted(known) and set(build.MEANINGS) <= set(known)


def keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_reference_has_what_is_public(build: ModuleType) -> None:
    for name in PUBLIC:
        module, _, what = f"longreach.{name}".rpartition(".")
        assert module in build.MODULES
        assert getattr(importlib.import_module(module), what).__doc__, name


def test_the_reference_is_built(build: ModuleType, tmp_path: Path) -> None:
    """All of it; a warning would be an error."""
    build.reference(tmp_path)
    page = (tmp_path / "longreach" / "parallel" / "span.html").read_text(encoding="utf-8")
    assert 'id="Span.by_channel"' in page and (tmp_path / "index.html").is_file()
    assert build.broken_references(tmp_path) == []
    (tmp_path / "longreach" / "parallel" / "span.html").write_text('<a href="scan.html">')
    assert "longreach/parallel/span.html: scan.html" in build.broken_references(tmp_path)
