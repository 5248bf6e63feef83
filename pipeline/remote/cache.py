"""Whole remote shards on a disk of this node, shared by its processes and kept within a quota.

    <folder>/<digest of the URL's folder>/x.tar         a complete, checked shard
                                          x.index.npz   its index; `.x.index.meta` says of which version
                                          .x.tar.meta   URL, size and version of the object it is a copy of
                                          .x.tar.lock   held by the process that fetches it
                                          .x.tar.partial, .x.tar.parts   a copy in the making

A shard takes its name only when it is complete and checked, so a kill at any instant leaves no wrong file. A
shard that somebody reads carries a shared lock; only unlocked ones are removed to make room. The kernel
drops the locks of a process that dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import stat
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.pipeline.errors import RemoteError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.parallel import no_progress
from cmae.pipeline.formats.shard_index import INDEX_SUFFIX
from cmae.pipeline.remote import client
from cmae.pipeline.remote.client import RemoteFile
from cmae.pipeline.remote.schemes import identity, redact
from cmae.pipeline.remote.stores import ObjectInfo

_POLL_S = 0.1
_PARTS_AHEAD = 8

MAX_NOTES_BYTES = 16 << 20
"""Of a file of notes, which has 20 bytes for each part of 8 MiB, this much is read."""

Check = Callable[[Path], None]
"""Raises ChecksumError where a complete copy differs from what it must be."""


class CacheFullError(CmaeError, RuntimeError):
    """No room within the quota, or on the disk."""


class ChecksumError(CmaeError):
    """A copy differs from the original; says what was found and what was expected."""


class ShardCache:
    """The folder and its quota.

    Args:
        folder: Folder of the copies, made if missing; on a local disk, where file locks are cheap.
        quota_bytes: Largest size of all shards, finished or not. None: nine tenths of what the disk has
            free, what already lies here included.
    """

    def __init__(self, folder: str | Path, *, quota_bytes: int | None = None) -> None:
        self.folder = expand_home(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CmaeError(f"cache_dir={self.folder} cannot be made: {error}") from error
        if quota_bytes is None:
            quota_bytes = int(0.9 * (shutil.disk_usage(self.folder).free + self.used_bytes()))
        self.quota_bytes = quota_bytes

    def path(self, url: str) -> Path:
        """Where the copy of a shard lies, there or not."""
        address, _, query = identity(url).partition("?")  # a renewed signature is no other shard
        parent, _, name = address.rstrip("/").rpartition("/")
        digest = hashlib.sha256(f"{parent}?{query}".encode(errors="surrogateescape")).hexdigest()[
            :12
        ]
        return self.folder / digest / PurePosixPath(name).name

    def used_bytes(self) -> int:
        """Size of all shards; one in the making counts in full from its beginning."""
        return sum(size for _, size, _ in self._entries())

    def open(self, url: str, info: ObjectInfo) -> io.FileIO | None:
        """The copy, which is not removed while it is open; None if there is none.

        A copy of another version counts as none.
        """
        path = self.path(url)
        try:
            copy = io.FileIO(path)
        except FileNotFoundError:
            return None
        fcntl.flock(copy, fcntl.LOCK_SH)  # waits at most for a remover that has just looked
        if os.fstat(copy.fileno()).st_nlink == 0 or not _is_copy_of(path, info):
            copy.close()
            return None
        with contextlib.suppress(OSError):
            # Of the copies that nobody reads, the one read longest ago is removed first.
            os.utime(copy.fileno())
        return copy

    def fetch(
        self,
        file: RemoteFile,
        *,
        check: Check,
        keep: Collection[Path] = (),
        stop: threading.Event | None = None,
        progress: Callable[[int], None] = no_progress,
    ) -> Path:
        """Make sure that the copy is there; of several processes one copies and the others wait.

        Args:
            file: The shard.
            check: Looks at the complete copy before it takes its name.
            keep: Copies that are not removed for this one.
            stop: Ends the waiting and the copying early, with InterruptedError.
            progress: Called with numbers of bytes as they come.

        Raises:
            RemoteError: The shard cannot be read, or is not what it must be, twice.
            CacheFullError: There is no room.
        """
        path, stop = self._prepare(file), stop or threading.Event()
        with _lock_file(_beside(path, ".lock")) as lock:
            _wait_for(lock, path, file, stop)
            self._copy_locked(file, path, check, keep, stop=stop, progress=progress)
        return path

    def try_fetch(
        self,
        file: RemoteFile,
        *,
        check: Check,
        keep: Collection[Path] = (),
        stop: threading.Event | None = None,
        progress: Callable[[int], None] = no_progress,
    ) -> Path | None:
        """As `fetch`, but None at once where another process is copying the shard."""
        path, stop = self._prepare(file), stop or threading.Event()
        with _lock_file(_beside(path, ".lock")) as lock:
            if not _try_lock(lock):
                return None
            self._copy_locked(file, path, check, keep, stop=stop, progress=progress)
        return path

    def _prepare(self, file: RemoteFile) -> Path:
        path = self.path(file.url)
        path.parent.mkdir(exist_ok=True)
        if path.parent.is_symlink():
            raise RemoteError(_planted(path.parent))
        return path

    def _copy_locked(
        self,
        file: RemoteFile,
        path: Path,
        check: Check,
        keep: Collection[Path],
        *,
        stop: threading.Event,
        progress: Callable[[int], None],
    ) -> None:
        """Copy unless the copy is there; the shard's lock is held."""
        if path.exists() and _is_copy_of(path, file.info):
            return
        self._make_room(path, file.size, keep)
        _copy_checked(file, path, check, stop=stop, progress=progress)

    def _make_room(self, path: Path, size: int, keep: Collection[Path]) -> None:
        """Reserve `size` bytes for a copy, by giving its partial file the final size."""
        partial = _beside(path, ".partial")
        with _alone_in(self.folder):
            has = partial.stat().st_size if partial.exists() else 0
            on_disk = partial.stat().st_blocks * 512 if has else 0
            entries = sorted(self._entries())
            used = sum(entry_size for _, entry_size, _ in entries) - has
            free = shutil.disk_usage(self.folder).free + on_disk
            for _, entry_size, entry in entries:
                if used + size <= self.quota_bytes and size <= free:
                    break
                if entry not in (path, partial) and entry not in keep and _remove_unused(entry):
                    used, free = used - entry_size, free + entry_size
            if used + size > self.quota_bytes or size > free:
                raise CacheFullError(
                    f"cache_dir={self.folder} has no room for {path.name} of {size / 2**20:.1f} MiB: "
                    f"{used / 2**30:.2f} of {self.quota_bytes / 2**30:.2f} GiB are in use and the disk has "
                    f"{free / 2**30:.2f} GiB free. Raise data.cache_quota_gib, or use data.remote=range"
                )
            with os.fdopen(_open_own(partial, os.O_RDWR | os.O_CREAT), "r+b") as file:
                file.truncate(size)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of shards and partial copies; indices are small and stay."""
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            if not folder.is_dir():
                continue
            for entry in folder.iterdir():
                if INDEX_SUFFIX in entry.name:
                    continue
                if entry.name.endswith(".partial") or _beside(entry, ".meta").exists():
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        yield status.st_mtime, status.st_size, entry


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _open_own(path: Path, flags: int) -> int:
    """Open a file of the cache, whose name is known to all: never one that a link leads to.

    Others may write to the folder too. (A name at random would not do: another process has to find the file.)

    Raises:
        RemoteError: The name is that of a link, or the file has other names.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RemoteError(_planted(path)) from error
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        raise RemoteError(_planted(path))
    return handle


