"""The machine that numbers were measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def usable_cores() -> float:
    """CPU cores of this process: its affinity, or the container's quota where that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    return min(allowed, cgroup_limit() or allowed)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, cores, memory and versions.

    Args:
        device: Device that was measured.
    """
    import psutil
    import torch

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


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of a GPU, such as (8, 0) for an A100; None for a CPU."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.get_device_capability(device)


def cpu_name() -> str:
    """Model of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def process_space() -> str:
    """Name of this boot of the machine and of its numbering of processes; '' where the system tells neither.

    A process number means the same process only where these are equal: containers of one host name may each
    have a process 1, and a machine that starts again gives the numbers anew.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's; 0 if it has ended, None if nobody tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = stat.rpartition(b")")[2].split()
    return 0 if state in (b"Z", b"X") else int(fields[18])


def process_is_gone(pid: int, start: int) -> bool:
    """Whether a process of this machine has certainly ended.

    Args:
        pid: Number of the process, in this process's own numbering.
        start: Its `process_start`, since the number may be another's by now; 0 is not compared.
    """
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return True
    except OSError:
        pass  # of another user
    found = process_start(pid)
    return found is not None and (found == 0 or (start != 0 and found != start))


def is_first_rank() -> bool:
    """Whether this process is the one of its run that prints, before there is a process group.

    What a scheduler or an earlier run has left in the shell does not count where there is no other rank.
    """
    world_size = os.environ.get("WORLD_SIZE", "1").strip()
    return world_size in ("", "1") or os.environ.get("RANK", "0").strip() in ("", "0")


def package_version(package: str) -> str | None:
    """Installed version; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Version of the NVIDIA driver, such as 580.65.06; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return output.stdout.strip().split("\n")[0] or None


def cgroup_limit(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPU cores that the container's quota allows; None without a quota. Reads cgroup v2 and v1."""
    v2, quota_v1 = root / "cpu.max", root / "cpu" / "cpu.cfs_quota_us"
    if v2.exists():
        quota, period = v2.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    if quota_v1.exists():
        quota_us = int(quota_v1.read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    return None
