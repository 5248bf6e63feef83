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
from typing import Any, Protocol

import numpy as np
import webdataset as wds
from jaxtyping import Int32, Int64, UInt8

from cmae.pipeline.batch import LoaderState
from cmae.pipeline.health import BadSample, DataError, Health
from cmae.pipeline.index import DatasetIndex, TarError, iter_records
from cmae.pipeline.jpeg import BadImageError, inspect_jpeg
from cmae.pipeline.plan import EpochPlan
from cmae.pipeline.randomness import hash_words

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
    position: int
    """Where it was read: its number in the data set (indexed), or its sample id (stream)."""


@dataclass
class RawBatch:
    """Encoded samples of one micro-batch. A slot keeps its id even when another record fills it."""

    records: list[Record]
    sample_index: Int64[np.ndarray, " B"]
    epoch: int
    state: LoaderState
    """The position after this batch."""

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
    def label(self) -> Int64[np.ndarray, " B"]:
        """-1 = none."""
        return np.array([record.label for record in self.records], dtype=np.int64)


class Source(Protocol):
    """What the loader needs of a source."""

    digest: str
    num_samples: int | None
    steps_per_epoch: int | None
    read_s: float
    """Seconds of all reading threads together."""

    def batches(self, state: LoaderState) -> Iterator[RawBatch]:
        """Batches from `state` on, without end."""

    def replace(self, raw: RawBatch, bad: dict[int, str]) -> None:
        """Report the records in these slots, which no decoder takes, and fill the slots with others."""

    def close(self) -> None:
        """Release threads and files."""


def check_record(data: bytes, *, crc32: int | None = None) -> tuple[int, int]:
    """Height and width of a JPEG that can be decoded.

    Raises:
        BadImageError: The CRC differs from the index's, or the header walk refuses the file.
    """
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise BadImageError("the CRC32 differs from the index: bits of the file have changed")
    info = inspect_jpeg(data)
    if not info.kind.decodable:
        raise BadImageError(f"a JPEG of kind {info.kind.name}, which no decoder here takes")
    return info.height, info.width


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
        health: Health,
        check_crc: bool = True,
        num_readers: int = 4,
    ) -> None:
        self.digest = index.digest
        self.num_samples: int | None = plan.num_samples
        self.steps_per_epoch: int | None = plan.steps_per_epoch
        self.read_s = 0.0
        self._index = index
        self._files = _OpenFiles(index.paths)
        self._plan = plan
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._health = health
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
        """Report these slots and fill each with the next good record of the data set."""
        for slot, reason in bad.items():
            position = raw.records[slot].position
            self._report(position, reason, raw.epoch)
            raw.records[slot] = self._next_good(position + 1)

    def close(self) -> None:
        """Stop the reading threads."""
        self._pool.shutdown(cancel_futures=True)

    def _places(
        self, state: LoaderState
    ) -> Iterator[tuple[Int64[np.ndarray, " B"], int, LoaderState]]:
        """Positions, epoch and the state after, for this rank's micro-batches one after another."""
        epoch, start = state.epoch, state.next_sample
        stride = self._world_size * self._batch_size
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
                continue
            start += stride
            ends = start + stride > self._plan.samples_per_epoch
            place = (epoch + 1, 0) if ends else (epoch, start)
            yield positions, epoch, LoaderState(self._plan.seed, *place, self.digest)

    def _read(self, positions: Int64[np.ndarray, " B"], epoch: int, state: LoaderState) -> RawBatch:
        start = time.perf_counter()
        self._health.count(len(positions))
        records = [self._record_or_next(int(position), epoch) for position in positions]
        sample_index = self._index.sample_index(positions)
        self.read_s += time.perf_counter() - start
        return RawBatch(records, sample_index, epoch, state)

    def _record_or_next(self, position: int, epoch: int) -> Record:
        try:
            return self._record(position)
        except BadImageError as error:
            self._report(position, str(error), epoch)
            return self._next_good(position + 1)

    def _next_good(self, position: int) -> Record:
        num_samples = self._plan.num_samples
        for attempt in range(min(_MAX_BAD_RUN, num_samples)):
            try:
                return self._record((position + attempt) % num_samples)
            except BadImageError:  # reported when its own turn comes
                continue
        shard, _ = self._index.locate(position % num_samples)
        raise DataError(
            f"{_MAX_BAD_RUN} bad records in a row from {self._index.paths[shard]} on; check the shard "
            "with `cmae shards verify`"
        )

    def _record(self, position: int) -> Record:
        index = self._index
        shard = int(self._index.locate(position)[0])
        size = int(index.size[position])
        data = self._files.read(shard, int(index.offset[position]), size)
        if len(data) < size:
            raise BadImageError(f"the shard ends inside the file: {len(data)} of {size} bytes")
        crc32 = int(index.crc32[position]) if self._check_crc else None
        height, width = check_record(data, crc32=crc32)
        label = int(index.label[position])
        return Record(np.frombuffer(data, np.uint8), height, width, label, position)

    def _report(self, position: int, reason: str, epoch: int) -> None:
        shard, number = map(int, self._index.locate(position))
        path, key = self._index.paths[shard], self._index.key(shard, number)
        self._health.report(BadSample(path, key, number, reason, epoch))


