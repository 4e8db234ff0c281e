"""The checks of `longreach doctor`: what a job would find on this machine, before it is started.

A check is a generator of `Finding`.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from ... import __version__
from .bandwidth import copy_bandwidth, write_bandwidth

PACKAGES = ("torch", "triton", "deepspeed", "omegaconf", "webdataset", "tensorboard", "safetensors")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"  # not where longreach was installed from a wheel
GIB = 2**30
LOW_DISK, LOW_SHM, FEW_FILES = 5 * GIB, GIB, 4096
CONNECT_SECONDS = 3.0  # to wait for MASTER_ADDR
PORT = 29500  # torchrun's default
# Of ptxas, the last one that may overwrite registers which a product of a warp group (WGMMA) has not read yet: Triton's
# pull request 11781, flash-linear-attention's issues 640 and 1262.
LAST_FAULTY_ASSEMBLER = "12.9"


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``level`` is "ok", "note" (a job runs, but there is something to improve) or "bad" (a job
    would not run).
    """

    level: str
    topic: str
    text: str


def findings_of_all(directory: str = ".") -> Iterator[Finding]:
    """What every check finds, in the order of the report.

    Args:
        directory: where runs will be written.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _software,
        _devices,
        _assembler,
        _backends,
        _memory,
        _network,
        _rendezvous,
        _links,
        partial(_disk, directory),
        _limits,
    )
    for check in checks:
        yield from findings_of(check)


def findings_of(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check finds; an exception in it is a finding too."""
    try:
        yield from check()
    except Exception as error:  # whatever it is, the user must see it here and not in a job
        name = check.func.__name__ if isinstance(check, partial) else check.__name__
        yield Finding("bad", name.strip("_"), f"{type(error).__name__}: {error}")


def _software() -> Iterator[Finding]:
    yield Finding("ok", "longreach", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    tested = _tested_versions()
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            optional = package == "triton" and sys.platform != "linux"
            yield Finding("note" if optional else "bad", package, f"not installed; pip install {package}")
            continue
        pin = tested.get(package, "")
        if pin and found.split("+")[0] != pin:
            yield Finding("note", package, f"{found}, tested with {pin}; pip install -c constraints.txt {package}")
        else:
            yield Finding("ok", package, found)


def _tested_versions() -> dict[str, str]:
    """The versions of `CONSTRAINTS` for this Python, by package; none if there is no such file."""
    if not CONSTRAINTS.is_file():
        return {}
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        pin.name: str(pin.specifier).removeprefix("==") for pin in pins if pin.marker is None or pin.marker.evaluate()
    }


def _devices() -> Iterator[Finding]:
    import torch

    from ...kernels.native import compiler

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    text = f"{cores} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of memory free"
    yield Finding("ok", "cpu", text)
    if not torch.cuda.is_available():
        yield Finding("note", "gpu", "none that torch can use: ranks compute on the CPU and communicate over gloo")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        used = "; other processes use it, see nvidia-smi" if free < 0.9 * total else ""
        text = f"{number}: {properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free{used}"
        yield Finding("note" if used else "ok", "gpu", text)
    if driver := _driver_version():
        yield Finding("ok", "driver", f"{driver}, torch was built for CUDA {torch.version.cuda}")
    if compiler():
        yield Finding("ok", "compiler", " ".join(compiler()))
    else:
        fix = "install g++, or set CXX to a C++ compiler"
        yield Finding(
            "note", "compiler", f"none for C++: on a CPU the operators run in PyTorch, which is slower; {fix}"
        )


def _assembler(capabilities: Sequence[int] | None = None) -> Iterator[Finding]:
    """The assembler of Triton's kernels, ptxas, and whether it is one to avoid on a GPU of compute capability 9.

    Args:
        capabilities: the major numbers of the GPUs' compute capabilities; None for the GPUs of this machine.
    """
    import torch

    if torch.version.hip or find_spec("triton") is None:
        return
    from triton import knobs

    if capabilities is None:
        capabilities = [torch.cuda.get_device_capability(number)[0] for number in range(torch.cuda.device_count())]
    used, other = knobs.nvidia.ptxas, getattr(knobs.nvidia, "ptxas_blackwell", None)
    text = f"ptxas {used.version}, {used.path}"
    if 9 not in capabilities or Version(used.version) > Version(LAST_FAULTY_ASSEMBLER):
        yield Finding("ok", "assembler", text)
        return
    newer = other is not None and Version(other.version) > Version(LAST_FAULTY_ASSEMBLER)
    path = other.path if other is not None and newer else "/path/to/ptxas"
    fault = f"up to {LAST_FAULTY_ASSEMBLER} it may miscompile matrix products of GPUs of capability 9"
    yield Finding("note", "assembler", f"{text}: {fault}; export TRITON_PTXAS_PATH={path}, of a newer CUDA")


