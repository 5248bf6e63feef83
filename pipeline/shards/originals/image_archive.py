"""Images in a tar, or in the tars of a tar as ImageNet's are: found and read where they lie, not unpacked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.pipeline.formats.members.member_counts import HIDDEN
from cmae.pipeline.formats.parallel import run_threads
from cmae.pipeline.formats.tar import TarMember, iter_entries
from cmae.pipeline.shards.originals.source import (
    FoundFiles,
    ImageSource,
    Layout,
    has_image_name,
    is_hidden,
    refuse_splits,
    source_of_classes,
)

_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar")

_FOLDER = "folder"
"""What the tar reader calls an entry that is a folder."""


class TarArchive:
    """A tar that stays open, read at any byte by any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the object
        self.num_bytes = os.fstat(self._file.fileno()).st_size

    def read(self, byte_offset: int, num_bytes: int) -> bytes:
        """Bytes from an offset, fewer at the file's end."""
        parts = []
        while num_bytes and (part := os.pread(self._file.fileno(), num_bytes, byte_offset)):
            parts.append(part)
            byte_offset, num_bytes = byte_offset + len(part), num_bytes - len(part)
        return b"".join(parts)


class _Stretch:
    """Bytes start..end of an archive as a file of its own."""

    def __init__(self, archive: TarArchive, start: int, end: int) -> None:
        self._archive = archive
        self._start = self._here = start
        self._end = end

    def read(self, num_bytes: int) -> bytes:
        data = self._archive.read(self._here, min(num_bytes, self._end - self._here))
        self._here += len(data)
        return data

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._here - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._here = offset + (self._end if whence == os.SEEK_END else self._start)
        return self.tell()


class _Entry(NamedTuple):
    """A file of the archive or of a tar in it."""

    parts: tuple[str, ...]
    """Folders and file name; the name of a tar in the archive, without suffix, is a folder."""
    num_bytes: int
    byte_offset: int
    """In the archive."""
    fault: str
    """What it is, if no file."""

    @property
    def in_hidden(self) -> bool:
        return any(map(is_hidden, self.parts))

    @property
    def is_image(self) -> bool:
        return not self.fault and not self.in_hidden and has_image_name(self.parts[-1])

    @property
    def walk_order(self) -> list[tuple[bool, str]]:
        """The order in which `scan_image_folder` walks: the files of a folder, then its folders."""
        return [*((True, part) for part in self.parts[:-1]), (False, self.parts[-1])]


def is_archive(path: str | Path) -> bool:
    """Whether images are packed in a file of this name."""
    return Path(path).suffix.lower() in (".tar", *_COMPRESSED) and not Path(path).is_dir()


def scan_image_archive(archive: str | Path, *, layout: Layout = "auto") -> ImageSource:
    """Find the images of a tar as `scan_image_folder` finds those of the folder that it unpacks to.

    A tar inside it counts as a folder of its name: `n01440764.tar` of ImageNet's training archive is the
    class n01440764. One folder around all classes, such as `winter21_whole/`, is passed through. Only headers
    are read. The shards have the same bytes as those written from the unpacked folder.

    Args:
        archive: A tar on a disk, not compressed.
        layout: Reading of its folders, one of `Layout`.

    Raises:
        CmaeError: It is missing, compressed, cut short, damaged or a shard, or what `scan_image_folder`
            refuses.
    """
    path = expand_home(archive)
    if path.suffix.lower() in _COMPRESSED:
        raise CmaeError(_compressed(path))
    if not path.is_file():
        raise CmaeError(
            f"images={str(path)!r} does not exist: give a folder of images, or a .tar of them"
        )
    tar = TarArchive(path)
    entries = _below_common_folder(_all_entries(tar))
    if any(one.parts[-1].endswith(".cls") for one in entries):
        raise CmaeError(
            f"images={str(path)!r} holds labels (.cls) beside its images: it is a shard already, which "
            f"`cmae shards index {path}` makes ready"
        )
    names = [] if layout == "flat" else _class_names(entries)
    refuse_splits(path, names, layout)
    found = {name: FoundFiles() for name in names}
    rest = FoundFiles()
    last = {one.parts: number for number, one in enumerate(entries)}
    for number, one in sorted(enumerate(entries), key=lambda one: one[1].walk_order):
        if last[one.parts] != number:  # as unpacking would have it
            rest.files.add(
                "file that a later one of its name replaces", os.path.join(path, *one.parts)
            )
        elif one.fault != _FOLDER:
            _count(one, found.get(one.parts[0], rest) if len(one.parts) > 1 else rest, path)
    if not names:
        return source_of_classes(path, [], [rest], FoundFiles(), layout=layout, archive=tar)
    return source_of_classes(path, names, list(found.values()), rest, layout=layout, archive=tar)


