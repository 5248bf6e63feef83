"""Objects behind URLs, through fsspec: one attempt at a time. Retries and deadlines are the client's.

http(s) goes over fsspec's session, request by request, because its file system hides what we need: whether
the server honoured the range, which version it sent, and how fast the bytes come. Every other scheme (s3, gs
and whatever fsspec knows) goes through the file system's own reads.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import fsspec
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from cmae.errors import CmaeError
from cmae.pipeline.remote.schemes import redact, split_scheme

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

STALL_S = 20.0
"""A transfer that brings fewer than MIN_BYTES_PER_S in this many seconds is given up and begun again."""

MIN_BYTES_PER_S = 32 * 1024

MAX_REDIRECTS = 10

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


_MD5 = re.compile(r"[0-9a-f]{32}")


class ObjectInfo(NamedTuple):
    """What a store says of an object."""

    size: int | None
    """Bytes; None where the server does not say."""
    version: str
    """ETag, or what the store has instead; changes when the object does. Empty: unknown."""
    md5: str
    """MD5 of the contents, in hex; empty where the store does not say."""
    has_ranges: bool
    """Whether parts of the object can be read."""


class ObjectChangedError(OSError):
    """The object is another one now than when the run began."""


class UnusableAnswerError(OSError):
    """The server compresses though it was asked not to, or redirects to nowhere: it would do so again."""


class NoRangesError(OSError):
    """The server sends the whole object whatever range is asked for."""


class Store(Protocol):
    """One object; every call is one attempt."""

    async def stat(self) -> ObjectInfo:
        """Size, version, checksum."""

    async def read(self, start: int, end: int, *, version: str) -> bytes:
        """Bytes start..end-1, exactly.

        Raises:
            ObjectChangedError: The object no longer has this version (where the store tells).
            OSError, TimeoutError, aiohttp.ClientError: The attempt failed.
        """

    def stream(self, *, version: str) -> AsyncIterator[bytes]:
        """All bytes from the first on, for servers without ranges."""


def open_filesystem(url: str, storage_options: Mapping[str, Any] | None = None) -> Any:
    """The asynchronous fsspec file system of a URL, over fsspec's own event loop.

    Raises:
        CmaeError: fsspec does not know the scheme, its package is not installed, or it refuses an option.
    """
    scheme = split_scheme(url)
    options = {"use_listings_cache": False, **(storage_options or {})}
    try:
        if _EXTRAS.get(scheme) == "s3":
            pool = {"max_pool_connections": 100}  # botocore's 10 would queue the reads
            options["config_kwargs"] = pool | dict(options.get("config_kwargs", {}))
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        repair = f"pip install 'cmae[{extra}]'" if extra else f"install it ({error})"
        raise CmaeError(
            f"shards={redact(url)!r} needs a package for {scheme}: that is not installed: {repair}"
        ) from error
    except (ValueError, TypeError) as error:
        raise CmaeError(
            f"shards={redact(url)!r} cannot be opened with data.storage_options of keys "
            f"{sorted(storage_options or {})}: {redact(str(error))}{_stale_package(scheme)}"
        ) from error
    return filesystem if filesystem.async_impl else AsyncFileSystemWrapper(filesystem)


def _stale_package(scheme: str) -> str:
    """What to do where the scheme's package is of another year than fsspec's; they are released together."""
    package = {"s3": "s3fs", "gs": "gcsfs"}.get(_EXTRAS.get(scheme, ""))
    if package is None:
        return ""
    found, ours = metadata.version(package), metadata.version("fsspec")
    if found.split(".")[0] == ours.split(".")[0]:
        return ""
    return f" ({package} {found} beside fsspec {ours}: pip install --upgrade {package} fsspec)"


def open_store(url: str, *, storage_options: Mapping[str, Any] | None) -> Store:
    """The object behind a URL.

    Raises:
        CmaeError: See `open_filesystem`.
    """
    filesystem = open_filesystem(url, storage_options)
    if split_scheme(url) in ("http", "https"):
        return HttpStore(filesystem, url)
    return FilesystemStore(filesystem, url)


class HttpStore:
    """An object behind http(s)."""

    def __init__(self, filesystem: Any, url: str) -> None:
        self._fs = filesystem
        self._url = url

    async def stat(self) -> ObjectInfo:
        """Ask for the first byte: the answer shows size and version, and proves that ranges work."""
        async with self._get({"Range": "bytes=0-0"}) as response:
            has_ranges = response.status == 206
            size = _total_size(response) if has_ranges else response.content_length
            md5 = response.headers.get("Content-MD5", "") if not has_ranges else ""
            md5 = _hex(md5) or _digest_md5(response.headers.get("Digest", ""))
            return ObjectInfo(size, _version(response), md5, has_ranges)

    async def read(self, start: int, end: int, *, version: str) -> bytes:
        """See `Store.read`."""
        data = bytearray()
        async with self._get({"Range": f"bytes={start}-{end - 1}"}) as response:
            _check_version(response, version)
            if response.status != 206:
                raise NoRangesError(
                    f"the server answered {response.status} instead of 206 to a range"
                )
            first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if first is not None and int(first[1]) != start:
                raise OSError(f"asked for bytes from {start}, the server sent them from {first[1]}")
            async for chunk in self._watched(response):
                data += chunk
                if len(data) > end - start:  # before an answer without an end fills the memory
                    raise OSError(f"asked for {end - start} bytes, the server sends more")
        if len(data) != end - start:
            raise OSError(f"asked for {end - start} bytes, the server sent {len(data)}")
        return bytes(data)

    async def stream(self, *, version: str) -> AsyncIterator[bytes]:
        """See `Store.stream`."""
        async with self._get({}) as response:
            _check_version(response, version)
            async for chunk in self._watched(response):
                yield chunk

    @asynccontextmanager
    async def _get(self, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp  # here: local shards need no http client

        # A body that is compressed on the way has neither the offsets nor the size of the object.
        headers = {"Accept-Encoding": "identity", **headers}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
        own = {"timeout": timeout, **self._fs.kwargs}
        own["headers"] = {**own.get("headers", {}), **headers}
        url = first = self._fs.encode_url(self._url)
        session = await self._fs.set_session()
        async with AsyncExitStack() as stack:
            for _ in range(MAX_REDIRECTS + 1):
                options = own
                # No header, cookie or password goes to another host.
                if url.origin() != first.origin():
                    session = await stack.enter_async_context(_bare_session(session))
                    options = {"headers": headers, "timeout": own["timeout"]}
                response = await stack.enter_async_context(
                    session.get(url, **options, allow_redirects=False)
                )
                target = _redirected(response)
                if target is None:
                    _check_answer(response, self._url)
                    yield response
                    return
                url = target
        raise UnusableAnswerError(f"more than {MAX_REDIRECTS} redirects")

    async def _watched(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Chunks as they come; raises when they come too slowly (silence is the socket's timeout)."""
        since, num_bytes = time.monotonic(), 0
        async for chunk in response.content.iter_any():
            yield chunk
            num_bytes += len(chunk)
            elapsed = time.monotonic() - since
            if elapsed > STALL_S:
                if num_bytes < MIN_BYTES_PER_S * elapsed:
                    raise TimeoutError(f"stalled: {num_bytes} bytes in {elapsed:.1f} s")
                since, num_bytes = time.monotonic(), 0