def _driver_version() -> str:
    """The NVIDIA driver's version; "" where there is none."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _backends() -> Iterator[Finding]:
    """Which backend of each operator ``backend="auto"`` takes here, and why not another; each is run once."""
    import torch

    from ...kernels import delta_rule, elementwise, linear_attention, long_conv, modal_conv, short_conv
    from ...kernels.scan import scan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, heads = torch.ones(1, 8, 4, device=device), torch.ones(1, 8, 2, 2, device=device)
    fp32, modes = torch.float32, torch.zeros(4, 4, 2, device=device)
    for operator, case, run_once in (
        (elementwise, (fp32, 6), lambda: elementwise.elementwise_attention(x, x, x)),
        (linear_attention, (fp32, fp32, 2, 2), lambda: linear_attention.linear_attention(heads, heads, heads)),
        (delta_rule, (2, 2, False, fp32), lambda: delta_rule.delta_rule(heads, heads, heads, heads[..., 0])),
        (short_conv, (fp32, fp32, 4), lambda: short_conv.short_conv(x, x[0, :4])),
        (long_conv, (fp32, fp32), lambda: long_conv.long_conv(x, x[0, :4])),
        (modal_conv, (fp32, fp32, 2), lambda: scan(modal_conv.ModalConv(), x, *modes)),
    ):
        name, unsupported = operator.BACKENDS.automatic(device, *case)
        run_once()
        others = "".join(f"; not {other} ({reason})" for other, reason in unsupported.items())
        text = f"{operator.BACKENDS.operator} on {device}: backend {name}"
        yield Finding("ok", "operators", text + (others or ", the first choice"))


def _memory() -> Iterator[Finding]:
    """Bandwidth of memory, on the host and on each GPU."""
    import torch

    cpu = torch.device("cpu")
    yield Finding("ok", "memory", f"copy bandwidth {copy_bandwidth(cpu, cpu) / GIB:.1f} GiB/s")
    for number in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", number)
        own, from_host = (copy_bandwidth(source, gpu) / GIB for source in (gpu, cpu))
        text = f"GPU {number}: copy bandwidth {own:,.0f} GiB/s, from the host {from_host:.1f} GiB/s"
        yield Finding("ok", "memory", text)


def _network() -> Iterator[Finding]:
    """How ranks communicate: backends, network interfaces, and those that the environment names."""
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("bad", "exchange", "torch was built without torch.distributed; install another build of torch")
        return
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    backends = [name for name in available if available[name]]
    yield Finding("ok" if backends else "bad", "exchange", f"backends: {', '.join(backends) or 'none'}")
    states, names = psutil.net_if_stats(), []
    for name, rows in sorted(psutil.net_if_addrs().items()):
        addresses = [row.address for row in rows if row.family in (socket.AF_INET, socket.AF_INET6)]
        if not addresses or name not in states or not states[name].isup:
            continue
        names.append(name)
        speed = f", {states[name].speed / 1000:g} Gb/s" if states[name].speed else ""
        yield Finding("ok", "interface", f"{name}: {', '.join(addresses)}{speed}")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if variable in os.environ:
            yield _named_interface(variable, os.environ[variable], names)


def _named_interface(variable: str, value: str, names: list[str]) -> Finding:
    """Whether an interface matches a variable, which lists names; for NCCL prefixes, unless they begin with ``=``."""
    if value.startswith("^"):
        return Finding("ok", "interface", f"{variable}={value}")
    exact = variable.startswith("GLOO") or value.startswith("=")
    wanted = value.removeprefix("=").split(",")
    if any(name in wanted if exact else name.startswith(tuple(wanted)) for name in names):
        return Finding("ok", "interface", f"{variable}={value}")
    return Finding("bad", "interface", f"{variable}={value} matches no interface; name one of {', '.join(names)}")


def _rendezvous() -> Iterator[Finding]:
    """The address of the rendezvous: this host's name, or MASTER_ADDR and MASTER_PORT."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        local = address.startswith("127.")
        hint = "; other nodes cannot reach this address: give torchrun --local-addr" if local else ""
        yield Finding("note" if local else "ok", "host", f"{host} is {address}{hint}")
    except OSError:
        yield Finding(
            "note", "host", f"{host} does not resolve to an address: give torchrun --local-addr and --rdzv-endpoint"
        )
    given = os.environ.get("MASTER_PORT", "")
    if given and not (given.isdecimal() and 0 < int(given) < 1 << 16):
        yield Finding("bad", "port", f"MASTER_PORT={given} is not a port; set a number from 1 to 65535")
        return
    port, master = int(given or PORT), os.environ.get("MASTER_ADDR", "")
    if master:
        yield _check_master(master, port)
    else:
        yield _check_port(port, "note" if not given else "bad")


