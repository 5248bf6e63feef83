"""Remote shards with indices: samples from copies on a local disk, or by byte range.

A copy is made in the background, in the order in which the epoch plan needs the shards; until it is there,
its samples are read by range, so training starts at once. The shards of a run do not displace each other:
every epoch needs all of them, and a cache that drops the oldest of a cyclic scan never hits.
"""

from __future__ import annotations

import io
import logging
import os
import resource
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from jaxtyping import UInt8
from numpy import ndarray

from cmae.errors import CmaeError
from cmae.pipeline.errors import RemoteError
from cmae.pipeline.formats.dataset_index import DatasetIndex, Place
from cmae.pipeline.formats.parallel import no_progress
from cmae.pipeline.remote.cache import CacheFullError, ShardCache
from cmae.pipeline.remote.client import Remote, RemoteFile, Span
from cmae.pipeline.remote.index import check_copy, load_remote_index, open_cache
from cmae.pipeline.remote.progress import ByteCounter, ProgressReporter
from cmae.printable import MAX_LINE, printable

logger = logging.getLogger(__name__)

_MAX_GAP = 256 * 1024
"""Bytes between two samples that are read along rather than asked for apart: about what a connection brings
in the 5 ms that a request costs at the very least."""

_FILLERS = 2
"""Shards copied at the same time: one is checked while the other arrives."""

_SPARE_FILES = 256
"""File descriptors left to everything else."""


@dataclass(frozen=True)
class Reading:
    """How indexed remote shards are read."""

    mode: Literal["cache", "range"]
    index: DatasetIndex
    files: list[RemoteFile]
    cache: ShardCache

    def open_files(self, order: Sequence[int]) -> RemoteFiles:
        """Start reading; `order` as for RemoteFiles."""
        cache = self.cache if self.mode == "cache" else None
        return RemoteFiles(self.files, self.index, cache=cache, order=order)


def choose_reading(urls: Sequence[str], remote: Remote, *, needs_index: bool) -> Reading | None:
    """Find the indices and what the server can do, and choose between cache and range; None is the stream.

    Args:
        urls: Remote shards.
        remote: Connection, with the wish of the configuration.
        needs_index: Raise where an index is missing, rather than choose the stream.

    Raises:
        CmaeError: The server or the quota does not allow the mode that the configuration names.
        FileNotFoundError, StaleIndexError, RemoteError: See `load_remote_index`.
    """
    config = remote.config
    if config.mode == "stream":
        return None
    files = [remote.file(url) for url in urls]
    cache = open_cache(config)
    try:
        index = load_remote_index(files, cache)
    except FileNotFoundError as error:
        if needs_index or config.mode != "auto":
            raise
        logger.warning("%s. Until then the shards are streamed", _shown(error))
        return None
    mode: Literal["cache", "range"] = "range" if config.cache_dir is None else "cache"
    if config.mode != "auto":
        mode = config.mode
    whole = next((file for file in files if not file.info.has_ranges), None)
    fits = sum(file.size for file in files) <= cache.quota_bytes
    if whole is None or (mode == "cache" and fits):
        return Reading(mode, index, files, cache)
    if config.mode == "auto" and not needs_index:
        logger.warning(
            "%s: the server gives no byte ranges; the shards are streamed", _shown(whole.shown)
        )
        return None
    raise CmaeError(
        f"remote={mode!r} does not work with {whole.shown}: the server gives no byte ranges. Use "
        "remote=stream, or remote=cache with a quota that holds all shards"
    )


def _shown(text: object) -> str:
    return printable(str(text), limit=MAX_LINE)


