"""First pass of a repair: judge every entry of a tar, and find the samples that it holds."""

from __future__ import annotations

import hashlib
import os
import posixpath
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from cmae.pipeline.formats.images.jpeg import BadImageError, Decode
from cmae.pipeline.formats.images.pixels import decode_any
from cmae.pipeline.formats.members.file_names import (
    IMAGE_EXTENSIONS,
    OTHER_IMAGE_EXTENSIONS,
    is_read,
    last_extension,
    split_name,
)
from cmae.pipeline.formats.members.labels import LABEL_EXTENSIONS, NO_LABEL, label_text, read_label
from cmae.pipeline.formats.members.member_counts import is_harmless
from cmae.pipeline.formats.shard_index import load_index_unchecked
from cmae.pipeline.formats.tar import (
    MAX_MEMBER_BYTES,
    TarGroup,
    TarMember,
    TarRecord,
    fates_of,
    first_label,
    group_members,
    is_label,
    loose_fate,
)
from cmae.pipeline.shards.recover import Damage, salvage_tar
from cmae.pipeline.shards.verify import IndexedBytes, check_image, has_end_marker

_ALL_IMAGES = IMAGE_EXTENSIONS | OTHER_IMAGE_EXTENSIONS
_LINKS = ("hard link", "symbolic link")
_MAX_LINK_STEPS = 8
_MAX_JPEG_SIDE = 65500
"""Largest side that libjpeg writes, in pixels."""


@dataclass(frozen=True)
class RepairPolicy:
    """What becomes of records that could be treated in more than one way."""

    duplicates: Literal["rename", "drop"] = "rename"
    """A key that occurs again: give it a new name, or keep the first record only. One with the same bytes as
    before is dropped either way."""
    unlabelled: Literal["keep", "drop"] = "keep"
    """A record without a label that is read, or with one beyond `classes.json`, where others have one."""
    reencode: bool = False
    """Make JPEGs (quality 95, no chroma subsampling) of images in other formats, instead of dropping them."""
    decode: Decode = "none"
    """Also decode every image, and drop those that fail."""
    drop_suspect: bool = False
    """Also drop images with a sign of damage that is no proof."""


class Entry(NamedTuple):
    """An entry of the tar, judged; its payload is not kept."""

    member: TarMember
    label: int | str = NO_LABEL
    """What a label member says; see `read_label`."""
    label_text: str = ""
    """The beginning of a label member, for people."""
    digest: bytes = b""
    """Of an image's bytes."""
    fault: str = ""
    """Why an image cannot be used; '' when it can."""
    suspicion: str = ""
    """A sign of damage that is no proof."""
    reencode: bool = False
    index_label: int = NO_LABEL
    """The label that the image had when it was indexed."""
    is_link: bool = False
    """Its payload is that of another entry."""


@dataclass
class Sample:
    """An image and what belongs to it."""

    key: str
    image: str
    """Extension of the image among the members."""
    members: dict[str, Entry]
    joined: dict[str, str] = field(default_factory=dict)
    """Names of members that lay apart; of labels, with what they say."""
    is_renamed: bool = False
    """The key is not the one that WebDataset reads in the members' names."""
    label_of: Sample | None = None
    """The sample that shares its label, for a second image under one key."""

    @property
    def entry(self) -> Entry:
        """The image."""
        return self.members[self.image]

    @property
    def start(self) -> int:
        """Its place among the others."""
        return self.entry.member.start

    @property
    def stated_label(self) -> int:
        """The label that its members state."""
        labels = {one: self.members[one].label for one in self.members if one in LABEL_EXTENSIONS}
        return first_label(labels)

    @property
    def label(self) -> int:
        """The label to write; of one that is lost, an index remembers it."""
        if self.label_of is not None:
            return self.label_of.label
        return self.entry.index_label if self.stated_label == NO_LABEL else self.stated_label


class Lost(NamedTuple):
    """An entry that has no place in a repaired shard."""

    entry: Entry
    reason: str
    """One of a few."""
    detail: str = ""


class Kept(NamedTuple):
    """An entry that belongs to no sample, and is copied as it is."""

    entry: Entry


Item = Sample | Lost | Kept | Damage


@dataclass
class ShardLook:
    """What the first pass found, in the order of the tar."""

    items: list[Item]
    num_entries: int
    has_end: bool


def look(path: Path, policy: RepairPolicy, stop: threading.Event) -> ShardLook:
    """Judge every entry of a shard, and put them together to samples.

    Raises:
        OSError: The file cannot be read.
        InterruptedError: Stopped.
    """
    judge = _Judge(IndexedBytes(load_index_unchecked(path)), policy)
    found: list[Entry | Damage] = []
    for item in salvage_tar(path):
        if stop.is_set():
            raise InterruptedError(f"{path.name} was stopped")
        found.append(item if isinstance(item, Damage) else judge.entry(item))
    found = _follow_links(path, found, judge)
    items = _Samples(path, found).items
    items.sort(key=_place)
    num_entries = sum(isinstance(one, Entry) for one in found)
    return ShardLook(items, num_entries, has_end_marker(str(path)))


