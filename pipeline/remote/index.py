"""Indices of remote shards: fetched to the cache, checked against their tars, made where there are none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.pipeline.errors import RemoteError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.dataset_index import (
    DatasetIndex,
    IndexResult,
    error_line,
    index_result,
)
from cmae.pipeline.formats.index_file import MAX_INDEX_BYTES
from cmae.pipeline.formats.parallel import no_progress, run_threads
from cmae.pipeline.formats.shard_index import (
    DIGEST_BYTES,
    INDEX_SUFFIX,
    MissingIndexError,
    ShardIndex,
    StaleIndexError,
    build_index,
    digest_of_ends,
    index_path,
    load_index_file,
    read_index_file,
    read_keys,
    save_index,
    tar_digest,
)
from cmae.pipeline.remote.cache import CacheFullError, Check, ChecksumError, ShardCache
from cmae.pipeline.remote.client import RemoteConfig, RemoteFile, Span, http_status
from cmae.pipeline.remote.progress import ProgressReporter

_INDEX_WORKERS = 32

MAX_CHECKSUM_BYTES = 64 << 10
"""Largest `.sha256` file that is read."""

_EXPECTED = (RemoteError, CacheFullError)
"""Errors that name their shard."""


def index_url(url: str) -> str:
    """`s3://bucket/x.tar` -> `s3://bucket/x.index.npz`; a query stays."""
    address, mark, query = url.partition("?")
    return address.removesuffix(".tar") + INDEX_SUFFIX + mark + query


def open_cache(config: RemoteConfig) -> ShardCache:
    """The folder of shards; without `cache_dir`, the user's cache folder, for indices alone.

    Raises:
        CmaeError: There is no such folder, and none can be made.
    """
    quota = config.cache_quota_gib
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cmae"
    try:
        folder = expand_home(config.cache_dir or default)
    except CmaeError as error:
        raise CmaeError(
            f"no folder for the indices of remote shards: {error}, or name one with data.cache_dir",
            key="cache_dir",
        ) from error
    return ShardCache(folder, quota_bytes=None if quota is None else int(quota * 2**30))


def load_remote_index(files: Sequence[RemoteFile], cache: ShardCache) -> DatasetIndex:
    """Fetch the indices of all shards to the cache, check and join them.

    Raises:
        FileNotFoundError: A shard has no index, neither in the store nor in the cache.
        StaleIndexError: An index does not belong to its tar.
        RemoteError: A shard is not there.
    """
    report = ProgressReporter("indices", files[0].remote.config.progress, num_total=len(files))
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
        data = file.remote.file(index_url(file.url)).read_all(limit=_index_limit(file))
    except RemoteError as error:
        if _is_missing(error):
            raise MissingIndexError(
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
        file: The shard.
        cache: Folder of the copy.
        keep: Shards whose copies are not removed for this one.

    Raises:
        RemoteError, CacheFullError: See `ShardCache.fetch`.
        StaleIndexError: The index belongs to another tar.
    """
    try:
        check: Check = partial(check_copy, index_file=fetch_index(file, cache))
    except FileNotFoundError:
        check = _checksum_check(file)
    return cache.fetch(file, check=check, keep={cache.path(one.url) for one in keep})


def copy_unchecked(file: RemoteFile, cache: ShardCache, *, keep: Sequence[RemoteFile] = ()) -> Path:
    """Copy a shard and its index as they are, for a look at what is wrong with them; return the copy.

    Args:
        file: The shard.
        cache: Folder of the copy; not the one that runs read, where what lies there is taken for checked.
        keep: Shards whose copies are not removed for this one.

    Raises:
        RemoteError, CacheFullError: See `ShardCache.fetch`.
    """
    path = cache.fetch(file, check=lambda path: None, keep={cache.path(one.url) for one in keep})
    data = _read_if_there(file.remote.file(index_url(file.url)), limit=_index_limit(file))
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
        # Whatever trips over one shard, the others get their index.
        except Exception as error:
            line = str(error) if isinstance(error, _EXPECTED) else error_line(file.shown, error)
            return IndexResult(file.shown, 0, 0, built=False, error=line)
        return index_result(file.shown, index, built=built)

    return run_threads(ensure, files, workers=workers, progress=progress)


def _ensure_index(file: RemoteFile, cache: ShardCache, rebuild: bool) -> tuple[ShardIndex, bool]:
    """An index in the cache, and whether it had to be made."""
    if not rebuild:
        with contextlib.suppress(FileNotFoundError, StaleIndexError):
            return load_index_file(fetch_index(file, cache)), False
    path = cache.fetch(file, check=_checksum_check(file))
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
    line = _read_if_there(
        file.remote.file(f"{address}.sha256{mark}{query}"), limit=MAX_CHECKSUM_BYTES
    )
    if line is None:
        return lambda path: None
    found = re.match(rb"[0-9a-fA-F]{64}\b", line)
    if found is None:
        raise CmaeError(f"{file.shown}.sha256 does not begin with a SHA-256: {line[:40]!r}")
    return partial(check_sha256, expected=found[0].decode().lower())


def check_sha256(path: Path, *, expected: str) -> None:
    """Compare a file with its checksum.

    Raises:
        ChecksumError: They differ.
    """
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ChecksumError(f"SHA-256 {found}, the .sha256 beside it says {expected}")


def _index_limit(file: RemoteFile) -> int:
    """An index is smaller than its tar: a record has 1.5 KiB there at least, and keys a bound of 1 KiB."""
    return min(MAX_INDEX_BYTES, (file.info.size or MAX_INDEX_BYTES) + (1 << 20))


def _read_if_there(file: RemoteFile, *, limit: int) -> bytes | None:
    """A small object; None where there is none."""
    try:
        return file.read_all(limit=limit)
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
    ends = [(0, min(DIGEST_BYTES, size)), (max(size - DIGEST_BYTES, 0), size)]
    head, tail = file.remote.read_spans([Span(file, *span) for span in ends])
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
    rows = zip(*(stored[name].tolist() for name in ("byte_offset", "size", "crc32")), strict=True)
    with open(path, "rb") as file:
        for row, (byte_offset, size, crc32) in enumerate(rows):
            found = zlib.crc32(os.pread(file.fileno(), size, byte_offset))
            if found != crc32:
                key = read_keys(index_file)[row]
                raise ChecksumError(f"CRC32 {found:08x} of image {key}, its index says {crc32:08x}")
