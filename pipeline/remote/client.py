"""Reads from remote shards that succeed, or end in an error that says what to do, before a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import random
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

import fsspec.asyn

from cmae.errors import CmaeError
from cmae.pipeline.errors import RemoteError
from cmae.pipeline.remote.progress import FillProgress
from cmae.pipeline.remote.schemes import redact
from cmae.pipeline.remote.stores import (
    NoRangesError,
    ObjectChangedError,
    ObjectInfo,
    UnusableAnswerError,
    open_store,
)
from cmae.printable import MAX_LINE, printable

logger = logging.getLogger(__name__)

CONNECTIONS = 64
"""Reads of samples at the same time."""

PART_BYTES = 8 * 1024 * 1024
"""Whole shards are read in parts of this size, several at a time."""

FIRST_DELAY_S = 0.2
"""Wait before the first retry; doubles with each, with jitter."""

_LONGEST_DELAY_S = 20.0

Result = TypeVar("Result")

_PERMANENT_STATUS = frozenset({400, 401, 403, 404, 405, 410, 412, 414, 416, 501, 505})

_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ObjectChangedError,
    UnusableAnswerError,
)

_CLIENT_PACKAGES = frozenset(
    {
        "aiohttp",
        "botocore",
        "aiobotocore",
        "gcsfs",
        "google",
        "requests",
        "urllib3",
        "adlfs",
        "azure",
    }
)
"""Their exceptions are about the transfer; what else is no OSError is a fault of a program."""


@dataclass(frozen=True)
class RemoteConfig:
    """How remote shards are read; without effect on local ones."""

    mode: Literal["auto", "cache", "range", "stream"] = "auto"
    """'cache' copies whole shards to `cache_dir` in the background, and reads samples of shards that are not
    there yet by byte range; 'range' only does the latter; 'stream' reads front to back."""
    cache_dir: Path | None = None
    """Folder on a disk of this node, shared by its processes. None: no shards are copied; their indices go to
    the user's cache folder."""
    cache_quota_gib: float | None = None
    """Largest size of the shards in `cache_dir`. None: what the disk has free, less a tenth."""
    deadline_s: float = 300.0
    """Longest time to read one batch, retries included."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Given to fsspec's file system."""
    progress: Callable[[FillProgress], None] | None = field(default=None, repr=False)
    """Called about once a second from a background thread while shards or indices are copied."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.mode not in ("auto", "cache", "range", "stream"):
            raise CmaeError(f"remote={self.mode!r} must be auto, cache, range or stream")
        if self.mode == "cache" and self.cache_dir is None:
            raise CmaeError("remote='cache' needs cache_dir: name a folder on a disk of this node")
        for name in ("cache_quota_gib", "deadline_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise CmaeError(f"{name}={value} must be > 0")


class Span(NamedTuple):
    """Consecutive bytes of one file."""

    file: RemoteFile
    start: int
    end: int


class Remote:
    """Runs reads on fsspec's event loop, a limited number at a time, each retried until it succeeds."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self._loop = fsspec.asyn.get_loop()
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self.num_retries = 0
        """Attempts that failed and were made again."""
        self._quiet_until = 0.0
        self._running: set[Future[Any]] = set()
        self._is_closed = False
        self._lock = threading.Lock()

    def file(self, url: str) -> RemoteFile:
        """One object.

        Raises:
            CmaeError: The scheme is not known, or its package not installed.
        """
        return RemoteFile(url, self)

    def run(self, coroutine: Any) -> Any:
        """Wait for a coroutine on the event loop."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:  # Ctrl-C included: nobody waits for it any more
            future.cancel()
            raise

    def submit(self, coroutine: Any) -> Future[Any]:
        """Start a coroutine on the event loop.

        Raises:
            RemoteError: Closed.
        """
        with self._lock:
            if self._is_closed:
                coroutine.close()
                raise RemoteError("the loader is closed, and its remote shards with it")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def close(self) -> None:
        """End all reads under way: those who wait for them get a RemoteError or CancelledError."""
        with self._lock:
            self._is_closed = True
        for future in list(self._running):
            future.cancel()

    def read_spans(self, spans: Sequence[Span]) -> list[bytes]:
        """Read all of them at the same time, before one deadline.

        Raises:
            RemoteError: One of them failed.
        """
        deadline = time.monotonic() + self.config.deadline_s

        async def read_all() -> list[bytes]:
            async with asyncio.TaskGroup() as group:  # the first failure cancels the others
                tasks = [
                    group.create_task(span.file.read_async(span.start, span.end, deadline=deadline))
                    for span in spans
                ]
            return [task.result() for task in tasks]

        try:
            return self.run(read_all())  # type: ignore[no-any-return]
        except ExceptionGroup as group:
            raise group.exceptions[0] from group.exceptions[0].__cause__

    async def retried(
        self,
        attempt: Callable[[], Awaitable[Result]],
        *,
        url: str,
        what: str,
        deadline: float | None = None,
    ) -> Result:
        """Call `attempt` until it succeeds, in one of the connections.

        Raises:
            RemoteError: It cannot succeed, or the deadline (of time.monotonic) has passed.
        """
        begun = time.monotonic()
        deadline = begun + self.config.deadline_s if deadline is None else deadline
        failures = _Failures(url, what, begun, self.config.deadline_s)
        while True:
            delay = 0.0
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0)), self._slots:
                    return await attempt()
            except Exception as error:
                if not _is_transfer_error(error):
                    raise
                failures.add(error)
                if _is_permanent(error):
                    raise failures.error(permanent=True) from error
                delay = self._delay(failures.count, error)
                if time.monotonic() + delay >= deadline:
                    raise failures.error(permanent=False) from error
            self._note_retry(failures)
            await asyncio.sleep(delay)

    def _note_retry(self, failures: _Failures) -> None:
        self.num_retries += 1
        if time.monotonic() >= self._quiet_until:  # a store that is down fails every read at once
            self._quiet_until = time.monotonic() + 10
            what = printable(str(failures), limit=MAX_LINE)
            logger.warning("trying again (%d so far): %s", self.num_retries, what)

    def _delay(self, attempts: int, error: BaseException) -> float:
        """Exponential backoff, spread over its upper half so that ranks do not come back together."""
        backoff = min(FIRST_DELAY_S * 2 ** (attempts - 1), _LONGEST_DELAY_S)
        jittered: float = backoff * random.uniform(0.5, 1.0)
        return max(jittered, _retry_after(error))


class _Failures:
    """Failed attempts of one read, for its error message."""

    def __init__(self, url: str, what: str, begun: float, deadline_s: float) -> None:
        self.count = 0
        self._url, self._what = redact(url), what
        self._begun, self._deadline_s = begun, deadline_s
        self._last: BaseException = RuntimeError("no attempt was made")

    def add(self, error: BaseException) -> None:
        # Where the deadline ends a slow attempt, the failures before it say more than the timeout does.
        if self.count == 0 or str(error):
            self._last = error
        self.count += 1

    def __str__(self) -> str:
        attempts = f"{self.count} attempt{'s' if self.count > 1 else ''}"
        seconds = time.monotonic() - self._begun
        last = f"{type(self._last).__name__}: {str(self._last) or 'no answer in time'}"
        return redact(
            f"{self._url}: {self._what} failed, {attempts} in {seconds:.1f} s (deadline "
            f"{self._deadline_s:g} s); the last one: {last}"
        )

    def error(self, *, permanent: bool) -> RemoteError:
        return RemoteError(f"{self}. {_repair(self._last, permanent=permanent)}")


def _repair(error: BaseException, *, permanent: bool) -> str:
    if isinstance(error, ObjectChangedError):
        return "Shards must not change during a run: start it again when they are complete"
    if isinstance(error, UnusableAnswerError):
        return "Correct the server, or the proxy before it"
    if isinstance(error, NoRangesError):
        return "Use data.remote=stream, which reads whole shards"
    if isinstance(error, FileNotFoundError) or http_status(error) in (404, 410):
        return "Correct data.shards, or upload what is missing"
    if isinstance(error, PermissionError) or http_status(error) in (401, 403) or _lacks_key(error):
        return (
            "Give credentials by the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...) or "
            "data.storage_options; public buckets need anon: true (s3) or token: anon (gs)"
        )
    if permanent:
        return "The server refuses this request; check the URL and data.storage_options"
    return (
        "Check the network and the server. data.remote_deadline_s sets the deadline; it must stay below the "
        "collectives' timeout, or ranks die waiting for each other instead of saying this"
    )


def _is_transfer_error(error: BaseException) -> bool:
    package = type(error).__module__.split(".")[0]
    return isinstance(error, OSError | asyncio.IncompleteReadError) or package in _CLIENT_PACKAGES


def _is_permanent(error: BaseException) -> bool:
    return (
        isinstance(error, _PERMANENT)
        or http_status(error) in _PERMANENT_STATUS
        or _lacks_key(error)
    )


def _lacks_key(error: BaseException) -> bool:
    return "Credential" in type(error).__name__  # botocore's NoCredentialsError and its relatives


def http_status(error: BaseException | None) -> int | None:
    """HTTP status behind an error of aiohttp, gcsfs or botocore (which s3fs keeps as the cause)."""
    cause = None if error is None else error.__cause__
    for one in (error, cause):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    if type(cause).__module__ == "aiohttp.http_exceptions":
        return None  # an answer that was no HTTP: aiohttp's own 400 about the server
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return None


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks to be left alone (dates are not understood)."""
    headers = getattr(error, "headers", None) or {}
    value = str(headers.get("Retry-After", ""))
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else 0.0


