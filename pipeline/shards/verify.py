"""Check shards: read every byte and compare it with the index."""

from __future__ import annotations

import io
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cmae.pipeline.formats.dataset_folder import CLASSES_FILE, load_classes
from cmae.pipeline.formats.images.jpeg import (
    BadImageError,
    Decode,
    JpegInfo,
    JpegKind,
    build_cpu_decoder,
    inspect_decodable,
    lacks_adobe_marker,
)
from cmae.pipeline.formats.images.jpeg_scan import find_zero_block
from cmae.pipeline.formats.images.pixels import decode_jpeg
from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.pipeline.formats.members.member_counts import LOST_LABELS, MemberCounts, sum_members
from cmae.pipeline.formats.parallel import no_progress, run_threads
from cmae.pipeline.formats.presized import downscaled_line, sum_counts
from cmae.pipeline.formats.shard_index import (
    ShardIndex,
    StaleIndexError,
    build_index,
    index_record,
    load_index,
    load_index_unchecked,
)
from cmae.pipeline.formats.tar import TAR_BLOCK, TarError, TarRecord
from cmae.pipeline.shards.recover import salvage_records


class Problem(NamedTuple):
    """Something wrong with a shard; `key` is None where it is not about one sample."""

    shard: str
    key: str | None
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """Result of `verify_shards`."""

    num_shards: int
    num_samples: int
    num_bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    """Facts worth knowing that are no faults."""
    suspects: tuple[Problem, ...] = ()
    """Images with one sign of damage, which is no proof."""
    members: MemberCounts = field(default_factory=MemberCounts)
    """What became of every entry of the tars."""

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verify_shards(
    shards: Sequence[str | Path],
    *,
    decode: Decode = "none",
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
) -> VerifyReport:
    """Read every byte of every shard and compare it with its index.

    Checked: the tar's structure up to its end marker; that an index is there and belongs to it; every CRC32,
    offset, size and header; images that cannot be decoded, or lost a block; images and labels that no sample
    holds; keys that occur twice; labels that are missing for some of the samples, or beyond `classes.json`.
    What can be recovered from a damaged tar is checked like the rest.

    Args:
        shards: Local tar files.
        decode: Also decode every image fully, with Pillow or nvImageCodec on the CPU.
        workers: Threads.
        progress: Called with 1 after each shard.
    """
    paths = [str(shard) for shard in shards]
    checks = run_threads(
        lambda path: _verify_or_report(path, decode), paths, workers=workers, progress=progress
    )
    problems = [problem for check in checks for problem in check.problems]
    problems += _duplicate_keys(paths, [check.keys for check in checks])
    problems += _missing_labels(paths, checks)
    num_samples = sum(len(check.labels) for check in checks)
    return VerifyReport(
        num_shards=len(paths),
        num_samples=num_samples,
        num_bytes=sum(os.path.getsize(path) for path in paths if os.path.exists(path)),
        problems=tuple(problems),
        notes=tuple(_notes(checks, num_samples)),
        suspects=tuple(one for check in checks for one in check.suspects),
        members=sum_members(check.members for check in checks),
    )


def _missing_labels(paths: Sequence[str], checks: Sequence[_ShardCheck]) -> Iterator[Problem]:
    """Samples without a label, where others have one."""
    if _has_no_label(checks):
        return
    for path, check in zip(paths, checks, strict=True):
        if missing := int((check.labels == NO_LABEL).sum()):
            yield Problem(path, None, f"{missing} sample(s) have no integer label in .cls or .json")


def _has_no_label(checks: Sequence[_ShardCheck]) -> bool:
    return all((check.labels == NO_LABEL).all() for check in checks)


