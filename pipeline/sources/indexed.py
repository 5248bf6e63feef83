"""Encoded samples by index: shuffled globally, continued at any sample, wherever the shards lie.

For the same shard list a stream gives the same ids, labels and bytes, hence the same views; it differs in
order and works through whole shards.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from cmae.pipeline.bad_samples import MAX_BAD_RUN, BadSample, NoGoodSamplesError
from cmae.pipeline.batch import LoaderState
from cmae.pipeline.buffer_pool import BufferPool
from cmae.pipeline.formats.dataset_index import DatasetIndex, Place
from cmae.pipeline.formats.images.jpeg import BadImageError, inspect_jpeg
from cmae.pipeline.sampling.epoch_plan import EpochPlan
from cmae.pipeline.sources.local_files import OpenFiles
from cmae.pipeline.sources.records import Extent, RawBatch, Record
from cmae.pipeline.sources.shard_reader import LostShard, ShardReader
from cmae.pipeline.stage_stats import Stage, State


class _Row(NamedTuple):
    """What the index says of one sample."""

    dataset_row: int
    sample_id: int
    shard: int
    byte_offset: int
    size: int
    height: int
    width: int
    label: int
    crc32: int
    kind: int

    @property
    def place(self) -> Place:
        return Place(self.shard, self.byte_offset, self.size)


class _Request(NamedTuple):
    """One micro-batch of this rank, as the epoch plan has it."""

    dataset_rows: Int64[np.ndarray, " B"]
    epoch: int
    after: LoaderState
    """The place in the data after it."""
    num_own: int
    """Slots from this one on are padding."""


class IndexedSource:
    """Reads the samples that the epoch plan names, by byte offset, in a few threads ahead of their use.

    A bad record is replaced by the next good one in data set order, on whatever rank and in whatever batch.

    Args:
        index: Index of all shards.
        plan: Order of an epoch's samples.
        rank: Rank of this process.
        world_size: Number of ranks.
        batch_size: Samples in a micro-batch of this rank.
        check_crc: Compare every file with the CRC32 in the index (about 0.1 ms for 110 KB).
        num_readers: Batches that are read at the same time.
        remote: Reader of shards that are not local; None = open the index's paths. Closed with the source.
    """

    def __init__(
        self,
        index: DatasetIndex,
        *,
        plan: EpochPlan,
        rank: int,
        world_size: int,
        batch_size: int,
        check_crc: bool = True,
        num_readers: int = 4,
        remote: ShardReader | None = None,
    ) -> None:
        self.digest = index.digest
        self.num_samples: int | None = plan.num_samples
        self.steps_per_epoch: int | None = plan.steps_per_epoch
        # Their input is the plan, which is always there: a reader without work waits for room.
        self.stage = Stage("read", threads=num_readers, first_state=State.BLOCKED)
        self.reader: ShardReader = remote or OpenFiles(index.paths, digests=index.tar_digests)
        self._index = index
        self._buffers = BufferPool()
        self._plan = plan
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._check_crc = check_crc
        self._num_readers = num_readers
        self._pool = ThreadPoolExecutor(num_readers, thread_name_prefix="cmae-read")

    def batches(self, state: LoaderState) -> Iterator[RawBatch]:
        """Batches from `state` on, without end, read ahead."""
        requests = self._requests(state)
        ahead: deque[Future[RawBatch]] = deque()
        while True:
            while len(ahead) < self._num_readers:
                ahead.append(self._pool.submit(self._read, next(requests)))
            yield ahead.popleft().result()

    def replace(self, raw: RawBatch, bad: dict[int, str]) -> None:
        """Fill each slot with the next good record of the data set."""
        for slot, reason in bad.items():
            record = raw.records[slot]
            # A bad substitute has a turn of its own, and a sample that pads had one.
            if record.sample_id == raw.sample_id[slot] and slot < raw.num_own:
                raw.bad.append(self._bad_sample(record.dataset_row, reason, raw.epoch))
            raw.records[slot] = self._next_good(record.dataset_row + 1)

    @property
    def is_local(self) -> bool:
        """Whether all shards are files here."""
        return self.reader.is_local

    @property
    def samples_per_shard(self) -> float:
        """Mean over all shards."""
        return len(self._index) / len(self._index.paths)

    def read(self, state: LoaderState) -> RawBatch:
        """The batch at `state` alone, read in the calling thread."""
        return self._read(next(self._requests(state)))

    def upcoming(self, state: LoaderState, num_batches: int) -> tuple[list[Extent], LoaderState]:
        """Where the next batches' files lie, and the state after these batches. Reads nothing."""
        extents: list[Extent] = []
        requests = self._requests(state)
        for _ in range(num_batches):
            request = next(requests)
            state = request.after
            extents += [
                Extent(self._index.paths[row.shard], row.byte_offset, row.size)
                for row in self._look_up(request.dataset_rows)
            ]
        return extents, state

    def close(self) -> None:
        """Stop the reading threads and close the files."""
        if not self.is_local:
            self.reader.close()  # first: reads under way end at once, and not at their deadline
        self._pool.shutdown(cancel_futures=True)
        if self.is_local:
            self.reader.close()

    def _requests(self, state: LoaderState) -> Iterator[_Request]:
        """This rank's micro-batches in turn."""
        epoch, epoch_offset = state.epoch, state.offset
        stride = self._world_size * self._batch_size
        place = {"rank": self._rank, "world_size": self._world_size, "batch_size": self._batch_size}
        self._pool.submit(self._plan.order, epoch + 1)  # made before it is needed
        while True:
            dataset_rows = self._plan.rows(epoch, epoch_offset, **place)
            if dataset_rows is None:
                epoch, epoch_offset = epoch + 1, 0
                self._pool.submit(self._plan.order, epoch + 1)
                continue
            num_own = self._plan.num_samples - (epoch_offset + self._rank * self._batch_size)
            epoch_offset += stride
            ends = epoch_offset + stride > self._plan.samples_per_epoch
            next_place = (epoch + 1, 0) if ends else (epoch, epoch_offset)
            after = LoaderState(self._plan.seed, *next_place, self.digest)
            yield _Request(dataset_rows, epoch, after, max(0, min(num_own, self._batch_size)))

    def _read(self, request: _Request) -> RawBatch:
        self.stage.switch(State.BUSY)
        rows = self._look_up(request.dataset_rows)
        num_bytes = sum(row.size for row in rows)
        batch = RawBatch(
            records=[],
            sample_id=self._index.sample_id(request.dataset_rows),
            epoch=request.epoch,
            state=request.after,
            bad=[],
            num_own=request.num_own,
        )
        times = [time.perf_counter()]
        places = [row.place for row in rows]
        found = self.reader.read_batch(places, self._buffers.take(num_bytes))
        for row, data in zip(rows, found, strict=True):
            try:
                self._add(row, data, batch)
            except NoGoodSamplesError as error:
                raise NoGoodSamplesError(str(error), batch.bad) from error
            times.append(time.perf_counter())
        self.stage.add(items=len(rows), num_bytes=num_bytes, latencies_s=np.diff(times))
        self.stage.switch(State.BLOCKED)
        return batch

    def _add(self, row: _Row, data: UInt8[np.ndarray, " n"] | LostShard, batch: RawBatch) -> None:
        """Put a record, or the one that stands in for it, into the batch's next slot."""
        fault = self._fault(row, data)
        if isinstance(data, LostShard) or fault:
            if len(batch.records) < batch.num_own:
                batch.bad.append(self._bad_sample(row.dataset_row, fault, batch.epoch))
            batch.records.append(self._next_good(row.dataset_row + 1))
        else:
            batch.records.append(_record(row, data))

    def _next_good(self, dataset_row: int) -> Record:
        """The next record in data set order that passes its checks; the bad ones have turns of their own.

        A shard that cannot be read is passed over as a whole.
        """
        first, fault = dataset_row % self._plan.num_samples, ""
        for _ in range(MAX_BAD_RUN):
            (row,) = self._look_up(np.array([dataset_row % self._plan.num_samples]))
            (data,) = self.reader.read_batch([row.place], np.empty(row.size, dtype=np.uint8))
            fault = self._fault(row, data)
            if isinstance(data, LostShard):
                dataset_row = int(self._index.shard_sizes[: row.shard + 1].sum())
            elif fault:
                dataset_row = row.dataset_row + 1
            else:
                return _record(row, data)
        shard, _ = self._index.locate(first)
        raise NoGoodSamplesError(
            f"{MAX_BAD_RUN} bad records or shards in a row from {self._index.paths[shard]} on ({fault}): "
            "check them with `cmae shards verify`",
            (),
        )

    def _look_up(self, dataset_rows: Int64[np.ndarray, " n"]) -> list[_Row]:
        """Look all of them up at once: one by one, numpy would cost more than reading."""
        index = self._index
        shard, _ = index.locate(dataset_rows)
        names = ("byte_offset", "size", "height", "width", "label", "crc32", "kind")
        columns = [dataset_rows, index.sample_id(dataset_rows), shard]
        columns += [getattr(index, name)[dataset_rows] for name in names]
        return list(map(_Row, *(column.tolist() for column in columns)))

    def _fault(self, row: _Row, data: UInt8[np.ndarray, " n"] | LostShard) -> str:
        """What is wrong with a record's bytes; empty where they are those of the index.

        Raises:
            DataError: They are wrong because the shard was replaced.
        """
        if isinstance(data, LostShard):
            return data.reason
        fault = ""
        if data.size < row.size:
            fault = f"the shard ends inside the file: {data.size} of {row.size} bytes"
        elif not self._check_crc:
            fault = _header_fault(data)
        elif zlib.crc32(data.data) != row.crc32:
            fault = "the CRC32 differs from the index: bits of the file have changed"
        if fault:
            self.reader.check_unchanged(row.shard)
        return fault

    def _bad_sample(self, dataset_row: int, reason: str, epoch: int) -> BadSample:
        shard, record_number = map(int, self._index.locate(dataset_row))
        path, key = self._index.paths[shard], self._index.key(shard, record_number)
        return BadSample(path, key, record_number, reason, epoch)


def _header_fault(data: UInt8[np.ndarray, " n"]) -> str:
    """What the header walk refuses; with the index's CRC, the walk of the time of indexing holds instead."""
    try:
        inspect_jpeg(data.data)
    except BadImageError as error:
        return str(error)
    return ""


def _record(row: _Row, data: UInt8[np.ndarray, " n"]) -> Record:
    return Record(
        data,
        row.height,
        row.width,
        row.label,
        sample_id=row.sample_id,
        dataset_row=row.dataset_row,
        kind=row.kind,
    )
