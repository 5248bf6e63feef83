"""Counters from inside the loader: where the time of every thread goes, always on.

A thread of a stage is at any moment busy, starved (waiting for input) or blocked (waiting for room
downstream). It reports each change, a few times a batch and never once an image, so the three times of a
stage add up to threads x time. Snapshots subtract: the difference of two is the window between them.
What the counters cost is in docs/design/0008-counters.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64

_BINS_PER_DECADE = 20  # a bin is 12 % wide
_FIRST_DECADE, _NUM_DECADES = -6, 9  # 1 us to 1000 s; the first and last bin take what lies outside
_NUM_BINS = _BINS_PER_DECADE * _NUM_DECADES


@dataclass(frozen=True)
class Histogram:
    """Counts of durations in bins of equal width in their logarithm: merges by `+`, subtracts by `-`."""

    counts: tuple[int, ...] = (0,) * _NUM_BINS

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def __sub__(self, other: Histogram) -> Histogram:
        return Histogram(tuple(a - b for a, b in zip(self.counts, other.counts, strict=True)))

    @property
    def total(self) -> int:
        """Number of durations."""
        return sum(self.counts)

    def percentile_s(self, q: float) -> float:
        """Seconds below which `q` percent of the durations lie, to 6 %; nan when there are none."""
        if not 0 <= q <= 100:
            raise ValueError(f"q={q} must be between 0 and 100 percent")
        if not self.total:
            return float("nan")
        reached = np.cumsum(self.counts)
        rank = max(q / 100 * self.total, 1)  # of the sample asked for, counted from 1
        number = int(np.searchsorted(reached, rank))
        inside = 1 - (reached[number] - rank + 0.5) / self.counts[number]
        return float(10 ** (_FIRST_DECADE + (number + inside) / _BINS_PER_DECADE))

    def to_dict(self) -> dict[str, int]:
        """Bins that are not empty, by number; bin i begins at 10 ** (i / 20) microseconds."""
        return {str(number): count for number, count in enumerate(self.counts) if count}

    @classmethod
    def from_dict(cls, values: Mapping[str, int]) -> Histogram:
        """The inverse of `to_dict`."""
        return cls(tuple(values.get(str(number), 0) for number in range(_NUM_BINS)))


def _bins(seconds: Sequence[float] | npt.NDArray[np.float64]) -> Int64[np.ndarray, " n"]:
    decades = np.log10(np.maximum(seconds, 1e-9)) - _FIRST_DECADE
    number = np.clip(np.floor(decades * _BINS_PER_DECADE), 0, _NUM_BINS - 1)
    return np.asarray(number, dtype=np.int64)


@dataclass(frozen=True)
class StageSnapshot:
    """What one stage has done, summed over its threads."""

    name: str
    threads: int
    items: int
    """Samples."""
    bytes: int
    """Put out by the stage: encoded bytes for `read`, tensors for the others."""
    busy_s: float
    cpu_s: float
    """CPU seconds in `busy_s`, of spans that have ended; 0 where the threads are not Python's (DALI)."""
    starved_s: float
    """Waiting for input."""
    blocked_s: float
    """Waiting for room downstream."""
    histogram: Histogram
    """Of latencies: of an image for `read` and the CPU backend's `decode_augment`, of a batch elsewhere."""

    def percentile_ms(self, q: float) -> float:
        """Latency in ms below which `q` percent of the durations lie; nan when there are none."""
        return 1000 * self.histogram.percentile_s(q)

    def __sub__(self, other: StageSnapshot) -> StageSnapshot:
        """The window between two snapshots."""
        return _difference(self, other, keep=("name", "threads"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"histogram": self.histogram.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageSnapshot:
        """The inverse of `to_dict`."""
        return cls(**{**values, "histogram": Histogram.from_dict(values["histogram"])})


@dataclass(frozen=True)
class LoaderSnapshot:
    """The loader's counters since it was built, or between two moments when it is a difference."""

    time_s: float
    """Seconds since the loader was built; of a difference, the length of the window."""
    stages: dict[str, StageSnapshot]
    """`read`, `decode_augment`, `prefetch` and `queue`, in the order of the flow."""
    batches: int
    """Handed to the caller; batches made ahead do not count."""
    samples: int
    wait_s: float
    """Seconds that the caller was blocked in `next`."""
    queue_depth_mean: float
    """Batches in the queue, averaged over time."""
    bad_samples: int
    """Bad records behind the batches handed out."""

    def __sub__(self, other: LoaderSnapshot) -> LoaderSnapshot:
        """The window between two snapshots."""
        window = _difference(self, other, keep=("queue_depth_mean",))
        depth_s = self.queue_depth_mean * self.time_s - other.queue_depth_mean * other.time_s
        mean = depth_s / window.time_s if window.time_s > 0 else 0.0
        return replace(window, queue_depth_mean=mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"stages": {name: one.to_dict() for name, one in self.stages.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoaderSnapshot:
        """The inverse of `to_dict`; what this version does not count is passed over."""
        known = {one.name: values[one.name] for one in fields(cls)}
        stages = {name: StageSnapshot.from_dict(one) for name, one in values["stages"].items()}
        return cls(**{**known, "stages": stages})


_Snapshot = TypeVar("_Snapshot", StageSnapshot, LoaderSnapshot)


def _difference(one: _Snapshot, other: _Snapshot, *, keep: Sequence[str]) -> _Snapshot:
    """Subtract every field but those to `keep`, and inside dictionaries every value."""

    def subtract(mine: Any, theirs: Any) -> Any:
        if isinstance(mine, dict):
            return {key: value - theirs[key] for key, value in mine.items()}
        return mine - theirs

    names = [field.name for field in fields(one) if field.name not in keep]
    values = {name: subtract(getattr(one, name), getattr(other, name)) for name in names}
    return replace(one, **values)


class State(Enum):
    """What a thread of a stage does."""

    BUSY = 0
    STARVED = 1
    BLOCKED = 2
    IDLE = 3
    """Without work in a pool: blocked while the stage downstream is, else starved."""
    AWAY = 4
    """Not the stage's business: the training thread between two calls of `next`."""


class _Clock:
    """One thread's state, since when, and what the stage downstream had been blocked until then."""

    __slots__ = ("blocked_s", "cpu_s", "since_s", "state")

    def __init__(self, state: State, now: float) -> None:
        self.state, self.since_s, self.cpu_s, self.blocked_s = state, now, 0.0, 0.0


class Stage:
    """Live counters of one stage of the loader; its threads report to it, any thread may read it.

    Args:
        name: Name of the stage.
        threads: Threads that work in it. Each counts from now on, whether or not it has started yet.
        first_state: IDLE for a pool's threads; AWAY for one that is not there to serve the stage.
        downstream: Stage that takes this one's output: while it is blocked, IDLE threads count as blocked.
    """

    def __init__(
        self,
        name: str,
        *,
        threads: int,
        first_state: State = State.IDLE,
        downstream: Stage | None = None,
    ) -> None:
        self.name = name
        self.downstream = downstream
        self._threads = threads
        self._first_state = first_state
        self._lock = threading.Lock()
        self._local = threading.local()
        now = time.perf_counter()
        self._clocks = [_Clock(first_state, now) for _ in range(threads)]
        self._unclaimed = list(self._clocks)
        self._seconds = dict.fromkeys(State, 0.0)
        self._cpu_s = 0.0
        self._items = self._bytes = 0
        self._counts = np.zeros(_NUM_BINS, dtype=np.int64)

    def switch(self, state: State) -> None:
        """The calling thread does something else from now on."""
        cpu_s = time.thread_time()
        with self._lock:
            clock = self._claim()
            now = time.perf_counter()
            for old, seconds in self._spans(clock, now):
                self._seconds[old] += seconds
            if clock.state is State.BUSY:
                self._cpu_s += cpu_s - clock.cpu_s
            clock.state, clock.since_s, clock.cpu_s = state, now, cpu_s
            if state is State.IDLE and self.downstream is not None:
                clock.blocked_s = self.downstream.seconds(State.BLOCKED, now=now)

    def add(
        self,
        *,
        items: int,
        num_bytes: int,
        latencies_s: Sequence[float] | npt.NDArray[np.float64] = (),
    ) -> None:
        """Count work that is done; once a batch or so, the latencies of its images together."""
        bins = _bins(latencies_s)
        with self._lock:
            self._items += items
            self._bytes += num_bytes
            np.add.at(self._counts, bins, 1)

    def seconds(self, state: State, *, now: float | None = None) -> float:
        """Seconds spent in a state so far, spans that have not ended included."""
        with self._lock:
            now = time.perf_counter() if now is None else now
            spans = (max(now - one.since_s, 0.0) for one in self._clocks if one.state is state)
            return self._seconds[state] + sum(spans)

    def snapshot(self) -> StageSnapshot:
        """The counts so far, spans that have not ended included."""
        with self._lock:
            now = time.perf_counter()
            seconds = dict(self._seconds)
            for clock in self._clocks:
                for state, span in self._spans(clock, now):
                    seconds[state] += span
            return StageSnapshot(
                name=self.name,
                threads=self._threads,
                items=self._items,
                bytes=self._bytes,
                busy_s=seconds[State.BUSY],
                cpu_s=self._cpu_s,
                starved_s=seconds[State.STARVED],
                blocked_s=seconds[State.BLOCKED],
                histogram=Histogram(tuple(self._counts.tolist())),
            )

    def _claim(self) -> _Clock:
        clock: _Clock | None = getattr(self._local, "clock", None)
        if clock is None:
            if not self._unclaimed:  # a thread more than was announced
                self._unclaimed.append(_Clock(self._first_state, time.perf_counter()))
                self._clocks.append(self._unclaimed[-1])
            clock = self._local.clock = self._unclaimed.pop()
        return clock

    def _spans(self, clock: _Clock, now: float) -> list[tuple[State, float]]:
        """The clock's present span, an idle one divided into starved and blocked."""
        seconds = now - clock.since_s
        if clock.state is not State.IDLE:
            return [(clock.state, seconds)]
        if self.downstream is None:
            return [(State.STARVED, seconds)]
        # The stage downstream is never locked while it reads this one.
        blocked = self.downstream.seconds(State.BLOCKED, now=now) - clock.blocked_s
        blocked = min(max(blocked, 0.0), seconds)
        return [(State.BLOCKED, blocked), (State.STARVED, seconds - blocked)]


class QueueDepth:
    """Integral over time of the number of batches in a queue. One thread puts, others get."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth, self._integral = 0, 0.0
        self._start = self._since = time.perf_counter()

    def add(self, change: int) -> None:
        """Note that a batch was put (1) or taken (-1)."""
        with self._lock:
            now = time.perf_counter()
            self._integral += self._depth * (now - self._since)
            self._depth, self._since = self._depth + change, now

    def read(self) -> tuple[float, float]:
        """Seconds since the queue was made, and the mean depth over them."""
        with self._lock:
            now = time.perf_counter()
            integral = self._integral + self._depth * (now - self._since)
            elapsed = now - self._start
            return elapsed, integral / elapsed if elapsed > 0 else 0.0
