"""`cmae doctor --all_ranks`: what only all machines together can tell."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from cmae.pipeline.sources.expand import expand_shards
from cmae.train.distributed import World, from_main, gather_values, join_world
from cmae.train.machine import cgroup_limit, driver_version, package_version, usable_cores
from cmae.train.monitor.console import PlainConsole

ALL_REDUCE_BYTES = 64 * 2**20
"""Size that is reduced: a bucket of gradients of a large model."""
_REPEATS = 5
READ_BYTES = 256 * 2**20
"""Most that each node reads of its shard."""
SLOW = 0.7
"""A node that reads at less than this share of the median is told of."""
MUST_AGREE = ("python", "torch", "CUDA", "triton", "DALI", "webdataset", "cmae", "driver", "GPU")
"""Facts in which the nodes of one run must not differ."""


@dataclass(frozen=True)
class RankReport:
    """What one rank found."""

    host: str
    rank: int
    facts: dict[str, str]
    """Versions and sizes, by name."""
    read_mb_per_s: float | None
    """Of a shard, past the page cache where the system lets it be dropped; None without shards."""
    sees_runs: str
    """'' if the folder of runs can be written and shows what the first rank wrote; else why not."""


def check_all_ranks(*, shards: str | None, runs: Path | None) -> int:
    """Check all machines of a run together and print what differs; started on all of them by a launcher.

    Args:
        shards: Shards to read on each node; None: none.
        runs: Folder that all must be able to write to, such as the one of `run.out`; None: none.

    Returns:
        The exit code: 1 if the nodes differ in what they must agree in, or the folder is not shared.
    """
    with join_world() as world:
        token = _put_token(runs, world)
        rate = all_reduce_rate(world)
        own = RankReport(
            socket.gethostname(),
            world.rank,
            _facts(world),
            _read_rate(shards, world.rank) if shards else None,
            _look_at(runs, token),
        )
        reports: list[RankReport] = gather_values(own, world)
        if token is not None and world.is_main:
            token.unlink(missing_ok=True)
        if not world.is_main:
            return 0
        return _print(reports, rate, world)


def all_reduce_rate(world: World) -> float | None:
    """Bus bandwidth of an all-reduce, bytes/s: size x 2 (n - 1) / n / seconds; None for one rank."""
    if world.world_size == 1:
        return None
    values = torch.zeros(ALL_REDUCE_BYTES // 4, device=world.device)
    seconds = []
    for _ in range(_REPEATS + 1):
        _wait(world, values)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        _wait(world, values)
        seconds.append(time.perf_counter() - start)
    count = world.world_size
    return ALL_REDUCE_BYTES * 2 * (count - 1) / count / statistics.median(seconds[1:])


def _wait(world: World, values: Tensor) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(values.device)


def _facts(world: World) -> dict[str, str]:
    """Versions and limits of this machine."""
    shared = Path("/dev/shm")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "triton": package_version("triton"),
        "DALI": package_version("nvidia-dali-cuda130"),
        "webdataset": package_version("webdataset"),
        "cmae": package_version("cmae"),
        "driver": driver_version(),
        "GPU": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None,
        "cores": f"{usable_cores():g}",
        "quota": None if (quota := cgroup_limit()) is None else f"{quota:g} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "/dev/shm": f"{shutil.disk_usage(shared).total / 2**30:.1f} GiB"
        if shared.is_dir()
        else None,
    }
    if world.device.type == "cuda":
        facts["clock"] = f"{torch.cuda.clock_rate(world.device)} MHz"
    return {name: "-" if value is None else str(value) for name, value in facts.items()}


def _put_token(runs: Path | None, world: World) -> Path | None:
    """A file that the first rank leaves for the others, named the same on all."""
    if runs is None:
        return None
    name = f".cmae-doctor-{secrets.token_hex(4)}"
    if world.is_main:
        with suppress(OSError):  # every rank tells that it does not see it
            runs.mkdir(parents=True, exist_ok=True)
            (runs / name).touch()
    token: Path = runs / from_main(name, world)  # the others have the name once the file is there
    return token


def _look_at(runs: Path | None, token: Path | None) -> str:
    """Why the folder of runs will not do here; '' if it will."""
    if runs is None or token is None:
        return ""
    probe = token.with_name(f"{token.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    for _ in range(20):  # network file systems show a new file late
        if token.exists():
            return ""
        time.sleep(0.25)
    return "is another folder than the first rank's: what that wrote is not seen here"


def _read_rate(pattern: str, rank: int) -> float:
    """MB/s of reading a shard from its beginning, one that differs between ranks."""
    paths = [path for path in expand_shards(pattern) if "://" not in path]
    if not paths:
        return 0.0
    path = paths[rank % len(paths)]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        start, done = time.perf_counter(), 0
        while done < READ_BYTES and (chunk := os.read(descriptor, 4 * 2**20)):
            done += len(chunk)
        return done / 1e6 / max(1e-9, time.perf_counter() - start)
    finally:
        os.close(descriptor)


def find_problems(reports: Sequence[RankReport]) -> tuple[list[str], list[str]]:
    """What must be put right before a run, and what should be looked at; a line each."""
    failures: list[str] = []
    warnings: list[str] = []
    for name in reports[0].facts:
        values: dict[str, list[str]] = {}
        for one in reports:
            values.setdefault(one.facts.get(name, "-"), []).append(one.host)
        if len(values) > 1:
            told = "; ".join(
                f"{value} on {', '.join(sorted(set(hosts))[:4])}" for value, hosts in values.items()
            )
            (failures if name in MUST_AGREE else warnings).append(f"{name} differs: {told}")
    failures += [
        f"{one.host}, rank {one.rank}: the folder of runs {one.sees_runs}"
        for one in reports
        if one.sees_runs
    ]
    rates = [one.read_mb_per_s for one in reports if one.read_mb_per_s]
    if rates:
        median = statistics.median(rates)
        warnings += [
            f"{one.host}, rank {one.rank} reads {one.read_mb_per_s:.0f} MB/s, the median is {median:.0f}"
            for one in reports
            if one.read_mb_per_s is not None and one.read_mb_per_s < SLOW * median
        ]
    return failures, warnings


def _print(reports: Sequence[RankReport], rate: float | None, world: World) -> int:
    console = PlainConsole(highlight=True)
    table = Table(title=f"cmae doctor, {len(reports)} ranks", title_justify="left")
    shown = ("torch", "driver", "GPU", "cores", "memory", "/dev/shm")
    for column in ("host", "ranks", *shown, "reads"):
        table.add_column(column, overflow="fold")
    by_host: dict[str, list[RankReport]] = {}
    for one in reports:
        by_host.setdefault(one.host, []).append(one)
    for host, own in by_host.items():
        facts = own[0].facts
        read = [one.read_mb_per_s for one in own if one.read_mb_per_s is not None]
        reads = f"{statistics.median(read):.0f} MB/s" if read else "-"
        table.add_row(host, str(len(own)), *(facts[name] for name in shown), reads)
    console.print(table)
    if rate is not None:
        kind = "NCCL" if world.device.type == "cuda" else "gloo"
        console.print(
            f"all-reduce of {ALL_REDUCE_BYTES / 2**20:.0f} MiB over {kind}: {rate / 1e9:.2f} GB/s of the bus"
        )
    failures, warnings = find_problems(reports)
    for line in warnings:
        console.print(f"warn: {line}", soft_wrap=True)
    for line in failures:
        console.print(f"fail: {line}", soft_wrap=True)
    console.print("not ready" if failures else "ready")
    return 1 if failures else 0