def _check_master(host: str, port: int) -> Finding:
    """Whether the first rank can listen on the port, if the host is this one; else, whether the host can be reached."""
    where = f"MASTER_ADDR={host}, port {port}"
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return Finding("bad", "rendezvous", f"{where}: no such host; set a name or address that every node knows")
    if any(row.address == address for rows in psutil.net_if_addrs().values() for row in rows):
        return _check_port(port, "bad")
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return Finding("ok", "rendezvous", f"{where}: reached; no process listens there yet")
    except OSError as error:
        fix = "open the port between the nodes, or take another interface"
        return Finding("bad", "rendezvous", f"{where}: not reached ({error.strerror or error}); {fix}")
    return Finding("ok", "rendezvous", f"{where}: a process listens there")


def _check_port(port: int, level_if_taken: str) -> Finding:
    """Whether a process can listen on a port of this host."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        fix = "end the process that holds it, or give torchrun another --master-port or --rdzv-endpoint"
        return Finding(level_if_taken, "port", f"{port}: {error.strerror}; {fix}")
    return Finding("ok", "port", f"{port} is free")


def _links() -> Iterator[Finding]:
    """Latency and bandwidth between two ranks of this machine."""
    import torch

    from .. import link_benchmark
    from ..local import start_ranks

    if torch.cuda.is_available() and torch.cuda.device_count() < link_benchmark.LOCAL_RANKS:
        yield Finding("note", "links", "one GPU: there is no link between two to measure")
        return
    found = start_ranks(link_benchmark.LOCAL_RANKS, link_benchmark.join_and_measure)
    yield Finding("ok", "links", f"between two ranks here: {link_benchmark.as_text(found[0], 'parallel.near')}")


def _disk(directory: str) -> Iterator[Finding]:
    """Free space where runs are written, and the bandwidth of writing a checkpoint."""
    parent = Path(directory).expanduser().absolute()
    while not parent.exists():  # train creates it
        parent = parent.parent
    try:
        bandwidth = write_bandwidth(parent)
    except OSError as error:
        fix = "free some space, or name a directory that this user may write to"
        yield Finding("bad", "disk", f"{parent}: nothing can be written ({error.strerror}); {fix}")
        return
    free = shutil.disk_usage(parent).free
    low = free < LOW_DISK
    text = f"{parent}: {free / GIB:.1f} GiB free, write bandwidth with fsync {bandwidth / 2**20:,.0f} MiB/s"
    yield Finding("note" if low else "ok", "disk", text + ("; free some space for checkpoints" if low else ""))


def _limits() -> Iterator[Finding]:
    """Limits of this user's processes, and of shared memory."""
    if os.path.isdir("/dev/shm"):
        usage = shutil.disk_usage("/dev/shm")
        low = usage.free < LOW_SHM
        text = f"/dev/shm: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
        fix = "; enlarge it (docker run --shm-size, or emptyDir of medium Memory), or set data.workers=0"
        yield Finding("note" if low else "ok", "shm", text + (fix if low else ""))
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= files < FEW_FILES
    fix = f"; raise it: ulimit -n {most if most > files else FEW_FILES}" if few else ""
    yield Finding("note" if few else "ok", "limits", f"{files} open files per process{fix}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if os.path.isdir("/sys/class/infiniband") and locked != resource.RLIM_INFINITY:
        text = f"{locked >> 10} KiB of locked memory: InfiniBand needs more; ulimit -l unlimited"
        yield Finding("note", "limits", text)
    yield Finding("ok", "clock", time.strftime("%Y-%m-%d %H:%M:%S UTC; compare it between nodes", time.gmtime()))
