"""Map over shards or files with threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from cmae.errors import require

Item = TypeVar("Item")
Result = TypeVar("Result")


MAX_WORKERS = 16
"""More threads only queue at the disk."""


def default_workers() -> int:
    """CPU cores this process may use, at most MAX_WORKERS."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def no_progress(amount: int) -> None:
    """Stand-in for a progress callback."""


def run_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
    stop: Callable[[], None] | None = None,
) -> list[Result]:
    """Map over items with threads and return results in order; `progress(1)` after each.

    Threads suffice: reading and CRC32 release the interpreter lock. An exception, Ctrl-C included, drops
    what has not started and calls `stop`, which has functions that take long return early.
    """
    require(workers is None or workers >= 1, "workers", workers, ">= 1, or null")
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
                progress(1)
        except BaseException:
            # Before the event: a thread that stops for it would take the next item.
            pool.shutdown(wait=False, cancel_futures=True)
            if stop is not None:
                stop()
            raise
    return [future.result() for future in futures]
