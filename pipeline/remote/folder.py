"""A folder in a store: files go there, retried and compared with what it then holds, and come back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

from cmae.errors import CmaeError
from cmae.pipeline.errors import RemoteError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.remote.client import Remote, RemoteConfig, http_status
from cmae.pipeline.remote.schemes import is_remote, redact, split_scheme
from cmae.pipeline.remote.stores import Store, open_filesystem, open_store

_IS_HTTP = ("http", "https")

_S3_PART_BYTES = 50 << 20
"""What s3fs sends at once of a large file."""


class RemoteFolder:
    """A folder in a store that takes copies of files, and gives them.

    Stores such as s3 and gs show an object only when it has arrived whole; over http that is the server's
    affair. From any thread.
    """

    def __init__(self, url: str, config: RemoteConfig) -> None:
        """Open the store; nothing is sent yet.

        Args:
            url: Such as s3://bucket/imagenet/train; http(s) servers must take PUT.
            config: Options of the store, and the longest time for one file, retries included.

        Raises:
            CmaeError: No URL of a store, or its package is not installed.
        """
        if not is_remote(url):
            raise CmaeError(
                f"{redact(url)!r} is no folder of a store: give a URL such as s3://bucket/folder or "
                "gs://bucket/folder"
            )
        self.url = url.rstrip("/")
        self._config = config
        self._remote = Remote(config)
        self._filesystem = open_filesystem(url, config.storage_options)

    def put(self, path: Path, name: str = "") -> bool:
        """Send a file, unless the store shows by a checksum that it holds it; return whether it was sent.

        Args:
            path: A file that no longer changes.
            name: Name in the folder; default: the file's own.

        Raises:
            RemoteError: It did not arrive within the deadline, or as another file.
            OSError: The file cannot be read.
        """
        url = f"{self.url}/{name or path.name}"
        own = _Contents.of(path)
        store = open_store(url, storage_options=self._config.storage_options)

        async def send() -> bool:
            if await _compare(store, own) == "same":
                return False
            options = {"method": "put"} if split_scheme(url) in _IS_HTTP else {}
            await self._filesystem._put_file(str(path), url, **options)
            if await _compare(store, own) == "other":
                raise OSError(
                    f"the store does not hold what was sent, {own.size} bytes of MD5 {own.md5}"
                )
            return True

        what = f"sending {path.name}"
        return self._remote.run(self._remote.retried(send, url=url, what=what))  # type: ignore[no-any-return]

    def read(self, name: str, *, limit: int) -> bytes | None:
        """A small object whole; None where there is none.

        Raises:
            RemoteError: The store cannot be reached, or the object is larger than `limit` bytes.
        """
        file = self._remote.file(f"{self.url}/{name}")
        try:
            return file.read_all(limit=limit)
        except RemoteError as error:
            if _is_missing(error.__cause__):
                return None
            raise

    def get(self, name: str, path: Path) -> str:
        """Copy an object to a file, which appears whole or not at all; return its SHA-256 in hex.

        Raises:
            RemoteError: It is not there, or did not come within the deadline of each part.
            OSError: The file cannot be written.
        """
        digest = hashlib.sha256()
        with atomic_write(path) as file:
            for chunk in self._remote.file(f"{self.url}/{name}").chunks():
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """Delete an object; one that is gone already is no error.

        Raises:
            RemoteError: The store refuses, or cannot delete.
        """
        url = f"{self.url}/{name}"

        async def remove() -> None:
            try:
                await self._filesystem._rm_file(self._filesystem._strip_protocol(url))
            except FileNotFoundError:
                return
            except NotImplementedError as error:
                raise RemoteError(f"{redact(url)!r}: this kind of store deletes nothing") from error

        self._remote.run(self._remote.retried(remove, url=url, what=f"deleting {name}"))

    @property
    def shown(self) -> str:
        """The URL without what may be secret."""
        return redact(self.url)

    def close(self) -> None:
        """End what is under way."""
        self._remote.close()


class _Contents(NamedTuple):
    """What a store may say of an object with the contents of a file."""

    size: int
    md5: str
    s3_etag: str
    """Of an object that s3fs sent in parts: the MD5 of the parts' MD5s, and their number."""

    @classmethod
    def of(cls, path: Path) -> _Contents:
        whole, parts, size = hashlib.md5(usedforsecurity=False), [], 0
        with open(path, "rb") as file:
            while data := file.read(_S3_PART_BYTES):
                whole.update(data)
                parts.append(hashlib.md5(data, usedforsecurity=False).digest())
                size += len(data)
        joined = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
        return cls(size, whole.hexdigest(), f"{joined}-{len(parts)}")


async def _compare(store: Store, own: _Contents) -> Literal["same", "other", "unknown"]:
    """Whether an object has these contents, by what its store says; 'unknown' where only the size fits."""
    try:
        found = await store.stat()
    except Exception as error:
        if _is_missing(error):
            return "other"
        raise
    if found.size not in (own.size, None):
        return "other"
    if found.md5:
        return "same" if found.md5 == own.md5 else "other"
    return "same" if found.version == own.s3_etag else "unknown"


def _is_missing(error: BaseException | None) -> bool:
    return isinstance(error, FileNotFoundError) or http_status(error) == 404
