"""Copy finished files to a store: retried, compared with what the store then holds, and not sent twice."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cmae.errors import CmaeError
from cmae.pipeline.remote.client import Remote, RemoteConfig, http_status
from cmae.pipeline.remote.schemes import is_remote, redact, split_scheme
from cmae.pipeline.remote.stores import Store, open_filesystem, open_store

_IS_HTTP = ("http", "https")


class UploadFolder:
    """A folder in a store that takes copies of files.

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
        """Send a file, unless the store holds it already; return whether it was sent.

        Args:
            path: A file that no longer changes.
            name: Name in the folder; default: the file's own.

        Raises:
            RemoteError: It did not arrive within the deadline, or as another file.
            OSError: The file cannot be read.
        """
        url = f"{self.url}/{name or path.name}"
        size, md5 = path.stat().st_size, _md5(path)
        store = open_store(url, storage_options=self._config.storage_options)

        async def send() -> bool:
            if await _holds(store, size, md5):
                return False
            options = {"method": "put"} if split_scheme(url) in _IS_HTTP else {}
            await self._filesystem._put_file(str(path), url, **options)
            if not await _holds(store, size, md5):
                raise OSError(f"the store does not hold what was sent, {size} bytes of MD5 {md5}")
            return True

        what = f"sending {path.name}"
        return self._remote.run(self._remote.retried(send, url=url, what=what))  # type: ignore[no-any-return]

    @property
    def shown(self) -> str:
        """The URL without what may be secret."""
        return redact(self.url)

    def close(self) -> None:
        """End what is under way."""
        self._remote.close()


async def _holds(store: Store, size: int, md5: str) -> bool:
    """Whether the store says that it has an object of this size and, where it tells, this MD5."""
    try:
        found = await store.stat()
    except Exception as error:
        if isinstance(error, FileNotFoundError) or http_status(error) == 404:
            return False
        raise
    return found.size in (size, None) and found.md5 in (md5, "")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
