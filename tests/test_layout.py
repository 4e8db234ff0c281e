"""The parts of the layering that import-linter cannot express: who may reach torch.distributed, and who DeepSpeed."""

import ast
import re
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


def imports_of_deepspeed(source: str) -> list[int]:
    """Returns the lines on which `source` imports DeepSpeed."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        if any(name.partition(".")[0] == "deepspeed" for name in names):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "import deepspeed",
        "import deepspeed.ops",
        "from deepspeed import comm",
        "def late():\n    from deepspeed.utils import x",
    ],
)
def test_every_import_of_deepspeed_is_seen(source: str) -> None:
    assert imports_of_deepspeed(source)
    assert not imports_of_deepspeed("from ..framework.deepspeed.engine import Engine")


def test_only_one_folder_imports_deepspeed() -> None:
    found = {
        path.parent.relative_to(ROOT).as_posix()
        for layer in ("kernels", "parallel", "framework", "launch")
        for path in (ROOT / layer).rglob("*.py")
        if imports_of_deepspeed(path.read_text(encoding="utf-8"))
    }
    assert found == {"framework/deepspeed"}


LAYERS = ("kernels", "parallel", "framework", "launch")  # each may import those before it
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))]
}


def imports_of(module: str, source: str, is_package: bool) -> set[str]:
    """The modules of this package that a source imports, anywhere in it, but for the eyes of a type checker."""
    found = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        package = module.split(".") if is_package else module.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        home = ".".join([*package, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            name = f"{home}.{alias.name}".lstrip(".")
            found.add(name if name in SOURCES else home or "__init__")
    return found - {module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(graph.get(module, ())):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return found


GRAPH = {
    module: imports_of(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    for module, path in SOURCES.items()
}


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}}) == [["a", "b", "c"]]
    assert imports_of(
        "framework.x.y", "def f():\n    from ..model import Model\n    from ...kernels import gpu", False
    ) == {
        "framework.model",
        "kernels.gpu",
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Late imports inside functions count, too."""
    assert not circles(GRAPH)


def test_no_module_imports_upward() -> None:
    """The same as the contract in pyproject.toml, without import-linter."""
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if module.split(".")[0] in LAYERS
        and other.split(".")[0] in LAYERS
        and LAYERS.index(other.split(".")[0]) > LAYERS.index(module.split(".")[0])
    ]
    assert not upward


def test_the_rooms_are_few() -> None:
    """A reader sees the framework's parts at one glance."""
    entries = sorted(path.name for path in (ROOT / "framework").iterdir() if path.name != "__pycache__")
    assert len(entries) <= 14, entries


OPERATORS = ("delta_rule", "elementwise", "linear_attention", "long_conv", "modal_conv", "short_conv")
FUSED = ("dropout", "rms_norm")  # of each token alone: what a GPU computes in one kernel, and its reference


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_have_the_same_files(operator: str) -> None:
    """Of stateful operators, torch.compile sees kernels/compiled.py."""
    wanted = {"__init__.py", "reference.py", "chunked.py", "cpu.py", "cpu.cpp", "triton.py", "README.md"}
    wanted |= {"compiled.py"} if operator in ("long_conv", "short_conv") else set()
    assert wanted <= {path.name for path in (ROOT / "kernels" / operator).iterdir()}
    assert {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")} == {*OPERATORS, *FUSED}


@pytest.mark.parametrize("operator", FUSED)
def test_fused_operators_have_the_same_files(operator: str) -> None:
    wanted = {"__init__.py", "reference.py", "triton.py", "README.md"}
    assert wanted <= {path.name for path in (ROOT / "kernels" / operator).iterdir()}


OLD_NAMES = (
    r"summarize_grad|(?<!_)attend_grad|def (summarize|attend|advance|on)\(self, inputs|\.(summarize|attend)\(",
    r"\bRelay\b|AxisRelay|\.sweep\(|\bFlow\b|\bPlace\b|at_edge|\bfold_grad\b|\bper_row\b|entering_states|\bAlone\b",
    r"_Journey|\.(entered|following)\(|span\.(at|take)\(|\bremember=|\bnoise=|\bWhole\(|(?<!_)\bshares\(",
    r"\bTrip\b|_Loan\b|class Move\b|_Pull\b|\bpulse\b|\bPulse\b|\bparting\b|cost\.through|_sent_last|_calls\b",
    r"two_level|(?<!recursive[-_])\bdoubling\b|compare_with_nobody|\bcompare_ranks\b|first_alone|pretend_world",
    r"kernels\.errors|kernels[./]library|framework\.(engine|zero|watch|agree|stop|finish|plan|carry|huggingface)\b",
)
PROSE = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/launch/*.md"), *ROOT.glob("kernels/*/README.md")]


@pytest.mark.parametrize("pattern", OLD_NAMES)
def test_old_names_are_gone_but_for_the_aliases(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*SOURCES.values(), *PROSE]
        if path.name not in ("_aliases.py", "CHANGELOG.md")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, "\n".join(found)
