"""Index of a WebDataset tar shard: where each image lies and what its header says.

Reading by index (`pread` of one payload) is an order of magnitude faster than iterating a tar, and it is what
makes a global shuffle and an exact resume possible. The index of `x.tar` is the file `x.index.npz` beside it.
Bad images (kind BAD, or a kind that the decoders refuse) have `valid` False; `DatasetIndex` leaves them out.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cmae.errors import CmaeError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.images.jpeg import BadImageError, JpegInfo, JpegKind, inspect_jpeg
from cmae.pipeline.formats.index_file import Columns, find_fault, read_arrays
from cmae.pipeline.formats.members.member_counts import MemberCounts, from_arrays, to_arrays
from cmae.pipeline.formats.presized import downscale_mark, summarise_marks
from cmae.pipeline.formats.tar import TarError, TarRecord, iter_records

FORMAT_VERSION = 1

DOWNSCALED_FORMAT_VERSION = 2
"""Of the index of a shard with downscaled images, whose label an older reader would not pass on."""

INDEX_SUFFIX = ".index.npz"

DIGEST_BYTES = 64 * 1024
"""Length of each end of a tar that its digest covers."""


class MissingIndexError(CmaeError, FileNotFoundError):
    """A shard has no index."""


class StaleIndexError(CmaeError):
    """An index that was made for other bytes than the tar now has, or by another version."""


class IndexRow(NamedTuple):
    """One record as the index stores it; see ShardIndex for the columns."""

    key: str
    byte_offset: int
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
    byte_offset: npt.NDArray[np.int64]
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
    downscaled: dict[str, int] = field(default_factory=dict)
    """Images that `cmae shards write --max-size` has re-encoded, by setting; see `summarise_marks`."""
    members: MemberCounts = field(default_factory=MemberCounts)
    """What became of every entry of the tar; empty in an index that an earlier version made."""
    tar_sha256: bytes = b""
    """SHA-256 of the whole tar, from whoever wrote it; empty where the tar was made elsewhere."""

    def __len__(self) -> int:
        return len(self.byte_offset)

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(n,) True where the image can be decoded."""
        return is_decodable(self.kind)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[IndexRow],
        *,
        tar_path: str | Path,
        marks: Iterable[str] = (),
        members: MemberCounts | None = None,
        tar_sha256: bytes = b"",
    ) -> ShardIndex:
        """Turn rows into columns; size and digest are read from the finished tar.

        Args:
            rows: Entries of the records, in tar order.
            tar_path: Path of the finished tar.
            marks: `downscale_mark` of the images.
            members: Counts of all entries of the tar.
            tar_sha256: SHA-256 of the tar, where it is known.
        """
        columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
        arrays = {
            name: np.asarray(values, dtype)
            for (name, dtype), values in zip(COLUMNS.items(), columns, strict=True)
        }
        return cls(
            **arrays,
            tar_size=os.path.getsize(tar_path),
            tar_digest=tar_digest(tar_path),
            downscaled=summarise_marks(marks),
            members=members or MemberCounts(),
            tar_sha256=tar_sha256,
        )


