"""Make, check and look at shards: a folder of JPEGs becomes WebDataset tars, each with its index beside it.

A written folder holds

    train-000000.tar, train-000000.index.npz, ...   named after the folder
    classes.json    class names in the order of the labels (absent for unlabelled images)
    dataset.json    counts and settings; "complete" is false until the last shard is written
    skipped.jsonl   one line for each source file that is not a JPEG we can decode (absent if there is none)

JPEG bytes are copied, never encoded again. The same source and settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps
from webdataset.writer import TarWriter

from cmae.pipeline.index import (
    NO_LABEL,
    DatasetIndex,
    IndexRow,
    ShardIndex,
    StaleIndexError,
    TarError,
    TarRecord,
    atomic_write,
    build_index,
    index_path,
    index_row,
    load_index,
    no_progress,
    run_threads,
    save_index,
)
from cmae.pipeline.jpeg import BadImageError, JpegInfo, JpegKind, inspect_jpeg

CLASSES_FILE = "classes.json"
DATASET_FILE = "dataset.json"
SKIPPED_FILE = "skipped.jsonl"

_JPEG_SUFFIXES = frozenset({".jpg", ".jpeg"})
_OTHER_IMAGE_SUFFIXES = frozenset(
    {".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})
_TAR_BLOCK = 512
_MAX_KEY_BYTES = 90  # leaves room for an extension in the 100 bytes of a ustar name


# --- sources --------------------------------------------------------------------------------------


class SourceImage(NamedTuple):
    """A file to be written: its WebDataset key, its class (-1: none) and its size in bytes."""

    path: str
    key: str
    label: int
    num_bytes: int


@dataclass(frozen=True)
class ImageSource:
    """What `write_shards` writes."""

    images: tuple[SourceImage, ...]
    """In a fixed order: by class and path, or as in the list file."""
    classes: tuple[str, ...]
    """Name of each label; empty if there are none or they are not known."""
    num_ignored: int
    """Files passed over because their name is not that of an image."""


def scan_image_folder(root: str | Path) -> ImageSource:
    """Find the images below `root`, one folder a class, labels as torchvision's ImageFolder gives them.

    Class folders are sorted by name and searched to any depth; hidden ones are passed over. A folder with
    images and no folders in it is a set without labels. Files named as images of other formats are
    included: the writer reports them.

    Raises:
        ValueError: The folder is missing, holds no JPEGs or only splits, or a class has no images.
    """
    top = Path(root).expanduser()
    if not top.is_dir():
        raise ValueError(_no_folder(top))
    classes = sorted(e.name for e in os.scandir(top) if e.is_dir() and not e.name.startswith("."))
    if classes and _SPLIT_NAMES.issuperset(classes):
        raise ValueError(
            f"images={str(top)!r} holds splits ({', '.join(classes)}), not classes: give one of them, "
            f"such as {top / classes[0]}, and write each split to a folder of its own"
        )
    folders = [top / name for name in classes] or [top]
    found = run_threads(_files_below, folders)
    suffixes = Counter(Path(path).suffix.lower() for files in found for path, _ in files)
    if not any(suffixes[suffix] for suffix in _JPEG_SUFFIXES):
        raise ValueError(_no_jpegs(top, suffixes))
    images: list[tuple[str, int, int]] = []
    for number, files in enumerate(found):
        label = number if classes else NO_LABEL
        images += [(path, label, size) for path, size in files if _is_image(path)]
    with_images = {label for _, label, _ in images}
    empty = [name for label, name in enumerate(classes) if label not in with_images]
    if empty:
        raise ValueError(
            f"images={str(top)!r}: {len(empty)} of {len(classes)} class folders hold no image, for example "
            f"{empty[0]}. Labels are positions among the folders: fill or remove these first"
        )
    return ImageSource(_with_keys(images, top), tuple(classes), suffixes.total() - len(images))


def read_image_list(list_file: str | Path, *, root: str | Path) -> ImageSource:
    """Read lines `path<TAB or space>label`; relative paths start at `root`, label -1 means none.

    Raises:
        ValueError: A line has no integer label, files are missing, or the list is empty.
    """
    images: list[tuple[str, int]] = []
    for number, line in enumerate(Path(list_file).read_text().splitlines(), start=1):
        if not line.strip():
            continue
        parts = line.rsplit("\t" if "\t" in line else None, 1)
        try:
            label = int(parts[1])
        except (IndexError, ValueError):
            label = NO_LABEL - 1
        if label < NO_LABEL:
            raise ValueError(
                f"{list_file}, line {number}: {line!r} is not `path<TAB>label` with an integer label >= 0 "
                "(or -1 for none)"
            )
        images.append((os.path.join(root, parts[0].strip()), label))
    chunks = [images[start : start + 1000] for start in range(0, len(images), 1000)]
    sizes = [size for chunk in run_threads(_sizes, chunks) for size in chunk]
    missing = [path for (path, _), size in zip(images, sizes, strict=True) if size is None]
    if missing or not images:
        raise ValueError(
            f"{list_file}: {len(missing)} of {len(images)} files are missing"
            + (f", for example {missing[0]}; relative paths start at {root}" if missing else "")
        )
    sized = [(path, label, size or 0) for (path, label), size in zip(images, sizes, strict=True)]
    return ImageSource(_with_keys(sized, Path(root)), classes=(), num_ignored=0)


def _files_below(folder: Path) -> list[tuple[str, int]]:
    """(path, bytes) of all files below a folder, sorted by folder and name."""
    files: list[tuple[str, int]] = []
    for parent, folders, _ in os.walk(folder, followlinks=True):
        folders.sort()
        with os.scandir(parent) as entries:
            found = [
                (e.path, e.stat().st_size) for e in entries if e.is_file() and e.name[0] != "."
            ]
        files += sorted(found)
    return files


def _sizes(images: Sequence[tuple[str, int]]) -> list[int | None]:
    """Bytes of each file; None where it is missing."""
    return [os.path.getsize(path) if os.path.isfile(path) else None for path, _ in images]


def _is_image(path: str) -> bool:
    return Path(path).suffix.lower() in _JPEG_SUFFIXES | _OTHER_IMAGE_SUFFIXES


def _with_keys(images: list[tuple[str, int, int]], root: Path) -> tuple[SourceImage, ...]:
    """Give each image a WebDataset key: its path below the root, without suffix, unique among all."""
    prefix = str(root) + os.sep
    taken: Counter[str] = Counter()
    keyed = []
    for path, label, size in images:
        folder, name = os.path.split(path.removeprefix(prefix).lstrip("/"))
        # WebDataset ends the key at the first dot of the file name and skips names like __this__.
        key = os.path.join(folder, os.path.splitext(name)[0].replace(".", "_"))
        if key.startswith("__"):
            key = "x" + key
        encoded = key.encode(errors="surrogateescape")
        if len(encoded) > _MAX_KEY_BYTES:
            key = hashlib.sha256(encoded).hexdigest()[:32]
        taken[key] += 1
        if taken[key] > 1:
            key = f"{key}_{taken[key]}"
            taken[key] += 1
        keyed.append(SourceImage(path, key, label, size))
    return tuple(keyed)


def _no_folder(top: Path) -> str:
    if top.is_file():
        return f"images={str(top)!r} is a file: give a folder of images (unpack archives first)"
    existing = next(parent for parent in top.absolute().parents if parent.is_dir())
    return f"images={str(top)!r} does not exist; {existing} is the last part that does"


def _no_jpegs(top: Path, suffixes: Counter[str]) -> str:
    found = ", ".join(
        f"{count} {suffix or 'without suffix'}" for suffix, count in suffixes.most_common(5)
    )
    start = f"images={str(top)!r} holds no .jpg or .jpeg files; found {found or 'nothing'}. "
    if suffixes[".tar"]:
        return start + "Tar files with JPEGs in them may already be shards: try `cmae shards index`"
    if any(suffixes[suffix] for suffix in _OTHER_IMAGE_SUFFIXES):
        return (
            start
            + "The loader reads JPEG only: convert the images, for example with `mogrify -format jpg`"
        )
    return start + "Give the folder that holds one folder of images for each class"


# --- writing --------------------------------------------------------------------------------------


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


class _Shard(NamedTuple):
    number: int
    path: Path
    images: Sequence[SourceImage]

    @property
    def num_bytes(self) -> int:
        return 20 * _TAR_BLOCK + sum(_bytes_in_tar(image.num_bytes) for image in self.images)


def write_shards(
    source: ImageSource,
    out_dir: str | Path,
    *,
    samples_per_shard: int = 1000,
    max_shard_bytes: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    strict: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
) -> WriteReport:
    """Copy the images into ustar shards `<folder>-000000.tar` and index them; can be stopped and run again.

    A shard has its name only when it is complete, and is finished when its index is there too. Running again
    with the same source and settings writes what is missing.

    Args:
        source: From `scan_image_folder` or `read_image_list`.
        out_dir: A folder of its own; made if missing.
        samples_per_shard: Upper limit; samples are spread evenly over as few shards as it allows.
        max_shard_bytes: Upper limit on the tar's size, unless one image alone exceeds it.
        seed: Of the shuffle.
        shuffle: Mix the classes over all shards; otherwise shards follow the order of the source.
        strict: Raise at the first file that is no decodable JPEG, instead of skipping it.
        workers: Threads. They gain up to about 5000 images/s (the tar library's Python); disks are slower.
        progress: Called with the number of images done since the last call, from any thread.

    Raises:
        ValueError: The folder holds other shards, or ones from another source or other settings; a setting
            is out of range; `strict` and a bad file; a file that changed since the scan; no image left; not
            enough free space (checked before writing).
        OSError: A file or folder that cannot be read or written.
    """
    if samples_per_shard < 1 or (max_shard_bytes is not None and max_shard_bytes < 1):
        raise ValueError(
            f"samples_per_shard={samples_per_shard} and max_shard_bytes={max_shard_bytes} must be at least 1"
        )
    out = Path(out_dir).expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "samples_per_shard": samples_per_shard,
        "max_shard_bytes": max_shard_bytes,
        "seed": seed,
        "shuffle": shuffle,
        "source": _source_digest(source),
    }
    _claim_folder(out, settings)
    shards = list(_plan_shards(source.images, out, settings))
    todo = [shard for shard in shards if not _is_finished(shard.path)]
    _check_space(out, sum(shard.num_bytes for shard in todo))
    progress(len(source.images) - sum(len(shard.images) for shard in todo))
    _write_json(out / DATASET_FILE, {"complete": False, "settings": settings})
    if source.classes:
        _write_json(out / CLASSES_FILE, list(source.classes))
    writer = _ShardWriter(out / SKIPPED_FILE, strict=strict, progress=progress)
    run_threads(writer.write, todo, workers=workers, stop=writer.stop)
    return _finish(out, settings, shards, source, num_already_written=len(shards) - len(todo))


class _ShardWriter:
    """What the writing threads share: the list of skipped files and the flag that ends them early."""

    def __init__(
        self, skipped_path: Path, *, strict: bool, progress: Callable[[int], None]
    ) -> None:
        self.stop = threading.Event()
        self._skipped_path = skipped_path
        self._skipped_lock = threading.Lock()
        self._strict = strict
        self._progress = progress

    def write(self, shard: _Shard) -> None:
        rows: list[IndexRow] = []
        skipped: list[dict[str, Any]] = []
        with atomic_write(shard.path) as file:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                for image in shard.images:
                    if self.stop.is_set():
                        raise InterruptedError(f"{shard.path.name} was stopped")
                    data = _read_source(image)
                    try:
                        info = _inspect_decodable(data)
                        rows.append(_add_to_tar(tar, image, data, info))
                    except BadImageError as error:
                        if self._strict:
                            raise ValueError(f"{image.path}: {error} (strict=True)") from error
                        skipped.append(
                            {"shard": shard.number, "path": image.path, "reason": str(error)}
                        )
                    self._progress(1)
            # Before the shard takes its name: whatever stops us, no finished shard lacks its lines.
            self._append_skipped(skipped)
        save_index(ShardIndex.from_rows(rows, tar_path=shard.path), index_path(shard.path))

    def _append_skipped(self, skipped: list[dict[str, Any]]) -> None:
        if skipped:
            with self._skipped_lock, open(self._skipped_path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in skipped)


def _read_source(image: SourceImage) -> bytes:
    data = Path(image.path).read_bytes()
    if len(data) != image.num_bytes:
        raise ValueError(
            f"{image.path} had {image.num_bytes} bytes when it was listed and has {len(data)} now: "
            "run again when the source no longer changes"
        )
    return data


def _inspect_decodable(data: bytes) -> JpegInfo:
    info = inspect_jpeg(data)
    if not info.kind.decodable:
        raise BadImageError(f"a {info.kind.name.lower()} JPEG, which GPU decoders refuse")
    return info


def _add_to_tar(tar: TarWriter, image: SourceImage, data: bytes, info: JpegInfo) -> IndexRow:
    label = {} if image.label == NO_LABEL else {"cls": str(image.label).encode()}
    tar.write({"__key__": image.key, "jpg": data, **label})
    # TarWriter writes extensions in sorted order, so the image comes last and ends where the tar is now.
    offset = tar.tarstream.offset - _padded(len(data))
    return index_row(TarRecord(image.key, offset, data, image.label), info)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _TAR_BLOCK) * _TAR_BLOCK


def _bytes_in_tar(num_bytes: int) -> int:
    return 3 * _TAR_BLOCK + _padded(num_bytes)  # two headers and the label


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


def _claim_folder(out: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with shards that these settings did not write; remove what a killed run left."""
    summary = out / DATASET_FILE
    if summary.exists():
        before = json.loads(summary.read_text()).get("settings", {})
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            what = ", ".join(
                "the source images"
                if name == "source"
                else f"{name}: {before.get(name)} -> {settings[name]}"
                for name in changed
            )
            raise ValueError(
                f"{out} holds shards of another source or settings ({what}): use the same again "
                "to continue, remove the folder, or write to another one"
            )
    elif foreign := sorted(out.glob("*.tar")):
        raise ValueError(
            f"{out} holds {len(foreign)} tar file(s) such as {foreign[0].name} and no {DATASET_FILE}: "
            "write to a folder of its own"
        )
    for leftover in out.glob(".*.partial"):
        leftover.unlink()


def _is_finished(tar_path: Path) -> bool:
    try:
        load_index(tar_path)
    except (FileNotFoundError, StaleIndexError):
        return False
    return True


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"the shards still to be written need {needed / 2**30:.1f} GiB and {out} has "
            f"{free / 2**30:.1f} GiB free: make room, or write to another disk"
        )


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def _finish(
    out: Path,
    settings: dict[str, Any],
    shards: Sequence[_Shard],
    source: ImageSource,
    *,
    num_already_written: int,
) -> WriteReport:
    num_skipped = _tidy_skipped(out / SKIPPED_FILE)
    report = WriteReport(
        num_shards=len(shards),
        num_already_written=num_already_written,
        num_samples=len(source.images) - num_skipped,
        num_skipped=num_skipped,
        num_bytes=sum(shard.path.stat().st_size for shard in shards),
    )
    if not report.num_samples:
        raise ValueError(
            f"none of the {num_skipped} files is a JPEG that can be decoded; {out / SKIPPED_FILE} says why"
        )
    summary = {
        "complete": True,
        "num_samples": report.num_samples,
        "num_shards": report.num_shards,
        "num_bytes": report.num_bytes,
        "num_classes": len(source.classes),
        "num_skipped": num_skipped,
        "shards": f"{out.name}-{{000000..{len(shards) - 1:06d}}}.tar",
        "created_by": f"cmae {metadata.version('cmae')}",
        "settings": settings,
    }
    _write_json(out / DATASET_FILE, summary)
    return report


