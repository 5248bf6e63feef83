"""Remote shards with indices: samples from copies on a local disk, or by byte range.

A copy is made in the background, in the order in which the epoch plan needs the shards; until it is there,
its samples are read by range, so training starts at once. The shards of a run do not displace each other:
every epoch needs all of them, and a cache that drops the oldest of a cyclic scan never hits.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import resource
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

import numpy as np
import webdataset as wds
from jaxtyping import UInt8

from cmae.pipeline.batch import LoaderState
from cmae.pipeline.cache import CacheFullError, Check, ChecksumError, ShardCache
from cmae.pipeline.dataset_index import DatasetIndex, IndexResult
from cmae.pipeline.index import (
    DIGEST_BYTES,
    INDEX_SUFFIX,
    ShardIndex,
    StaleIndexError,
    atomic_write,
    build_index,
    digest_of_ends,
    index_path,
    load_index_file,
    read_index_file,
    read_keys,
    save_index,
    tar_digest,
)
from cmae.pipeline.plan import EpochPlan
from cmae.pipeline.remote import (
    FillProgress,
    Remote,
    RemoteConfig,
    RemoteError,
    RemoteFile,
    Span,
    http_status,
    open_stream,
)
from cmae.pipeline.threads import no_progress, run_threads
from cmae.pipeline.urls import is_remote

logger = logging.getLogger(__name__)

_MAX_GAP = 256 * 1024
"""Bytes between two samples that are read along rather than asked for apart: about what a connection brings
in the 5 ms that a request costs at the very least."""
_INDEX_WORKERS = 32
_FILLERS = 2
"""Shards copied at the same time: one is checked while the other arrives."""
_SPARE_FILES = 256
"""File descriptors left to everything else."""


def index_url(url: str) -> str:
    """`s3://bucket/x.tar` -> `s3://bucket/x.index.npz`; a query stays."""
    address, mark, query = url.partition("?")
    return address.removesuffix(".tar") + INDEX_SUFFIX + mark + query


def open_cache(config: RemoteConfig) -> ShardCache:
    """The folder of shards; without `cache_dir`, the user's cache folder, for indices alone."""
    quota = config.cache_quota_gib
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "cmae"
    return ShardCache(
        config.cache_dir or default, quota_bytes=None if quota is None else int(quota * 2**30)
    )


def open_shard(url: str, remote: Remote) -> IO[bytes]:
    """A shard to read from front to back: fsspec's URLs with retries, the rest as webdataset opens it."""
    if is_remote(url):
        return open_stream(remote.file(url))
    stream: IO[bytes] = wds.gopen(url)
    return stream


# --- indices ----------------------------------------------------------------------------------------------


def load_remote_index(files: Sequence[RemoteFile], cache: ShardCache) -> DatasetIndex:
    """Fetch the indices of all shards to the cache, check and join them.

    Raises:
        FileNotFoundError: A shard has no index, neither in the store nor in the cache.
        StaleIndexError: An index does not belong to its tar.
        RemoteError: A shard is not there.
    """
    report = _Reporter("indices", files[0].remote.config.progress, num_total=len(files))
    index_files = run_threads(
        partial(fetch_index, cache=cache), files, workers=_INDEX_WORKERS, progress=report.add_items
    )
    report.close()
    columns = [
        read_index_file(path, without=["keys"], tar=file.shown, size=file.info.size, digest=None)
        for path, file in zip(index_files, files, strict=True)
    ]
    return DatasetIndex.join([file.shown for file in files], columns, index_files=index_files)


def fetch_index(file: RemoteFile, cache: ShardCache) -> Path:
    """The index of one shard in the cache, fetched unless one of the shard's present version is there.

    Raises:
        FileNotFoundError, StaleIndexError, RemoteError: See `load_remote_index`.
    """
    target = index_path(cache.path(file.url))
    if _is_index_of(target, file):
        return target
    try:
        data = file.remote.file(index_url(file.url)).read_all()
    except RemoteError as error:
        if _is_missing(error):
            raise FileNotFoundError(
                f"{file.shown} has no index {target.name} beside it: make one in the cache with "
                f"`cmae shards index {file.shown} --cache_dir {cache.folder}`, or upload it"
            ) from error
        raise
    target.parent.mkdir(exist_ok=True)
    with atomic_write(target) as out:
        out.write(data)
    digest = _remote_digest(file) if file.info.has_ranges else None
    read_index_file(target, without=["keys"], tar=file.shown, size=file.info.size, digest=digest)
    _note_index(target, file)
    return target


