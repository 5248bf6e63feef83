"""Index of many shards: make the index of each, and join them to one sequence of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cmae.errors import CmaeError
from cmae.pipeline.formats.images.jpeg import JpegKind
from cmae.pipeline.formats.index_file import Columns
from cmae.pipeline.formats.members.member_counts import MemberCounts
from cmae.pipeline.formats.parallel import no_progress, run_threads
from cmae.pipeline.formats.presized import sum_counts
from cmae.pipeline.formats.shard_index import (
    COLUMNS,
    ShardIndex,
    StaleIndexError,
    build_index,
    downscaled_counts,
    index_path,
    is_decodable,
    load_index,
    member_counts,
    read_columns,
    read_keys,
    save_index,
)


class IndexResult(NamedTuple):
    """What became of one shard in `build_indices`; `error` is None when it has a fresh index now."""

    path: str
    num_samples: int
    num_bad: int
    built: bool
    error: str | None
    members: MemberCounts = MemberCounts()
    """What became of every entry of the tar; not to be changed."""


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
        # Whatever trips over one shard, the others get their index.
        except Exception as error:
            return IndexResult(path, 0, 0, built=False, error=error_line(path, error))
        return index_result(path, index, built=built)

    return run_threads(ensure, tar_paths, workers=workers, progress=progress)


def index_result(path: str, index: ShardIndex, *, built: bool) -> IndexResult:
    """The result of a shard that has an index."""
    num_bad = int((~index.valid).sum())
    return IndexResult(path, len(index), num_bad, built=built, error=None, members=index.members)


def error_line(path: str, error: Exception) -> str:
    """An error that names its shard."""
    if isinstance(error, ValueError | OSError) and str(error):
        return str(error)
    return f"{path}: {type(error).__name__}: {error}"


def _load_if_fresh(tar_path: str) -> ShardIndex | None:
    try:
        return load_index(tar_path)
    except (StaleIndexError, FileNotFoundError):
        return None


class Place(NamedTuple):
    """Where the bytes of one record lie."""

    shard: int
    """Number of the shard in the data set."""
    byte_offset: int
    size: int
    """Bytes of the record's image."""


class LeftOut(NamedTuple):
    """A record that no epoch takes; `kind` is why."""

    shard: int
    record_number: int
    kind: JpegKind


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """The decodable images of many shards as one sequence of n samples, 42 bytes each.

    A `dataset_row` 0..n-1 counts valid samples, shard after shard. A `record_number` counts the records of
    one shard, bad ones included, and with the shard number makes the sample id: it does not change when
    another image of the shard is found to be bad.
    """

    paths: tuple[str, ...]
    """Tar path of every shard."""
    shard_sizes: npt.NDArray[np.int64]
    """(shards,) Valid samples in each."""
    digest: str
    """16 hex digits over sizes, offsets, CRCs and kinds of all shards in order; not over their paths."""
    left_out: tuple[LeftOut, ...]
    """Records that are in no epoch because their image cannot be decoded."""
    downscaled: dict[str, int]
    """Images re-encoded by `cmae shards write --max-size`, by setting; empty where all are original files."""
    tar_digests: tuple[str, ...]
    """`tar_digest` of every shard as it was when it was indexed."""
    record_number: npt.NDArray[np.int32]
    """(n,) Record number in its shard."""
    byte_offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    height: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    kind: npt.NDArray[np.uint8]
    orientation: npt.NDArray[np.uint8]
    crc32: npt.NDArray[np.uint32]
    label: npt.NDArray[np.int64]
    index_files: tuple[str, ...]
    """Index file of every shard."""
    members: tuple[MemberCounts, ...] = ()
    """What became of the entries of every tar."""

    def __len__(self) -> int:
        return len(self.byte_offset)

    @property
    def num_bad(self) -> int:
        """How many records are left out."""
        return len(self.left_out)

    @classmethod
    def load(cls, shard_paths: Sequence[str | Path], *, workers: int | None = None) -> DatasetIndex:
        """Load and check the indices of all shards, in the order given.

        Raises:
            FileNotFoundError: A shard has no index.
            StaleIndexError: An index does not belong to its tar.
            CmaeError: No shards, or no valid sample in them.
        """
        if not shard_paths:
            raise CmaeError("shard_paths is empty: name at least one tar file")
        paths = tuple(map(str, shard_paths))
        shards = run_threads(
            lambda path: read_columns(path, without=["keys"]), paths, workers=workers
        )
        return cls.join(paths, shards, index_files=[index_path(path) for path in paths])

    @classmethod
    def join(
        cls, paths: Sequence[str], shards: Sequence[Columns], *, index_files: Sequence[Path]
    ) -> DatasetIndex:
        """Join the columns of shards, whose tars may lie anywhere, and their index files on a disk.

        Raises:
            CmaeError: No valid sample in them.
        """
        digest = hashlib.sha256()
        for shard in shards:
            for name in ("tar_size", "byte_offset", "crc32", "kind"):
                digest.update(np.ascontiguousarray(shard[name]).tobytes())
        valid = [np.flatnonzero(is_decodable(shard["kind"])).astype(np.int32) for shard in shards]
        columns = {
            name: np.concatenate(
                [shard[name][rows] for shard, rows in zip(shards, valid, strict=True)]
            )
            for name in COLUMNS
            if name != "keys"
        }
        left_out = tuple(
            LeftOut(number, int(row), JpegKind(shard["kind"][row]))
            for number, shard in enumerate(shards)
            for row in np.flatnonzero(~is_decodable(shard["kind"]))
        )
        sizes = np.asarray([len(rows) for rows in valid], np.int64)
        if not sizes.sum():
            raise CmaeError(
                f"none of the {len(left_out)} records in {len(paths)} shards is a JPEG that can be decoded"
            )
        return cls(
            paths=tuple(paths),
            shard_sizes=sizes,
            digest=digest.hexdigest()[:16],
            left_out=left_out,
            downscaled=sum_counts(downscaled_counts(shard) for shard in shards),
            record_number=np.concatenate(valid),
            index_files=tuple(map(str, index_files)),
            tar_digests=tuple(str(shard["tar_digest"]) for shard in shards),
            members=tuple(map(member_counts, shards)),
            **columns,
        )

    def locate(
        self, dataset_row: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shard and record number of one or many rows (same shape)."""
        rows = np.asarray(dataset_row, np.int64)
        shard = np.searchsorted(np.cumsum(self.shard_sizes), rows, side="right")
        return shard, self.record_number[rows].astype(np.int64)

    def sample_id(self, dataset_row: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Sample ids (shard number << 32) | record number of one or many rows (same shape)."""
        shard, record_number = self.locate(dataset_row)
        return np.asarray(shard << 32 | record_number, np.int64)

    def key(self, shard: int, record_number: int) -> str:
        """WebDataset key of a record; '' when the index file is gone.

        The keys of a shard are read when first asked for, and then the tar may be damaged or gone: that is
        often why somebody asks.
        """
        try:
            return str(_shard_keys(self.index_files[shard])[record_number])
        except (OSError, IndexError):
            return ""


@lru_cache(maxsize=16)
def _shard_keys(index_file: str) -> npt.NDArray[np.str_]:
    return read_keys(index_file)
