"""The images that go into shards: found in a folder with one subfolder a class, or named by a list file."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.pipeline.formats.members.file_names import (
    IMAGE_EXTENSIONS,
    OTHER_IMAGE_EXTENSIONS,
    is_side_file,
    last_extension,
)
from cmae.pipeline.formats.members.labels import NO_LABEL, parse_label
from cmae.pipeline.formats.members.member_counts import (
    HIDDEN,
    IMAGE,
    LABEL_OUT_OF_RANGE,
    MemberCounts,
    sum_members,
)
from cmae.pipeline.formats.parallel import run_threads
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


@dataclass(frozen=True)
class ImageSource:
    """What `write_shards` writes."""

    images: tuple[SourceImage, ...]
    """In a fixed order: by class and path, or as in the list file."""
    classes: tuple[str, ...]
    """Name of each label; empty if there are none or they are not known."""
    files: MemberCounts = field(default_factory=MemberCounts)
    """What became of every file of the folder: images by the fate `IMAGE`, the others by why they are not."""


def scan_image_folder(root: str | Path, *, layout: Layout = "auto") -> ImageSource:
    """Find the images below `root`, one folder a class, labels as torchvision's ImageFolder gives them.

    Class folders are sorted by name and searched to any depth; hidden ones are passed over. A folder with
    images and no folders in it is a set without labels. Files named as images of other formats are
    included: the writer reports them.

    Args:
        root: A folder.
        layout: Reading of the folder, one of `Layout`.

    Raises:
        CmaeError: The folder is missing, holds no JPEGs or only splits, a class has no images, or images lie
            beside the class folders and `layout` does not say which are meant.
    """
    top = expand_home(root)
    if not top.is_dir():
        raise CmaeError(_no_folder(top))
    classes = _class_folders(top)
    if layout != "flat" and classes and _SPLIT_NAMES.issuperset(classes):
        raise CmaeError(
            f"images={str(top)!r} holds splits ({', '.join(classes)}), not classes: give one of them, "
            f"such as {top / classes[0]}, and write each split to a folder of its own"
        )
    if layout == "classes" and not classes:
        raise CmaeError(f"images={str(top)!r} holds no class folders: use layout=flat")
    if layout == "flat":
        classes = []
    found = run_threads(_files_below, [top / name for name in classes] or [top])
    beside = _files_in(top, classes) if classes else _Found()
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
        (path, label if classes else NO_LABEL, size)
        for label, one in enumerate(found)
        for path, size in one.images
    ]
    if beside.images:
        beside.files.move(IMAGE, "image beside the class folders")
    files = sum_members(one.files for one in (*found, beside))
    return ImageSource(_with_keys(images, top), tuple(classes), files)


def read_image_list(list_file: str | Path, *, root: str | Path) -> ImageSource:
    """Read lines `path<TAB or space>label`; relative paths start at `root`, label -1 means none.

    Raises:
        CmaeError: A line is not UTF-8 or has no integer label, files are missing, or the list is empty.
    """
    images: list[tuple[str, int]] = []
    content = Path(list_file).read_bytes().removeprefix(b"\xef\xbb\xbf")  # Windows puts it first
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            where = f"{list_file}, line {number}"
            path, label = _parse_line(line.rstrip(b"\r"), where)
            images.append((os.path.join(root, path), label))
    chunks = [images[start : start + 1000] for start in range(0, len(images), 1000)]
    sizes = [size for chunk in run_threads(_sizes, chunks) for size in chunk]
    missing = [path for (path, _), size in zip(images, sizes, strict=True) if size is None]
    if missing or not images:
        raise CmaeError(
            f"{list_file}: {len(missing)} of {len(images)} files are missing"
            + (
                f", for example {printable(missing[0])}; relative paths start at {root}"
                if missing
                else ""
            )
        )
    sized = [(path, label, size or 0) for (path, label), size in zip(images, sizes, strict=True)]
    files = MemberCounts()
    files.add(IMAGE, images[0][0], len(images))
    return ImageSource(_with_keys(sized, Path(root)), classes=(), files=files)


def _parse_line(raw: bytes, where: str) -> tuple[str, int]:
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise CmaeError(
            f"{where}: byte {error.start} ({raw[error.start]:#04x}) is not UTF-8: convert the list, for "
            "example with `iconv -f latin1 -t utf-8` (or -f utf-16)"
        ) from error
    path, _, text = line.rpartition("\t") if "\t" in line else line.rstrip().rpartition(" ")
    label = parse_label(text.encode())
    if isinstance(label, str) or not path.strip():
        what = (
            "an integer from 0 to 2**63 - 1" if label == LABEL_OUT_OF_RANGE else "an integer >= 0"
        )
        raise CmaeError(
            f"{where}: {line!r} is not `path<TAB>label` with {what} as label (or -1 for none)"
        )
    return path.strip(), label


class _Found:
    """Files below a folder."""

    def __init__(self) -> None:
        self.images: list[tuple[str, int]] = []
        """Path and bytes, sorted by folder and name."""
        self.files = MemberCounts()
        self.suffixes: Counter[str] = Counter()

    def add(self, path: str, size: int) -> None:
        """Count a file that is not hidden."""
        extension = last_extension(path)
        suffix = f".{extension}" if extension else ""
        self.suffixes[suffix] += 1
        if extension in IMAGE_EXTENSIONS | OTHER_IMAGE_EXTENSIONS:
            self.images.append((path, size))
            self.files.add(IMAGE, path)
        else:
            shown = suffix if 0 < len(suffix) <= _MAX_SUFFIX else "otherwise"
            self.files.add(f"file named {shown}", path)


def _class_folders(top: Path) -> list[str]:
    entries = (entry for entry in os.scandir(top) if not _is_hidden(entry.name))
    return sorted(entry.name for entry in entries if _kind(entry) == "folder")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or is_side_file(name) or is_side_file(f"{name}/")


def _kind(entry: os.DirEntry[str]) -> str:
    """'folder', 'file', or why it is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "link that leads nowhere" if entry.is_symlink() else "device or pipe"
    except OSError:  # a link to itself
        return "link that leads nowhere"