def _place(item: Item) -> int:
    if isinstance(item, Sample | Damage):
        return item.start
    return item.entry.member.start


class _Judge:
    def __init__(self, stored: IndexedBytes, policy: RepairPolicy) -> None:
        self._stored = stored
        self._policy = policy

    def entry(self, member: TarMember) -> Entry:
        """Look at the payload of a member, and let it go."""
        extension = last_extension(member.name)
        bare = member._replace(data=b"")
        if member.fault or not is_read(member.name):
            return Entry(bare)
        if extension in LABEL_EXTENSIONS:
            return Entry(bare, read_label(extension, member.data), label_text(member.data))
        return self._image(bare, member.data)

    def _image(self, member: TarMember, data: bytes) -> Entry:
        split = split_name(member.name)
        record = TarRecord(split[0] if split else "", member.byte_offset, data, NO_LABEL)
        fault, suspicion, reencode = "", "", False
        try:
            self._stored.check(record)
            suspicion, reencode = self._look_closely(data)
        except BadImageError as error:
            fault = str(error)
        # A fault of ours, or of a library, is no fault of the image.
        except Exception as error:
            suspicion = f"could not be judged: {type(error).__name__}: {error}"
        if suspicion and self._policy.drop_suspect:
            fault = suspicion
        digest = hashlib.sha256(data).digest()
        return Entry(
            member,
            digest=digest,
            fault=fault,
            suspicion=suspicion,
            reencode=reencode,
            index_label=self._stored.label(record),
        )

    def _look_closely(self, data: bytes) -> tuple[str, bool]:
        """A suspicion, and whether the image has to be encoded again.

        Raises:
            BadImageError: It cannot be used.
        """
        try:
            return check_image(data, self._policy.decode), False
        except BadImageError as error:
            if not self._policy.reencode:
                raise
            try:
                size = decode_any(data).size
            except BadImageError:
                raise error from None
            if max(size) > _MAX_JPEG_SIDE:
                raise
            return "", True


def _follow_links(
    path: Path, found: Sequence[Entry | Damage], judge: _Judge
) -> list[Entry | Damage]:
    """Give links to images and labels of the same tar the payload that they point to."""
    members = {one.member.name: one.member for one in found if isinstance(one, Entry)}
    result: list[Entry | Damage] = []
    with open(path, "rb") as file:
        for one in found:
            if isinstance(one, Entry) and one.member.fault in _LINKS and is_read(one.member.name):
                target = _target(one.member, members)
                if target is not None and target.size <= MAX_MEMBER_BYTES:
                    data = os.pread(file.fileno(), target.size, target.byte_offset)
                    at, size = target.byte_offset, target.size
                    member = one.member._replace(fault="", data=data, byte_offset=at, size=size)
                    one = judge.entry(member)._replace(is_link=True)
            result.append(one)
    return result


def _target(member: TarMember, members: dict[str, TarMember]) -> TarMember | None:
    """The plain file of the tar that a link leads to."""
    for _ in range(_MAX_LINK_STEPS):
        name = member.target
        if member.fault == "symbolic link":
            name = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), name))
        found = members.get(name)
        if found is None or not found.fault:
            return found
        if found.fault not in _LINKS:
            return None
        member = found
    return None