def is_decodable(kind: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """True where the JpegKind is one that the decoders accept."""
    return np.isin(kind, [member for member in JpegKind if member.decodable])


COLUMNS: dict[str, type[np.generic]] = {
    "keys": np.str_,
    "byte_offset": np.int64,
    "size": np.int64,
    "height": np.int32,
    "width": np.int32,
    "kind": np.uint8,
    "orientation": np.uint8,
    "crc32": np.uint32,
    "label": np.int64,
}


_STORED_AS = {"byte_offset": "offset"}
"""Columns that have another name in an index file."""


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
        head = file.read(DIGEST_BYTES)
        file.seek(max(size - DIGEST_BYTES, 0))
        return digest_of_ends(size, head, file.read(DIGEST_BYTES))


def digest_of_ends(size: int, head: bytes, tail: bytes) -> str:
    """See `tar_digest`; `head` and `tail` are the first and last DIGEST_BYTES, or all there is."""
    return hashlib.sha256(size.to_bytes(8, "little") + head + tail).hexdigest()


def index_row(record: TarRecord, info: JpegInfo | None) -> IndexRow:
    """The index entry of a record; `info` is None where the header walk refused the image."""
    height, width, kind, orientation = info or JpegInfo(0, 0, JpegKind.BAD, 1)
    crc32 = zlib.crc32(record.image)
    return IndexRow(
        record.key,
        record.byte_offset,
        len(record.image),
        height,
        width,
        kind,
        orientation,
        crc32,
        record.label,
    )


def index_record(record: TarRecord) -> IndexRow:
    """The index entry of a record, whose image may be bad."""
    return index_row(record, _inspect(record.image))


def build_index(tar_path: str | Path) -> ShardIndex:
    """Read a whole shard and index it; a record whose image is bad is kept with kind BAD.

    Raises:
        TarError: The tar is damaged (see `iter_entries`), or the file is empty.
        FileNotFoundError: There is no such file.
    """
    if os.path.getsize(tar_path) == 0:
        raise TarError(f"{tar_path}: an empty file: not even the end marker of a tar is there")
    rows, marks, members = [], [], MemberCounts()
    with open(tar_path, "rb", buffering=1 << 20) as file:
        for record in iter_records(file, name=str(tar_path), members=members):
            rows.append(index_record(record))
            marks.append(downscale_mark(record.image))
    return ShardIndex.from_rows(rows, tar_path=tar_path, marks=marks, members=members)


def _inspect(image: bytes) -> JpegInfo | None:
    try:
        return inspect_jpeg(image)
    except BadImageError:
        return None


def save_index(index: ShardIndex, path: str | Path) -> None:
    """Write the index as a plain .npz (no pickle), atomically.

    Raises:
        PermissionError: The folder cannot be written; says what to do instead.
    """
    names = (*COLUMNS, "tar_size", "tar_digest")
    columns = {_STORED_AS.get(name, name): getattr(index, name) for name in names}
    version = FORMAT_VERSION
    if index.downscaled:
        version = DOWNSCALED_FORMAT_VERSION
        columns["presized_settings"] = np.asarray(list(index.downscaled), np.str_)
        columns["presized_counts"] = np.asarray(list(index.downscaled.values()), np.int64)
    columns |= {name: np.asarray(values) for name, values in to_arrays(index.members).items()}
    if index.tar_sha256:
        columns["tar_sha256"] = np.frombuffer(index.tar_sha256, np.uint8)
    # A quarter of numpy's UCS-4.
    columns["keys"] = np.char.encode(index.keys, "utf-8", "surrogateescape")
    try:
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, format_version=version, **columns)
    except PermissionError as error:
        raise PermissionError(
            f"cannot write {path}: {error.strerror}. If the shards lie in a read-only folder, link them into "
            "one of yours (ln -s /data/*.tar shards/) and index them there"
        ) from error


def load_index(tar_path: str | Path) -> ShardIndex:
    """Load the index of a shard and check that it belongs to the tar as it is now.

    Raises:
        MissingIndexError: There is no index.
        FileNotFoundError: There is no tar.
        StaleIndexError: Made for other contents, by another format version, or unreadable.
    """
    return _from_columns(read_columns(tar_path, without=()))


def load_index_unchecked(tar_path: str | Path) -> ShardIndex | None:
    """The index of a shard as it is, whether or not the tar has changed since; None where there is none."""
    try:
        file = index_path(tar_path)
        return _from_columns(
            read_index_file(file, without=(), tar=str(tar_path), size=None, digest=None)
        )
    except (OSError, StaleIndexError):
        return None


def load_index_file(path: Path) -> ShardIndex:
    """Load an index that was checked before; its tar need not be there.

    Raises:
        StaleIndexError: By another format version, or unreadable.
    """
    return _from_columns(read_index_file(path, without=(), tar=str(path), size=None, digest=None))


