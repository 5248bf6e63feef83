"""Reads at offsets of many local files, of which only the most recently used stay open."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from jaxtyping import UInt8

from cmae.pipeline.errors import DataError
from cmae.pipeline.formats.shard_index import tar_digest

logger = logging.getLogger(__name__)


class OpenFiles:
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
                if error.errno not in PASSING_ERRORS:
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

PASSING_ERRORS = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO)
"""A server that restarts or fails over gives these for some seconds."""


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
