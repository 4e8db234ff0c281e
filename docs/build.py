"""Builds the reference of the Python interface into build/docs, from the docstrings, and checks the pages' links.

    python docs/build.py            # make docs

A warning, or a link that leads nowhere, ends it with exit code 1.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("kernels/*/README.md"))]
PAGES += [ROOT / "benchmarks" / "README.md"]
MODULES = [  # what users call; `kernels` is no package, so its operators are named
    "longreach.kernels.scan",
    "longreach.kernels.elementwise",
    "longreach.kernels.linear_attention",
    "longreach.kernels.short_conv",
    "longreach.kernels.long_conv",
    "longreach.kernels.errors",
    "longreach.parallel.mesh",
    "longreach.parallel.span",
    "longreach.parallel.streaming",
    "longreach.framework.config",
    "longreach.framework.data",
    "longreach.framework.mixers",
    "longreach.framework.model",
    "longreach.framework.heads",
    "longreach.framework.tasks",
    "longreach.framework.generate",
    "longreach.framework.evaluate",
    "longreach.framework.export",
    "longreach.framework.carry",
    "longreach.framework.huggingface",
]


def reference(out_dir: Path, modules: list[str] = MODULES) -> None:
    """Write one HTML page a module, an index and a search."""
    import pdoc

    pdoc.render.configure(docformat="google", footer_text="longreach", search=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        # The constructor of a NamedTuple, which Python writes, does not know the names of its module.
        warnings.filterwarnings("ignore", r"Error parsing type annotation .* for \S+\.__init__\.")
        pdoc.pdoc(*modules, output_directory=out_dir)


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
    out_dir = ROOT / "build" / "docs"
    reference(out_dir)
    links = broken_links() + broken_references(out_dir)
    for link in links:
        print(f"leads nowhere: {link}", file=sys.stderr)
    print(f"reference: {out_dir.relative_to(ROOT) / 'index.html'}")
    return 1 if links else 0


if __name__ == "__main__":
    sys.exit(main())