class _Samples:
    """The samples of a shard: neighbours of one key, and parts of that key that lie apart."""

    def __init__(self, path: Path, found: Sequence[Entry | Damage]) -> None:
        self._path = path
        self._entries = {one.member.start: one for one in found if isinstance(one, Entry)}
        self.items: list[Item] = [one for one in found if isinstance(one, Damage)]
        self._by_key: dict[str, list[Sample]] = {}
        self._apart: list[tuple[str, str, Entry, str]] = []  # key, extension, entry, fate
        # Images whose name has no key of its own, by the whole name, with their extensions.
        self._stray: dict[str, list[tuple[str, Entry]]] = {}
        loose: list[TarMember] = []
        for group in _groups(found, loose.append):
            self._add_group(group)
        for member in loose:
            self._add_loose(self._entries[member.start])
        self._join_parts()
        self._add_stray()

    def _add_group(self, group: TarGroup) -> None:
        entries = {one: self._entries[member.start] for one, member in group.members.items()}
        candidates = [one for one in entries if one in IMAGE_EXTENSIONS]
        candidates += [one for one in entries if one in OTHER_IMAGE_EXTENSIONS]
        if not candidates:
            names = {one: entry.member.name for one, entry in entries.items()}
            labels = {
                one: entry.label for one, entry in entries.items() if is_label(one, has_image=False)
            }
            for extension, fate in fates_of(names, labels).items():
                self._apart.append((group.key, extension, entries[extension], fate))
            return
        image = next((one for one in candidates if not entries[one].fault), candidates[0])
        for other in candidates:
            if other != image and (other in IMAGE_EXTENSIONS and entries[other].fault):
                entry = entries.pop(other)
                self.items.append(Lost(entry, "image that cannot be used", entry.fault))
        further = [one for one in entries if one in IMAGE_EXTENSIONS and one != image]
        second = {one: entries.pop(one) for one in further}
        sample = Sample(group.key, image, entries)
        self._add_sample(sample)
        for extension, entry in second.items():
            self.items.append(Sample(group.key, extension, {extension: entry}, label_of=sample))

    def _add_sample(self, sample: Sample) -> None:
        self.items.append(sample)
        self._by_key.setdefault(sample.key, []).append(sample)

    def _add_loose(self, entry: Entry) -> None:
        fate = loose_fate(entry.member)
        if is_harmless(fate):
            self.items.append(Kept(entry))
        elif entry.member.fault or not self._note_stray(entry):
            self.items.append(Lost(entry, fate))

    def _note_stray(self, entry: Entry) -> bool:
        """Keep an image for a key made of its whole name; False where nothing is left of that."""
        stem, _, extension = entry.member.name.rpartition(".")
        if last_extension(entry.member.name) not in _ALL_IMAGES or not stem.rpartition("/")[2]:
            return False
        self._stray.setdefault(stem, []).append((extension.lower(), entry))
        return True

    def _join_parts(self) -> None:
        """Give parts that lie apart to the one sample of their key.

        Where all labels lie beside their images, other files stay where they are.
        """
        is_torn = any(
            not is_harmless(fate) and len(self._by_key.get(key, ())) == 1
            for key, _, _, fate in self._apart
        )
        for key, extension, entry, fate in self._apart:
            samples = self._by_key.get(key, [])
            if len(samples) == 1 and is_torn:
                self._join(samples[0], extension, entry, fate)
            elif is_harmless(fate):
                self.items.append(Kept(entry))
            elif samples:
                detail = f"{len(samples)} images have its key: whose it is cannot be told"
                self.items.append(Lost(entry, fate, detail))
            elif not self._note_stray(entry):
                self.items.append(Lost(entry, fate))

    def _join(self, sample: Sample, extension: str, entry: Entry, fate: str) -> None:
        there = sample.members.get(extension)
        if there is None:
            sample.members[extension] = entry
            sample.joined[entry.member.name] = entry.label_text
        elif self._is_same(there.member, entry.member):
            self.items.append(Lost(entry, "the same part occurs before"))
        elif is_harmless(fate):
            self.items.append(Kept(entry))
        else:
            self.items.append(Lost(entry, fate, f"its sample has another .{extension}"))

    def _is_same(self, one: TarMember, other: TarMember) -> bool:
        if one.size != other.size or one.size > MAX_MEMBER_BYTES:
            return False
        with open(self._path, "rb") as file:
            first, second = (
                os.pread(file.fileno(), member.size, member.byte_offset) for member in (one, other)
            )
        return first == second

    def _add_stray(self) -> None:
        """Samples of images whose name has more than one dot, with the labels of the same name."""
        labels = {
            item.entry.member.name: item for item in self.items if isinstance(item, Lost | Kept)
        }
        found: set[int] = set()
        for stem, images in self._stray.items():
            (image, entry), *others = images
            sample = Sample(_key_of(stem), image, {image: entry}, is_renamed=True)
            for extension in LABEL_EXTENSIONS:
                if (label := labels.get(f"{stem}.{extension}")) is not None:
                    sample.members[extension] = label.entry
                    found.add(id(label))
            self._add_sample(sample)
            for other, entry in others:
                alone = {other: entry}
                second = Sample(sample.key, other, alone, is_renamed=True, label_of=sample)
                self.items.append(second)
        self.items = [item for item in self.items if id(item) not in found]


def _key_of(stem: str) -> str:
    """A key that WebDataset reads in full."""
    folder, slash, file = stem.rpartition("/")
    key = folder + slash + file.replace(".", "_")
    return f"x{key}" if key.startswith("__") else key


def _groups(
    found: Iterable[Entry | Damage], on_loose: Callable[[TarMember], None]
) -> Iterator[TarGroup]:
    """Groups of neighbours; none reaches across a damage."""
    stretch: list[TarMember] = []
    for one in found:
        if isinstance(one, Damage):
            yield from group_members(stretch, on_loose=on_loose)
            stretch = []
        else:
            stretch.append(one.member)
    yield from group_members(stretch, on_loose=on_loose)
