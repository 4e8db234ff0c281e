"""Before a release: builds wheel and sdist of the last commit, installs the wheel where nothing is, and trains with it.

    python tests/release.py                                        # make release-check
    python tests/release.py --python python3.10 --torch 2.11.0     # the low end of what is supported

Takes minutes, as torch is installed anew, and needs a package index. What is built stays in dist/; the rest is deleted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
model: {width: 16, depth: 2, mixers: [elementwise, chela], chela: {heads: 2, modes: 2}}
data: {source: my-texts, valid_fraction: 0.2, seq_len: 129, batch_size: 2}
optim: {lr: 1.0e-2, warmup_steps: 1}
train: {steps: 4, validate_batches: 1}
parallel: {ranks: 2}
"""
COMMANDS = [
    ["longreach", "--version"],
    ["longreach", "doctor"],
    ["longreach", "train", "my.yaml"],
    ["longreach", "generate", "runs/my", "--prompt", "span", "--tokens", "8"],
    ["longreach", "export", "runs/my", "exported"],
    [
        "python",
        "-c",
        "from longreach.framework.inference.export import load_exported as load; print(load('exported').config)",
    ],
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="that makes the empty environment")
    parser.add_argument("--torch", metavar="VERSION", help="in place of the one in constraints.txt")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="longreach-release-") as scratch:
        place = Path(scratch)
        wheel = build(place / "source", ROOT / "dist")
        bin_dir = install(arguments.python, wheel, arguments.torch, place)
        smoke(place / "work", bin_dir)
    print(f"release check passed in {(time.monotonic() - began) / 60:.1f} minutes: {wheel.name}")
    return 0


def build(source: Path, out_dir: Path) -> Path:
    """The sdist of the last commit, and the wheel that is built from that; returns the wheel."""
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
    version = re.findall(r'__version__ = "(.+)"', (source / "__init__.py").read_text(encoding="utf-8"))[0]
    run([sys.executable, "-m", "build", "--outdir", str(out_dir), "."], source)
    assert (out_dir / f"longreach-{version}.tar.gz").is_file()
    return out_dir / f"longreach-{version}-py3-none-any.whl"


def install(python: str, wheel: Path, torch: str | None, place: Path) -> Path:
    """A new environment with the wheel and what it needs; returns its ``bin``."""
    run([python, "-m", "venv", str(place / "venv")], place)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if torch is not None:
        pins = re.sub(r"^(torch==|setuptools==).*$", "", pins, flags=re.MULTILINE) + f"torch=={torch}\n"
    (place / "constraints.txt").write_text(pins, encoding="utf-8")
    pip = [str(place / "venv" / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", "-c", "constraints.txt", str(wheel)], place)
    run([*pip, "check"], place)
    run([*pip, "list"], place)
    return place / "venv" / "bin"


def smoke(work: Path, bin_dir: Path) -> None:
    """A user's first minutes, far from the checkout."""
    (work / "my-texts").mkdir(parents=True)
    for number in range(10):
        (work / "my-texts" / f"{number}.txt").write_text("span carry halo scan relay " * 40, encoding="utf-8")
    (work / "my.yaml").write_text(CONFIG, encoding="utf-8")
    for program, *words in COMMANDS:
        run([str(bin_dir / program), *words], work)


def run(command: list[str], cwd: Path) -> None:
    """Run a command to its end, on the processor and without the checkout in sight."""
    print("$", *command, flush=True)
    hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, cwd=cwd, env=environment, check=True)


if __name__ == "__main__":
    sys.exit(main())
