"""The images that go into shards: found in a folder with one subfolder a class, or named by a list file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.pipeline.formats.members.labels import parse_label
from cmae.pipeline.formats.members.member_counts import (
    HIDDEN,
    IMAGE,
    LABEL_OUT_OF_RANGE,
    MemberCounts,
)
from cmae.pipeline.formats.parallel import run_threads
from cmae.pipeline.shards.originals.source import (
    Found,
    FoundFiles,
    ImageSource,
    Layout,
    is_hidden,
    refuse_splits,
    source_of_classes,
    with_keys,
)
from cmae.printable import printable


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
    refuse_splits(top, classes, layout)
    if layout == "flat":
        classes = []
    found = run_threads(_files_below, [top / name for name in classes] or [top])
    beside = _files_in(top, classes) if classes else FoundFiles()
    return source_of_classes(top, classes, found, beside, layout=layout)


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
    sized = [
        (Found(path, size or 0), label) for (path, label), size in zip(images, sizes, strict=True)
    ]
    files = MemberCounts()
    files.add(IMAGE, images[0][0], len(images))
    return ImageSource(with_keys(sized, Path(root)), classes=(), files=files)


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


def _class_folders(top: Path) -> list[str]:
    entries = (entry for entry in os.scandir(top) if not is_hidden(entry.name))
    return sorted(entry.name for entry in entries if _kind(entry) == "folder")


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


def _files_in(folder: Path, besides: Sequence[str]) -> FoundFiles:
    """Files of a folder, and what its subfolders of other names hold, all of them hidden."""
    found = FoundFiles()
    _walk(
        [(str(folder), frozenset(), False)], found, without={str(folder / one) for one in besides}
    )
    return found


def _files_below(folder: Path) -> FoundFiles:
    """All files below a folder."""
    found = FoundFiles()
    _walk([(str(folder), frozenset(), False)], found, without=set())
    return found


def _walk(
    todo: list[tuple[str, frozenset[tuple[int, int]], bool]],
    found: FoundFiles,
    *,
    without: set[str],
) -> None:
    """Count and collect files; folders are entered by name, links to them too, but none inside itself."""
    while todo:
        folder, above, in_hidden = todo.pop()
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
            elif in_hidden or is_hidden(entry.name):
                found.files.add(HIDDEN, entry.path)
            elif kind == "file":
                found.add(entry.path, entry.stat().st_size)
            else:
                found.files.add(kind, entry.path)
        todo += [
            (path, above | {here}, in_hidden or is_hidden(os.path.basename(path)))
            for path in reversed(inside)
            if path not in without
        ]


def _sizes(images: Sequence[tuple[str, int]]) -> list[int | None]:
    """Bytes of each file; None where it is missing."""
    return [os.path.getsize(path) if os.path.isfile(path) else None for path, _ in images]


def _no_folder(top: Path) -> str:
    if top.is_file():
        return f"images={str(top)!r} is a file: give a folder of images, or a .tar of them"
    existing = next(parent for parent in top.absolute().parents if parent.is_dir())
    return f"images={str(top)!r} does not exist; {existing} is the last part that does"
