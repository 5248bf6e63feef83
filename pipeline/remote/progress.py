"""How far copying and fetching are, for people."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FillProgress:
    """How far the fetching of indices or shards has come."""

    what: Literal["indices", "shards"]
    num_done: int
    num_total: int
    bytes_done: int
    bytes_total: int
    """0 where it is not known beforehand."""
    bytes_per_s: float
    eta_s: float | None
    """Seconds to the end at the mean rate so far; None as long as there is no rate."""


class ProgressReporter:
    """Reports to a callback how far a transfer is, at most once a second, from whatever thread."""

    def __init__(
        self,
        what: Literal["indices", "shards"],
        callback: Callable[[FillProgress], None] | None,
        *,
        num_total: int,
        num_done: int = 0,
        bytes_total: int = 0,
        bytes_done: int = 0,
    ) -> None:
        self._what: Literal["indices", "shards"] = what
        self._callback = callback
        self._num = [num_done, num_total]
        self._bytes = [bytes_done, bytes_total]
        self._before = (num_done, bytes_done)
        self._begun = self._reported = time.monotonic()
        self._lock = threading.Lock()

    def add_items(self, amount: int) -> None:
        """Count finished indices or shards. From any thread."""
        self._add(amount, 0)

    def add_bytes(self, amount: int) -> None:
        """Count bytes that arrived. From any thread."""
        self._add(0, amount)

    def close(self) -> None:
        """Report the last state, if anything was reported or done for longer than a moment."""
        if self._reported > self._begun or time.monotonic() > self._begun + 1:
            self._report()

    def _add(self, num: int, num_bytes: int) -> None:
        with self._lock:
            self._num[0] += num
            self._bytes[0] += num_bytes
            now = time.monotonic()
            if now < self._reported + 1:
                return
            self._reported = now
        self._report()

    def _report(self) -> None:
        if self._callback is None:
            return
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        rate = (self._bytes[0] - self._before[1]) / elapsed
        items = (self._num[0] - self._before[0]) / elapsed
        left_bytes, left_items = self._bytes[1] - self._bytes[0], self._num[1] - self._num[0]
        eta = (
            left_bytes / rate if self._bytes[1] and rate else left_items / items if items else None
        )
        num_done, num_total = self._num
        bytes_done, bytes_total = self._bytes
        self._callback(
            FillProgress(self._what, num_done, num_total, bytes_done, bytes_total, rate, eta)
        )


class ByteCounter:
    """Bytes of one shard, which count once however often parts of it come."""

    def __init__(self, report: ProgressReporter) -> None:
        self._report = report
        self._counted = 0

    def add(self, amount: int) -> None:
        """Count bytes of the shard; those that were counted before are taken off."""
        self._counted += amount
        self._report.add_bytes(amount)

    def complete(self, size: int) -> None:
        """The shard is complete: other processes may have brought it, or parts came twice."""
        self._report.add_bytes(size - self._counted)