def _all_entries(tar: TarArchive) -> list[_Entry]:
    """Every entry of the archive and of the tars in it; these are read in parallel, by their headers."""
    own: list[_Entry] = []
    packed: list[tuple[TarMember, tuple[str, ...]]] = []
    for member in iter_entries(_stream(tar, 0, tar.num_bytes), name=str(tar.path), with_data=False):
        parts = _parts(member.name)
        if not member.fault and parts and parts[-1].endswith(".tar") and not is_hidden(parts[-1]):
            packed.append((member, (*parts[:-1], parts[-1].removesuffix(".tar"))))
        elif parts:
            own.append(_Entry(parts, member.size, member.byte_offset, member.fault))

    def read_packed(one: tuple[TarMember, tuple[str, ...]]) -> list[_Entry]:
        member, folder = one
        stream = _stream(tar, member.byte_offset, member.byte_offset + member.size)
        name = f"{tar.path}: {member.name}"
        inside = [
            _Entry((*folder, *parts), file.size, member.byte_offset + file.byte_offset, file.fault)
            for file in iter_entries(stream, name=name, with_data=False)
            if (parts := _parts(file.name))
        ]
        return [_Entry(folder, 0, member.byte_offset, _FOLDER), *inside]

    return own + [entry for found in run_threads(read_packed, packed) for entry in found]


def _stream(tar: TarArchive, start: int, end: int) -> IO[bytes]:
    return cast("IO[bytes]", _Stretch(tar, start, end))


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _below_common_folder(entries: Sequence[_Entry]) -> list[_Entry]:
    """Drop the first folder of all names while all images lie in folders of that one."""
    kept = list(entries)
    while True:
        images = [one for one in kept if one.is_image]
        if len({one.parts[0] for one in images}) != 1 or min(len(one.parts) for one in images) < 3:
            return kept
        top = images[0].parts[0]
        kept = [
            one._replace(parts=one.parts[1:]) if one.parts[0] == top else one
            for one in kept
            if one.parts != (top,)
        ]


def _class_names(entries: Sequence[_Entry]) -> list[str]:
    folders = {one.parts[0] for one in entries if len(one.parts) > 1 or one.fault == _FOLDER}
    return sorted(name for name in folders if not is_hidden(name))


def _count(entry: _Entry, found: FoundFiles, archive: Path) -> None:
    path = os.path.join(archive, *entry.parts)
    if entry.in_hidden:
        found.files.add(HIDDEN, path)
    elif entry.fault:
        found.files.add(entry.fault, path)
    else:
        found.add(path, entry.num_bytes, entry.byte_offset)


def _compressed(path: Path) -> str:
    if path.suffix.lower() in (".zip", ".7z", ".rar"):
        return f"images={str(path)!r}: archives of this kind are not read: unpack it, and give the folder"
    plain = path.with_suffix(".tar") if path.suffix.startswith(".t") else path.with_suffix("")
    tool = {"z2": "bunzip2", "xz": "unxz", "st": "unzstd"}.get(path.suffix[-2:].lower(), "gunzip")
    return (
        f"images={str(path)!r} is compressed, and cannot be read at random: JPEGs gain nothing by it. "
        f"Undo it with `{tool} -c {path} > {plain}`, and give that file"
    )