def _notes(checks: Sequence[_ShardCheck], num_samples: int) -> Iterator[str]:
    lost = sum_members(check.members for check in checks).lost
    unread = sum(lost.get(fate, 0) for fate in LOST_LABELS)
    if num_samples and _has_no_label(checks) and unread:
        yield f"no sample has a label that is read, though {unread} are there: see the problems"
    elif num_samples and _has_no_label(checks):
        yield "no sample has a label: enough for pretraining, not for evaluation"
    if empty := sum(check.records is not None and not len(check.records) for check in checks):
        yield f"{empty} shard(s) hold no sample"
    yield from _unusual([check.records for check in checks if check.records is not None])
    if plain := sum(check.num_plain_cmyk for check in checks):
        yield (
            f"{plain} CMYK image(s) without a marker of Adobe: 0 is taken as no ink; where they look like "
            "negatives, encode them again"
        )
    if line := downscaled_line(sum_counts(check.downscaled for check in checks), num_samples):
        yield line


def _unusual(indices: Sequence[ShardIndex]) -> Iterator[str]:
    """Images that are used, but not as somebody might expect."""

    def count(rare: Callable[[ShardIndex], npt.NDArray[np.bool_]]) -> int:
        return sum(int((rare(index) & index.valid).sum()) for index in indices)

    facts = {
        "grayscale image(s): decoded to RGB": count(lambda one: one.kind == JpegKind.GRAYSCALE),
        "CMYK image(s): decoded to RGB": count(lambda one: one.kind == JpegKind.CMYK),
        "image(s) with an EXIF turn: used as stored": count(lambda one: one.orientation != 1),
        "image(s) with a side below 16 px": count(
            lambda one: np.minimum(one.height, one.width) < 16
        ),
    }
    return (f"{number} {what}" for what, number in facts.items() if number)


class _ShardCheck(NamedTuple):
    problems: list[Problem]
    records: ShardIndex | None
    """Of the records that were found; None when the tar could not be read at all."""
    suspects: tuple[Problem, ...] = ()
    num_plain_cmyk: int = 0
    """CMYK images without a marker of Adobe."""

    @property
    def keys(self) -> npt.NDArray[np.str_]:
        return np.empty(0, np.str_) if self.records is None else self.records.keys

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.empty(0, np.int64) if self.records is None else self.records.label

    @property
    def downscaled(self) -> dict[str, int]:
        return {} if self.records is None else self.records.downscaled

    @property
    def members(self) -> MemberCounts:
        return MemberCounts() if self.records is None else self.records.members


def _verify_or_report(path: str, decode: Decode) -> _ShardCheck:
    """Check a shard; whatever trips the check is about this shard, and the others have their results."""
    try:
        return _verify_shard(path, decode)
    except Exception as error:
        what = f"cannot be checked: {type(error).__name__}: {error}"
        return _ShardCheck([Problem(path, None, what)], None)


def _verify_shard(path: str, decode: Decode) -> _ShardCheck:
    found: list[tuple[str | None, str]] = []
    stored: ShardIndex | None = None
    try:
        stored = load_index(path)
    except (FileNotFoundError, StaleIndexError) as error:
        found.append((None, str(error)))
    try:
        now = build_index(path)
        if not has_end_marker(path):
            what = "no end marker (1024 zero bytes): the tar may have been cut between two members"
            found.append((None, what))
    except TarError as error:
        now = _salvage(path)
        found.append((None, f"{str(error).removeprefix(f'{path}: ')}; {_recoverable(len(now))}"))
    except OSError as error:
        return _ShardCheck([Problem(path, None, str(error))], None)
    found += [(None, line) for line in now.members.lost_lines() if not line.startswith("damaged")]
    if stored is not None:
        found += _differences(stored, now)
    elif (before := load_index_unchecked(path)) is not None:
        found += _changed_since(before, now)
    images = _check_images(path, now, decode)
    found += images.unusable
    num_classes = 0
    try:
        num_classes = len(load_classes(Path(path).parent) or ())
    except ValueError as error:
        found.append((None, str(error)))
    if num_classes and (too_large := int((now.label >= num_classes).sum())):
        what = f"{too_large} label(s) are beyond the {num_classes} names in {CLASSES_FILE}"
        found.append((None, what))
    return _ShardCheck(
        [Problem(path, key, what) for key, what in found],
        now,
        suspects=tuple(Problem(path, key, what) for key, what in images.suspect),
        num_plain_cmyk=images.num_plain_cmyk,
    )


