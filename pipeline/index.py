"""Index of a WebDataset tar shard: where each image lies and what its header says.

Reading by index (`pread` of one payload) is an order of magnitude faster than iterating a tar, and it is what
makes a global shuffle and an exact resume possible. The index of `x.tar` is the file `x.index.npz` beside it.

A *record* is a group of consecutive members with the same WebDataset key (path up to the first dot of the
file name) that holds an image. A record's *position* is its number in tar order, bad images included, so
positions stay the same whatever is later found wrong with an image. Bad images (kind BAD, or a kind that
the decoders refuse) have `valid` False and are left out of `DatasetIndex`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cmae.pipeline.jpeg import MAX_PIXELS, BadImageError, JpegInfo, JpegKind, inspect_jpeg

FORMAT_VERSION = 1
INDEX_SUFFIX = ".index.npz"
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg"})
"""Lower-case WebDataset extensions (everything after the first dot) that are taken for an image."""
NO_LABEL = -1

_BLOCK = 512
_DIGEST_BYTES = 64 * 1024
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # WebDataset's rule
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # names that WebDataset skips
_REGULAR_TYPES = frozenset(b"\x000" + b"7")
_TYPES_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders, fifos

Columns = dict[str, npt.NDArray[Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")


class TarError(ValueError):
    """A shard that is not a well-formed tar, or holds no images; names the file and the byte."""


class StaleIndexError(ValueError):
    """An index that was made for other bytes than the tar now has, or by another version."""


# --- tar ------------------------------------------------------------------------------------------


class TarMember(NamedTuple):
    """A regular file in a tar; `offset` is that of its payload."""

    name: str
    offset: int
    data: bytes


class TarRecord(NamedTuple):
    """One sample of a shard; `offset` is that of the image payload in the tar, `label` -1 if absent."""

    key: str
    offset: int
    image: bytes
    label: int


def iter_tar(stream: IO[bytes], *, name: str) -> Iterator[TarMember]:
    """Yield the regular files of a tar, in order; 3 to 7 times faster than `tarfile`.

    Reads ustar, GNU long names and pax headers, from anything with `read`, pipes included. The two zero
    blocks at the end may be missing, but where they are nothing may follow them.

    Args:
        stream: Positioned at the first header; `read(n)` gives fewer than n bytes only at the end.
        name: What errors call the stream.

    Raises:
        TarError: A header with a wrong checksum, a member cut short, or a hole of zeros.
    """
    position, padding = 0, 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        block = stream.read(padding + _BLOCK)[padding:]
        position += padding
        if not block:
            return
        if block.count(0) == _BLOCK:
            _check_only_zeros_follow(stream, name, position)
            return
        member, size, kind = _parse_header(block, name, position)
        position += _BLOCK
        if long_size is not None:
            size, long_size = long_size, None
        if kind in _TYPES_WITHOUT_DATA:
            size = 0
        data = stream.read(size)
        if len(data) != size:
            raise TarError(
                f"{name}: truncated: {member} needs {size} bytes from byte {position}, {len(data)} are left"
            )
        if kind == ord("L"):
            long_name = data.rstrip(b"\0").decode(errors="surrogateescape")
        elif kind == ord("x"):
            try:
                pax = _parse_pax(data)
                long_name = pax.get("path", long_name)
                long_size = int(pax["size"]) if "size" in pax else None
            except ValueError as error:
                raise TarError(
                    f"{name}: damaged: pax header at byte {position}: {error}"
                ) from error
        elif kind != ord("g") and kind != ord("K"):
            if kind in _REGULAR_TYPES:
                yield TarMember(long_name or member, position, data)
            long_name = None
        position += size
        padding = -size % _BLOCK


def iter_records(stream: IO[bytes], *, name: str) -> Iterator[TarRecord]:
    """Group the members of a tar as WebDataset does and yield the groups that hold an image.

    The label is the integer in `.cls`, or the integer `label` in `.json`.

    Raises:
        TarError: See `iter_tar`.
    """
    key: str | None = None
    image: TarMember | None = None
    label = NO_LABEL
    seen: set[str] = set()
    for member in iter_tar(stream, name=name):
        match = _KEY_AND_EXTENSION.match(member.name)
        if match is None or _WEBDATASET_META.match(member.name):
            continue
        extension = match[2].lower()
        if match[1] != key or extension in seen:
            if key is not None and image is not None:
                yield TarRecord(key, image.offset, image.data, label)
            key, image, label = match[1], None, NO_LABEL
            seen.clear()
        seen.add(extension)
        if extension in IMAGE_EXTENSIONS and image is None:
            image = member
        elif extension in ("cls", "json") and label == NO_LABEL:
            label = _parse_label(extension, member.data)
    if key is not None and image is not None:
        yield TarRecord(key, image.offset, image.data, label)


def _parse_header(block: bytes, name: str, position: int) -> tuple[str, int, int]:
    """Member name, payload size in bytes and type flag of one 512-byte header."""
    try:
        stored = int(block[148:156].strip(b" \0"), 8)
        # Sizes of 8 GiB and more are stored as a binary number whose first bit is set.
        size = (
            int.from_bytes(block[125:136])
            if block[124] & 0x80
            else int(block[124:136].strip(b" \0") or b"0", 8)
        )
    except (ValueError, IndexError):
        stored, size = -1, 0
    if stored != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise TarError(_not_a_header(block, name, position))
    member = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    full = prefix + b"/" + member if prefix else member
    if block[156] == ord("S"):
        raise TarError(
            f"{name}: {full.decode(errors='replace')} is a GNU sparse file; write the tar without --sparse"
        )
    return full.decode(errors="surrogateescape"), size, block[156]


def _not_a_header(block: bytes, name: str, position: int) -> str:
    if position > 0 and len(block) < _BLOCK:
        return f"{name}: truncated: {len(block)} bytes at byte {position} are no tar header"
    if position > 0:
        return f"{name}: damaged: no tar header at byte {position} (wrong checksum)"
    if (
        block[:2] == b"\x1f\x8b"
        or block[:3] == b"BZh"
        or block[:4] in (b"\x28\xb5\x2f\xfd", b"\xfd7zX")
    ):
        return f"{name}: a compressed tar, which has no fixed offsets: unpack it (gunzip) to a .tar"
    return f"{name}: not a tar file: it starts with {block[:16]!r}"


def _check_only_zeros_follow(stream: IO[bytes], name: str, position: int) -> None:
    start = position + _BLOCK
    while chunk := stream.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise TarError(
                f"{name}: damaged: the tar ends with a zero block at byte {position}, but data follows "
                f"after byte {start} (overwritten with zeros, or two tars in one file)"
            )
        start += len(chunk)


def _parse_pax(data: bytes) -> dict[str, str]:
    """Lines `<length> <keyword>=<value>` of a pax extended header (POSIX.1-2001)."""
    records: dict[str, str] = {}
    position = 0
    while (space := data.find(b" ", position)) > 0:
        end = position + int(data[position:space])
        if end <= space:
            raise ValueError(f"a pax line of {end - position} bytes")
        keyword, _, value = data[space + 1 : end - 1].partition(b"=")
        records[keyword.decode(errors="replace")] = value.decode(errors="surrogateescape")
        position = end
    return records


def _parse_label(extension: str, data: bytes) -> int:
    try:
        value = json.loads(data).get("label", NO_LABEL) if extension == "json" else int(data)
    except (ValueError, AttributeError):
        return NO_LABEL
    return value if isinstance(value, int) else NO_LABEL


# --- index of one shard ---------------------------------------------------------------------------


class IndexRow(NamedTuple):
    """One record as the index stores it; see ShardIndex for the columns."""

    key: str
    offset: int
    size: int
    height: int
    width: int
    kind: int
    orientation: int
    crc32: int
    label: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Columns over the n records of one shard, in tar order."""

    keys: npt.NDArray[np.str_]
    """(n,) WebDataset keys."""
    offset: npt.NDArray[np.int64]
    """(n,) Start of the image payload in the tar, in bytes."""
    size: npt.NDArray[np.int64]
    """(n,) Length of the image payload, in bytes."""
    height: npt.NDArray[np.int32]
    """(n,) Stored rows, before any EXIF turn; 0 for a bad image."""
    width: npt.NDArray[np.int32]
    """(n,) Stored columns, before any EXIF turn; 0 for a bad image."""
    kind: npt.NDArray[np.uint8]
    """(n,) JpegKind; BAD where the header walk refuses the file."""
    orientation: npt.NDArray[np.uint8]
    """(n,) EXIF orientation 1..8; 1 where it is absent."""
    crc32: npt.NDArray[np.uint32]
    """(n,) zlib.crc32 of the image payload."""
    label: npt.NDArray[np.int64]
    """(n,) Class number, -1 where there is none."""
    tar_size: int
    """Bytes of the tar."""
    tar_digest: str
    """See `tar_digest`."""

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(n,) True where the image can be decoded."""
        return _is_decodable(self.kind)

    @classmethod
    def from_rows(cls, rows: Iterable[IndexRow], *, tar_path: str | Path) -> ShardIndex:
        """Turn rows into columns; size and digest are read from the finished tar."""
        columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
        arrays = {
            name: np.asarray(values, dtype)
            for (name, dtype), values in zip(_COLUMNS.items(), columns, strict=True)
        }
        return cls(**arrays, tar_size=os.path.getsize(tar_path), tar_digest=tar_digest(tar_path))


def _is_decodable(kind: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.isin(kind, [member for member in JpegKind if member.decodable])


_COLUMNS: dict[str, type[np.generic]] = {
    "keys": np.str_,
    "offset": np.int64,
    "size": np.int64,
    "height": np.int32,
    "width": np.int32,
    "kind": np.uint8,
    "orientation": np.uint8,
    "crc32": np.uint32,
    "label": np.int64,
}


def index_path(tar_path: str | Path) -> Path:
    """`shards/x.tar` -> `shards/x.index.npz`."""
    path = Path(tar_path)
    return path.with_name(path.name.removesuffix(".tar") + INDEX_SUFFIX)


def tar_digest(tar_path: str | Path) -> str:
    """SHA-256 over the file's size, first 64 KiB and last 64 KiB: two reads, whatever the size.

    It detects a shard that was written again, cut, appended to or replaced. It does not detect bytes that
    changed in the middle at an equal size: the CRC of each sample does, when it is read. Modification times
    play no part, so shards can be copied.
    """
    with open(tar_path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        digest.update(file.read(_DIGEST_BYTES))
        file.seek(max(size - _DIGEST_BYTES, 0))
        digest.update(file.read(_DIGEST_BYTES))
    return digest.hexdigest()


def index_row(record: TarRecord, info: JpegInfo | None) -> IndexRow:
    """The index entry of a record; `info` is None where the header walk refused the image."""
    height, width, kind, orientation = info or JpegInfo(0, 0, JpegKind.BAD, 1)
    crc32 = zlib.crc32(record.image)
    return IndexRow(
        record.key,
        record.offset,
        len(record.image),
        height,
        width,
        kind,
        orientation,
        crc32,
        record.label,
    )


def build_index(tar_path: str | Path, *, max_pixels: int = MAX_PIXELS) -> ShardIndex:
    """Read a whole shard and index it; a record whose image is bad is kept with kind BAD.

    Raises:
        TarError: The tar is damaged (see `iter_tar`) or no record holds a `.jpg` or `.jpeg`.
        FileNotFoundError: There is no such file.
    """
    with open(tar_path, "rb", buffering=1 << 20) as file:
        rows = [
            index_row(record, _inspect(record.image, max_pixels))
            for record in iter_records(file, name=str(tar_path))
        ]
    if not rows:
        raise TarError(_no_images(tar_path))
    return ShardIndex.from_rows(rows, tar_path=tar_path)


def _inspect(image: bytes, max_pixels: int) -> JpegInfo | None:
    try:
        return inspect_jpeg(image, max_pixels=max_pixels)
    except BadImageError:
        return None


def _no_images(tar_path: str | Path) -> str:
    with open(tar_path, "rb") as file:
        names = [member.name for member in iter_tar(file, name=str(tar_path))]
    matches = (_KEY_AND_EXTENSION.match(name) for name in names)
    common = Counter(match[2] if match else "(none)" for match in matches).most_common(5)
    found = ", ".join(f"{count} x {extension}" for extension, count in common) or "no files at all"
    return f"{tar_path}: no member ends in .jpg or .jpeg right after its key; extensions found: {found}"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `path` when the block ends well, and vanishes otherwise."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on empty contents
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def save_index(index: ShardIndex, path: str | Path) -> None:
    """Write the index as a plain .npz (no pickle), atomically.

    Raises:
        PermissionError: The folder cannot be written; says what to do instead.
    """
    columns = {field.name: getattr(index, field.name) for field in fields(index)}
    columns["keys"] = np.char.encode(
        index.keys, "utf-8", "surrogateescape"
    )  # a quarter of numpy's UCS-4
    try:
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, format_version=FORMAT_VERSION, **columns)
    except PermissionError as error:
        raise PermissionError(
            f"cannot write {path}: {error.strerror}. If the shards lie in a read-only folder, link them into "
            "one of yours (ln -s /data/*.tar shards/) and index them there"
        ) from error


def load_index(tar_path: str | Path) -> ShardIndex:
    """Load the index of a shard and check that it belongs to the tar as it is now.

    Raises:
        FileNotFoundError: There is no index (or no tar).
        StaleIndexError: Made for other contents, by another format version, or unreadable.
    """
    columns = _read_columns(tar_path, without=())
    keys = np.char.decode(columns.pop("keys").astype(np.bytes_), "utf-8", "surrogateescape")
    size, digest = int(columns.pop("tar_size").item()), str(columns.pop("tar_digest"))
    return ShardIndex(keys=keys, **columns, tar_size=size, tar_digest=digest)


def _read_columns(tar_path: str | Path, *, without: Sequence[str]) -> Columns:
    """Arrays of a fresh index file by name, `format_version` checked and removed."""
    path = index_path(tar_path)
    repair = f"make it again with `cmae shards index {tar_path}`"
    size, digest = os.path.getsize(tar_path), tar_digest(tar_path)
    if not path.exists():
        raise FileNotFoundError(
            f"{tar_path} has no index {path.name}: make it with `cmae shards index {tar_path}`"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            version = int(archive["format_version"])
            columns: Columns = {
                name: archive[name] for name in archive.files if name not in without
            }
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
        raise StaleIndexError(f"{path} is damaged or no index; {repair}") from error
    if version != FORMAT_VERSION:
        raise StaleIndexError(
            f"{path} has format {version}, this version reads {FORMAT_VERSION}; {repair}"
        )
    if columns["tar_size"] != size:
        raise StaleIndexError(
            f"{path} was made for {columns['tar_size']} bytes, the tar has {size}; {repair}"
        )
    if columns["tar_digest"] != digest:
        raise StaleIndexError(f"{path} was made for other contents of the same size; {repair}")
    del columns["format_version"]
    return columns


# --- many shards ----------------------------------------------------------------------------------


def default_workers() -> int:
    """CPU cores this process may use, at most 16 (more only queue at the disk)."""
    return min(16, len(os.sched_getaffinity(0)))


def no_progress(amount: int) -> None:
    """Stand-in for a progress callback."""


def run_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
    stop: threading.Event | None = None,
) -> list[Result]:
    """Map over items with threads and return results in order; `progress(1)` after each.

    Threads suffice: reading and CRC32 release the interpreter lock. An exception, Ctrl-C included, drops
    what has not started and sets `stop`, for functions that take long and look at it.
    """
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
                progress(1)
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class IndexResult(NamedTuple):
    """What became of one shard in `build_indices`; `error` is None when it has a fresh index now."""

    path: str
    num_samples: int
    num_bad: int
    built: bool
    error: str | None


def build_indices(
    tar_paths: Sequence[str],
    *,
    rebuild: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
) -> list[IndexResult]:
    """Give every shard a fresh index; shards that have one are left alone unless `rebuild`.

    A shard that cannot be indexed does not stop the others: its result carries the error.
    """

    def ensure(path: str) -> IndexResult:
        try:
            index = None if rebuild else _load_if_fresh(path)
            built = index is None
            if index is None:
                index = build_index(path)
                save_index(index, index_path(path))
        except (ValueError, OSError) as error:
            return IndexResult(path, 0, 0, built=False, error=str(error))
        return IndexResult(path, len(index), int((~index.valid).sum()), built=built, error=None)

    return run_threads(ensure, tar_paths, workers=workers, progress=progress)


def _load_if_fresh(tar_path: str) -> ShardIndex | None:
    try:
        return load_index(tar_path)
    except (StaleIndexError, FileNotFoundError):
        return None


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """The decodable images of many shards as one sequence of n samples, 42 bytes each.

    A *global position* 0..n-1 counts valid samples, shard after shard. `position` is the record's number in
    its shard, bad records counted, and with the shard number makes the sample id: it does not change when
    another image of the shard is found to be bad.
    """

    paths: tuple[str, ...]
    """Tar path of every shard."""
    shard_sizes: npt.NDArray[np.int64]
    """(shards,) Valid samples in each."""
    digest: str
    """16 hex digits over sizes, offsets, CRCs and kinds of all shards in order; not over their paths."""
    num_bad: int
    """Records left out because their image cannot be decoded."""
    position: npt.NDArray[np.int32]
    """(n,) Record number in its shard."""
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    height: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    kind: npt.NDArray[np.uint8]
    orientation: npt.NDArray[np.uint8]
    crc32: npt.NDArray[np.uint32]
    label: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offset)

    @classmethod
    def load(cls, shard_paths: Sequence[str | Path], *, workers: int | None = None) -> DatasetIndex:
        """Load and check the indices of all shards, in the order given.

        Raises:
            FileNotFoundError: A shard has no index.
            StaleIndexError: An index does not belong to its tar.
            ValueError: No shards, or no valid sample in them.
        """
        if not shard_paths:
            raise ValueError("shard_paths is empty: name at least one tar file")
        paths = tuple(map(str, shard_paths))
        shards = run_threads(
            lambda path: _read_columns(path, without=["keys"]), paths, workers=workers
        )
        digest = hashlib.sha256()
        for shard in shards:
            for name in ("tar_size", "offset", "crc32", "kind"):
                digest.update(np.ascontiguousarray(shard[name]).tobytes())
        valid = [np.flatnonzero(_is_decodable(shard["kind"])).astype(np.int32) for shard in shards]
        columns = {
            name: np.concatenate(
                [shard[name][rows] for shard, rows in zip(shards, valid, strict=True)]
            )
            for name in _COLUMNS
            if name != "keys"
        }
        num_records = sum(len(shard["kind"]) for shard in shards)
        sizes = np.asarray([len(rows) for rows in valid], np.int64)
        if not sizes.sum():
            raise ValueError(
                f"none of the {num_records} records in {len(paths)} shards is a JPEG that can be decoded"
            )
        return cls(
            paths=paths,
            shard_sizes=sizes,
            digest=digest.hexdigest()[:16],
            num_bad=num_records - int(sizes.sum()),
            position=np.concatenate(valid),
            **columns,
        )

    def locate(
        self, global_position: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shard number and position in the shard of one or many global positions (same shape)."""
        rows = np.asarray(global_position, np.int64)
        shard = np.searchsorted(np.cumsum(self.shard_sizes), rows, side="right")
        return shard, self.position[rows].astype(np.int64)

    def sample_index(self, global_position: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Sample ids (shard number << 32) | position of one or many global positions (same shape)."""
        shard, position = self.locate(global_position)
        return np.asarray(shard << 32 | position, np.int64)

    def key(self, shard: int, position: int) -> str:
        """WebDataset key of a record; the keys of a shard are read from its index when first asked for."""
        return str(_shard_keys(self.paths[shard])[position])


@lru_cache(maxsize=16)
def _shard_keys(tar_path: str) -> npt.NDArray[np.str_]:
    return load_index(tar_path).keys
