"""Builds the reference of the Python interface into build/docs, from the docstrings, and checks the pages' links.

    python docs/build.py            # make docs
    python docs/build.py --config   # writes docs/config.md, the keys of a config, instead

A warning, or a link that leads nowhere, ends it with exit code 1.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("kernels/*/README.md"))]
PAGES += [ROOT / "benchmarks" / "README.md"]
MODULES = [  # what users call, the public names first; `kernels` is no package, so its operators are named
    "longreach",
    "longreach.kernels.scan",
    "longreach.kernels.state",
    "longreach.kernels.transition",
    "longreach.kernels.elementwise",
    "longreach.kernels.linear_attention",
    "longreach.kernels.delta_rule",
    "longreach.kernels.short_conv",
    "longreach.kernels.long_conv",
    "longreach.kernels.modal_conv",
    "longreach.errors",
    "longreach.parallel.mesh",
    "longreach.parallel.span",
    "longreach.parallel.streaming",
    "longreach.testing",
    "longreach.framework.config",
    "longreach.framework.data",
    "longreach.framework.mixers",
    "longreach.framework.model",
    "longreach.framework.model.heads",
    "longreach.framework.tasks",
    "longreach.framework.hf",
    "longreach.framework.inference.generate",
    "longreach.framework.inference.evaluate",
    "longreach.framework.inference.predict",
    "longreach.framework.inference.inputs",
    "longreach.framework.inference.embed",
    "longreach.framework.inference.export",
    "longreach.framework.inference.distill",
    "longreach.framework.inference.loading",
    "longreach.framework.inference.carry_file",
    "longreach.framework.inference.huggingface",
]
CONFIG_PAGE = ROOT / "docs" / "config.md"
MEANINGS = {  # of keys of which the Args or Attributes of the docstring say nothing, or nothing of each by itself
    "run.dir": "where results go; by default `runs/<name of the config>`",
    "run.seed": "seed of the initial weights and of the order of the data",
    "optim.lr": "learning rate after the warm-up",
    "optim.min_lr_ratio": "the learning rate at the end of the cosine, divided by `lr`",
    "optim.warmup_steps": "steps in which the learning rate rises from 0, linearly",
    "optim.schedule_steps": "the step at which the cosine ends; by default `train.steps`",
    "optim.betas": "AdamW's decay rates of the mean and of the square of the gradient",
    "optim.eps": "AdamW's epsilon, in the denominator of the update",
    "optim.weight_decay": "AdamW's weight decay, of the matrices of linear layers and embeddings",
    "optim.clip": "the gradient is scaled down to this norm where its norm is larger; 0 never",
    "parallel.near": "`[latency, bandwidth]` between ranks of a node, in seconds and bytes a second, as "
    "`longreach doctor` measures them; empty for rough figures",
    "parallel.far": "the same between nodes, as `python -m longreach.launch.link_benchmark` measures them",
    "train.log_every": "steps from one line of the console to the next",
    "train.validate_every": "steps from one validation to the next; 0: only the one after the last step",
    "monitor.tensorboard": "write TensorBoard's events",
    "monitor.plot": "draw the loss curve at the end",
    "deepspeed": "see below",
}
CONFIG_HEAD = """# Keys of a config

<!-- Written by docs/build.py from the dataclasses and their docstrings: python docs/build.py --config -->

A config is a YAML file with these sections. `longreach train CONFIG` takes its path, or the name of one in
`configs/`. Keys that it leaves out have their defaults. `section.key=VALUE` on the command line replaces a value, in
YAML's notation; quote values that a shell would interpret: `"model.mixers=[chela]"`, `"parallel.near=[5e-6, 2e11]"`.
An unknown key, or a value of the wrong type, is an error that names the key. `RUN_DIR/config.yaml` has all keys of a
run.

Other names in code, such as `config.load`, are those of the Python interface (`make docs`).
"""
CONFIG_TAIL = """
`deepspeed` is one of

