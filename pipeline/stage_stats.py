"""Counters from inside the loader: where the time of every thread goes, always on.

A thread of a stage is at any moment busy, starved (waiting for input) or blocked (waiting for room
downstream). It reports each change, a few times a batch and never once an image, so the three times of a
stage add up to threads x time. Snapshots subtract: the difference of two is the window between them.
What the counters cost is in docs/design/0010-counters.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64

from cmae.pipeline.formats.jpeg import JpegKind

_BINS_PER_DECADE = 20  # a bin is 12 % wide
_FIRST_DECADE, _NUM_DECADES = -6, 9  # 1 us to 1000 s; the first and last bin take what lies outside
_NUM_BINS = _BINS_PER_DECADE * _NUM_DECADES

MEGAPIXEL_EDGES = (0.1, 0.25, 0.5, 1.0, 4.0)
"""Upper ends of the size classes in `KindSnapshot`; the last class has none."""


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
    """Of latencies: of an image for `read` and the host backend's `views`, of a batch elsewhere."""

    def percentile_ms(self, q: float) -> float:
        """Latency in ms below which `q` percent of the durations lie; nan when there are none."""
        return 1000 * self.histogram.percentile_s(q)

    def __sub__(self, other: StageSnapshot) -> StageSnapshot:
        return StageSnapshot(
            name=self.name,
            threads=self.threads,
            items=self.items - other.items,
            bytes=self.bytes - other.bytes,
            busy_s=self.busy_s - other.busy_s,
            cpu_s=self.cpu_s - other.cpu_s,
            starved_s=self.starved_s - other.starved_s,
            blocked_s=self.blocked_s - other.blocked_s,
            histogram=self.histogram - other.histogram,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"histogram": self.histogram.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageSnapshot:
        """The inverse of `to_dict`."""
        return cls(**{**values, "histogram": Histogram.from_dict(values["histogram"])})


@dataclass(frozen=True)
class KindSnapshot:
    """Images of one JPEG kind, and what making their views took on the host backend."""

    items: int
    busy_s: float
    items_by_megapixels: tuple[int, ...]
    """For the size classes of MEGAPIXEL_EDGES."""
    busy_s_by_megapixels: tuple[float, ...]

    def __sub__(self, other: KindSnapshot) -> KindSnapshot:
        def differ(name: str) -> Any:
            pairs = zip(getattr(self, name), getattr(other, name), strict=True)
            return tuple(mine - theirs for mine, theirs in pairs)

        return KindSnapshot(
            self.items - other.items,
            self.busy_s - other.busy_s,
            differ("items_by_megapixels"),
            differ("busy_s_by_megapixels"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KindSnapshot:
        """The inverse of `to_dict`."""
        return cls(
            values["items"],
            values["busy_s"],
            tuple(values["items_by_megapixels"]),
            tuple(values["busy_s_by_megapixels"]),
        )


_NO_IMAGES = KindSnapshot(
    0, 0.0, (0,) * (len(MEGAPIXEL_EDGES) + 1), (0.0,) * (len(MEGAPIXEL_EDGES) + 1)
)


@dataclass(frozen=True)
class LoaderSnapshot:
    """The loader's counters since it was built, or between two moments when it is a difference."""

    time_s: float
    """Seconds since the loader was built; of a difference, the length of the window."""
    stages: dict[str, StageSnapshot]
    """`read`, `views`, `finish` and `ready`, in the order of the flow."""
    batches: int
    """Handed to the caller; batches made ahead do not count."""
    samples: int
    wait_s: float
    """Seconds that the caller was blocked in `next`."""
    queue_depth_mean: float
    """Ready batches in the queue, averaged over time."""
    bad_samples: int
    """Bad records behind the batches handed out."""
    views_by_kind: dict[str, KindSnapshot] = field(default_factory=dict)
    """By the name of the JpegKind; empty unless the host backend makes the views."""

    def __sub__(self, other: LoaderSnapshot) -> LoaderSnapshot:
        time_s = self.time_s - other.time_s
        depth_s = self.queue_depth_mean * self.time_s - other.queue_depth_mean * other.time_s
        return LoaderSnapshot(
            time_s=time_s,
            stages={name: stage - other.stages[name] for name, stage in self.stages.items()},
            batches=self.batches - other.batches,
            samples=self.samples - other.samples,
            wait_s=self.wait_s - other.wait_s,
            queue_depth_mean=depth_s / time_s if time_s > 0 else 0.0,
            bad_samples=self.bad_samples - other.bad_samples,
            views_by_kind={
                name: kind - other.views_by_kind.get(name, _NO_IMAGES)
                for name, kind in self.views_by_kind.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {
            "stages": {name: stage.to_dict() for name, stage in self.stages.items()},
            "views_by_kind": {name: kind.to_dict() for name, kind in self.views_by_kind.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoaderSnapshot:
        """The inverse of `to_dict`."""
        stages = {name: StageSnapshot.from_dict(one) for name, one in values["stages"].items()}
        kinds = {
            name: KindSnapshot.from_dict(one)
            for name, one in values.get("views_by_kind", {}).items()
        }
        return cls(**{**values, "stages": stages, "views_by_kind": kinds})


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
        name: of the stage.
        threads: that work in it. Each counts from now on, whether or not it has started yet.
        first_state: IDLE for a pool's threads; AWAY for one that is not there to serve the stage.
        downstream: while it is blocked, IDLE threads of this stage count as blocked.
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


class KindTable:
    """Live counts of images and their seconds by JPEG kind and size."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        shape = (len(JpegKind), len(MEGAPIXEL_EDGES) + 1)
        self._items = np.zeros(shape, dtype=np.int64)
        self._busy_s = np.zeros(shape)

    @staticmethod
    def cells(
        kind: npt.NDArray[np.uint8], height: npt.NDArray[np.int32], width: npt.NDArray[np.int32]
    ) -> Int64[np.ndarray, " n"]:
        """The table's cell of each image, for `add`."""
        row = np.searchsorted(_KIND_VALUES, kind)
        column = np.searchsorted(MEGAPIXEL_EDGES, height * width.astype(np.int64) / 1e6)
        return np.asarray(row * (len(MEGAPIXEL_EDGES) + 1) + column, dtype=np.int64)

    def add(self, cells: Int64[np.ndarray, " n"], seconds: npt.NDArray[np.float64]) -> None:
        """Count images that are done."""
        with self._lock:
            np.add.at(self._items.reshape(-1), cells, 1)
            np.add.at(self._busy_s.reshape(-1), cells, seconds)

    def snapshot(self) -> dict[str, KindSnapshot]:
        """Kinds met so far."""
        with self._lock:
            return {
                kind.name: KindSnapshot(
                    int(items.sum()),
                    float(busy_s.sum()),
                    tuple(items.tolist()),
                    tuple(busy_s.tolist()),
                )
                for kind, items, busy_s in zip(JpegKind, self._items, self._busy_s, strict=True)
                if items.any()
            }


_KIND_VALUES = np.array(sorted(JpegKind), dtype=np.uint8)
