"""How many functions of the package a reader passes on the way to the work.

    python benchmarks/call_depth.py                    # the installed package
    PYTHONPATH=DIR python benchmarks/call_depth.py     # the checkout DIR/longreach

Runs the real code and looks at the Python stack at two places:

- training: from ``longreach.launch.train.main``, which every rank runs, to the step of the torch optimizer. One step
  of the quickstart on one rank, made small.
- scan: from ``Span.scan`` to the C++ function of element-wise attention, in fp32 on the CPU, without gradients and with
  them. This part needs a C++ compiler.

Counted are the functions of modules of ``longreach``, lambdas and nested functions among them. Not counted are those of
torch, DeepSpeed and Python, which lie in between, comprehensions, and what backward does. The outermost function comes
first. The engine steps the optimizer once before training, to make its state, so the last stack of the training is
shown. Of the scan's calls of the library, if there are several, the deepest is.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

CHILD = "--child-writes"  # the file into which the process that trains writes the stack
SMALL = [
    "quickstart",
    "parallel.ranks=1",
    "data.seq_len=128",
    "model.width=32",
    "model.chela.heads=2",
    "optim.warmup_steps=0",
    "train.steps=1",
    "train.validate_every=0",
    "monitor.tensorboard=false",
    "monitor.plot=false",
    "monitor.sample_len=0",
]
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

Stack = list[str]


def stack_of_the_package() -> Stack:
    """The package's functions that are running, outermost first, each as ``module: qualified name``."""
    found: Stack = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # Python 3.10 has no qualified names
        last = name.rpartition(".")[2]
        if module.partition(".")[0] == "longreach" and (not last.startswith("<") or last == "<lambda>"):
            found.append(f"{module}: {name}")
        frame = frame.f_back
    return found[::-1]


def train(file: str, words: list[str]) -> None:
    """Train; each step of a torch optimizer writes its stack over the one in ``file``. Ends the process, as the entry
    point does.
    """
    import torch

    def telling(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def tell(*arguments: Any, **options: Any) -> Any:
            Path(file).write_text(json.dumps(stack_of_the_package()), encoding="utf-8")
            return step(*arguments, **options)

        return tell

    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and "step" in vars(kind):
            kind.step = telling(kind.step)  # type: ignore[method-assign]
    from longreach.launch.train import main as entry_point

    entry_point(words)


def to_the_optimizer() -> Stack:
    """The stack of a training where the torch optimizer steps."""
    with tempfile.TemporaryDirectory() as directory:
        place, draw = Path(directory), random.Random(0)
        (place / "texts").mkdir()
        for number in range(8):
            text = " ".join(draw.choice(["span", "carry", "halo", "scan"]) for _ in range(400))
            (place / "texts" / f"{number}.txt").write_text(text, encoding="ascii")
        own = [f"data.source={place}/texts", f"data.cache={place}/packed", f"run.dir={place}/run"]
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, CHILD, str(place / "stack.json"), *SMALL, *own]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode or not (place / "stack.json").exists():
            sys.exit(f"the training ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
        return list(json.loads((place / "stack.json").read_text(encoding="utf-8")))


class ToldFunction:
    """A function of a library, which hands the stack to ``found`` before it runs; what is set on it is set on that."""

    def __init__(self, function: Any, found: Callable[[Stack], None]) -> None:
        vars(self).update(function=function, found=found)

    def __call__(self, *arguments: Any) -> Any:
        self.found(stack_of_the_package())
        return self.function(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.function, name, value)


class ToldLibrary:
    """A library whose functions are `ToldFunction`."""

    def __init__(self, library: ctypes.CDLL, found: Callable[[Stack], None]) -> None:
        self.library, self.found = library, found

    def __getattr__(self, name: str) -> ToldFunction:
        return ToldFunction(getattr(self.library, name), self.found)


def to_the_library() -> dict[str, Stack]:
    """The stack of `Span.scan` where it calls the C++ library, without gradients and with them."""
    import torch

    from longreach.kernels import native
    from longreach.kernels.elementwise import ElementwiseAttention
    from longreach.parallel.span import Span

    deepest: Stack = []
    load = native.load

    def found(stack: Stack) -> None:
        nonlocal deepest
        deepest = max(deepest, stack, key=len)

    def told_load(*arguments: Any, **options: Any) -> ToldLibrary:
        return ToldLibrary(load(*arguments, **options), found)

    for name, module in list(sys.modules.items()):  # wherever it was imported by name
        if name.partition(".")[0] == "longreach":
            for key in [key for key, value in vars(module).items() if value is load]:
                setattr(module, key, told_load)
    stacks = {}
    for what, gradients in (("without gradients", False), ("with gradients", True)):
        deepest = []
        inputs = [torch.randn(1, 128, 32, requires_grad=gradients) for _ in range(3)]
        with torch.set_grad_enabled(gradients):
            Span().scan(ElementwiseAttention(), *inputs)
        if not deepest:
            sys.exit("element-wise attention did not call the C++ library; is there a C++ compiler?")
        stacks[what] = deepest
    return stacks


def show(what: str, stack: Stack) -> None:
    print(f"{what}: {len(stack)} functions")
    for depth, name in enumerate(stack, 1):
        print(f"  {depth:2}  {name}")


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        train(sys.argv[2], sys.argv[3:])
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    show("from longreach.launch.train.main to the step of the torch optimizer", to_the_optimizer())
    for what, stack in to_the_library().items():
        show(f"from Span.scan to the C++ library, {what}", stack)


if __name__ == "__main__":
    main()
