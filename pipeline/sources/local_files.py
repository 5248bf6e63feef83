"""Reads at byte offsets of many local files, of which only the most recently used stay open."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from jaxtyping import UInt8
from numpy import ndarray

from cmae.pipeline.errors import DataError
from cmae.pipeline.formats.dataset_index import Place
from cmae.pipeline.formats.shard_index import tar_digest
from cmae.pipeline.sources.shard_reader import LostShard
from cmae.printable import MAX_LINE, printable

logger = logging.getLogger(__name__)

_NUM_TRIES = 6

_LOST_FOR_S = 60.0
"""Seconds for which a shard that could not be read is not tried again."""

_PASSING_ERRORS = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO)
"""A server that restarts or fails over gives these for some seconds."""

_LOST_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, *_PASSING_ERRORS)
"""The shard or its disk is gone; anything else is a fault of this machine or this program."""


class OpenFiles:
    """Local shards, of which only the most recently used stay open. A `ShardReader`.

    Network file systems lose files for a moment: such reads are tried again on a new handle.

    Args:
        paths: Tar files.
        digests: `tar_digest` of each as it was indexed.
        max_open: Files that stay open; None = half of what this process may still open.
        first_delay_s: Wait before the second attempt of a read; doubles with each.
    """

    is_local = True

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
        self._lost: dict[int, tuple[float, LostShard]] = {}  # with the time to try it again
        self._lock = threading.Lock()

    def read_batch(
        self, places: Sequence[Place], buffer: UInt8[ndarray, " n"]
    ) -> Iterator[UInt8[ndarray, " size"] | LostShard]:
        """See `ShardReader.read_batch`. A record is read when it is asked for, so that caches still hold it.

        Raises:
            DataError: A file is another one than when it was first opened, or this machine is at fault.
        """
        end = 0
        for place in places:
            start, end = end, end + place.size
            yield self._read_or_lose(place, buffer[start:end])

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def check_unchanged(self, shard: int) -> None:
        """Compare the file under this name with the one that was opened first.

        Raises:
            DataError: It is another one, and its index no longer belongs to it.
        """
        # One that was deleted and is still open has nothing to be compared with.
        with contextlib.suppress(FileNotFoundError):
            self._compare(shard, _Identity.of(os.stat(self.paths[shard])))

    def _read_or_lose(
        self, place: Place, data: UInt8[ndarray, " size"]
    ) -> UInt8[ndarray, " read"] | LostShard:
        retry_at, lost = self._lost.get(place.shard, (0.0, LostShard("")))
        if time.monotonic() < retry_at:  # trying takes seconds: not again for each of its samples
            return lost
        try:
            return data[: self._read_with_retries(place, data)]
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno not in _LOST_ERRORS:
                raise DataError(
                    f"{self.paths[place.shard]} cannot be opened or read: {reason}. Repair what is wrong "
                    "with this machine (ulimit -n, permissions, memory) and start again"
                ) from error
            lost = LostShard(f"the shard cannot be read: {reason}")
            self._lost[place.shard] = (time.monotonic() + _LOST_FOR_S, lost)
            return lost

    def _read_with_retries(self, place: Place, data: UInt8[ndarray, " size"]) -> int:
        """Fill `data`; returns how much there was.

        Raises:
            DataError: The file is another one than when it was first opened.
            OSError: It cannot be read, six times in a row where trying again can help.
        """
        for attempt in range(_NUM_TRIES - 1):
            try:
                return self._read(place, data)
            except OSError as error:
                if error.errno not in _PASSING_ERRORS:
                    raise
                path = printable(self.paths[place.shard], limit=MAX_LINE)
                logger.warning("%s: %s; opening it again", path, error.strerror)
                self._forget(place.shard)
                time.sleep(self._first_delay_s * 2**attempt)
        try:
            return self._read(place, data)
        except OSError as error:
            if error.errno not in _PASSING_ERRORS:
                raise
            message = f"{error.strerror}, {_NUM_TRIES} times in a row"
            raise OSError(error.errno, message, self.paths[place.shard]) from error

    def _read(self, place: Place, data: UInt8[ndarray, " size"]) -> int:
        file = self._open(place.shard)
        num_read = 0
        try:
            # Network file systems may return less than was asked for.
            while more := os.preadv(
                file.fileno(), [data.data[num_read:]], place.byte_offset + num_read
            ):
                num_read += more
                if num_read == data.size:
                    break
        except OSError:  # a stale handle stays stale: the next read opens the file again
            self._forget(place.shard)
            raise
        return num_read

    def _open(self, shard: int) -> Any:
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                file = Path(self.paths[shard]).open("rb", buffering=0)  # noqa: SIM115  # kept open
                self._compare(shard, _Identity.of(os.fstat(file.fileno())))
            self._files[shard] = file
            if len(self._files) > self._max_open:
                # Only forgotten: it closes when the last reader in another thread lets go of it.
                self._files.popitem(last=False)
        return file

    def _forget(self, shard: int) -> None:
        with self._lock:
            self._files.pop(shard, None)

    def _compare(self, shard: int, now: _Identity) -> None:
        before = self._seen.setdefault(shard, now)
        if now == before:
            return
        path = self.paths[shard]
        if tar_digest(path) != self._digests[shard]:  # a copy of the same contents is welcome
            raise DataError(
                f"{path} was replaced during the run: {before} when it was opened first, {now} now, with "
                "other contents than its index describes. Start the run again when the shards no longer "
                "change, with fresh indices (`cmae shards index`)"
            )
        logger.warning(
            "%s was replaced by a file of the same contents: %s, now %s",
            printable(path, limit=MAX_LINE),
            before,
            now,
        )
        self._seen[shard] = now


def _half_of_the_free_files() -> int:
    """Half of the files that this process may still open."""
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    in_use: int = psutil.Process().num_fds()
    return max(16, (soft - in_use) // 2)


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