def _tidy_skipped(path: Path) -> int:
    """Sort the lines by shard and drop those of a shard that was begun twice; return how many are left."""
    if not path.exists():
        return 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    unique = sorted(
        {line["path"]: line for line in lines}.values(),
        key=lambda line: (line["shard"], line["path"]),
    )
    with atomic_write(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in unique)
    return len(unique)


# --- verifying ------------------------------------------------------------------------------------


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
            [Problem(path, None, message)], np.empty(0, np.str_), np.empty(0, np.int64)
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
    return _ShardCheck([Problem(path, key, what) for key, what in found], now.keys, now.label)


def _has_end_marker(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(-2 * _TAR_BLOCK, os.SEEK_END)
        return not any(file.read())


def _differences(stored: ShardIndex, now: ShardIndex) -> Iterator[tuple[str | None, str]]:
    """What an index says that is not so, although size and digest of the tar are the same."""
    if len(stored) != len(now) or not np.array_equal(stored.offset, now.offset):
        yield (
            None,
            f"the index lists {len(stored)} samples elsewhere than the {len(now)} in the tar; index it again",
        )
        return
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
                info = _inspect_decodable(data)
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


# --- looking --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardStatistics:
    """Facts about the samples of some shards, from their indices alone."""

    num_shards: int
    num_samples: int
    """Images that can be decoded."""
    num_bad: int
    """Images that cannot."""
    samples_per_shard: tuple[int, int]
    """Smallest and largest."""
    image_bytes: int
    """Sum over all images."""
    percentiles: tuple[int, ...]
    """Which percentiles the next four give."""
    bytes_at: tuple[int, ...]
    """Bytes of an image."""
    megapixels_at: tuple[float, ...]
    width_at: tuple[int, ...]
    height_at: tuple[int, ...]
    kinds: dict[str, int]
    """Images of each JpegKind, most frequent first."""
    orientations: dict[int, int]
    """Images of each EXIF orientation."""
    num_unlabelled: int
    class_counts: dict[int, int]
    """Images of each label that occurs."""


def shard_statistics(shards: Sequence[str | Path]) -> ShardStatistics:
    """Summarise shards from their indices; no image is read.

    Raises:
        FileNotFoundError, StaleIndexError: See `DatasetIndex.load`.
    """
    index = DatasetIndex.load(shards)
    at = (0, 5, 25, 50, 75, 95, 100)
    labels, counts = np.unique(index.label[index.label != NO_LABEL], return_counts=True)
    kinds = Counter(index.kind.tolist()).most_common()
    pixels = index.height.astype(np.int64) * index.width
    return ShardStatistics(
        num_shards=len(index.paths),
        num_samples=len(index),
        num_bad=index.num_bad,
        samples_per_shard=(int(index.shard_sizes.min()), int(index.shard_sizes.max())),
        image_bytes=int(index.size.sum()),
        percentiles=at,
        bytes_at=tuple(map(int, np.percentile(index.size, at))),
        megapixels_at=tuple(float(x) for x in np.percentile(pixels / 1e6, at)),
        width_at=tuple(map(int, np.percentile(index.width, at))),
        height_at=tuple(map(int, np.percentile(index.height, at))),
        kinds={JpegKind(kind).name.lower(): count for kind, count in kinds},
        orientations=dict(sorted(Counter(index.orientation.tolist()).items())),
        num_unlabelled=int((index.label == NO_LABEL).sum()),
        class_counts=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
    )


def load_classes(folder: str | Path) -> list[str] | None:
    """Class names beside the shards, by label; None where there is no `classes.json`."""
    path = Path(folder) / CLASSES_FILE
    return [str(name) for name in json.loads(path.read_text())] if path.exists() else None


def contact_sheet(
    shards: Sequence[str | Path],
    out_path: str | Path,
    *,
    num_images: int = 40,
    columns: int = 8,
    cell_px: int = 176,
) -> Path:
    """Draw images spread evenly over the shards, as stored, with key and label; return `out_path`.

    Args:
        shards: Local tar files with indices.
        out_path: A .png file.
        num_images: At most; fewer where the shards hold fewer.
        columns: Images in a row.
        cell_px: Side of the square that an image is cropped to, in pixels.
    """
    index = DatasetIndex.load(shards)
    count = min(num_images, len(index))
    rows = (np.arange(count) + 0.5) * len(index) / count
    cells = [_draw_cell(index, int(row), cell_px) for row in rows]
    gap = cell_px // 16
    width, height = cells[0].size
    lines = -(-count // columns)
    columns = min(columns, count)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, lines * (height + gap) + gap), _BACKGROUND
    )
    for i, cell in enumerate(cells):
        line, column = divmod(i, columns)
        sheet.paste(cell, (gap + column * (width + gap), gap + line * (height + gap)))
    sheet.save(out_path, format="PNG")
    return Path(out_path)