def read_keys(index_file: str | Path) -> npt.NDArray[np.str_]:
    """(n,) WebDataset keys in tar order, from an index alone: the tar may be changed or gone.

    Raises:
        OSError: There is no index, or it cannot be read.
    """
    columns = _read_archive(Path(index_file), without=())
    if "keys" not in columns or columns["keys"].dtype.kind not in "SU":
        raise OSError(f"{index_file} has no keys")
    return _decode_keys(columns["keys"])


def _from_columns(columns: Columns) -> ShardIndex:
    keys = _decode_keys(columns.pop("keys"))
    size, digest = int(columns.pop("tar_size").item()), str(columns.pop("tar_digest"))
    downscaled, members = downscaled_counts(columns), member_counts(columns)
    sha256 = columns.get("tar_sha256", np.empty(0, np.uint8)).astype(np.uint8).tobytes()
    arrays = {name: columns[name] for name in COLUMNS if name != "keys"}
    return ShardIndex(
        keys=keys,
        **arrays,
        tar_size=size,
        tar_digest=digest,
        downscaled=downscaled,
        members=members,
        tar_sha256=sha256,
    )


def member_counts(columns: Columns) -> MemberCounts:
    """What became of the tar's entries, from the arrays of an index file."""
    names = ("member_fates", "member_counts", "member_examples")
    if any(name not in columns for name in names):
        return MemberCounts()
    return from_arrays(*(columns[name].tolist() for name in names))


def downscaled_counts(columns: Columns) -> dict[str, int]:
    """Downscaled images by setting, from the arrays of an index file of either version."""
    if "presized_settings" not in columns:
        return {}
    settings, counts = columns["presized_settings"].tolist(), columns["presized_counts"].tolist()
    return dict(zip(settings, counts, strict=True))


def _decode_keys(stored: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    return np.char.decode(stored.astype(np.bytes_), "utf-8", "surrogateescape")


def read_columns(tar_path: str | Path, *, without: Collection[str]) -> Columns:
    """Arrays of a fresh index file by name, `format_version` checked and removed."""
    path = index_path(tar_path)
    size, digest = os.path.getsize(tar_path), tar_digest(tar_path)
    if not path.exists():
        raise MissingIndexError(
            f"{tar_path} has no index {path.name}: make it with `cmae shards index {tar_path}`"
        )
    return read_index_file(path, without=without, tar=str(tar_path), size=size, digest=digest)


def read_index_file(
    path: Path, *, without: Collection[str], tar: str, size: int | None, digest: str | None
) -> Columns:
    """Arrays of an index file that belongs to the tar of this size and digest (None: not compared).

    Raises:
        StaleIndexError: It belongs to another tar, or is unreadable.
    """
    repair = f"make it again with `cmae shards index {tar}`"
    try:
        columns = _read_archive(path, without)
    except OSError as error:
        raise StaleIndexError(f"{path} is damaged or no index; {repair}") from error
    version = columns.pop("format_version", np.empty(0))
    if version.shape or version not in (FORMAT_VERSION, DOWNSCALED_FORMAT_VERSION):
        raise StaleIndexError(
            f"{path} has format {version if version.size else None}, this version reads {FORMAT_VERSION} and "
            f"{DOWNSCALED_FORMAT_VERSION}; {repair}"
        )
    wanted = {name: dtype for name, dtype in COLUMNS.items() if name not in without}
    if fault := find_fault(columns, wanted):
        raise StaleIndexError(f"{path} is damaged or no index ({fault}); {repair}")
    for name, dtype in wanted.items():
        if name != "keys":
            columns[name] = columns[name].astype(dtype, copy=False)
    if size is not None and columns["tar_size"] != size:
        raise StaleIndexError(
            f"{path} was made for {columns['tar_size']} bytes, the tar has {size}; {repair}"
        )
    if digest is not None and columns["tar_digest"] != digest:
        raise StaleIndexError(f"{path} was made for other contents of the same size; {repair}")
    return columns


def _read_archive(path: Path, without: Collection[str]) -> Columns:
    """Arrays of an index file, by the names that they have here.

    Raises:
        OSError: It is not there, not readable, or no index.
    """
    names = {stored: name for name, stored in _STORED_AS.items()}
    return {names.get(name, name): array for name, array in read_arrays(path, without).items()}