def copy_shard(file: RemoteFile, cache: ShardCache, *, keep: Sequence[RemoteFile] = ()) -> Path:
    """Copy a whole shard to the cache, and its index where the store has one; return the copy.

    Args:
        file: the shard.
        cache: where to.
        keep: shards whose copies are not removed for this one.

    Raises:
        RemoteError, CacheFullError: See `ShardCache.fetch`.
        StaleIndexError: The index belongs to another tar.
    """
    try:
        check: Check = partial(check_copy, index_file=fetch_index(file, cache))
    except FileNotFoundError:
        check = _checksum_check(file)
    path = cache.fetch(file, check=check, keep={cache.path(one.url) for one in keep})
    assert path is not None  # it waits
    return path


def copy_unchecked(file: RemoteFile, cache: ShardCache, *, keep: Sequence[RemoteFile] = ()) -> Path:
    """Copy a shard and its index as they are, for a look at what is wrong with them; return the copy.

    Args:
        file: the shard.
        cache: where to; not the one that runs read, for whatever lies there is taken for checked.
        keep: shards whose copies are not removed for this one.

    Raises:
        RemoteError, CacheFullError: See `ShardCache.fetch`.
    """
    path = cache.fetch(file, check=lambda path: None, keep={cache.path(one.url) for one in keep})
    assert path is not None  # it waits
    data = _read_if_there(file.remote.file(index_url(file.url)))
    if data is None:
        index_path(path).unlink(missing_ok=True)
    else:
        with atomic_write(index_path(path)) as out:
            out.write(data)
    return path


def build_remote_indices(
    files: Sequence[RemoteFile],
    cache: ShardCache,
    *,
    rebuild: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
) -> list[IndexResult]:
    """Put a fresh index of every shard into the cache; see `build_indices`.

    A shard without an index in the store is copied whole and indexed; earlier copies give way to later ones.
    """

    def ensure(file: RemoteFile) -> IndexResult:
        try:
            index, built = _ensure_index(file, cache, rebuild)
        except (RemoteError, CacheFullError, ValueError, OSError) as error:
            return IndexResult(file.shown, 0, 0, built=False, error=str(error))
        return IndexResult(
            file.shown, len(index), int((~index.valid).sum()), built=built, error=None
        )

    return run_threads(ensure, files, workers=workers, progress=progress)


def _ensure_index(file: RemoteFile, cache: ShardCache, rebuild: bool) -> tuple[ShardIndex, bool]:
    """An index in the cache, and whether it had to be made."""
    if not rebuild:
        with contextlib.suppress(FileNotFoundError, StaleIndexError):
            return load_index_file(fetch_index(file, cache)), False
    path = cache.fetch(file, check=_checksum_check(file))
    assert path is not None  # it waits
    copy = cache.open(file.url, file.info)  # held, so that no other process removes it
    try:
        index = build_index(path)
    finally:
        if copy is not None:
            copy.close()
    save_index(index, index_path(path))
    _note_index(index_path(path), file)
    return index, True


def _checksum_check(file: RemoteFile) -> Check:
    """What a shard without an index is held to: `x.tar.sha256`, as sha256sum writes it, if it is there."""
    address, mark, query = file.url.partition("?")
    line = _read_if_there(file.remote.file(f"{address}.sha256{mark}{query}"))
    if line is None:
        return lambda path: None
    return partial(check_sha256, expected=line.split()[0].decode().lower())


def check_sha256(path: Path, *, expected: str) -> None:
    """Compare a file with its checksum.

    Raises:
        ChecksumError: They differ.
    """
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ChecksumError(f"SHA-256 {found}, the .sha256 beside it says {expected}")


def _read_if_there(file: RemoteFile) -> bytes | None:
    """A small object; None where there is none."""
    try:
        return file.read_all()
    except RemoteError as error:
        if _is_missing(error):
            return None
        raise


def _is_missing(error: RemoteError) -> bool:
    """Whether the object is not there; a store that does not let us list answers "forbidden" for that."""
    cause = error.__cause__
    return isinstance(cause, FileNotFoundError | PermissionError) or http_status(cause) == 403


def _remote_digest(file: RemoteFile) -> str:
    size = file.size
    head, tail = file.remote.read_spans(
        [
            Span(file, 0, min(DIGEST_BYTES, size)),
            Span(file, max(size - DIGEST_BYTES, 0), size),
        ]
    )
    return digest_of_ends(size, head, tail)


def _index_meta(index_file: Path) -> Path:
    return index_file.with_name(f".{index_file.name}.meta")


def _note_index(index_file: Path, file: RemoteFile) -> None:
    """Write down which version of the shard the index was checked against."""
    with atomic_write(_index_meta(index_file)) as out:
        out.write(json.dumps([file.info.version, file.info.size]).encode())


def _is_index_of(index_file: Path, file: RemoteFile) -> bool:
    try:
        noted = json.loads(_index_meta(index_file).read_text())
    except (FileNotFoundError, ValueError):
        return False
    version, size = file.info.version, file.info.size
    return index_file.exists() and bool(version) and noted == [version, size]


