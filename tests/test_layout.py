"""The part of the layering that import-linter cannot express: who may reach torch.distributed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def uses_of_torch_distributed(source: str) -> list[int]:
    """Returns the lines on which `source` imports torch.distributed or reads it as an attribute of torch."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        else:
            continue
        if any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in names):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "import torch.distributed.nn",
        "from torch import distributed",
        "from torch.distributed import ReduceOp",
        "from torch.distributed.nn.functional import all_gather",
        "import torch\ntorch.distributed.barrier()",
        "def late():\n    import torch.distributed",
    ],
)
def test_every_way_to_reach_torch_distributed_is_seen(source: str) -> None:
    assert uses_of_torch_distributed(source)


def test_other_uses_of_torch_are_allowed() -> None:
    assert not uses_of_torch_distributed("import torch\ntorch.distributions.Normal(0, 1)")


@pytest.mark.parametrize("layer", ["kernels", "framework"])
def test_only_parallel_communicates(layer: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / layer).rglob("*.py"))
        for line in uses_of_torch_distributed(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"torch.distributed belongs in parallel/, but is used in {found}"