_BACKGROUND, _INK, _FAINT_INK = "#ffffff", "#1a1a1a", "#767676"


def _draw_cell(index: DatasetIndex, row: int, side: int) -> Image.Image:
    """A square image over two lines of text: the key, then label and stored size."""
    shard, position = index.locate(row)
    path = index.paths[int(shard)]
    with open(path, "rb") as file:
        data = os.pread(file.fileno(), int(index.size[row]), int(index.offset[row]))
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * side, 2 * side))
        picture = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    font = ImageFont.load_default(max(side // 14, 9))
    assert isinstance(
        font, ImageFont.FreeTypeFont
    )  # the bitmap font is for Pillow without FreeType
    line_px = int(1.35 * font.size)
    cell = Image.new("RGB", (side, side + 2 * line_px + 4), _BACKGROUND)
    cell.paste(picture)
    draw = ImageDraw.Draw(cell)
    label = int(index.label[row])
    names = load_classes(Path(path).parent)
    label_text = "no label" if label == NO_LABEL else str(label)
    if names and 0 <= label < len(names):
        label_text += f" {names[label]}"
    size_text = f"{index.width[row]}x{index.height[row]}"
    key = _shorten(index.key(int(shard), int(position)), side, font)
    draw.text((0, side + 4), key, fill=_INK, font=font)
    draw.text((0, side + 4 + line_px), label_text, fill=_FAINT_INK, font=font)
    draw.text((side, side + 4 + line_px), size_text, fill=_FAINT_INK, font=font, anchor="ra")
    return cell


def _shorten(text: str, width_px: int, font: ImageFont.FreeTypeFont) -> str:
    """Cut the start: the end of a key tells samples apart."""
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength("…" + text) > width_px:
        text = text[1:]
    return "…" + text
