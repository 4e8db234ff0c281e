"""The examples of docs/use-in-your-model.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parent.parent / "docs" / "use-in-your-model.md"


def test_the_examples_run() -> None:
    """In order, in one namespace; what fails is shown with its line of the page."""
    torch.manual_seed(0)
    text, namespace = PAGE.read_text(encoding="utf-8"), {"__name__": "page"}
    examples = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(examples) == 5
    for example in examples:
        lines_above = text.count("\n", 0, example.start(1))
        exec(compile("\n" * lines_above + example[1], str(PAGE), "exec"), namespace)
    check_decoding(namespace)


def check_decoding(found: dict[str, Any]) -> None:
    """What was decoded step by step is what one pass over all of it takes for the likeliest."""
    written = torch.cat(found["written"], dim=1)
    tokens = torch.cat([found["tokens"], written], dim=1)
    with torch.no_grad():
        logits = found["model"](tokens[:, :-1], found["Span"]())
    assert written.shape == (1, 20)
    assert torch.equal(logits[:, -20:].argmax(-1), written)