# --- samples ----------------------------------------------------------------------------------------------


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
        urls: all remote.
        remote: with the wish of the configuration.
        needs_index: raise where an index is missing, rather than choose the stream.

    Raises:
        ValueError: The server or the quota does not allow the mode that the configuration names.
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
        logger.warning("%s. Until then the shards are streamed", error)
        return None
    mode: Literal["cache", "range"] = "range" if config.cache_dir is None else "cache"
    if config.mode != "auto":
        mode = config.mode
    whole = next((file for file in files if not file.info.has_ranges), None)
    fits = sum(file.size for file in files) <= cache.quota_bytes
    if whole is None or (mode == "cache" and fits):
        return Reading(mode, index, files, cache)
    if config.mode == "auto" and not needs_index:
        logger.warning("%s: the server gives no byte ranges; the shards are streamed", whole.shown)
        return None
    raise ValueError(
        f"remote={mode!r} does not work with {whole.shown}: the server gives no byte ranges. Use "
        "remote=stream, or remote=cache with a quota that holds all shards"
    )


class RemoteFiles:
    """Reads at offsets of remote shards; with a cache, its copies as soon as they are there.

    Args:
        files: the shards.
        index: of them; what a copy is checked against.
        cache: None: by range alone.
        order: numbers of the shards, those needed first at the front.
    """

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
        self._batch = threading.local()
        self._stop = threading.Event()
        self._order: Sequence[int] | None = order
        self._order_lock = threading.Lock()
        self._keep = {cache.path(file.url) for file in files} if cache is not None else set()
        self._fillers: list[threading.Thread] = []
        self.num_copy_bytes = 0
        """Bytes read from copies."""

    def fetch(self, places: Sequence[tuple[int, int, int]]) -> None:
        """Read (shard, offset, size) of a batch that no copy holds, at once, for this thread's next reads.

        Raises:
            RemoteError: Not before the deadline.
        """
        if self._cache is not None:
            self._start_filling(self._cache)
        missing = sorted(place for place in places if not self._has_copy(place[0]))
        if not missing:
            return
        spans: list[tuple[int, int, int]] = []
        inside: list[tuple[tuple[int, int], int]] = []  # (shard, offset) and number of its span
        for number, offset, size in missing:
            if spans and spans[-1][0] == number and offset - spans[-1][2] <= _MAX_GAP:
                spans[-1] = (number, spans[-1][1], max(spans[-1][2], offset + size))
            else:
                spans.append((number, offset, offset + size))
            inside.append(((number, offset), len(spans) - 1))
        blobs = self._remote.read_spans([Span(self._files[n], *ends) for n, *ends in spans])
        self._batch.read = {
            key: memoryview(blobs[span])[key[1] - spans[span][1] :] for key, span in inside
        }

    def read_into(self, data: UInt8[np.ndarray, " n"], number: int, *, offset: int) -> int:
        """Fill `data` from a shard; returns how much there was.

        Raises:
            RemoteError: Not before the deadline.
        """
        fetched = getattr(self._batch, "read", {}).pop((number, offset), None)
        if fetched is not None:
            data.data[:] = fetched[: data.size]
            return data.size
        copy = self._copies.get(number)
        if copy is not None:
            try:
                count = os.preadv(copy.fileno(), [data.data], offset)
            except (
                OSError
            ) as error:  # the local disk's fault, not the sample's: the store still has it
                self._forget_copy(number, error)
            else:
                self.num_copy_bytes += count
                return count
        data.data[:] = self._files[number].read(offset, offset + data.size)
        return data.size

    def _forget_copy(self, number: int, error: OSError) -> None:
        if self._copies.pop(number, None) is not None:
            logger.warning(
                "the copy of %s cannot be read (%s): its samples are read from the store; look after the "
                "disk of data.cache_dir",
                self._files[number].shown,
                error,
            )

    def check_unchanged(self, number: int) -> None:
        """Compare the shard with what it was at the beginning.

        Raises:
            RemoteError: It is another one.
        """
        self._files[number].check_unchanged()

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
            self._copy(number, self._cache, wait=True)
        return number in self._copies

    def _copy(
        self,
        number: int,
        cache: ShardCache,
        *,
        wait: bool,
        progress: Callable[[int], None] = no_progress,
    ) -> bool:
        """Copy a shard and open the copy; False if another process is at it."""
        file = self._files[number]
        check = partial(check_copy, index_file=Path(self._index_files[number]))
        for _ in range(3):  # another run may remove the copy before we hold it
            path = cache.fetch(
                file,
                check=check,
                keep=self._keep,
                wait=wait,
                stop=self._stop,
                progress=progress,
            )
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
        report = _Reporter(
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

    def _fill(self, cache: ShardCache, todo: deque[int], report: _Reporter) -> None:
        """Copy shards until all are there or the quota is used up; samples are read by range meanwhile."""
        elsewhere = 0  # shards in a row that other processes are copying
        while not self._stop.is_set():
            try:
                number = todo.popleft()
            except IndexError:
                break
            size, came = self._files[number].size, _Counter(report)
            try:
                if self._copy(number, cache, wait=False, progress=came.add):
                    came.settle(size)
                    report.add_items(1)
                    elsewhere = 0
                    continue
            except CacheFullError as error:
                todo.clear()
                logger.warning(
                    "%d of %d shards are on the disk and the rest is read by range: %s",
                    len(self._copies),
                    len(self._files),
                    error,
                )
                break
            except (RemoteError, CancelledError, OSError, ValueError) as error:
                if self._stop.is_set():
                    break
                logger.warning("not copied, its samples are read by range: %s", error)
                continue
            todo.append(number)
            elsewhere += 1
            if elsewhere >= len(todo):
                self._stop.wait(0.5)
        report.close()


def check_copy(path: Path, index_file: Path) -> None:
    """Compare a copy of a shard with its index: digest, and CRC32 of every image.

    Raises:
        ChecksumError: They differ.
    """
    stored = read_index_file(index_file, without=["keys"], tar=path.name, size=None, digest=None)
    digest, expected = tar_digest(path), str(stored["tar_digest"])
    if digest != expected:
        raise ChecksumError(
            f"digest {digest[:16]} over size and both ends, its index says {expected[:16]}"
        )
    rows = zip(*(stored[name].tolist() for name in ("offset", "size", "crc32")), strict=True)
    with open(path, "rb") as file:
        for row, (offset, size, crc32) in enumerate(rows):
            found = zlib.crc32(os.pread(file.fileno(), size, offset))
            if found != crc32:
                key = read_keys(index_file)[row]
                raise ChecksumError(f"CRC32 {found:08x} of image {key}, its index says {crc32:08x}")


def order_of_use(index: DatasetIndex, plan: EpochPlan, state: LoaderState | None) -> list[int]:
    """Shard numbers in the order in which the plan first needs them, from `state` on."""
    epoch, start = (0, 0) if state is None else (state.epoch, state.next_sample)
    upcoming = np.concatenate([plan.order(epoch)[start:], plan.order(epoch)[:start]])
    shards, first = np.unique(index.locate(upcoming)[0], return_index=True)
    return [int(shard) for shard in shards[np.argsort(first)]]


def _allow_open_files(count: int) -> None:
    """Raise the soft limit on open files, if it is too low to keep every copy open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


class _Reporter:
    """Tells a callback how far a transfer is, at most once a second, from whatever thread."""

    def __init__(
        self,
        what: Literal["indices", "shards"],
        callback: Callable[[FillProgress], None] | None,
        *,
        num_total: int,
        num_done: int = 0,
        bytes_total: int = 0,
        bytes_done: int = 0,
    ) -> None:
        self._what: Literal["indices", "shards"] = what
        self._callback = callback
        self._num = [num_done, num_total]
        self._bytes = [bytes_done, bytes_total]
        self._before = (num_done, bytes_done)
        self._begun = self._told = time.monotonic()
        self._lock = threading.Lock()

    def add_items(self, amount: int) -> None:
        self._add(amount, 0)

    def add_bytes(self, amount: int) -> None:
        self._add(0, amount)

    def close(self) -> None:
        """Tell the last state, if anything was told or done for longer than a moment."""
        if self._told > self._begun or time.monotonic() > self._begun + 1:
            self._tell()

    def _add(self, num: int, num_bytes: int) -> None:
        with self._lock:
            self._num[0] += num
            self._bytes[0] += num_bytes
            now = time.monotonic()
            if now < self._told + 1:
                return
            self._told = now
        self._tell()

    def _tell(self) -> None:
        if self._callback is None:
            return
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        rate = (self._bytes[0] - self._before[1]) / elapsed
        items = (self._num[0] - self._before[0]) / elapsed
        left_bytes, left_items = self._bytes[1] - self._bytes[0], self._num[1] - self._num[0]
        eta = (
            left_bytes / rate if self._bytes[1] and rate else left_items / items if items else None
        )
        num_done, num_total = self._num
        bytes_done, bytes_total = self._bytes
        self._callback(
            FillProgress(self._what, num_done, num_total, bytes_done, bytes_total, rate, eta)
        )


class _Counter:
    """Bytes of one shard, which count once however often parts of it come."""

    def __init__(self, report: _Reporter) -> None:
        self._report = report
        self._counted = 0

    def add(self, amount: int) -> None:
        self._counted += amount
        self._report.add_bytes(amount)

    def settle(self, size: int) -> None:
        """The shard is complete: other processes may have brought it, or parts came twice."""
        self._report.add_bytes(size - self._counted)
