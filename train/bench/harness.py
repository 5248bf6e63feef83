"""What every benchmark shares: interleaved rounds, medians, the machine's description, result files."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from cmae.pipeline.formats.atomic import atomic_write
from cmae.train.machine import cpu_name, package_version
from cmae.train.monitor.gpu import GpuReader, NoNvmlError, bus_id_of

PACKAGES = (
    "cmae",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "nvidia-dali-cuda130",
    "webdataset",
    "numpy",
)


@dataclass(frozen=True)
class Measurement:
    """One measurement window of work."""

    images: int
    wall_s: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        """Rate on the wall clock."""
        return self.images / self.wall_s

    @property
    def cpu_s_per_1000(self) -> float:
        """CPU-seconds of this process and its children for 1000 images."""
        return 1000 * self.cpu_s / self.images


class Report(NamedTuple):
    """What a benchmark found."""

    benchmark: str
    """The question, for instance 'loader'."""
    label: str
    """Tells apart two results of one benchmark, for instance 'vit-l'; '' where there is one."""
    config: dict[str, Any]
    """Everything that was chosen."""
    rows: list[dict[str, Any]]
    """One a contender."""


class CpuClock:
    """CPU-seconds of this process and its living and finished children."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def read(self) -> float:
        """Seconds since the process started."""
        own, gone = (
            resource.getrusage(resource.RUSAGE_SELF),
            resource.getrusage(resource.RUSAGE_CHILDREN),
        )
        total = own.ru_utime + own.ru_stime + gone.ru_utime + gone.ru_stime
        for child in self._process.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total


def time_batches(batches: Iterator[int], *, warmup: int, count: int) -> Measurement:
    """Draw batches from an iterator that yields their sizes, the first ones untimed."""
    for _ in range(warmup):
        next(batches)
    clock = CpuClock()
    cpu, wall = clock.read(), time.perf_counter()
    images = sum(next(batches) for _ in range(count))
    return Measurement(images, time.perf_counter() - wall, clock.read() - cpu)


def interleave(
    contenders: Mapping[str, Callable[[], Measurement]], *, rounds: int
) -> dict[str, list[Measurement]]:
    """Run every contender once per round, so that drift of the machine meets all of them alike."""
    measured: dict[str, list[Measurement]] = {name: [] for name in contenders}
    for index in range(rounds):
        for name, run in contenders.items():
            result = run()
            measured[name].append(result)
            print(
                f"round {index + 1}/{rounds}  {name:<44} {result.images_per_s:8.1f} images/s",
                file=sys.stderr,
            )
    return measured


def summarise(values: Sequence[float]) -> dict[str, float | int]:
    """Median, smallest, largest and count."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def describe_machine() -> dict[str, Any]:
    """Device, driver, versions and git revision."""
    return {
        "device": device_name(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "driver": _shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "gpu": gpu_state(),
        **_revision(),
    }


def gpu_state() -> dict[str, float]:
    """Clock, power, temperature and memory of the GPU now; empty without one or without NVML."""
    if not torch.cuda.is_available():
        return {}
    try:
        return GpuReader(bus_id_of(torch.device("cuda", torch.cuda.current_device()))).read()
    except NoNvmlError:
        return {}


def _revision() -> dict[str, Any]:
    """The commit of the checkout that runs, or the version of the installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").exists():
        return {"git": package_version("cmae"), "git_dirty": False}
    return {
        "git": _shell("git", "-C", str(root), "rev-parse", "--short", "HEAD") or "unknown",
        "git_dirty": bool(_shell("git", "-C", str(root), "status", "--porcelain", "-uno")),
    }


def device_name() -> str:
    """Name of the GPU, or of the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{cpu_name()} ({len(os.sched_getaffinity(0))} cores)"


def write_report(folder: Path, report: Report) -> Path:
    """Write `<date>_<benchmark>_<device>_<revision>.json`, what tables are made from.

    Args:
        folder: Folder of result files; made if missing.
        report: What was found.
    """
    benchmark, label, config, rows = report
    machine = describe_machine()
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    day = time.strftime("%Y-%m-%d")
    path = folder / f"{day}_{benchmark}_{device}_{machine['git']}{label and '_' + label}.json"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": benchmark,
        "label": label,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine,
        "config": config,
        "rows": rows,
    }
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    return path


def _shell(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
