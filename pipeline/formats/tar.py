"""Read a tar in order, from a file or a pipe, and group its members as WebDataset does.

A *record* is a group of consecutive members with the same WebDataset key (path up to the first dot of the
file name) that holds an image. Its `record_number` counts
records in tar order, bad images included, so it stays the same whatever is later found wrong with an image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg"})
"""Lower-case WebDataset extensions (everything after the first dot) that are taken for an image."""
NO_LABEL = -1
TAR_BLOCK = 512
"""Bytes; headers take one block, payloads are padded to whole blocks."""
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # WebDataset's rule

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd", b"\xfd7zX")  # gzip, bzip2, zstandard, xz
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # names that WebDataset skips
_REGULAR_TYPES = frozenset(b"\x000" + b"7")
_HEADERS_WITHOUT_USE = frozenset(b"gK")  # global pax headers and long names of link targets
_TYPES_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders, fifos


class TarError(ValueError):
    """A shard that is not a well-formed tar, or holds no images; names the file and the byte."""


class TarMember(NamedTuple):
    """A regular file in a tar; `byte_offset` is that of its payload."""

    name: str
    byte_offset: int
    data: bytes


class TarGroup(NamedTuple):
    """Consecutive members with one WebDataset key, by lower-case extension."""

    key: str
    members: dict[str, TarMember]


class TarRecord(NamedTuple):
    """One sample of a shard; `byte_offset` is that of the image payload in the tar, `label` -1 if absent."""

    key: str
    byte_offset: int
    image: bytes
    label: int


def iter_tar(stream: IO[bytes], *, name: str) -> Iterator[TarMember]:
    """Yield the regular files of a tar, in order; 3 to 7 times faster than `tarfile`.

    Reads ustar, GNU long names and pax headers, from anything with `read`, pipes included. The two zero
    blocks at the end may be missing, but where they are nothing may follow them.

    Args:
        stream: Positioned at the first header; `read(n)` gives fewer than n bytes only at the end.
        name: What errors call the stream.

    Raises:
        TarError: A header with a wrong checksum, a member cut short, or a hole of zeros.
    """
    byte_offset, padding = 0, 0
    long_name: str | None = None
    long_size: int | None = None
    while block := stream.read(padding + TAR_BLOCK)[padding:]:
        byte_offset += padding
        if block.count(0) == TAR_BLOCK:
            _check_only_zeros_follow(stream, name, byte_offset)
            return
        member, size, kind = _parse_header(block, name, byte_offset)
        byte_offset += TAR_BLOCK
        if long_size is not None:
            size, long_size = long_size, None
        if kind in _TYPES_WITHOUT_DATA:
            size = 0
        data = stream.read(size)
        if len(data) != size:
            raise TarError(
                f"{name}: truncated: {member} needs {size} bytes from byte {byte_offset}, "
                f"{len(data)} are left"
            )
        if kind == ord("L"):
            long_name = data.rstrip(b"\0").decode(errors="surrogateescape")
        elif kind == ord("x"):
            pax_name, long_size = _parse_pax(data, name, byte_offset)
            long_name = long_name if pax_name is None else pax_name
        elif kind not in _HEADERS_WITHOUT_USE:
            if kind in _REGULAR_TYPES:
                yield TarMember(long_name or member, byte_offset, data)
            long_name = None
        byte_offset += size
        padding = -size % TAR_BLOCK


def iter_records(stream: IO[bytes], *, name: str) -> Iterator[TarRecord]:
    """Group the members of a tar as WebDataset does and yield the groups that hold an image.

    The label is the integer in `.cls`, or the integer `label` in `.json`.

    Raises:
        TarError: See `iter_tar`.
    """
    for group in group_members(iter_tar(stream, name=name)):
        record = record_of(group)
        if record is not None:
            yield record


def group_members(members: Iterable[TarMember]) -> Iterator[TarGroup]:
    """Put consecutive members of a key together; an extension that comes again begins a new group."""
    key: str | None = None
    group: dict[str, TarMember] = {}
    try:
        for member in members:
            match = KEY_AND_EXTENSION.match(member.name)
            if match is None or _WEBDATASET_META.match(member.name):
                continue
            extension = match[2].lower()
            if match[1] != key or extension in group:
                if key is not None:
                    yield TarGroup(key, group)
                key, group = match[1], {}
            group[extension] = member
    except TarError:
        if key is not None:  # what lies before a damage is good
            yield TarGroup(key, group)
        raise
    if key is not None:
        yield TarGroup(key, group)


def record_of(group: TarGroup) -> TarRecord | None:
    """The sample that a group holds; None without an image."""
    image: TarMember | None = None
    label = NO_LABEL
    for extension, member in group.members.items():
        if extension in IMAGE_EXTENSIONS:
            image = image or member
        elif extension in ("cls", "json") and label == NO_LABEL:
            label = _parse_label(extension, member.data)
    return None if image is None else TarRecord(group.key, image.byte_offset, image.data, label)


def _parse_header(block: bytes, name: str, byte_offset: int) -> tuple[str, int, int]:
    """Member name, payload size in bytes and type flag of one 512-byte header."""
    try:
        stored = int(block[148:156].strip(b" \0"), 8)
        # Sizes of 8 GiB and more are stored as a binary number whose first bit is set.
        size = (
            int.from_bytes(block[125:136])
            if block[124] & 0x80
            else int(block[124:136].strip(b" \0") or b"0", 8)
        )
    except (ValueError, IndexError):
        stored, size = -1, 0
    if stored != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise TarError(_not_a_header(block, name, byte_offset))
    member = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    full = prefix + b"/" + member if prefix else member
    if block[156] == ord("S"):
        raise TarError(
            f"{name}: {full.decode(errors='replace')} is a GNU sparse file; write the tar without --sparse"
        )
    return full.decode(errors="surrogateescape"), size, block[156]


def is_header(block: bytes) -> bool:
    """Whether these 512 bytes are a tar header with the right checksum."""
    try:
        _parse_header(block, "", 0)
    except TarError:
        return False
    return len(block) == TAR_BLOCK


def _not_a_header(block: bytes, name: str, byte_offset: int) -> str:
    if byte_offset > 0 and len(block) < TAR_BLOCK:
        return f"{name}: truncated: {len(block)} bytes at byte {byte_offset} are no tar header"
    if byte_offset > 0:
        return f"{name}: damaged: no tar header at byte {byte_offset} (wrong checksum)"
    if block.startswith(_COMPRESSED):
        return f"{name}: a compressed tar, which has no fixed offsets: unpack it (gunzip) to a .tar"
    return f"{name}: not a tar file: it starts with {block[:16]!r}"


def _check_only_zeros_follow(stream: IO[bytes], name: str, byte_offset: int) -> None:
    start = byte_offset + TAR_BLOCK
    while chunk := stream.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise TarError(
                f"{name}: damaged: the tar ends with a zero block at byte {byte_offset}, but data follows "
                f"after byte {start} (overwritten with zeros, or two tars in one file)"
            )
        start += len(chunk)


def _parse_pax(data: bytes, name: str, byte_offset: int) -> tuple[str | None, int | None]:
    """Path and size that a pax extended header (POSIX.1-2001) gives the next member."""
    try:
        records = _pax_records(data)
        size = int(records["size"]) if "size" in records else None
    except ValueError as error:
        raise TarError(f"{name}: damaged: pax header at byte {byte_offset}: {error}") from error
    return records.get("path"), size


def _pax_records(data: bytes) -> dict[str, str]:
    """Lines `<length> <keyword>=<value>`."""
    records: dict[str, str] = {}
    start = 0
    while (space := data.find(b" ", start)) > 0:
        end = start + int(data[start:space])
        if end <= space:
            raise ValueError(f"a pax line of {end - start} bytes")
        keyword, _, value = data[space + 1 : end - 1].partition(b"=")
        records[keyword.decode(errors="replace")] = value.decode(errors="surrogateescape")
        start = end
    return records


def _parse_label(extension: str, data: bytes) -> int:
    try:
        value = json.loads(data).get("label", NO_LABEL) if extension == "json" else int(data)
    except (ValueError, AttributeError):
        return NO_LABEL
    return value if isinstance(value, int) else NO_LABEL
