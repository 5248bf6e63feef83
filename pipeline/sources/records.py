"""What a source of encoded samples hands on, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from cmae.pipeline.bad_samples import BadSample
from cmae.pipeline.batch import LoaderState
from cmae.pipeline.formats.jpeg import JpegKind
from cmae.pipeline.stage_stats import Stage


@dataclass(frozen=True)
class Record:
    """One encoded image that passed its checks."""

    data: UInt8[np.ndarray, " n"]
    height: int
    width: int
    label: int
    sample_id: int
    position: int
    """Where it lies: its number in the data set (indexed), or in the shard (stream)."""
    key: str = ""
    kind: int = JpegKind.BASELINE


@dataclass
class RawBatch:
    """Encoded samples of one micro-batch. A slot keeps its id even when another record fills it."""

    records: list[Record]
    sample_id: Int64[np.ndarray, " B"]
    epoch: int
    state: LoaderState
    """The position after this batch."""
    bad: list[BadSample]
    """Records that could not be used, met on the way to this batch."""
    num_own: int
    """Slots from this one on are padding: the epoch had these samples before (last_batch='pad')."""

    @property
    def encoded(self) -> list[UInt8[np.ndarray, " n"]]:
        """The files' bytes."""
        return [record.data for record in self.records]

    @property
    def height(self) -> Int32[np.ndarray, " B"]:
        """Of the stored images."""
        return np.array([record.height for record in self.records], dtype=np.int32)

    @property
    def width(self) -> Int32[np.ndarray, " B"]:
        """Of the stored images."""
        return np.array([record.width for record in self.records], dtype=np.int32)

    @property
    def kind(self) -> UInt8[np.ndarray, " B"]:
        """JpegKind of each image."""
        return np.array([record.kind for record in self.records], dtype=np.uint8)

    @property
    def label(self) -> Int64[np.ndarray, " B"]:
        """-1 = none."""
        return np.array([record.label for record in self.records], dtype=np.int64)


class Source(Protocol):
    """What the loader needs of a source."""

    digest: str
    num_samples: int | None
    steps_per_epoch: int | None
    stage: Stage
    """Counts of the reading threads."""

    def batches(self, state: LoaderState) -> Iterator[RawBatch]:
        """Batches from `state` on, without end."""

    def replace(self, raw: RawBatch, bad: dict[int, str]) -> None:
        """Note that no decoder takes the records in these slots, and fill the slots with others."""

    def close(self) -> None:
        """Release threads and files; another thread's call of `batches` may fail from now on."""


class Extent(NamedTuple):
    """Bytes of a file."""

    path: str
    offset: int
    size: int
