"""Encoded samples, batch by batch: by index from local tars, or as a stream from anything webdataset opens.

Both give the same ids, labels and bytes for the same shard list, hence the same views. They differ in
order and in resume: the indexed source shuffles globally and continues at any sample, the stream works
through whole shards and continues at the start of one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import logging
import os
import resource
import subprocess
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import psutil
from jaxtyping import Int32, Int64, UInt8

from cmae.pipeline.batch import LoaderState
from cmae.pipeline.buffers import BufferPool
from cmae.pipeline.counters import Stage, State
from cmae.pipeline.dataset_index import DatasetIndex
from cmae.pipeline.health import BadSample, DataError
from cmae.pipeline.index import tar_digest
from cmae.pipeline.jpeg import BadImageError, JpegKind, inspect_jpeg
from cmae.pipeline.plan import EpochPlan
from cmae.pipeline.randomness import hash_words
from cmae.pipeline.remote import Remote, RemoteConfig
from cmae.pipeline.remote_dataset import RemoteFiles, open_shard
from cmae.pipeline.stores import redact
from cmae.pipeline.tar import TarError, iter_records

logger = logging.getLogger(__name__)

_MAX_BAD_RUN = 100  # bad records or lost shards in a row, after which no substitute is looked for
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
        self._files = remote or _OpenFiles(index.paths, digests=index.tar_digests)
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
            if record.sample_id == raw.sample_index[slot] and slot < raw.num_own:
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
        if isinstance(self._files, _OpenFiles):
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
        sample_index = self._index.sample_index(positions)
        self.stage.add(items=len(records), num_bytes=ends[-1], latencies_s=np.diff(times))
        self.stage.switch(State.BLOCKED)
        return RawBatch(records, sample_index, epoch, state, bad, num_own)

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
        columns = [positions, index.sample_index(positions), shard]
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


class _OpenFiles:
    """Reads at offsets of many files, of which only the most recently used stay open.

    Network file systems lose files for a moment: such reads are tried again on a new handle.
    """

    # A uniform order draws every sample from another shard: fewer open files than shards, and most samples
    # would open one.
    def __init__(
        self,
        paths: Sequence[str],
        *,
        digests: Sequence[str],
        max_open: int | None = None,
        first_delay_s: float = 0.2,
    ) -> None:
        self.paths = list(paths)
        self._digests = digests
        self._max_open = max_open or _half_of_the_free_files()
        self._first_delay_s = first_delay_s
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._seen: dict[int, _Identity] = {}
        self._lock = threading.Lock()

    def read_into(self, data: UInt8[np.ndarray, " n"], number: int, *, offset: int) -> int:
        """Fill `data` from a file; returns how much there was.

        Raises:
            DataError: The file is another one than when it was first opened.
            OSError: It cannot be read, six times in a row where trying again can help.
        """
        for attempt in range(_NUM_TRIES):
            try:
                return self._read(data, number, offset)
            except OSError as error:
                if error.errno not in _PASSING_ERRORS:
                    raise
                path = self.paths[number]
                if attempt == _NUM_TRIES - 1:
                    raise OSError(
                        error.errno, f"{error.strerror}, {_NUM_TRIES} times in a row", path
                    ) from error
                logger.warning("%s: %s; opening it again", path, error.strerror)
                with self._lock:
                    self._files.pop(number, None)
                time.sleep(self._first_delay_s * 2**attempt)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def check_unchanged(self, number: int) -> None:
        """Compare the file under this name with the one that was opened first.

        Raises:
            DataError: It is another one, and its index no longer belongs to it.
        """
        with contextlib.suppress(
            FileNotFoundError
        ):  # deleted, and still open: nothing to compare with
            self._compare(number, _Identity.of(os.stat(self.paths[number])))

    def _read(self, data: UInt8[np.ndarray, " n"], number: int, offset: int) -> int:
        with self._lock:
            file = self._files.pop(number, None)
            if file is None:
                file = Path(self.paths[number]).open("rb", buffering=0)  # noqa: SIM115  # kept open
                self._compare(number, _Identity.of(os.fstat(file.fileno())))
            self._files[number] = file
            if len(self._files) > self._max_open:
                # Only forgotten: it closes when the last reader in another thread lets go of it.
                self._files.popitem(last=False)
        num_read = 0
        try:
            # Network file systems may return less than was asked for.
            while more := os.preadv(file.fileno(), [data.data[num_read:]], offset + num_read):
                num_read += more
                if num_read == data.size:
                    break
        except OSError:  # a stale handle stays stale: the next read opens the file again
            with self._lock:
                self._files.pop(number, None)
            raise
        return num_read

    def _compare(self, number: int, now: _Identity) -> None:
        before = self._seen.setdefault(number, now)
        if now == before:
            return
        path = self.paths[number]
        if tar_digest(path) != self._digests[number]:  # a copy of the same contents is welcome
            raise DataError(
                f"{path} was replaced during the run: {before} when it was opened first, {now} now, with "
                "other contents than its index describes. Start the run again when the shards no longer "
                "change, with fresh indices (`cmae shards index`)"
            )
        logger.warning(
            "%s was replaced by a file of the same contents: %s, now %s", path, before, now
        )
        self._seen[number] = now


def _half_of_the_free_files() -> int:
    """Of those that this process may still open."""
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    in_use: int = psutil.Process().num_fds()
    return max(16, (soft - in_use) // 2)


_NUM_TRIES = 6
_LOST_FOR_S = 60.0
_PASSING_ERRORS = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO)
"""A server that restarts or fails over gives these for some seconds."""
_LOST_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, *_PASSING_ERRORS)
"""The shard or its disk is gone; anything else is a fault of this machine or this program."""


class _Identity(NamedTuple):
    """What tells one file from another of the same name."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    def __str__(self) -> str:
        modified = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.modified_ns / 1e9))
        return f"{self.size} bytes of {modified}, inode {self.inode}"


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
        remote: Remote | None = None,
    ) -> None:
        if len(urls) < world_size:
            raise ValueError(
                f"shards lists {len(urls)} for world_size={world_size} ranks: a stream deals whole shards. "
                "Write more shards, or an index with `cmae shards index`"
            )
        # A signature that was renewed does not make other data.
        names = "\n".join(map(redact, urls))
        self.digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        # Reading happens in the thread that asks for batches, and between them it is elsewhere.
        self.stage = Stage("read", threads=1, first_state=State.BLOCKED)
        self._urls = list(urls)
        self._remote = remote or Remote(RemoteConfig())
        self._seed = seed
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._bad: list[BadSample] = []  # since the last batch
        self._is_closed = False
        self._stream: IO[bytes] | None = None  # the shard being read
        self._shuffle = shuffle
        self._window = shuffle_window if shuffle else 1
        if rank == 0:
            logger.warning(
                "streaming %d shards: resume is by shard, so a run that is continued sees samples of the "
                "shard it was reading again; `cmae shards index` makes it exact",
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
            url = redact(self._urls[record.sample_id >> 32])
            raw.bad.append(BadSample(url, record.key, record.position, reason, raw.epoch))
        if len(bad) == size:
            raise DataError(f"none of the {size} samples of a batch can be decoded: {bad[0]}")
        for slot in bad:
            good = next(i % size for i in range(slot + 1, slot + size) if i % size not in bad)
            raw.records[slot] = raw.records[good]

    def close(self) -> None:
        """End a read under way, remote or from a pipe; the shard closes with its generator."""
        self._is_closed = True
        self._remote.close()
        process: subprocess.Popen[bytes] | None = getattr(self._stream, "proc", None)
        if process is not None and process.poll() is None:  # its number may be another's by now
            _end_with_children(process.pid)

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
                yield RawBatch(batch, ids, epoch, state, self._bad, len(batch))
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
        url, name = self._urls[number], redact(self._urls[number])
        position = -1
        try:
            if self._is_closed:
                return
            with contextlib.closing(open_shard(url, self._remote)) as stream:
                self._stream = stream
                if self._is_closed:  # by another thread, which may not have seen this stream
                    self.close()
                for position, found in enumerate(iter_records(stream, name=name)):
                    try:
                        height, width, kind, _ = inspect_jpeg(found.image)
                        if not kind.decodable:
                            raise BadImageError(
                                f"a JPEG of kind {kind.name}, which no decoder takes"
                            )
                    except BadImageError as error:
                        self._bad.append(BadSample(name, found.key, position, str(error), epoch))
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
            self._bad.append(BadSample(name, "", position + 1, str(error), epoch))


def _end_with_children(pid: int) -> None:
    """Terminate the command of a pipe: its shell, and what the shell started, which holds the pipe open."""
    with contextlib.suppress(psutil.NoSuchProcess):
        shell = psutil.Process(pid)
        for process in (*shell.children(recursive=True), shell):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