class _OpenFiles:
    """Reads at offsets of many files, of which only the most recently used stay open."""

    def __init__(self, paths: Sequence[str], *, max_open: int = 64) -> None:
        self.paths = list(paths)
        self._max_open = max_open
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Fresh bytes, fewer than `size` at the end of the file."""
        with self._lock:
            file = self._files.pop(number, None)
            if file is None:
                file = Path(self.paths[number]).open("rb", buffering=0)  # noqa: SIM115  # kept open
            self._files[number] = file
            if len(self._files) > self._max_open:
                # Only forgotten: it closes when the last reader in another thread lets go of it.
                self._files.popitem(last=False)
        return os.pread(file.fileno(), size, offset)


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
        health: Health,
        shuffle: bool = True,
        shuffle_window: int = 1024,
    ) -> None:
        if len(urls) < world_size:
            raise ValueError(
                f"shards lists {len(urls)} for world_size={world_size} ranks: a stream deals whole shards. "
                "Write more shards, or an index with `cmae shards index`"
            )
        self.digest = hashlib.sha256("\n".join(urls).encode()).hexdigest()[:32]
        self.read_s = 0.0
        self._urls = list(urls)
        self._seed = seed
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._health = health
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
        """Report these slots and fill each with the next good record of the batch."""
        size = len(raw.records)
        for slot, reason in bad.items():
            self._report(raw.records[slot].position, "", reason, raw.epoch)
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
        start = time.perf_counter()
        for round_, number in enumerate(mine):
            state = LoaderState(self._seed, epoch, done + round_ * self._world_size, self.digest)
            for record in self._shuffled(self._shard(number, epoch), epoch):
                batch.append(record)
                if len(batch) < self._batch_size:
                    continue
                self._health.count(len(batch))
                ids = np.array([record.position for record in batch], dtype=np.int64)
                self.read_s += time.perf_counter() - start
                yield RawBatch(batch, ids, epoch, state)
                batch, start = [], time.perf_counter()

    def _shard_order(self, epoch: int) -> list[int]:
        numbers = np.arange(len(self._urls))
        if self._shuffle:
            numbers = numbers[np.argsort(self._keys(numbers, epoch), kind="stable")]
        return [int(number) for number in numbers]

    def _shuffled(self, records: Iterable[Record], epoch: int) -> Iterator[Record]:
        """Give out the smallest random key among the next few records."""
        heap: list[tuple[int, int, Record]] = []
        for record in records:
            key = int(self._keys(np.array([record.position]), epoch)[0]) if self._shuffle else 0
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
                for position, tar_record in enumerate(iter_records(stream, name=url)):
                    sample_id = (number << 32) | position
                    try:
                        height, width = check_record(tar_record.image)
                    except BadImageError as error:
                        self._health.count(1)
                        self._report(sample_id, tar_record.key, str(error), epoch)
                        continue
                    data = np.frombuffer(tar_record.image, np.uint8)
                    yield Record(data, height, width, tar_record.label, sample_id)
        except (
            TarError,
            OSError,
        ) as error:  # the rest of the shard is lost, the other shards are not
            self._health.report(BadSample(url, "", position + 1, str(error), epoch))

    def _report(self, sample_id: int, key: str, reason: str, epoch: int) -> None:
        url, position = self._urls[sample_id >> 32], sample_id & 0xFFFFFFFF
        self._health.report(BadSample(url, key, position, reason, epoch))