def _planted(path: Path) -> str:
    return (
        f"{path} is a link, which this program does not make: remove it, and use a cache_dir that "
        "nobody else can write to"
    )


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    """Handle of a file whose lock, once taken, ends with the block."""
    handle = _open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep others from counting or changing what lies in the cache; for the time of a directory listing."""
    with _lock_file(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _wait_for(lock: int, path: Path, file: RemoteFile, stop: threading.Event) -> None:
    """Take the lock of a shard.

    Raises:
        InterruptedError: Stopped.
        RemoteError: Another process holds it and does not come further.
    """
    deadline_s = file.remote.config.deadline_s
    since, seen = time.monotonic(), -1.0
    while not _try_lock(lock):
        if stop.wait(_POLL_S):
            raise InterruptedError(f"stopped waiting for {path.name}")
        modified = _modified(_beside(path, ".parts"))
        if modified != seen:
            since, seen = time.monotonic(), modified
        if time.monotonic() - since > deadline_s:
            raise RemoteError(
                f"{file.shown}: another process of this node holds {_beside(path, '.lock')} and has not come "
                f"further for {deadline_s:g} s; end it, and start again"
            )


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_copy_of(path: Path, info: ObjectInfo) -> bool:
    """Whether the file is a copy of this version; without a version the size decides."""
    try:
        meta = json.loads(_beside(path, ".meta").read_text())
        size = path.stat().st_size
    except (FileNotFoundError, ValueError):
        return False
    return (meta.get("version"), size) == (info.version, info.size)


def _remove_unused(entry: Path) -> bool:
    """Remove a shard that nobody reads, or a partial copy that nobody makes."""
    is_partial = entry.name.endswith(".partial")
    locked = entry.with_name(entry.name.removesuffix(".partial") + ".lock") if is_partial else entry
    try:
        handle = os.open(locked, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not _try_lock(handle):
            return False
        entry.unlink(missing_ok=True)
        if is_partial:
            entry.with_name(entry.name.removesuffix(".partial") + ".parts").unlink(missing_ok=True)
        else:
            _beside(entry, ".meta").unlink(missing_ok=True)
    finally:
        os.close(handle)
    return True


def _copy_checked(
    file: RemoteFile,
    path: Path,
    check: Check,
    *,
    stop: threading.Event,
    progress: Callable[[int], None],
) -> None:
    """Copy, check, and give the copy its name; what fails the check is copied once more from the start."""
    partial, parts = _beside(path, ".partial"), _beside(path, ".parts")
    for attempt in (1, 2):
        _copy(file, partial, parts, stop=stop, progress=progress)
        try:
            _check_md5(partial, file)
            check(partial)
            file.check_unchanged()
            break
        except ChecksumError as error:
            parts.unlink(missing_ok=True)
            if attempt == 2:
                partial.unlink(missing_ok=True)
                raise RemoteError(
                    f"{file.shown}: the copy is wrong, twice: {error}. The object in the store is damaged or "
                    "belongs to another index: upload it again, or index it again with `cmae shards index`"
                ) from error
    # A copy of another version must not be taken for what `.meta` says next. Without a copy, a `.meta` that a
    # kill cut short does no harm.
    path.unlink(missing_ok=True)
    meta = {"url": redact(file.url), "size": file.size, "version": file.info.version}
    with atomic_write(_beside(path, ".meta")) as out:
        out.write(json.dumps(meta).encode() + b"\n")
    # Whoever adds up the folder meanwhile could meet neither of the two names.
    with _alone_in(path.parent.parent):
        os.replace(partial, path)
    parts.unlink(missing_ok=True)


def _copy(
    file: RemoteFile,
    partial: Path,
    parts: Path,
    *,
    stop: threading.Event,
    progress: Callable[[int], None],
) -> None:
    """Fill the partial file, going on where an earlier process stopped if the server has ranges."""
    copy = _copy_parts if file.info.has_ranges else _copy_whole
    with os.fdopen(_open_own(partial, os.O_RDWR), "r+b") as out:
        for num_bytes in copy(file, parts, out):
            progress(num_bytes)
            _raise_if(stop, partial)
        out.flush()
        os.fsync(out.fileno())


def _copy_whole(file: RemoteFile, parts: Path, out: IO[bytes]) -> Iterator[int]:
    """Copy from front to back; numbers of bytes as they come."""
    for chunk in file.chunks():
        out.write(chunk)
        _append(parts, "")  # those who wait look at its time
        yield len(chunk)
    if out.tell() != file.size:
        raise RemoteError(f"{file.shown}: {out.tell()} of {file.size} bytes came")


def _copy_parts(file: RemoteFile, parts: Path, out: IO[bytes]) -> Iterator[int]:
    """Copy the parts that are missing and note each; numbers of bytes, those that were there first."""
    done = _read_parts(parts, out.fileno(), file)
    yield sum(end - start for start, end in map(file.part_ends, done))
    todo = [number for number in range(file.num_parts) if number not in done]
    handle = _open_own(parts, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with os.fdopen(handle, "a", buffering=1) as notes:
        for number, data in file.parts(todo, ahead=_PARTS_AHEAD):
            out.seek(file.part_ends(number)[0])
            out.write(data)
            out.flush()
            notes.write(f"{number} {zlib.crc32(data)}\n")
            yield len(data)


def _raise_if(stop: threading.Event, partial: Path) -> None:
    if stop.is_set():
        raise InterruptedError(f"stopped copying {partial.name}")


def _read_parts(parts: Path, handle: int, file: RemoteFile) -> set[int]:
    """Parts of this version that an earlier process wrote and that are on the disk as it wrote them."""
    head = f"{file.info.version}|{file.size}|{client.PART_BYTES}"
    lines = _read_notes(parts)
    if not lines or lines[0] != head or not file.info.version:
        parts.unlink(missing_ok=True)
        _append(parts, head + "\n")
        return set()
    done: set[int] = set()
    for line in lines[1:]:
        number, _, crc = line.partition(" ")
        is_whole = re.fullmatch(r"\d{1,9} \d{1,10}", line) is not None  # else cut off by a kill
        if not is_whole or int(number) >= file.num_parts:
            continue
        start, end = file.part_ends(int(number))
        data = os.pread(handle, end - start, start)
        if zlib.crc32(data) == int(crc):
            done.add(int(number))
    _append(parts, "\n")  # ends a line that was cut off
    return done


def _read_notes(parts: Path) -> list[str]:
    """Lines of the notes; none where they are not of the size that notes have."""
    try:
        with os.fdopen(_open_own(parts, os.O_RDONLY), encoding="utf-8", errors="replace") as notes:
            return notes.read(MAX_NOTES_BYTES).splitlines()
    except FileNotFoundError:
        return []


def _append(parts: Path, text: str) -> None:
    """Add to the notes, and set their time to now."""
    handle = _open_own(parts, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, text.encode())
        os.utime(handle)
    finally:
        os.close(handle)


def _check_md5(path: Path, file: RemoteFile) -> None:
    """Compare with the checksum that the store keeps.

    Raises:
        ChecksumError: They differ.
    """
    if not file.info.md5:
        return
    with open(path, "rb") as copy:
        found = hashlib.file_digest(copy, "md5").hexdigest()
    if found != file.info.md5:
        raise ChecksumError(f"MD5 {found}, the store says {file.info.md5}")
