"""Encoded samples, batch by batch: by index from local tars, or as a stream from anything webdataset opens.

Both give the same ids, labels and bytes for the same shard list, hence the same views. They differ in
order and in resume: the indexed source shuffles globally and continues at any sample, the stream works
through whole shards and continues at the start of one.
"""

from __future__ import annotations

import errno
import logging
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from cmae.pipeline.bad_samples import BadSample
from cmae.pipeline.batch import LoaderState
from cmae.pipeline.buffer_pool import BufferPool
from cmae.pipeline.errors import DataError
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.jpeg import BadImageError, inspect_jpeg
from cmae.pipeline.remote.files import RemoteFiles
from cmae.pipeline.sampling.epoch_plan import EpochPlan
from cmae.pipeline.sources.local_files import PASSING_ERRORS, OpenFiles
from cmae.pipeline.sources.records import Extent, RawBatch, Record
from cmae.pipeline.stage_stats import Stage, State

logger = logging.getLogger(__name__)

_MAX_BAD_RUN = 100  # bad records or lost shards in a row, after which no substitute is looked for


class _Row(NamedTuple):
    """What the index says of one sample."""

    position: int
    sample_id: int
    shard: int
    offset: int
    size: int
    height: int
    width: int
    label: int
    crc32: int
    kind: int


class _LostShardError(BadImageError):
    """No record of the shard can be read now: it was deleted, or its disk is gone."""


