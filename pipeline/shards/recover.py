"""Read what is left of a damaged tar: after a damage, go on at the next header that is whole."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cmae.pipeline.formats.members.member_counts import DAMAGED, MemberCounts
from cmae.pipeline.formats.tar import (
    TAR_BLOCK,
    TarError,
    TarGroup,
    TarMember,
    TarRecord,
    count_group,
    group_members,
    is_header,
    iter_entries,
    loose_fate,
)

_MAGIC = b"ustar"  # at byte 257 of every header that a POSIX or GNU tar of the last 30 years wrote
_MAGIC_AT = 257


class Damage(NamedTuple):
    """A stretch of a tar that belongs to no member: bytes `start` to `end`, and what was wrong there."""

    start: int
    end: int
    what: str


def salvage_tar(path: str | Path) -> Iterator[TarMember | Damage]:
    """Yield entries and damages of a tar in order; of a whole tar, exactly what `iter_entries` yields.

    A header that lies inside the member before a damage shows that bytes of that member are missing: then it
    counts as damage too. Headers without the ustar magic (tars of before 1988) are not found again.

    Raises:
        OSError: The file cannot be read.
    """
    size = os.path.getsize(path)
    if size == 0:
        yield Damage(0, 0, "an empty file")
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start: int | None = 0
        while start is not None:
            last: TarMember | None = None
            try:
                for member in _members_from(file, start, str(path)):
                    if last is not None:
                        yield last
                    last = member
            except TarError as error:
                what = str(error).removeprefix(f"{path}: ").split(":")[0]
                broken_from = start if last is None else last.byte_offset
                start = _next_header(data, broken_from + (last is None))
                end = size if start is None else start
                if last is not None and end >= last.end:
                    broken_from = last.end
                    yield last
                elif last is not None:
                    what += f"; {last.name} lacks some of its bytes"
                if broken_from < end:
                    yield Damage(broken_from, end, what)
            else:
                if last is not None:
                    yield last
                return


def salvage_groups(
    path: str | Path, *, on_loose: Callable[[TarMember], None] = lambda member: None
) -> Iterator[TarGroup | Damage]:
    """Members of one key together, and damages, in order; no group reaches across a damage.

    Args:
        path: A tar.
        on_loose: Called with every entry that is in no group.
    """
    items = salvage_tar(path)
    damage: list[Damage] = []

    def members() -> Iterator[TarMember]:
        for item in items:
            if isinstance(item, Damage):
                damage.append(item)
                return
            yield item

    while True:
        yield from group_members(members(), on_loose=on_loose)
        if not damage:
            return
        yield damage.pop()


def salvage_records(path: str | Path, *, counts: MemberCounts) -> Iterator[TarRecord]:
    """The samples that are left in a damaged tar; entries and damages are counted by what became of them."""

    def count_loose(member: TarMember) -> None:
        counts.add(loose_fate(member), member.name)

    for group in salvage_groups(path, on_loose=count_loose):
        if isinstance(group, Damage):
            counts.add(DAMAGED, f"bytes {group.start} to {group.end}")
            continue
        record = count_group(group, counts)
        if record is not None:
            yield record


def _members_from(file: io.BufferedReader, start: int, name: str) -> Iterator[TarMember]:
    file.seek(start)
    for member in iter_entries(file, name=name):
        yield member._replace(byte_offset=member.byte_offset + start, start=member.start + start)


def _next_header(data: mmap.mmap, start: int) -> int | None:
    """Offset of the first whole header from `start` on, at any alignment: lost bytes shift what follows."""
    magic = start + _MAGIC_AT
    while (magic := data.find(_MAGIC, magic)) >= 0:
        header = magic - _MAGIC_AT
        # A sum of bytes does not see that noughts have moved: a header without a name begins elsewhere.
        if data[header] and is_header(data[header : header + TAR_BLOCK]):
            return header
        magic += 1
    return None