def _recoverable(num_records: int) -> str:
    if not num_records:
        return "no record can be recovered: write the shard again"
    return f"{num_records} record(s) can be recovered (`cmae shards repair`)"


def _salvage(path: str) -> ShardIndex:
    """Index of the records that are left in a damaged tar."""
    members = MemberCounts()
    rows = [index_record(record) for record in salvage_records(path, counts=members)]
    return ShardIndex.from_rows(rows, tar_path=path, members=members)


def has_end_marker(path: str) -> bool:
    """Whether the file ends with the two zero blocks of a tar."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 2 * TAR_BLOCK:
            return False
        file.seek(-2 * TAR_BLOCK, os.SEEK_END)
        return not any(file.read())


def _differences(stored: ShardIndex, now: ShardIndex) -> Iterator[tuple[str | None, str]]:
    """What an index says that is not so, although size and digest of the tar are the same."""
    if len(stored) != len(now) or not np.array_equal(stored.byte_offset, now.byte_offset):
        yield (
            None,
            f"the index lists {len(stored)} samples elsewhere than the {len(now)} in the tar; index it again",
        )
        return
    if stored.downscaled != now.downscaled:
        yield (
            None,
            f"downscaled images are {now.downscaled or 'none'}, the index says {stored.downscaled or 'none'}",
        )
    if stored.members.total and stored.members.counts != now.members.counts:
        yield (
            None,
            f"the index counts {stored.members.line()}; now {now.members.line()}; index it again",
        )
    changed = stored.crc32 != now.crc32
    for row in np.flatnonzero(changed):
        yield (
            str(now.keys[row]),
            f"damaged: CRC32 {now.crc32[row]:08x}, the index says {stored.crc32[row]:08x}",
        )
    for name in ("keys", "size", "height", "width", "kind", "orientation", "label"):
        for row in np.flatnonzero((getattr(stored, name) != getattr(now, name)) & ~changed):
            yield (
                str(now.keys[row]),
                f"{name} is {getattr(now, name)[row]}, the index says {getattr(stored, name)[row]}",
            )


def _changed_since(before: ShardIndex, now: ShardIndex) -> Iterator[tuple[str | None, str]]:
    """Records that lie where a stale index says, at the size that it says, and have other bytes."""
    _, old, new = np.intersect1d(before.byte_offset, now.byte_offset, return_indices=True)
    same_place = (before.keys[old] == now.keys[new]) & (before.size[old] == now.size[new])
    for i in np.flatnonzero(same_place & (before.crc32[old] != now.crc32[new])):
        crc, crc_before = now.crc32[new[i]], before.crc32[old[i]]
        yield (
            str(now.keys[new[i]]),
            f"damaged: CRC32 {crc:08x}, the index of the tar before it changed says {crc_before:08x}",
        )


class IndexedBytes:
    """What an index, stale or not, still says about records that lie where it says."""

    def __init__(self, index: ShardIndex | None) -> None:
        self._index = index
        self._rows = {} if index is None else {int(at): i for i, at in enumerate(index.byte_offset)}

    def check(self, record: TarRecord) -> None:
        """Compare a record with its CRC32.

        Raises:
            BadImageError: Its bytes are not those that were indexed.
        """
        row = self._row(record)
        if self._index is None or row is None:
            return
        if zlib.crc32(record.image) != self._index.crc32[row]:
            raise BadImageError("the CRC32 differs from the index: bits of the file have changed")

    def label(self, record: TarRecord) -> int:
        """The label that the record had when it was indexed."""
        row = self._row(record)
        return NO_LABEL if self._index is None or row is None else int(self._index.label[row])

    def _row(self, record: TarRecord) -> int | None:
        row = self._rows.get(record.byte_offset)
        if self._index is None or row is None:
            return None
        is_same = self._index.keys[row] == record.key and self._index.size[row] == len(record.image)
        return row if is_same else None


def check_image(image: bytes, decode: Decode) -> str:
    """Look at an image as closely as `verify_shards` does.

    Returns:
        A sign of damage that is no proof; '' where there is none.

    Raises:
        BadImageError: It cannot be used, or a block of its compressed pixels was lost.
    """
    info = inspect_decodable(image)
    zeros = find_zero_block(image)
    if zeros is not None and zeros.fault:
        raise BadImageError(str(zeros))
    if decode != "none":
        _decode_fully(image, info, decode)
    return "" if zeros is None else str(zeros)


class _Images(NamedTuple):
    """What `_check_images` found, by key."""

    unusable: list[tuple[str | None, str]]
    suspect: list[tuple[str | None, str]]
    num_plain_cmyk: int


def _check_images(path: str, index: ShardIndex, decode: Decode) -> _Images:
    unusable: list[tuple[str | None, str]] = []
    suspect: list[tuple[str | None, str]] = []
    num_plain_cmyk = 0
    with open(path, "rb") as file:
        for row in range(len(index)):
            image, key = _read_image(file, index, row), str(index.keys[row])
            try:
                if suspicion := check_image(image, decode):
                    suspect.append((key, suspicion))
                num_plain_cmyk += index.kind[row] == JpegKind.CMYK and lacks_adobe_marker(image)
            except BadImageError as error:
                unusable.append((key, str(error)))
    return _Images(unusable, suspect, int(num_plain_cmyk))


def _read_image(file: io.BufferedReader, index: ShardIndex, row: int) -> bytes:
    return os.pread(file.fileno(), int(index.size[row]), int(index.byte_offset[row]))


def _decode_fully(data: bytes, info: JpegInfo, decode: Decode) -> None:
    """Decode all pixels.

    Raises:
        BadImageError: The decoder fails, or gives another size than the header states.
    """
    if decode == "pil":
        width, height = decode_jpeg(data).size
    else:
        height, width = _decode_with_nvimgcodec(data)
    if (height, width) != (info.height, info.width):
        raise BadImageError(
            f"decodes to {width} x {height}, the header says {info.width} x {info.height}"
        )


_thread_local = threading.local()


def _decode_with_nvimgcodec(data: bytes) -> tuple[int, int]:
    """Height and width of the decoded image."""
    import nvidia.nvimgcodec as nvimgcodec  # here, so that only those who ask for it need it

    if not hasattr(_thread_local, "decoder"):  # one a thread: they are slow to make
        _thread_local.decoder = build_cpu_decoder()
    upright = nvimgcodec.DecodeParams(apply_exif_orientation=False)
    try:
        decoded = _thread_local.decoder.decode(data, params=upright)
    except RuntimeError as error:
        raise BadImageError(f"nvImageCodec cannot read it: {error}") from error
    if decoded is None:
        raise BadImageError("nvImageCodec cannot decode it")
    height, width = decoded.shape[:2]
    return height, width


def _duplicate_keys(
    paths: Sequence[str], keys: Sequence[npt.NDArray[np.str_]]
) -> Iterator[Problem]:
    """One problem for each pair of shards that have keys in common (a shard may pair with itself)."""
    flat = np.concatenate([np.empty(0, np.str_), *keys])
    shard = np.repeat(np.arange(len(keys)), [len(one) for one in keys])
    order = np.argsort(flat, kind="stable")
    again = np.flatnonzero(flat[order][1:] == flat[order][:-1])
    pairs: dict[tuple[int, int], list[str]] = {}
    for i in again:
        pairs.setdefault((shard[order[i]], shard[order[i + 1]]), []).append(str(flat[order[i]]))
    for (first, second), common in pairs.items():
        where = "more than once" if first == second else f"also in {Path(paths[first]).name}"
        yield Problem(
            paths[second], None, f"{len(common)} key(s) occur {where}, such as {common[0]}"
        )
