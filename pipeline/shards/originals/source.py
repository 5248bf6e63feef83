"""What `write_shards` writes: images with keys and labels, wherever their bytes lie."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from cmae.errors import CmaeError
from cmae.pipeline.formats.members.file_names import (
    IMAGE_EXTENSIONS,
    OTHER_IMAGE_EXTENSIONS,
    is_side_file,
    last_extension,
)
from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.pipeline.formats.members.member_counts import IMAGE, MemberCounts, sum_members
from cmae.printable import printable

Layout = Literal["auto", "classes", "flat"]
"""How a folder is read: one class a subfolder, or all images without labels; 'auto' refuses to guess."""

_SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})
_MAX_KEY_BYTES = 90  # leaves room for an extension in the 100 bytes of a ustar name
_MAX_SUFFIX = 8


class SourceImage(NamedTuple):
    """A file to be written: its WebDataset key, its class (-1: none) and its size in bytes."""

    path: str
    key: str
    label: int
    num_bytes: int
    byte_offset: int = 0
    """Where it begins in the archive; 0 for a file of its own."""


class Archive(Protocol):
    """A file that holds many images."""

    def read(self, byte_offset: int, num_bytes: int) -> bytes:
        """Bytes from an offset, fewer at its end; from any thread."""


@dataclass(frozen=True)
class ImageSource:
    """What `write_shards` writes."""

    images: tuple[SourceImage, ...]
    """In a fixed order: by class and path, or as in the list file."""
    classes: tuple[str, ...]
    """Name of each label; empty if there are none or they are not known."""
    files: MemberCounts = field(default_factory=MemberCounts)
    """What became of every file of the folder: images by the fate `IMAGE`, the others by why they are not."""
    archive: Archive | None = None
    """Where all images lie; None where each is a file."""


class Found(NamedTuple):
    """An image file: its path, its bytes, and where they begin in the archive."""

    path: str
    num_bytes: int
    byte_offset: int = 0


class FoundFiles:
    """Files below a folder."""

    def __init__(self) -> None:
        self.images: list[Found] = []
        """In a fixed order."""
        self.files = MemberCounts()
        self.suffixes: Counter[str] = Counter()

    def add(self, path: str, num_bytes: int, byte_offset: int = 0) -> None:
        """Count a file that is not hidden."""
        extension = last_extension(path)
        suffix = f".{extension}" if extension else ""
        self.suffixes[suffix] += 1
        if has_image_name(path):
            self.images.append(Found(path, num_bytes, byte_offset))
            self.files.add(IMAGE, path)
        else:
            shown = suffix if 0 < len(suffix) <= _MAX_SUFFIX else "otherwise"
            self.files.add(f"file named {shown}", path)


def has_image_name(name: str) -> bool:
    """Whether a file is named as an image, of a kind that can be used or of another."""
    return last_extension(name) in IMAGE_EXTENSIONS | OTHER_IMAGE_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over for its name."""
    return name.startswith(".") or is_side_file(name) or is_side_file(f"{name}/")


def refuse_splits(top: Path, classes: Sequence[str], layout: Layout) -> None:
    """Refuse train/ and val/ as classes.

    Raises:
        CmaeError: All folders are named as splits, or `layout` asks for classes where there are none.
    """
    if layout != "flat" and classes and _SPLIT_NAMES.issuperset(classes):
        raise CmaeError(
            f"images={str(top)!r} holds splits ({', '.join(classes)}), not classes: give one of them, "
            f"such as {top / classes[0]}, and write each split to a folder of its own"
        )
    if layout == "classes" and not classes:
        raise CmaeError(f"images={str(top)!r} holds no class folders: use layout=flat")


def source_of_classes(
    top: Path,
    classes: Sequence[str],
    found: Sequence[FoundFiles],
    beside: FoundFiles,
    *,
    layout: Layout,
    archive: Archive | None = None,
) -> ImageSource:
    """Number the classes and give every image its key.

    Args:
        top: The folder or archive.
        classes: Names of the class folders, sorted; none for images without labels.
        found: What lies in each class folder; one for all where there are none.
        beside: What lies beside the class folders.
        layout: How the user wants the folder to be read.
        archive: What holds the images; None where they are files.

    Raises:
        CmaeError: No JPEG, a class without images, or images beside class folders with layout 'auto'.
    """
    if beside.images and layout == "auto":
        raise CmaeError(_two_readings(top, classes, found, beside))
    suffixes = sum((one.suffixes for one in (*found, beside)), Counter[str]())
    if not any(suffixes[f".{extension}"] for extension in IMAGE_EXTENSIONS):
        raise CmaeError(_no_jpegs(top, suffixes))
    empty = [name for name, one in zip(classes, found, strict=False) if not one.images]
    if empty:
        raise CmaeError(
            f"images={str(top)!r}: {len(empty)} of {len(classes)} class folders hold no image, for example "
            f"{printable(empty[0])}. Labels are positions among the folders: fill or remove these first"
        )
    images = [
        (image, label if classes else NO_LABEL)
        for label, one in enumerate(found)
        for image in one.images
    ]
    if beside.images:
        beside.files.move(IMAGE, "image beside the class folders")
    files = sum_members(one.files for one in (*found, beside))
    return ImageSource(with_keys(images, top), tuple(classes), files, archive)


def with_keys(images: Iterable[tuple[Found, int]], root: Path) -> tuple[SourceImage, ...]:
    """Give each image a WebDataset key: its path below the root, without suffix, unique among all."""
    prefix = str(root) + os.sep
    taken: Counter[str] = Counter()
    keyed = []
    for image, label in images:
        folder, name = os.path.split(image.path.removeprefix(prefix).lstrip("/"))
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
        keyed.append(SourceImage(image.path, key, label, image.num_bytes, image.byte_offset))
    return tuple(keyed)


def _two_readings(
    top: Path, classes: Sequence[str], found: Sequence[FoundFiles], beside: FoundFiles
) -> str:
    num_below, num_here = sum(len(one.images) for one in found), len(beside.images)
    example = printable(os.path.basename(beside.images[0].path))
    return (
        f"images={str(top)!r} can be read in two ways: as a set without labels, of {num_here} images in the "
        f"folder itself and {num_below} below it (--layout flat), or as {len(classes)} class folders such as "
        f"{printable(classes[0])} with {num_below} images, without the {num_here} such as {example} "
        "(--layout classes)"
    )


def _no_jpegs(top: Path, suffixes: Counter[str]) -> str:
    found = ", ".join(
        f"{count} {printable(suffix) or 'without suffix'}"
        for suffix, count in suffixes.most_common(5)
    )
    start = f"images={str(top)!r} holds no .jpg or .jpeg files; found {found or 'nothing'}. "
    if suffixes[".tar"]:
        return start + "Tar files with JPEGs in them may already be shards: try `cmae shards index`"
    if any(suffixes[f".{extension}"] for extension in OTHER_IMAGE_EXTENSIONS):
        return (
            start
            + "The loader reads JPEG only: convert the images, for example with `mogrify -format jpg`"
        )
    return start + "Give the folder that holds one folder of images for each class"
