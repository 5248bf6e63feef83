"""One measurement window of one phase: steps timed one by one, and who took CPU time meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from cmae.pipeline import LoaderSnapshot
from cmae.train.profiling.analysis.records import Reading


def measure_window(
    phase: str,
    draw: Callable[[], Any],
    step: Callable[[Any], object],
    *,
    count: int,
    images_per_step: int,
    synchronise: Callable[[], None],
    snapshot: Callable[[], LoaderSnapshot] | None = None,
) -> Reading:
    """Time `count` steps, each on what `draw` returns.

    Args:
        phase: Name of the phase.
        draw: Function that returns the next batch.
        step: Function that trains on it.
        count: Number of steps.
        images_per_step: Images of this rank in a step.
        synchronise: Function that waits for the device.
        snapshot: Function that reads the loader's counters; None where no loader runs.
    """
    synchronise()
    meter = _Meter()
    before = snapshot() if snapshot else None
    times = [time.perf_counter()]
    next_s = next_cpu_s = step_cpu_s = 0.0
    for _ in range(count):
        start, start_cpu = time.perf_counter(), time.thread_time()
        batch = draw()
        middle, middle_cpu = time.perf_counter(), time.thread_time()
        step(batch)
        next_s += middle - start
        next_cpu_s += middle_cpu - start_cpu
        step_cpu_s += time.thread_time() - middle_cpu
        times.append(time.perf_counter())
    synchronise()
    times[-1] = time.perf_counter()
    process_cpu_s, others_cpu_s, run_delay_s = meter.read()
    return Reading(
        phase=phase,
        step_times_ms=tuple(1000 * (b - a) for a, b in pairwise(times)),
        wall_s=times[-1] - times[0],
        images=count * images_per_step,
        next_s=next_s,
        next_cpu_s=next_cpu_s,
        step_cpu_s=step_cpu_s,
        process_cpu_s=process_cpu_s,
        others_cpu_s=others_cpu_s,
        run_delay_s=run_delay_s,
        loader=snapshot() - before if snapshot and before else None,
    )


class _Meter:
    """CPU time of this process and of the others, since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> tuple[float, float, float]:
        """CPU seconds of this process, of others on its cores, and seconds spent waiting for a core."""
        own, busy, delay = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return own, max(0.0, busy - own), max(0.0, delay)

    def _now(self) -> tuple[float, float, float]:
        return process_cpu_s(), _busy_s(), _run_delay_s()


def process_cpu_s() -> float:
    """CPU seconds of this process and of its children, alive or gone."""
    total = time.process_time()
    gone = os.times()
    total += gone.children_user + gone.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def wait_until_idle(*, limit_s: float = 2.0) -> None:
    """Wait until this process does nothing: a loader that fills its queue must not slow what comes next."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        before = process_cpu_s()
        time.sleep(0.05)
        if process_cpu_s() - before < 0.005:
            return


def _busy_s() -> float:
    """CPU seconds that the cores of this process spent on anything."""
    every = psutil.cpu_times(percpu=True)
    allowed = [every[core] for core in os.sched_getaffinity(0) if core < len(every)]
    return float(sum(t.user + t.nice + t.system for t in allowed))


def _run_delay_s() -> float:
    """Seconds that the living threads of this process were ready to run and had no core."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread is gone, or the kernel does not tell
            continue
    return total / 1e9


@contextmanager
def background_consumer(take: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """A thread that takes one batch and throws it away, each time the function that is yielded is called.

    It falls behind when batches come too slowly; leaving waits for the batch that is being taken.

    Raises:
        BaseException: Whatever `take` raised.
    """
    wanted, stop = threading.Semaphore(0), threading.Event()
    failures: list[BaseException] = []

    def consume() -> None:
        try:
            while True:
                wanted.acquire()
                if stop.is_set():
                    return
                take()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=consume, name="cmae-consumer", daemon=True)
    thread.start()
    try:
        yield wanted.release
    finally:
        stop.set()
        wanted.release()
        thread.join()
    if failures:
        raise failures[0]


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
