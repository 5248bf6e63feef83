"""What a source of encoded samples hands on, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from cmae.pipeline.bad_samples import BadSample
from cmae.pipeline.batch import LoaderState
from cmae.pipeline.formats.images.jpeg import JpegKind
from cmae.pipeline.stage_stats import Stage


@dataclass(frozen=True)
class Record:
    """One encoded image that passed its checks."""

    data: UInt8[np.ndarray, " n"]
    height: int
    width: int
    label: int
    sample_id: int
    """(shard number << 32) | record number."""
    dataset_row: int = -1
    """Row in the index of the data set; -1 in a stream, which has none."""
    key: str = ""
    kind: int = JpegKind.BASELINE

    @property
    def shard(self) -> int:
        """Number of the shard."""
        return self.sample_id >> 32

    @property
    def record_number(self) -> int:
        """Number of the record in its shard, bad ones counted."""
        return self.sample_id & 0xFFFFFFFF


@dataclass
class RawBatch:
    """Encoded samples of one micro-batch. A slot keeps its id even when another record fills it."""

    records: list[Record]
    sample_id: Int64[np.ndarray, " B"]
    epoch: int
    state: LoaderState
    """The place in the data after this batch."""
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
        """Rows of the stored images."""
        return np.array([record.height for record in self.records], dtype=np.int32)

    @property
    def width(self) -> Int32[np.ndarray, " B"]:
        """Columns of the stored images."""
        return np.array([record.width for record in self.records], dtype=np.int32)

    @property
    def kind(self) -> UInt8[np.ndarray, " B"]:
        """JpegKind of each image."""
        return np.array([record.kind for record in self.records], dtype=np.uint8)

    @property
    def label(self) -> Int64[np.ndarray, " B"]:
        """Class numbers; -1 = none."""
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
    byte_offset: int
    size: int
