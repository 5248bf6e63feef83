"""The images that go into shards: found in a folder with one subfolder a class, or named by a list file."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cmae.pipeline.formats.labels import NO_LABEL
from cmae.pipeline.formats.parallel import run_threads

_JPEG_SUFFIXES = frozenset({".jpg", ".jpeg"})
_OTHER_IMAGE_SUFFIXES = frozenset(
    {".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})
_MAX_KEY_BYTES = 90  # leaves room for an extension in the 100 bytes of a ustar name


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
