"""Switches around the loader's source and view backend, so that one loader can run every phase.

One set of threads and buffers serves all phases; what changes between two phases is where encoded files
come from, and whether views are made at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8

from cmae.pipeline import LoaderState, ViewParams
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.sources.records import Extent, RawBatch, Source
from cmae.pipeline.stage_stats import KindTable, Stage
from cmae.pipeline.views.backend import ViewBackend, Views

Mode = Literal["storage", "memory"]


@dataclass
class _Supply:
    """What the source is to do until the next switch."""

    number: int
    mode: Mode
    start: LoaderState | None
    """Where storage is read from; None: go on where the last one stopped."""
    record: bool
    made: list[RawBatch] = field(default_factory=list)


class SwitchedSource:
    """A source that reads storage, or gives again what it has read before.

    A batch carries the number of its switch as `state.epoch`, so that what was still on its way when the
    source was switched can be told apart and dropped. Nothing is ever resumed from these states.

    Args:
        inner: Real source.
        max_recorded_bytes: Bytes of encoded files that are kept for the mode 'memory'.
    """

    def __init__(self, inner: Source, *, max_recorded_bytes: int = 1 << 30) -> None:
        self.inner = inner
        self.digest = inner.digest
        self.num_samples = inner.num_samples
        self.steps_per_epoch = inner.steps_per_epoch
        self.stage: Stage = inner.stage
        self._max_recorded_bytes = max_recorded_bytes
        self._supply = _Supply(0, "storage", None, record=False)
        self._recorded: list[RawBatch] = []

    @classmethod
    def holding(cls, inner: Source, recorded: list[RawBatch]) -> SwitchedSource:
        """A source that gives these batches from the start, and reads nothing."""
        source = cls(inner)
        source._recorded = list(recorded)
        source.switch("memory")
        return source

    @property
    def can_return(self) -> bool:
        """Whether a place in the data can be read a second time, and its place on disk is known."""
        return isinstance(self.inner, IndexedSource) and self.inner.is_local

    @property
    def samples_per_shard(self) -> float | None:
        """Mean number of samples in a shard; None where it is not known."""
        if not isinstance(self.inner, IndexedSource):
            return None
        return self.inner.samples_per_shard

    @property
    def recorded(self) -> list[RawBatch]:
        """Batches kept since the last switch that recorded."""
        return self._recorded

    def upcoming(self, state: LoaderState, num_batches: int) -> tuple[list[Extent], LoaderState]:
        """See `IndexedSource.upcoming`."""
        assert isinstance(self.inner, IndexedSource)
        return self.inner.upcoming(state, num_batches)

    def read(self, state: LoaderState) -> RawBatch:
        """See `IndexedSource.read`."""
        assert isinstance(self.inner, IndexedSource)
        return self.inner.read(state)

    def switch(self, mode: Mode, *, start: LoaderState | None = None, record: bool = False) -> int:
        """Change with the next batch that is asked for; returns the number of the switch."""
        number = self._supply.number + 1
        if record:
            self._recorded = []
        self._supply = _Supply(number, mode, start, record)
        return number

    def batches(self, state: LoaderState) -> Iterator[RawBatch]:
        """Batches as the switch says, without end."""
        storage: Iterator[RawBatch] | None = None
        while True:
            supply = self._supply
            if supply.mode == "storage" and (storage is None or supply.start is not None):
                storage = self.inner.batches(supply.start or state)
            source = self._again() if storage is None or supply.mode == "memory" else storage
            for number, raw in enumerate(source):
                if supply.record:
                    self._keep(raw)
                place = LoaderState(raw.state.seed, supply.number, number, self.digest)
                yield replace(raw, records=list(raw.records), state=place)
                if self._supply is not supply:
                    break

    def _again(self) -> Iterator[RawBatch]:
        while True:
            for raw in self._recorded:
                yield replace(raw, bad=[])

    def _keep(self, raw: RawBatch) -> None:
        kept = sum(record.data.size for one in self._recorded for record in one.records)
        if kept < self._max_recorded_bytes:
            self._recorded.append(raw)

    def replace(self, raw: RawBatch, bad: dict[int, str]) -> None:
        """As the real source does."""
        self.inner.replace(raw, bad)

    def close(self) -> None:
        """Close the real source."""
        self.inner.close()


class SwitchedBackend:
    """A view backend that can hand out views it has made before, at no cost."""

    def __init__(self, inner: ViewBackend) -> None:
        self.inner = inner
        self.instant = False
        """Give the same views again instead of making any."""
        self.stage: Stage = inner.stage
        self._views: Views | None = None

    @property
    def kinds(self) -> KindTable | None:
        """The real backend's counts by JPEG kind."""
        return self.inner.kinds

    def depth(self, batch_size: int) -> int:
        """Batches that the real backend works on at a time."""
        return self.inner.depth(batch_size)

    def submit(
        self,
        encoded: list[UInt8[np.ndarray, " n"]],
        params: ViewParams,
        *,
        cells: Int64[np.ndarray, " B"] | None = None,
    ) -> Any:
        """Start a batch, or take the one that is ready."""
        if self.instant and self._views is not None:
            return self._views
        return self.inner.submit(encoded, params, cells=cells)

    def collect(self, job: Any) -> Views:
        """Wait for a batch."""
        if isinstance(job, Views):
            return job
        views = self.inner.collect(job)
        if self._views is None and not views.bad:
            self._views = views
        return views

    def cancel(self) -> None:
        """Drop the real backend's work that has not begun."""
        self.inner.cancel()

    def close(self) -> None:
        """Close the real backend."""
        self.inner.close()
