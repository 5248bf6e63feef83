"""Encoded samples, batch by batch: by index from local tars, or as a stream from anything webdataset opens.

Both give the same ids, labels and bytes for the same shard list, hence the same views. They differ in
order and in resume: the indexed source shuffles globally and continues at any sample, the stream works
through whole shards and continues at the start of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import logging
import os
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import webdataset as wds
from jaxtyping import Int32, Int64, UInt8

from cmae.pipeline.batch import LoaderState
from cmae.pipeline.buffers import BufferPool
from cmae.pipeline.counters import Stage, State
from cmae.pipeline.dataset_index import DatasetIndex
from cmae.pipeline.health import BadSample, DataError
from cmae.pipeline.jpeg import BadImageError, JpegKind, inspect_jpeg
from cmae.pipeline.plan import EpochPlan
from cmae.pipeline.randomness import hash_words
from cmae.pipeline.tar import TarError, iter_records

logger = logging.getLogger(__name__)

_MAX_BAD_RUN = 100
_STREAM_LANE = 1 << 21  # away from the lanes of views and plan


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
    sample_index: Int64[np.ndarray, " B"]
    epoch: int
    state: LoaderState
    """The position after this batch."""
    bad: list[BadSample]
    """Records that could not be used, met on the way to this batch."""

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
        """Release threads and files."""


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


class IndexedSource:
    """Reads the samples that the epoch plan names, by offset, in a few threads ahead of their use.

    A bad record is replaced by the next good one in data set order, on whatever rank and in whatever batch.

    Args:
        index: of all shards.
        plan: which samples an epoch takes, in which order.
        check_crc: compare every file with the CRC32 in the index (about 0.1 ms for 110 KB).
        num_readers: batches that are read at the same time.
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
    ) -> None:
        self.digest = index.digest
        self.num_samples: int | None = plan.num_samples
        self.steps_per_epoch: int | None = plan.steps_per_epoch
        # Their input is the plan, which is always there: a reader without work waits for room.
        self.stage = Stage("read", threads=num_readers, first_state=State.BLOCKED)
        self._index = index
        self._files = _OpenFiles(index.paths)
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
            if record.sample_id == raw.sample_index[slot]:  # a bad substitute has a turn of its own
                raw.bad.append(self._bad_sample(record.position, reason, raw.epoch))
            raw.records[slot] = self._next_good(record.position + 1)

    def close(self) -> None:
        """Stop the reading threads."""
        self._pool.shutdown(cancel_futures=True)

    def _places(
        self, state: LoaderState
    ) -> Iterator[tuple[Int64[np.ndarray, " B"], int, LoaderState]]:
        """Positions, epoch and the state after, for this rank's micro-batches one after another."""
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
            start += stride
            ends = start + stride > self._plan.samples_per_epoch
            place = (epoch + 1, 0) if ends else (epoch, start)
            yield positions, epoch, LoaderState(self._plan.seed, *place, self.digest)

    def _read(self, positions: Int64[np.ndarray, " B"], epoch: int, state: LoaderState) -> RawBatch:
        self.stage.switch(State.BUSY)
        records, bad, times = [], [], [time.perf_counter()]
        ends = np.cumsum(self._index.size[positions]).tolist()
        buffer = self._buffers.take(ends[-1])
        for row, end in zip(self._rows(positions), ends, strict=True):
            data = buffer[end - row.size : end]
            try:
                records.append(self._record(row, data))
            except BadImageError as error:
                bad.append(self._bad_sample(row.position, str(error), epoch))
                records.append(self._next_good(row.position + 1))
            times.append(time.perf_counter())
        sample_index = self._index.sample_index(positions)
        self.stage.add(items=len(records), num_bytes=ends[-1], latencies_s=np.diff(times))
        self.stage.switch(State.BLOCKED)
        return RawBatch(records, sample_index, epoch, state, bad)

    def _next_good(self, position: int) -> Record:
        following = np.arange(position, position + _MAX_BAD_RUN) % self._plan.num_samples
        for row in self._rows(following):
            with contextlib.suppress(BadImageError):  # noted when its own turn comes
                return self._record(row, np.empty(row.size, dtype=np.uint8))
        shard, _ = self._index.locate(following[0])
        raise DataError(
            f"{_MAX_BAD_RUN} bad records in a row from {self._index.paths[shard]} on; check the shard "
            "with `cmae shards verify`"
        )

    def _rows(self, positions: Int64[np.ndarray, " n"]) -> Iterator[_Row]:
        """Look all of them up at once: one by one, numpy would cost more than reading."""
        index = self._index
        shard, _ = index.locate(positions)
        names = ("offset", "size", "height", "width", "label", "crc32", "kind")
        columns = [positions, index.sample_index(positions), shard]
        columns += [getattr(index, name)[positions] for name in names]
        return map(_Row, *(column.tolist() for column in columns))

    def _record(self, row: _Row, data: UInt8[np.ndarray, " n"]) -> Record:
        """Fill `data` with the sample's bytes and check them."""
        num_read = self._files.read_into(data, row.shard, offset=row.offset)
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


