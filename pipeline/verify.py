"""Check shards: read every byte and compare it with the index."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from cmae.pipeline.index import ShardIndex, StaleIndexError, build_index, load_index
from cmae.pipeline.jpeg import BadImageError, JpegInfo
from cmae.pipeline.presize import presized_line, sum_counts
from cmae.pipeline.shards import CLASSES_FILE, inspect_decodable
from cmae.pipeline.survey import load_classes
from cmae.pipeline.tar import NO_LABEL, TAR_BLOCK, TarError
from cmae.pipeline.threads import no_progress, run_threads


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

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


Decode = Literal["none", "pil", "nvimgcodec"]


def verify_shards(
    shards: Sequence[str | Path],
    *,
    decode: Decode = "none",
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
) -> VerifyReport:
    """Read every byte of every shard and compare it with its index.

    Checked: the tar's structure up to its end marker; that an index is there and belongs to it; every CRC32,
    offset, size and header; images that cannot be decoded; keys that occur twice; labels that are missing
    for some of the samples, or beyond `classes.json`.

    Args:
        shards: Local tar files.
        decode: Also decode every image fully, with Pillow or nvImageCodec on the CPU.
        workers: Threads.
        progress: Called with 1 after each shard.
    """
    paths = [str(shard) for shard in shards]
    checks = run_threads(
        lambda path: _verify_shard(path, decode), paths, workers=workers, progress=progress
    )
    problems = [problem for check in checks for problem in check.problems]
    problems += _duplicate_keys(paths, [check.keys for check in checks])
    labels = np.concatenate([check.labels for check in checks]) if checks else np.empty(0, np.int64)
    notes = []
    if len(labels) and (labels == NO_LABEL).all():
        notes.append("no sample has a label: enough for pretraining, not for evaluation")
    else:
        problems += [
            Problem(path, None, f"{missing} sample(s) have no integer label in .cls or .json")
            for path, check in zip(paths, checks, strict=True)
            if (missing := int((check.labels == NO_LABEL).sum()))
        ]
    if line := presized_line(sum_counts(check.presized for check in checks), len(labels)):
        notes.append(line)
    return VerifyReport(
        num_shards=len(paths),
        num_samples=len(labels),
        num_bytes=sum(os.path.getsize(path) for path in paths if os.path.exists(path)),
        problems=tuple(problems),
        notes=tuple(notes),
    )


class _ShardCheck(NamedTuple):
    problems: list[Problem]
    keys: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int64]
    presized: dict[str, int]


def _verify_shard(path: str, decode: Decode) -> _ShardCheck:
    found: list[tuple[str | None, str]] = []
    stored: ShardIndex | None = None
    try:
        stored = load_index(path)
    except (FileNotFoundError, StaleIndexError) as error:
        found.append((None, str(error)))
    try:
        now = build_index(path)
    except (TarError, OSError) as error:
        message = str(error).removeprefix(f"{path}: ")
        return _ShardCheck(
            [Problem(path, None, message)], np.empty(0, np.str_), np.empty(0, np.int64), {}
        )
    if not _has_end_marker(path):
        found.append(
            (None, "no end marker (1024 zero bytes): the tar may have been cut between two members")
        )
    if stored is not None:
        found += _differences(stored, now)
    found += _unusable(path, now, decode)
    num_classes = len(load_classes(Path(path).parent) or ())
    if num_classes and (too_large := int((now.label >= num_classes).sum())):
        found.append(
            (None, f"{too_large} label(s) are beyond the {num_classes} names in {CLASSES_FILE}")
        )
    problems = [Problem(path, key, what) for key, what in found]
    return _ShardCheck(problems, now.keys, now.label, now.presized)


def _has_end_marker(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(-2 * TAR_BLOCK, os.SEEK_END)
        return not any(file.read())


def _differences(stored: ShardIndex, now: ShardIndex) -> Iterator[tuple[str | None, str]]:
    """What an index says that is not so, although size and digest of the tar are the same."""
    if len(stored) != len(now) or not np.array_equal(stored.offset, now.offset):
        yield (
            None,
            f"the index lists {len(stored)} samples elsewhere than the {len(now)} in the tar; index it again",
        )
        return
    if stored.presized != now.presized:
        yield (
            None,
            f"pre-resized images are {now.presized or 'none'}, the index says {stored.presized or 'none'}",
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


def _unusable(path: str, index: ShardIndex, decode: Decode) -> Iterator[tuple[str | None, str]]:
    with open(path, "rb") as file:
        for row, valid in enumerate(index.valid):
            if valid and decode == "none":
                continue
            data = _read_image(file, index, row)
            try:
                info = inspect_decodable(data)
                if decode != "none":
                    _decode_fully(data, info, decode)
            except BadImageError as error:
                yield str(index.keys[row]), str(error)


def _read_image(file: io.BufferedReader, index: ShardIndex, row: int) -> bytes:
    return os.pread(file.fileno(), int(index.size[row]), int(index.offset[row]))


def _decode_fully(data: bytes, info: JpegInfo, decode: Decode) -> None:
    """Decode all pixels.

    Raises:
        BadImageError: The decoder fails, or gives another size than the header states.
    """
    if decode == "pil":
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.convert("RGB").size
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImageError(f"Pillow cannot decode it: {error}") from error
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
        _thread_local.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        )
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
