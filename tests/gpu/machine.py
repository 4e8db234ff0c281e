"""The machine: versions, and how fast its GPU copies and multiplies."""

from __future__ import annotations

import os
import platform
import subprocess

import torch
from findings import Findings
from timing import Stopwatch

from longreach.launch.bench import environment, median
from longreach.launch.doctor.bandwidth import copy_bandwidth

SIZE = 8192  # of a square matrix


def run(findings: Findings) -> None:
    """Versions; bytes a second of copies on the device, to it and from it; operations a second of a bf16 product."""
    device = torch.device(findings.device)
    findings.data = {
        "environment": environment(findings.device, torch.get_num_threads()),
        "cores": len(os.sched_getaffinity(0)),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "nvidia_smi": _nvidia_smi() if findings.device == "cuda" else "",
    }
    findings.write()
    stopwatch, cpu = Stopwatch(findings.device), torch.device("cpu")
    num_bytes = 1 << 22 if findings.small else 1 << 33
    findings.data["copy_bytes_per_second"] = num_bytes / stopwatch.copy(num_bytes)
    if findings.device == "cuda":
        findings.data["to_device_bytes_per_second"] = copy_bandwidth(cpu, device)
        findings.data["from_device_bytes_per_second"] = copy_bandwidth(device, cpu)
    size = 64 if findings.small else SIZE
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    seconds = median([lap for (lap,) in stopwatch.repeated(lambda _: a @ b)])
    findings.data["product_flops_per_second"] = 2 * size**3 / seconds


def _nvidia_smi() -> str:
    """The GPU's clocks, power and driver, as ``nvidia-smi`` says."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit,memory.total"
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