class _OpenFiles:
    """Reads at offsets of many files, of which only the most recently used stay open."""

    # More than the 256 places that a shuffle window draws from (EpochPlan: window_size / block_size), each
    # of which may be a shard of its own; fewer would open a file for most samples.
    def __init__(self, paths: Sequence[str], *, max_open: int = 320) -> None:
        self.paths = list(paths)
        self._max_open = max_open
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, data: UInt8[np.ndarray, " n"], number: int, *, offset: int) -> int:
        """Fill `data` from a file; returns how much there was."""
        with self._lock:
            file = self._files.pop(number, None)
            if file is None:
                file = Path(self.paths[number]).open("rb", buffering=0)  # noqa: SIM115  # kept open
            self._files[number] = file
            if len(self._files) > self._max_open:
                # Only forgotten: it closes when the last reader in another thread lets go of it.
                self._files.popitem(last=False)
        num_read = 0
        # Network file systems may return less than was asked for.
        while more := os.preadv(file.fileno(), [data.data[num_read:]], offset + num_read):
            num_read += more
            if num_read == data.size:
                break
        return num_read


class StreamSource:
    """Reads whole shards front to back with webdataset: pipes, http, object stores, tars without an index.

    Shards are dealt to ranks in an order drawn for each epoch, and samples are shuffled inside
    a sliding window of one shard. A bad record is skipped before decoding, or replaced by its neighbour in
    the batch after. Ranks hold different numbers of samples, so their epochs end at different batches.

    Resume is by shard: the state counts shards done, and a shard that was begun is read again.
    """

    num_samples: int | None = None
    steps_per_epoch: int | None = None

    def __init__(
        self,
        urls: Sequence[str],
        *,
        seed: int,
        rank: int,
        world_size: int,
        batch_size: int,
        shuffle: bool = True,
        shuffle_window: int = 1024,
    ) -> None:
        if len(urls) < world_size:
            raise ValueError(
                f"shards lists {len(urls)} for world_size={world_size} ranks: a stream deals whole shards. "
                "Write more shards, or an index with `cmae shards index`"
            )
        self.digest = hashlib.sha256("\n".join(urls).encode()).hexdigest()[:16]
        # Reading happens in the thread that asks for batches, and between them it is elsewhere.
        self.stage = Stage("read", threads=1, first_state=State.BLOCKED)
        self._urls = list(urls)
        self._seed = seed
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._bad: list[BadSample] = []  # since the last batch
        self._shuffle = shuffle
        self._window = shuffle_window if shuffle else 1
        if rank == 0:
            logger.warning(
                "streaming %d shards: resume is by shard, so a run that is continued sees samples of the "
                "shard it was reading again; `cmae shards index` makes it exact for local tars",
                len(urls),
            )

    def batches(self, state: LoaderState) -> Iterator[RawBatch]:
        """Batches from the beginning of the shard that `state` names, without end."""
        epoch, done = state.epoch, state.next_sample
        while True:
            num_batches = 0
            for raw in self._epoch(epoch, done):
                num_batches += 1
                yield raw
            if num_batches == 0 and done == 0:
                raise DataError(
                    f"rank {self._rank}'s shards hold fewer than batch_size={self._batch_size} good samples "
                    f"in epoch {epoch}; lower the batch size or the number of ranks"
                )
            epoch, done = epoch + 1, 0

    def replace(self, raw: RawBatch, bad: dict[int, str]) -> None:
        """Fill each slot with the next good record of the batch."""
        size = len(raw.records)
        for slot, reason in bad.items():
            record = raw.records[slot]
            url = self._urls[record.sample_id >> 32]
            raw.bad.append(BadSample(url, record.key, record.position, reason, raw.epoch))
        if len(bad) == size:
            raise DataError(f"none of the {size} samples of a batch can be decoded: {bad[0]}")
        for slot in bad:
            good = next(i % size for i in range(slot + 1, slot + size) if i % size not in bad)
            raw.records[slot] = raw.records[good]

    def close(self) -> None:
        """Nothing to release: the shard being read closes with its generator."""

    def _epoch(self, epoch: int, done: int) -> Iterator[RawBatch]:
        mine = self._shard_order(epoch)[done:][self._rank :: self._world_size]
        batch: list[Record] = []
        self.stage.switch(State.BUSY)
        for round_, number in enumerate(mine):
            state = LoaderState(self._seed, epoch, done + round_ * self._world_size, self.digest)
            for record in self._shuffled(self._shard(number, epoch), epoch):
                batch.append(record)
                if len(batch) < self._batch_size:
                    continue
                ids = np.array([record.sample_id for record in batch], dtype=np.int64)
                num_bytes = sum(record.data.size for record in batch)
                self.stage.add(items=len(batch), num_bytes=num_bytes)
                self.stage.switch(State.BLOCKED)
                yield RawBatch(batch, ids, epoch, state, self._bad)
                self.stage.switch(State.BUSY)
                batch, self._bad = [], []

    def _shard_order(self, epoch: int) -> list[int]:
        numbers = np.arange(len(self._urls))
        if self._shuffle:
            numbers = numbers[np.argsort(self._keys(numbers, epoch), kind="stable")]
        return [int(number) for number in numbers]

    def _shuffled(self, records: Iterable[Record], epoch: int) -> Iterator[Record]:
        """Give out the smallest random key among the next few records."""
        heap: list[tuple[int, int, Record]] = []
        for record in records:
            key = int(self._keys(np.array([record.sample_id]), epoch)[0]) if self._shuffle else 0
            heapq.heappush(heap, (key, record.position, record))
            if len(heap) >= self._window:
                yield heapq.heappop(heap)[2]
        while heap:
            yield heapq.heappop(heap)[2]

    def _keys(self, numbers: np.ndarray, epoch: int) -> np.ndarray:
        return hash_words(
            self._seed, epoch, sample_index=numbers, num_lanes=1, first_lane=_STREAM_LANE
        )[:, 0]

    def _shard(self, number: int, epoch: int) -> Iterator[Record]:
        """Good records of one shard."""
        url = self._urls[number]
        position = -1
        try:
            with contextlib.closing(wds.gopen(url)) as stream:
                for position, found in enumerate(iter_records(stream, name=url)):
                    try:
                        height, width, kind, _ = inspect_jpeg(found.image)
                        if not kind.decodable:
                            raise BadImageError(
                                f"a JPEG of kind {kind.name}, which no decoder takes"
                            )
                    except BadImageError as error:
                        self._bad.append(BadSample(url, found.key, position, str(error), epoch))
                        continue
                    data, sample_id = (
                        np.frombuffer(found.image, np.uint8),
                        (number << 32) | position,
                    )
                    yield Record(
                        data,
                        height,
                        width,
                        found.label,
                        sample_id=sample_id,
                        position=position,
                        key=found.key,
                        kind=kind,
                    )
        except (
            TarError,
            OSError,
        ) as error:  # the rest of the shard is lost, the other shards are not
            self._bad.append(BadSample(url, "", position + 1, str(error), epoch))
