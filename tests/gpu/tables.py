"""The tables of a run on a GPU, in Markdown: ``python tests/gpu/tables.py build/gpu-once.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longreach.launch.bench import table_header, table_line


def tables(report: dict[str, Any]) -> str:
    """All tables whose sections are in ``report``, as far as these came."""
    data = {name: section["data"] for name, section in report["sections"].items() if section["data"]}
    makers = {"machine": _machine, "correctness": _correctness, "timing": _timing, "peers": _timing}
    makers |= {"training": _training, "variants": _variants}
    return "\n\n".join("\n".join(make(data[name])) for name, make in makers.items() if name in data)


def _machine(data: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{key} {value}" for key, value in data["environment"].items())
    if "product_flops_per_second" in data:
        copy, product = data["copy_bytes_per_second"], data["product_flops_per_second"]
        yield f"copy {copy / 1e12:.2f} TB/s (read and written), bf16 product {product / 1e12:.0f} TFLOP/s"


def _correctness(data: dict[str, Any]) -> Iterator[str]:
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in data.get("rows", []):
        worst = max(row["errors"].values(), default=float("nan"))
        told = f"{worst:.1e} / {row['limit']:.0e}{'' if row['equal_bits'] else ', bits differ'}"
        found.setdefault((row["operator"], row["variant"]), {})[row["dtype"]] = told
    dtypes = ("bf16", "fp16", "fp32")
    yield table_header(["operator", "variant", *(f"{dtype}: error / limit" for dtype in dtypes)])
    for (operator, variant), cells in sorted(found.items()):
        yield table_line([operator, variant, *(cells.get(dtype, "") for dtype in dtypes)])


def _timing(data: dict[str, Any]) -> Iterator[str]:
    yield table_header(["operator", "variant", "pass", "ms", "TB/s", "ratio to copy", "launches", "ms of kernels"])
    for row in data.get("rows", []):
        launches = sum(kernel["launches"] for kernel in row["kernels"])
        inside = sum(kernel["seconds"] for kernel in row["kernels"])
        figures = f"{row['seconds'] * 1e3:.3f}", f"{row['bytes_per_second'] / 1e12:.2f}", f"{row['ratio_to_copy']:.2f}"
        yield table_line([row["operator"], row["variant"], row["pass"], *figures, launches, f"{inside * 1e3:.3f}"])


def _training(data: dict[str, Any]) -> Iterator[str]:
    if "tokens_per_second" not in data:
        return
    yield table_header(["parameters", "tokens", "tokens/s", "peak memory", "share of peak FLOP/s", "waits of a step"])
    cells = f"{data['parameters']:,}", f"{data['tokens']:,}", f"{data['tokens_per_second']:,.0f}"
    memory, share = f"{data['peak_memory_bytes'] / 2**30:.1f} GiB", f"{data['share_of_peak']:.1%}"
    yield table_line([*cells, memory, share, max(data["waits"])])


def _variants(data: dict[str, Any]) -> Iterator[str]:
    yield table_header(["against an uninterrupted zero1 run", "largest relative difference of a loss", "limit"])
    for row in data.get("comparisons", []):
        yield table_line([row["comparison"], f"{row['largest_difference']:.1e}", f"{row['limit']:g}"])


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