def _files_in(folder: Path, besides: Sequence[str]) -> _Found:
    """Files of a folder, and what its subfolders of other names hold, all of them hidden."""
    found = _Found()
    _walk(
        [(str(folder), frozenset(), False)], found, without={str(folder / one) for one in besides}
    )
    return found


def _files_below(folder: Path) -> _Found:
    """All files below a folder."""
    found = _Found()
    _walk([(str(folder), frozenset(), False)], found, without=set())
    return found


def _walk(
    todo: list[tuple[str, frozenset[tuple[int, int]], bool]], found: _Found, *, without: set[str]
) -> None:
    """Count and collect files; folders are entered by name, links to them too, but none inside itself."""
    while todo:
        folder, above, is_hidden = todo.pop()
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            found.files.add("link to a folder that it lies in", folder)
            continue
        inside: list[str] = []
        for entry in sorted(os.scandir(folder), key=lambda one: one.path):
            kind = _kind(entry)
            if kind == "folder":
                inside.append(entry.path)
            elif is_hidden or _is_hidden(entry.name):
                found.files.add(HIDDEN, entry.path)
            elif kind == "file":
                found.add(entry.path, entry.stat().st_size)
            else:
                found.files.add(kind, entry.path)
        todo += [
            (path, above | {here}, is_hidden or _is_hidden(os.path.basename(path)))
            for path in reversed(inside)
            if path not in without
        ]


def _two_readings(
    top: Path, classes: Sequence[str], found: Sequence[_Found], beside: _Found
) -> str:
    num_below, num_here = sum(len(one.images) for one in found), len(beside.images)
    example = printable(os.path.basename(beside.images[0][0]))
    return (
        f"images={str(top)!r} can be read in two ways: as a set without labels, of {num_here} images in the "
        f"folder itself and {num_below} below it (--layout flat), or as {len(classes)} class folders such as "
        f"{printable(classes[0])} with {num_below} images, without the {num_here} such as {example} "
        "(--layout classes)"
    )


def _sizes(images: Sequence[tuple[str, int]]) -> list[int | None]:
    """Bytes of each file; None where it is missing."""
    return [os.path.getsize(path) if os.path.isfile(path) else None for path, _ in images]


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