- the name of a file in `configs/deepspeed/`: NAMES (the stage of ZeRO;
  [`slow_network`](how-many-ranks.md#slow-networks): stage 0, with few bytes to exchange);
- the path of a DeepSpeed JSON: `deepspeed=my_zero.json`, or `--deepspeed_config my_zero.json`, which is the same;
- a mapping of DeepSpeed's keys, in the YAML file.

`cp configs/deepspeed/zero1.json my_zero.json` makes a file to start from. In it, `"auto"` takes the value from the
config. A key that DeepSpeed does not know, or a value that contradicts the config, is an error.
"""


def reference(out_dir: Path) -> None:
    """Write one HTML page a module, an index and a search."""
    import pdoc

    pdoc.render.configure(docformat="google", footer_text="longreach", search=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        # The constructor of a NamedTuple, which Python writes, does not know the names of its module.
        warnings.filterwarnings("ignore", r"Error parsing type annotation .* for \S+\.__init__\.")
        pdoc.pdoc(*MODULES, output_directory=out_dir)


def config_page() -> str:
    """The text of docs/config.md: a table for each section, from the fields of the dataclasses and their docstrings."""
    from longreach.framework.config import RunConfig
    from longreach.framework.deepspeed.settings import SETTINGS

    names = ", ".join(f"`{file.stem}`" for file in sorted(SETTINGS.glob("*.json")))
    top = [field for field in dataclasses.fields(RunConfig) if field.name == "deepspeed"]
    sections = [_section("", RunConfig, name) for name in _subsections(RunConfig)]
    last = "\n## deepspeed\n\n" + _table("", RunConfig, top)
    return CONFIG_HEAD + "".join(sections) + last + CONFIG_TAIL.replace("NAMES", names)


def _subsections(owner: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses."""
    return {name: hint for name, hint in typing.get_type_hints(owner).items() if dataclasses.is_dataclass(hint)}


def _section(prefix: str, owner: type, name: str) -> str:
    """A section and those within it, each under a heading."""
    section, path = _subsections(owner)[name], f"{prefix}{name}"
    inner = _subsections(section)
    keys = [field for field in dataclasses.fields(section) if field.name not in inner]
    first = inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0]
    text = f"\n## {path}\n\n{_markdown(first)}\n\n{_table(f'{path}.', section, keys)}"
    return text + "".join(_section(f"{path}.", section, name) for name in inner)


def _table(prefix: str, owner: type, keys: list[dataclasses.Field[Any]]) -> str:
    hints, meanings = typing.get_type_hints(owner), _meanings(owner)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        path = f"{prefix}{key.name}"
        meaning = MEANINGS.get(path) or meanings[key.name]  # a KeyError: explain the key in its class's docstring
        cells = [f"`{path}`", _type(hints[key.name]), _default(key), _markdown(meaning).removesuffix(".")]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _meanings(owner: type) -> dict[str, str]:
    """What the Args or Attributes of a docstring say of each name."""
    doc = inspect.cleandoc(owner.__doc__ or "")
    listed = re.split(r"(?m)^(?:Args|Attributes):$", doc, maxsplit=1)[-1]
    found: dict[str, str] = {}
    for entry in re.findall(r"^    (\w[\w, ]*): (.+(?:\n     +.+)*)", listed, re.MULTILINE):
        found |= dict.fromkeys(entry[0].split(", "), entry[1])
    return found


def _type(hint: Any) -> str:
    """A type as one would say it."""
    if hint is Any:
        return "name, path or mapping"
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type(part) for part in parts)
    if origin is list:
        return f"list of {_type(parts[0])}"
    return (
        "mapping" if origin is dict else {"str": "text", "int": "integer", "float": "number"}.get(hint.__name__, "bool")
    )


def _default(key: dataclasses.Field[Any]) -> str:
    value = key.default_factory() if key.default_factory is not dataclasses.MISSING else key.default
    if value == "???":  # OmegaConf's mark
        return "must be given"
    if value == "":
        return "empty"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if value is None or isinstance(value, bool | dict):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _markdown(text: str) -> str:
    """A docstring's text on one line, its names as code."""
    return re.sub(r"\s+", " ", text.replace("``", "`")).strip()


def broken_links(pages: list[Path] = PAGES) -> list[str]:
    """The links and anchors of Markdown pages that lead nowhere, as ``page:line: link``; other sites are not asked."""
    return [
        f"{page.relative_to(ROOT) if page.is_relative_to(ROOT) else page}:{line}: {link}"
        for page in pages
        for line, link in _links(page.read_text(encoding="utf-8"))
        if not _leads_somewhere(page, link)
    ]


def broken_references(out_dir: Path) -> list[str]:
    """The links within the reference that lead nowhere, as ``page: link``."""
    out_dir = out_dir.resolve()
    texts = {
        page: re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for page in sorted(out_dir.rglob("*.html"))
    }
    places = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    found = []
    for page, text in texts.items():
        for link in sorted(set(re.findall(r'\bhref="([^"]+)"', text))):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if ":" not in link and (target not in places or (anchor and anchor not in places[target])):
                found.append(f"{page.relative_to(out_dir)}: {link}")
    return found


def _links(text: str) -> Iterator[tuple[int, str]]:
    """Line and target of every link outside of code."""
    for match in re.finditer(r"\]\(([^()\s]+)\)", _without_code(text)):
        yield text.count("\n", 0, match.start()) + 1, match[1]


def _leads_somewhere(page: Path, link: str) -> bool:
    if re.match(r"[a-z]+:", link):
        parts = urlsplit(link)
        return parts.scheme == "mailto" or (parts.scheme == "https" and "." in parts.netloc)
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not anchor:
        return target.exists()
    return target.is_file() and anchor in _anchors(target.read_text(encoding="utf-8"))


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+?) *$", _without_code(text, inline=False), re.MULTILINE):
        plain = re.sub(r"\]\([^)]*\)|[`*\[\]]", "", title).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(name)
    return found


def _without_code(text: str, inline: bool = True) -> str:
    """The text with its code as blanks, on the same lines."""
    pattern = r"^```.*?^```" + (r"|`[^`\n]*`" if inline else "")
    return re.sub(pattern, lambda code: re.sub(r"[^\n]", " ", code[0]), text, flags=re.MULTILINE | re.DOTALL)


def main() -> int:
    if "--config" in sys.argv[1:]:
        CONFIG_PAGE.write_text(config_page(), encoding="utf-8")
        return 0
    out_dir = ROOT / "build" / "docs"
    reference(out_dir)
    links = broken_links() + broken_references(out_dir)
    for link in links:
        print(f"leads nowhere: {link}", file=sys.stderr)
    print(f"reference: {out_dir.relative_to(ROOT) / 'index.html'}")
    return 1 if links else 0


if __name__ == "__main__":
    sys.exit(main())
