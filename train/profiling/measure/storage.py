"""How the storage's rate grows with the number of reads at a time: latency at first, bandwidth in the end."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cmae.pipeline import LoaderState
from cmae.train.profiling.analysis.records import Curve
from cmae.train.profiling.measure.page_cache import evict, touch
from cmae.train.profiling.measure.switches import SwitchedSource

READERS = (1, 2, 4, 8)
_SATURATED = 1.3
"""Twice the readers bring less than this: more readers are no answer."""


@dataclass(frozen=True)
class StorageCurve:
    """Images per second by number of readers, CRC included."""

    images_per_s: dict[int, float]
    bytes_per_image: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second that more readers do not exceed; infinite where the end was not reached."""
        readers = sorted(self.images_per_s)
        if len(readers) < 2:
            return math.inf
        half, most = (self.images_per_s[number] for number in readers[-2:])
        if most >= _SATURATED * half:
            return math.inf
        return (half + most) / 2 * self.bytes_per_image

    def to_curve(self, cache: str, readers: float, world_size: int) -> Curve:
        """The curve for a report, over all ranks.

        Args:
            cache: Where the files lay: 'warm' is in the page cache, 'cold' is not.
            readers: Batches that the run reads at a time.
            world_size: Number of ranks.
        """
        return Curve(
            f"reading alone, {'in' if cache == 'warm' else 'not in'} the page cache (measured)",
            "batches read at a time",
            tuple(map(float, self.images_per_s)),
            tuple(rate * world_size for rate in self.images_per_s.values()),
            readers,
        )


def probe_storage(
    source: SwitchedSource, start: LoaderState, *, cold: bool, budget_s: float = 10.0
) -> tuple[StorageCurve, LoaderState]:
    """Read batches with 1, 2, 4 and 8 readers, as long as the budget lasts.

    Args:
        source: Source whose loader is idle.
        start: Place where to read.
        cold: Whether to evict the files first; else they are read once before.
        budget_s: Seconds after which no new number of readers is tried.

    Returns:
        The curve, and the state after what was read.
    """
    begun, num_bytes, num_images = time.monotonic(), 0, 0
    rates: dict[int, float] = {}
    for readers in READERS:
        if rates and time.monotonic() - begun > budget_s:
            break
        extents, after = source.upcoming(start, readers)
        if cold:
            evict(extents)
        else:
            touch(extents)
        states = [source.upcoming(start, number)[1] for number in range(readers)]
        with ThreadPoolExecutor(readers) as pool:
            first = time.perf_counter()
            list(pool.map(source.read, states))
            seconds = time.perf_counter() - first
        rates[readers] = len(extents) / seconds
        num_bytes += sum(extent.size for extent in extents)
        num_images += len(extents)
        start = after
    return StorageCurve(rates, num_bytes / num_images), start