class RemoteFiles:
    """Remote shards; with a cache, its copies as soon as they are there. A `ShardReader` of the sources.

    Args:
        files: The shards.
        index: Their index, against which a copy is checked.
        cache: Folder of copies; None = read by range alone.
        order: Numbers of the shards, those needed first at the front.
    """

    is_local = False

    def __init__(
        self,
        files: Sequence[RemoteFile],
        index: DatasetIndex,
        *,
        cache: ShardCache | None,
        order: Sequence[int],
    ) -> None:
        self._files = list(files)
        self._remote = files[0].remote
        self._index_files = index.index_files
        self._cache = cache
        self._copies: dict[int, io.FileIO] = {}  # open, which also keeps them from removal
        self._stop = threading.Event()
        self._order: Sequence[int] | None = order
        self._order_lock = threading.Lock()
        self._keep = {cache.path(file.url) for file in files} if cache is not None else set()
        self._fillers: list[threading.Thread] = []

    def read_batch(
        self, places: Sequence[Place], buffer: UInt8[ndarray, " n"]
    ) -> Iterator[UInt8[ndarray, " size"]]:
        """The bytes of each place in turn, written to `buffer` one after another.

        What no copy holds is asked for at once, neighbours in one request.

        Raises:
            RemoteError: Not before the deadline.
        """
        if self._cache is not None:
            self._start_filling(self._cache)
        ranges = self._read_ranges([place for place in places if not self._has_copy(place.shard)])
        end = 0
        for place in places:
            start, end = end, end + place.size
            data = buffer[start:end]
            if place in ranges:
                data.data[:] = ranges[place]
                yield data
            else:
                yield data[: self._read_copy(place, data)]

    def _read_ranges(self, places: Sequence[Place]) -> dict[Place, memoryview]:
        """Read places of any shards at the same time; what lies close together is one range."""
        if not places:
            return {}
        ranges: list[Span] = []
        number_of: dict[Place, int] = {}
        for place in sorted(places):
            file, start, end = (
                self._files[place.shard],
                place.byte_offset,
                place.byte_offset + place.size,
            )
            if ranges and ranges[-1].file is file and start - ranges[-1].end <= _MAX_GAP:
                ranges[-1] = Span(file, ranges[-1].start, max(ranges[-1].end, end))
            else:
                ranges.append(Span(file, start, end))
            number_of[place] = len(ranges) - 1
        blobs = self._remote.read_spans(ranges)
        return {
            place: memoryview(blobs[number])[place.byte_offset - ranges[number].start :][
                : place.size
            ]
            for place, number in number_of.items()
        }

    def _read_copy(self, place: Place, data: UInt8[ndarray, " size"]) -> int:
        """Fill `data` from a copy, or from the store where it cannot be read; returns how much came."""
        copy = self._copies.get(place.shard)
        if copy is not None:
            try:
                return os.preadv(copy.fileno(), [data.data], place.byte_offset)
            except OSError as error:
                # The local disk's fault, not the sample's: the store still has it.
                self._forget_copy(place.shard, error)
        data.data[:] = self._files[place.shard].read(
            place.byte_offset, place.byte_offset + place.size
        )
        return place.size

    def _forget_copy(self, number: int, error: OSError) -> None:
        if self._copies.pop(number, None) is not None:
            logger.warning(
                "the copy of %s cannot be read (%s): its samples are read from the store; look after the "
                "disk of data.cache_dir",
                _shown(self._files[number].shown),
                _shown(error),
            )

    def check_unchanged(self, shard: int) -> None:
        """Compare the shard with what it was at the beginning.

        Raises:
            RemoteError: It is another one.
        """
        self._files[shard].check_unchanged()

    def close(self) -> None:
        """Stop copying and let go of the copies."""
        self._stop.set()
        self._remote.close()
        for thread in self._fillers:
            thread.join()
        self._copies.clear()  # each closes when its last reader lets go of it

    def _has_copy(self, number: int) -> bool:
        """Whether there is a copy; where the server has no ranges, wait for it."""
        if number in self._copies:
            return True
        if self._cache is not None and not self._files[number].info.has_ranges:
            self._copy(number, self._cache, self._cache.fetch)
        return number in self._copies

    def _copy(
        self,
        number: int,
        cache: ShardCache,
        fetch: Callable[..., Path | None],
        *,
        progress: Callable[[int], None] = no_progress,
    ) -> bool:
        """Copy a shard and open the copy; False if another process is at it and `fetch` does not wait."""
        file = self._files[number]
        check = partial(check_copy, index_file=Path(self._index_files[number]))
        for _ in range(3):  # another run may remove the copy before we hold it
            path = fetch(file, check=check, keep=self._keep, stop=self._stop, progress=progress)
            if path is None:
                return False
            copy = cache.open(file.url, file.info)
            if copy is not None:
                self._copies[number] = copy
                return True
        raise RemoteError(
            f"{file.shown}: its copy in {cache.folder} is removed by other runs as soon as it is made; "
            "give this run a cache_dir of its own"
        )

    # --- filling the cache

    def _start_filling(self, cache: ShardCache) -> None:
        """At the first read, open the copies that are there and start to make the others."""
        with self._order_lock:
            order, self._order = self._order, None
            if order is None:
                return
            _allow_open_files(len(self._files))
            todo = self._open_copies(cache, order)
        if not todo or self._stop.is_set():
            return
        report = ProgressReporter(
            "shards",
            self._remote.config.progress,
            num_total=len(self._files),
            num_done=len(self._copies),
            bytes_total=sum(file.size for file in self._files),
            bytes_done=sum(self._files[number].size for number in self._copies),
        )
        for i in range(_FILLERS):
            thread = threading.Thread(
                target=self._fill, args=(cache, todo, report), name=f"cmae-fill-{i}", daemon=True
            )
            thread.start()
            self._fillers.append(thread)

    def _open_copies(self, cache: ShardCache, order: Sequence[int]) -> deque[int]:
        """Open the copies that are there; return the numbers of the other shards, in order."""
        todo: deque[int] = deque()
        for number in order:
            copy = cache.open(self._files[number].url, self._files[number].info)
            if copy is None:
                todo.append(number)
            else:
                self._copies[number] = copy
        return todo

    def _fill(self, cache: ShardCache, todo: deque[int], report: ProgressReporter) -> None:
        """Copy shards until all are there or the quota is used up; samples are read by range meanwhile."""
        elsewhere = 0  # shards in a row that other processes are copying
        while not self._stop.is_set():
            try:
                number = todo.popleft()
            except IndexError:
                break
            try:
                is_copied = self._copy_counted(number, cache, report)
            except CacheFullError as error:
                todo.clear()
                logger.warning(
                    "%d of %d shards are on the disk and the rest is read by range: %s",
                    len(self._copies),
                    len(self._files),
                    _shown(error),
                )
                break
            except (RemoteError, CancelledError, OSError, ValueError) as error:
                if not self._stop.is_set():
                    logger.warning("not copied, its samples are read by range: %s", _shown(error))
                continue
            if is_copied:
                elsewhere = 0
                continue
            todo.append(number)
            elsewhere += 1
            if elsewhere >= len(todo):
                self._stop.wait(0.5)
        report.close()

    def _copy_counted(self, number: int, cache: ShardCache, report: ProgressReporter) -> bool:
        """Copy a shard and report its bytes; False if another process is at it."""
        arrived = ByteCounter(report)
        if not self._copy(number, cache, cache.try_fetch, progress=arrived.add):
            return False
        arrived.complete(self._files[number].size)
        report.add_items(1)
        return True


def _allow_open_files(count: int) -> None:
    """Raise the soft limit on open files, if it is too low to keep every copy open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