def _bare_session(session: aiohttp.ClientSession) -> aiohttp.ClientSession:
    """A session over the same connections, without the user's headers, cookies and passwords."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=session.connector, connector_owner=False, trust_env=session.trust_env
    )


def _redirected(response: aiohttp.ClientResponse) -> URL | None:
    """Where an answer sends the client.

    Raises:
        UnusableAnswerError: To something that is not http.
    """
    location = response.headers.get("Location", "")
    if response.status not in (301, 302, 303, 307, 308) or not location:
        return None
    target = response.url.join(type(response.url)(location))
    if target.scheme not in ("http", "https") or not target.host:
        raise UnusableAnswerError(
            f"the server redirects to {redact(str(target))!r}, which is no http URL"
        )
    return target


def _check_answer(response: aiohttp.ClientResponse, url: str) -> None:
    if response.status == 404:
        raise FileNotFoundError(f"404: {redact(url)} is not there")
    response.raise_for_status()
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnusableAnswerError(
            f"the server sends Content-Encoding {response.headers['Content-Encoding']!r:.40}, and was asked "
            "for identity"
        )


class FilesystemStore:
    """An object behind any other file system that fsspec knows."""

    def __init__(self, filesystem: Any, url: str) -> None:
        self._fs = filesystem
        self._path = filesystem._strip_protocol(url)
        self._is_s3 = _EXTRAS.get(split_scheme(url)) == "s3"

    async def stat(self) -> ObjectInfo:
        """Size, version, and the MD5 where the store keeps one of plain contents."""
        async with asyncio.timeout(STALL_S):
            if self._is_s3:
                return await self._stat_s3()
            found = await self._fs._info(self._path)
        names = ("etag", "ETag", "generation", "mtime", "LastModified", "created")
        version = next((str(found[name]) for name in names if found.get(name)), "")
        return ObjectInfo(found["size"], version, _hex(str(found.get("md5Hash", ""))), True)

    async def _stat_s3(self) -> ObjectInfo:
        """HEAD of the object: the ETag is the MD5 unless it came in parts or was encrypted with a key."""
        bucket, key, _ = self._fs.split_path(self._path)
        found = await self._fs._call_s3("head_object", self._fs.kwargs, Bucket=bucket, Key=key)
        etag = str(found.get("ETag", "")).strip('"')
        is_plain = str(found.get("ServerSideEncryption", "AES256")) == "AES256"
        is_md5 = is_plain and "SSECustomerAlgorithm" not in found and _MD5.fullmatch(etag)
        return ObjectInfo(int(found["ContentLength"]), etag, etag if is_md5 else "", True)

    async def read(self, start: int, end: int, *, version: str) -> bytes:
        """See `Store.read`; these file systems do not tell the version of what they read."""
        async with asyncio.timeout(STALL_S + (end - start) / MIN_BYTES_PER_S):
            data: bytes = await self._fs._cat_file(self._path, start=start, end=end)
        if len(data) != end - start:
            raise OSError(f"asked for {end - start} bytes, the store sent {len(data)}")
        return data

    async def stream(self, *, version: str) -> AsyncIterator[bytes]:
        """Not needed: these stores have ranges."""
        yield await self._fs._cat_file(self._path)


def _total_size(response: aiohttp.ClientResponse) -> int | None:
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _version(response: aiohttp.ClientResponse) -> str:
    headers = response.headers
    return headers.get("ETag", "").strip('"') or headers.get("Last-Modified", "")


def _check_version(response: aiohttp.ClientResponse, expected: str) -> None:
    found = _version(response)
    if expected and found and found != expected:
        raise ObjectChangedError(f"the object has version {found} now, it had {expected}")


def _hex(base64_md5: str) -> str:
    try:
        return base64.b64decode(base64_md5, validate=True).hex()
    except ValueError:
        return ""


def _digest_md5(header: str) -> str:
    """The MD5 of an RFC 3230 `Digest:` header, which is about the whole object also in a range's answer."""
    found = re.search(r"\bmd5=([A-Za-z0-9+/=]+)", header, re.IGNORECASE)
    return _hex(found[1]) if found else ""
