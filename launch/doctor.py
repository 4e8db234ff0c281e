"""`longreach doctor`: what a job would find on this machine, before it is started."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from .. import __version__

PACKAGES = ("torch", "triton", "deepspeed", "omegaconf", "webdataset", "tensorboard", "safetensors")
LOW_DISK_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``level`` is "ok", "note" (a job runs, but look) or "bad" (it would not)."""

    level: str
    topic: str
    text: str


def doctor() -> int:
    """Print every finding; returns 1 if a job would not run here."""
    bad = 0
    for check in CHECKS:
        for finding in _findings(check, check.__name__.strip("_")):
            bad += finding.level == "bad"
            print(f"{finding.level:<5} {finding.topic:<12} {finding.text}", flush=True)
    print("a job runs here" if not bad else f"lines marked bad: {bad}; a job would not run here")
    return 1 if bad else 0


def _findings(check: Callable[[], Iterator[Finding]], topic: str) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # whatever it is, the user must see it here and not in a job
        yield Finding("bad", topic, f"{type(error).__name__}: {error}")


def _software() -> Iterator[Finding]:
    yield Finding("ok", "longreach", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            yield Finding("ok", package, version(package))
        except PackageNotFoundError:
            optional = package == "triton" and sys.platform != "linux"
            yield Finding("note" if optional else "bad", package, f"not installed; pip install {package}")


def _devices() -> Iterator[Finding]:
    import torch

    from ..kernels.native import compiler

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("ok", "cpu", f"{cores} cores, {_memory_bytes() / 2**30:.1f} GiB of memory")
    if not torch.cuda.is_available():
        yield Finding("note", "gpu", "none that torch can use: ranks compute on the CPU and exchange by gloo")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = f"{number}: {properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield Finding("ok", "gpu", text)
    if not compiler():
        yield Finding("note", "compiler", "no C++ compiler: on a CPU the operators run in PyTorch, more slowly")


def _backends() -> Iterator[Finding]:
    """Which implementation of each operator "auto" takes here, as the operators say when they run."""
    import torch

    from ..kernels.elementwise import elementwise_attention
    from ..kernels.linear_attention import linear_attention
    from ..kernels.long_conv import long_conv
    from ..kernels.short_conv import short_conv

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, heads = torch.ones(1, 8, 4, device=device), torch.ones(1, 8, 2, 2, device=device)
    runs: tuple[Callable[[], object], ...] = (
        lambda: elementwise_attention(x, x, x),
        lambda: linear_attention(heads, heads, heads),
        lambda: short_conv(x, x[0, :4]),
        lambda: long_conv(x, x[0, :4]),
    )
    listener = _Listener()
    log = logging.getLogger("longreach.kernels")
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    for run in runs:
        yield from _findings(lambda run=run: listener.findings_of(run), "operators")  # type: ignore[misc]
    log.removeHandler(listener)


class _Listener(logging.Handler):
    """Makes findings of what operators say about themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def findings_of(self, run: Callable[[], object]) -> Iterator[Finding]:
        self.said.clear()
        run()
        for line in self.said:
            yield Finding("ok", "operators", line)


def _exchange() -> Iterator[Finding]:
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("bad", "exchange", "torch was built without torch.distributed")
        return
    backends = [
        name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
    ]
    yield Finding("ok" if backends else "bad", "exchange", f"backends: {', '.join(backends) or 'none'}")
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        level = "note" if address.startswith("127.") else "ok"
        hint = "; other nodes cannot reach this address, set MASTER_ADDR" if level == "note" else ""
        yield Finding(level, "host", f"{host} is {address}{hint}")
    except OSError:
        yield Finding(
            "note", "host", f"{host} has no address: give torchrun --rdzv-endpoint or --master-addr an address"
        )
    with socket.socket() as probe:
        try:
            probe.bind(("", 29500))
            yield Finding("ok", "port", "29500, torchrun's default, is free")
        except OSError:
            yield Finding("note", "port", "29500, torchrun's default, is in use: give torchrun another --master-port")


def _links() -> Iterator[Finding]:
    """What lies between two ranks of this machine."""
    import torch

    from . import links
    from .train import start_ranks

    if torch.cuda.is_available() and torch.cuda.device_count() < links.LOCAL_RANKS:
        yield Finding("note", "links", "one GPU: nothing lies between two")
        return
    found = start_ranks(links.LOCAL_RANKS, links.join_and_measure)
    yield Finding("ok", "links", f"between two ranks here {links.as_text(found[0], 'parallel.near')}")


def _disk() -> Iterator[Finding]:
    for topic, path in (("disk", "."), ("shm", "/dev/shm")):
        if not os.path.isdir(path):
            continue
        free = shutil.disk_usage(path).free
        low = topic == "disk" and free < LOW_DISK_BYTES
        writable = os.access(path, os.W_OK)
        text = f"{os.path.abspath(path)}: {free / 2**30:.1f} GiB free" + ("" if writable else ", not writable")
        yield Finding("note" if low or not writable else "ok", topic, text)


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_software, _devices, _backends, _exchange, _links, _disk)
