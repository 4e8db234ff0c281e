"""C++ kernels for CPUs: compiled on first use by this machine's compiler, cached on disk, and loaded by ctypes.

The sources include only the standard library and have a C interface, so a build takes seconds, needs no headers of
torch, and works with every version of Python and torch. They use the OpenMP thread pool that torch has loaded, so
`torch.set_num_threads` applies to them too. Without a compiler, `unsupported_reason` says so and the portable
implementation runs.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .backends import is_traced

log = logging.getLogger("longreach.kernels")

FLAGS = (
    "-std=c++17",
    "-O2",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
LINK = ("-shared", "-fPIC", "-fopenmp")


def unsupported_reason(source: Path, device: str, *dtypes: torch.dtype, define: str = "") -> str:
    """Why the kernels of ``source`` do not run on tensors of such a device and dtypes; "" if they do."""
    if device != "cpu":
        return f"tensors on the cpu, not on {device}"
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16):
            return f"fp32 or bf16, not {dtype}"
    return _no_compiler() or _failure(source, define)


@cache
def load(source: Path, define: str = "") -> ctypes.CDLL:
    """The library compiled from ``source``, from the cache if it is there.

    Args:
        source: a C++ file, for which `unsupported_reason` has returned "".
        define: a macro ``NAME=VALUE``, to compile one specialization only.

    Raises:
        RuntimeError: the compiler fails; the message has its output.
        OSError: the library cannot be loaded.
    """
    text = b"".join(path.read_bytes() for path in (source, *sorted(Path(__file__).parent.glob("*.h"))))
    words = " ".join((*compiler(), *FLAGS, *LINK, define)).encode()
    key = hashlib.sha256(b"\0".join([text, words, _machine()])).hexdigest()[:20]
    library = cache_dir() / f"{source.parent.name}-{key}.so"
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError:
            log.warning("%s is damaged and is made again", library)
    _compile(source, define, library)
    return ctypes.CDLL(str(library))


def _compile(source: Path, define: str, library: Path) -> None:
    log.info("compiling the CPU kernels of %s, once, a few seconds", source.parent.name)
    handle, made = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        words = [
            *compiler(),
            *FLAGS,
            *LINK,
            *(["-D" + define] if define else []),
            "-I",
            str(Path(__file__).parent),
            str(source),
            "-o",
            made,
        ]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        if done.returncode:
            what = f"{source.parent.name}/{source.name} does not compile with {' '.join(compiler())}"
            raise RuntimeError(f"{what}: {done.stderr.strip()[-2000:]}")
        os.replace(made, library)  # ranks may do this concurrently; all write the same content
    finally:
        Path(made).unlink(missing_ok=True)


@cache
def _no_compiler() -> str:
    """Why no C++ can be compiled here, logged once; "" if it can."""
    reason = ""
    if platform.system() != "Linux":
        reason = "Linux"
    elif not compiler():
        reason = "a C++ compiler (g++ or clang++ in PATH, or named by CXX)"
    return reason and _warn(f"CPU kernels need {reason}")


@cache
def _failure(source: Path, define: str) -> str:
    """Why ``source`` cannot be compiled or loaded, logged once; "" if it can."""
    try:
        load(source, define)
    except (RuntimeError, OSError) as error:
        return _warn(f"CPU kernels need a C++ compiler that works: {' '.join(str(error).split())[:300]}")
    return ""


def _warn(reason: str) -> str:
    log.warning("%s; the portable implementation, which is slower, runs instead", reason)
    return reason


def compiler() -> list[str]:
    """The command of the compiler: CXX with its arguments, g++ or clang++; empty if there is none."""
    given = (shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"])
    return next((words for words in given if words and shutil.which(words[0])), [])


def _machine() -> bytes:
    """What the code of ``-march=native`` depends on: the compiler's version and the processor's features."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True).stdout
    named = (b"flags", b"Features", b"CPU part", b"CPU implementer")
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        flags = b"".join(sorted({line for line in lines if line.startswith(named)}))
    except OSError:
        flags = platform.machine().encode()
    return version + flags


@cache
def cache_dir() -> Path:
    """The user's cache directory, or a temporary one where that cannot be written."""
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longreach"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=directory):
            return directory
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        directory = Path(tempfile.mkdtemp(prefix="longreach-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        return directory


def document_starts(segments: Tensor | None) -> Tensor | None:
    """``uint8 [B, L]``: 1 where a document starts, 0 at the shard's first token; None for ``segments`` None."""
    if segments is None:
        return None
    starts = torch.zeros(segments.shape, dtype=torch.uint8)
    torch.ne(segments[:, 1:], segments[:, :-1], out=starts[:, 1:])
    return starts


HUGE_PAGE, ADVISE_HUGE_PAGES = 1 << 21, 14  # Linux: MADV_HUGEPAGE


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized tensor ``shape`` with the device and, unless given, the dtype of ``like``.

    A large one begins at a page of 2 MiB, which Linux is asked to use: it is new memory at every call, and writing to
    it first takes a page fault for each of its pages of 4 KiB.
    """
    made = like.new_empty(shape, dtype=dtype)
    size = made.numel() * made.element_size()
    if not made.is_cpu or size < 2 * HUGE_PAGE or is_traced(like):
        return made
    storage = like.new_empty(size + HUGE_PAGE, dtype=torch.uint8).untyped_storage()
    start = -storage.data_ptr() % HUGE_PAGE
    _process().madvise(storage.data_ptr() + start, size // HUGE_PAGE * HUGE_PAGE, ADVISE_HUGE_PAGES)  # may be refused
    return made.set_(storage, start // made.element_size(), made.shape, made.stride())


@cache
def _process() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def last_dim_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors with stride 1 in the last dimension, copied where they have another one."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


class Pointers:
    """An argument of a C function: the addresses of tensors as ``void* const*``, null for None.

    It holds the tensors, so that temporary ones live until the function has returned.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = tensors
        addresses = (None if x is None else x.data_ptr() for x in tensors)
        self._as_parameter_ = (ctypes.c_void_p * len(tensors))(*addresses)


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """An argument of a C function: ``const int64_t*``."""
    return (ctypes.c_int64 * len(values))(*values)


def strides(*tensors: Tensor | None, dims: int = 2) -> list[int]:
    """The strides of their first ``dims`` dimensions in elements, zeros for None."""
    return [step for x in tensors for step in ((0,) * dims if x is None else x.stride()[:dims])]
