"""Make shards: a folder or archive of JPEGs becomes WebDataset tars, each with its index beside it.

A written folder holds

    train-000000.tar, train-000000.index.npz, ...   named after the folder
    classes.json    class names in the order of the labels (absent for unlabelled images)
    dataset.json    counts and settings; "complete" is false until the last shard is written
    SHA256SUMS      digest of every tar, for `sha256sum -c`
    skipped.jsonl   one line for each source file that is not a JPEG we can decode (absent if there is none)

JPEG bytes are copied; only `max_size` has large images encoded again, and those are labelled in each file,
in the index and in dataset.json. The same source and settings give the same bytes (with `max_size`: from the
same Pillow).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import PIL

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.dataset_folder import (
    CLASSES_FILE,
    DATASET_FILE,
    DIGESTS_FILE,
    SKIPPED_FILE,
)
from cmae.pipeline.formats.images.jpeg import BadImageError, JpegInfo, inspect_decodable
from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.pipeline.formats.members.member_counts import IMAGE, LABEL, MemberCounts, sum_members
from cmae.pipeline.formats.parallel import no_progress, run_threads
from cmae.pipeline.formats.presized import downscale_mark, sum_counts
from cmae.pipeline.formats.shard_index import (
    IndexRow,
    ShardIndex,
    index_path,
    index_row,
    load_index,
    save_index,
)
from cmae.pipeline.formats.shard_tar import ShardTar, padded
from cmae.pipeline.formats.tar import TAR_BLOCK, TarRecord
from cmae.pipeline.shards.originals.source import Archive, ImageSource, SourceImage
from cmae.pipeline.shards.output_folder import (
    check_space,
    claim_folder,
    is_finished,
    mark_begun,
    mark_complete,
    remove_leftovers,
    tidy_skipped,
    write_digests,
    write_json,
)
from cmae.pipeline.shards.presize import check_downscale, downscale_jpeg, needs_downscale


class WriteReport(NamedTuple):
    """Counts over the whole folder after `write_shards`."""

    num_shards: int
    num_already_written: int
    """Shards that an earlier run had finished."""
    num_samples: int
    num_skipped: int
    """Files left out; `skipped.jsonl` says which and why."""
    num_bytes: int
    """Size of all tars."""
    downscaled: dict[str, int]
    """Images that were encoded again, in this run or before, by setting."""
    files: MemberCounts
    """What became of every file of the source."""
    num_missing: int = 0
    """Shards that other parts have yet to write; while there are any, the counts are of this part alone."""


class Publisher(Protocol):
    """Somewhere else that gets a copy of the folder."""

    def put(self, path: Path) -> object:
        """Copy a complete file, unless it is there already; from any thread."""

    def close(self) -> None:
        """End copies that are under way with an error."""


class _Shard(NamedTuple):
    number: int
    path: Path
    images: Sequence[SourceImage]

    @property
    def num_bytes(self) -> int:
        return 20 * TAR_BLOCK + sum(_bytes_in_tar(image.num_bytes) for image in self.images)


def write_shards(
    source: ImageSource,
    out_dir: str | Path,
    *,
    samples_per_shard: int = 1000,
    max_shard_bytes: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    strict: bool = False,
    max_size: int | None = None,
    quality: int = 95,
    workers: int | None = None,
    num_parts: int = 1,
    part: int = 0,
    publisher: Publisher | None = None,
    progress: Callable[[int], None] = no_progress,
) -> WriteReport:
    """Copy the images into ustar shards `<folder>-000000.tar` and index them; can be stopped and run again.

    A shard has its name only when it is complete, and is finished when its index is there too. Running again
    with the same source and settings writes what is missing. Several machines that see the same source and
    folder may write a part each, in any order: the bytes do not depend on their number, and whichever ends
    last writes `dataset.json`.

    Args:
        source: Images of `scan_image_folder`, `scan_image_archive` or `read_image_list`.
        out_dir: A folder of its own; made if missing.
        samples_per_shard: Upper limit; samples are spread evenly over as few shards as it allows.
        max_shard_bytes: Upper limit on the tar's size, unless one image alone exceeds it.
        seed: Seed of the shuffle.
        shuffle: Mix the classes over all shards; otherwise shards follow the order of the source.
        strict: Raise at the first file that is no decodable JPEG, instead of skipping it.
        max_size: Downscale images whose shorter side exceeds this many pixels to it, where that makes the
            file smaller; None copies all files.
        quality: JPEG quality, 1..100, of the images that are downscaled.
        workers: Threads. They gain up to about 5000 images/s (the tar library's Python); disks are slower.
            Resizing gives up the interpreter lock: 20 ms of a core for each image that is downscaled.
        num_parts: Number of machines that write to the folder.
        part: This one among them, from 0. It writes each shard whose number leaves this remainder.
        publisher: Takes a copy of each file when it is complete: a shard before it counts as finished,
            dataset.json last.
        progress: Called with the number of images done since the last call, from any thread.

    Raises:
        CmaeError: The folder holds other shards, or ones from another source or other settings; a setting
            is out of range; `strict` and a bad file; a file that changed since the scan; no image left; not
            enough free space (checked before writing).
        OSError: A file or folder that cannot be read or written.
    """
    if samples_per_shard < 1 or (max_shard_bytes is not None and max_shard_bytes < 1):
        raise CmaeError(
            f"samples_per_shard={samples_per_shard} and max_shard_bytes={max_shard_bytes} must be at least 1"
        )
    if not 0 <= part < num_parts:
        raise CmaeError(
            f"part={part} of num_parts={num_parts}: parts are counted from 0 to num_parts - 1"
        )
    check_downscale(max_size, quality)
    out = expand_home(out_dir).absolute()
    settings = {
        "samples_per_shard": samples_per_shard,
        "max_shard_bytes": max_shard_bytes,
        "seed": seed,
        "shuffle": shuffle,
        "source": _source_digest(source),
        "max_size": max_size,
        "quality": None if max_size is None else quality,
    }
    claim_folder(out, settings)
    shards = list(_plan_shards(source.images, out, settings))
    own = shards[part::num_parts]
    finished = {shard.number for shard in own if is_finished(shard.path)}
    done = [shard for shard in own if shard.number in finished]
    todo = [shard for shard in own if shard.number not in finished]
    remove_leftovers(shard.path for shard in todo)
    check_space(out, sum(shard.num_bytes for shard in todo))
    progress(sum(len(shard.images) for shard in done))
    if todo or not (out / DATASET_FILE).exists():
        mark_begun(out, settings)
    if source.classes:
        write_json(out / CLASSES_FILE, list(source.classes))
    skipped = out / SKIPPED_FILE
    if num_parts > 1:  # several machines cannot append to one file
        skipped = skipped.with_name(f"{skipped.stem}.{part}-of-{num_parts}{skipped.suffix}")
    writer = _ShardWriter(
        skipped,
        settings,
        archive=source.archive,
        strict=strict,
        publisher=publisher,
        progress=progress,
    )
    run_threads(writer.publish, done, workers=workers, stop=writer.end_early)
    run_threads(writer.write, todo, workers=workers, stop=writer.end_early)
    num_already_written = len(done)
    others = (shard for shard in shards if shard.number % num_parts != part)
    if num_missing := sum(not is_finished(shard.path) for shard in others):
        return _report_part(own, skipped, num_already_written, num_missing)
    report = _finish(out, settings, shards, source, num_already_written=num_already_written)
    if publisher is not None:
        beside = (out / name for name in (CLASSES_FILE, SKIPPED_FILE, DIGESTS_FILE, DATASET_FILE))
        for path in (*(index_path(shard.path) for shard in shards), *filter(Path.exists, beside)):
            publisher.put(path)
    return report


def _report_part(
    own: Sequence[_Shard], skipped_path: Path, num_already_written: int, num_missing: int
) -> WriteReport:
    """Counts of one part, whose folder is not complete yet."""
    num_skipped = len(tidy_skipped(skipped_path))
    images = [image for shard in own for image in shard.images]
    files = MemberCounts()
    if images:
        files.add(IMAGE, images[0].path, len(images))
    return WriteReport(
        num_shards=len(own),
        num_already_written=num_already_written,
        num_samples=len(images) - num_skipped,
        num_skipped=num_skipped,
        num_bytes=sum(shard.path.stat().st_size for shard in own),
        downscaled=sum_counts(load_index(shard.path).downscaled for shard in own),
        files=files,
        num_missing=num_missing,
    )


class _ShardWriter:
    """What the writing threads share: the list of skipped files and the flag that ends them early."""

    def __init__(
        self,
        skipped_path: Path,
        settings: dict[str, Any],
        *,
        archive: Archive | None,
        strict: bool,
        publisher: Publisher | None,
        progress: Callable[[int], None],
    ) -> None:
        self.stop = threading.Event()
        self._archive = archive
        self._publisher = publisher
        self._skipped_path = skipped_path
        self._skipped_lock = threading.Lock()
        self._settings = settings
        self._strict = strict
        self._progress = progress

    def write(self, shard: _Shard) -> None:
        rows: list[IndexRow] = []
        marks: list[str] = []
        members = MemberCounts()
        skipped: list[dict[str, Any]] = []
        with atomic_write(shard.path) as file:
            tar = ShardTar(file)
            for image in shard.images:
                if self.stop.is_set():
                    raise InterruptedError(f"{shard.path.name} was stopped")
                try:
                    data, info = self._prepare(_read_source(image, self._archive))
                    rows.append(_add_to_tar(tar, image, data, info, members))
                    marks.append(downscale_mark(data))
                except BadImageError as error:
                    if self._strict:
                        raise CmaeError(f"{image.path}: {error} (strict=True)") from error
                    skipped.append(
                        {"shard": shard.number, "path": image.path, "reason": str(error)}
                    )
                self._progress(1)
            tar.end()
            # Before the shard takes its name: whatever stops us, no finished shard lacks its lines.
            self._append_skipped(skipped)
        index = ShardIndex.from_rows(
            rows,
            tar_path=shard.path,
            marks=marks,
            members=members,
            tar_sha256=tar.sha256.digest(),
        )
        self._put(shard.path)  # first: to the other parts, a shard with an index is finished
        save_index(index, index_path(shard.path))
        self._put(index_path(shard.path))

    def publish(self, shard: _Shard) -> None:
        """Publish a shard that an earlier run has finished."""
        self._put(shard.path)
        self._put(index_path(shard.path))

    def end_early(self) -> None:
        """Have all threads return soon."""
        self.stop.set()
        if self._publisher is not None:
            self._publisher.close()

    def _put(self, path: Path) -> None:
        if self._publisher is not None:
            self._publisher.put(path)

    def _prepare(self, data: bytes) -> tuple[bytes, JpegInfo]:
        """The bytes that go into the shard, and their header."""
        info = inspect_decodable(data)
        if not needs_downscale(info, self._settings["max_size"]):
            return data, info
        size, quality = self._settings["max_size"], self._settings["quality"]
        resized = downscale_jpeg(data, info, max_size=size, quality=quality)
        # A small step down from a file of low quality gains nothing.
        if len(resized) >= len(data):
            return data, info
        return resized, inspect_decodable(resized)

    def _append_skipped(self, skipped: list[dict[str, Any]]) -> None:
        if skipped:
            with self._skipped_lock, open(self._skipped_path, "a", encoding="ascii") as file:
                file.writelines(json.dumps(line) + "\n" for line in skipped)


def _read_source(image: SourceImage, archive: Archive | None) -> bytes:
    if archive is None:
        data = Path(image.path).read_bytes()
    else:
        data = archive.read(image.byte_offset, image.num_bytes)
    if len(data) != image.num_bytes:
        raise CmaeError(
            f"{image.path} had {image.num_bytes} bytes when it was listed and has {len(data)} now: "
            "run again when the source no longer changes"
        )
    return data


def _add_to_tar(
    tar: ShardTar, image: SourceImage, data: bytes, info: JpegInfo, members: MemberCounts
) -> IndexRow:
    if image.label != NO_LABEL:
        tar.add(f"{image.key}.cls", str(image.label).encode())
        members.add(LABEL, f"{image.key}.cls")
    offset = tar.add(f"{image.key}.jpg", data)
    members.add(IMAGE, f"{image.key}.jpg")
    return index_row(TarRecord(image.key, offset, data, image.label), info)


def _bytes_in_tar(num_bytes: int) -> int:
    return 3 * TAR_BLOCK + padded(num_bytes)  # two headers and the label


def _finish(
    out: Path,
    settings: dict[str, Any],
    shards: Sequence[_Shard],
    source: ImageSource,
    *,
    num_already_written: int,
) -> WriteReport:
    skipped = tidy_skipped(out / SKIPPED_FILE)
    num_skipped = len(skipped)
    indices = [load_index(shard.path) for shard in shards]
    if (there := sum(map(len, indices))) != len(source.images) - num_skipped:
        raise CmaeError(
            f"{out} holds {there} images, and {len(source.images)} were to be written without the "
            f"{num_skipped} of {SKIPPED_FILE}: remove the folder and write it again"
        )
    report = WriteReport(
        num_shards=len(shards),
        num_already_written=num_already_written,
        num_samples=len(source.images) - num_skipped,
        num_skipped=num_skipped,
        num_bytes=sum(shard.path.stat().st_size for shard in shards),
        downscaled=sum_counts(index.downscaled for index in indices),
        files=_account(source, skipped),
    )
    if not report.num_samples:
        raise CmaeError(
            f"none of the {num_skipped} files is a JPEG that can be decoded; {out / SKIPPED_FILE} says why"
        )
    facts = {
        "num_samples": report.num_samples,
        "num_shards": report.num_shards,
        "num_bytes": report.num_bytes,
        "num_classes": len(source.classes),
        "num_skipped": num_skipped,
        "presized": report.downscaled,
        "shards": f"{out.name}-{{000000..{len(shards) - 1:06d}}}.tar",
        "created_by": f"cmae {metadata.version('cmae')}, Pillow {PIL.__version__}",
    }
    write_digests(out, zip((shard.path for shard in shards), indices, strict=True))
    mark_complete(out, settings, facts)
    return report


def _account(source: ImageSource, skipped: Sequence[dict[str, Any]]) -> MemberCounts:
    """What became of every file: images that were skipped count by the reason, which ends at a colon."""
    files = sum_members([source.files])
    if not files.total:
        files.add(IMAGE, source.images[0].path, len(source.images))
    for line in skipped:
        files.move(IMAGE, f"skipped, {line['reason'].split(':')[0]}", 1, line["path"])
    return files


def _plan_shards(
    images: Sequence[SourceImage], out: Path, settings: dict[str, Any]
) -> Iterator[_Shard]:
    order = np.arange(len(images))
    if settings["shuffle"]:
        np.random.default_rng(settings["seed"]).shuffle(order)
    num_shards = -(-len(images) // settings["samples_per_shard"])
    count_limit = -(-len(images) // max(num_shards, 1))
    byte_limit = settings["max_shard_bytes"] or float("inf")
    chunk: list[SourceImage] = []
    number, size = 0, 0
    for image in (images[i] for i in order.tolist()):
        image_size = _bytes_in_tar(image.num_bytes)
        if chunk and (len(chunk) == count_limit or size + image_size > byte_limit):
            yield _Shard(number, out / f"{out.name}-{number:06d}.tar", chunk)
            chunk, number, size = [], number + 1, 0
        chunk.append(image)
        size += image_size
    if chunk:
        yield _Shard(number, out / f"{out.name}-{number:06d}.tar", chunk)


def _source_digest(source: ImageSource) -> str:
    """Hash of class names and of the images' keys, labels and sizes in order; the root plays no part."""
    digest = hashlib.sha256(json.dumps(source.classes).encode())
    for image in source.images:
        line = f"{image.key}\0{image.label}\0{image.num_bytes}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