class IndexedSource:
    """Reads the samples that the epoch plan names, by offset, in a few threads ahead of their use.

    A bad record is replaced by the next good one in data set order, on whatever rank and in whatever batch.

    Args:
        index: of all shards.
        plan: which samples an epoch takes, in which order.
        check_crc: compare every file with the CRC32 in the index (about 0.1 ms for 110 KB).
        num_readers: batches that are read at the same time.
        remote: reads the shards that are not local; closed with the source.
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
        remote: RemoteFiles | None = None,
    ) -> None:
        self.digest = index.digest
        self.num_samples: int | None = plan.num_samples
        self.steps_per_epoch: int | None = plan.steps_per_epoch
        # Their input is the plan, which is always there: a reader without work waits for room.
        self.stage = Stage("read", threads=num_readers, first_state=State.BLOCKED)
        self._index = index
        self._remote = remote
        self._files = remote or OpenFiles(index.paths, digests=index.tar_digests)
        self._lost: dict[
            int, tuple[float, str]
        ] = {}  # shard -> when to try it again, and why it failed
        self._buffers = BufferPool()
        self._plan = plan
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._check_crc = check_crc
        self._num_readers = num_readers
        self._pool = ThreadPoolExecutor(num_readers, thread_name_prefix="cmae-read")

    def batches(self, state: LoaderState) -> Iterator[RawBatch]:
        """Batches from `state` on, without end, read ahead."""
        places = self._places(state)
        ahead: deque[Future[RawBatch]] = deque()
        while True:
            while len(ahead) < self._num_readers:
                ahead.append(self._pool.submit(self._read, *next(places)))
            yield ahead.popleft().result()

    def replace(self, raw: RawBatch, bad: dict[int, str]) -> None:
        """Fill each slot with the next good record of the data set."""
        for slot, reason in bad.items():
            record = raw.records[slot]
            # A bad substitute has a turn of its own, and a sample that pads had one.
            if record.sample_id == raw.sample_id[slot] and slot < raw.num_own:
                raw.bad.append(self._bad_sample(record.position, reason, raw.epoch))
            raw.records[slot] = self._next_good(record.position + 1)

    @property
    def is_local(self) -> bool:
        """Whether all shards are files here."""
        return self._remote is None

    @property
    def samples_per_shard(self) -> float:
        """Mean over all shards."""
        return len(self._index) / len(self._index.paths)

    def read(self, state: LoaderState) -> RawBatch:
        """The batch at `state` alone, read in the calling thread."""
        return self._read(*next(self._places(state)))

    def upcoming(self, state: LoaderState, num_batches: int) -> tuple[list[Extent], LoaderState]:
        """Where the next batches' files lie, and the state after these batches. Reads nothing."""
        extents: list[Extent] = []
        places = self._places(state)
        for _ in range(num_batches):
            positions, _, state, _ = next(places)
            rows = self._rows(positions)
            extents += [Extent(self._index.paths[row.shard], row.offset, row.size) for row in rows]
        return extents, state

    def close(self) -> None:
        """Stop the reading threads and close the files."""
        if self._remote is not None:
            self._remote.close()  # first: reads under way end at once, and not at their deadline
        self._pool.shutdown(cancel_futures=True)
        if isinstance(self._files, OpenFiles):
            self._files.close()

    def _places(
        self, state: LoaderState
    ) -> Iterator[tuple[Int64[np.ndarray, " B"], int, LoaderState, int]]:
        """Positions, epoch, state after and number of own slots of this rank's micro-batches in turn."""
        epoch, start = state.epoch, state.next_sample
        stride = self._world_size * self._batch_size
        self._pool.submit(self._plan.order, epoch + 1)  # ready before it is needed
        while True:
            positions = self._plan.positions(
                epoch,
                start,
                rank=self._rank,
                world_size=self._world_size,
                batch_size=self._batch_size,
            )
            if positions is None:
                epoch, start = epoch + 1, 0
                self._pool.submit(self._plan.order, epoch + 1)
                continue
            num_own = self._plan.num_samples - (start + self._rank * self._batch_size)
            start += stride
            ends = start + stride > self._plan.samples_per_epoch
            place = (epoch + 1, 0) if ends else (epoch, start)
            after = LoaderState(self._plan.seed, *place, self.digest)
            yield positions, epoch, after, max(0, min(num_own, self._batch_size))

    def _read(
        self, positions: Int64[np.ndarray, " B"], epoch: int, state: LoaderState, num_own: int
    ) -> RawBatch:
        self.stage.switch(State.BUSY)
        records, bad, times = [], [], [time.perf_counter()]
        ends = np.cumsum(self._index.size[positions]).tolist()
        buffer = self._buffers.take(ends[-1])
        rows = list(self._rows(positions))
        if self._remote is not None:
            self._remote.fetch([(row.shard, row.offset, row.size) for row in rows])
        for slot, (row, end) in enumerate(zip(rows, ends, strict=True)):
            data = buffer[end - row.size : end]
            try:
                records.append(self._record(row, data))
            except BadImageError as error:
                if not isinstance(error, _LostShardError):
                    self._files.check_unchanged(row.shard)
                if slot < num_own:
                    bad.append(self._bad_sample(row.position, str(error), epoch))
                records.append(self._next_good(row.position + 1))
            times.append(time.perf_counter())
        sample_id = self._index.sample_id(positions)
        self.stage.add(items=len(records), num_bytes=ends[-1], latencies_s=np.diff(times))
        self.stage.switch(State.BLOCKED)
        return RawBatch(records, sample_id, epoch, state, bad, num_own)

    def _next_good(self, position: int) -> Record:
        """The next record in data set order that passes its checks; the bad ones have turns of their own.

        A shard that cannot be read is passed over as a whole.
        """
        first, reason = position % self._plan.num_samples, ""
        for _ in range(_MAX_BAD_RUN):
            (row,) = self._rows(np.array([position % self._plan.num_samples]))
            try:
                return self._record(row, np.empty(row.size, dtype=np.uint8))
            except _LostShardError as error:
                position, reason = int(self._index.shard_sizes[: row.shard + 1].sum()), str(error)
            except BadImageError as error:
                self._files.check_unchanged(row.shard)
                position, reason = row.position + 1, str(error)
        shard, _ = self._index.locate(first)
        raise DataError(
            f"{_MAX_BAD_RUN} bad records or shards in a row from {self._index.paths[shard]} on ({reason}): "
            "check them with `cmae shards verify`"
        )

    def _rows(self, positions: Int64[np.ndarray, " n"]) -> Iterator[_Row]:
        """Look all of them up at once: one by one, numpy would cost more than reading."""
        index = self._index
        shard, _ = index.locate(positions)
        names = ("offset", "size", "height", "width", "label", "crc32", "kind")
        columns = [positions, index.sample_id(positions), shard]
        columns += [getattr(index, name)[positions] for name in names]
        return map(_Row, *(column.tolist() for column in columns))

    def _record(self, row: _Row, data: UInt8[np.ndarray, " n"]) -> Record:
        """Fill `data` with the sample's bytes and check them."""
        retry_at, reason = self._lost.get(row.shard, (0.0, ""))
        if time.monotonic() < retry_at:  # trying takes seconds: not again for each of its samples
            raise _LostShardError(reason)
        try:
            num_read = self._files.read_into(data, row.shard, offset=row.offset)
        except OSError as error:
            if error.errno not in _LOST_ERRORS:
                raise DataError(
                    f"{self._index.paths[row.shard]} cannot be opened or read: {error.strerror or error}. "
                    "Repair what is wrong with this machine (ulimit -n, permissions, memory) and start again"
                ) from error
            reason = f"the shard cannot be read: {error.strerror or error}"
            self._lost[row.shard] = (time.monotonic() + _LOST_FOR_S, reason)
            raise _LostShardError(reason) from error
        if num_read < row.size:
            raise BadImageError(f"the shard ends inside the file: {num_read} of {row.size} bytes")
        if not self._check_crc:
            inspect_jpeg(
                data.data
            )  # with the CRC of the index, its header walk holds for these bytes
        elif zlib.crc32(data.data) != row.crc32:
            raise BadImageError("the CRC32 differs from the index: bits of the file have changed")
        return Record(
            data,
            row.height,
            row.width,
            row.label,
            sample_id=row.sample_id,
            position=row.position,
            kind=row.kind,
        )

    def _bad_sample(self, position: int, reason: str, epoch: int) -> BadSample:
        shard, number = map(int, self._index.locate(position))
        path, key = self._index.paths[shard], self._index.key(shard, number)
        return BadSample(path, key, number, reason, epoch)


_LOST_FOR_S = 60.0

_LOST_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, *PASSING_ERRORS)
"""The shard or its disk is gone; anything else is a fault of this machine or this program."""