class RemoteFile:
    """One object, read with retries."""

    def __init__(self, url: str, remote: Remote) -> None:
        self.url = url
        self.remote = remote
        self._store = open_store(url, storage_options=remote.config.storage_options)
        self._info: ObjectInfo | None = None

    @property
    def shown(self) -> str:
        """The URL, without secrets."""
        return redact(self.url)

    @property
    def info(self) -> ObjectInfo:
        """Size and version as they were when first asked for.

        Raises:
            RemoteError: The object is not there, or the server does not answer.
        """
        if self._info is None:
            self._info = self.fetch_info()
        return self._info

    @property
    def size(self) -> int:
        """Bytes.

        Raises:
            RemoteError: The server does not tell.
        """
        size = self.info.size
        if size is None:
            raise RemoteError(
                f"{self.shown}: the server does not tell the size; use data.remote=stream, or another server"
            )
        return size

    def fetch_info(self) -> ObjectInfo:
        """Ask the store again."""
        asked = self.remote.retried(
            self._store.stat, url=self.url, what="asking for size and version"
        )
        return self.remote.run(asked)  # type: ignore[no-any-return]

    def check_unchanged(self) -> None:
        """Ask the store again and compare.

        Raises:
            RemoteError: Size or version differ from the first answer.
        """
        before, now = self.info, self.fetch_info()
        if (before.size, before.version) != (now.size, now.version):
            raise RemoteError(
                f"{self.shown} was replaced during the run: {before.size} bytes of version "
                f"{before.version or 'unknown'} before, {now.size} bytes of {now.version or 'unknown'} now. "
                "Start the run again when the shards are complete"
            )

    async def read_async(self, start: int, end: int, *, deadline: float | None = None) -> bytes:
        """Bytes start..end-1, exactly."""
        version = self._info.version if self._info is not None else ""
        return await self.remote.retried(
            lambda: self._store.read(start, end, version=version),
            url=self.url,
            what=f"reading bytes {start}..{end - 1}",
            deadline=deadline,
        )

    def read(self, start: int, end: int) -> bytes:
        """Bytes start..end-1, exactly.

        Raises:
            RemoteError: They did not come in time.
        """
        return self.remote.run(self.read_async(start, end))  # type: ignore[no-any-return]

    def read_all(self, *, limit: int) -> bytes:
        """The whole of a small object.

        Raises:
            RemoteError: It is larger than `limit` bytes, or see `read`.
        """
        if (self.info.size or 0) > limit:
            raise RemoteError(self._too_large(limit))
        if self.info.has_ranges and self.info.size is not None:
            return self.read(0, self.size) if self.size else b""
        data = bytearray()
        for chunk in self.chunks():
            data += chunk
            if len(data) > limit:
                raise RemoteError(self._too_large(limit))
        return bytes(data)

    def _too_large(self, limit: int) -> str:
        return f"{self.shown} is larger than {limit} bytes, which is too much for what it should be"

    def chunks(self, *, ahead: int = 4) -> Iterator[bytes]:
        """All bytes in order; a transfer that breaks goes on at its byte.

        Where the server has no ranges, it starts over and what was given already is left out.

        Args:
            ahead: Parts in flight.
        """
        if self.info.has_ranges:
            yield from (data for _, data in self.parts(range(self.num_parts), ahead=ahead))
        else:
            yield from self._whole()

    def parts(self, numbers: Sequence[int], *, ahead: int) -> Iterator[tuple[int, bytes]]:
        """The parts of these numbers in this order, `ahead` of them in flight."""
        flying: deque[tuple[int, Future[bytes]]] = deque()
        todo = iter(numbers)
        try:
            while True:
                for number in todo:
                    read = self.read_async(*self.part_ends(number))
                    flying.append((number, self.remote.submit(read)))
                    if len(flying) >= ahead:
                        break
                if not flying:
                    return
                number, future = flying.popleft()
                yield number, future.result()
        finally:
            for _, future in flying:
                future.cancel()

    @property
    def num_parts(self) -> int:
        """Parts of the object; the last one may be short."""
        return -(-self.size // PART_BYTES)

    def part_ends(self, number: int) -> tuple[int, int]:
        """First byte of a part, and one past its last."""
        length = PART_BYTES
        return number * length, min((number + 1) * length, self.size)

    def _whole(self) -> Iterator[bytes]:
        """The object from one answer; begins again after a failure, `deadline_s` after the last progress."""
        given, stream = 0, _Restartable(self._store, self.info.version)
        try:
            while chunk := self.remote.run(
                self.remote.retried(stream.next, url=self.url, what=f"reading from byte {given} on")
            ):
                given += len(chunk)
                if given > (self.info.size or given):
                    raise RemoteError(f"{self.shown}: more than the {self.info.size} bytes it has")
                yield chunk
        finally:
            self.remote.run(stream.close())
        size = self.info.size
        if size is not None and given != size:
            raise RemoteError(f"{self.shown}: ended after {given} of {size} bytes")


class _Restartable:
    """The chunks of one answer; after a failure the next call asks anew and skips what it gave before."""

    def __init__(self, store: Any, version: str) -> None:
        self._store = store
        self._version = version
        self._given = 0
        self._chunks: AsyncIterator[bytes] | None = None
        self._skip = 0

    async def next(self) -> bytes:
        """Empty at the end."""
        if self._chunks is None:
            self._chunks, self._skip = self._store.stream(version=self._version), self._given
        try:
            async for chunk in self._chunks:
                rest = chunk[self._skip :]
                self._skip -= min(self._skip, len(chunk))
                if rest:
                    self._given += len(rest)
                    return rest
            return b""
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        chunks, self._chunks = self._chunks, None
        if chunks is not None:
            with contextlib.suppress(Exception):
                await chunks.aclose()  # type: ignore[attr-defined]


class _ChunkReader(io.RawIOBase):
    """A file over chunks of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._chunks.close()  # type: ignore[attr-defined]  # cancels the parts in flight
        super().close()


def open_stream(file: RemoteFile) -> IO[bytes]:
    """The object as a file to read from front to back; close it."""
    return io.BufferedReader(_ChunkReader(file.chunks()), buffer_size=1 << 20)
