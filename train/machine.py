"""The machine that numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from cmae.train.doctor import cgroup_limit, driver_version


def usable_cores() -> float:
    """CPU cores of this process: its affinity, or the container's quota where that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    return min(allowed, cgroup_limit() or allowed)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, cores, memory and versions."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "driver": driver_version() if on_gpu else None,
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in ("cmae", "torch", "timm", "numpy")},
        "torch_threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """Model of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    """Installed version; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
