"""Shards read front to back: pipes, http, object stores, tars without an index."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import logging
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import webdataset as wds

from cmae.errors import CmaeError
from cmae.pipeline.bad_samples import BadSample, NoGoodSamplesError
from cmae.pipeline.batch import LoaderState
from cmae.pipeline.formats.images.jpeg import BadImageError, inspect_jpeg
from cmae.pipeline.formats.members.member_counts import MemberCounts
from cmae.pipeline.formats.shard_index import index_path
from cmae.pipeline.formats.tar import TarRecord, iter_records
from cmae.pipeline.remote.client import Remote, RemoteConfig, open_stream
from cmae.pipeline.remote.schemes import identity, is_local, is_remote, redact
from cmae.pipeline.sampling.counter_rng import hash_words
from cmae.pipeline.sources.left_out import lost_members
from cmae.pipeline.sources.records import RawBatch, Record
from cmae.pipeline.stage_stats import Stage, State
from cmae.printable import printable

logger = logging.getLogger(__name__)

_STREAM_DRAW = 1 << 21  # away from the draws of views and plan

_SHARD_FAULTS = (ValueError, OSError, MemoryError, RecursionError, OverflowError)
"""What a shard's bytes can bring about: the rest of it is lost, and the run goes on."""


class StreamSource:
    """Reads whole shards front to back with webdataset: pipes, http, object stores, tars without an index.

    Shards are dealt to ranks in an order drawn for each epoch, and samples are shuffled inside
    a sliding window of one shard. A bad record is skipped before decoding, or replaced by its neighbour in
    the batch after. Ranks hold different numbers of samples, so their epochs end at different batches.

    Resume is by shard: the state counts shards done, and a shard that was begun is read again.

    Args:
        urls: Shards, in whatever form webdataset or fsspec opens.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of ranks.
        batch_size: Samples in a micro-batch of this rank.
        shuffle: Draw a new order in every epoch.
        shuffle_window: Samples of a shard among which the next one is drawn.
        remote: Connection to shards behind URLs; None = one with the defaults.

    Raises:
        CmaeError: There are fewer shards than ranks.
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
            raise CmaeError(
                f"shards lists {len(urls)} for world_size={world_size} ranks: a stream deals whole shards. "
                "Write more shards, or an index with `cmae shards index`"
            )
        # A signature that was renewed does not make other data.
        names = "\n".join(map(identity, urls))
        self.digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]
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
                "shard it was reading again; `cmae shards index` makes it exact%s",
                len(urls),
                _without_index(urls),
            )

    def batches(self, state: LoaderState) -> Iterator[RawBatch]:
        """Batches from the beginning of the shard that `state` names, without end."""
        epoch, done = state.epoch, state.offset
        while True:
            num_batches = 0
            for raw in self._epoch(epoch, done):
                num_batches += 1
                yield raw
            if num_batches == 0 and done == 0:
                raise NoGoodSamplesError(self._no_batch(epoch), self._bad)
            epoch, done = epoch + 1, 0

    def _no_batch(self, epoch: int) -> str:
        """Why an epoch has no batch: the first fault, where there is one, is the likeliest cause."""
        few = (
            f"rank {self._rank}'s shards hold fewer than batch_size={self._batch_size} good samples in "
            f"epoch {epoch}"
        )
        if not self._bad:
            return f"{few}; lower the batch size or the number of ranks"
        first = self._bad[0]
        where = first.shard if first.shard not in first.reason else ""
        cause = ": ".join(filter(None, (where, first.key, first.reason)))
        return f"{few}. The first of {len(self._bad)} faults: {printable(cause, limit=600)}"

    def replace(self, raw: RawBatch, bad: dict[int, str]) -> None:
        """Fill each slot with the next good record of the batch."""
        size = len(raw.records)
        for slot, reason in bad.items():
            record = raw.records[slot]
            shard = redact(self._urls[record.shard])
            raw.bad.append(BadSample(shard, record.key, record.record_number, reason, raw.epoch))
        if len(bad) == size:
            raise NoGoodSamplesError(
                f"none of the {size} samples of a batch can be decoded: {bad[0]}", ()
            )
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
            offset = done + round_ * self._world_size
            state = LoaderState(self._seed, epoch, offset, self.digest, unit="shard")
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
            heapq.heappush(heap, (key, record.record_number, record))
            if len(heap) >= self._window:
                yield heapq.heappop(heap)[2]
        while heap:
            yield heapq.heappop(heap)[2]

    def _keys(self, numbers: np.ndarray, epoch: int) -> np.ndarray:
        words = hash_words(
            self._seed, epoch, sample_id=numbers, num_draws=1, first_draw=_STREAM_DRAW
        )
        return words[:, 0]

    def _shard(self, number: int, epoch: int) -> Iterator[Record]:
        """Good records of one shard; where the rest of it is lost, the other shards are not."""
        name = redact(self._urls[number])
        record_number = -1
        members = MemberCounts()
        try:
            for record_number, found in enumerate(self._found(number, name, members)):
                try:
                    record = _record(found, sample_id=(number << 32) | record_number)
                except BadImageError as error:
                    self._bad.append(BadSample(name, found.key, record_number, str(error), epoch))
                else:
                    yield record
        except _SHARD_FAULTS as error:
            reason = _without_command(str(error), self._urls[number]) or type(error).__name__
            self._bad.append(BadSample(name, "", record_number + 1, reason, epoch))
        self._bad += lost_members(name, members)

    def _found(self, number: int, name: str, members: MemberCounts) -> Iterator[TarRecord]:
        """All records of one shard, which stays open for as long."""
        if self._is_closed:
            return
        with contextlib.closing(open_shard(self._urls[number], self._remote)) as stream:
            self._stream = stream
            if self._is_closed:  # by another thread, which may not have seen this stream
                self.close()
            yield from iter_records(stream, name=name, members=members)


def _without_index(urls: Sequence[str]) -> str:
    """Which local shards lack an index, where others have one."""
    missing = [url for url in urls if is_local(url) and not index_path(url).exists()]
    if not 0 < len(missing) < len(urls):
        return ""
    return f" ({len(missing)} have no index, such as {printable(missing[0])})"


def _record(found: TarRecord, *, sample_id: int) -> Record:
    """A record of a tar as the views take it.

    Raises:
        BadImageError: No decoder takes it.
    """
    height, width, kind, _ = inspect_jpeg(found.image)
    if not kind.decodable:
        raise BadImageError(f"a JPEG of kind {kind.name}, which no decoder takes")
    data = np.frombuffer(found.image, np.uint8)
    return Record(data, height, width, found.label, sample_id=sample_id, key=found.key, kind=kind)


def _end_with_children(pid: int) -> None:
    """Terminate the command of a pipe: its shell, and what the shell started, which holds the pipe open."""
    with contextlib.suppress(psutil.NoSuchProcess):
        shell = psutil.Process(pid)
        for process in (*shell.children(recursive=True), shell):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()


def _without_command(message: str, url: str) -> str:
    """A message without the secrets of the shard's URL; webdataset repeats the command of a pipe."""
    if status := re.search(r": exit (-?\d+) \(read\)", message):
        return f"the command of the pipe ended with exit {status[1]}"
    command = url.removeprefix("pipe:")
    for spelled in (command, repr(command)[1:-1]):
        message = message.replace(spelled, redact(url).removeprefix("pipe:"))
    return redact(message)


def open_shard(url: str, remote: Remote) -> IO[bytes]:
    """A shard to read from front to back: a file, fsspec's URLs with retries, or a pipe."""
    if is_local(url):
        # Not by webdataset, which refuses files where WDS_SECURE forbids it commands.
        return Path(url).open("rb")
    if is_remote(url):
        return open_stream(remote.file(url))
    stream: IO[bytes] = wds.gopen(url)
    return stream
